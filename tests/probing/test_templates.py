"""What a template is told, what a run says of it, and models without any template."""

from __future__ import annotations

import datetime
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers.utils.chat_template_utils as template_utils
from torch import Tensor

import steer2edit as s2e
from conftest import CHATML
from runs import save_pico, tiny_recipe
from steer2edit.engines.base import Request
from steer2edit.engines.transformers import TransformersEngine
from steer2edit.errors import ModelError
from steer2edit.pipeline.run import Run
from steer2edit.pipeline.stages import run_all
from steer2edit.probing.chat import Chat, prompt_tokens, render
from steer2edit.probing.spans import response_span
from steer2edit.probing.traces import Trace
from steer2edit.progress import be_quiet
from thinking import ASSISTANT, SWITCHED, USER

CALLED = "{{ 'Today is ' + strftime_now('%d %b %Y') + '.\n' }}" + CHATML
DEFINED = (
    "{% if not date_string is defined %}{% set date_string = strftime_now('%d %b %Y') %}{% endif %}"
    "{{ 'Today is ' + date_string + '.\n' }}" + CHATML
)


# What a template is told --------------------------------------------------------------------------------------------


class _Clock(datetime.datetime):
    today_is = (1999, 12, 31)

    @classmethod
    def now(cls, tz: Any = None) -> Any:
        return cls(*cls.today_is)


@pytest.mark.parametrize("template", [CALLED, DEFINED], ids=["strftime_now", "date_string"])
def test_the_prompt_is_the_same_whatever_the_clock(
    template: str, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer.chat_template = template
    monkeypatch.setattr(template_utils, "datetime", _Clock)
    said = set()
    for day in ((1999, 12, 31), (2031, 5, 6)):
        monkeypatch.setattr(_Clock, "today_is", day)
        by_the_clock = tokenizer.apply_chat_template(USER, add_generation_prompt=True, tokenize=False)
        assert str(day[0]) in by_the_clock
        said.add(render(tokenizer, USER))
        assert prompt_tokens(tokenizer, USER) == tokenizer(render(tokenizer, USER))["input_ids"]
    assert said == {"Today is 01 Jan 2026.\n" + ASSISTANT}
    assert render(tokenizer, USER, Chat(date="2024-02-29")) == "Today is 29 Feb 2024.\n" + ASSISTANT


@pytest.mark.parametrize(
    ("format", "written"),
    [
        ("%Y-%m-%d", "2024-02-29"),
        ("%d %B %Y", "29 February 2024"),
        ("%B %d, %Y", "February 29, 2024"),
        ("%A, %d %b %y", "Thursday, 29 Feb 24"),
        ("%H:%M", "00:00"),
    ],
)
def test_a_template_may_write_the_pinned_date_as_it_likes(format: str, written: str, tokenizer: Any) -> None:
    tokenizer.chat_template = "{{ strftime_now('" + format + "') }}|" + CHATML
    assert render(tokenizer, USER, Chat(date="2024-02-29")) == written + "|" + ASSISTANT


def test_a_response_lies_after_the_pinned_prompt(tokenizer: Any) -> None:
    tokenizer.chat_template = CALLED
    span, _ = response_span(tokenizer, Trace("Hello", "I am sorry.", "positive"), chat=Chat(date="2020-03-04"))
    assert span is not None
    assert tokenizer.decode(span.ids).startswith("Today is 04 Mar 2020.\n")
    assert tokenizer.decode(span.ids[span.first + 1 :]) == "I am sorry"  # its full stop is predicted, not read


def test_a_date_that_is_none_is_an_error(tokenizer: Any) -> None:
    with pytest.raises(ValueError, match="day is out of range"):
        render(tokenizer, USER, Chat(date="2026-02-30"))


def test_enable_thinking_reaches_the_template_and_none_leaves_it_its_default(tokenizer: Any) -> None:
    tokenizer.chat_template = SWITCHED
    assert render(tokenizer, USER) == ASSISTANT
    assert render(tokenizer, USER, Chat(enable_thinking=True)) == ASSISTANT
    assert render(tokenizer, USER, Chat(enable_thinking=False)) == ASSISTANT + "<think>\n\n</think>\n\n"
    # A template whose default is the other way round.
    tokenizer.chat_template = "{{ 'on' if enable_thinking is defined and enable_thinking else 'off' }}"
    assert render(tokenizer, USER) == "off"
    assert render(tokenizer, USER, Chat(enable_thinking=True)) == "on"
    tokenizer.chat_template = "{{ 'told' if enable_thinking is defined else 'not told' }}"
    assert render(tokenizer, USER) == "not told"


def test_the_engine_renders_as_it_was_told(pico: Any, tokenizer: Any) -> None:
    tokenizer.chat_template = SWITCHED
    engine = TransformersEngine(pico(), tokenizer, chat=Chat(enable_thinking=False))
    assert tokenizer.decode(engine.tokens(USER)) == ASSISTANT + "<think>\n\n</think>\n\n"


def test_the_probe_says_what_the_template_was_told_and_which_one_it_was(
    pico: Any, tokenizer: Any, traces: Any, tmp_path: Path
) -> None:
    model, chat = pico(), Chat(enable_thinking=False, date="2025-05-06")
    digests = []
    for template in (CHATML, SWITCHED):
        tokenizer.chat_template = template
        said = s2e.collect(model, tokenizer, *traces, chat=chat).provenance["chat"]
        digests.append(said.pop("template"))
        assert said == {"plain": False, "enable_thinking": False, "date": "2025-05-06", "stop": []}
    assert digests == [hashlib.sha256(t.encode()).hexdigest()[:16] for t in (CHATML, SWITCHED)]
    tokenizer.chat_template = None
    probe = s2e.collect(model, tokenizer, *traces, plain=True)
    expected = {"plain": True, "enable_thinking": None, "date": "2026-01-01", "stop": [], "template": None}
    assert probe.provenance["chat"] == expected
    probe.save(tmp_path / "probe.safetensors")
    assert s2e.Probe.load(tmp_path / "probe.safetensors").provenance["chat"] == expected


def test_the_thinking_that_a_template_switches_off_changes_the_means(pico: Any, tokenizer: Any, traces: Any) -> None:
    model = pico()
    tokenizer.chat_template = SWITCHED
    on, off = (s2e.collect(model, tokenizer, *traces, chat=Chat(enable_thinking=e)) for e in (True, False))
    default = s2e.collect(model, tokenizer, *traces)
    site = on.sites[1]
    assert torch.equal(default.vector(site), on.vector(site))
    assert not torch.allclose(off.vector(site), on.vector(site), atol=1e-3)


# Models without a template ------------------------------------------------------------------------------------------


@pytest.fixture
def quiet() -> Any:
    be_quiet()


def test_a_plain_model_is_probed_scored_and_edited(pico: Any, tokenizer: Any, traces: Any) -> None:
    model = pico()
    tokenizer.chat_template = None
    with pytest.raises(ModelError) as caught:
        s2e.collect(model, tokenizer, *traces)
    assert "plain=True" in caught.value.fix
    assert "model.plain: true" in caught.value.fix
    short, expected = (s2e.collect(model, tokenizer, *traces, **way) for way in ({"plain": True}, {"chat": Chat(True)}))
    assert all(torch.equal(short.vector(site), expected.vector(site)) for site in expected.sites)
    seen: list[Tensor] = []
    model.model.register_forward_pre_hook(lambda m, args, kwargs: seen.append(kwargs["input_ids"]), with_kwargs=True)
    s2e.collect(model, tokenizer, *traces, plain=True, batch_tokens=1, check=False)
    texts = {tokenizer.decode(ids[0]) for ids in seen}
    wanted = {"\n".join(m["content"] for m in t.messages()) + t.response for side in traces for t in side}
    assert {any(whole.startswith(text) and len(whole) - len(text) < 8 for whole in wanted) for text in texts} == {True}
    edit = s2e.score(model, expected).edit(rho_attn=0.3, rho_mlp=0.3, alpha=0.2)
    engine = TransformersEngine(model, tokenizer, chat=Chat(plain=True))
    ids = engine.tokens(USER)
    assert tokenizer.decode(ids) == "Hello"
    base, edited = engine.generate([Request(ids), Request(ids, 1)], [s2e.NOTHING, edit.intervention()], 6)
    assert base.ids != edited.ids


def test_bos_stands_once_in_what_a_model_sees(pico: Any, metaspace_tokenizer: Any) -> None:
    model = pico(vocab_size=len(metaspace_tokenizer) + 8)
    bos = metaspace_tokenizer.bos_token_id
    seen: list[Tensor] = []
    model.model.register_forward_pre_hook(lambda m, args, kwargs: seen.append(kwargs["input_ids"]), with_kwargs=True)
    traces = [Trace("What is it?", "I am sorry.", "positive"), Trace("What is it?", "It is short.", "negative")]
    for chat in (Chat(), Chat(plain=True)):
        del seen[:]
        s2e.collect(model, metaspace_tokenizer, traces, chat=chat, batch_tokens=1, check=False)
        assert len(seen) == 2
        engine = TransformersEngine(model, metaspace_tokenizer, chat=chat)
        for ids in (*(row[0].tolist() for row in seen), list(engine.tokens(traces[0].messages()))):
            assert ids[0] == bos
            assert ids.count(bos) == 1


def test_a_recipe_of_a_model_without_a_template_runs_with_plain_and_says_so_without(
    tmp_path: Path, quiet: None
) -> None:
    folder = save_pico(tmp_path / "model", template=False)
    with pytest.raises(ModelError, match=r"no chat template .*model\.plain: true"):
        run_all(Run(tmp_path / "refused", tiny_recipe(folder)))
    run = Run(tmp_path / "run", tiny_recipe(folder, model__plain=True))
    run_all(run)
    assert run.is_whole("report")
    probe = s2e.Probe.load(run.path("probe.safetensors"))
    assert probe.provenance["chat"]["plain"]
    assert probe.provenance["chat"]["template"] is None


def test_a_recipe_tells_the_template_what_it_says_and_its_part_is_the_probes(tmp_path: Path, quiet: None) -> None:
    folder = save_pico(tmp_path / "model")
    (tmp_path / "model/chat_template.jinja").write_text(CALLED + SWITCHED.removeprefix(CHATML), encoding="utf-8")
    changes: dict[str, Callable[..., Any] | Any] = {"model__enable_thinking": False, "model__date": "2024-12-24"}
    run = Run(tmp_path / "run", tiny_recipe(folder, **changes, probe={"part": "answer"}))
    expected = run.engine.tokenizer.decode(run.engine.tokens(USER))
    assert expected == "Today is 24 Dec 2024.\n" + ASSISTANT + "<think>\n\n</think>\n\n"
    run_all(run)
    provenance = s2e.Probe.load(run.path("probe.safetensors")).provenance
    assert (provenance["part"], provenance["chat"]["date"], provenance["chat"]["enable_thinking"]) == (
        "answer",
        "2024-12-24",
        False,
    )


GEMMA = (
    "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<model>"
)


def test_a_system_prompt_leads_the_user_message_where_the_template_refuses_its_role(tokenizer: Any) -> None:
    tokenizer.chat_template = GEMMA
    talk = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}, {"role": "user", "content": "?"}]
    system = {"role": "system", "content": "Be brief."}
    assert render(tokenizer, talk) == "<user>hi<assistant>ho<user>?<model>"
    assert render(tokenizer, [system, *talk]) == "<user>Be brief.\n\nhi<assistant>ho<user>?<model>"
    assert [m["content"] for m in talk] == ["hi", "ho", "?"]  # nobody's messages are changed


@pytest.mark.parametrize("messages", [[{"role": "system", "content": "Be brief."}], [{"role": "tool", "content": "3"}]])
def test_messages_that_a_template_refuses_are_one_sentence(tokenizer: Any, messages: Any) -> None:
    tokenizer.chat_template = GEMMA + "{% if messages[0].role == 'tool' %}{{ raise_exception('No tools') }}{% endif %}"
    with pytest.raises(
        ModelError, match=r"the model's chat template refuses the messages \(got: (System role|No tools)"
    ):
        render(tokenizer, messages)
