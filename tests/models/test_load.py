"""Names of models: what they mean, and what is said of names that mean nothing."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch

import steer2edit as s2e
from conftest import make_pico, make_tokenizer, make_traces
from steer2edit.errors import ModelError, TraceError
from steer2edit.models.load import load_model, resolved_revision
from steer2edit.models.quiet import quiet_kernels, without_gguf_bar


@pytest.mark.parametrize("name", ["./nomodel", "/not/here", "runs/x/model", "../model"])
def test_a_folder_that_is_not_there_is_said_to_be_none(name: str) -> None:
    with pytest.raises(ModelError, match=r"no such folder \(got: .*\)\. Check the path"):
        load_model(name)


@pytest.mark.parametrize("name", ["embedded:smolm2", "embedded:", "embeded:smollm2-135m-instruct"])
def test_a_near_miss_of_the_embedded_model_gets_its_name(name: str) -> None:
    with pytest.raises(ModelError, match=r"Did you mean embedded:smollm2-135m-instruct\?"):
        load_model(name)


def test_the_commit_of_a_hub_model_is_the_one_that_its_cache_holds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    commit = "0123456789abcdef0123456789abcdef01234567"
    refs = tmp_path / "models--owner--name" / "refs"
    refs.mkdir(parents=True)
    (refs / "main").write_text(commit + "\n", encoding="utf-8")
    assert resolved_revision("owner/name") == commit
    assert resolved_revision("owner/name", "v2") is None
    assert resolved_revision("owner/name", commit[::-1]) == commit[::-1]
    assert resolved_revision("owner/other") is None
    assert resolved_revision(str(tmp_path)) is None
    assert resolved_revision("embedded:smollm2-135m-instruct") is None


def test_a_compiled_model_and_one_without_weights_are_refused_in_a_sentence() -> None:
    model, tokenizer = make_pico("llama"), make_tokenizer()
    compiled: Any = torch.compile(model)
    with pytest.raises(ModelError, match=r"the model is compiled .*model\._orig_mod"):
        s2e.collect(compiled, tokenizer, *make_traces())
    with pytest.raises(ModelError, match="the model has no weights"):
        s2e.collect(model.to("meta"), tokenizer, *make_traces())
    with pytest.raises(ModelError, match="not a transformers model"):
        s2e.find_sites(torch.nn.Linear(2, 2))


def test_what_is_no_trace_is_said_at_once() -> None:
    with pytest.raises(TraceError, match=r"no such label \(got: 'pos'\)\. Use positive or negative"):
        s2e.Trace("a", "b", "pos")  # type: ignore[arg-type]
    with pytest.raises(TraceError, match="neither a text nor a list of messages"):
        s2e.Trace([{"content": "a"}], "b", "positive")
    with pytest.raises(TraceError, match="response is not a text"):
        s2e.Trace("a", None, "positive")  # type: ignore[arg-type]
    pairs: Any = [("a prompt", "a response")]
    with pytest.raises(TraceError, match=r"a trace is not a Trace .*steer2edit\.Trace\(prompt, response, label\)"):
        s2e.collect(make_pico("llama"), make_tokenizer(), pairs)


def test_few_traces_are_said_to_be_few(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", logger="steer2edit")
    positive, negative = make_traces()
    s2e.collect(make_pico("llama"), make_tokenizer(), positive[:1], negative[:1])
    assert "only 1 positive and 1 negative responses" in caplog.text


def test_one_message_of_bitsandbytes_is_dropped_and_all_others_stay(caplog: pytest.LogCaptureFixture) -> None:
    quiet_kernels()
    quiet_kernels()
    logger = logging.getLogger("bitsandbytes.backends.cpu.ops")
    assert len([f for f in logger.filters if getattr(f, "__name__", "") == "_is_news"]) == 1
    with caplog.at_level(logging.WARNING):
        logger.warning("Failed to load CPU gemm_4bit_forward from kernels-community: %s", "no such host")
        logger.warning("Something else")
    assert [record.getMessage() for record in caplog.records] == ["Something else"]


def test_a_gguf_file_is_read_without_a_bar_of_another_library(capsys: pytest.CaptureFixture[str]) -> None:
    with without_gguf_bar():
        from transformers.modeling_gguf_pytorch_utils import tqdm

        assert list(tqdm([1, 2], desc="Converting")) == [1, 2]
    assert capsys.readouterr().err == ""
