"""The chat in a browser: one question, the answers of all systems side by side, and a slider for everything.

All of a model's text is put into text boxes, which show it as it is. The page loads nothing from other machines.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ..engines.base import Sampling
from ..errors import FileError, Steer2EditError
from ..progress import say
from ..report.visible import visible
from .conversation import Budget, Conversation, Messages, Settings
from .server import address_of, http_server, is_loopback, listening, run_until_stopped

# Seconds between two looks at an answer that grows.
REFRESH = 0.1
_FILE_NAME = re.compile(r"[\w][\w .-]*\.(safetensors|yaml)")


class Playground:
    """What the page's controls do.

    Args:
        folder: where settings are saved.
    """

    def __init__(self, conversation: Conversation, folder: Path):
        self.conversation, self.folder = conversation, folder
        self.names = [source.name for source in conversation.sources]

    def settings(self, values: Sequence[Any]) -> Settings:
        """From the controls, in the order in which `_controls` makes them."""
        count = len(self.names)
        strengths = dict(zip(self.names, map(float, values[:count]), strict=True))
        gamma, rho_attn, rho_mlp, alpha, temperature, top_p, top_k, tokens, seed = values[count:]
        budget = None
        if self.conversation.budget is not None:
            budget = Budget(rho_attn or None, rho_mlp or None, float(alpha))
            if budget == _rounded(self.conversation.budget):
                budget = None  # the edit's own, to the last digit
        sampling = Sampling(float(temperature), float(top_p), int(top_k))
        return Settings(strengths, float(gamma or 0), budget, sampling, int(seed), int(tokens))

    def ask(self, question: str, system: str, histories: dict[str, Messages], *values: Any) -> Iterator[list[Any]]:
        """Yields what the answers show so far, the histories, and what went wrong."""
        systems = self.conversation.systems
        before = [_transcript(histories.get(name, [])) for name in systems]
        if not question.strip():
            yield [*before, histories, "Write a question first."]
            return
        first = [{"role": "system", "content": system}] if system.strip() else []
        asked = {name: [*histories.get(name, []), {"role": "user", "content": question}] for name in systems}
        try:
            settings = self.settings(values)
            shown_at = 0.0
            for turn in self.conversation.ask({name: [*first, *asked[name]] for name in systems}, settings):
                ended = len(turn.done) == len(systems)
                if not ended and time.monotonic() - shown_at < REFRESH:
                    continue
                shown_at = time.monotonic()
                answers = {name: [*asked[name], {"role": "assistant", "content": turn.texts[name]}] for name in systems}
                failed = "\n".join(f"{name}: {why}" for name, why in turn.failures.items())
                shown = [_transcript(answers[name]) for name in systems]
                kept = answers if ended and not turn.failures else histories
                yield [*shown, kept, visible(failed) or ("done" if ended else "answering…")]
        except Steer2EditError as error:
            yield [*before, histories, visible(str(error))]

    def save(self, name: str, *values: Any) -> str:
        """Writes the setting into the folder, and says where or what is wrong."""
        try:
            if not _FILE_NAME.fullmatch(name.strip()):
                raise FileError(
                    "that is no name of a file", got=name[:80], fix="Write one like mine.safetensors or mine.yaml."
                )
            path = self.folder / name.strip()
            self.conversation.save(self.settings(values), path)
        except (Steer2EditError, OSError) as error:
            return visible(str(error))
        return f"{path} is written."


def build_page(playground: Playground, title: str) -> Any:
    """The page, as Gradio's Blocks."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when gradio is imported
    import gradio as gr

    systems = playground.conversation.systems
    hidden: Any = {"api_visibility": "private", "show_progress": "hidden"}
    with gr.Blocks(title="steer2edit", analytics_enabled=False, fill_width=True) as page:
        gr.HTML(value="<h2>steer2edit</h2>")
        gr.Textbox(visible(title), label="model", interactive=False, elem_id="model")
        histories = gr.State({})
        question = gr.Textbox(label="question", lines=2, elem_id="question", autofocus=True, submit_btn=False)
        with gr.Row():
            ask = gr.Button("Ask", variant="primary", elem_id="ask")
            stop = gr.Button("Stop", elem_id="stop")
            anew = gr.Button("New conversation", elem_id="new")
        with gr.Row():
            answers = [_answer_box(gr, name) for name in systems]
        status = gr.Textbox(label="state", interactive=False, elem_id="state", lines=1)
        system = gr.Textbox(label="system prompt", elem_id="system")
        controls = _controls(gr, playground)
        with gr.Row():
            file = gr.Textbox("mine.safetensors", label="save this setting as", elem_id="file")
            save = gr.Button("Save", elem_id="save")
        inputs = [question, system, histories, *controls]
        outputs = [*answers, histories, status]
        asked = [
            ask.click(playground.ask, inputs, outputs, concurrency_limit=None, **hidden),
            question.submit(playground.ask, inputs, outputs, concurrency_limit=None, **hidden),
        ]
        stop.click(lambda: "stopped", None, status, cancels=asked, **hidden)
        anew.click(lambda: [*[""] * len(systems), {}, ""], None, outputs, cancels=asked, **hidden)
        save.click(playground.save, [file, *controls], status, **hidden)
    return page


def _answer_box(gr: Any, name: str) -> Any:
    return gr.Textbox(label=name, lines=14, max_lines=30, interactive=False, elem_id=f"answer-{name}", buttons=["copy"])


def _controls(gr: Any, playground: Playground) -> list[Any]:
    """The sliders, in the order in which `Playground.settings` reads them."""
    conversation = playground.conversation
    defaults, budget = conversation.defaults(), conversation.budget
    own = _rounded(budget) if budget else Budget(0.0, 0.0, 0.0)
    widest = round(max(1.0, 3 * max(own.rho_attn or 0, own.rho_mlp or 0)), 1)
    with gr.Accordion("edits and steering", open=True), gr.Row():
        controls = [
            gr.Slider(-3, 3, strength, step=0.05, label=f"strength of {visible(name)}", elem_id=f"strength-{i}")
            for i, (name, strength) in enumerate(defaults.strengths.items())
        ]
        steers = len(conversation.systems) == 3
        most = round(max(1.0, 3 * defaults.gamma), 1)
        controls += [
            gr.Slider(-most, most, defaults.gamma, step=0.001, label="γ of steering", visible=steers, elem_id="gamma"),
            _rho(gr, "ρ of attention (0 is off)", own.rho_attn, widest, budget, "rho-attn"),
            _rho(gr, "ρ of MLP (0 is off)", own.rho_mlp, widest, budget, "rho-mlp"),
            gr.Slider(0, 0.99, own.alpha, step=0.01, label="α", visible=budget is not None, elem_id="alpha"),
        ]
    with gr.Accordion("sampling", open=False), gr.Row():
        sampling = defaults.sampling
        controls += [
            gr.Slider(0, 2, sampling.temperature, step=0.05, label="temperature (0 is greedy)", elem_id="temperature"),
            gr.Slider(0.05, 1, sampling.top_p, step=0.05, label="top p", elem_id="top-p"),
            gr.Slider(0, 200, sampling.top_k, step=1, label="top k (0 is all)", elem_id="top-k"),
            gr.Slider(1, 2048, min(256, defaults.tokens), step=1, label="most new tokens", elem_id="tokens"),
            gr.Number(defaults.seed, precision=0, minimum=0, label="seed", elem_id="seed"),
        ]
    return controls


def _rho(gr: Any, label: str, value: float | None, most: float, budget: Budget | None, name: str) -> Any:
    return gr.Slider(0, most, value or 0, step=0.001, label=label, visible=budget is not None, elem_id=name)


def _rounded(budget: Budget) -> Budget:
    """The budget as the sliders show it."""
    rho_attn = None if budget.rho_attn is None else round(budget.rho_attn, 3)
    rho_mlp = None if budget.rho_mlp is None else round(budget.rho_mlp, 3)
    return Budget(rho_attn, rho_mlp, round(budget.alpha, 2))


def _transcript(messages: Messages) -> str:
    """What a text box shows: the answer alone if there is one question, else the questions too."""
    questions = sum(message["role"] == "user" for message in messages)
    if questions <= 1:
        return visible("".join(m["content"] for m in messages if m["role"] == "assistant"))
    return "\n\n".join(visible(f"> {m['content']}" if m["role"] == "user" else m["content"]) for m in messages)


def build_playground(conversation: Conversation, folder: Path, title: str, hosts: Sequence[str] = ()) -> Any:
    """The playground as an ASGI application.

    Args:
        hosts: the names under which it may be addressed; none is all.
    """
    page = build_page(Playground(conversation, folder), title)
    import gradio as gr
    from fastapi import FastAPI

    from .app import Guard

    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    app.add_middleware(Guard, key=None, hosts=tuple(hosts))
    fonts = ["system-ui", "sans-serif"]
    theme = gr.themes.Default(font=fonts, font_mono=["ui-monospace", "monospace"])
    page.queue(default_concurrency_limit=8, max_size=64, api_open=False)
    return gr.mount_gradio_app(
        app,
        page,
        path="/",
        theme=theme,
        footer_links=[],
        ssr_mode=False,
        enable_monitoring=False,
        pwa=False,
        mcp_server=False,
        show_error=False,
        run_history=False,
    )


def serve_playground(conversation: Conversation, folder: Path, title: str, host: str, port: int) -> None:
    """Serves the playground until Ctrl-C.

    Raises:
        Steer2EditError: the address cannot be used, or other machines could reach it.
    """
    if not is_loopback(host):
        raise Steer2EditError(
            "the playground has no login, so that only this machine may reach it",
            got=f"--host {host}",
            fix="Leave --host out, and reach it from elsewhere through ssh -L.",
        )
    with listening(host, port) as bound:
        address, hosts = address_of(bound)
        app = build_playground(conversation, folder, title, hosts)
        say(f"  open {address} in a browser")
        run_until_stopped(http_server(app), bound)
