"""What the chat's three answers side by side cost: original, steering and edit in one batch, against the edit alone.

Run: python benchmarks/chat.py
"""

from __future__ import annotations

import statistics
from typing import Any

from steer2edit.engines.transformers import TransformersEngine
from steer2edit.serving.conversation import EDIT, Conversation, Settings
from steer2edit.serving.sources import Source
from steer2edit.serving.worker import Worker, one_team
from timing import ratio
from workload import base_model, scores

TOKENS, ROUNDS = 64, 5
QUESTION = [{"role": "user", "content": "Write three sentences about the sea, and three about the mountains."}]


def main() -> None:
    with one_team() as threads:  # as the command does
        model, tokenizer = base_model()
        found = scores()
        source = Source("edit", found.edit(rho_attn=0.3, rho_mlp=None, alpha=0.2), found, gamma=0.02)
        worker = Worker(TransformersEngine(model, tokenizer), threads=threads)
        try:
            measure(Conversation(worker, [source]), tokenizer)
        finally:
            worker.close()


def measure(conversation: Conversation, tokenizer: Any) -> None:
    settings = Settings({"edit": 0.5}, gamma=0.02, tokens=TOKENS)
    lengths: list[int] = []

    def ask(systems: tuple[str, ...]) -> None:
        *_, turn = conversation.ask(dict.fromkeys(systems, QUESTION), settings)
        assert not turn.failures
        lengths.append(statistics.mean(len(tokenizer(text)["input_ids"]) for text in turn.texts.values()))

    ratio(
        lambda: ask(conversation.systems),
        lambda: ask((EDIT,)),
        ROUNDS,
        ("<=", 1.3),
        "three answers side by side / one",
    )
    print(f"  tokens an answer: {min(lengths):.0f} to {max(lengths):.0f}")


if __name__ == "__main__":
    main()
