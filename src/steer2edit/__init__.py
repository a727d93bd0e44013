"""Steer2Edit: change how a language model behaves by editing its weights, without training."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .architectures import Architecture, Experts, Heads, describe_as
    from .audit import diff, verify
    from .composition import Combination, combine, interference
    from .doctor import self_check
    from .edit import Edit, Scores
    from .errors import Steer2EditError
    from .export.adapter import save_adapter
    from .export.checkpoint import export_checkpoint
    from .intervention import NOTHING, Intervention, Interventions, intervening, steering
    from .models import load_model
    from .probe import Probe, collect
    from .scoring import score
    from .sites import Site, find_sites
    from .traces import Chat, Trace, read_traces, write_traces

_WHERE = {
    "diff": "audit", "verify": "audit",
    "Combination": "composition", "combine": "composition", "interference": "composition",
    "self_check": "doctor",
    "Edit": "edit", "Scores": "edit",
    "Steer2EditError": "errors",
    "save_adapter": "export.adapter", "export_checkpoint": "export.checkpoint",
    "NOTHING": "intervention", "Intervention": "intervention", "Interventions": "intervention",
    "intervening": "intervention", "steering": "intervention",
    "load_model": "models",
    "Probe": "probe", "collect": "probe",
    "score": "scoring",
    "Architecture": "architectures", "Experts": "architectures", "Heads": "architectures",
    "describe_as": "architectures",
    "Site": "sites", "find_sites": "sites",
    "Chat": "traces", "Trace": "traces", "read_traces": "traces", "write_traces": "traces",
}  # fmt: skip

__all__ = [
    "NOTHING", "Architecture", "Chat", "Combination", "Edit", "Experts", "Heads", "Intervention", "Interventions",
    "Probe", "Scores", "Site", "Steer2EditError", "Trace", "collect", "combine", "describe_as", "diff",
    "export_checkpoint", "find_sites", "interference", "intervening", "load_model", "read_traces", "save_adapter",
    "score", "self_check", "steering", "verify", "write_traces",
]  # fmt: skip
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    # Names are imported when first used, so that the command line answers --help without loading torch.
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_WHERE[name]}"), name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]
