"""AWQ (its `gemm` layout): integers of 4 bits, packed along the outputs in an order of their own.

`qweight` [n·c, d / 8] int32, `qzeros` [groups, d / 8] int32, `scales` [groups, d]. Zero points are stored as they are.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ...errors import FileError
from .base import Found, Held, Requantised, Settings, Tensors, dtype_name, packed, unpacked
from .grid import in_steps
from .integers import Affine, requantised

# Where the 1st to the 8th of eight outputs stands in a word.
_PLACES = torch.tensor([0, 4, 1, 5, 2, 6, 3, 7])


@dataclass(frozen=True)
class Awq:
    """Codes of 4 bits with a scale and a zero point per group of inputs and output."""

    @property
    def title(self) -> str:
        return "AWQ, 4 bits"

    def shape(self, tensors: Tensors) -> tuple[int, int]:
        inputs, words = tensors["codes"].shape
        return 8 * words, inputs

    def unit(self, tensors: Tensors) -> int:
        return 8

    def take(self, tensors: Tensors, start: int, end: int) -> Tensors:
        words = slice(start // 8, -(-end // 8))
        return {
            "codes": tensors["codes"][:, words],
            "scales": tensors["scales"][:, start:end],
            "zeros": tensors["zeros"][:, words],
        }

    def dequantise(self, tensors: Tensors) -> Tensor:
        return _affine(tensors).values().flatten(1)

    def around(self, tensors: Tensors) -> tuple[Tensor, Tensor]:
        weight = _affine(tensors)
        down, up = in_steps(weight.codes, weight.scales.float()[..., None], 0, 15)
        return down.flatten(1), up.flatten(1)

    def requantise(self, target: Tensor, changed: Tensor, tensors: Tensors) -> Requantised:
        old = _affine(tensors)
        grouped = old.codes.shape[1:]
        now, settled = requantised(target.unflatten(1, grouped), changed.unflatten(1, grouped), old, 15)
        outputs = now.codes.flatten(1).T.contiguous()  # [n·c, d]
        words = torch.empty_like(outputs.unflatten(1, (-1, 8)))
        words[..., _PLACES] = outputs.unflatten(1, (-1, 8))
        new = {"codes": packed(words.flatten(1), 4, torch.int32), "scales": now.scales.T.contiguous()}
        return Requantised(tensors | new, settled.groups, int(settled.renewed.sum()))


def _outputs(words: Tensor) -> Tensor:
    """[.., d / 8] int32 → [.., d], in the order of the outputs."""
    return unpacked(words, 4).unflatten(-1, (-1, 8))[..., _PLACES].flatten(-2)


def _affine(tensors: Tensors) -> Affine:
    codes, zeros = _outputs(tensors["codes"]), _outputs(tensors["zeros"]).float()  # [n·c, d], [groups, d]
    return Affine(
        codes.T.contiguous().unflatten(1, (len(zeros), -1)), tensors["scales"].T.contiguous(), zeros.T.contiguous()
    )


def find(name: str, held: Held, settings: Settings) -> Found | None:
    """The tensors of an AWQ weight, if there are any under that name."""
    stem = name.removesuffix(".weight")
    names = {"codes": f"{stem}.qweight", "scales": f"{stem}.scales", "zeros": f"{stem}.qzeros"}
    if settings.get("quant_method") != "awq" or any(name not in held for name in names.values()):
        return None
    bits, version = settings.get("bits"), str(settings.get("version", settings.get("format", "gemm"))).lower()
    if bits != 4 or version != "gemm" or dtype_name(held, names["codes"]) != "I32":
        raise FileError(
            f"{names['codes']} is stored in a way that is not known",
            got=f"bits {bits}, version {version}, {dtype_name(held, names['codes'])}",
            fix="AWQ with 4 bits in the gemm layout is known. Serve the edit as an adapter.",
        )
    return Awq(), names
