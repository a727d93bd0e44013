"""A course of training, against slow plain loops: what its loss counts, what its steps do, and that a kill costs
nothing."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import steer2edit as s2e
from conftest import make_pico, make_tokenizer, make_traces
from steer2edit.errors import FileError, ModelError, TraceError
from steer2edit.files.reading import read_json
from steer2edit.files.tensors import read_tensors
from steer2edit.probing.chat import Chat, render
from steer2edit.probing.spans import Span
from steer2edit.training.course import LOSSES, checkpoint, is_whole, train
from steer2edit.training.examples import examples_of
from steer2edit.training.plan import Course, Full, Lora, Training, courses
from steer2edit.training.weights import KIND, are_finite


def load() -> tuple[Any, Any]:
    return make_pico(), make_tokenizer()


def examples() -> list[Span]:
    positive, negative = make_traces()
    return examples_of(make_tokenizer(), [*negative, *positive])


def course(kind: str = "lora", rate: float = 1e-2, steps: tuple[int, ...] = (2, 4), batch: int = 2) -> Course:
    return Course(kind, rate, steps, batch, seed=3)


def weights(folder: Path, steps: int) -> dict[str, torch.Tensor]:
    return read_tensors(checkpoint(folder, steps), KIND)[0]


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


# What is trained on -------------------------------------------------------------------------------------------------


def test_the_loss_counts_the_tokens_of_the_positive_responses_and_no_others() -> None:
    tokenizer, (positive, _) = make_tokenizer(), make_traces()
    for span, trace in zip(examples(), positive, strict=True):
        assert span.last == len(span.ids)  # without the end of the turn
        assert tokenizer.decode(list(span.ids[span.first :])) == trace.response
        assert tokenizer.decode(list(span.ids[: span.first])) == render(tokenizer, trace.messages())


def test_of_a_thinking_models_responses_the_part_that_the_probe_takes_is_trained_on() -> None:
    response = "<think>Hmm.</think> Paris."
    trace = s2e.Trace("What is the capital?", response, "positive", answer_start=response.index("Paris"))
    (span,) = examples_of(make_tokenizer(), [trace], part="answer")
    assert make_tokenizer().decode(list(span.ids[span.first : span.last])).strip() == "Paris."


@pytest.mark.parametrize("which", ["negative alone", "empty", "none"])
def test_traces_without_a_positive_response_are_refused_in_a_sentence(which: str) -> None:
    traces = {"negative alone": make_traces()[1], "empty": [s2e.Trace("Hm?", " ", "positive")], "none": []}[which]
    with pytest.raises(TraceError, match="no trace can be trained on"):
        examples_of(make_tokenizer(), traces)


def test_a_response_without_a_prompt_is_trained_on_from_its_second_token_on() -> None:
    trace = s2e.Trace("", "Paris is it.", "positive")
    (span,) = examples_of(make_tokenizer(), [trace], chat=Chat(plain=True))
    assert (span.first, span.last > 1) == (0, True)


# What a step does ---------------------------------------------------------------------------------------------------


def mean_loss(model: Any, spans: list[Span]) -> torch.Tensor:
    """The mean over all tokens of all responses of −log p, one response at a time, without padding."""
    total, count = torch.zeros(()), 0
    for span in spans:
        log = model(torch.tensor([span.ids])).logits[0].float().log_softmax(-1)
        for at in range(span.first, span.last):
            total = total - log[at - 1, span.ids[at]]
            count += 1
    return total / count


def test_the_first_loss_is_that_of_the_base_model_over_the_response_tokens(tmp_path: Path) -> None:
    for kind in ("lora", "fine_tuning"):
        train(load, course(kind, steps=(1,), batch=8), examples(), tmp_path / kind)
        with torch.no_grad():
            wanted = float(mean_loss(make_pico(), examples()))
        assert read_json(tmp_path / kind / LOSSES) == [pytest.approx(wanted, rel=1e-5)]


def test_full_fine_tuning_is_adamw_on_that_loss(tmp_path: Path) -> None:
    """Every batch holds all traces, so that their order does not matter."""
    train(load, course("fine_tuning", 1e-3, (1, 3), batch=8), examples(), tmp_path)
    model = make_pico()
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0)
    for _ in range(3):
        optimiser.zero_grad()
        mean_loss(model, examples()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
    made, base = weights(tmp_path, 3), make_pico().state_dict()
    for name, wanted in model.named_parameters():
        moved = (wanted - base[name]).abs().max()
        assert moved > 1e-3
        # A hundredth of what three steps moved: Adam's first step is a sign, which tiny gradients may flip.
        share = ((made[name] - wanted).abs() > 1e-5).float().mean()
        assert share < 0.01, name


def test_lora_lowers_the_loss_and_is_of_rank_one_on_the_seven_maps(tmp_path: Path) -> None:
    train(load, course(rate=3e-2, steps=(12,), batch=8), examples(), tmp_path)
    losses = read_json(tmp_path / LOSSES)
    assert len(losses) == 12
    assert losses[-1] < losses[0] - 0.1
    made = weights(tmp_path, 12)
    maps = ["self_attn.q", "self_attn.k", "self_attn.v", "self_attn.o", "mlp.gate", "mlp.up", "mlp.down"]
    names = {
        f"model.layers.{i}.{name}_proj.weight.{part}" for i in range(3) for name in maps for part in ("left", "right")
    }
    assert made.keys() == names
    base = make_pico()
    for name, weight in base.named_parameters():
        if f"{name}.left" in made:
            left, right = made[f"{name}.left"], made[f"{name}.right"]
            assert (left.shape, right.shape) == ((weight.shape[0], 1), (1, weight.shape[1]))
            assert (left @ right).abs().max() > 0


def test_training_leaves_the_global_random_state_alone(tmp_path: Path) -> None:
    torch.manual_seed(11)
    wanted = torch.rand(3)
    torch.manual_seed(11)
    train(load, course(steps=(1,)), examples(), tmp_path)
    assert torch.equal(torch.rand(3), wanted)


# Checkpoints --------------------------------------------------------------------------------------------------------


def test_zero_steps_are_the_base(tmp_path: Path) -> None:
    train(load, course("fine_tuning", steps=(0,)), examples(), tmp_path / "full")
    assert same(weights(tmp_path / "full", 0), dict(make_pico().named_parameters()))
    train(load, course("lora", steps=(0, 1)), examples(), tmp_path / "lora")
    zero = weights(tmp_path / "lora", 0)
    assert not any((zero[name] @ zero[name.replace("left", "right")]).any() for name in zero if name.endswith("left"))


@pytest.mark.parametrize("kind", ["lora", "fine_tuning"])
def test_the_same_seed_gives_the_same_numbers_and_another_seed_others(kind: str, tmp_path: Path) -> None:
    for name in ("one", "two"):
        train(load, course(kind), examples(), tmp_path / name)
    train(load, Course(kind, 1e-2, (2, 4), 2, seed=8), examples(), tmp_path / "other")
    assert read_json(tmp_path / "one" / LOSSES) == read_json(tmp_path / "two" / LOSSES)
    assert read_json(tmp_path / "one" / LOSSES) != read_json(tmp_path / "other" / LOSSES)
    for steps in (2, 4):
        assert same(weights(tmp_path / "one", steps), weights(tmp_path / "two", steps))
        assert not same(weights(tmp_path / "one", steps), weights(tmp_path / "other", steps))


def test_a_checkpoint_of_a_longer_course_is_what_a_shorter_one_ends_with(tmp_path: Path) -> None:
    train(load, course("fine_tuning", steps=(2, 4)), examples(), tmp_path / "long")
    train(load, course("fine_tuning", steps=(2,)), examples(), tmp_path / "short")
    assert same(weights(tmp_path / "long", 2), weights(tmp_path / "short", 2))
    assert not same(weights(tmp_path / "long", 2), weights(tmp_path / "long", 4))


class Killed(BaseException):
    pass


def _until(step: int, seen: list[int]) -> Callable[[int, int], None]:
    def progress(done: int, of: int) -> None:
        assert of == 6
        seen.append(done)
        if done == step:
            raise Killed

    return progress


@pytest.mark.parametrize("kind", ["lora", "fine_tuning"])
def test_a_course_that_was_killed_goes_on_and_ends_with_the_same_checkpoints(kind: str, tmp_path: Path) -> None:
    planned = course(kind, steps=(2, 4, 6))
    train(load, planned, examples(), tmp_path / "whole")
    broken, seen = tmp_path / "broken", []
    # In the middle of an epoch, after two checkpoints; then once more, before anything was saved.
    for step in (5, 5):
        with pytest.raises(Killed):
            train(load, planned, examples(), broken, _until(step, seen))
        assert not is_whole(planned, broken)
    assert seen == [1, 2, 3, 4, 5, 5]  # the second time from the fourth step on
    # Half a state of the trainer, as a kill leaves it, and half a file of ours.
    half = broken / "resume/checkpoint-6"
    half.mkdir()
    (half / "trainer_state.json").write_text('{"global_step": 6', encoding="utf-8")
    (broken / ".6.safetensors.abcd1234.tmp.safetensors").write_bytes(b"half")
    train(load, planned, examples(), broken, _until(7, seen))
    assert seen[6:] == [5, 6]
    assert is_whole(planned, broken)
    assert sorted(file.name for file in broken.iterdir()) == sorted(
        file.name for file in (tmp_path / "whole").iterdir()
    )
    assert read_json(broken / LOSSES) == read_json(tmp_path / "whole" / LOSSES)
    for steps in planned.steps:
        assert checkpoint(broken, steps).read_bytes() == checkpoint(tmp_path / "whole", steps).read_bytes()


def test_a_course_that_is_whole_is_not_run_again(tmp_path: Path) -> None:
    train(load, course(), examples(), tmp_path)
    train(pytest.fail, course(), examples(), tmp_path)


def test_a_learning_rate_that_breaks_the_model_leaves_checkpoints_that_say_so(tmp_path: Path) -> None:
    train(load, course("fine_tuning", 1e36, (1, 2)), examples(), tmp_path)
    assert not are_finite(checkpoint(tmp_path, 2))
    assert weights(tmp_path, 2) == {}


# What is refused ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("package", ["trl", "peft"])
def test_a_package_that_is_missing_is_named_with_its_cure(
    package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == package else find(name, *rest))
    with pytest.raises(FileError, match=rf"needs the package {package} .*pip install 'steer2edit\[train\]'"):
        train(pytest.fail, course(), examples(), tmp_path / "course")
    assert not (tmp_path / "course").exists()


def test_a_model_that_is_not_in_fp32_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="cannot be trained here"):
        train(lambda: (make_pico(dtype=torch.bfloat16), make_tokenizer()), course(), examples(), tmp_path)


# The plan -----------------------------------------------------------------------------------------------------------


def test_a_method_has_as_many_checkpoints_as_there_are_edits_spread_evenly() -> None:
    training = Training(
        lora=Lora(learning_rate=[1e-3, 1e-4], steps=[4, 1, 2]),
        full=Full(learning_rate=[1e-5], steps=[1, 2, 3]),
        batch=4,
    )
    every = courses(training, 100, seed=5)
    assert every == [
        Course("lora", 1e-4, (1, 2, 4), 4, 5),
        Course("lora", 1e-3, (1, 2, 4), 4, 5),
        Course("fine_tuning", 1e-5, (1, 2, 3), 4, 5),
    ]
    thin = courses(training, 2, seed=5)
    assert [c.id for one in thin for c in one.candidates()] == [
        *("lora-0.0001-1", "lora-0.001-4"),
        *("fine_tuning-1e-05-1", "fine_tuning-1e-05-3"),
    ]
    assert courses(Training(), 5, seed=0) == []
