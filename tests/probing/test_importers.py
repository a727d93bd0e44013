"""Vectors and means from other tools' files, written here as those tools write them."""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import steer2edit as s2e
from steer2edit.errors import FileError, ModelError
from steer2edit.probing.importers import import_directions, import_vectors


def control_vector(path: Path, vectors: dict[str, np.ndarray], architecture: str = "controlvector") -> Path:
    """As repeng writes it."""
    writer = gguf.GGUFWriter(str(path), architecture)
    writer.add_string("controlvector.model_hint", "llama")
    writer.add_uint32("controlvector.layer_count", len(vectors))
    for name, vector in vectors.items():
        writer.add_tensor(name, vector)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_every_kind_of_file_gives_the_same_vectors(tmp_path: Path) -> None:
    vectors = {1: torch.randn(32), 2: torch.randn(32)}
    save_file({f"layer_{i}": v for i, v in vectors.items()}, tmp_path / "v.safetensors")
    np.savez(tmp_path / "v.npz", **{str(i): v.numpy() for i, v in vectors.items()})
    torch.save({i: v[None] for i, v in vectors.items()}, tmp_path / "v.pt")
    control_vector(tmp_path / "v.gguf", {f"direction.{i}": v.numpy() for i, v in vectors.items()})
    sources: list[Any] = [tmp_path / f"v.{kind}" for kind in ("safetensors", "npz", "pt", "gguf")]
    sources += [SimpleNamespace(layer_activations=vectors, layer_type="decoder_block"), vectors]
    for source in sources:
        found = import_vectors(source)
        assert found.keys() == vectors.keys()
        assert all(torch.equal(found[i], vectors[i]) for i in vectors)
        assert all(v.dtype is torch.float32 for v in found.values())


def test_imported_vectors_score_a_model_and_say_what_is_still_to_be_collected(
    pico: Any, tokenizer: Any, traces: Any, tmp_path: Path, capsys: Any
) -> None:
    model = pico()
    probe = s2e.collect(model, tokenizer, *traces)
    save_file({"1": torch.randn(32), "2.mlp": torch.randn(32)}, tmp_path / "v.safetensors")
    scores = s2e.score(model, probe, vectors=import_vectors(tmp_path / "v.safetensors"))
    assert set(scores.sites) == {"1.attn", "1.mlp", "2.mlp"}
    assert "collect the means of the components' inputs" in capsys.readouterr().err


class Evil:
    def __reduce__(self) -> Any:
        return os.system, ("touch stolen",)


def test_a_pickle_with_code_is_refused_and_does_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "v.pt").write_bytes(pickle.dumps({0: Evil()}))
    torch.save({0: Evil()}, tmp_path / "w.pt")
    np.savez(tmp_path / "v.npz", **{"0": np.array([Evil()], dtype=object)})
    for name in ("v.pt", "w.pt", "v.npz"):
        with pytest.raises(FileError, match="cannot be read"):
            import_vectors(tmp_path / name)
    assert not (tmp_path / "stolen").exists()


BAD: dict[str, tuple[Any, str]] = {
    "no layer in its name": ({"refusal": torch.randn(4)}, r"'refusal' is not a vector of a layer"),
    "a matrix": ({0: torch.randn(4, 4)}, r"0 is not a vector .*shape \(4, 4\)"),
    "integers": ({0: torch.arange(4)}, "is not a vector"),
    "NaN": ({0: torch.tensor([1.0, float("nan")])}, "is not finite"),
    "nothing": ({}, "no vectors in it"),
    "no mapping": ([torch.randn(4)], "no vectors can be read from this"),
    "true": ({True: torch.randn(4)}, "is not a vector"),
}


@pytest.mark.parametrize("what", BAD)
def test_what_is_no_vector_is_refused(what: str) -> None:
    source, said = BAD[what]
    with pytest.raises(FileError, match=said):
        import_vectors(source)


def test_files_of_no_known_kind_or_cut_short_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FileError, match="no such file"):
        import_vectors(tmp_path / "v.pt")
    (tmp_path / "v.txt").write_text("1 2 3")
    with pytest.raises(FileError, match=r"of an unknown kind \(got: \.txt\)"):
        import_vectors(tmp_path / "v.txt")
    whole = control_vector(tmp_path / "v.gguf", {"direction.1": np.ones(32, dtype=np.float32)}).read_bytes()
    for size in (0, 3, 40, len(whole) - 60):
        (tmp_path / "v.gguf").write_bytes(whole[:size])
        with pytest.raises(FileError):
            import_vectors(tmp_path / "v.gguf")
    control_vector(tmp_path / "m.gguf", {"direction.1": np.ones(32, dtype=np.float32)}, "llama")
    with pytest.raises(FileError, match=r"is not a control vector .*'llama'"):
        import_vectors(tmp_path / "m.gguf")


def directions(probe: s2e.Probe) -> dict[str, Any]:
    """As the published code saves a probe."""

    def table(means: Any, label: Any) -> dict[str, torch.Tensor]:
        return {s.module.replace(f"layers.{s.layer}.", f"layers[{s.layer}]."): means[s.key][label] for s in probe.sites}

    sides = {"pre": probe.inputs, "post": probe.outputs}
    return {
        side: {"pos_mean": table(means, "positive"), "neg_mean": table(means, "negative")}
        for side, means in sides.items()
    }


def test_a_directions_file_of_the_published_code_is_a_whole_probe(
    pico: Any, tokenizer: Any, traces: Any, tmp_path: Path
) -> None:
    model = pico()
    probe = s2e.collect(model, tokenizer, *traces)
    torch.save(directions(probe), tmp_path / "d.pt")
    back = import_directions(tmp_path / "d.pt", model)
    rho = {"rho_attn": 0.3, "rho_mlp": 0.3, "alpha": 0.3}
    assert s2e.score(model, back).edit(**rho).id == s2e.score(model, probe).edit(**rho).id
    back.save(tmp_path / "probe.safetensors")
    assert s2e.Probe.load(tmp_path / "probe.safetensors").provenance["imported"] == "d.pt"


def test_a_directions_file_that_lacks_a_mean_or_is_another_models_is_refused(
    pico: Any, tokenizer: Any, traces: Any, tmp_path: Path
) -> None:
    model = pico()
    expected = directions(s2e.collect(model, tokenizer, *traces))
    del expected["pre"]["neg_mean"]["model.layers[1].mlp.down_proj"]
    torch.save(expected, tmp_path / "d.pt")
    with pytest.raises(ModelError, match=r"no mean of 48 finite numbers for model\.layers\[1\]\.mlp\.down_proj"):
        import_directions(tmp_path / "d.pt", model)
    torch.save({"pre": expected["pre"]}, tmp_path / "d.pt")
    with pytest.raises(FileError, match="no post/pos_mean in it"):
        import_directions(tmp_path / "d.pt", model)
    torch.save(directions(s2e.collect(pico(hidden_size=64), tokenizer, *traces)), tmp_path / "d.pt")
    with pytest.raises(ModelError, match="Give the model that it was made on"):
        import_directions(tmp_path / "d.pt", model)
