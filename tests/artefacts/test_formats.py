"""Each format of few bits against a reader that is not this library's: numbers, bytes, and what rounding does."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from packings import SCHEMES, Scheme, gptq, quantised, tensors_of
from steer2edit.artefacts import few_bits
from steer2edit.artefacts.bases import Base, open_base
from steer2edit.artefacts.few_bits import Rounding, dequantised, edited, read_tensors, spread, steps, together
from steer2edit.artefacts.formats.base import Packed, Tensors, packed, unpacked
from steer2edit.artefacts.formats.bnb import Bnb8
from steer2edit.artefacts.formats.ggml import KINDS, Ggml
from steer2edit.artefacts.places import site_reader
from steer2edit.errors import FileError, ModelError
from steer2edit.method.change import Change
from steer2edit.method.site import Site

NAME = "model.layers.0.mlp.down_proj.weight"
D, INPUTS = 64, 128
SITE = Site(0, "mlp", NAME.removesuffix(".weight"), NAME, d=D, n=INPUTS, width=1)


# Schemes whose scales have a largest value, which an edit of several times the weight's size leaves.
BOUNDED = ("nvfp4", "nvfp4 of modelopt", "nf4 twice")


class Stored:
    """One weight in a checkpoint of a scheme."""

    def __init__(self, folder: Path, scheme: Scheme):
        self.folder, self.scheme = folder / "packed", scheme
        self.bounded = any(scheme is SCHEMES[name] for name in BOUNDED)
        (folder / "plain").mkdir()
        draw = torch.Generator().manual_seed(5)
        # Rows of unlike sizes, so that a scale of another row shows.
        self.plain = torch.randn(D, INPUTS, generator=draw) * torch.linspace(0.02, 0.2, D)[:, None]
        save_file({NAME: self.plain}, folder / "plain" / "model.safetensors")
        (folder / "plain" / "config.json").write_text("{}")
        self.expected = quantised(folder / "plain", self.folder, scheme, lambda name: True)[NAME]
        self.base: Base = open_base(self.folder)
        found = self.base.packed(SITE)
        assert found is not None
        self.packed: Packed = found

    def tensors(self) -> Tensors:
        return read_tensors(self.packed, self.folder, SITE, "the test")

    def read(self, tensors: Tensors) -> Tensor:
        """By the scheme's own reader."""
        names = {part.role: part.tensor for part in self.packed.parts}
        named = tensors_of(self.folder) | {names[role]: tensor for role, tensor in tensors.items()}
        return self.scheme.read(NAME, named)


@pytest.fixture(params=list(SCHEMES))
def stored(request: pytest.FixtureRequest, tmp_path: Path) -> Stored:
    return Stored(tmp_path, SCHEMES[request.param])


def a_change(size: float, columns: slice = slice(None), rows: slice = slice(None)) -> Change:
    draw = torch.Generator().manual_seed(6)
    u, a = torch.zeros(D), torch.zeros(INPUTS)
    u[rows] = torch.randn(D, generator=draw)[rows]
    a[columns] = torch.randn(INPUTS, generator=draw)[columns]
    return Change(SITE, u[:, None], size * a[None])


def the_same(a: Tensors, b: Tensors) -> bool:
    return all(
        torch.equal(a[role].contiguous().view(-1).view(torch.uint8), b[role].contiguous().view(-1).view(torch.uint8))
        for role in a
    )


def test_a_weights_numbers_are_those_of_the_formats_own_reader(stored: Stored) -> None:
    weight = dequantised(stored.packed, stored.folder, SITE, "the test")
    torch.testing.assert_close(weight, stored.expected, rtol=3e-7, atol=0)
    assert float((weight - stored.plain).norm() / stored.plain.norm()) < 0.7


@pytest.mark.parametrize(("name", "preset"), [("nvfp4", "NVFP4A16"), ("mxfp4", "MXFP4A16")])
def test_compressed_tensors_reads_the_same_numbers(name: str, preset: str, tmp_path: Path) -> None:
    from compressed_tensors.compressors import MXFP4PackedCompressor, NVFP4PackedCompressor
    from compressed_tensors.quantization import preset_name_to_scheme

    stored = Stored(tmp_path, SCHEMES[name])
    tensors = stored.tensors()
    edited(stored.packed, tensors, SITE, a_change(0.01))
    state = {"weight_packed": tensors["codes"], "weight_scale": tensors["scales"]}
    if name == "nvfp4":
        state["weight_global_scale"] = tensors["scale of all"]
    compressor = NVFP4PackedCompressor if name == "nvfp4" else MXFP4PackedCompressor
    weight = compressor.decompress(state, preset_name_to_scheme(preset, ["Linear"]))["weight"]
    # It computes in bf16.
    torch.testing.assert_close(stored.packed.format.dequantise(tensors), weight.float(), rtol=2**-6, atol=1e-6)


def test_an_edit_of_nothing_leaves_every_byte(stored: Stored) -> None:
    tensors, before = stored.tensors(), stored.tensors()
    rounding = edited(stored.packed, tensors, SITE, a_change(0.0))
    assert the_same(tensors, before)
    assert (rounding.wanted, rounding.got, rounding.groups, rounding.renewed) == (0, 0, 0, 0)


def test_a_target_that_is_the_weight_itself_gives_the_same_numbers(stored: Stored) -> None:
    tensors = stored.tensors()
    result = stored.packed.format.requantise(stored.expected.clone(), torch.ones(D, INPUTS, dtype=torch.bool), tensors)
    torch.testing.assert_close(stored.read(result.tensors), stored.expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("size", [0.003, 0.03, 0.5], ids=["small", "of its size", "large"])
def test_an_edited_weight_comes_near_its_target_and_the_measure_is_true(stored: Stored, size: float) -> None:
    change = a_change(size)
    tensors = stored.tensors()
    target = stored.expected + change.delta()
    nearest = stored.packed.format.requantise(target, torch.ones(D, INPUTS, dtype=torch.bool), tensors)
    # As near as packing the target anew is, or nearer; a kept zero point may cost a part of the range.
    anew = stored.scheme.read(NAME, stored.scheme.pack(NAME, target))
    if not (stored.bounded and size == 0.5):
        assert float((stored.read(nearest.tensors) - target).norm()) < 1.6 * float((anew - target).norm())
    rounding = edited(stored.packed, tensors, SITE, change)
    after = stored.read(tensors)
    moved, delta = (after - stored.expected).double(), change.delta().double()
    kept = float((moved * delta).sum() / delta.square().sum())
    noise = float((moved - kept * delta).norm() / delta.norm())
    assert rounding.kept == pytest.approx(kept, rel=1e-4, abs=1e-6)
    assert rounding.noise == pytest.approx(noise, rel=1e-3, abs=1e-5)
    assert rounding.title == stored.packed.format.title
    if size == 0.5:
        assert rounding.kept > (0.4 if stored.bounded else 0.9)
        assert rounding.renewed > 0


def test_numbers_that_fit_keep_the_scales_and_move_by_half_a_step_at_most(stored: Stored) -> None:
    tensors = stored.tensors()
    # Towards 0, which always fits.
    change_of = torch.where(torch.rand(D, INPUTS, generator=torch.Generator().manual_seed(8)) < 0.5, 0.4, 0.0)
    target = stored.expected * (1 - change_of)
    scales = tensors["scales"].clone()
    result = stored.packed.format.requantise(target, change_of != 0, tensors)
    assert result.renewed == 0
    assert the_same({"scales": result.tensors["scales"]}, {"scales": scales})
    after = stored.read(result.tensors)
    distance = steps(stored.packed, stored.tensors(), SITE)
    assert bool(((after - target).abs() <= 0.51 * distance + 1e-7).all())
    assert torch.equal(after[change_of == 0], stored.expected[change_of == 0])


def test_a_group_without_a_changed_number_keeps_its_bytes(stored: Stored) -> None:
    change = a_change(0.5, columns=slice(96, 112), rows=slice(0, 48))
    tensors = stored.tensors()
    rounding = edited(stored.packed, tensors, SITE, change)
    after = stored.read(tensors)
    assert rounding.kept > (0.5 if stored.bounded else 0.85)
    moved = (after != stored.expected).nonzero()
    format_ = stored.packed.format
    if "tensor" in format_.title or "row" in format_.title or "int8" in format_.title:
        return  # there a whole row shares a scale
    assert int(moved[:, 0].max()) < (64 if "block" in format_.title else 48)
    if "g_idx" not in str(stored.packed.parts) or "shuffled" not in str(stored.scheme.settings):
        groups = after[:48, :64] == stored.expected[:48, :64]
        assert bool(groups.all()) or "GPTQ" in format_.title


@pytest.mark.parametrize("at_once", [1, 5000], ids=["rows", "some rows"])
def test_a_weight_taken_by_rows_is_the_weight_taken_whole(
    stored: Stored, at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, by_rows = stored.tensors(), stored.tensors()
    change = a_change(0.1)
    one = edited(stored.packed, whole, SITE, change)
    monkeypatch.setattr(few_bits, "_AT_ONCE", at_once)
    torch.testing.assert_close(
        dequantised(stored.packed, stored.folder, SITE, "the test"), stored.expected, rtol=3e-7, atol=0
    )
    seen: list[tuple[int, int]] = []
    two = edited(stored.packed, by_rows, SITE, change, lambda start, weight: seen.append((start, len(weight))))
    assert the_same(whole, by_rows)
    assert (one.groups, one.renewed) == (two.groups, two.renewed)
    assert one.kept == pytest.approx(two.kept, rel=1e-6)
    assert [start for start, _ in seen] == [sum(n for _, n in seen[:i]) for i in range(len(seen))]
    assert sum(n for _, n in seen) == D


# The measure --------------------------------------------------------------------------------------------------------


def test_the_kept_share_and_the_noise_of_a_hand_computed_case() -> None:
    """int8 with a step of 1: of changes of 0.6 and 0.4 the one becomes 1, and the other nothing."""
    site = Site(0, "mlp", "m", "m.weight", d=1, n=2, width=1)
    tensors = {"codes": torch.tensor([[10, 20]], dtype=torch.int8), "scales": torch.tensor([127.0])}
    change = Change(site, torch.ones(1, 1), torch.tensor([[0.6, 0.4]]))
    rounding = edited(Packed(Bnb8(), ()), tensors, site, change)
    assert tensors["codes"].tolist() == [[11, 20]]
    assert rounding.kept == pytest.approx(0.6 / 0.52, rel=1e-6)
    # ΔW' = (1, 0), less 1.1538 · (0.6, 0.4): (0.3077, −0.4615), of length 0.5547, over √0.52
    assert rounding.noise == pytest.approx(0.5547 / 0.52**0.5, rel=1e-3)
    assert (rounding.groups, rounding.renewed) == (1, 0)


def test_a_row_that_leaves_its_range_gets_a_new_scale() -> None:
    site = Site(0, "mlp", "m", "m.weight", d=2, n=2, width=1)
    tensors = {
        "codes": torch.tensor([[127, 20], [127, 20]], dtype=torch.int8),
        "scales": torch.tensor([127.0, 127.0]),
    }
    change = Change(site, torch.tensor([[1.0], [0.0]]), torch.tensor([[127.0, 0.0]]))
    rounding = edited(Packed(Bnb8(), ()), tensors, site, change)
    assert tensors["scales"].tolist() == [254.0, 127.0]
    assert tensors["codes"].tolist() == [[127, 10], [127, 20]]
    assert (rounding.kept, rounding.noise, rounding.groups, rounding.renewed) == (1.0, 0.0, 1, 1)


@pytest.mark.parametrize("size", [0.02, -0.1, 0.7])
def test_of_changes_below_a_step_as_many_numbers_move_as_the_changes_are_large(size: float) -> None:
    weight, one = torch.zeros(256, 320), torch.ones(256, 320)
    target = spread(weight, size * one, (one, 2 * one), 0)
    step = 2.0 if size > 0 else 1.0
    assert set(target.unique().tolist()) == {0.0, step if size > 0 else -step}
    moved = (target != 0).float()
    share = abs(size) / step
    assert float(moved.mean()) == pytest.approx(share, abs=0.002)
    for dim in (0, 1):
        assert float((moved.mean(dim=dim) - share).abs().max()) < 0.03
    assert torch.equal(spread(weight[100:], size * one[100:], (one[100:], 2 * one[100:]), 100), target[100:])


def test_a_change_of_a_step_or_more_and_one_at_the_end_of_the_range_are_left_to_the_rounding() -> None:
    weight, delta = torch.zeros(1, 4), torch.tensor([[1.0, -1.3, 0.2, -0.2]])
    around = (torch.tensor([[1.0, 1.0, 1.0, 0.0]]), torch.tensor([[1.0, 1.0, 0.0, 1.0]]))
    assert spread(weight, delta, around, 5).tolist() == delta.tolist()


def test_several_weights_shares_are_weighed_by_their_edits() -> None:
    rows = [Rounding("a", 1.0, 1.0, 1.0, 3, 1), Rounding("b", 0.0, 3.0, 0.0, 4, 0)]
    whole = together(rows)
    assert (whole.kept, whole.title, whole.groups, whole.renewed) == (0.25, "a, b", 7, 1)
    assert Rounding.from_json(rows[0].to_json()) == rows[0]


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32])
def test_packing_is_the_reverse_of_unpacking(bits: int, dtype: torch.dtype) -> None:
    codes = torch.randint(0, 2**bits, (3, 64), dtype=torch.uint8)
    assert torch.equal(unpacked(packed(codes, bits, dtype), bits), codes)
    assert int(unpacked(packed(torch.full((1, 64), 2**bits - 1), bits, dtype), bits).min()) == 2**bits - 1


# Blocks of llama.cpp ------------------------------------------------------------------------------------------------


def random_blocks(kind: str, rows: int = 16, blocks: int = 8) -> Tensor:
    """Random codes and scales; the fp16 numbers in the blocks are finite and small."""
    shape = KINDS[kind]
    raw = torch.randint(0, 256, (rows * blocks, shape.size), dtype=torch.uint8)
    halves = {"Q6_K": [208], "Q8_0": [0], "Q4_0": [0], "Q5_0": [0]}.get(kind, [0, 2])
    for at in halves:
        raw[:, at : at + 2] = (torch.rand(len(raw), 1) * 0.1 + 0.001).half().view(torch.uint8)
    return raw.view(rows, -1)


def by_gguf(kind: str, rows: Tensor) -> Tensor:
    numbers = gguf.quants.dequantize(rows.numpy(), gguf.GGMLQuantizationType[kind])
    return torch.from_numpy(np.ascontiguousarray(numbers))


@pytest.mark.parametrize("kind", KINDS)
def test_a_blocks_numbers_are_those_of_the_gguf_package(kind: str) -> None:
    rows = random_blocks(kind)
    assert torch.equal(Ggml(kind).dequantise({"codes": rows}), by_gguf(kind, rows))
    assert gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]] == (KINDS[kind].numbers, KINDS[kind].size)


@pytest.mark.parametrize("kind", KINDS)
def test_blocks_that_are_packed_again_have_the_same_bytes(kind: str) -> None:
    raw = random_blocks(kind).view(-1, KINDS[kind].size)
    assert torch.equal(KINDS[kind].pack(raw, KINDS[kind].unpack(raw).codes), raw)
    codes = KINDS[kind].unpack(raw).codes
    assert (int(codes.min()), int(codes.max())) == (KINDS[kind].low, KINDS[kind].high)


@pytest.mark.parametrize("kind", KINDS)
def test_an_edited_block_comes_as_near_as_its_codes_allow(kind: str) -> None:
    rows = random_blocks(kind)
    format_ = Ggml(kind)
    weight, distance = by_gguf(kind, rows), torch.maximum(*format_.around({"codes": rows}))
    unpacked_rows = KINDS[kind].unpack(rows.view(-1, KINDS[kind].size))
    inside = (unpacked_rows.codes > KINDS[kind].low) & (unpacked_rows.codes < KINDS[kind].high)
    changed = inside.view(weight.shape) & (torch.rand(weight.shape) < 0.5)
    target = torch.where(changed, weight + (torch.rand(weight.shape) - 0.5) * 1.9 * distance, weight)
    result = format_.requantise(target, changed, {"codes": rows})
    after = by_gguf(kind, result.tensors["codes"])
    assert result.renewed == 0
    assert bool(((after - target).abs() <= 0.501 * distance + 1e-6).all())
    assert torch.equal(after[~changed], weight[~changed])
    assert not torch.equal(after, weight)


@pytest.mark.parametrize("kind", KINDS)
def test_a_block_that_leaves_its_range_is_renewed_or_cut(kind: str) -> None:
    rows = random_blocks(kind)
    weight = by_gguf(kind, rows)
    target, changed = weight.clone(), torch.zeros_like(weight, dtype=torch.bool)
    largest = float(weight.abs().max())
    target[0, 3], changed[0, 3] = 5 * largest, True
    result = Ggml(kind).requantise(target, changed, {"codes": rows})
    after = by_gguf(kind, result.tensors["codes"])
    assert (result.groups, result.renewed) == (1, int(KINDS[kind].renews))
    assert torch.equal(after[1:], weight[1:])
    if KINDS[kind].renews:
        assert float(after[0, 3]) == pytest.approx(5 * largest, rel=0.05)
        by_package = gguf.quants.quantize(
            target[0, : KINDS[kind].numbers][None].numpy(), gguf.GGMLQuantizationType[kind]
        )
        assert torch.equal(result.tensors["codes"][0, : KINDS[kind].size], torch.from_numpy(by_package)[0])
    else:
        assert float(weight[0, 3]) <= float(after[0, 3]) < 5 * largest


# What is refused ----------------------------------------------------------------------------------------------------


def broken(
    tmp_path: Path, scheme: Scheme, change: Callable[[dict[str, Tensor]], dict[str, Tensor]], **settings: Any
) -> Any:
    """The error of a checkpoint whose tensors or settings were changed."""
    stored = Stored(tmp_path, scheme)
    config = {"quantization_config": scheme.settings | settings}
    (stored.folder / "config.json").write_text(json.dumps(config))
    save_file(change(tensors_of(stored.folder)), stored.folder / "model.safetensors")
    read = site_reader(stored.folder)
    with pytest.raises((FileError, ModelError)) as caught:
        read(SITE)
    return caught.value


def test_scales_that_do_not_belong_to_the_weight_are_refused(tmp_path: Path) -> None:
    name = f"{NAME}_scale_inv"
    error = broken(tmp_path, SCHEMES["fp8 block"], lambda tensors: tensors | {name: torch.ones(3, 7)})
    assert error.what == f"the scales of {NAME} do not belong to its shape"
    assert error.got == "scales (3, 7), weight (64, 128)"


@pytest.mark.parametrize("shape", [(4,), (4, 16)])
def test_scales_of_experts_that_are_no_grid_each_are_refused(shape: tuple[int, ...], tmp_path: Path) -> None:
    codes = torch.ones(4, 16, 32).to(torch.float8_e4m3fn)
    save_file({"e.down_proj": codes, "e.down_proj_scale": torch.ones(shape)}, tmp_path / "model.safetensors")
    expert = Site(0, "mlp", "e", "e.down_proj", d=16, n=32, width=1, parameter="down_proj", expert=2, experts=4)
    with pytest.raises(FileError, match=r"the scales of e.down_proj are in a layout that is not known"):
        open_base(tmp_path).packed(expert)


def test_variants_that_are_not_known_are_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    error = broken(tmp_path / "a", gptq(), lambda tensors: tensors, bits=3)
    assert "bits 3" in error.got
    assert "adapter" in error.fix
    error = broken(tmp_path / "b", SCHEMES["awq"], lambda tensors: tensors, version="gemv")
    assert "version gemv" in error.got


def test_groups_of_unequal_sizes_are_refused(tmp_path: Path) -> None:
    stem = NAME.removesuffix(".weight")
    uneven = torch.zeros(INPUTS, dtype=torch.int32)
    error = broken(tmp_path, gptq(), lambda tensors: tensors | {f"{stem}.g_idx": uneven})
    assert "unequal sizes" in error.what


def test_a_state_that_is_no_json_or_says_another_size_is_refused(tmp_path: Path) -> None:
    key = f"{NAME}.quant_state.bitsandbytes__nf4"
    for number, text in enumerate((b"{", b'{"shape": [64, 128]}', b'{"shape": [64, 64], "blocksize": 64}', b"[1]")):
        (tmp_path / str(number)).mkdir()
        state = torch.tensor(list(text), dtype=torch.uint8)
        error = broken(tmp_path / str(number), SCHEMES["nf4"], lambda tensors, state=state: tensors | {key: state})
        assert "bitsandbytes weight" in error.what


def test_a_weight_of_another_shape_is_another_models(stored: Stored) -> None:
    other = Site(0, "mlp", "m", NAME, d=D, n=64, width=1)
    with pytest.raises(ModelError, match="was made for another model"):
        dequantised(stored.packed, stored.folder, other, "the probe")
