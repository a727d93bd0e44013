"""A run's edit goes to the Hub as one folder, and is made again from it, tensor by tensor."""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

import steer2edit as s2e
from runs import command, save_pico, tiny_recipe, whole_run
from steer2edit.errors import FileError, Steer2EditError
from steer2edit.pipeline.share import compared, push, reproduce, write_share


@pytest.fixture(scope="module")
def run(tmp_path_factory: Any) -> Path:
    """A finished run; its figures are empty files, since drawing them takes longer than all the rest."""
    folder = tmp_path_factory.mktemp("shared")
    whole_run(folder / "run", tiny_recipe(save_pico(folder / "model")), drawn=False)
    (folder / "run" / "adapter" / ".token").write_text("a hidden file")
    return folder / "run"


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_the_folder_has_the_adapter_its_card_and_the_record(run: Path, tmp_path: Path) -> None:
    out = write_share(run, tmp_path / "out")
    shared = contents(out)
    assert set(shared) == {
        "README.md", "adapter_config.json", "adapter_model.safetensors", "steer2edit.json",
        "edit.safetensors", "recipe.yaml", "choice.json", "results.json", "run.json",
    }  # fmt: skip
    assert shared["run.json"] == (run / "manifest.json").read_bytes()
    assert shared["README.md"] == (run / "adapter/README.md").read_bytes()
    assert contents(write_share(run / "adapter", tmp_path / "alone")).keys() == {
        "README.md", "adapter_config.json", "adapter_model.safetensors", "steer2edit.json"
    }  # fmt: skip
    with pytest.raises(FileError, match="no such export"):
        write_share(run, tmp_path / "other", "gguf")
    with pytest.raises(FileError, match="nothing of steer2edit"):
        write_share(tmp_path, tmp_path / "other")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.txt").write_text("x")
    with pytest.raises(FileError, match="holds other things"):
        write_share(run, tmp_path / "mine")


def test_a_run_directory_is_never_replaced(run: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(run, tmp_path / "other"))
    before = contents(other)
    for source in (run, run / "adapter", other):
        with pytest.raises(FileError, match="other is a run directory"):
            write_share(source, other)
    assert contents(other) == before


def test_an_export_of_another_edit_is_not_pushed(run: Path, tmp_path: Path) -> None:
    changed = Path(shutil.copytree(run, tmp_path / "changed"))
    s2e.Edit.load(changed / "edit.safetensors").with_strength(0.5).save(changed / "edit.safetensors")
    with pytest.raises(FileError, match=r"are of another edit .got: another edit when it ran export and evaluate"):
        write_share(changed, tmp_path / "out")


class Hub(BaseHTTPRequestHandler):
    """The part of the Hub's API that an upload uses; it keeps what it is given."""

    server: Any

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.server.asked.append((self.path, self.headers.get("Authorization")))
        if self.server.refuse:
            self._reply(403, {"error": "not yours"})
        elif self.path.endswith("/repos/create"):
            name = json.loads(body)["name"]
            self._reply(200, {"url": f"http://{self.headers['Host']}/me/{name}", "name": name})
        elif "/preupload/" in self.path:
            how = {"uploadMode": "regular", "shouldIgnore": False}
            files = [{"path": file["path"], **how} for file in json.loads(body)["files"]]
            self._reply(200, {"files": files})
        elif "/commit/" in self.path:
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    self.server.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            address = f"http://{self.headers['Host']}/me/mine/commit/{'0' * 40}"
            self._reply(200, {"commitUrl": address, "commitOid": "0" * 40, "success": True})
        else:
            self._reply(200, {})

    def do_GET(self) -> None:
        if self.server.refuse:
            self._reply(404, {"error": "no such repository"})
        else:
            self._reply(200, {"sha": "0" * 40, "siblings": [], "id": "me/mine", "private": False})

    def _reply(self, status: int, value: Any) -> None:
        data = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def hub() -> Iterator[Any]:
    server: Any = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.asked, server.files, server.refuse = [], {}, False
    threading.Thread(target=server.serve_forever, daemon=True).start()
    server.address = f"http://127.0.0.1:{server.server_port}"
    yield server
    server.shutdown()
    server.server_close()


def pushed(hub: Any, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """Runs the verb in a process of its own, since huggingface_hub reads its endpoint when it is imported."""
    there = {"HF_ENDPOINT": hub.address, "HF_TOKEN": "hf_mine", "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
    line = [sys.executable, "-m", "steer2edit.cli", "push", *map(str, arguments)]
    return subprocess.run(line, env=os.environ | there, capture_output=True, text=True, timeout=300)


def test_what_is_pushed_is_exactly_the_dry_runs_folder(run: Path, tmp_path: Path, hub: Any) -> None:
    done = pushed(hub, run, "me/mine", "--quiet")
    assert (done.returncode, done.stdout.strip()) == (0, f"{hub.address}/me/mine"), done.stderr
    assert hub.files == contents(write_share(run, tmp_path / "out"))
    assert {token for _, token in hub.asked} == {"Bearer hf_mine"}


def test_a_hub_that_refuses_is_one_sentence(run: Path, hub: Any) -> None:
    hub.refuse = True
    done = pushed(hub, run, "me/mine")
    assert done.returncode == 2
    assert "does not take me/mine" in done.stderr
    assert "Traceback" not in done.stderr
    assert hub.files == {}


def test_a_name_that_cannot_be_one_is_refused(run: Path) -> None:
    with pytest.raises(Steer2EditError, match="as owner/name"):
        push(run, "a/b/c d")


def test_an_edit_is_made_again_to_the_bit(run: Path, tmp_path: Path) -> None:
    shared = write_share(run, tmp_path / "out")
    result = reproduce(shared, tmp_path / "again")
    edit = s2e.Edit.load(run / "edit.safetensors")
    assert len(result["tensors"]) > 4 * len(edit.sites)
    assert {*result["tensors"].values(), *result["adapter"].values()} == {"same"}
    assert result["same"]
    assert s2e.Edit.load(tmp_path / "again/edit.safetensors").id == edit.id


def test_what_is_not_the_same_is_named(run: Path, tmp_path: Path) -> None:
    shared = write_share(run, tmp_path / "out")
    edit = s2e.Edit.load(shared / "edit.safetensors")
    key, site = next(iter(edit.edited().items()))
    site.lam[0] += 0.5
    edit.save(shared / "edit.safetensors")
    result = reproduce(shared, tmp_path / "again")
    wrong = {name: word for name, word in result["tensors"].items() if word != "same"}
    assert list(wrong) == [f"{key}.lam"]
    assert wrong[f"{key}.lam"] == pytest.approx(0.5 / float(site.lam.abs().max()), rel=1e-4)
    assert not result["same"]
    assert not result["close"]
    (shared / "choice.json").unlink()
    with pytest.raises(FileError, match="no choice"):
        reproduce(shared, tmp_path / "again")


def test_tensors_are_compared_one_by_one(tmp_path: Path) -> None:
    import torch
    from safetensors.torch import save_file

    one = {"a": torch.ones(2), "b": torch.ones(2), "c": torch.ones(2), "d": torch.zeros(1)}
    other = {"a": torch.ones(2), "b": torch.tensor([1.0, 1.5]), "c": torch.ones(3), "e": torch.ones(1)}
    save_file(one, tmp_path / "one"), save_file(other, tmp_path / "other")
    assert compared(tmp_path / "one", tmp_path / "other") == {
        "a": "same", "b": 0.5, "c": "another shape: (3,)", "d": "missing", "e": "extra"
    }  # fmt: skip
    (tmp_path / "other").write_bytes(b"x")
    with pytest.raises(FileError, match="not a whole"):
        compared(tmp_path / "one", tmp_path / "other")


def test_both_verbs_from_the_command_line(run: Path, tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    assert command(monkeypatch, "push", run, "me/mine", "--dry-run", tmp_path / "out") == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "out")
    assert command(monkeypatch, "reproduce", tmp_path / "out", "--out", tmp_path / "again", "--quiet") == 0
    assert capsys.readouterr().out.strip().endswith("\nthe same")
    assert command(monkeypatch, "push", tmp_path / "nowhere", "me/mine") == 2
    assert command(monkeypatch, "reproduce", tmp_path / "again", "--out", tmp_path / "x") == 2
    assert "no choice.json" in capsys.readouterr().err


def test_names_of_a_strangers_tensors_act_on_no_terminal(tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    found = {"tensors": {"\x1b[2Jx": "missing"}, "same": False, "close": False}
    monkeypatch.setattr("steer2edit.pipeline.share.reproduce", lambda *_: found)
    assert command(monkeypatch, "reproduce", tmp_path) == 1
    assert "\\x1b[2Jx: missing" in capsys.readouterr().out
