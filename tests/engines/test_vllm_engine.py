"""What passes between the vLLM engine and its worker, which one that answers by rule stands in for."""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from conftest import make_tokenizer
from families import make_family
from runs import edit_term, save_pico
from steer2edit.engines.base import Request, Sampling
from steer2edit.engines.transformers import TransformersEngine
from steer2edit.engines.vllm import VllmEngine
from steer2edit.errors import ModelError, Steer2EditError
from steer2edit.method.intervention import NOTHING, Intervention, Term, steering
from steer2edit.models.load import load_model
from steer2edit.probing.chat import Chat

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
