"""Weights in formats of few bits, packed by slow plain code, and read again by code that is not the library's.

Each scheme makes a weight's tensors under their names in a checkpoint. Its reader is the format's own library where
that is installed, and loops from the format's description where it is not.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import bitsandbytes
import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers.integrations.finegrained_fp8 import Fp8Dequantize
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

Packer = Callable[[str, Tensor], dict[str, Tensor]]
Reader = Callable[[str, Mapping[str, Tensor]], Tensor]

E2M1 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
GROUP = 16


@dataclass(frozen=True)
class Scheme:
    """How a weight is packed under its name, how it is read again, and what the config says of it."""

    pack: Packer
    read: Reader
    settings: dict[str, Any] = field(default_factory=dict)


# fp8 ----------------------------------------------------------------------------------------------------------------


def fp8(rows: int, columns: int, suffix: str, kind: torch.dtype = torch.float8_e4m3fn) -> Scheme:
    """Blocks of rows × columns with a scale each; 0 is all of them."""

    def pack(name: str, weight: Tensor) -> dict[str, Tensor]:
        high, wide = rows or weight.shape[0], columns or weight.shape[1]
        grid = torch.empty(-(-weight.shape[0] // high), -(-weight.shape[1] // wide))
        codes = torch.empty(weight.shape, dtype=kind)
        for i in range(grid.shape[0]):
            for j in range(grid.shape[1]):
                where = slice(i * high, (i + 1) * high), slice(j * wide, (j + 1) * wide)
                grid[i, j] = weight[where].abs().max() / torch.finfo(kind).max
                codes[where] = (weight[where] / grid[i, j]).to(kind)
        return {name: codes, name + suffix: grid[0, 0][None] if grid.numel() == 1 else grid}

    def read(name: str, tensors: Mapping[str, Tensor]) -> Tensor:
        codes, grid = tensors[name], tensors[name + suffix]
        whole = not codes.shape[0] % (rows or 1) and not codes.shape[1] % (columns or 1)
        if grid.numel() > 1 and whole:  # transformers knows no block that is cut
            return Fp8Dequantize(None)._dequantize_one(codes, grid, torch.float32)
        out = codes.float()
        grid = grid.view(1, 1) if grid.numel() == 1 else grid
        high, wide = rows or out.shape[0], columns or out.shape[1]
        for i in range(grid.shape[0]):
            for j in range(grid.shape[1]):
                out[i * high : (i + 1) * high, j * wide : (j + 1) * wide] *= grid[i, j]
        return out

    return Scheme(pack, read, {"quant_method": "fp8", "weight_block_size": [rows, columns]})


# fp4 ----------------------------------------------------------------------------------------------------------------


def e2m1_codes(numbers: Tensor) -> Tensor:
    """The nearest codes, by trying all of them."""
    table = torch.tensor([*E2M1, *(-x for x in E2M1)])
    return (numbers[..., None] - table).abs().argmin(dim=-1).to(torch.uint8)


def e2m1_bytes(codes: Tensor) -> Tensor:
    return codes[..., ::2] | (codes[..., 1::2] << 4)


def pack_mxfp4(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Bytes [d, n / 32, 16] and exponents [d, n / 32]."""
    groups = weight.unflatten(1, (-1, 32))
    exponent = torch.ceil(torch.log2(groups.abs().amax(dim=-1) / 6))
    codes = e2m1_codes(groups / torch.exp2(exponent)[..., None])
    return e2m1_bytes(codes), (exponent + 127).to(torch.uint8)


def mxfp4() -> Scheme:
    def pack(name: str, weight: Tensor) -> dict[str, Tensor]:
        codes, scales = pack_mxfp4(weight)
        return {f"{name}_packed": codes.flatten(1), f"{name}_scale": scales}

    def read(name: str, tensors: Mapping[str, Tensor]) -> Tensor:
        codes, scales = tensors[f"{name}_packed"], tensors[f"{name}_scale"]
        blocks = codes.unflatten(1, (-1, 16))
        return convert_moe_packed_tensors(blocks[None], scales[None], dtype=torch.float32)[0].T.contiguous()

    return Scheme(pack, read, {"quant_method": "compressed-tensors", "format": "mxfp4-pack-quantized"})


def nvfp4(of_modelopt: bool) -> Scheme:
    codes_name, whole_name = ("", "_scale_2") if of_modelopt else ("_packed", "_global_scale")

    def pack(name: str, weight: Tensor) -> dict[str, Tensor]:
        groups = weight.unflatten(1, (-1, 16))
        largest = groups.abs().amax(dim=-1)
        whole = largest.max() / (6 * 448)
        scales = (largest / 6 / whole).to(torch.float8_e4m3fn)
        codes = e2m1_codes(groups / (scales.float() * whole)[..., None])
        return {
            name + codes_name: e2m1_bytes(codes).flatten(1),
            f"{name}_scale": scales,
            name + whole_name: whole.reshape(()) if of_modelopt else (1 / whole).reshape(1),
        }

    def read(name: str, tensors: Mapping[str, Tensor]) -> Tensor:
        raw, scales = tensors[name + codes_name], tensors[f"{name}_scale"].float()
        whole = tensors[name + whole_name]
        scales = scales * whole if of_modelopt else scales / whole
        numbers = []
        for row in raw.tolist():
            codes = [(byte >> shift) & 15 for byte in row for shift in (0, 4)]
            numbers.append([-E2M1[code - 8] if code >= 8 else E2M1[code] for code in codes])
        return torch.tensor(numbers) * scales.repeat_interleave(16, dim=1)

    return Scheme(pack, read, {"quant_method": "modelopt" if of_modelopt else "compressed-tensors"})


# Integers -----------------------------------------------------------------------------------------------------------


def integers(weight: Tensor, bits: int, group_of: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Codes [inputs, d], scales [groups, d] fp16 and zero points [groups, d], an asymmetric range for each group."""
    top = 2**bits - 1
    count = int(group_of.max()) + 1
    scales, zeros = torch.empty(count, weight.shape[0], dtype=torch.float16), torch.empty(count, weight.shape[0])
    codes = torch.empty(weight.T.shape)
    for g in range(count):
        some = weight[:, group_of == g]
        low, high = some.amin(dim=1).clamp_max(0), some.amax(dim=1).clamp_min(0)
        scales[g] = ((high - low) / top).half()
        zeros[g] = torch.round(-low / scales[g].float()).clamp(1, top)
        codes[group_of == g] = torch.round(some.T / scales[g].float() + zeros[g]).clamp(0, top)
    return codes.to(torch.int64), scales, zeros.to(torch.int64)


def words(columns: np.ndarray, bits: int, order: list[int]) -> Tensor:
    """[k, m] → [k, m / per] int32: of each `per` numbers the i-th stands at place order[i]."""
    per = 32 // bits
    out = np.zeros((columns.shape[0], columns.shape[1] // per), dtype=np.uint32)
    for i in range(columns.shape[1]):
        out[:, i // per] |= columns[:, i].astype(np.uint32) << np.uint32(bits * order[i % per])
    return torch.from_numpy(out.view(np.int32).copy())


def number_in(word: int, bits: int, place: int) -> int:
    return ((word & 0xFFFFFFFF) >> (bits * place)) & (2**bits - 1)


def gptq(bits: int = 4, second: bool = False, shuffled: bool = False) -> Scheme:
    per = 32 // bits
    straight = list(range(per))
    missing = 0 if second else 1

    def pack(name: str, weight: Tensor) -> dict[str, Tensor]:
        stem = name.removesuffix(".weight")
        group_of = torch.arange(weight.shape[1]) // GROUP
        if shuffled:
            group_of = group_of[torch.randperm(len(group_of), generator=torch.Generator().manual_seed(3))]
        codes, scales, zeros = integers(weight, bits, group_of)
        return {
            f"{stem}.qweight": words(codes.T.numpy(), bits, straight).T.contiguous(),
            f"{stem}.scales": scales,
            f"{stem}.qzeros": words((zeros - missing).numpy(), bits, straight),
            f"{stem}.g_idx": group_of.to(torch.int32),
        }

    def read(name: str, tensors: Mapping[str, Tensor]) -> Tensor:
        stem = name.removesuffix(".weight")
        qweight, qzeros, scales, group_of = (
            tensors[f"{stem}.{part}"] for part in ("qweight", "qzeros", "scales", "g_idx")
        )
        codes, zeros, sizes, groups = (t.tolist() for t in (qweight, qzeros, scales.float(), group_of))
        columns = []
        for j, g in enumerate(groups):
            column = []
            for i, size in enumerate(sizes[g]):
                code = number_in(codes[j // per][i], bits, j % per)
                zero = number_in(zeros[g][i // per], bits, i % per) + missing
                column.append((code - zero) * size)
            columns.append(column)
        return torch.tensor(columns).T.contiguous()

    settings = {"quant_method": "gptq", "bits": bits, "group_size": GROUP, "desc_act": shuffled}
    return Scheme(pack, read, settings | ({"checkpoint_format": "gptq_v2"} if second else {}))


# AWQ packs the outputs 0, 2, 4, 6, 1, 3, 5, 7 into a word, from the lowest bits on.
AWQ_ORDER = [0, 2, 4, 6, 1, 3, 5, 7]


def awq() -> Scheme:
    place_of = [AWQ_ORDER.index(i) for i in range(8)]

    def pack(name: str, weight: Tensor) -> dict[str, Tensor]:
        stem = name.removesuffix(".weight")
        codes, scales, zeros = integers(weight, 4, torch.arange(weight.shape[1]) // GROUP)
        return {
            f"{stem}.qweight": words(codes.numpy(), 4, place_of),
            f"{stem}.scales": scales,
            f"{stem}.qzeros": words(zeros.numpy(), 4, place_of),
        }

    def read(name: str, tensors: Mapping[str, Tensor]) -> Tensor:
        stem = name.removesuffix(".weight")
        qweight, qzeros, scales = (tensors[f"{stem}.{part}"] for part in ("qweight", "qzeros", "scales"))
        codes, zeros, sizes = (t.tolist() for t in (qweight, qzeros, scales.float()))
        columns = []
        for j, row in enumerate(codes):
            column = [0.0] * scales.shape[1]
            for number, word in enumerate(row):
                for place, output in enumerate(AWQ_ORDER):
                    code, zero = (number_in(w, 4, place) for w in (word, zeros[j // GROUP][number]))
                    i = 8 * number + output
                    column[i] = (code - zero) * sizes[j // GROUP][i]
            columns.append(column)
        return torch.tensor(columns).T.contiguous()

    return Scheme(pack, read, {"quant_method": "awq", "bits": 4, "group_size": GROUP, "version": "gemm"})


# bitsandbytes -------------------------------------------------------------------------------------------------------


def bnb4(kind: str, twice: bool) -> Scheme:
    def pack(name: str, weight: Tensor) -> dict[str, Tensor]:
        codes, state = bitsandbytes.functional.quantize_4bit(weight, quant_type=kind, compress_statistics=twice)
        return {name: codes} | {f"{name}.{key}": value for key, value in state.as_dict(packed=True).items()}

    def read(name: str, tensors: Mapping[str, Tensor]) -> Tensor:
        stored = {key.removeprefix(f"{name}."): value for key, value in tensors.items() if key.startswith(f"{name}.")}
        state = bitsandbytes.functional.QuantState.from_dict(dict(stored), torch.device("cpu"))
        return bitsandbytes.functional.dequantize_4bit(tensors[name], state).float()

    settings = {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "load_in_8bit": False,
        "bnb_4bit_quant_type": kind,
        "bnb_4bit_use_double_quant": twice,
        "bnb_4bit_compute_dtype": "float32",
    }
    return Scheme(pack, read, settings)


def bnb8() -> Scheme:
    def pack(name: str, weight: Tensor) -> dict[str, Tensor]:
        codes, scales, _ = bitsandbytes.functional.int8_vectorwise_quant(weight.half())
        stem = name.removesuffix(".weight")
        return {name: codes, f"{stem}.SCB": scales.float(), f"{stem}.weight_format": torch.tensor(0, dtype=torch.uint8)}

    def read(name: str, tensors: Mapping[str, Tensor]) -> Tensor:
        scales = tensors[f"{name.removesuffix('.weight')}.SCB"]
        return bitsandbytes.functional.int8_vectorwise_dequant(tensors[name], scales).float()

    # Without the outliers' own path, whose activations are not rounded.
    settings = {
        "quant_method": "bitsandbytes",
        "load_in_8bit": True,
        "load_in_4bit": False,
        "llm_int8_threshold": 0.0,
    }
    return Scheme(pack, read, settings)


SCHEMES: dict[str, Scheme] = {
    "fp8 tensor": fp8(0, 0, "_scale"),
    "fp8 row": fp8(1, 0, "_scale"),
    "fp8 block": fp8(32, 32, "_scale_inv"),
    "fp8 block, cut": fp8(48, 48, "_scale_inv"),
    "fp8 E5M2": fp8(1, 0, "_scale", torch.float8_e5m2),
    "mxfp4": mxfp4(),
    "nvfp4": nvfp4(False),
    "nvfp4 of modelopt": nvfp4(True),
    "gptq": gptq(),
    "gptq v2, shuffled": gptq(second=True, shuffled=True),
    "gptq 8 bits": gptq(8),
    "gptq 2 bits": gptq(2),
    "awq": awq(),
    "nf4": bnb4("nf4", False),
    "nf4 twice": bnb4("nf4", True),
    "fp4 of bitsandbytes": bnb4("fp4", False),
    "int8": bnb8(),
}


def quantised(
    base: Path, out: Path, scheme: Scheme, chosen: Callable[[str], bool], shards: int = 1
) -> dict[str, Tensor]:
    """Writes a checkpoint whose chosen weights are packed, and gives these weights as the scheme's reader reads them.

    Args:
        shards: over how many files the tensors are dealt out, so that a weight's scales may lie elsewhere.
    """
    out.mkdir()
    tensors = {name: tensor for file in sorted(base.glob("*.safetensors")) for name, tensor in load_file(file).items()}
    weights = {}
    for name in [name for name in tensors if chosen(name)]:
        made = scheme.pack(name, tensors.pop(name).float())
        weights[name] = scheme.read(name, made)
        tensors |= {key: value.contiguous() for key, value in made.items()}
    for file in base.iterdir():
        if file.suffix != ".safetensors" and "index" not in file.name:
            (out / file.name).write_bytes(file.read_bytes())
    config = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps(config | {"quantization_config": scheme.settings}))
    names = sorted(tensors)
    if shards == 1:
        save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
        return weights
    where = {}
    for number in range(shards):
        file = f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
        some = names[number::shards]
        save_file({name: tensors[name] for name in some}, out / file, metadata={"format": "pt"})
        where |= dict.fromkeys(some, file)
    index = {"metadata": {}, "weight_map": where}
    (out / "model.safetensors.index.json").write_text(json.dumps(index))
    return weights


def tensors_of(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}
