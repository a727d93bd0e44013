"""The chat: what its settings mean, that strength 0 is the original, the terminal's commands, and hostile text."""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from rich.console import Console

import steer2edit as s2e
from runs import command, save_pico, tiny_recipe
from served import HELLO, a_worker, two_edits, until
from steer2edit.edits import load_any
from steer2edit.engines.base import Request
from steer2edit.engines.transformers import TransformersEngine
from steer2edit.errors import EditError, FileError, ModelError, RecipeError
from steer2edit.method.intervention import NOTHING
from steer2edit.report.visible import visible
from steer2edit.serving.conversation import EDIT, ORIGINAL, STEERING, Budget, Conversation, Settings
from steer2edit.serving.sources import Source, open_source, open_sources, section_of
from steer2edit.serving.terminal import TerminalChat

BAD = "<script>alert(1)</script>[red]x[/red]\x1b[31m\x9b31m\u202egnp.exe\r\x00\ud800"


@pytest.fixture(scope="module")
def talking() -> Iterator[Conversation]:
    with a_worker() as (worker, _):
        yield Conversation(worker, two_edits(worker.engine.model))


def settings(conversation: Conversation, tokens: int = 12, **changes: Any) -> Settings:
    fields = vars(conversation.defaults()) | {"tokens": tokens} | changes
    return Settings(**fields)


def last(conversation: Conversation, chosen: Settings, systems: Any = None) -> Any:
    histories = dict.fromkeys(systems or conversation.systems, HELLO)
    *_, turn = conversation.ask(histories, chosen)
    return turn


def generated(conversation: Conversation, intervention: Any, tokens: int = 12) -> str:
    worker = conversation.worker
    until(lambda: not worker._batch.busy)
    engine = TransformersEngine(worker.engine.model, worker.engine.tokenizer)
    return engine.generate([Request(engine.tokens(HELLO))], [intervention], tokens)[0].text


def test_three_systems_answer_side_by_side(talking: Conversation) -> None:
    turn = last(talking, settings(talking))
    assert list(turn.texts) == [ORIGINAL, STEERING, EDIT]
    assert turn.done == {ORIGINAL, STEERING, EDIT}
    small, scores = talking.sources[0].edit, talking.sources[0].scores
    assert scores is not None
    vectors = {s.site.block_key: s.v_norm * s.u for s in scores.sites.values()}
    assert turn.texts[ORIGINAL] == generated(talking, NOTHING)
    assert turn.texts[STEERING] == generated(talking, s2e.steering(vectors, 0.4))
    assert turn.texts[EDIT] == generated(talking, small.intervention())
    assert len(set(turn.texts.values())) == 3


def test_text_grows_and_nothing_is_taken_back(talking: Conversation) -> None:
    before = dict.fromkeys(talking.systems, "")
    count = 0
    for turn in talking.ask(dict.fromkeys(talking.systems, HELLO), settings(talking, 30)):
        assert all(turn.texts[name].startswith(text) for name, text in before.items())
        before, count = dict(turn.texts), count + 1
    assert count > 20


def test_at_strength_0_the_edit_answers_as_the_original(talking: Conversation) -> None:
    chosen = settings(talking, strengths={"small": 0.0, "large": 0.0}, gamma=0.0)
    assert set(last(talking, chosen).texts.values()) == {generated(talking, NOTHING)}
    # Also where the edit runs in a row of its own, as a change of 0.
    zero = talking.sources[1].edit.with_strength(0.0).intervention("zero")
    assert zero.terms
    assert generated(talking, zero) == generated(talking, NOTHING)


def test_settings_act_on_the_next_answer(talking: Conversation) -> None:
    small, large = (source.edit for source in talking.sources)
    both = settings(talking, strengths={"small": 0.5, "large": -0.3})
    wanted = generated(talking, s2e.combine(small.with_strength(0.5), large.with_strength(-0.3)).intervention())
    assert last(talking, both, [EDIT]).texts[EDIT] == wanted
    # ρ and α of the first edit: another threshold of the same g.
    other = settings(talking, budget=Budget(0.1, 0.1, 0.3))
    assert last(talking, other, [EDIT]).texts[EDIT] == generated(talking, large.intervention())
    assert last(talking, settings(talking), [EDIT]).texts[EDIT] == generated(talking, small.intervention())


def test_a_budget_is_the_soft_threshold_of_the_same_scores(talking: Conversation) -> None:
    source = talking.sources[0]
    assert source.scores is not None
    for rho_attn, rho_mlp, alpha in ((0.2, None, 0.1), (None, 0.7, 0.9)):
        wanted = source.scores.edit(rho_attn=rho_attn, rho_mlp=rho_mlp, alpha=alpha)
        got = source.edit.with_budget(rho_attn=rho_attn, rho_mlp=rho_mlp, alpha=alpha)  # type: ignore[union-attr]
        assert got.id == wanted.id
        assert got.config == wanted.config
    with pytest.raises(EditError):
        source.edit.with_budget(rho_attn=-1.0, rho_mlp=None, alpha=0.0)  # type: ignore[union-attr]


def test_a_run_that_edits_some_layers_goes_on_editing_those(talking: Conversation) -> None:
    whole = talking.sources[0]
    kept = Source("kept", whole.edit.only(layers=[1]), whole.scores, layers="1-1")
    edits = Conversation(talking.worker, [kept]).edits(Settings({"kept": 1.0}, budget=Budget(0.1, 0.1, 0.0)))
    assert {site.site.layer for site in edits[0].edited().values()} == {1}


@pytest.mark.parametrize("repel", [0.7, None])
def test_a_run_that_preserves_goes_on_preserving(
    talking: Conversation, pico: Any, tokenizer: Any, traces: Any, repel: float | None
) -> None:
    model = pico()
    scores = s2e.score(model, s2e.collect(model, tokenizer, *traces, preserve=[""]))
    how: Any = {"layers": "1-2", "preserve": 0.2, "repel": repel or 0.0}
    edit = scores.edit(rho_attn=0.3, rho_mlp=None, alpha=0.1, **how).with_strength(0.5)
    if repel is None:  # an edit of an earlier version does not speak of one
        edit = replace(edit, config={name: value for name, value in edit.config.items() if name != "repel"})
    kept = Source("kept", edit, scores, layers="1-2")
    other = kept.with_budget(rho_attn=0.2, rho_mlp=None, alpha=0.0)
    expected = scores.edit(rho_attn=0.2, rho_mlp=None, alpha=0.0, **how).with_strength(0.5)
    assert other.id == expected.id
    assert other.id != scores.edit(rho_attn=0.2, rho_mlp=None, alpha=0.0, layers="1-2").with_strength(0.5).id
    assert kept.with_budget(rho_attn=0.3, rho_mlp=None, alpha=0.1).id == edit.id  # its own budget is its own edit
    assert Conversation(talking.worker, [kept]).budget == Budget(0.3, None, 0.1)
    # The file alone holds no evidence: only its strength can be changed.
    assert Conversation(talking.worker, [Source("file", edit)]).budget is None


def test_a_saved_part_of_a_recipe_names_layers_and_variant(talking: Conversation) -> None:
    whole = talking.sources[0].edit
    assert isinstance(whole, s2e.Edit)
    varied = replace(whole, config={**whole.config, "variant": "g_dot"})
    one = Conversation(talking.worker, [Source("one", varied, layers="1-1")])
    part = yaml.safe_load(one.fragment(one.defaults()))
    assert (part["search"]["layers"], part["search"]["variants"]) == (["1-1"], ["g_dot"])


def test_who_stops_listening_frees_the_rows(talking: Conversation) -> None:
    turns = talking.ask(dict.fromkeys(talking.systems, HELLO), settings(talking, 400))
    next(turns)
    turns.close()
    until(lambda: talking.worker.counts() == {"running": 0, "waiting": 0})
    until(lambda: not talking.worker._batch.busy)


def test_a_saved_setting_is_the_edit_at_its_strength(talking: Conversation, tmp_path: Path) -> None:
    small, large = (source.edit for source in talking.sources)
    one = settings(talking, strengths={"small": 0.5, "large": 0.0})
    talking.save(one, tmp_path / "one.safetensors")
    assert load_any(tmp_path / "one.safetensors").id == small.with_strength(0.5).id
    talking.save(settings(talking, strengths={"small": 0.5, "large": 2.0}), tmp_path / "two.safetensors")
    wanted = s2e.combine(small.with_strength(0.5), large.with_strength(2.0))  # type: ignore[arg-type]
    assert load_any(tmp_path / "two.safetensors").id == wanted.id
    with pytest.raises(FileError, match="exists already"):
        talking.save(one, tmp_path / "one.safetensors")
    with pytest.raises(EditError, match="no edit to save"):
        talking.save(settings(talking, strengths={"small": 0.0}), tmp_path / "none.safetensors")
    talking.save(settings(talking, budget=Budget(0.25, None, 0.5)), tmp_path / "part.yaml")
    part = yaml.safe_load((tmp_path / "part.yaml").read_text(encoding="utf-8"))
    search = tiny_recipe(**{f"search__{key}": value for key, value in part["search"].items()}).search
    assert (search.steering, search.rho_attn, search.rho_mlp, search.alpha) == ([0.4], [0.25], [None], [0.5])


# The terminal ------------------------------------------------------------------------------------------------------


def terminal(conversation: Any, *lines: str, chosen: Settings | None = None, **console: Any) -> tuple[str, Any]:
    """What the chat writes for these lines, and the chat."""
    waiting, out = list(lines), io.StringIO()

    def read(_: str) -> str:
        if not waiting:
            raise EOFError
        return waiting.pop(0)

    chosen = chosen or settings(conversation)
    chat = TerminalChat(conversation, chosen, Console(file=out, width=120, **console), read)
    chat.run()
    return out.getvalue(), chat


def test_the_terminal_streams_the_edits_answer_and_keeps_the_conversation(talking: Conversation) -> None:
    written, chat = terminal(talking, HELLO[0]["content"], "/quit", "never read")
    wanted = generated(talking, talking.sources[0].edit.intervention())
    assert visible(wanted) in written
    assert chat.history == [*HELLO, {"role": "assistant", "content": wanted}]


def test_the_terminals_commands(talking: Conversation, tmp_path: Path) -> None:
    file = tmp_path / "mine.safetensors"
    written, chat = terminal(
        talking, "/strength 0.5", "/strength large -1", "/strength many", "/strength nan", "/strength strange 1",
        "/compare", "/compare Why?", "/nonsense", f"/save {file}", f"/save {file}", "/save", "/help",
        "/save /no/such/place/x.safetensors",
    )  # fmt: skip
    assert chat.settings.strengths == {"small": 0.5, "large": -1.0}
    assert written.count("Write /strength NUMBER") == 3
    assert "There is no question yet" in written
    for name in talking.systems:
        assert name in written
    assert "no command /nonsense" in written
    assert len(load_any(file).parts) == 2
    assert "exists already" in written
    assert "/compare TEXT asks another one" in written
    assert chat.history[0]["content"] == "Why?"
    _, chat = terminal(talking, "Why?", "/system Be kind.", "/system")
    assert (chat.system, chat.history) == ("", [])


def test_a_system_prompt_stands_before_the_question(talking: Conversation) -> None:
    _, chat = terminal(talking, "/system Be kind.")
    assert chat.messages("Why?") == [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "Why?"},
    ]


def test_the_comparison_asks_the_last_question_again(talking: Conversation) -> None:
    written, chat = terminal(talking, HELLO[0]["content"], "/compare", chosen=settings(talking, 5))
    assert len(chat.history) == 2
    texts = last(talking, settings(talking, 5)).texts
    assert chat.history[1]["content"] == texts[EDIT]
    assert visible(texts[ORIGINAL]).split("\n")[0][:8] in written


class Stopped:
    """A conversation in which Ctrl-C, or an error, comes while the answers are written."""

    systems = (ORIGINAL, EDIT)

    def __init__(self, real: Conversation, stop: type[BaseException]):
        self.real, self.sources, self.worker, self.stop = real, real.sources, real.worker, stop

    def ask(self, histories: Any, chosen: Settings) -> Any:
        if list(histories) == [EDIT]:
            yield from self.real.ask(histories, chosen)
            return
        turns = self.real.ask({name: histories[name] for name in self.systems}, chosen)
        yield next(turns)
        turns.close()
        raise self.stop("too long", got="much", fix="Less.") if self.stop is EditError else self.stop()


@pytest.mark.parametrize("stop", [KeyboardInterrupt, EditError])
def test_a_comparison_that_is_stopped_ends_neither_the_chat_nor_the_conversation(
    talking: Conversation, stop: type[BaseException]
) -> None:
    lines = (HELLO[0]["content"], "/compare", "/help")
    written, chat = terminal(Stopped(talking, stop), *lines, chosen=settings(talking, 5))
    assert ("(stopped)" if stop is KeyboardInterrupt else "too long (got: much). Less.") in written
    assert "/compare TEXT asks another one" in written  # the help, after it
    assert [message["role"] for message in chat.history] == ["user", "assistant"]


class Hostile:
    """A conversation whose model answers with what a terminal or a browser might act on."""

    systems = (ORIGINAL, EDIT)

    def __init__(self, real: Conversation):
        self.sources, self.worker = real.sources, real.worker

    def ask(self, histories: Any, _: Settings) -> Any:
        from steer2edit.serving.conversation import Turn

        yield Turn(dict.fromkeys(histories, BAD * 2), done=frozenset(histories))


@pytest.mark.parametrize("live", [False, True])
def test_nothing_in_an_answer_acts_on_the_terminal(talking: Conversation, live: bool) -> None:
    written, _ = terminal(
        Hostile(talking), "Why?", "/compare", BAD, f"/{BAD}", chosen=Settings({"small": 1.0}), force_terminal=live
    )
    assert "<script>alert(1)</script>[red]x[/red]\\x1b[31m\\x9b31m\\u202egnp.exe\\r\\x00\\ud800" in written
    assert not set(written) & set("\x9b\u202e\x00\ud800")
    assert "\x1b[31m" not in written
    if not live:
        assert "\x1b" not in written
    written.encode("utf-8")


def test_visible_keeps_what_people_write() -> None:
    text = "Grüße, 你好, שלום, नमस्ते 👩‍👩‍👧 \t ok\nnext"
    assert visible(text) == text
    assert visible("\u2028\x85\x7f\u2066") == "\\u2028\\x85\\x7f\\u2066"
    assert len(visible("x" * 100_000 + "\x1b")) == 100_004


# Sources and the command line --------------------------------------------------------------------------------------


@pytest.fixture
def edit_file(talking: Conversation, tmp_path: Path) -> Path:
    talking.sources[0].edit.save(tmp_path / "mine.safetensors")
    return tmp_path / "mine.safetensors"


def test_an_edit_has_the_name_of_its_file_or_the_given_one(edit_file: Path) -> None:
    assert open_source(str(edit_file)).name == "mine"
    assert open_source(f"other={edit_file}").name == "other"
    with pytest.raises(RecipeError, match="same name"):
        open_sources([str(edit_file), str(edit_file)])
    for name in ("base", "a@b", "a+b", "a\x1b"):
        with pytest.raises(RecipeError, match="cannot be served under that name"):
            open_source(f"{name}={edit_file}")
    with pytest.raises(FileError, match="no edit in the folder"):
        open_source(str(edit_file.parent))


def test_a_run_brings_its_scores_its_steering_and_its_model(talking: Conversation, tmp_path: Path) -> None:
    run = tmp_path / "myrun"
    run.mkdir()
    source = talking.sources[0]
    assert source.scores is not None
    source.edit.save(run / "edit.safetensors")
    source.scores.save(run / "scores.safetensors")
    (run / "choice.json").write_text(
        '{"steering": {"id": "s", "config": {"gamma": 0.25}}, "edit": {"id": "e", "config": {"layers": "1-2"}}}'
    )
    recipe = tiny_recipe("some/model", model__plain=True)
    (run / "recipe.yaml").write_text(recipe.to_yaml())
    opened = open_source(str(run))
    assert (opened.name, opened.gamma, opened.layers) == ("myrun", 0.25, "1-2")
    assert opened.scores is not None
    section = section_of(None, [opened])
    assert (section.name, section.dtype, section.plain) == ("some/model", "float32", True)
    assert section_of("another/model", [opened]).plain is False
    theirs = replace(opened, model=section.model_copy(update={"trust_remote_code": True}))
    with pytest.raises(ModelError, match=r"model runs code of its own .got: some/model.*--trust-remote-code"):
        section_of(None, [theirs])
    assert section_of(None, [theirs], trust_remote_code=True).trust_remote_code
    assert section_of("another/model", [theirs]).trust_remote_code is False
    (run / "choice.json").write_text('{"steering": null}')
    assert open_source(str(run)).gamma is None


def test_a_model_must_be_named_somewhere(edit_file: Path) -> None:
    with pytest.raises(ModelError, match="no model is named"):
        section_of(None, open_sources([str(edit_file)]))


def test_the_chat_runs_from_the_command_line(
    talking: Conversation, edit_file: Path, tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("How do I bake bread?\n/strength 0\n/quit\n"))
    folder = save_pico(tmp_path / "model")
    options = ("--model", folder, "--tokens", 12, "--dtype", "float32", "--device", "cpu")
    assert command(monkeypatch, "chat", edit_file, *options) == 0
    written = capsys.readouterr().out
    assert visible(generated(talking, talking.sources[0].edit.intervention())) in written
    assert "strength: mine 0" in written
    torch.manual_seed(1)
    other = save_pico(tmp_path / "other", seed=5)
    assert command(monkeypatch, "chat", edit_file, "--model", other) == 2
    assert command(monkeypatch, "chat", edit_file, "--model", folder, "--web", "--host", "0.0.0.0") == 2
    assert "no login" in capsys.readouterr().err
