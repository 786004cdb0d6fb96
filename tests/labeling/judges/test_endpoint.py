"""Endpoints that answer well, late, wrongly or not at all; what is paid for is kept, the token is shown to nobody."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest

from rlhf_cli.data.records import Candidates
from rlhf_cli.errors import CostLimitError, DataError, Interrupted
from rlhf_cli.labeling.judges.budget import Budget, Prices, most_tokens
from rlhf_cli.labeling.judges.endpoint import EndpointJudge, Keep
from rlhf_cli.labeling.judges.questions import Question, questions_about
from rlhf_cli.labeling.judges.replies import REFUSED, UNHEARD, UNUSABLE, Reply, verdict
from tests.stops import StopInSeconds

TOKEN = "s3cret/token"
Kept = dict[int, Reply]


def questions(count: int) -> list[Question]:
    """So many questions, one a prompt; the second answer is the longer one."""
    return [
        questions_about(
            number, Candidates(f"prompt {number}", ("no", "yes, and")), rubric="r", reply="mark", both_orders=False
        )[0]
        for number in range(count)
    ]


@pytest.fixture
def judge(endpoint) -> Callable[..., EndpointJudge]:
    """An `EndpointJudge` that hardly waits between attempts."""

    def make(limit: float | None = None, spent: float = 0.0, **settings: Any) -> EndpointJudge:
        quick: dict[str, Any] = {"initial_backoff": 0.001, "timeout": 10.0, "budget": Budget(limit, spent)}
        return EndpointJudge(endpoint.url, "acme/judge", **(quick | settings))

    return make


def no_charge(place: int, reply: Reply) -> None:
    pytest.fail(f"question {place} was answered, or its cost is known: {reply}")


def ask(judge: EndpointJudge, asked: Sequence[Question], usable: int = 0, charge: Keep = no_charge) -> Kept:
    kept: Kept = {}
    judge.ask(asked, kept.__setitem__, charge, usable=usable)
    return kept


def test_what_is_sent_and_what_comes_back(endpoint, judge):
    (question,) = questions(1)
    endpoint.then(text="It is.\n[[B]]", usage=(321, 12))
    kept = ask(judge(prices=Prices(2.0, 8.0), max_new_tokens=77), [question])
    assert endpoint.requests == [
        {
            "model": "acme/judge",
            "messages": [
                {"role": "system", "content": question.instructions},
                {"role": "user", "content": question.material},
            ],
            "temperature": 0,
            "max_tokens": 77,
        }
    ]
    path, headers = endpoint.headers[0]
    assert path == "/v1/chat/completions"
    assert headers["Authorization"] is None
    assert list(kept) == [0]
    assert kept[0].cost == pytest.approx((321 * 2.0 + 12 * 8.0) / 1e6)
    assert replace(kept[0], cost=0.0) == Reply(text="It is.\n[[B]]", prompt_tokens=321, completion_tokens=12)


def test_a_slash_behind_the_base_address_does_not_matter(endpoint):
    ask(EndpointJudge(endpoint.url + "/", "m", budget=Budget(None)), questions(1))
    assert endpoint.headers[0][0] == "/v1/chat/completions"


def test_replies_belong_to_their_questions_whatever_order_they_come_in(endpoint, judge):
    endpoint.then(delay=0.3)
    asked = questions(20)
    kept = ask(judge(), asked)
    assert sorted(kept) == list(range(20))
    assert list(kept) != list(range(20)), "one of the first came last"
    for place, reply in kept.items():
        levels, _ = verdict(asked[place], reply)
        assert levels is not None
        assert asked[place].shown[levels.index(0)] == 1, "the longer answer"


@pytest.mark.parametrize("count", [1, 3])
def test_no_more_requests_are_in_flight_than_asked_for(endpoint, judge, count):
    endpoint.delay = 0.05
    ask(judge(concurrency=count), questions(12))
    assert endpoint.most_under_way == count


@pytest.mark.parametrize(
    "failure",
    [
        pytest.param({"status": 500}, id="500"),
        pytest.param({"status": 429, "body": b"slow down", "headers": {"Retry-After": "0"}}, id="429"),
        pytest.param({"delay": 2.0}, id="hangs"),
        pytest.param({"hang_up": True}, id="hangs up"),
    ],
)
def test_what_may_pass_is_tried_again(endpoint, judge, failure, capsys):
    endpoint.then(times=2, **failure)
    patience = 0.3 if "delay" in failure else 10.0
    kept = ask(judge(concurrency=1, timeout=patience), questions(2), charge=lambda *_: None)
    assert len(endpoint.requests) == 4
    assert len(kept) == 2
    assert capsys.readouterr().err.count("retrying in") == 1


def test_an_endpoint_that_stays_away_ends_the_run_and_says_what_to_do(endpoint, judge):
    endpoint.then(times=9, status=503, body=b"loading the model")
    with pytest.raises(DataError, match=r"status 503 .*loading the model \(3 attempts\)") as caught:
        ask(judge(concurrency=1, retries=2), questions(2))
    assert "earlier verdicts are kept" in (caught.value.hint or "")


@pytest.mark.parametrize("status", [401, 404])
def test_a_wrong_key_or_address_ends_the_run_at_once(endpoint, judge, status):
    endpoint.then(times=99, status=status, body=b"no")
    with pytest.raises(DataError, match=f"status {status}"):
        ask(judge(concurrency=1), questions(20), usable=10)
    assert len(endpoint.requests) == 1


def test_a_question_that_is_refused_is_a_failure_of_its_own(endpoint, judge):
    endpoint.then(text="[[A]]")
    endpoint.then(status=400, body=b"maximum context length is 4096 tokens")
    kept = ask(judge(concurrency=1), questions(3))
    assert [reply.failure for reply in kept.values()] == ["", REFUSED, ""]
    assert "maximum context length" in kept[1].text
    assert not kept[1].is_final
    assert kept[0].is_final


@pytest.mark.parametrize(
    "body",
    [
        b"<html>gateway</html>",
        b"{}",
        b'{"choices": []}',
        b'{"choices": [{"message": "hi"}]}',
        b'{"choices": [{"message": {"content": 5}}]}',
        b"[" * 100_000,
        b'{"choices": "' + b"x" * (2 << 20) + b'"}',
    ],
    ids=["html", "empty", "no choice", "no message", "number", "deep", "too long"],
)
def test_what_is_no_completion_is_a_failure_after_good_replies_and_an_error_before_any(endpoint, judge, body):
    endpoint.then(text="[[A]]")
    endpoint.then(body=body)
    assert [reply.failure for reply in ask(judge(concurrency=1), questions(3)).values()] == ["", UNUSABLE, ""]
    endpoint.requests.clear()
    endpoint.then(times=99, body=body)
    with pytest.raises(DataError, match=r"answered without a chat completion|the response is larger") as caught:
        ask(judge(concurrency=1), questions(20))
    assert len(endpoint.requests) == 5
    assert len(caught.value.message) < 400


def test_a_few_refusals_with_nothing_else_are_an_error_too(endpoint, judge):
    endpoint.then(times=2, status=422, body=b"unknown field")
    with pytest.raises(DataError, match="unknown field"):
        ask(judge(), questions(2))


def test_no_text_is_a_reply_without_a_verdict_and_was_paid_for(endpoint, judge):
    endpoint.then(text=None, usage=(5, 5))
    (reply,) = ask(judge(prices=Prices(1e6, 1e6)), questions(1)).values()
    assert (reply.text, reply.cost, reply.failure) == ("", 10.0, "")


def test_a_reply_that_ran_into_its_limit_says_so(endpoint, judge):
    endpoint.then(text="Well", finish="length")
    (reply,) = ask(judge(), questions(1)).values()
    assert reply.is_cut


@pytest.mark.parametrize(
    "usage", [None, {}, {"prompt_tokens": -1, "completion_tokens": 2}, {"prompt_tokens": 1.5, "completion_tokens": 2}]
)
def test_tokens_that_nobody_counted_are_bounded_from_above(endpoint, judge, usage):
    (question,) = questions(1)
    endpoint.then(text="[[A]]", usage=usage)
    (reply,) = ask(judge(prices=Prices(1.0, 2.0), max_new_tokens=50), [question]).values()
    most = len(question.text.encode()) + 64
    assert most_tokens(question.text) == most
    assert (reply.prompt_tokens, reply.completion_tokens, reply.is_estimated) == (most, 50, True)
    assert reply.cost == pytest.approx((most * 1.0 + 50 * 2.0) / 1e6)


def test_the_token_is_sent_and_shown_to_nobody(endpoint, judge, monkeypatch, capsys):
    monkeypatch.setenv("JUDGE_TOKEN", TOKEN)
    escaped = json.dumps({"choices": [{"message": {"content": f"your key {TOKEN}\n[[A]]"}}]}).replace("/", "\\/")
    endpoint.then(status=503, body=f"no {TOKEN}".encode())
    endpoint.then(body=escaped.encode())
    kept = ask(judge(concurrency=1, token_env="JUDGE_TOKEN"), questions(1))
    assert kept[0].text == "your key [token]\n[[A]]"
    endpoint.then(status=401, body=f"bad {TOKEN}".encode())
    with pytest.raises(DataError) as caught:
        ask(judge(token_env="JUDGE_TOKEN"), questions(1))
    assert all(headers["Authorization"] == f"Bearer {TOKEN}" for _, headers in endpoint.headers)
    said = " ".join([caught.value.message, str(caught.value), capsys.readouterr().err])
    assert "[token]" in said
    assert TOKEN not in said


# Cost


def test_the_limit_is_never_exceeded_and_what_was_paid_for_is_kept(endpoint, judge):
    asked = questions(30)
    most = Prices(1.0, 0.0).cost(most_tokens(asked[0].text), 0)
    endpoint.usage = (most_tokens(asked[0].text), 0)  # as dear as it can be
    for limit in (0.5, 4.5, 10.0):
        endpoint.requests.clear()
        kept: Kept = {}
        with pytest.raises(CostLimitError) as caught:
            judge(limit * most, prices=Prices(1.0, 0.0), concurrency=4).ask(asked, kept.__setitem__, no_charge)
        assert len(kept) == len(endpoint.requests) == int(limit)
        assert sum(reply.cost for reply in kept.values()) <= limit * most
        assert caught.value.exit_code == 77
        assert "label.judge.max_cost" in caught.value.message


def test_requests_in_flight_are_counted_at_the_most_they_can_cost(endpoint, judge):
    """Eight at once fit by what they turn out to cost, two by what they could: two go out at first."""
    asked = questions(8)
    most = Prices(1.0, 1.0).cost(most_tokens(asked[0].text), 512)
    endpoint.usage, endpoint.delay = (1, 1), 0.1
    kept = ask(judge(2.5 * most, prices=Prices(1.0, 1.0)), asked)
    assert len(kept) == 8, "they were cheaper than they could have been, so all were asked in the end"
    assert endpoint.most_under_way == 2


def test_what_was_spent_before_counts(endpoint, judge):
    with pytest.raises(CostLimitError, match=r"have cost 0\.9"):
        ask(judge(1.0, 0.9999, prices=Prices(1.0, 1.0)), questions(1))
    assert endpoint.requests == []


def test_an_endpoint_without_a_price_may_be_asked_beyond_the_limit(endpoint, judge):
    assert len(ask(judge(1.0, 1.0), questions(3))) == 3


def test_attempts_that_time_out_count_at_their_bound_and_their_retries_are_reserved_for(endpoint, judge):
    """Each of them may have been carried out and billed: no more go out than the limit pays for."""
    asked = questions(6)
    prices = Prices(1.0, 1.0)
    most = prices.cost(most_tokens(asked[0].text), 512)
    endpoint.delay = 2.0
    budget, charged = Budget(5.5 * most), []
    patient = judge(budget=budget, prices=prices, concurrency=3, retries=9, timeout=0.15)
    with pytest.raises(CostLimitError, match=r"of it for attempts without a reply"):
        ask(patient, asked, charge=lambda *given: charged.append(given))
    assert len(endpoint.requests) == len(charged) == 5
    assert {reply.failure for _, reply in charged} == {UNHEARD}
    assert budget.spent == budget.unheard == sum(reply.cost for _, reply in charged) == pytest.approx(5 * most)
    assert not budget.is_waiting


@pytest.mark.parametrize(
    ("failure", "is_charged"),
    [
        pytest.param({"hang_up": True}, True, id="hangs up"),
        pytest.param({"status": 504}, True, id="a gateway lost patience"),
        pytest.param({"status": 200, "headers": {"Content-Length": "999999"}}, True, id="an answer in part"),
        pytest.param({"status": 503}, False, id="503"),
        pytest.param({"status": 429}, False, id="429"),
    ],
)
def test_what_may_have_been_carried_out_is_charged_and_what_was_declined_is_not(endpoint, judge, failure, is_charged):
    (question,) = questions(1)
    endpoint.then(times=2, **failure)
    budget, charged = Budget(None), []
    made = judge(budget=budget, prices=Prices(1.0, 0.0), timeout=0.5)
    (reply,) = ask(made, [question], charge=lambda *given: charged.append(given)).values()
    assert (reply.cost, reply.is_estimated) == (pytest.approx(100 / 1e6), False)
    assert len(charged) == (2 if is_charged else 0)
    most = Prices(1.0, 0.0).cost(most_tokens(question.text), 0)
    assert budget.unheard == pytest.approx(len(charged) * most)
    assert budget.spent == pytest.approx(len(charged) * most + 100 / 1e6)


def test_what_never_went_out_is_not_charged():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/v1"
    budget = Budget(None)
    away = EndpointJudge(url, "m", budget=budget, prices=Prices(1.0, 1.0), retries=1, initial_backoff=0.001)
    with pytest.raises(DataError, match="2 attempts"):
        ask(away, questions(2))
    assert budget.spent == 0.0


def test_what_is_given_up_after_a_signal_is_charged(endpoint, judge, monkeypatch):
    monkeypatch.setattr("rlhf_cli.labeling.judges.endpoint.GRACE", 0.2)
    endpoint.delay = 2.0
    budget, charged = Budget(None), []
    made = judge(budget=budget, prices=Prices(1.0, 1.0), stop=StopInSeconds(0.4), concurrency=2)
    with pytest.raises(Interrupted):
        ask(made, questions(4), charge=lambda *given: charged.append(given))
    assert sorted(place for place, _ in charged) == [0, 1]
    assert budget.spent == sum(reply.cost for _, reply in charged) > 0.0


NO_CHOICE = json.dumps({"choices": [], "usage": {"prompt_tokens": 30, "completion_tokens": 4}}).encode()


@pytest.mark.parametrize(("body", "is_counted"), [(NO_CHOICE, True), (b"<html>", False), (b"x" * (2 << 20), False)])
def test_what_is_no_completion_costs_what_it_says_or_its_bound(endpoint, judge, body, is_counted):
    """Those before the one that ends the run, and that one."""
    asked = questions(9)
    prices, budget = Prices(1.0, 2.0), Budget(None)
    endpoint.then(times=9, body=body)
    kept: Kept = {}
    with pytest.raises(DataError, match=r"answered without a chat completion|the response is larger"):
        judge(budget=budget, prices=prices, concurrency=1).ask(asked, kept.__setitem__, no_charge)
    each = prices.cost(30, 4) if is_counted else prices.cost(most_tokens(asked[0].text), 512)
    assert [reply.cost for reply in kept.values()] == pytest.approx([each] * 5)
    assert {(reply.failure, reply.is_estimated) for reply in kept.values()} == {(UNUSABLE, not is_counted)}
    assert budget.spent == pytest.approx(5 * each)


# Signals


def test_a_signal_lets_what_is_under_way_finish_and_starts_nothing_new(endpoint, judge):
    endpoint.delay = 0.6
    kept: Kept = {}
    with pytest.raises(Interrupted):
        judge(stop=StopInSeconds(0.2), concurrency=3).ask(questions(30), kept.__setitem__, no_charge)
    assert len(kept) == len(endpoint.requests) == 3


def test_a_signal_does_not_wait_for_an_endpoint_that_hangs(endpoint, judge, monkeypatch):
    monkeypatch.setattr("rlhf_cli.labeling.judges.endpoint.GRACE", 0.3)
    endpoint.delay = 5.0
    began = time.monotonic()
    with pytest.raises(Interrupted):
        ask(judge(stop=StopInSeconds(0.1), concurrency=2), questions(4))
    assert time.monotonic() - began < 3.0


def test_the_first_error_lets_what_is_under_way_finish(endpoint, judge):
    endpoint.then(status=401, body=b"no", delay=0.1)
    endpoint.delay = 0.4
    kept: Kept = {}
    with pytest.raises(DataError, match="401"):
        judge(concurrency=4).ask(questions(30), kept.__setitem__, no_charge)
    assert len(endpoint.requests) == 4
    assert len(kept) == 3
