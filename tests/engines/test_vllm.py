"""The vLLM engine gives what the transformers engine gives; what passes between it and its worker; and servers.

The tests marked `vllm` need an environment with vLLM, whose python STEER2EDIT_VLLM_PYTHON names: `make test-vllm`. The
others have a worker or a server that stands in for it.
"""

from __future__ import annotations

import contextlib
import http.server
import json
import os
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoTokenizer

import steer2edit as s2e
from conftest import make_tokenizer
from families import make_family
from runs import bundled, save_pico, tiny_recipe
from steer2edit.behaviours.safety import written_refusals
from steer2edit.engines import vllm_worker
from steer2edit.engines.base import Request, Sampling
from steer2edit.engines.server import ServerEngine
from steer2edit.engines.transformers import TransformersEngine
from steer2edit.engines.vllm import VllmEngine
from steer2edit.errors import ModelError, Steer2EditError
from steer2edit.files.reading import read_json, read_jsonl
from steer2edit.method.intervention import NOTHING, Intervention, Term, steering
from steer2edit.models.embedded import EMBEDDED, embedded_checkpoint
from steer2edit.models.load import load_model
from steer2edit.pipeline.run import Run
from steer2edit.pipeline.stages import run_all
from steer2edit.probing.chat import Chat
from steer2edit.recipe import parse_recipe

PYTHON = os.environ.get("STEER2EDIT_VLLM_PYTHON")

# A worker that answers by rule: to a prompt its tokens backwards and then the first stop, cut at the length asked for;
# its losses are the pairs' and the rows' numbers. It keeps what it was asked.
FAKE = """
import json, os, sys, time
def say(row):
    print(json.dumps(row), flush=True)
for line in sys.stdin:
    with open("asked.jsonl", "a") as file:
        file.write(line)
    command = json.loads(line)
    what = command["command"]
    if what == "start":
        mode = command["options"].get("seed")
        if mode == 1:
            print("no memory left", file=sys.stderr, flush=True)
            os._exit(3)
        if mode == 2:
            say({"error": "ValueError: no such dtype"})
            continue
        if mode == 3:
            time.sleep(60)
        if mode == 4:
            command["modules"] = []
        say({"done": {"vllm": "fake", "adaptable": command["modules"]}})
    elif what == "generate":
        if command["requests"][0][0] == [66]:
            say({"error": "RuntimeError: a bad prompt"})
            continue
        if command["requests"][0][0] == [13]:
            print("about to die", file=sys.stderr, flush=True)
            os._exit(9)
        if command["requests"][0][0] == [77]:
            time.sleep(60)
        new, stop = command["new"], command["stops"][0]
        ids = [[*ids[::-1], stop][:new] for ids, _ in command["requests"]]
        say({"progress": [1, len(ids)]})
        steps = max(map(len, ids)) if [5] not in ids else 0
        say({"done": {"ids": ids, "steps": steps}})
    elif what == "score":
        kl = [[len(p) + 10 * i for i in range(1 + len(command["rows"]))] for p, a in command["pairs"]]
        say({"progress": [1, 1 + len(command["rows"])]})
        greedy = [[i % 2 for i in range(len(k))] for k in kl]
        say({"done": {"kl": kl, "greedy": greedy, "nll": [[len(a) + 10 * i for i in range(len(k))]
                                                          for (p, a), k in zip(command["pairs"], kl)]}})
"""


@pytest.fixture
def start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., VllmEngine]]:
    """start(**options) makes an engine of a pico model with a worker that stands in for vLLM's."""
    (tmp_path / "fake.py").write_text(FAKE, encoding="utf-8")
    monkeypatch.setattr("steer2edit.engines.vllm._WORKER", tmp_path / "fake.py")
    folder = save_pico(tmp_path / "model")
    with contextlib.ExitStack() as engines:

        def make(model: str = folder, **options: Any) -> VllmEngine:
            return engines.enter_context(VllmEngine(model, make_tokenizer(), python=sys.executable, **options))

        yield make


def asked(engine: VllmEngine) -> list[dict[str, Any]]:
    """What the worker was asked, after its start."""
    text = (engine._process.folder / "asked.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()][1:]


def edit_term(site: str, seed: int = 0, rank: int = 1) -> dict[str, Term]:
    inputs = {"attn": 32, "mlp": 48}[site.split(".")[1]]
    draw = torch.Generator().manual_seed(seed)
    return {site: Term(torch.randn(32, rank, generator=draw), torch.randn(rank, inputs, generator=draw))}


# What passes between the engine and its worker ------------------------------------------------------------------------


def test_answers_come_in_the_order_of_the_requests_and_end_at_a_stop(start: Any) -> None:
    engine = start()
    seen: list[tuple[int, int]] = []
    requests = [Request((20, 21, 22)), Request((30, 31), 1), Request((40,))]
    table = [NOTHING, steering({"0.mlp": torch.ones(32)}, 0.5)]
    answers = engine.generate(requests, table, 3, lambda *steps: seen.append(steps))
    assert [a.ids for a in answers] == [(22, 21, 20), (31, 30), (40,)]
    assert [a.ended for a in answers] == [False, True, True]
    assert answers[1].text == engine.tokenizer.decode([31, 30])
    assert seen == [(1, 3), (3, 3), (3, 3)]


def test_the_worker_is_given_the_sampling_and_each_requests_seed(start: Any) -> None:
    engine = start()
    table = [NOTHING, steering({"0.mlp": torch.ones(32)}, 0.5)]
    requests = [Request((20, 21), seed=3), Request((30, 31), 1, seed=4), Request((40, 41), seed=5)]
    engine.generate(requests, table, 3, sampling=Sampling(0.7, 0.9, 20))
    engine.generate(requests[:1], table, 3, sampling=Sampling(0.7))
    engine.generate(requests[:1], table, 3)
    whole = {"temperature": 0.7, "top_p": 0.9, "top_k": 20}
    assert [(command["sampling"], command["seeds"]) for command in asked(engine)] == [
        (whole, [3, 5]),
        (whole, [4]),
        ({"temperature": 0.7, "top_p": 1.0}, [3]),
        ({}, []),
    ]


def test_a_stop_string_cuts_the_workers_answer(start: Any) -> None:
    tokenizer = make_tokenizer()
    ids = tokenizer("Paris. The capital", add_special_tokens=False)["input_ids"]
    (answer,) = start(chat=Chat(stop=(" The",))).generate([Request(tuple(ids[::-1]))], [NOTHING], 40)
    assert (answer.text, answer.ended) == ("Paris.", True)
    assert tokenizer.decode(answer.ids) == "Paris."


def test_edits_share_a_batch_and_every_steering_has_its_own(start: Any) -> None:
    engine = start()
    vector = {"0.attn": torch.ones(32), "2.mlp": torch.arange(32.0)}
    both = Intervention("both", edit_term("1.attn") | {"1.mlp": Term(b=torch.ones(32))})
    table = [
        NOTHING,
        Intervention("one", edit_term("0.attn", 1)),
        steering(vector, 0.5),
        Intervention("two", edit_term("1.mlp", 2)),
        steering(vector, 0.5, "the same by another name"),
        steering(vector, 1.0),
        both,
    ]
    engine.generate([Request((10 + i, 9), row) for i, row in enumerate((2, 0, 1, 3, 4, 5, 6))], table, 4)
    groups = [[ids[0] - 10 for ids, _ in command["requests"]] for command in asked(engine)]
    assert groups == [[0, 4], [1, 2, 3], [5], [6]]
    steered, plain, _, mixed = asked(engine)
    assert [adapter for _, adapter in steered["requests"]] == [None, None]
    assert plain["vectors"] is None
    base, one, two = (adapter for _, adapter in plain["requests"])
    assert all(not t.any() for t in load_file(Path(base[2]) / "adapter_model.safetensors").values())
    assert len({base[1], one[1], two[1], mixed["requests"][0][1][1]}) == 4
    vectors = load_file(steered["vectors"])
    assert set(vectors) == {"model.layers.0.self_attn.o_proj", "model.layers.2.mlp.down_proj"}
    assert vectors["model.layers.2.mlp.down_proj"].equal(0.5 * torch.arange(32.0))
    assert set(load_file(mixed["vectors"])) == {"model.layers.1.mlp.down_proj"}


def test_an_adapter_is_what_the_edit_does_and_is_written_once(start: Any) -> None:
    engine = start(max_rank=2)
    terms = edit_term("0.attn", 1) | edit_term("2.mlp", 2, rank=2)
    engine.generate([Request((9,))], [Intervention("a", terms)], 2)
    engine.generate([Request((9,))], [Intervention("another name", dict(reversed(terms.items())))], 2)
    (_, adapter), (_, again) = (command["requests"][0] for command in asked(engine))
    assert adapter == again
    folder = Path(adapter[2])
    tensors = load_file(folder / "adapter_model.safetensors")
    config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    assert (config["r"], config["lora_alpha"]) == (2, 2)
    assert config["target_modules"] == ["model.layers.0.self_attn.o_proj", "model.layers.2.mlp.down_proj"]
    for key, module in (("0.attn", "0.self_attn.o_proj"), ("2.mlp", "2.mlp.down_proj")):
        a, b = (tensors[f"base_model.model.model.layers.{module}.lora_{x}.weight"] for x in "AB")
        term = terms[key]
        assert (a.shape[0], b.shape[1]) == (2, 2)
        assert term.u is not None
        assert term.a is not None
        torch.testing.assert_close(b @ a, term.u @ term.a)
    assert len(tensors) == 4


def test_the_worker_is_told_the_options(start: Any) -> None:
    engine = start(rows=7, dtype="float32", max_rank=3, max_loras=5, block_size=16, tensor_parallel_size=2)
    text = (engine._process.folder / "asked.jsonl").read_text(encoding="utf-8")
    options = json.loads(text.splitlines()[0])["options"]
    wanted = {"max_num_seqs": 7, "dtype": "float32", "max_lora_rank": 8, "max_loras": 6, "block_size": 16}
    wanted |= {"tensor_parallel_size": 2, "max_model_len": 512, "lora_target_modules": ["down_proj", "o_proj"]}
    assert {name: options[name] for name in wanted} == wanted
    plain = start(max_loras=0)
    assert "enable_lora" not in (plain._process.folder / "asked.jsonl").read_text(encoding="utf-8")


def test_the_stops_are_those_of_the_transformers_engine(start: Any, tmp_path: Path) -> None:
    path = tmp_path / "model/generation_config.json"
    path.write_text(json.dumps({"eos_token_id": [7, 8], "repetition_penalty": 1.3}), encoding="utf-8")
    model, tokenizer = load_model(tmp_path / "model", dtype="float32", device="cpu")
    assert start().stops == TransformersEngine(model, tokenizer).stops >= {7, 8, tokenizer.eos_token_id}


def test_losses_come_in_the_order_of_the_pairs(start: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("steer2edit.engines.vllm._HELD", 2 * 3 * 320)  # two answers of three tokens at once
    engine = start()
    seen: list[tuple[int, int]] = []
    pairs = [((9,) * n, (8,) * m) for n, m in ((4, 1), (2, 3), (7, 2))]
    table = [Intervention("e", edit_term("0.attn")), steering({"0.attn": torch.ones(32)}, 1.0)]
    losses = engine.losses(pairs, table, lambda *steps: seen.append(steps))
    assert losses.kl.tolist() == [[14, 24], [12, 22], [17, 27]]
    assert losses.nll.tolist() == [[11, 21], [13, 23], [12, 22]]
    assert losses.base_nll.tolist() == [1, 3, 2]
    assert [len(command["pairs"]) for command in asked(engine)] == [2, 1]
    edited, steered = asked(engine)[0]["rows"]
    assert (edited["vectors"], steered["adapter"]) == (None, None)
    assert seen == [(1, 9), (7, 9)]
    nothing = engine.losses([], table)
    assert (nothing.kl.shape, nothing.base_nll.shape) == ((0, 2), (0,))


def test_what_vllm_refuses_is_an_error_and_the_engine_goes_on(start: Any) -> None:
    engine = start()
    with pytest.raises(Steer2EditError, match=r"vLLM cannot generate .got: RuntimeError: a bad prompt"):
        engine.generate([Request((66,))], [NOTHING], 2)
    assert engine.generate([Request((67,))], [NOTHING], 2)[0].ids == (67,)


def test_a_worker_that_dies_is_an_error_with_its_last_lines(start: Any) -> None:
    engine = start()
    with pytest.raises(Steer2EditError, match=r"(?s)ended at generate .got: exit code 9.*about to die"):
        engine.generate([Request((13,))], [NOTHING], 2)
    assert not engine._process.folder.exists()
    with pytest.raises(Steer2EditError, match="closed"):
        engine.generate([Request((14,))], [NOTHING], 2)


def test_a_worker_that_does_not_start_is_an_error(start: Any, tmp_path: Path) -> None:
    with pytest.raises(Steer2EditError, match=r"(?s)exit code 3.*no memory left"):
        start(seed=1)
    with pytest.raises(Steer2EditError, match=r"vLLM cannot start .got: ValueError: no such dtype"):
        start(seed=2)
    begun = time.monotonic()
    with pytest.raises(Steer2EditError, match="exit code -9"):
        start(seed=3, boot_seconds=1)
    assert time.monotonic() - begun < 20
    with pytest.raises(Steer2EditError, match="cannot be started"):
        VllmEngine(tmp_path / "model", make_tokenizer(), python=tmp_path / "no python")
    with pytest.raises(Steer2EditError, match="got: enforce_eager"):
        start(enforce_eager=False)


def test_without_vllm_the_real_worker_says_so(tmp_path: Path) -> None:
    folder = save_pico(tmp_path / "model")
    with pytest.raises(Steer2EditError, match=r"vLLM cannot start .got: ModuleNotFoundError: No module named 'vllm'"):
        VllmEngine(folder, make_tokenizer(), python=sys.executable)


def test_an_interrupted_worker_is_ended(start: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = start()
    process = engine._process._process

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        engine.generate([Request((20,))], [NOTHING], 2, interrupt)
    assert process.poll() is not None
    with pytest.raises(Steer2EditError, match="closed"):
        engine.generate([Request((20,))], [NOTHING], 2)


def test_closing_ends_the_worker_and_removes_its_files(start: Any) -> None:
    engine = start()
    folder, process = engine._process.folder, engine._process._process
    assert folder.is_dir()
    assert process.poll() is None
    engine.close()
    engine.close()
    assert process.poll() is not None
    assert not folder.exists()


def test_interventions_that_vllm_cannot_run_are_refused(start: Any, tmp_path: Path) -> None:
    engine = start()
    one = [Request((9,))]
    with pytest.raises(Steer2EditError, match=r"higher rank.*got: 2, at most 1"):
        engine.generate(one, [Intervention("r", edit_term("0.attn", rank=2))], 2)
    with pytest.raises(ModelError, match=r"got: 9.attn"):
        engine.generate(one, [Intervention("r", {"9.attn": Term(b=torch.ones(32))})], 2)
    with pytest.raises(ModelError, match=r"does not fit site 0.attn"):
        engine.generate(one, [Intervention("r", {"0.attn": edit_term("0.mlp")["0.mlp"]})], 2)
    with pytest.raises(Steer2EditError, match="513 tokens, at most 512"):
        engine.generate([Request((9,) * 511)], [NOTHING], 2)
    with pytest.raises(Steer2EditError, match="no token was asked for"):
        engine.generate(one, [NOTHING], 0)
    with pytest.raises(Steer2EditError, match=r"puts no adapter .*got: 0.attn"):
        start(seed=4).generate(one, [Intervention("r", edit_term("0.attn"))], 2)


def test_a_constant_on_the_residual_stream_is_added_by_its_layer(start: Any) -> None:
    engine = start()
    assert not engine.rows_on_stream
    assert not engine.measures_prompts
    terms = {"1.residual": Term(b=torch.arange(32.0)), "0.attn": Term(b=torch.ones(32))}
    engine.generate([Request((9,))], [Intervention("layer", terms)], 2)
    vectors = load_file(asked(engine)[-1]["vectors"])
    assert set(vectors) == {"model.layers.1", "model.layers.0.self_attn.o_proj"}
    assert vectors["model.layers.1"].equal(torch.arange(32.0))
    with pytest.raises(ModelError, match=r"got: 3\.residual"):
        engine.generate([Request((9,))], [Intervention("deeper", {"3.residual": Term(b=torch.ones(32))})], 2)


def test_what_the_residual_stream_holds_cannot_be_used_and_that_is_said(start: Any) -> None:
    direction = Intervention("direction", {"1.residual": Term(torch.ones(32, 1), torch.ones(1, 32), torch.ones(32))})
    with pytest.raises(Steer2EditError, match=r"1\.residual"):
        start().generate([Request((9,))], [direction], 2)


def test_experts_are_refused_and_their_block_can_be_steered(start: Any, tmp_path: Path) -> None:
    model = make_family("mixtral")
    model.save_pretrained(str(tmp_path / "experts"))
    engine = start(str(tmp_path / "experts"))
    site = next(site for site in engine._sites.values() if site.expert is not None)
    term = Term(torch.ones(site.d, 1), torch.ones(1, site.inputs))
    with pytest.raises(Steer2EditError, match=f"edits experts .got: {site.key}.*export_checkpoint"):
        engine.generate([Request((9,))], [Intervention("x", {site.key: term})], 2)
    with pytest.raises(Steer2EditError, match="at one expert"):
        engine.generate([Request((9,))], [Intervention("x", {site.key: Term(b=torch.ones(site.d))})], 2)
    engine.generate([Request((9,))], [steering({site.block_key: torch.ones(site.d)}, 1.0)], 2)
    assert set(load_file(asked(engine)[-1]["vectors"])) == {site.block_module}


def test_steering_that_did_not_act_in_every_pass_is_our_mistake(start: Any) -> None:
    table = [steering({"0.mlp": torch.ones(32)}, 1.0)]
    with pytest.raises(RuntimeError, match="acted in 0 forward passes, of at least 1"):
        start().generate([Request((5,))], table, 1)


# What the worker does where the model is ------------------------------------------------------------------------------


class Toy(nn.Module):
    """As vLLM's: a map that answers with a tuple, a model that answers with hidden states of a run of tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.o_proj = Tupled()
        self.head = nn.Linear(6, 11)

    def forward(self, input_ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        return self.o_proj(self.embed(input_ids))[0]

    def compute_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.head(hidden)


class Tupled(nn.Linear):
    def __init__(self) -> None:
        super().__init__(6, 6)

    def forward(self, x: torch.Tensor) -> Any:
        return super().forward(x), None


class Place(vllm_worker.Extension):
    def __init__(self) -> None:
        torch.manual_seed(1)
        self.model = Toy()

    def get_model(self) -> Toy:
        return self.model


def test_the_worker_draws_by_each_requests_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    class Recording:
        def __init__(self) -> None:
            self.params: list[dict[str, Any]] = []

        def add_request(self, name: str, prompt: Any, params: Any, lora_request: Any) -> None:
            self.params.append(vars(params))

        def has_unfinished_requests(self) -> bool:
            return False

    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(SamplingParams=SimpleNamespace))  # type: ignore[arg-type]
    monkeypatch.setitem(sys.modules, "vllm.lora.request", SimpleNamespace(LoRARequest=None))  # type: ignore[arg-type]
    worker = vllm_worker.Worker(print)
    worker.engine = engine = Recording()
    fixed = {"max_tokens": 5, "stop_token_ids": [2], "ignore_eos": True, "detokenize": False}
    requests = [[[1], None], [[2], None]]
    warm = {"temperature": 0.7, "top_p": 0.9, "top_k": 20}
    worker.generate(requests, 5, [2], None, warm, [8, 9])
    worker.generate(requests, 5, [2], None, {}, [])
    assert engine.params[:2] == [fixed | warm | {"seed": 8}, fixed | warm | {"seed": 9}]
    assert engine.params[2:] == [fixed | {"temperature": 0.0}] * 2


@pytest.mark.parametrize("parts", [(9,), (4, 5), (1, 1, 7), (8, 1)])
@pytest.mark.parametrize("padding", [0, 3])
def test_positions_are_scored_whatever_parts_they_come_in(parts: tuple[int, ...], padding: int) -> None:
    ids, first = torch.tensor([3, 1, 4, 1, 5, 9, 2, 6, 5]), 3
    answer = [*ids[first + 1 :].tolist(), 7]
    place: Any = Place()
    other = nn.Linear(6, 11)

    def score(base: bool) -> Any:
        place.s2e_watch(first, len(answer))
        at = 0
        for size in parts:  # what fills up a batch has old positions, among them ones that are yet to come
            positions = torch.cat([torch.arange(at, at + size), torch.arange(at + size, at + size + 2)[:padding]])
            if at + size < 9:
                positions = positions[:size]  # only the last part of a prompt is not full
            place.model(torch.cat([ids[at : at + size], ids[: len(positions) - size]]), positions=positions)
            at += size
        return place.s2e_score(0, answer, base)

    kl, nll, greedy = score(True)
    log_base = place.model.head(place.model(ids, positions=None)[first:]).detach().log_softmax(-1)
    assert kl == 0.0
    assert nll == pytest.approx(-float(log_base[range(6), answer].mean()), abs=1e-6)
    assert greedy == float(log_base.argmax(-1).tolist() == answer)
    place.model.head = other
    kl, nll, _ = score(False)
    log_row = other(place.model(ids, positions=None)[first:]).detach().log_softmax(-1)
    assert kl == pytest.approx(float((log_base.exp() * (log_base - log_row)).sum(-1).mean()), abs=1e-6)
    assert nll == pytest.approx(-float(log_row[range(6), answer].mean()), abs=1e-6)


def test_positions_that_were_not_run_are_noticed() -> None:
    place: Any = Place()
    place.s2e_watch(1, 3)
    place.model(torch.tensor([3, 1]), positions=torch.arange(2))
    with pytest.raises(RuntimeError, match="1 positions were seen, of 3"):
        place.s2e_score(0, [1, 2, 3], True)


def test_steering_is_added_counted_and_taken_off(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    place: Any = Place()
    ids = torch.tensor([3, 1])
    before = place.model(ids, positions=None)
    save_file({"o_proj": torch.arange(6.0), "elsewhere": torch.ones(6)}, str(tmp_path / "b"))
    assert place.s2e_steer(str(tmp_path / "b")) == ["o_proj"]
    for _ in range(3):
        torch.testing.assert_close(place.model(ids, positions=None), before + torch.arange(6.0))
    assert place.s2e_release() == 3
    assert place.model(ids, positions=None).equal(before)
    # Partial sums that are added up elsewhere gain it on the first rank alone.
    place.model.o_proj.base_layer = SimpleNamespace(tp_size=2, tp_rank=1, reduce_results=False)
    assert place.s2e_steer(str(tmp_path / "b")) == ["o_proj"]
    assert place.model(ids, positions=None).equal(before)
    assert place.s2e_release() is None


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
    names = ("temperature", "top_p", "top_k", "seed", "stop")
    assert [{name: body[name] for name in names if name in body} for _, body, _ in server.asked] == [
        {"temperature": 0.7, "top_p": 0.9, "top_k": 20, "seed": 6, "stop": [" The"]},
        {"temperature": 0.7, "top_p": 1.0, "seed": 6, "stop": [" The"]},
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
