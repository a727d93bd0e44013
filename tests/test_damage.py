"""Damage that the torture (tests/torture) found, and that was mended: each is said in one sentence, nothing is lost."""

from __future__ import annotations

import errno
import json
import os
import resource
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import steer2edit as s2e
from conftest import make_pico, make_tokenizer, make_traces
from runs import command, make_scores, save_pico, tiny_recipe
from steer2edit.artefacts.checkpoint import export_checkpoint
from steer2edit.behaviours.prompts import load_prompts
from steer2edit.engines.transformers import TransformersEngine
from steer2edit.errors import FileError, ModelError, RecipeError, refused_by_the_system
from steer2edit.files.plain_yaml import read_yaml
from steer2edit.files.reading import read_journal, read_jsonl
from steer2edit.files.writing import append_jsonl, claimed, replacing_folder, write_json
from steer2edit.models.load import load_config
from steer2edit.pipeline.run import Run
from steer2edit.probing.spans import response_span
from steer2edit.probing.traces import read_traces
from steer2edit.recipe import load_recipe, parse_recipe
from steer2edit.report import drawing
from steer2edit.report.inspection import describe
from steer2edit.searching.journal import Journal
from steer2edit.serving.sources import open_source

# YAML ---------------------------------------------------------------------------------------------------------------

BILLIONS = "a: &a0 [x, x]\n" + "\n".join(f"b{i}: &a{i + 1} [*a{i}, *a{i}]" for i in range(40))


@pytest.mark.parametrize(
    "text",
    [BILLIONS, "&a [*a]", "a: &a {b: *a}", "[" * 1200, "a: 2001-99-99", "a: !!int x", "a: !!float _",
     "a: !!timestamp x", "a: !!bool x", "a: " + "9" * 6000,
     'a: "\\ud800"', 'a: "\\0"', "x" * 1_100_000, "{b: " * 60 + "1" + "}" * 60],
    ids=lambda text: text[:20],
)  # fmt: skip
def test_yaml_that_is_a_trap_is_refused_at_once(text: str, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(text, encoding="utf-8")
    started = time.process_time()
    with pytest.raises(RecipeError) as caught:
        load_recipe(tmp_path / "recipe.yaml")
    assert time.process_time() - started < 5
    assert len(str(caught.value)) < 10_000
    with pytest.raises(RecipeError):
        load_recipe("demo", [f"name={text}"])


def test_aliases_of_a_few_values_are_read() -> None:
    assert read_yaml("a: &a [1, 2]\nb: *a", "it") == {"a": [1, 2], "b": [1, 2]}


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("seed", 2**32),
        ("evaluation__rows", 10**400),
        ("evaluation__resamples", 10**9),
        ("data__test", {"harmful": 1e400}),
        ("search__layers", ["0-" + "9" * 30]),
    ],
)
def test_a_number_beyond_all_use_is_refused(key: str, value: Any) -> None:
    with pytest.raises(RecipeError, match=key.replace("__", r"\.")):
        tiny_recipe(**{key: value})


# JSON Lines and journals --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("line", ["[" * 200_000, '{"prompt": "bake \\ud83d bread"}', '{"a": {"b": ["\\udfff"]}}'])
def test_a_line_that_no_reader_takes_is_named(line: str, tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text(f'{{"prompt": "how? \\ud83d\\ude00"}}\n{line}\n', encoding="utf-8")
    for read in (read_jsonl, read_traces, lambda path: load_prompts(path, ("harmful",), "test", {})):
        with pytest.raises(s2e.Steer2EditError) as caught:
            read(file)
        assert "line 2 of" in str(caught.value) or "line 1 of" in str(caught.value)
    with pytest.raises(FileError, match=r"line 2 of .* is not JSON"):
        read_jsonl(file)


def test_a_whole_emoji_in_escapes_is_read(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"prompt": "\\ud83d\\ude00"}\n', encoding="utf-8")
    assert read_jsonl(tmp_path / "rows.jsonl") == [{"prompt": "\U0001f600"}]


def test_every_bit_of_a_journal_that_flips_is_noticed_or_changes_nothing(tmp_path: Path) -> None:
    file = tmp_path / "journal.jsonl"
    rows = [{"round": "0", "what": "answers", "batch": i, "text": f"é {i}", "kl": [0.25, None]} for i in range(2)]
    for row in rows:
        append_jsonl(file, row)
    data = file.read_bytes()
    assert read_journal(file) == rows
    noticed = 0
    for at in range(len(data)):
        for bit in range(8):
            file.write_bytes(data[:at] + bytes([data[at] ^ 1 << bit]) + data[at + 1 :])
            try:
                read = read_journal(file)
            except FileError:
                noticed += 1
                continue
            for row in read:  # the key of the checksum is all that may have become another
                assert {key: row[key] for key in rows[0]} in rows
                assert len(row) <= len(rows[0]) + 1
    assert noticed > 0.8 * 8 * len(data)


def test_a_journal_of_an_older_version_has_no_checksums_and_is_read(tmp_path: Path) -> None:
    file = tmp_path / "journal.jsonl"
    line = {"round": "0", "what": "answers", "batch": 0, "rows": 3}
    file.write_text(json.dumps(line) + "\n", encoding="utf-8")
    assert Journal(file).keep("0", "answers", 0, ["x"], dict) == line


@pytest.mark.parametrize("line", ["7", "[]", "null", '"x"', "[" * 100_000])
def test_a_journal_whose_lines_are_no_objects_is_damaged(line: str, tmp_path: Path) -> None:
    (tmp_path / "journal.jsonl").write_text(f"{line}\n", encoding="utf-8")
    with pytest.raises(FileError, match="is damaged"):
        Journal(tmp_path / "journal.jsonl")


# Tensors ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def edit_file(tmp_path: Path) -> Path:
    make_scores().edit(rho_attn=0.3, rho_mlp=0.3, alpha=0.2).save(tmp_path / "edit.safetensors")
    return tmp_path / "edit.safetensors"


def test_a_bit_that_flips_in_an_edit_is_noticed(edit_file: Path) -> None:
    data = edit_file.read_bytes()
    s2e.Edit.load(edit_file)
    taken = []
    for at in range(0, len(data), 3):
        bit = 1 << at % 8
        edit_file.write_bytes(data[:at] + bytes([data[at] ^ bit]) + data[at + 1 :])
        try:
            s2e.Edit.load(edit_file)
        except FileError:
            continue
        taken.append(at)
    # Only where the name of the seal stands, around it, and in the spaces that fill the header up.
    header = int.from_bytes(data[:8], "little")
    assert all(at < 8 + header for at in taken)
    assert len(taken) < 20


def test_an_edit_without_a_seal_is_read(edit_file: Path) -> None:
    id_before = s2e.Edit.load(edit_file).id
    with safe_open(str(edit_file), framework="pt") as file:
        header = json.loads(file.metadata()["steer2edit"])
    assert len(header.pop("sha256")) == 64
    save_file(load_file(edit_file), edit_file, metadata={"steer2edit": json.dumps(header)})
    assert s2e.Edit.load(edit_file).id == id_before


@pytest.fixture
def files_of_few_bytes() -> Iterator[None]:
    """Every file may have 2,000 bytes at most, as far as the system can tell."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_disk_that_is_full_while_tensors_are_written_is_said(tmp_path: Path, files_of_few_bytes: None) -> None:
    edit = s2e.score(model := make_pico(), s2e.collect(model, make_tokenizer(), *make_traces())).edit(
        rho_attn=0.3, rho_mlp=0.3, alpha=0.3
    )
    with pytest.raises(OSError, match="too large") as caught:
        edit.save(tmp_path / "out")
    refusal = refused_by_the_system(caught.value)
    assert refusal is not None
    assert refusal.what == "the disk is full"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("room", [0, 100, 1000, 5000])
def test_a_disk_that_is_full_while_a_figure_is_written_is_said(room: int, tmp_path: Path, monkeypatch: Any) -> None:
    # Where matplotlib writes the file itself, what it does on its way out hides the error in one of its own.
    monkeypatch.setattr(drawing, "SUFFIXES", (".pdf",))
    figure, axes = drawing.canvas(3, 2)
    axes[0].plot([1, 2], [3, 4])
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, hard))
        with pytest.raises(OSError, match="too large"):
            drawing.save(figure, tmp_path / "figure")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.ENAMETOOLONG, errno.EROFS, errno.EIO])
def test_what_the_machine_refuses_is_one_sentence(number: int, monkeypatch: Any, capsys: Any, tmp_path: Path) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(number, os.strerror(number), "a file")

    monkeypatch.setattr("steer2edit.files.writing.write_text", refuse)
    assert command(monkeypatch, "recipes", "--copy", "demo", "--to", tmp_path / "x.yaml") == 2
    said = capsys.readouterr().err
    assert said.startswith("steer2edit: ")
    assert said.count("\n") == 1


# What is shown ------------------------------------------------------------------------------------------------------


def test_an_error_never_acts_on_the_terminal_and_is_no_book(monkeypatch: Any, capsys: Any, tmp_path: Path) -> None:
    file = tmp_path / "bent.yaml"
    file.write_text('"\\e[2J\\u202e": 1\n', encoding="utf-8")
    assert command(monkeypatch, "run", file) == 2
    said = capsys.readouterr().err
    assert "\x1b" not in said
    assert "\u202e" not in said
    assert r"\x1b[2J\u202e" in said
    file.write_text(f"name: {'x' * 900_000}/\n", encoding="utf-8")
    assert command(monkeypatch, "run", file) == 2
    said = capsys.readouterr().err
    assert len(said) < 4000
    assert said.count("\n") == 1


def test_a_diff_of_checkpoints_whose_other_tensors_differ_is_shown(
    monkeypatch: Any, capsys: Any, tmp_path: Path
) -> None:
    model = make_pico()
    model.save_pretrained(tmp_path / "base")
    with torch.no_grad():
        model.model.norm.weight += 1
        model.model.layers[0].input_layernorm.weight += 1
    model.save_pretrained(tmp_path / "other")
    assert command(monkeypatch, "diff", tmp_path / "base", tmp_path / "other") == 0
    said = capsys.readouterr().out
    assert "others: model.layers.0.input_layernorm.weight, model.norm.weight" in said


# A run --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "spoil",
    [lambda e: e.pop("files"), lambda e: e.pop("key"), lambda e: e.update(files=7), lambda e: e.update(read={"a": 1})],
)
def test_a_manifest_that_is_damaged_is_said(spoil: Callable[[Any], Any], tmp_path: Path) -> None:
    entry = {"key": "0", "seconds": 1.0, "files": {"traces.jsonl": "0"}, "read": {}}
    spoil(entry)
    write_json(tmp_path / "manifest.json", {"stages": {"traces": entry}})
    run = Run(tmp_path, tiny_recipe())
    with pytest.raises(FileError, match=r"not a run's manifest .*Delete it"), run.working():
        pass


def test_what_a_kill_left_is_cleared_away(tmp_path: Path) -> None:
    left = [".tmpAbc123", ".edit.safetensors.ab_c1234.tmp.safetensors", "adapter/.README.md.abcd1234.tmp.md"]
    kept = [".tmp", ".tmpfile.txt", "x.tmp", "adapter/README.md"]
    for name in left + kept:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    with Run(tmp_path, tiny_recipe()).working():
        pass
    assert not [name for name in left if (tmp_path / name).exists()]
    assert all((tmp_path / name).exists() for name in kept)


def test_a_run_that_is_not_as_it_was_written_is_not_served_and_inspect_says_so(edit_file: Path) -> None:
    folder = edit_file.parent
    (folder / "choice.json").write_text('{"steering": {"config": {"gamma": 0.25}}}', encoding="utf-8")
    run = Run(folder, tiny_recipe())
    run.record("edit", 1.0, ["edit.safetensors", "choice.json"], [])
    assert open_source(str(folder)).gamma == 0.25
    assert [row["state"] for row in describe(folder)["stages"]] == ["whole"]
    (folder / "choice.json").write_text('{"steering": {"config": {"gamma": 0.75}}}', encoding="utf-8")
    assert [row["state"] for row in describe(folder)["stages"]] == ["changed: choice.json"]
    with pytest.raises(FileError, match=r"choice\.json is not as the run wrote it"):
        open_source(str(folder))


# Two processes ------------------------------------------------------------------------------------------------------


def test_a_folder_that_is_claimed_is_not_claimed_again(tmp_path: Path) -> None:
    folder = tmp_path / ".out.partial"
    with claimed(folder, tmp_path / "out"):
        with pytest.raises(FileError, match="another steer2edit process"), claimed(folder, tmp_path / "out"):
            pass
        folder.rename(tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    with claimed(folder, tmp_path / "out"):
        assert folder.is_dir()


def test_two_exports_to_one_output_do_not_meet(tmp_path: Path) -> None:
    model = make_pico()
    model.save_pretrained(tmp_path / "base")
    probe = s2e.collect(model, make_tokenizer(), *make_traces())
    edit = s2e.score(model, probe).edit(rho_attn=0.3, rho_mlp=0.3, alpha=0.2)
    partial = tmp_path / ".out.partial"
    with claimed(partial, tmp_path / "out"):
        (partial / "half").write_bytes(b"of the other process")
        with pytest.raises(FileError, match="another steer2edit process is writing this output"):
            export_checkpoint(tmp_path / "base", edit, tmp_path / "out")
        assert (partial / "half").read_bytes() == b"of the other process"
    assert export_checkpoint(tmp_path / "base", edit, tmp_path / "out") == tmp_path / "out"
    assert not partial.exists()
    assert not (tmp_path / "out" / "half").exists()


def test_a_folder_that_another_process_has_just_written_is_not_replaced(tmp_path: Path, monkeypatch: Any) -> None:
    real, out = Path.replace, tmp_path / "out"

    def replace(self: Path, target: Any) -> Path:
        out.mkdir()
        (out / "of the other").touch()
        return real(self, target)

    monkeypatch.setattr(Path, "replace", replace)
    with pytest.raises(FileError, match="another process has just written"), replacing_folder(out, "ours") as temporary:
        (temporary / "ours").touch()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert [path.name for path in out.iterdir()] == ["of the other"]


@pytest.mark.parametrize("part", ["both", "thinking", "answer"])
@pytest.mark.parametrize(
    ("prompt", "response"), [("how?", "word " * 9000), ("how? " * 9000, "word"), (" " * 40_000, "a")]
)
def test_a_text_of_megabytes_gives_the_span_of_all_its_tokens(
    prompt: str, response: str, part: Any, monkeypatch: Any
) -> None:
    trace = s2e.Trace(prompt, response, "positive", answer_start=len(response) // 2)
    asked: list[int] = []
    tokenizer = make_tokenizer()

    def watched(text: str, **options: Any) -> Any:
        asked.append(len(text))
        return make_tokenizer()(text, **options)

    for name in ("is_fast", "all_special_ids", "chat_template", "apply_chat_template"):
        setattr(watched, name, getattr(tokenizer, name))
    for positions in ("predicting", "response"):
        spans = []
        for characters in (512, 10**9):
            monkeypatch.setattr("steer2edit.probing.spans.LONGEST_TOKEN", characters)
            spans.append(response_span(watched, trace, part=part, positions=positions, max_tokens=16))
        assert spans[0] == spans[1]
    assert all(length == 512 * 24 for length in asked[::2])  # every second one reads all


@pytest.mark.parametrize("text", ["bake " * 400_000, "x" * 2_000_000])
def test_a_prompt_of_megabytes_is_refused_before_it_becomes_tokens(text: str, monkeypatch: Any) -> None:
    engine = TransformersEngine(make_pico(), make_tokenizer())
    assert len(engine.tokens([{"role": "user", "content": text[:2000]}])) > 100
    monkeypatch.setattr("steer2edit.engines.base.prompt_tokens", None)
    with pytest.raises(s2e.Steer2EditError, match="a prompt is longer than the model can read"):
        engine.tokens([{"role": "user", "content": text}])


# Models -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "value"),
    [("num_hidden_layers", 2**26), ("hidden_size", 2**30), ("vocab_size", 2**31), ("num_attention_heads", -4)],
)
def test_a_configuration_that_would_fill_the_memory_is_refused(key: str, value: int, tmp_path: Path) -> None:
    save_pico(tmp_path / "model")
    file = tmp_path / "model" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text(encoding="utf-8")) | {key: value}), encoding="utf-8")
    with pytest.raises(ModelError, match="cannot be loaded"):
        load_config(tmp_path / "model")


def test_the_parts_of_a_recipe_that_are_right_still_are() -> None:
    recipe = tiny_recipe(seed=2**32 - 1, evaluation__resamples=100_000, search__layers=["0-2", "33%-67%"])
    assert parse_recipe(recipe.model_dump(mode="json")) == recipe
