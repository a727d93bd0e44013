"""A search in Python, from lists, files and instructions, against numbers by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import steer2edit as s2e
from conftest import make_pico, make_tokenizer
from python_search import COUNTS, LESS, LOUD, MORE, OPTIONS, PROMPTS, SOFT, Counting, _greedy, _preferred, _search
from runs import FakeEngine
from sides import chatml, three_parts, write_rows
from steer2edit.behaviours.prompts import load_neutral
from steer2edit.errors import EditError, FileError, RecipeError, Steer2EditError, TraceError
from steer2edit.searching.front import pareto
from steer2edit.searching.in_python import SearchResult, evaluate, search


@pytest.fixture(scope="module")
def model() -> Any:
    return make_pico(max_position_embeddings=512)


@pytest.fixture
def engine(model: Any) -> Counting:
    return Counting(model, make_tokenizer())


def _files(folder: Path) -> tuple[str, str]:
    more, less = (
        write_rows(folder / f"the-{name}.jsonl", [{"prompt": prompt, "response": said} for prompt, said in pairs])
        for name, pairs in (("more", MORE), ("less", LESS))
    )
    return more, less


def _values(result: SearchResult) -> dict[str, Any]:
    return {trial.candidate.id: trial.values for trial in result.trials}


# What a search finds --------------------------------------------------------------------------------------------------


def test_the_names_of_the_package_are_these_functions_whatever_is_imported_first() -> None:
    assert s2e.search is search
    assert s2e.evaluate is evaluate
    assert s2e.SearchResult is SearchResult
    assert callable(s2e.kl)
    assert s2e.search is search


@pytest.fixture(scope="module")
def found(model: Any) -> SearchResult:
    return _search(model)


def test_pairs_are_searched_on_validation_alone(engine: Counting) -> None:
    result = _search(engine)
    assert [trial.candidate.id for trial in result.trials] == [
        "base",
        "steering-0.1",
        "steering-0.4",
        "edit-0.02-off-0.2",
        "edit-0.1-off-0.2",
    ]
    texts = {chatml(prompt): prompt for prompt in PROMPTS}
    answered = {texts[text] for text in engine.answered if text in texts}
    compared = {texts[text] for text, _ in engine.scored if text in texts}
    assert len(answered) == len(compared) == 5
    assert answered == compared
    # Neither the probe's prompts nor the test's are asked of the engine.
    neutral = {chatml(item.text) for item in load_neutral("builtin:neutral_prompts", "validation", 0, 2)}
    assert {text for text in engine.answered if text not in texts} == neutral
    assert set(engine.scored) >= {
        (chatml(prompt), said) for side in (MORE, LESS) for prompt, said in side if prompt in compared
    }


def test_preference_and_margin_are_those_of_losses_by_hand(engine: Counting, model: Any) -> None:
    result = _search(engine)
    more, less = dict(MORE), dict(LESS)
    asked = list(dict.fromkeys(text for text, said in engine.scored if said in {*more.values(), *less.values()}))
    prompts = [text.split("\n")[1].removesuffix("<|im_end|>") for text in asked]
    triples = [(prompt, more[prompt], less[prompt]) for prompt in prompts]
    tokenizer = make_tokenizer()
    by_id = _values(result)
    preference, margin = _preferred(model, tokenizer, triples)
    assert by_id["base"]["margin"] == pytest.approx(margin, abs=2e-5)
    assert by_id["base"]["preference"] == tuple(preference)
    edit = result.scores.edit(rho_attn=0.02, rho_mlp=None, alpha=0.2)
    with edit.applied(model):
        preference, edited = _preferred(model, tokenizer, triples)
    assert by_id["edit-0.02-off-0.2"]["margin"] == pytest.approx(edited, abs=2e-5)
    assert by_id["edit-0.02-off-0.2"]["preference"] == tuple(preference)
    assert max(abs(a - b) for a, b in zip(edited, margin, strict=True)) > 0.01


def test_probe_and_scores_are_those_of_the_probes_traces(found: SearchResult, model: Any) -> None:
    from steer2edit.behaviours.base import SPLITS
    from steer2edit.behaviours.contrast import Pair, divided

    more, less = dict(MORE), dict(LESS)
    pairs = [Pair(prompt, more[prompt], less[prompt]) for prompt in PROMPTS]
    probe = divided(pairs, {split: COUNTS[split] for split in SPLITS}, 0, "")["probe"]
    traces = [
        s2e.Trace(p.prompt, str(text), label)
        for p in probe
        for label, text in (("positive", p.more), ("negative", p.less))
    ]
    scores = s2e.score(model, s2e.collect(model, make_tokenizer(), traces))
    for key, site in scores.sites.items():
        torch.testing.assert_close(found.scores.sites[key].g, site.g)
    assert [found.probe.counts[label]["responses"] for label in ("positive", "negative")] == [6, 6]


def test_answers_that_are_weighed_count_as_those_that_are_given(found: SearchResult) -> None:
    base, edits = found.trials[0], [trial for trial in found.trials if trial.candidate.kind == "edit"]
    each = len(base.values["degenerate"]) + 2 * len(base.values["preference"])
    assert found.study.evaluations["edit"] == len(edits) * each > 0


def test_the_front_is_what_no_other_edit_beats(found: SearchResult) -> None:
    edits = [trial for trial in found.trials if trial.candidate.kind == "edit"]
    points = {t.candidate.id: (t.mean("utility_loss"), t.mean("preference")) for t in edits}
    unbeaten = [
        id
        for id, (cost, gain) in points.items()
        if not any((c <= cost and g >= gain and (c, g) != (cost, gain)) for c, g in points.values())
    ]
    assert {trial.candidate.id for trial in found.front} <= set(unbeaten)
    assert [trial.candidate.id for trial in found.front] == [trial.candidate.id for trial in pareto(edits, found.aim)]
    costs = [trial.mean("utility_loss") for trial in found.front]
    assert costs == sorted(costs)


def _moving(model: Any, **options: Any) -> SearchResult:
    """A search whose score an edit can raise: how many letters of an answer are not those of the original model's."""
    tokenizer = make_tokenizer()
    own = {prompt: _greedy(model, tokenizer, chatml(prompt), 4) for prompt in PROMPTS}

    def changed(prompt: str, response: str) -> float:
        return float(response != own[prompt])

    return _search(model, score=changed, title="changed", **options)


def test_the_best_edit_is_the_one_that_the_rule_takes(model: Any) -> None:
    result = _moving(model, options=OPTIONS | {"rho_attn": [0.002, 0.02, 0.1]})
    assert result.chosen is not None
    assert result.best is not None
    means = {t.candidate.id: t.mean("shown") for t in result.trials}
    assert means["base"] == 0.0
    best = max(value for id, value in means.items() if id.startswith("edit") and value is not None)
    assert means[result.chosen.candidate.id] == best > 0
    config = result.chosen.candidate.config
    assert result.best.id == result.scores.edit(**config).id
    assert result.best.edited()
    lines = [line.split() for line in result.table.splitlines()]
    assert lines[0][:1] == ["changed"]
    rows = {line[0]: line[1:] for line in lines[1:]}
    assert rows["base"][0] == "0.00"
    assert rows[result.chosen.candidate.id][:2] == ["*", f"{best:.2f}"]
    assert sum("*" in line for line in lines) == 1
    assert [line[0] for line in lines[1:] if line[0].startswith("edit")] == [t.candidate.id for t in result.front]
    assert "steering-0.1" in rows or "steering-0.4" in rows
    assert repr(result).startswith("SearchResult({'base': 1, 'steering': 2, 'edit': 3}, best=")


def test_a_table_shows_the_columns_that_were_measured(found: SearchResult) -> None:
    header, base, *_ = found.table.splitlines()
    for title in ("prefers behaviour shown", "margin (nats)", "degenerate", "KL per token", "NLL rise per token"):
        assert title in header
    assert "accuracy" not in header
    by_title = {m.title: m.name for m in found.measures}
    of_base = found.trials[0]
    cells = [cell.strip() for cell in base.split("  ") if cell.strip()]
    titles = [title.strip() for title in header.split("  ") if title.strip()]
    assert cells == ["base", *(f"{of_base.mean(by_title[title]):.2f}" for title in titles)]
    assert len({len(line) for line in found.table.splitlines()}) == 1


def test_where_nothing_moves_there_is_no_best_edit(model: Any) -> None:
    result = _moving(model, options=OPTIONS | {"rho_attn": [1e6]})
    assert (result.best, result.chosen) == (None, None)
    assert "*" not in result.table
    assert repr(result).endswith("best=None)")


def test_an_edit_outside_the_limits_is_not_taken(model: Any) -> None:
    tight = OPTIONS | {"limits": {"utility_loss": 0.0, "degenerate": None}, "rho_attn": [0.002]}
    assert _moving(model, options=tight).best is None
    assert _moving(model, options=OPTIONS | {"rho_attn": [0.002]}).best is not None


def test_the_model_is_as_it_was_and_can_be_searched_again(model: Any) -> None:
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    first = _search(model)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert _values(_search(model)) == _values(first)


def test_a_seed_divides_the_prompts(model: Any) -> None:
    first, again, other = (_search(model, seed=seed) for seed in (0, 0, 1))
    assert _values(first) == _values(again)
    assert _values(first)["base"]["margin"] != _values(other)["base"]["margin"]


def test_progress_ends_at_its_total(model: Any) -> None:
    seen: list[tuple[int, int]] = []
    _search(model, progress=lambda done, total: seen.append((done, total)))
    assert seen[-1][0] == seen[-1][1]
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)


def test_strengths_are_found_where_none_are_given(model: Any) -> None:
    """The options' defaults, as a recipe has them: all baselines, and edits by their KL."""
    result = _search(model, options={"points": 2, "limits": {"degenerate": None, "utility_loss": None}})
    kinds = {trial.candidate.kind for trial in result.trials}
    assert {"base", "system", "steering", "layer", "direction", "edit"} <= kinds
    assert result.study.scale is not None
    measured = [t.mean("utility_loss") for t in result.trials if t.candidate.kind == "edit"]
    assert all(x is not None and 0 < x < 10 for x in measured)


def test_the_variants_that_are_tried_have_scores_of_their_own(model: Any) -> None:
    from steer2edit.searching.candidates import edit_of

    options = OPTIONS | {"rho_attn": [0.02], "variants": ["full", "g_dot"]}
    result = _moving(model, options=options)
    edits = [trial.candidate for trial in result.trials if trial.candidate.kind == "edit"]
    assert [candidate.id for candidate in edits] == ["edit-0.02-off-0.2", "edit-0.02-off-0.2-g_dot"]
    scores = {"full": result.scores, "g_dot": s2e.score(model, result.probe, variant="g_dot")}
    ids = {candidate.id: edit_of(candidate.config, scores).id for candidate in edits}
    assert len(set(ids.values())) == 2
    assert result.best is not None
    assert result.chosen is not None
    assert result.best.id == ids[result.chosen.candidate.id]


# Where the sides come from --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["texts", "paths", "traces", "messages"])
def test_files_and_traces_give_what_lists_give(kind: str, found: SearchResult, model: Any, tmp_path: Path) -> None:
    more: Any
    less: Any
    more, less = _files(tmp_path)
    if kind == "paths":
        more, less = Path(more), Path(less)
    if kind == "traces":
        more, less = (
            [s2e.Trace(prompt, said, label) for prompt, said in pairs]
            for label, pairs in (("positive", MORE), ("negative", LESS))
        )
    if kind == "messages":
        more, less = (
            [([{"role": "user", "content": prompt}], said) for prompt, said in pairs] for pairs in (MORE, LESS)
        )
    assert _values(_search(model, more, less)) == _values(found)


def test_one_file_can_hold_both_sides(found: SearchResult, model: Any, tmp_path: Path) -> None:
    less = dict(LESS)
    rows = [{"prompt": prompt, "more": said, "less": less[prompt]} for prompt, said in MORE]
    file = write_rows(tmp_path / "both.jsonl", rows)
    assert _values(_search(model, file, file)) == _values(found)


@pytest.mark.parametrize("kind", ["list", "path", "text"])
def test_instructions_are_followed_by_the_model_itself(kind: str, engine: Counting, model: Any, tmp_path: Path) -> None:
    prompts: Any = PROMPTS
    if kind != "list":
        prompts = write_rows(tmp_path / "prompts.jsonl", [{"prompt": prompt} for prompt in PROMPTS])
        prompts = Path(prompts) if kind == "path" else prompts
    result = _search(engine, LOUD, SOFT, prompts=prompts, title="loud")
    tokenizer = make_tokenizer()
    under = [text for text in engine.answered if text.startswith("<|im_start|>system")]
    asked = {side: [t for t in under if f"\n{side}<|im_end|>" in t] for side in (LOUD, SOFT)}
    assert [len(texts) for texts in asked.values()] == [11, 11]  # the probe's six and validation's five
    # The choices are what the model answers under both; each is compared under neither.
    compared: dict[str, list[str]] = {}
    for text, said in dict.fromkeys(engine.scored):
        if text in map(chatml, PROMPTS):
            compared.setdefault(text, []).append(said)
    assert len(compared) == result.trials[0].count("preference")
    assert 0 < len(compared) <= 5
    assert all(len(said) == 2 for said in compared.values())
    text, both = next(iter(compared.items()))
    prompt = text.split("\n")[1].removesuffix("<|im_end|>")
    for side, said in zip((LOUD, SOFT), both, strict=True):
        own = _greedy(model, tokenizer, chatml(prompt, side), 48)  # cut at its last whole sentence, if it has one
        assert own.strip().startswith(said)
        assert len(said) > 3
    assert "prefers loud" in result.table
    assert [result.probe.counts[label]["responses"] for label in ("positive", "negative")] == [6, 6]


def test_prompts_of_their_own_are_answered_beside_the_files_pairs(engine: Counting) -> None:
    own = [f"Another question {i}?" for i in range(14)]
    _search(engine, prompts=own, score={"length": "lower"})
    asked = {text.split("\n")[1].removesuffix("<|im_end|>") for text in engine.answered}
    assert len(asked & set(own)) == 5
    assert not asked & set(PROMPTS)


def test_a_function_scores_what_the_model_answers(model: Any, engine: Counting) -> None:
    seen: list[tuple[str, str]] = []

    def letters(prompt: str, response: str) -> float:
        seen.append((prompt, response))
        return len(response) / 10

    result = _search(engine, score=letters, title="letters")
    tokenizer = make_tokenizer()
    own = [text for text in dict.fromkeys(engine.answered) if text in set(map(chatml, PROMPTS))]
    expected = [len(_greedy(model, tokenizer, text, 4)) / 10 for text in own]
    assert list(result.trials[0].values["shown"]) == pytest.approx(expected)
    assert {prompt for prompt, _ in seen} <= set(PROMPTS)
    assert result.measures[0].title == "letters"


def test_a_traces_system_prompt_is_part_of_what_is_asked(model: Any) -> None:
    def traces(label: Any, pairs: Any, system: str | None) -> list[s2e.Trace]:
        return [s2e.Trace(prompt, said, label, system) for prompt, said in pairs]

    said = "Answer like a pirate."
    of_traces = _search(model, traces("positive", MORE, said), traces("negative", LESS, said))
    system = {"role": "system", "content": said}
    more, less = (
        [([system, {"role": "user", "content": prompt}], response) for prompt, response in pairs]
        for pairs in (MORE, LESS)
    )
    assert _values(of_traces) == _values(_search(model, more, less)) != _values(_search(model))
    thought = s2e.Trace(PROMPTS[0], "Hm. Yes.", "positive", answer_start=4)
    with pytest.raises(RecipeError, match="does not tell thinking and answer of a trace apart"):
        _search(model, [thought], LESS)


# Going on -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sides", ["lists", "instructions"])
def test_a_search_goes_on_from_its_folder_without_a_new_answer(sides: str, model: Any, tmp_path: Path) -> None:
    given: dict[str, Any] = {"folder": tmp_path / "study"}
    if sides == "instructions":
        given |= {"more": LOUD, "less": SOFT, "prompts": PROMPTS}
    first_engine = Counting(model, make_tokenizer())
    first = _search(first_engine, **given)
    assert first_engine.answered
    assert list((tmp_path / "study").glob("journal*.jsonl"))
    again_engine = Counting(model, make_tokenizer())
    again = _search(again_engine, **given)
    assert (again_engine.answered, again_engine.scored) == ([], [])
    assert _values(again) == _values(first)
    assert again.table == first.table


def test_a_function_that_scores_may_be_another_object_when_a_search_goes_on(model: Any, tmp_path: Path) -> None:
    """As in another process."""
    engines = [Counting(model, make_tokenizer()) for _ in range(2)]
    for engine in engines:
        _search(engine, score=lambda prompt, response: len(response) / 10, folder=tmp_path / "study")
    assert engines[0].answered
    assert engines[1].answered == []


def test_a_search_that_was_stopped_gives_what_one_without_a_stop_gives(
    found: SearchResult, model: Any, tmp_path: Path
) -> None:
    def stop(done: int, total: int) -> None:
        if done > total // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        _search(model, folder=tmp_path / "study", progress=stop)
    engine = Counting(model, make_tokenizer())
    assert _values(_search(engine, folder=tmp_path / "study")) == _values(found)
    fresh = Counting(model, make_tokenizer())
    _search(fresh)
    assert len(engine.answered) + len(engine.scored) < len(fresh.answered) + len(fresh.scored)


@pytest.mark.parametrize("other", ["sides", "model", "seed"])
def test_a_folder_gives_nothing_to_another_search(other: str, model: Any, tmp_path: Path) -> None:
    _search(model, folder=tmp_path / "study")
    if other == "seed":
        assert _values(_search(model, folder=tmp_path / "study", seed=1)) == _values(_search(model, seed=1))
    elif other == "sides":
        swapped = {"more": LESS, "less": MORE}
        assert _values(_search(model, folder=tmp_path / "study", **swapped)) == _values(_search(model, **swapped))
    else:
        another = make_pico(max_position_embeddings=512, seed=9)
        assert _values(_search(another, folder=tmp_path / "study")) == _values(_search(another))


def test_without_a_folder_nothing_is_kept(model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    import tempfile

    monkeypatch.setattr(tempfile, "tempdir", None)
    _search(model)
    assert list(tmp_path.iterdir()) == []


# Mistakes -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "kind", "said"),
    [
        ({"more": []}, RecipeError, "the side more has no response"),
        ({"less": MORE}, RecipeError, "more and less are the same"),
        ({"more": LOUD, "less": LOUD, "prompts": PROMPTS}, RecipeError, "more and less are the same"),
        ({"more": LOUD}, RecipeError, "Give both sides in the same way"),
        ({"more": "nowhere.jsonl", "less": "nowhere.jsonl"}, FileError, "no such file"),
        ({"prompts": "nowhere.jsonl"}, FileError, "no such file"),
        ({"more": LOUD, "less": SOFT, "prompts": []}, FileError, "is empty"),
        ({"less": [("Else?", "No.")]}, TraceError, "preference compares two responses to the same prompt"),
        ({"less": [(prompt, " ") for prompt in PROMPTS]}, FileError, "has an empty response"),
        ({"more": LOUD, "less": SOFT, "prompts": PROMPTS[:3], "counts": None}, RecipeError, "has too few lines"),
        ({"counts": COUNTS | {"test": 99}}, RecipeError, "has too few lines"),
        ({"counts": {"probe": 6, "validaton": 5}}, RecipeError, "validaton"),
        ({"score": "preferences"}, RecipeError, "Did you mean 'preference'?"),
        ({"score": {"patern": "a"}}, RecipeError, "Did you mean 'pattern'?"),
        ({"options": {"rho": [0.1]}}, RecipeError, "search.rho"),
        ({"options": OPTIONS | {"limits": {"utility_los": 0.3}}}, RecipeError, "utility_los"),
        ({"evaluation": {"new_token": 4}}, RecipeError, "Did you mean 'new_tokens'?"),
        ({"title": " "}, RecipeError, "behaviour.title"),
    ],
)
def test_a_mistake_is_one_sentence(options: dict[str, Any], kind: type[Steer2EditError], said: str, model: Any) -> None:
    with pytest.raises(kind) as error:
        _search(model, **options)
    three_parts(error.value)
    assert said in str(error.value)


def test_options_are_checked_before_the_model_is_asked(engine: Counting) -> None:
    for options in ({"options": {"rho": [0.1]}}, {"evaluation": {"new_token": 4}}):
        with pytest.raises(RecipeError):
            _search(engine, LOUD, SOFT, prompts=PROMPTS, **options)
    assert engine.answered == []


def test_a_search_needs_a_model_here_its_tokenizer_and_no_edit_in_it(model: Any, found: SearchResult) -> None:
    with pytest.raises(EditError, match=r"^a search needs the model's weights \(got: Elsewhere\)"):
        search(_elsewhere(), None, MORE, LESS)
    with pytest.raises(EditError, match="needs its tokenizer"):
        search(model, None, MORE, LESS)
    edited = make_pico(max_position_embeddings=512)
    found.scores.edit(rho_attn=0.02, rho_mlp=None, alpha=0.2).apply(edited)
    with pytest.raises(EditError) as error:
        _search(edited)
    three_parts(error.value)


def _elsewhere() -> Any:
    from steer2edit.engines.base import Engine

    class Elsewhere(FakeEngine, Engine):
        pass

    return Elsewhere()
