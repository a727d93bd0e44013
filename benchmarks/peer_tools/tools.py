"""The tools: what each is measured at, where it runs, and what it does that we don't."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

SCRIPTS = Path(__file__).resolve().parent
OURS = "steer2edit"


@dataclass(frozen=True)
class Tool:
    """A tool, what it is measured at, and where it runs.

    Attributes:
        script: it does the tasks with the tool.
        tasks: task → where the tool and we differ in what they do; empty if they do the same.
        requirement: what pip installs into its environment; empty if it runs in ours.
        pins: packages of constraints.txt whose versions it takes; the others would not fit.
        once: tasks that are measured in the first round alone, since they take longest.
        beyond: what it does that we don't.
    """

    name: str
    script: Path
    tasks: Mapping[str, str] = field(default_factory=dict)
    requirement: str = ""
    pins: tuple[str, ...] = ("torch",)
    once: tuple[str, ...] = ()
    beyond: str = ""


STEER2EDIT = Tool(OURS, SCRIPTS / "with_steer2edit.py")
TOOLS = (
    Tool(
        "one at a time",
        SCRIPTS / "one_at_a_time.py",
        {
            "vectors-span": "with the process and the load",
            "sweep-steer": "with a process and a load a strength",
            "edit": "with the process",
        },
        once=("sweep-steer",),
        beyond="nothing to install: it is a page of code over transformers.",
    ),
    Tool(
        "steering-vectors",
        SCRIPTS / "with_steering_vectors.py",
        {"vectors-last": "", "sweep-steer": ""},
        "steering-vectors==0.12.2",
        beyond="aggregators of your own, such as PCA or logistic regression; steering of chosen token positions.",
    ),
    Tool(
        "nnsight",
        SCRIPTS / "with_nnsight.py",
        {"vectors-span": "", "sweep-steer": ""},
        "nnsight==0.8.1",
        pins=("torch", "transformers"),
        beyond="reads and writes any value inside a forward pass, gradients included, of any PyTorch model, also on"
        " remote machines.",
    ),
    Tool(
        "heretic",
        SCRIPTS / "with_heretic.py",
        {"vectors-prompt": "", "sweep-ablate": "", "edit": ""},
        "heretic-llm==1.4.0",
        beyond="one command that removes refusals: ablation weights of each layer and component, found by 200 trials,"
        " and ablation that keeps the norms of rows.",
    ),
    Tool(
        "repeng",
        SCRIPTS / "with_repeng.py",
        {"vectors-last": "repeng: PCA of paired differences, steer2edit: difference of means", "sweep-steer": ""},
        "repeng==0.4.0",
        beyond="vectors by PCA or UMAP, and in the features of a sparse autoencoder; control vectors as GGUF files.",
    ),
    Tool(
        "TransformerLens",
        SCRIPTS / "with_transformer_lens.py",
        {"vectors-span": "", "sweep-steer": ""},
        "transformer-lens==4.3.0",
        pins=("torch", "transformers"),
        beyond="the same names of hooks and weights in all families, and a kit for finding circuits: patching, logit"
        " lens, SVD of weights.",
    ),
)
