"""One course of training, by TRL's SFTTrainer: from the base model to a checkpoint after each of some numbers of steps.

A course that was killed goes on from its last checkpoint, and ends with the same checkpoints.
"""

from __future__ import annotations

import importlib.util
import json
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate.utils.memory import clear_device_cache

from ..engines.base import Progress
from ..errors import FileError, ModelError
from ..files.writing import clear_temporaries, remove, write_json
from ..models.weights import device_of
from ..probing.spans import Span
from ..searching.statistics import finite
from .plan import Course
from .weights import write_weights

LOSSES = "losses.json"
# Where the trainer keeps what a killed course goes on from.
_RESUME = "resume"
_PACKAGES = ("trl", "peft", "datasets")
# The label of a token that the loss leaves out.
_NOT_COUNTED = -100

Load = Callable[[], tuple[Any, Any]]


def check_packages() -> None:
    """Raises FileError if a package that training needs is not installed."""
    for package in _PACKAGES:
        if importlib.util.find_spec(package) is None:
            raise FileError(
                f"training needs the package {package}",
                got="it is not installed",
                fix="pip install 'steer2edit[train]'",
            )


def checkpoint(folder: Path, steps: int) -> Path:
    """Where a course keeps the weights after a number of steps."""
    return folder / f"{steps}.safetensors"


def is_whole(course: Course, folder: Path) -> bool:
    """Whether a course has been trained to its end."""
    return (folder / LOSSES).is_file() and all(checkpoint(folder, steps).is_file() for steps in course.steps)


def train(load: Load, course: Course, examples: Sequence[Span], folder: Path, progress: Progress | None = None) -> None:
    """Trains a model and writes its checkpoints, and the loss of every step, into a folder.

    Args:
        load: gives the base model in fp32 and its tokenizer; the model is trained where it is, and is not the base any
            more.
        examples: what is trained on.
        folder: made if missing; of this course and these examples alone.
        progress: called with the steps done and in all.

    Raises:
        FileError: a package is missing. ModelError: the model is quantised or not in memory.
    """
    if is_whole(course, folder):
        return
    check_packages()
    folder.mkdir(parents=True, exist_ok=True)
    clear_temporaries(folder)
    with torch.random.fork_rng(), warnings.catch_warnings():
        # The libraries warn about each other's names.
        warnings.simplefilter("ignore", FutureWarning)
        model, tokenizer = load()
        _check(model)
        losses = _trained(model, tokenizer, course, examples, folder, progress)
    write_json(folder / LOSSES, losses)
    remove(folder / _RESUME)
    del model
    clear_device_cache(garbage_collection=True)


def _check(model: Any) -> None:
    bad = next((name for name, p in model.named_parameters() if p.is_meta or p.dtype != torch.float32), None)
    if bad is not None or getattr(model, "is_quantized", False):
        raise ModelError(
            "this model cannot be trained here",
            got=f"{bad} is not in memory in fp32" if bad else "quantised weights",
            fix="Give a model whose weights fit unquantised, without model.device_map.",
        )


def _trained(
    model: Any, tokenizer: Any, course: Course, examples: Sequence[Span], folder: Path, progress: Progress | None
) -> list[float | None]:
    """Runs the course, from where it was stopped, and gives the loss of every step; None where it is not finite."""
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import PrinterCallback, set_seed
    from trl import SFTTrainer

    if tokenizer.pad_token is None:  # padding is masked, so that any token does
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.convert_ids_to_tokens(0)
    set_seed(course.seed)  # before LoRA's first weights are drawn
    rows = [{"input_ids": list(span.ids[: span.last]), "labels": _labels(span)} for span in examples]
    trainer = SFTTrainer(
        model=model,
        args=_settings(model, course, folder),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        # Every linear map but the output embedding; with Llama's names q, k, v, o, gate, up and down.
        peft_config=LoraConfig(r=1, lora_alpha=1, target_modules="all-linear") if course.kind == "lora" else None,
        callbacks=[_checkpointing(course, folder, progress)],
    )
    trainer.remove_callback(PrinterCallback)
    if 0 in course.steps:
        write_weights(checkpoint(folder, 0), trainer.model, _about(course, 0))
    if course.steps[-1]:
        trainer.train(resume_from_checkpoint=_last_whole(folder / _RESUME))
    return finite([row["loss"] for row in trainer.state.log_history if "loss" in row])


def _labels(span: Span) -> list[int]:
    """The tokens of the response, which alone count in the loss."""
    return [_NOT_COUNTED] * span.first + list(span.ids[span.first : span.last])


def _settings(model: Any, course: Course, folder: Path) -> Any:
    """Plain AdamW at a constant learning rate, in fp32; nothing is reported anywhere."""
    from trl import SFTConfig

    device = device_of(model)
    settings = SFTConfig(
        output_dir=str(folder / _RESUME),
        per_device_train_batch_size=course.batch,
        max_steps=max(1, course.steps[-1]),
        learning_rate=course.learning_rate,
        lr_scheduler_type="constant",
        warmup_steps=0,
        weight_decay=0.0,
        optim="adamw_torch",
        seed=course.seed,
        data_seed=course.seed,
        bf16=False,
        fp16=False,
        gradient_checkpointing=False,
        loss_type="nll",
        max_length=None,
        packing=False,
        save_strategy="no",  # the callback asks for each
        save_total_limit=1,
        logging_steps=1,
        logging_nan_inf_filter=False,
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=False,
        use_cpu=device.type == "cpu",
    )
    if settings.n_gpu > 1:
        settings._n_gpu = 1  # one copy of the model, whatever else the machine has
    return settings


def _about(course: Course, steps: int) -> dict[str, Any]:
    return {"method": course.kind, "learning_rate": course.learning_rate, "steps": steps, "seed": course.seed}


def _checkpointing(course: Course, folder: Path, progress: Progress | None) -> Any:
    """A callback that writes the weights after the steps that are asked for, and has the trainer keep its state."""
    from transformers import TrainerCallback

    class Checkpointing(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **others: Any) -> Any:
            done = state.global_step
            if done in course.steps:
                # The weights first: what the trainer's state says is done has its checkpoint.
                write_weights(checkpoint(folder, done), others["model"], _about(course, done))
                control.should_save = True
            if progress:
                progress(done, course.steps[-1])
            return control

    return Checkpointing()


def _last_whole(folder: Path) -> str | None:
    """The trainer's last state that was written to its end; what a kill left half written is removed."""
    whole: dict[int, Path] = {}
    for state in folder.glob("checkpoint-*"):
        try:
            # The trainer writes this file last.
            whole[json.loads((state / "trainer_state.json").read_text(encoding="utf-8"))["global_step"]] = state
        except (OSError, ValueError, KeyError, TypeError):
            remove(state)
    return str(whole[max(whole)]) if whole else None
