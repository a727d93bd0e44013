from .artefacts.adapter import save_adapter
from .artefacts.audit import diff, verify
from .artefacts.checkpoint import export_checkpoint
from .edits import Combination, Edit, Scores, combine, interference
from .errors import Steer2EditError
from .method.intervention import NOTHING, Intervention, steering
from .method.site import Site
from .models.architectures import Architecture, Experts, Heads, describe_as
from .models.hooks import Interventions, intervening
from .models.load import load_model
from .models.selfcheck import self_check
from .models.sites import find_sites
from .probing.chat import Chat
from .probing.collect import collect
from .probing.probe import Probe
from .probing.score import score
from .probing.traces import Trace, read_traces, write_traces
from .searching.calibrate import Scale, calibrate
from .searching.in_python import SearchResult, evaluate, search
from .searching.utility import kl

__version__: str
__all__ = [
    "NOTHING",
    "Architecture",
    "Chat",
    "Combination",
    "Edit",
    "Experts",
    "Heads",
    "Intervention",
    "Interventions",
    "Probe",
    "Scale",
    "Scores",
    "SearchResult",
    "Site",
    "Steer2EditError",
    "Trace",
    "calibrate",
    "collect",
    "combine",
    "describe_as",
    "diff",
    "evaluate",
    "export_checkpoint",
    "find_sites",
    "interference",
    "intervening",
    "kl",
    "load_model",
    "read_traces",
    "save_adapter",
    "score",
    "search",
    "self_check",
    "steering",
    "verify",
    "write_traces",
]
