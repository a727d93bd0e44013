"""The formats of few bits that are known, and how a checkpoint's tensors show which of them a weight has."""

from __future__ import annotations

from collections.abc import Iterable

from ...method.site import Site
from . import awq, bnb, fp8, gptq, mxfp4, nvfp4
from .base import Held, Packed, Settings, part_of

_FORMATS = (fp8, mxfp4, nvfp4, gptq, awq, bnb)


def find_packed(site: Site, held: Held, settings: Settings, names: Iterable[str]) -> Packed | None:
    """Where the site's weight of few bits lies; None if it is stored as plain numbers, or not at all.

    Args:
        settings: the checkpoint's `quantization_config`, or nothing. names: those that the weight may have.

    Raises:
        FileError: its tensors do not belong together, or are in a variant of the format that is not known.
    """
    for name in names:
        if name in held and held[name][1].dtype is not None:
            return None
        for module in _FORMATS:
            recognised = module.find(name, held, settings)
            if recognised is not None:
                stored_format, tensors = recognised
                parts = (part_of(role, tensor, held, site.expert, site.experts) for role, tensor in tensors.items())
                return Packed(stored_format, tuple(parts))
    return None
