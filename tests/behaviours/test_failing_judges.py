"""Judges whose server misbehaves or whose replies cannot be read."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from judge_server import ANSWERS, PAIRS, Call, Reply, Server, alone, by_pair, judge_servers, kept
from steer2edit.behaviours.judges import JudgeError


@pytest.fixture(autouse=True)
def _place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    alone(tmp_path, monkeypatch)


@pytest.fixture
def serve() -> Iterator[Callable[..., Server]]:
    with judge_servers() as start:
        yield start


# Servers that misbehave.


def test_a_server_that_is_down(serve: Any) -> None:
    server = serve()
    server.close()
    with pytest.raises(JudgeError) as error:
        server.judge(retries=2).judged(PAIRS)
    assert error.value.what == f"the judge at {server.url[7:-3]} does not answer"
    assert "refused, 3 tries" in error.value.got
    assert error.value.fix == "Check endpoint; start the server."


def test_a_server_that_is_slow(serve: Any) -> None:
    server = serve(lambda call: Reply(seconds=0.5))
    with pytest.raises(JudgeError, match=r"does not answer \(got: no reply within 0.1 s, 2 tries\)"):
        server.judge(timeout=0.1, retries=1).judged(PAIRS[:2])


def test_a_rate_limit_is_waited_for_by_all_threads(serve: Any) -> None:
    times: list[float] = []

    def limited(call: Call) -> Reply:
        times.append(time.monotonic())
        first = call.number == 0
        return Reply(status=429, headers={"Retry-After": "0.3"}) if first else by_pair(call)

    server = serve(limited)
    assert server.judge(concurrency=2, retries=1).judged(PAIRS) == ANSWERS
    assert len(server.calls) == 13
    # One request of the other thread may already have been under way.
    assert sum(at < times[0] + 0.3 for at in times) <= 3


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_passing_failure_is_retried(serve: Any, status: int) -> None:
    server = serve(lambda call: Reply(status=status) if call.number < 2 else by_pair(call))
    assert server.judge(concurrency=1, retries=2).judged(PAIRS[:1]) == [0.0]
    assert len(server.calls) == 3


@pytest.mark.parametrize(
    ("reply", "said"),
    [
        (Reply(status=401, error={"message": "no such key"}), "401: no such key, 1 try; no key was sent, since OPENAI"),
        (Reply(status=404, error={"message": "no model judge-1"}), r"404: no model judge-1, 1 try\). Check model"),
        (Reply(status=403, raw="<p>go away</p>", headers={"Content-Type": "text/html"}), "403: <p>go away</p>"),
        (Reply(status=429, error={"code": "insufficient_quota", "message": "empty"}), r"429: empty, 1 try\)"),
        (Reply(status=503, headers={"Retry-After": "3600"}, error={"message": "closed"}), r"503: closed, 1 try\)"),
    ],
)
def test_a_lasting_failure_is_not_retried(serve: Any, reply: Reply, said: str) -> None:
    server = serve(lambda call: reply)
    with pytest.raises(JudgeError, match=said):
        server.judge(concurrency=1).judged(PAIRS)
    assert len(server.calls) == 1


def test_a_server_that_keeps_failing_ends_the_work_with_one_error(serve: Any) -> None:
    server = serve(lambda call: Reply(status=500, error={"message": "broken"}))
    with pytest.raises(JudgeError, match=r"fails \(got: 500: broken, 3 tries\)"):
        server.judge(concurrency=1, retries=2).judged(PAIRS)
    assert len(server.calls) == 3


def test_work_that_a_dying_server_cut_short_goes_on_where_it_was(serve: Any) -> None:
    server = serve(lambda call: by_pair(call) if call.number < 5 else Reply(hang_up=True))
    judge = server.judge(concurrency=1, retries=1)
    with pytest.raises(JudgeError, match=r"does not answer .* 5 of 12 verdicts are kept; run the same command again"):
        judge.judged(PAIRS)
    assert kept(judge) == 5
    judged, server.calls, server.behave = [call.text for call in server.calls[:5]], [], by_pair
    seen: list[tuple[int, int]] = []
    assert judge.judged(PAIRS, lambda done, total: seen.append((done, total))) == ANSWERS
    assert seen == [(i, 12) for i in range(5, 13)]
    assert len(server.calls) == 7
    assert not {call.text for call in server.calls} & set(judged)


def test_requests_under_way_when_another_fails_still_count(serve: Any) -> None:
    started = threading.Barrier(4)

    def behave(call: Call) -> Reply:
        started.wait(5)
        return Reply(status=401) if call.number == 0 else Reply("yes", seconds=0.2)

    judge = serve(behave).judge(concurrency=4)
    with pytest.raises(JudgeError, match="3 of 12 verdicts are kept"):
        judge.judged(PAIRS)
    assert kept(judge) == 3


def test_an_interruption_ends_the_requests(serve: Any) -> None:
    server = serve(lambda call: Reply("yes", seconds=0.02))

    def interrupt(done: int, total: int) -> None:
        if done == 3:
            raise KeyboardInterrupt

    judge = server.judge(concurrency=2)
    with pytest.raises(KeyboardInterrupt):
        judge.judged(PAIRS, interrupt)
    assert len(server.calls) <= 6
    assert kept(judge) == 3


def test_requests_run_at_once_and_no_more_than_allowed(serve: Any) -> None:
    together = threading.Barrier(4)

    def behave(call: Call) -> Reply:
        together.wait(5)  # nobody goes on until four requests are there
        return by_pair(call)

    server = serve(behave)
    assert server.judge(concurrency=4).judged(PAIRS) == ANSWERS
    assert server.most_at_once == 4


# Replies that cannot be read.


def test_an_unreadable_reply_is_asked_for_again(serve: Any) -> None:
    server = serve(lambda call: Reply("Hard to say.") if call.number < 2 else Reply("Yes"))
    assert server.judge().judged(PAIRS[:1]) == [1.0]
    assert [call.body["temperature"] for call in server.calls] == [0.0, 0.7, 0.7]


def test_pairs_without_a_verdict_do_not_cost_the_others_theirs(serve: Any) -> None:
    server = serve(lambda call: Reply("Hmm.") if "Prompt 3" in call.text else by_pair(call))
    judge = server.judge()
    with pytest.raises(JudgeError, match=r"a reply without a verdict \(got: Hmm\.\).* 11 of 12 verdicts are kept"):
        judge.judged(PAIRS)
    assert len(server.calls) == 14


def test_a_judge_that_only_talks_nonsense_is_given_up(serve: Any) -> None:
    server = serve(lambda call: Reply("Bananas!"))
    with pytest.raises(JudgeError, match=r"got: Bananas!\). Ask a simpler question"):
        server.judge(concurrency=1).judged(PAIRS)
    assert len(server.calls) == 15  # three for each of five pairs


def test_a_pair_that_the_server_refuses_is_left_out(serve: Any) -> None:
    too_long = Reply(status=400, error={"message": "maximum context length is 64 tokens"})
    server = serve(lambda call: too_long if "Prompt 3" in call.text else by_pair(call))
    with pytest.raises(JudgeError, match=r"400: maximum context length .* 11 of 12 verdicts are kept"):
        server.judge().judged(PAIRS)
    assert len(server.calls) == 12


@pytest.mark.parametrize(
    ("reply", "said"),
    [
        (Reply("", finish="length"), r"got: an empty reply\). Raise tokens"),
        (Reply("<think>The user says yes", finish="length"), r"got: <think>The user says yes\). Raise tokens"),
        (Reply(None), "got: an empty reply"),
        (Reply(raw="<html>Welcome</html>", headers={"Content-Type": "text/html"}), "got: <html>Welcome</html>"),
        (Reply(raw='{"choices": [{"mess'), "got: Unterminated string"),
        (Reply(raw='{"hello": 1}'), "hello=1"),
        (Reply(raw='{"choices": []}'), "got: ChatCompletion"),
    ],
)
def test_a_reply_that_is_no_answer_is_shown(serve: Any, reply: Reply, said: str) -> None:
    with pytest.raises(JudgeError, match=said):
        serve(lambda call: reply).judge().judged(PAIRS[:1])


def test_thinking_is_not_read(serve: Any) -> None:
    server = serve(lambda call: Reply("<think>Yes? Yes. Or no.</think>\n\nNo."))
    assert server.judge(tokens=500).judged(PAIRS[:1]) == [0.0]
    assert server.calls[0].body["max_tokens"] == 500


def test_models_that_take_other_parameters_get_those(serve: Any) -> None:
    def behave(call: Call) -> Reply:
        for name, code in (("max_tokens", "unsupported_parameter"), ("temperature", "unsupported_value")):
            if name in call.body:
                return Reply(status=400, error={"message": "no", "code": code, "param": name})
        return by_pair(call)

    server = serve(behave)
    assert server.judge(concurrency=2).judged(PAIRS) == ANSWERS
    assert server.calls[-1].body["max_completion_tokens"] == 16
    assert len(server.calls) <= 16


def test_without_the_package_there_is_one_sentence(serve: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openai", None)
    with pytest.raises(JudgeError) as error:
        serve().judge().judged(PAIRS)
    assert str(error.value) == (
        "an endpoint needs the openai package (got: it is not installed). pip install 'steer2edit[judge]'."
    )
