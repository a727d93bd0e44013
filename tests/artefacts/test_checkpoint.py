"""The export of a checkpoint under bad conditions: killed, out of disk, on strange bases, without what a kernel offers.

What an export's bytes are where all goes well stands in test_export.py.
"""

from __future__ import annotations

import contextlib
import errno
import filecmp
import hashlib
import json
import os
import random
import shutil
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

import steer2edit as s2e
from conftest import make_pico, make_tokenizer, make_traces
from families import make_family
from runs import places, sketch
from steer2edit.artefacts.checkpoint import JOURNAL, MANIFEST
from steer2edit.artefacts.places import site_reader
from steer2edit.edits import Scores
from steer2edit.errors import EditError, FileError, ModelError
from steer2edit.method.scores import score_site
from steer2edit.models.sites import find_sites
from steer2edit.models.weights import weight_of

SHARDED, ONE_FILE = "20KB", "1GB"


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def random_edit(model: Any, rho: float = 0.1, alpha: float = 0.0) -> s2e.Edit:
    """An edit of every site from random vectors and inputs; no traces are run."""
    draw = torch.Generator().manual_seed(11)
    sites, sketches = {}, {}
    for site in find_sites(model):
        weight = weight_of(model, site)
        v, mu = torch.randn(site.d, generator=draw), torch.randn(site.inputs, generator=draw)
        sites[site.key], sketches[site.key] = score_site(site, weight, v, mu), sketch(weight)
    return Scores(sites, sketches).edit(rho_attn=rho, rho_mlp=rho, alpha=alpha)


class Case(NamedTuple):
    model: Any
    base: Path
    edit: s2e.Edit


def make_case(folder: Path, shard_size: str = SHARDED, dtype: torch.dtype = torch.bfloat16, **edit: float) -> Case:
    model = make_pico("llama", dtype=dtype)
    model.save_pretrained(folder / "base", max_shard_size=shard_size)
    make_tokenizer().save_pretrained(folder / "base")
    return Case(model, folder / "base", random_edit(model, **edit))


@pytest.fixture
def case(tmp_path: Path) -> Case:
    """A sharded bf16 base with a tokenizer, and an edit of all of its sites."""
    return make_case(tmp_path)


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def journal(partial: Path) -> list[dict[str, Any]]:
    """Its whole lines."""
    if not (partial / JOURNAL).is_file():
        return []
    data = (partial / JOURNAL).read_bytes()
    return [json.loads(line) for line in data[: data.rfind(b"\n") + 1].splitlines()]


def as_left(file: Path) -> tuple[int, int]:
    return file.stat().st_ino, file.stat().st_mtime_ns


# Killed -------------------------------------------------------------------------------------------------------------

# Imports everything once, then forks a process for each line that it is given and says how that one ended.
SERVER = """
import os, sys
import torch
torch.set_num_threads(1)
import steer2edit
from steer2edit.artefacts.checkpoint import export_checkpoint
from steer2edit.edits import load_any
base, edit = sys.argv[1], load_any(sys.argv[2])
print("ready", flush=True)
for line in sys.stdin:
    pid = os.fork()
    if not pid:
        torch.set_num_threads(2)
        code = 1
        try:
            export_checkpoint(base, edit, line.strip())
            code = 0
        finally:
            os._exit(code)
    print(pid, flush=True)
    print(os.waitpid(pid, 0)[1], flush=True)
"""


class Exporter:
    """A process that exports in children of its own, which can be killed at any moment."""

    def __init__(self, base: Path, edit: Path):
        self.process = subprocess.Popen(
            [sys.executable, "-c", SERVER, str(base), str(edit)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        assert self._line() == "ready"

    def _line(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def export(self, out: Path, until: Callable[[], bool] | None = None) -> int:
        """How the child ended: 0, or the number of the signal that it got when `until` came true."""
        assert self.process.stdin is not None
        self.process.stdin.write(f"{out}\n")
        self.process.stdin.flush()
        pid = int(self._line())
        if until is not None:
            while not until():
                time.sleep(0.001)
            with contextlib.suppress(ProcessLookupError):  # it was faster
                os.kill(pid, signal.SIGKILL)
        return int(self._line())

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        assert self.process.wait(timeout=60) == 0


@pytest.fixture
def large(tmp_path: Path) -> Iterator[tuple[Path, Exporter]]:
    """A bf16 base of about 80 MB in a dozen shards, and a process that exports it."""
    model = make_pico(
        "llama",
        dtype=torch.bfloat16,
        hidden_size=512,
        intermediate_size=1536,
        num_hidden_layers=12,
        num_attention_heads=8,
        num_key_value_heads=4,
        initializer_range=0.02,
    )
    base = tmp_path / "base"
    model.save_pretrained(base, max_shard_size="8MB")
    (base / "notes").mkdir()
    (base / "notes" / "read me.txt").write_text("ünchanged")
    random_edit(model).save(tmp_path / "edit.safetensors")
    assert sum(f.stat().st_size for f in base.glob("*.safetensors")) > 60e6
    assert len(list(base.glob("*.safetensors"))) >= 8
    exporter = Exporter(base, tmp_path / "edit.safetensors")
    yield base, exporter
    exporter.close()


@pytest.mark.slow
def test_an_export_that_was_killed_goes_on_to_the_same_bytes(large: Any, tmp_path: Path) -> None:
    base, exporter = large
    here = tmp_path / "here"
    here.mkdir()
    out, partial = here / "out", here / ".out.partial"
    before = contents(base)
    assert exporter.export(tmp_path / "warm") == 0
    started = time.monotonic()
    assert exporter.export(tmp_path / "expected") == 0
    usual = time.monotonic() - started
    expected = contents(tmp_path / "expected")
    shards = sorted(name for name in expected if name.endswith(".safetensors"))

    def at(moment: float) -> Callable[[], bool]:
        start = time.monotonic()
        return lambda: time.monotonic() - start >= moment

    def once(count: int) -> Callable[[], bool]:
        return lambda: len(journal(partial)) > count or out.exists()

    draw = random.Random(4)
    kills: list[Any] = [("moment", draw.uniform(0.0, usual)) for _ in range(14)]
    kills += [("shards", count) for count in (1, 2, 3, len(shards) // 2, len(shards) - 2, len(shards) - 1)]
    killed, between = 0, 0
    for how, when in kills:
        ended = exporter.export(out, at(when) if how == "moment" else once(when))
        assert ended in (0, signal.SIGKILL)
        killed += ended != 0
        assert names(here) in (set(), {".out.partial"}, {"out"})
        lines = journal(partial)
        whole = [line["file"] for line in lines[1:]]
        between += 0 < len(whole) < len(shards)
        for name in whole:
            assert (partial / name).read_bytes() == expected[name]
        left = {name: as_left(partial / name) for name in whole}
        if not out.exists():
            assert exporter.export(out) == 0
        assert names(here) == {"out"}
        assert contents(out) == expected
        assert {name: as_left(out / name) for name in whole} == left  # a whole shard is not written again
        shutil.rmtree(out)
    assert killed >= 12
    assert between >= 4
    assert contents(base) == before


@pytest.mark.slow
def test_an_export_that_is_killed_again_and_again_comes_to_its_end(large: Any, tmp_path: Path) -> None:
    _, exporter = large
    assert exporter.export(tmp_path / "expected") == 0
    here = tmp_path / "here"
    here.mkdir()
    out, partial = here / "out", here / ".out.partial"
    kills = 0
    while not out.exists():
        there = len(journal(partial))
        exporter.export(out, lambda there=there: len(journal(partial)) > max(there, 1) or out.exists())
        kills += 1
        assert kills < 30
    if partial.exists():  # killed between the last shard and the end
        assert exporter.export(out) == 0
    assert kills >= 3
    assert contents(out) == contents(tmp_path / "expected")
    assert names(here) == {"out"}


class Stopped(BaseException):
    """As a kill in this process: nothing of ours catches it."""


def stop_after(monkeypatch: pytest.MonkeyPatch, case: Case, out: Path, shards: int) -> Path:
    """Stops an export once so many shards are whole; gives the folder that it leaves."""
    from steer2edit.artefacts import checkpoint

    real, written = checkpoint.append_jsonl, []

    def append(path: Path, row: dict[str, Any]) -> None:
        if "file" in row and len(written) == shards:
            raise Stopped
        real(path, row)
        written.extend([row["file"]] if "file" in row else [])

    monkeypatch.setattr(checkpoint, "append_jsonl", append)
    with pytest.raises(Stopped):
        s2e.export_checkpoint(case.base, case.edit, out)
    monkeypatch.undo()
    partial = out.with_name(f".{out.name}.partial")
    assert [line["file"] for line in journal(partial)[1:]] == written
    return partial


def test_only_the_shards_that_are_not_whole_are_written_again(
    case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    s2e.export_checkpoint(case.base, case.edit, tmp_path / "expected")
    partial = stop_after(monkeypatch, case, tmp_path / "out", 2)
    whole = {line["file"]: as_left(partial / line["file"]) for line in journal(partial)[1:]}
    assert names(tmp_path) == {"base", "expected", ".out.partial"}
    capsys.readouterr()
    s2e.export_checkpoint(case.base, case.edit, tmp_path / "out")
    assert "2 shards are complete" in capsys.readouterr().err
    assert {name: as_left(tmp_path / "out" / name) for name in whole} == whole
    assert contents(tmp_path / "out") == contents(tmp_path / "expected")  # the manifest too: hashes of all shards


@pytest.mark.parametrize("what", ["other edit", "touched", "grown", "new file"])
def test_what_another_export_left_is_not_gone_on_with(
    case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any, what: str
) -> None:
    partial = stop_after(monkeypatch, case, tmp_path / "out", 2)
    kept = journal(partial)[1]["file"]
    (partial / "stranger.txt").write_text("of the other export")
    edit = case.edit
    if what == "other edit":
        edit = edit.with_strength(0.5)
    elif what == "touched":
        os.utime(case.base / kept, ns=(1, 1))
    elif what == "grown":
        (case.base / "tokenizer_config.json").write_text("{}  ")
    else:
        (case.base / "new.txt").write_text("new")
    capsys.readouterr()
    s2e.export_checkpoint(case.base, edit, tmp_path / "out")
    assert "resuming" not in capsys.readouterr().err
    s2e.export_checkpoint(case.base, edit, tmp_path / "expected")
    assert contents(tmp_path / "out") == contents(tmp_path / "expected")
    assert "stranger.txt" not in names(tmp_path / "out")


def test_a_shard_of_new_weights_under_the_old_name_is_read_again(
    case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    partial = stop_after(monkeypatch, case, tmp_path / "out", 3)
    kept = journal(partial)[1]["file"]
    tensors = load_file(case.base / kept)
    save_file({name: -tensor for name, tensor in tensors.items()}, case.base / kept, metadata={"format": "pt"})
    edit = case.edit
    edited = {s.site.tensor for s in edit.edited().values()}
    if edited & tensors.keys():
        with pytest.raises(ModelError, match="not the base"):
            s2e.export_checkpoint(case.base, edit, tmp_path / "out")
        assert names(tmp_path) == {"base"}
    else:
        s2e.export_checkpoint(case.base, edit, tmp_path / "out")
        assert contents(tmp_path / "out")[kept] == contents(case.base)[kept]


# Another base -------------------------------------------------------------------------------------------------------


@pytest.fixture
def never_written(monkeypatch: pytest.MonkeyPatch) -> None:
    """An export that comes to making its folder fails the test."""

    def resume(*_: Any) -> None:
        raise AssertionError("something was written")

    monkeypatch.setattr("steer2edit.artefacts.checkpoint._resume", resume)


@pytest.mark.usefixtures("never_written")
@pytest.mark.parametrize("parts", [1, 2])
def test_another_base_and_an_edited_one_are_refused_before_anything_is_written(
    parts: int, case: Case, tmp_path: Path
) -> None:
    edit: Any = (
        case.edit if parts == 1 else s2e.combine(case.edit.only(blocks=("mlp",)), case.edit.only([1], ("attn",)))
    )
    make_pico("llama", dtype=torch.bfloat16, seed=1).save_pretrained(tmp_path / "stranger", max_shard_size=SHARDED)
    with pytest.raises(ModelError, match="the model is not the base that the edit was made for"):
        s2e.export_checkpoint(tmp_path / "stranger", edit, tmp_path / "out")
    case.edit.apply(case.model)
    case.model.save_pretrained(tmp_path / "edited", max_shard_size=SHARDED)
    with pytest.raises(EditError, match="the edit is already in this model"):
        s2e.export_checkpoint(tmp_path / "edited", edit, tmp_path / "out")
    assert names(tmp_path) == {"base", "stranger", "edited"}


def test_only_the_smallest_weight_is_read_before_the_copy(
    case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from steer2edit.artefacts import checkpoint

    read: list[str] = []

    def reader(folder: Path) -> Callable[[Any], Tensor]:
        one = site_reader(folder)
        return lambda site: (read.append(site.key), one(site))[1]

    monkeypatch.setattr(checkpoint, "site_reader", reader)
    s2e.export_checkpoint(case.base, case.edit.only([1, 2]), tmp_path / "out")
    assert read == ["1.attn"]  # heads: 32 × 32 against 32 × 48
    read.clear()
    both = s2e.combine(case.edit.only([2], ("mlp",)), case.edit.only([0]))
    s2e.export_checkpoint(case.base, both, tmp_path / "both")
    assert read == ["2.mlp", "0.attn"]


def test_a_base_that_differs_where_the_glance_does_not_look_is_refused_in_the_end(case: Case, tmp_path: Path) -> None:
    name = "model.layers.2.mlp.down_proj.weight"
    file = places(case.base)[name][0]
    tensors = load_file(file)
    save_file(tensors | {name: -tensors[name]}, file, metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"not the base .*1 of 6 sites, first 2\.mlp"):
        s2e.export_checkpoint(case.base, case.edit, tmp_path / "out")
    assert names(tmp_path) == {"base"}


def test_a_call_with_another_base_leaves_what_a_kill_left_to_go_on_with(
    case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    stop_after(monkeypatch, case, tmp_path / "out", 2)
    make_pico("llama", dtype=torch.bfloat16, seed=1).save_pretrained(tmp_path / "stranger", max_shard_size=SHARDED)
    with pytest.raises(ModelError, match="not the base"):
        s2e.export_checkpoint(tmp_path / "stranger", case.edit, tmp_path / "out")
    capsys.readouterr()
    s2e.export_checkpoint(case.base, case.edit, tmp_path / "out")
    assert "2 shards are complete" in capsys.readouterr().err


# Tensors of few bits ------------------------------------------------------------------------------------------------


def few_bits(base: Path, chosen: Callable[[str], bool], scaled: bool = True) -> dict[str, bytes]:
    """Makes some of a checkpoint's weights fp8, each with its scale beside it, and gives those tensors' bytes."""
    made = {}
    for file in base.glob("*.safetensors"):
        tensors = load_file(file)
        for name in [name for name in tensors if name.endswith("_proj.weight") and chosen(name)]:
            tensors[name] = tensors[name].to(torch.float8_e4m3fn)
            made[name] = b""
            if scaled:
                tensors[f"{name}_scale_inv"] = torch.tensor([1.0])
                made[f"{name}_scale_inv"] = b""
        save_file(tensors, file, metadata={"format": "pt"})
    index = base / "model.safetensors.index.json"
    if index.is_file():
        where = {name: file.name for name, (file, _, _) in places(base).items()}
        index.write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return {name: data for name, data in stored_bytes(base).items() if name in made}


@pytest.mark.usefixtures("never_written")
def test_an_fp8_weight_without_scales_that_is_edited_is_refused_with_what_to_do(case: Case, tmp_path: Path) -> None:
    probe = s2e.collect(case.model, make_tokenizer(), *make_traces())
    few_bits(case.base, lambda name: "layers.1.self_attn.o_proj" in name, scaled=False)
    before = contents(tmp_path)
    expected = (
        "model.layers.1.self_attn.o_proj.weight is not plain floating point (got: F8_E4M3). Known are F32, F16 and "
        "BF16; fp8, MXFP4, NVFP4, GPTQ, AWQ and bitsandbytes with their scales; and GGUF's Q8_0, Q4_0, Q4_1, Q5_0, "
        "Q5_1, Q4_K, Q5_K and Q6_K. Others: dequantise the checkpoint first; or give the loaded model to score(), "
        "which dequantises it, and serve the edit as an adapter."
    )
    for refused in (
        lambda: s2e.export_checkpoint(case.base, case.edit, tmp_path / "out"),
        lambda: s2e.score(case.base, probe),
    ):
        with pytest.raises(FileError) as caught:
            refused()
        assert str(caught.value) == expected
    assert contents(tmp_path) == before


@pytest.mark.parametrize("shard_size", [SHARDED, ONE_FILE])
def test_fp8_weights_that_are_not_edited_are_copied_verbatim(shard_size: str, tmp_path: Path) -> None:
    case = make_case(tmp_path, shard_size)
    edit = case.edit.only(blocks=("attn",))
    s2e.export_checkpoint(case.base, edit, tmp_path / "plain")
    expected = {s.site.tensor: stored_bytes(tmp_path / "plain")[s.site.tensor] for s in edit.edited().values()}
    # All maps but the attention's output; of those the MLP's are sites of the edit, with λ = 0.
    fp8 = few_bits(case.base, lambda name: "o_proj" not in name)
    assert len(fp8) == 2 * 3 * 6
    s2e.export_checkpoint(case.base, edit, tmp_path / "out")
    out = stored_bytes(tmp_path / "out")
    assert {name: out[name] for name in fp8} == fp8
    assert {name: out[name] for name in expected} == expected
    assert s2e.verify(case.base, edit, tmp_path / "out")["as_expected"]
    s2e.export_checkpoint(case.base, case.edit, tmp_path / "whole", accept_rounding=True)
    whole = stored_bytes(tmp_path / "whole")
    assert {name for name in fp8 if whole[name] != fp8[name]} <= {n for n in fp8 if "mlp.down_proj" in n}
    assert s2e.verify(case.base, case.edit, tmp_path / "whole")["as_expected"]


# The disk is full ---------------------------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 3 MB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = shutil.which("mount")
    command = [mount or "mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(disk)]
    if mount is None or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("no file system can be mounted here")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def test_a_disk_that_fills_up_during_an_export_is_told_in_one_sentence(
    tmp_path: Path, small_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_pico("llama", hidden_size=128, intermediate_size=512, num_hidden_layers=4)
    model.save_pretrained(tmp_path / "base", max_shard_size="1MB")
    edit = random_edit(model)
    before = contents(tmp_path / "base")
    assert sum(map(len, before.values())) > 3 * 2**20
    with pytest.raises(FileError, match=r"too little room .*MB free, .*MB needed, 1\.0 MB of them as a reserve"):
        s2e.export_checkpoint(tmp_path / "base", edit, small_disk / "out")
    assert names(small_disk) == set()
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)  # another process fills it meanwhile
    with pytest.raises(FileError, match=r"^the disk is full: .*out was not written") as caught:
        s2e.export_checkpoint(tmp_path / "base", edit, small_disk / "out")
    assert "\n" not in str(caught.value)
    assert names(small_disk) <= {".out.partial"}
    assert contents(tmp_path / "base") == before


@pytest.mark.parametrize("call", ["pwrite", "copy_file_range", "fsync"])
def test_no_space_left_is_told_whatever_call_says_it_and_the_export_goes_on_later(
    case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    s2e.export_checkpoint(case.base, case.edit, tmp_path / "expected")
    before = contents(case.base)
    real, calls = getattr(os, call), []

    def full(*arguments: Any) -> Any:
        calls.append(call)
        if len(calls) > 4:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(*arguments)

    monkeypatch.setattr(os, call, full)
    with pytest.raises(FileError, match=r"the disk is full: .*out was not written .*run it again"):
        s2e.export_checkpoint(case.base, case.edit, tmp_path / "out")
    monkeypatch.undo()
    assert names(tmp_path) == {"base", "expected", ".out.partial"}
    assert contents(case.base) == before
    s2e.export_checkpoint(case.base, case.edit, tmp_path / "out")
    assert contents(tmp_path / "out") == contents(tmp_path / "expected")


def test_no_space_left_for_the_small_files_is_told_too(
    case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*arguments: Any, **options: Any) -> Any:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(shutil, "copyfile", full)
    with pytest.raises(FileError, match="the disk is full"):
        s2e.export_checkpoint(case.base, case.edit, tmp_path / "out")
    assert names(tmp_path) == {"base", ".out.partial"}


def test_too_little_room_is_refused_before_anything_is_written(
    case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = sum(f.stat().st_size for f in case.base.rglob("*"))
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=size - 1))
    opened: list[Any] = []
    real = os.open

    def spy(path: Any, flags: int, *arguments: Any, **options: Any) -> int:
        opened.append((path, flags))
        return real(path, flags, *arguments, **options)

    monkeypatch.setattr(os, "open", spy)
    with pytest.raises(FileError, match="the disk has too little room for the edited checkpoint"):
        s2e.export_checkpoint(case.base, case.edit, tmp_path / "out")
    assert names(tmp_path) == {"base"}
    assert not [path for path, flags in opened if str(path).endswith(".safetensors") and flags & os.O_RDWR]


# What is copied and what is not -------------------------------------------------------------------------------------


def test_weights_in_other_formats_are_left_out_and_named(case: Case, tmp_path: Path, capsys: Any) -> None:
    strangers = ["consolidated.safetensors", "model.gguf", "onnx/model.onnx", "pytorch_model.bin", "tf_model.h5"]
    (case.base / "onnx").mkdir()
    for name in strangers:
        (case.base / name).write_bytes(b"the base's weights")
    save_file({"x": torch.zeros(2)}, case.base / "consolidated.safetensors")
    s2e.export_checkpoint(case.base, case.edit, tmp_path / "out")
    out = contents(tmp_path / "out")
    assert not set(strangers) & set(out)
    assert json.loads(out[MANIFEST])["left_out"] == strangers
    said = capsys.readouterr().err
    assert "not copied" in said
    assert all(name in said for name in strangers)


def test_all_else_is_copied_byte_for_byte(case: Case, tmp_path: Path, capsys: Any) -> None:
    (case.base / "notes" / "deep").mkdir(parents=True)
    (case.base / "notes" / "deep" / "ünder.txt").write_bytes(bytes(range(256)))
    (case.base / "empty").write_bytes(b"")
    (case.base / ".hidden").write_text("kept")
    for stale in (".git", ".cache"):
        (case.base / stale).mkdir()
        (case.base / stale / "config").write_text("left")
    s2e.export_checkpoint(case.base, case.edit, tmp_path / "out")
    expected = {k: v for k, v in contents(case.base).items() if not k.startswith((".git", ".cache"))}
    out = contents(tmp_path / "out")
    manifest = json.loads(out.pop(MANIFEST))
    assert out.keys() == expected.keys()
    assert {"tokenizer.json", "tokenizer_config.json", "notes/deep/ünder.txt", ".hidden", "empty"} <= out.keys()
    assert {name for name in out if out[name] != expected[name]} <= {n for n in out if n.endswith(".safetensors")}
    assert (manifest["left_out"], manifest["base"], manifest["edit"]) == ([], "base", case.edit.id)
    assert "not copied" not in capsys.readouterr().err


def test_what_a_shard_holds_beside_the_model_is_copied_verbatim(tmp_path: Path) -> None:
    case = make_case(tmp_path, ONE_FILE)
    file = case.base / "model.safetensors"
    payload = torch.tensor([0x7FC1, 0x7F81, 0xFFC3 - 2**16, 0x8000 - 2**16], dtype=torch.int16).view(torch.bfloat16)
    strangers = {
        "of.nothing": torch.arange(7, dtype=torch.int64),
        "a.nan": payload,
        "flags": torch.tensor([True, False]),
        "double": torch.randn(3, 3, dtype=torch.float64),
        "empty": torch.zeros(0, 4),
        "scalar": torch.tensor(3.5),
    }
    save_file(load_file(file) | strangers, file, metadata={"format": "pt", "made by": "a ‘test’"})
    s2e.export_checkpoint(case.base, case.edit, tmp_path / "out")
    old, new = load_file(file), load_file(tmp_path / "out" / "model.safetensors")
    assert list(new) == list(old)
    edited = {s.site.tensor for s in case.edit.edited().values()}
    for name, tensor in old.items():
        bits = (tensor.reshape(-1).view(torch.uint8), new[name].reshape(-1).view(torch.uint8))
        assert torch.equal(*bits) == (name not in edited), name
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as opened:
        assert opened.metadata() == {"format": "pt", "made by": "a ‘test’"}
    head = 8 + int.from_bytes(file.read_bytes()[:8], "little")
    assert (tmp_path / "out" / "model.safetensors").read_bytes()[:head] == file.read_bytes()[:head]


@pytest.mark.parametrize("mask", [0o022, 0o077])
def test_files_have_the_modes_that_the_umask_gives(case: Case, tmp_path: Path, mask: int) -> None:
    (case.base / "config.json").chmod(0o600)
    old = os.umask(mask)
    try:
        s2e.export_checkpoint(case.base, case.edit, tmp_path / "out")
    finally:
        os.umask(old)
    for path in [tmp_path / "out", *(tmp_path / "out").rglob("*")]:
        mode = stat.S_IMODE(path.stat().st_mode)
        assert mode == (0o777 if path.is_dir() else 0o666) & ~mask, path.name


def test_a_link_that_leads_out_of_the_folder_is_refused_by_its_name(case: Case, tmp_path: Path) -> None:
    (tmp_path / "secret.txt").write_text("of another user")
    (tmp_path / "elsewhere").mkdir()
    for name, target in (("readme.md", "secret.txt"), ("more", "elsewhere"), ("gone", "nothing")):
        link = case.base / name
        link.symlink_to(tmp_path / target)
        with pytest.raises(FileError, match=rf"^{name} is not a file inside the checkpoint"):
            s2e.export_checkpoint(case.base, case.edit, tmp_path / "out")
        link.unlink()
    (case.base / "inside.json").symlink_to("config.json")  # one that stays is followed
    shard = sorted(case.base.glob("*.safetensors"))[0]
    (tmp_path / "elsewhere" / shard.name).write_bytes(shard.read_bytes())
    s2e.export_checkpoint(case.base, case.edit, tmp_path / "out")
    assert (tmp_path / "out" / "inside.json").read_bytes() == (case.base / "config.json").read_bytes()
    assert not (tmp_path / "out" / "inside.json").is_symlink()
    shutil.rmtree(tmp_path / "out")
    shard.unlink()
    shard.symlink_to(tmp_path / "elsewhere" / shard.name)
    with pytest.raises(FileError, match=rf"^{shard.name} is not a file inside the checkpoint"):
        s2e.export_checkpoint(case.base, case.edit, tmp_path / "out")
    assert names(tmp_path) == {"base", "secret.txt", "elsewhere"}


def test_an_output_inside_the_base_is_refused(case: Case) -> None:
    before = contents(case.base)
    with pytest.raises(FileError, match="lies inside the base"):
        s2e.export_checkpoint(case.base, case.edit, case.base / "sub" / "out")
    assert contents(case.base) == before
    assert not (case.base / "sub").exists()


# The bytes ----------------------------------------------------------------------------------------------------------


def stored_bytes(folder: Path) -> dict[str, bytes]:
    """Tensor → its bytes in the checkpoint's files."""
    return {name: file.read_bytes()[start:end] for name, (file, start, end) in places(folder).items()}


def test_the_hashes_are_those_of_the_tensors_before_and_after(case: Case, tmp_path: Path) -> None:
    edit = case.edit.only(layers=[0, 2])
    s2e.export_checkpoint(case.base, edit, tmp_path / "out")
    old, new = stored_bytes(case.base), stored_bytes(tmp_path / "out")
    expected = {
        name: {"before": hashlib.sha256(old[name]).hexdigest(), "after": hashlib.sha256(new[name]).hexdigest()}
        for name in sorted(s.site.tensor for s in edit.edited().values())
    }
    assert len(expected) == 4
    assert all(both["before"] != both["after"] for both in expected.values())
    assert json.loads((tmp_path / "out" / MANIFEST).read_text())["tensors"] == expected


def test_without_hashes_there_are_none_and_the_weights_are_the_same(case: Case, tmp_path: Path) -> None:
    s2e.export_checkpoint(case.base, case.edit, tmp_path / "with")
    s2e.export_checkpoint(case.base, case.edit, tmp_path / "without", hashes=False)
    there, here = contents(tmp_path / "with"), contents(tmp_path / "without")
    assert json.loads(here.pop(MANIFEST))["tensors"] == {}
    assert len(json.loads(there.pop(MANIFEST))["tensors"]) == 6
    assert here == there


def test_hashes_of_experts_in_one_tensor_are_those_of_their_parts(tmp_path: Path) -> None:
    model = make_family("gpt_oss")
    model.save_pretrained(tmp_path / "base")
    edit = random_edit(model)
    s2e.export_checkpoint(tmp_path / "base", edit, tmp_path / "out")
    expected = json.loads((tmp_path / "out" / MANIFEST).read_text())["tensors"]
    old, new = (load_file(tmp_path / folder / "model.safetensors") for folder in ("base", "out"))
    for layer in range(2):
        name = f"model.layers.{layer}.mlp.experts.down_proj"
        for expert in range(4):
            both = [hashlib.sha256(t[name][expert].numpy().tobytes()).hexdigest() for t in (old, new)]
            assert expected[f"{name}[{expert}]"] == dict(zip(("before", "after"), both, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_a_sparse_edit_leaves_the_bytes_of_other_columns_alone(tmp_path: Path, dtype: torch.dtype) -> None:
    model = make_pico("llama", dtype=dtype)
    edit = random_edit(model, rho=0.5, alpha=0.3)
    kept = {}
    with torch.no_grad():
        for site in find_sites(model):
            columns = torch.nonzero(edit.sites[site.key].row == 0).flatten()
            kept[site.tensor] = columns
            weight_of(model, site)[::3, columns] = -0.0
    edit = s2e.Edit(edit.sites, edit.config, {}, edit.provenance)
    model.save_pretrained(tmp_path / "base")
    s2e.export_checkpoint(tmp_path / "base", edit, tmp_path / "out")
    old, new = (load_file(tmp_path / folder / "model.safetensors") for folder in ("base", "out"))
    integer = torch.int32 if dtype is torch.float32 else torch.int16
    assert sum(len(columns) for columns in kept.values()) > 20
    for name, columns in kept.items():
        a, b = (t[name].view(integer)[:, columns] for t in (old, new))
        assert torch.equal(a, b)
        assert bool((a == torch.iinfo(integer).min).any()) == bool(len(columns))  # −0
    assert any(not torch.equal(old[name], new[name]) for name in kept)


@pytest.mark.parametrize("where", [0, -1], ids=["edited column", "untouched column"])
def test_a_weight_that_holds_a_nan_is_refused_and_nothing_is_left(tmp_path: Path, where: int) -> None:
    model = make_pico("llama")
    edit = random_edit(model, rho=0.5, alpha=0.3)
    site = edit.sites["1.mlp"]
    columns = torch.nonzero((site.row != 0) == (where == 0)).flatten()
    assert len(columns)
    with torch.no_grad():
        weight_of(model, site.site)[5, columns[0]] = torch.nan
    model.save_pretrained(tmp_path / "base")
    for known in (edit.fingerprint, {}):
        with pytest.raises((EditError, ModelError), match=r"not finite|not the base"):
            s2e.export_checkpoint(tmp_path / "base", s2e.Edit(edit.sites, edit.config, known), tmp_path / "out")
        assert names(tmp_path) == {"base"}


@pytest.mark.parametrize(
    ("dtype", "strength"),
    [(torch.float16, 1e6), (torch.bfloat16, 3e38), (torch.float32, 3e38), (torch.float32, 1e300)],
    ids=["fp16", "bf16", "fp32", "beyond fp32"],
)
def test_an_edited_weight_that_overflows_is_refused_and_nothing_is_left(
    tmp_path: Path, dtype: torch.dtype, strength: float
) -> None:
    case = make_case(tmp_path, ONE_FILE, dtype)
    edit = case.edit.with_strength(strength)
    assert max(float(c.delta().abs().max()) for c in edit.changes().values()) > torch.finfo(dtype).max
    with pytest.raises(EditError, match="is not finite"):
        s2e.export_checkpoint(case.base, edit, tmp_path / "out")
    assert names(tmp_path) == {"base"}


@pytest.mark.parametrize("how", ["ENOSYS", "EXDEV", "EINVAL", "0", "little", "missing"])
def test_the_bytes_are_the_same_where_the_kernel_copies_nothing(
    case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    s2e.export_checkpoint(case.base, case.edit, tmp_path / "expected")
    real = os.copy_file_range

    def copy(source: int, to: int, count: int, *offsets: int) -> int:
        if how == "0":
            return 0
        if how == "little":
            return real(source, to, min(count, 1000), *offsets)
        raise OSError(getattr(errno, how), "not here")

    if how == "missing":
        monkeypatch.delattr(os, "copy_file_range")
    else:
        monkeypatch.setattr(os, "copy_file_range", copy)
    s2e.export_checkpoint(case.base, case.edit, tmp_path / "out")
    assert contents(tmp_path / "out") == contents(tmp_path / "expected")


@pytest.mark.parametrize("shard_size", [ONE_FILE, SHARDED])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", ["gpt_oss", "mixtral", "gpt2"])
def test_fused_and_separate_experts_are_as_apply_and_save_pretrained_give_them(
    name: str, dtype: torch.dtype, shard_size: str, tmp_path: Path
) -> None:
    model = make_family(name).to(dtype)
    scores = s2e.score(model, s2e.collect(model, make_tokenizer(), *make_traces()), expert_tokens=2)
    edit = scores.edit(rho_attn=0.3, rho_mlp=0.3, alpha=0.2)
    model.save_pretrained(tmp_path / "base", max_shard_size=shard_size)
    s2e.export_checkpoint(tmp_path / "base", edit, tmp_path / "out")
    edit.apply(model)
    model.save_pretrained(tmp_path / "expected", max_shard_size=shard_size)
    expected = {name: data for name, data in contents(tmp_path / "expected").items() if name.endswith(".safetensors")}
    assert {name: data for name, data in contents(tmp_path / "out").items() if name in expected} == expected
    assert stored_bytes(tmp_path / "base") != stored_bytes(tmp_path / "out")


def test_one_expert_alone_changes_only_its_part_of_the_tensor(tmp_path: Path) -> None:
    model = make_family("gpt_oss")
    model.save_pretrained(tmp_path / "base")
    whole = random_edit(model)
    sites = {key: site for key, site in whole.sites.items() if key == "1.mlp.2"}
    s2e.export_checkpoint(tmp_path / "base", s2e.Edit(sites, whole.config), tmp_path / "out")
    old, new = (load_file(tmp_path / folder / "model.safetensors") for folder in ("base", "out"))
    name = "model.layers.1.mlp.experts.down_proj"
    assert [k for k in old if not torch.equal(old[k], new[k])] == [name]
    assert [e for e in range(4) if not torch.equal(old[name][e], new[name][e])] == [2]
    delta: Tensor = sites["1.mlp.2"].delta()
    torch.testing.assert_close((new[name] - old[name])[2].T, delta, rtol=0, atol=1e-6)


def test_a_file_that_a_kill_left_half_written_does_not_come_along(
    case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    s2e.export_checkpoint(case.base, case.edit, tmp_path / "expected")
    partial = stop_after(monkeypatch, case, tmp_path / "out", 2)
    (partial / ".manifest.json.q5jgd_4n.tmp.json").write_text('{"kind"')  # as `write_json` leaves it
    s2e.export_checkpoint(case.base, case.edit, tmp_path / "out")
    assert contents(tmp_path / "out") == contents(tmp_path / "expected")


# Progress -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("after", [None, 2], ids=["from the start", "gone on with"])
def test_progress_rises_to_the_whole(
    case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: int | None
) -> None:
    total = sum(f.stat().st_size for f in case.base.glob("*.safetensors"))
    there = 0
    if after is not None:
        partial = stop_after(monkeypatch, case, tmp_path / "out", after)
        there = sum(line["size"] for line in journal(partial)[1:])
    expected: list[tuple[int, int]] = []
    s2e.export_checkpoint(case.base, case.edit, tmp_path / "out", progress=lambda *now: expected.append(now))
    assert {whole for _, whole in expected} == {total}
    done = [now for now, _ in expected]
    assert done == sorted(done)
    assert done[0] > there
    assert done[-1] == total


def test_an_export_beside_a_finished_one_changes_nothing_of_it(case: Case, tmp_path: Path) -> None:
    s2e.export_checkpoint(case.base, case.edit, tmp_path / "out")
    s2e.export_checkpoint(case.base, case.edit.with_strength(0.5), tmp_path / "other")
    compared = filecmp.dircmp(tmp_path / "out", tmp_path / "other")
    assert compared.left_only == compared.right_only == []
    with pytest.raises(FileError, match="exists already"):
        s2e.export_checkpoint(case.base, case.edit, tmp_path / "out")
