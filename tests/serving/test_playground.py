"""The playground in a real browser: sliders act on the next answer, nothing leaves the machine, text stays text."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from served import HELLO, a_worker, two_edits, until
from steer2edit.edits import load_any
from steer2edit.engines.base import GREEDY, Request, Sampling
from steer2edit.engines.transformers import TransformersEngine
from steer2edit.errors import Steer2EditError
from steer2edit.method.intervention import NOTHING, steering
from steer2edit.report.visible import visible
from steer2edit.searching.candidates import steering_vectors
from steer2edit.serving.conversation import EDIT, ORIGINAL, STEERING, Budget, Conversation
from steer2edit.serving.playground import Playground, build_playground, serve_playground
from steer2edit.serving.server import address_of, http_server, listening

CHROMIUM = shutil.which("chromium")
BAD = "<img src=x onerror=alert(1)><script>document.title='hacked'</script>**bold** \u202egnp.exe \x1b[31m"
DEFAULTS = (1.0, 0.0, 0.4, 0.5, 0.5, 0.3, 0.0, 1.0, 0, 12, 0)


@pytest.fixture(scope="module")
def conversation() -> Iterator[Conversation]:
    with a_worker() as (worker, _):
        yield Conversation(worker, two_edits(worker.engine.model))


def test_the_controls_values_are_settings(conversation: Conversation, tmp_path: Path) -> None:
    playground = Playground(conversation, tmp_path)
    chosen = playground.settings(DEFAULTS)
    assert chosen.budget is None  # the file's own, to the last digit
    assert (chosen.strengths, chosen.gamma, chosen.sampling) == ({"small": 1.0, "large": 0.0}, 0.4, GREEDY)
    chosen = playground.settings((0.5, -1.0, 0.1, 0.0, 0.25, 0.5, 0.7, 0.9, 40, 99, 3))
    assert chosen.budget == Budget(None, 0.25, 0.5)
    assert (chosen.sampling, chosen.tokens, chosen.seed) == (Sampling(0.7, 0.9, 40), 99, 3)


def test_settings_are_saved_in_the_folder_alone(conversation: Conversation, tmp_path: Path) -> None:
    playground = Playground(conversation, tmp_path / "run")
    for name in ("../out.safetensors", "/etc/x.yaml", "a/b.yaml", ".hidden.yaml", "x.py", "", "x.safetensors\n/y.yaml"):
        assert "no name of a file" in playground.save(name, *DEFAULTS)
    assert list(tmp_path.rglob("*")) == []
    assert "is written" in playground.save("mine.safetensors", 0.5, *DEFAULTS[1:])
    assert load_any(tmp_path / "run" / "mine.safetensors").parts[0].strength == 0.5
    assert "exists already" in playground.save("mine.safetensors", *DEFAULTS)


def test_the_playground_stays_on_this_machine(conversation: Conversation, tmp_path: Path) -> None:
    with pytest.raises(Steer2EditError, match="no login"):
        serve_playground(conversation, tmp_path, "pico", "0.0.0.0", 0)


class Served:
    """A page of the playground in a browser, and all that it asked for and said."""

    def __init__(self, page: Any, address: str):
        self.page, self.address = page, address
        self.requests: list[str] = []
        self.errors: list[str] = []
        page.on("request", lambda request: self.requests.append(request.url))
        page.on("console", lambda said: said.type == "error" and self.errors.append(said.text))
        page.on("pageerror", lambda error: self.errors.append(str(error)))
        page.on("dialog", lambda dialog: self.errors.append("a dialog"))
        page.goto(address)
        page.wait_for_selector("#question textarea")

    def set(self, control: str, value: float) -> None:
        field = self.page.locator(f"#{control} input[type=number]")
        field.fill(str(value))
        field.press("Tab")

    def state(self, word: str) -> None:
        found = "word => document.querySelector('#state textarea, #state input').value === word"
        self.page.wait_for_function(found, arg=word, timeout=120_000)

    def ask(self, question: str) -> dict[str, str]:
        if self.page.input_value("#state textarea, #state input"):
            self.page.click("#new")
            self.state("")
        self.page.fill("#question textarea", question)
        self.page.click("#ask")
        self.state("done")
        return {name: self.page.input_value(f"#answer-{name} textarea") for name in (ORIGINAL, STEERING, EDIT)}


@pytest.fixture(scope="module")
def open_page(conversation: Conversation, tmp_path_factory: Any) -> Iterator[Any]:
    """open_page() opens the playground in a fresh page of a headless Chromium."""
    if CHROMIUM is None:
        pytest.skip("there is no chromium: apt-get install chromium")
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    folder = tmp_path_factory.mktemp("run")
    with listening("127.0.0.1", 0) as bound:
        address, hosts = address_of(bound)
        server = http_server(build_playground(conversation, folder, f"pico {BAD}", hosts))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [bound]})
        thread.start()
        until(lambda: server.started, seconds=60)
        try:
            with playwright.sync_playwright() as started:
                browser = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
                yield lambda **options: Served(browser.new_page(**options), address)
                browser.close()
        finally:
            server.should_exit = True
            thread.join()


def generated(conversation: Conversation, intervention: Any, tokens: int) -> str:
    worker = conversation.worker
    until(lambda: not worker._batch.busy)
    engine = TransformersEngine(worker.engine.model, worker.engine.tokenizer)
    answer = engine.generate([Request(engine.tokens(HELLO))], [intervention], tokens)[0].text
    return visible(answer)


@pytest.mark.browser
@pytest.mark.slow
def test_sliders_act_on_the_next_answer(open_page: Any, conversation: Conversation) -> None:
    served = open_page()
    question = HELLO[0]["content"]
    served.page.click("text=sampling")
    served.set("tokens", 12)
    small = conversation.sources[0]
    assert small.scores is not None
    vectors = steering_vectors(small.scores)
    original = generated(conversation, NOTHING, 12)
    assert served.ask(question) == {
        ORIGINAL: original,
        STEERING: generated(conversation, steering(vectors, 0.4), 12),
        EDIT: generated(conversation, small.edit.intervention(), 12),
    }
    served.set("strength-0", 0)
    served.set("gamma", 0)
    assert served.ask(question) == dict.fromkeys((ORIGINAL, STEERING, EDIT), original)
    served.set("strength-1", -1.5)
    large = conversation.sources[1].edit.with_strength(-1.5)
    assert served.ask(question)[EDIT] == generated(conversation, large.intervention(), 12)
    assert served.errors == []
    assert [url for url in served.requests if not url.startswith((served.address, "data:", "blob:"))] == []


@pytest.mark.browser
@pytest.mark.slow
def test_hostile_text_is_shown_as_text(open_page: Any, conversation: Conversation, monkeypatch: Any) -> None:
    from steer2edit.serving.conversation import Turn

    long = BAD + "x" * 100_000

    def hostile(histories: Any, _: Any) -> Any:
        yield Turn(dict.fromkeys(histories, BAD))
        import time

        time.sleep(1)
        yield Turn(dict.fromkeys(histories, long), done=frozenset(histories))

    monkeypatch.setattr(conversation, "ask", hostile)
    served = open_page(viewport={"width": 390, "height": 800})
    answers = served.ask(BAD)
    assert answers == dict.fromkeys((ORIGINAL, STEERING, EDIT), visible(long))
    assert served.page.input_value("#model textarea, #model input") == f"pico {visible(BAD)}"
    assert served.page.title() == "steer2edit"
    assert served.page.locator("img[src=x]").count() == 0
    assert served.errors == []
    wide = served.page.evaluate("document.documentElement.scrollWidth")
    assert wide <= 390


@pytest.mark.browser
@pytest.mark.slow
def test_a_page_that_is_closed_and_a_stopped_answer_free_the_rows(open_page: Any, conversation: Conversation) -> None:
    worker = conversation.worker
    for leave in ("stop", "close"):
        served = open_page()
        served.page.click("text=sampling")
        served.set("tokens", 450)
        served.page.fill("#question textarea", "Why?")
        served.page.click("#ask")
        until(lambda: worker.counts()["running"] == 3, seconds=60)
        if leave == "stop":
            served.page.click("#stop")
        served.page.close()
        until(lambda: worker.counts() == {"running": 0, "waiting": 0}, seconds=20)
