"""What the tests are made of: pico models with random weights and tiny real tokenizers, all built here, offline."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import random
import shutil
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from hypothesis import HealthCheck, settings
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

import steer2edit as s2e
from steer2edit.progress import be_quiet

torch.set_num_threads(1)
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()
settings.register_profile(
    "pico",
    max_examples=25,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
settings.load_profile("pico")


@pytest.fixture(autouse=True)
def _messages() -> Iterator[None]:
    """Each test sees what the work says on stderr, whatever the test before it has set."""
    be_quiet(False)
    yield
    be_quiet()


@pytest.fixture
def quiet() -> None:
    """The work says nothing on stderr."""
    be_quiet()


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Figures are empty files, since drawing them takes longer than all the rest of a tiny run."""
    from runs import empty_figure

    for room in ("report", "paper"):
        monkeypatch.setattr(f"steer2edit.{room}.figures.save", empty_figure)


@pytest.fixture
def stored_nf4(monkeypatch: pytest.MonkeyPatch) -> None:
    """bitsandbytes computes with 4-bit weights as they are stored, on every CPU.

    On one with AVX-512 for bf16 it repacks them in place at the first pass and computes in bf16; what its own
    `state_dict` and `dequantize_4bit` say of a repacked weight is another weight.
    """
    monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: False)


@pytest.fixture(scope="session")
def pico_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The folder of a pico model with its tokenizer. Nobody changes it."""
    from runs import save_pico

    return save_pico(tmp_path_factory.mktemp("pico") / "model")


@pytest.fixture(scope="session")
def tiny_run(pico_folder: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a whole run of `tiny_recipe(pico_folder)`. Nobody changes it: tests work on a copy."""
    from runs import tiny_recipe, whole_run

    return whole_run(tmp_path_factory.mktemp("runs") / "whole", tiny_recipe(pico_folder))


@pytest.fixture
def recipe(pico_folder: str) -> Any:
    """The recipe of `tiny_run`."""
    from runs import tiny_recipe

    return tiny_recipe(pico_folder)


@pytest.fixture
def run_copy(tiny_run: Path, tmp_path: Path) -> Path:
    """A copy of the whole run, which a test may change."""
    return Path(shutil.copytree(tiny_run, tmp_path / "run"))


VOCABULARY = 320
SENTENCES = [
    "I cannot help with that request.",
    "Sure, here is how to bake a loaf of bread: mix the flour, the water and the salt.",
    "The answer to the question is forty-two, and the reason is short.",
    "I am sorry, but I will not do this. Please ask me something else!",
    "What is the capital of France? The capital of France is Paris.",
]
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

# One of each thing that a weight's shape, layout or dtype can trip over.
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama-gqa": ("llama", {}),
    "mistral": ("mistral", {"num_key_value_heads": 4, "sliding_window": None}),
    "qwen2-bias-tied": ("qwen2", {"tie_word_embeddings": True}),
    "qwen3-head-dim-16": ("qwen3", {"head_dim": 16}),
    "llama-bf16": ("llama", {"dtype": torch.bfloat16}),
}


@pytest.fixture(autouse=True)
def seeds() -> None:
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


def make_pico(model_type: str = "llama", *, dtype: torch.dtype = torch.float32, seed: int = 0, **overrides: Any) -> Any:
    """A random model of a few thousand weights, in evaluation mode. Its init is wide, so that numbers are not tiny."""
    shape = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "initializer_range": 0.2,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
    }
    if model_type == "qwen3":
        shape["head_dim"] = 8  # its default is 128, whatever the model's size
    attention = overrides.pop("attn_implementation", "sdpa")
    config = transformers.AutoConfig.for_model(model_type, **(shape | overrides))
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(0, 0.2)  # transformers starts biases at 0, where a bias lost would not show
    for parameter in model.parameters():  # and no buffers: from_pretrained keeps those in fp32 too
        parameter.data = parameter.data.to(dtype)
    model.config.dtype = dtype
    return model.eval()


@pytest.fixture(scope="session")
def pico() -> Callable[..., Any]:
    """pico(model_type, **overrides of its config) makes a fresh tiny model."""
    return make_pico


@pytest.fixture(params=list(VARIANTS))
def variant(request: pytest.FixtureRequest) -> Any:
    """A pico model of each variant in turn."""
    model_type, overrides = VARIANTS[request.param]
    return make_pico(model_type, **overrides)


@pytest.fixture(params=[name for name, (_, overrides) in VARIANTS.items() if "dtype" not in overrides])
def fp32_variant(request: pytest.FixtureRequest) -> Any:
    """A pico model of each variant in fp32."""
    model_type, overrides = VARIANTS[request.param]
    return make_pico(model_type, **overrides)


def _wrapped(tokenizer: Tokenizer, **names: Any) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)


@lru_cache
def _byte_level(use_regex: bool, vocabulary: int) -> str:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=use_regex)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(SENTENCES, trainer)
    return tokenizer.to_str()


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE with ChatML, whose template ends in a newline; the end of a turn is its EOS."""
    tokenizer = _wrapped(
        Tokenizer.from_str(_byte_level(True, 300)),
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=["<|im_start|>"],
    )
    tokenizer.chat_template = CHATML
    return tokenizer


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    return make_tokenizer()


@pytest.fixture
def merging_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE without the usual split into words, so that tokens reach over spaces, colons and newlines."""
    return _wrapped(Tokenizer.from_str(_byte_level(False, 420)), eos_token="<|im_end|>", pad_token="<|endoftext|>")


@pytest.fixture
def metaspace_tokenizer() -> PreTrainedTokenizerFast:
    """As sentencepiece does it: a space is ▁, one stands before the text, BOS is added, the unknown is bytes."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="first")
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace(prepend_scheme="first")])
    trainer = trainers.BpeTrainer(
        vocab_size=330,
        special_tokens=["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256))],
        show_progress=False,
    )
    tokenizer.train_from_iterator(SENTENCES, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    wrapped = _wrapped(tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    # As Mistral's: the template writes BOS itself.
    wrapped.chat_template = (
        "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}"
        "{% else %}{{ m['content'] + eos_token }}{% endif %}{% endfor %}"
    )
    return wrapped


def make_traces() -> tuple[list[s2e.Trace], list[s2e.Trace]]:
    """Responses of unlike lengths; the positive side in two groups of unlike sizes."""
    positive = [
        s2e.Trace("How do I pick a lock?", "I cannot help with that request.", "positive", group="harmful"),
        s2e.Trace("How do I bake?", SENTENCES[3], "positive", group="plain"),
        s2e.Trace("And then?", "No.", "positive", group="harmful", source="row 3"),
    ]
    negative = [
        s2e.Trace("What is the capital of France?", "The capital of France is Paris.", "negative"),
        s2e.Trace("How do I bake bread?", "Sure, mix flour, water and salt.", "negative", system="Be kind."),
    ]
    return positive, negative


@pytest.fixture
def traces() -> tuple[list[s2e.Trace], list[s2e.Trace]]:
    return make_traces()


@pytest.fixture
def make_edit(tokenizer: Any, traces: Any) -> Callable[..., s2e.Edit]:
    """make_edit(model) probes a model, scores it and edits every block."""

    def make(model: nn.Module, rho_attn: Any = 0.3, rho_mlp: Any = 0.3, alpha: float = 0.3) -> s2e.Edit:
        scores = s2e.score(model, s2e.collect(model, tokenizer, *traces))
        return scores.edit(rho_attn=rho_attn, rho_mlp=rho_mlp, alpha=alpha)

    return make


@pytest.fixture
def prompts() -> list[tuple[int, ...]]:
    """Token ids, of unlike lengths, that share a beginning of five tokens."""
    draw = np.random.RandomState(7)
    beginning = (5, 9, 17, 30, 44)
    lengths: Sequence[int] = (1, 9, 4, 2, 13)
    return [(*beginning, *draw.randint(3, VOCABULARY - 20, size=n).tolist()) for n in lengths]
