"""Loading a model and its tokenizer: from the Hub, a folder, a GGUF file, or the embedded one."""

from __future__ import annotations

import contextlib
import difflib
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import ModelError
from ..progress import say
from .architectures import Architecture, describe_as
from .embedded import EMBEDDED, _plain_weights, embedded_checkpoint
from .gguf_config import without_vocabulary
from .quiet import quiet_kernels, without_gguf_bar

if TYPE_CHECKING:
    import torch
    from torch import nn

# What transformers and its readers raise for a configuration, weights or a tokenizer that are not what they should be.
_OF_A_BAD_MODEL = (
    *(RuntimeError, OSError, ValueError, ImportError, KeyError),
    *(ArithmeticError, AssertionError, AttributeError, IndexError, TypeError, MemoryError),
)
# Far above every model that there is.
_MOST = {
    "num_hidden_layers": 10_000,
    "hidden_size": 2**20,
    "intermediate_size": 2**24,
    "num_attention_heads": 2**16,
    "num_key_value_heads": 2**16,
    "vocab_size": 2**26,
}


def load_model(
    name: str | Path,
    *,
    dtype: str = "auto",
    device: str = "auto",
    revision: str | None = None,
    trust_remote_code: bool = False,
    device_map: str | Mapping[str, Any] | None = None,
    max_memory: Mapping[str, str] | None = None,
    offload_folder: str | None = None,
    architecture: Architecture | None = None,
) -> tuple[nn.Module, Any]:
    """A causal language model in evaluation mode, and its tokenizer.

    Args:
        name: a Hub id, a folder that `save_pretrained` wrote, a `.gguf` file, or EMBEDDED.
        dtype: "float32", "bfloat16", "float16", or "auto": the checkpoint's own on an accelerator; on a CPU bf16 where
            the CPU computes in it, else fp32 (emulated bf16 is several times slower).
        device: "cpu", "cuda", "cuda:1", "mps", or "auto" for the best one. Not used with `device_map`.
        device_map: "auto", "balanced" or "sequential" spread the model over all devices; what does not fit goes to
            memory and to `offload_folder` (accelerate). A mapping names the device of each module.
        max_memory: how much of each device may be used, {"0": "20GiB", "cpu": "60GiB"}.
        architecture: where the model writes into the residual stream, if the table of families does not have it.

    Raises:
        ModelError: the model or the device does not exist, or the model cannot be loaded.

    >>> model, tokenizer = s2e.load_model(base, dtype="float32", device="cpu")
    >>> model.config.model_type, model.dtype
    ('llama', torch.float32)
    """
    from torch import nn
    from transformers import AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    name = str(name)
    place = _place(device)
    source, where = _source(name, revision, trust_remote_code)
    spread: dict[str, Any] = {}
    if device_map is not None:
        spread = {"device_map": device_map, "offload_folder": offload_folder}
        if max_memory is not None:  # accelerate names accelerators by number
            spread["max_memory"] = {int(k) if k.isdigit() else k: v for k, v in max_memory.items()}
    quiet_kernels()
    reading: contextlib.AbstractContextManager[None] = contextlib.nullcontext()
    if "gguf_file" in where:
        say(f"  reading {name}")
        reading = without_gguf_bar()
    with _loading(name), reading:
        loader = _auto_class(load_config(name, revision=revision, trust_remote_code=trust_remote_code))
        model = loader.from_pretrained(source, dtype=_dtype(dtype, place), **spread, **where)
        tokenizer = AutoTokenizer.from_pretrained(source, **where)
    model.config._name_or_path = name
    _plain_weights(model)
    if architecture is not None:
        describe_as(model, architecture)
    # A quantised or spread model stays where it was put.
    stays = device_map is not None or getattr(model, "is_quantized", False)
    with _loading(name):
        return (model if stays else nn.Module.to(model, place)).eval(), tokenizer


def resolved_revision(name: str, revision: str | None = None) -> str | None:
    """The commit that the local cache holds for a Hub model's revision (by default `main`); None for other models.

    A revision that is already a commit is returned unchanged.
    """
    from huggingface_hub.constants import HF_HUB_CACHE

    if name == EMBEDDED or name.endswith(".gguf") or Path(name).exists():
        return None
    if revision is not None and re.fullmatch(r"[0-9a-f]{40}", revision):
        return revision
    reference = Path(HF_HUB_CACHE) / f"models--{name.replace('/', '--')}" / "refs" / (revision or "main")
    return reference.read_text(encoding="utf-8").strip() if reference.is_file() else None


def load_config(name: str | Path, *, revision: str | None = None, trust_remote_code: bool = False) -> Any:
    """A model's configuration, without its weights. Raises ModelError if there is none."""
    from transformers import AutoConfig

    source, where = _source(str(name), revision, trust_remote_code)
    with _loading(str(name)), without_vocabulary():
        config = AutoConfig.from_pretrained(source, **where)
        _refuse_absurd(config)
    return config


def _refuse_absurd(config: Any) -> None:
    """Raises ValueError for a model that would fill any memory as soon as it is built: its file is damaged."""
    text = config.get_text_config()
    for key, most in _MOST.items():
        value = getattr(text, key, None)
        if isinstance(value, int) and not 0 <= value <= most:
            raise ValueError(f"its configuration says {key}: {value}")


def empty_model(config: Any, *, trust_remote_code: bool = False) -> nn.Module:
    """The model that a configuration describes, on the `meta` device: names and shapes, no weights."""
    import torch

    with torch.device("meta"), _loading(getattr(config, "_name_or_path", "") or config.model_type):
        return _auto_class(config).from_config(config, trust_remote_code=trust_remote_code).eval()


def _source(name: str, revision: str | None, trust_remote_code: bool) -> tuple[str, dict[str, Any]]:
    where: dict[str, Any] = {"trust_remote_code": trust_remote_code}
    if name == EMBEDDED:
        return str(embedded_checkpoint()), where
    if name.endswith(".gguf"):
        file = Path(name)
        if not file.is_file():
            raise ModelError("no such GGUF file", got=name, fix="Check the path.")
        return str(file.parent), where | {"gguf_file": file.name}
    _refuse_no_name(name)
    return name, where if revision is None else where | {"revision": revision}


def _refuse_no_name(name: str) -> None:
    """Raises ModelError for a folder that does not exist, and for a near miss of the embedded model's name."""
    if name.startswith("embedded:") or difflib.get_close_matches(name, [EMBEDDED], cutoff=0.85):
        raise ModelError("no embedded model has that name", got=name, fix=f"Did you mean {EMBEDDED}?")
    looks_like_a_path = name.startswith((".", "/", "~")) or name.count("/") > 1
    if looks_like_a_path and not Path(name).is_dir():
        raise ModelError("no such folder", got=name, fix="Check the path, or give the Hub's id as owner/name.")


def _auto_class(config: Any) -> Any:
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING,
        MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    )

    with_images = type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
    if with_images and type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        return AutoModelForImageTextToText
    return AutoModelForCausalLM


@contextlib.contextmanager
def _loading(name: str) -> Iterator[None]:
    import torch

    try:
        yield
    except torch.OutOfMemoryError as error:
        raise ModelError(
            f"the model {name} does not fit",
            got=str(error).splitlines()[0],
            fix="Set model.device_map: auto, or a smaller dtype.",
        ) from None
    except _OF_A_BAD_MODEL as error:
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        if "gated repo" in str(error):
            raise ModelError(
                f"the model {name} is gated",
                got="no access to it",
                fix="Ask for access on its page on the Hub and log in with `hf auth login`, or give a folder with it.",
            ) from None
        raise ModelError(
            f"the model {name} cannot be loaded",
            got=first,
            fix="Give a Hub id, a folder that save_pretrained wrote, a .gguf file, or " + EMBEDDED + ".",
        ) from None


def _place(device: str) -> torch.device:
    import torch

    try:
        place = torch.device(_best_device() if device == "auto" else device)
        torch.empty(0, device=place)
    except (RuntimeError, AssertionError) as error:  # a torch without CUDA raises an AssertionError
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ModelError(f"the device {device} cannot be used here", got=first, fix='"auto" takes the best.') from None
    return place


def _best_device() -> str:
    import torch

    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def _dtype(name: str, device: torch.device) -> torch.dtype | str:
    import torch

    dtypes = ("float32", "bfloat16", "float16")
    if name in dtypes:
        return getattr(torch, name)
    if name != "auto":
        raise ModelError("no such dtype", got=name, fix=f'Use one of {", ".join(dtypes)}, or "auto".')
    if device.type != "cpu":
        return "auto"
    return torch.bfloat16 if _cpu_has_bf16() else torch.float32


def _cpu_has_bf16() -> bool:
    import torch

    probes = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(getattr(torch.cpu, probe, lambda: False)() for probe in probes)


def local_folder(name: str, revision: str | None = None) -> Path:
    """The folder that holds a model's `safetensors` checkpoint: the embedded one's, a local one, or the Hub's snapshot.

    Raises:
        ModelError: a GGUF file, which holds no such checkpoint, or a Hub model that cannot be fetched.
    """
    if name == EMBEDDED:
        return embedded_checkpoint()
    if name.endswith(".gguf"):
        raise ModelError("a GGUF file is no safetensors checkpoint", got=name, fix="Export an adapter instead.")
    if Path(name).is_dir():
        return Path(name)
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, revision=revision, ignore_patterns=["*.bin", "*.pt", "*.pth", "*.gguf"]))
    except (OSError, ValueError) as error:
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ModelError(
            f"the checkpoint of {name} cannot be fetched", got=first, fix="Check the name, or give a folder."
        ) from None
