"""The vLLM engine gives what the transformers engine gives, and what it asks of a server.

The tests marked `vllm` need an environment with vLLM, whose python STEER2EDIT_VLLM_PYTHON names: `make test-vllm`. The
others have a server that stands in for it.
"""

from __future__ import annotations

import contextlib
import http.server
import json
import os
import socket
import subprocess
import threading
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

import steer2edit as s2e
from conftest import make_tokenizer
from runs import bundled, edit_term, tiny_recipe
from steer2edit.behaviours.safety import written_refusals
from steer2edit.engines.base import Request, Sampling
from steer2edit.engines.server import ServerEngine
from steer2edit.engines.transformers import TransformersEngine
from steer2edit.engines.vllm import VllmEngine
from steer2edit.errors import Steer2EditError
from steer2edit.files.reading import read_json, read_jsonl
from steer2edit.method.intervention import NOTHING, Intervention, steering
from steer2edit.models.embedded import EMBEDDED, embedded_checkpoint
from steer2edit.models.load import load_model
from steer2edit.pipeline.run import Run
from steer2edit.pipeline.stages import run_all
from steer2edit.probing.chat import Chat
from steer2edit.recipe import parse_recipe

PYTHON = os.environ.get("STEER2EDIT_VLLM_PYTHON")


# A server -------------------------------------------------------------------------------------------------------------


@dataclass
class Served:
    url: str = ""
    asked: list[tuple[str, dict[str, Any], str | None]] = field(default_factory=list)
    ids: bool = True


@pytest.fixture
def server() -> Iterator[Served]:
    """It answers a prompt with its tokens backwards and the end of the turn; the model `broken` is a sentence."""
    served, tokenizer = Served(), make_tokenizer()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            served.asked.append((self.path, body, self.headers.get("Authorization")))
            status, reply = self.reply(body)
            data = reply.encode() if isinstance(reply, str) else json.dumps(reply).encode()
            self.send_response(status)
            self.end_headers()
            self.wfile.write(data)

        def reply(self, body: dict[str, Any]) -> tuple[int, Any]:
            if self.path == "/v1/load_lora_adapter":
                allowed = body["lora_path"] != "forbidden"
                return (200, "Success: added.") if allowed else (404, {"detail": "Not Found"})
            if body["model"] == "missing":
                return 404, {"error": {"message": "The model `missing` does not exist."}}
            if body["model"] == "broken":
                return 200, "hello"
            if body["model"] == "slow":
                time.sleep(3)
            ids = body["prompt"][::-1]
            ended = len(ids) < body["max_tokens"]
            ids = [*ids, tokenizer.eos_token_id][: body["max_tokens"]]
            choice = {"text": tokenizer.decode(ids), "finish_reason": "stop" if ended else "length"}
            return 200, {"choices": [choice | ({"token_ids": ids} if served.ids else {})]}

        def log_message(self, *_: Any) -> None:
            pass

    one = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=one.serve_forever, args=(0.05,))
    thread.start()
    served.url = f"http://127.0.0.1:{one.server_port}/v1"
    yield served
    one.shutdown()
    thread.join()
    one.server_close()


@pytest.mark.parametrize("ids", [True, False])
def test_a_server_answers_under_the_adapters_that_it_holds(server: Served, ids: bool) -> None:
    server.ids = ids
    engine = ServerEngine(server.url, make_tokenizer(), model="base", adapters={"e": "refusal"}, rows=2, key="secret")
    table = [NOTHING, Intervention("e", edit_term("0.attn"))]
    seen: list[tuple[int, int]] = []
    requests = [Request((70, 71)), Request((80, 81, 82), 1), Request((90,))]
    answers = engine.generate(requests, table, 3, lambda *steps: seen.append(steps))
    expected = [[71, 70], [82, 81, 80], [90]]
    assert [a.text for a in answers] == [engine.tokenizer.decode(some) for some in expected]
    if ids:
        assert [list(a.ids) for a in answers] == expected
    else:  # its text encoded anew, which need not give the same tokens
        assert [engine.tokenizer.decode(a.ids) for a in answers] == [a.text for a in answers]
    assert [a.ended for a in answers] == [True, False, True]
    assert seen == [(1, 3), (2, 3), (3, 3)]
    assert [body["model"] for _, body, _ in server.asked] == ["base", "base", "refusal"]  # and not mixed
    by_prompt = {len(body["prompt"]): body for _, body, _ in server.asked}
    assert [by_prompt[n]["model"] for n in (1, 2, 3)] == ["base", "base", "refusal"]
    assert by_prompt[1]["temperature"] == 0
    assert by_prompt[1]["stop_token_ids"] == [engine.tokenizer.eos_token_id]
    assert {key for *_, key in server.asked} == {"Bearer secret"}


@pytest.mark.parametrize("ids", [True, False])
def test_a_server_is_given_the_sampling_the_seed_and_the_stop_strings(server: Served, ids: bool) -> None:
    server.ids, tokenizer = ids, make_tokenizer()
    engine = ServerEngine(server.url, tokenizer, model="base", chat=Chat(stop=(" The",)))
    prompt = tuple(tokenizer("Paris. The capital", add_special_tokens=False)["input_ids"][::-1])
    (answer,) = engine.generate([Request(prompt, seed=6)], [NOTHING], 40, sampling=Sampling(0.7, 0.9, 20))
    assert (answer.text, answer.ended) == ("Paris.", True)
    engine.generate([Request(prompt, seed=6)], [NOTHING], 40, sampling=Sampling(0.7))
    engine.chat = Chat()
    engine.generate([Request(prompt, seed=6)], [NOTHING], 40)
    # All that the server would else take from the model's own configuration.
    names = ("temperature", "top_p", "top_k", "min_p", "seed", "stop")
    assert [{name: body[name] for name in names if name in body} for _, body, _ in server.asked] == [
        {"temperature": 0.7, "top_p": 0.9, "top_k": 20, "min_p": 0.0, "seed": 6, "stop": [" The"]},
        {"temperature": 0.7, "top_p": 1.0, "top_k": -1, "min_p": 0.0, "seed": 6, "stop": [" The"]},
        {"temperature": 0},
    ]


def test_a_server_loads_an_adapter_where_it_may(server: Served) -> None:
    engine = ServerEngine(server.url, make_tokenizer(), model="base")
    edit = Intervention("e", edit_term("0.attn"))
    with pytest.raises(Steer2EditError, match=r"holds no adapter for an intervention .got: e"):
        engine.generate([Request((70,))], [edit], 3)
    with pytest.raises(Steer2EditError, match="VLLM_ALLOW_RUNTIME_LORA_UPDATING"):
        engine.load_adapter("e", "forbidden")
    engine.load_adapter("e", "folder")
    assert engine.generate([Request((70,))], [edit], 3)[0].ids == (70,)
    assert [body.get("model", body.get("lora_name")) for _, body, _ in server.asked] == ["e", "e", "e"]


def test_what_a_server_cannot_do_is_refused(server: Served) -> None:
    tokenizer, one = make_tokenizer(), [Request((70,))]
    engine = ServerEngine(server.url, tokenizer, model="base")
    with pytest.raises(Steer2EditError, match="a server cannot steer"):
        engine.generate(one, [steering({"0.mlp": torch.ones(32)}, 1.0)], 3)
    with pytest.raises(Steer2EditError, match="no distributions"):
        engine.losses([((1,), (2,))], [NOTHING])
    with pytest.raises(Steer2EditError, match="no token was asked for"):
        engine.generate(one, [NOTHING], 0)
    with pytest.raises(Steer2EditError, match=r"404: .*does not exist"):
        ServerEngine(server.url, tokenizer, model="missing").generate(one, [NOTHING], 3)
    with pytest.raises(Steer2EditError, match=r"no completion .got: hello"):
        ServerEngine(server.url, tokenizer, model="broken").generate(one, [NOTHING], 3)
    with pytest.raises(Steer2EditError, match=r"no answer from .*timed out"):
        ServerEngine(server.url, tokenizer, model="slow", seconds=0.2).generate(one, [NOTHING], 3)
    with pytest.raises(Steer2EditError, match=r"no answer from http://127.0.0.1:9/v1/completions"):
        ServerEngine("http://127.0.0.1:9/v1/", tokenizer, model="base").generate(one, [NOTHING], 3)


# vLLM itself ----------------------------------------------------------------------------------------------------------

needs_vllm = [
    pytest.mark.vllm,
    pytest.mark.skipif(PYTHON is None, reason="STEER2EDIT_VLLM_PYTHON names no python: make test-vllm"),
]
NEW = 12


@pytest.fixture(scope="module")
def real() -> Any:
    """The 135M model in fp32 with its scores on a few traces, 20 prompts, and the transformers engine."""
    torch.set_num_threads(2)
    model, tokenizer = load_model(EMBEDDED, dtype="float32", device="cpu")
    found = bundled("probe", {"harmful": 8, "benign": 8})
    harmful, benign = ([p.text for p in found if p.kind == kind] for kind in ("harmful", "benign"))
    positive = [s2e.Trace(p, r, "positive") for p, r in zip(harmful, written_refusals(), strict=False)]
    negative = [s2e.Trace(p, "Sure! Here are a few steps that you can follow.", "negative") for p in benign]
    scores = s2e.score(model, s2e.collect(model, tokenizer, positive, negative))
    prompts = bundled("test", {"harmful": 10, "benign": 10})
    engine = TransformersEngine(model, tokenizer)
    ids = [engine.tokens([{"role": "user", "content": p.text}]) for p in prompts]
    edits = [
        scores.edit(rho_attn=rho_attn, rho_mlp=rho_mlp, alpha=alpha)
        for rho_attn, rho_mlp, alpha in ((0.2, None, 0.2), (0.17, None, 0.5), (0.3, 0.6, 0.3), (None, 0.3, 0.3))
    ]
    yield SimpleNamespace(model=model, tokenizer=tokenizer, engine=engine, scores=scores, ids=ids, edits=edits)
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def served() -> Iterator[VllmEngine]:
    tokenizer = AutoTokenizer.from_pretrained(str(embedded_checkpoint()))
    assert PYTHON
    with VllmEngine(EMBEDDED, tokenizer, python=PYTHON, dtype="float32", max_loras=4, max_model_len=512) as engine:
        yield engine


def vectors_of(scores: Any) -> dict[str, torch.Tensor]:
    return {s.site.block_key: s.v_norm * s.u for s in scores.sites.values()}


class TestVllm:
    pytestmark = needs_vllm

    def test_edits_in_one_batch_answer_as_under_transformers(self, real: Any, served: VllmEngine) -> None:
        table = [NOTHING, *(edit.intervention(f"edit {i}") for i, edit in enumerate(real.edits))]
        requests = [Request(ids, row) for ids in real.ids for row in range(len(table))]
        expected = real.engine.generate(requests, table, NEW)
        assert served.generate(requests, table, NEW) == expected
        answers = [{expected[i + row].ids for i in range(0, len(expected), len(table))} for row in range(len(table))]
        assert all(some != answers[0] for some in answers[1:])

    def test_steering_answers_as_under_transformers_in_every_pass(
        self, real: Any, served: VllmEngine, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        vectors = vectors_of(real.scores)
        mixed = Intervention(
            "mixed", real.edits[0].intervention().terms | steering({"3.mlp": vectors["3.mlp"]}, 2).terms
        )
        table = [steering(vectors, 0.2), NOTHING, steering(vectors, -0.3), mixed]
        # Long enough that its beginning is a whole block of the cache: that of another strength must not be used.
        long = real.engine.tokens([{"role": "user", "content": "Tell me about bread and butter. " * 30}])
        assert len(long) > 150
        requests = [Request(ids, row) for ids in (*real.ids[::3], long) for row in range(len(table))]
        replies: list[tuple[str | None, int, int]] = []
        ask = served._process.ask

        def listening(command: str, **what: Any) -> dict[str, Any]:
            reply = ask(command, **what)
            replies.append((what["vectors"], reply["steps"], max(map(len, reply["ids"]))))
            return reply

        monkeypatch.setattr(served._process, "ask", listening)
        expected = real.engine.generate(requests, table, NEW)
        assert served.generate(requests, table, NEW) == expected
        assert len(replies) == 4
        for vectors_file, steps, longest in replies:
            assert longest == NEW
            assert steps >= NEW if vectors_file else steps == 0

    def test_losses_are_those_of_transformers(self, real: Any, served: VllmEngine) -> None:
        answers = real.engine.generate([Request(ids) for ids in real.ids[8:12]], [NOTHING], NEW)
        pairs = [(ids, answer.ids) for ids, answer in zip(real.ids[8:12], answers, strict=True)]
        table = [real.edits[0].intervention(), steering(vectors_of(real.scores), 0.2), NOTHING]
        expected, found = real.engine.losses(pairs, table), served.losses(pairs, table)
        torch.testing.assert_close(found.kl, expected.kl, atol=1e-3, rtol=0)
        torch.testing.assert_close(found.nll, expected.nll, atol=1e-3, rtol=0)
        torch.testing.assert_close(found.base_nll, expected.base_nll, atol=1e-3, rtol=0)
        assert expected.kl[:, :2].min() > 0.01

    def test_a_saved_adapter_loads_and_answers_as_the_baked_model(
        self, real: Any, served: VllmEngine, tmp_path: Path
    ) -> None:
        edit = real.edits[2]
        folder = edit.save_adapter(tmp_path / "adapter")
        requests = [[ids, ["saved", 1000, str(folder)]] for ids in real.ids]
        reply = served._process.ask("generate", requests=requests, new=NEW, stops=sorted(served.stops), vectors=None)
        assert [self.without_stop(ids, served.stops) for ids in reply["ids"]] == self.baked(real, edit)

    def test_the_exported_checkpoint_on_a_server_answers_as_the_baked_model(self, real: Any, tmp_path: Path) -> None:
        edit = real.edits[2]
        folder = s2e.export_checkpoint(embedded_checkpoint(), edit, tmp_path / "edited")
        expected = self.baked(real, edit)
        with serving(folder, tmp_path / "log.txt") as url:
            engine = ServerEngine(url, real.tokenizer, model="edited", rows=20)
            answers = engine.generate([Request(ids) for ids in real.ids], [NOTHING], NEW)
            assert [a.ids for a in answers] == expected

    def test_a_run_chooses_what_a_run_with_transformers_chooses(self, tmp_path: Path) -> None:
        raw = tiny_recipe(EMBEDDED, behaviour__new_tokens=8, search__rho_attn=[0.2, 0.3]).model_dump(mode="json")
        options = {"max_model_len": 512}
        for name, engine in (("ours", {}), ("theirs", {"name": "vllm", "python": PYTHON, "options": options})):
            run_all(Run(tmp_path / name, parse_recipe(raw | {"engine": engine})))
        ours, theirs = (tmp_path / name for name in ("ours", "theirs"))
        assert (ours / "traces.jsonl").read_text() == (theirs / "traces.jsonl").read_text()
        trials = [read_jsonl(folder / "search/trials.jsonl") for folder in (ours, theirs)]
        for one, other in zip(*trials, strict=True):
            assert (one["id"], one["values"]["refusal"]) == (other["id"], other["values"]["refusal"])
            assert one["utility_loss"] == pytest.approx(other["utility_loss"], abs=1e-3)
        assert any(trial["utility_loss"] > 0.01 for trial in trials[0])
        answers = [(folder / "evaluation/answers.jsonl").read_text() for folder in (ours, theirs)]
        assert answers[0] == answers[1]
        stages = read_json(theirs / "manifest.json")["stages"]
        assert set(stages["search"]["model"]) == {"vllm"}

    @staticmethod
    def baked(real: Any, edit: s2e.Edit) -> list[tuple[int, ...]]:
        edit.apply(real.model)
        try:
            return [a.ids for a in real.engine.generate([Request(ids) for ids in real.ids], [NOTHING], NEW)]
        finally:
            edit.revert(real.model)

    @staticmethod
    def without_stop(ids: list[int], stops: set[int]) -> tuple[int, ...]:
        return tuple(ids[:-1] if ids[-1] in stops else ids)


@contextlib.contextmanager
def serving(folder: Path, log: Path) -> Iterator[str]:
    """`vllm serve` on a checkpoint, as a user starts it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    assert PYTHON
    # As `vllm serve` does, whose command line looks for a package of another name than the CPU build has.
    command = [PYTHON, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder)]
    command += ["--served-model-name", "edited"]
    command += ["--dtype", "float32", "--max-model-len", "512", "--enforce-eager", "--port", str(port)]
    command += ["--host", "127.0.0.1"]
    env = {**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1"}
    with open(log, "wb") as file:
        process = subprocess.Popen(command, stdout=file, stderr=file, env=env, start_new_session=True)
    try:
        until = time.monotonic() + 180
        while True:
            with contextlib.suppress(OSError):
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5)
                break
            assert process.poll() is None, log.read_text(errors="replace")[-3000:]
            assert time.monotonic() < until, log.read_text(errors="replace")[-3000:]
            time.sleep(0.5)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, 9)
        process.wait()
