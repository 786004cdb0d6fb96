"""HTTP rewards against a server on the loopback: what is sent, what is forgiven, and what is said of what is not."""

from __future__ import annotations

import json
import math
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from typing import Any

import pytest

from rlhf_cli.data.records import Message
from rlhf_cli.distributed.signals import StopRequest
from rlhf_cli.errors import DataError, Interrupted, UsageError
from rlhf_cli.http_client.addresses import check_endpoint, retry_after
from rlhf_cli.rewards.http_endpoint import HTTPReward
from rlhf_cli.settings.rewards import PPORewardSettings
from tests.loopback import serving
from tests.stops import StopInSeconds

TOKEN = "s3cret/token"  # with a character that some JSON writers escape
TALK = (Message("system", "be kind"), Message("user", "hi"))


@dataclass
class Answer:
    """What the server does with one request: waits, then sends."""

    status: int = 200
    body: bytes | None = None  # None: the length of each completion
    headers: dict[str, str] = field(default_factory=dict)
    delay: float = 0.0
    hang_up: bool = False


@dataclass
class Server:
    url: str
    script: list[Answer] = field(default_factory=list)  # one a request; when it is used up, plain answers
    requests: list[dict[str, Any]] = field(default_factory=list)
    headers: list[Any] = field(default_factory=list)
    at: list[float] = field(default_factory=list)


class Handler(BaseHTTPRequestHandler):
    state: Server
    lock: threading.Lock

    def do_POST(self) -> None:
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.lock:
            self.state.requests.append(request)
            self.state.headers.append(self.headers)
            self.state.at.append(time.monotonic())
            answer = self.state.script.pop(0) if self.state.script else Answer()
        time.sleep(answer.delay)
        if answer.hang_up:
            self.close_connection = True
            return
        body = answer.body
        if body is None:
            body = json.dumps({"rewards": [float(len(c)) for c in request["completions"]]}).encode()
        try:
            self.send_response(answer.status)
            for key, value in ({"Content-Length": str(len(body))} | answer.headers).items():
                self.send_header(key, value)
            self.end_headers()
            self.wfile.write(body)
        except OSError:  # the client lost patience, as the test wants
            pass

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[Server]:
    handler = type("OneHandler", (Handler,), {"lock": threading.Lock()})
    with serving(handler) as address:
        handler.state = Server(f"{address}/score")
        yield handler.state


@pytest.fixture
def reward(server: Server) -> Callable[..., HTTPReward]:
    """An `HTTPReward` that waits hardly at all between attempts."""
    quick: dict[str, Any] = {"timeout": 10.0}

    def make(*, initial_backoff: float = 0.001, stop: StopRequest | None = None, **settings: Any) -> HTTPReward:
        return HTTPReward(
            PPORewardSettings(url=server.url, **(quick | settings)), initial_backoff=initial_backoff, stop=stop
        )

    return make


def rewards_of(*rewards: object) -> Answer:
    return Answer(body=json.dumps({"rewards": list(rewards)}).encode())


def test_what_else_is_known_is_sent_if_asked_for(server, reward):
    columns = {"references": ["3", None, {"a": 1}], "completion_ids": [[1, 2], [3], []]}
    one = reward(send=["completion_ids", "references"], request_size=2)
    assert one.score(["p", "q", "r"], ["ab", "c", ""], columns) == [2.0, 1.0, 0.0]
    found = sorted(server.requests, key=lambda request: -len(request["prompts"]))
    assert [request["references"] for request in found] == [["3", None], [{"a": 1}]]
    assert [request["completion_ids"] for request in found] == [[[1, 2], [3]], [[]]]
    assert "raw_completions" not in found[0]
    with pytest.raises(DataError, match="asks for `references`, but no prompt has a `reference`"):
        one.score(["p"], ["c"], {"completion_ids": [[1]]})


def test_what_is_sent_and_what_comes_back(server, reward):
    one = reward()
    assert one.score(["plain é", TALK], ["ab", "c"]) == [2.0, 1.0]
    assert server.requests == [
        {
            "version": 1,
            "prompts": [
                "plain é",
                [{"role": "system", "content": "be kind"}, {"role": "user", "content": "hi"}],
            ],
            "completions": ["ab", "c"],
        }
    ]
    assert server.headers[0]["Content-Type"] == "application/json"
    assert server.headers[0]["Authorization"] is None
    assert one.name == server.url.split("/")[2]


def test_requests_are_cut_and_their_answers_put_in_order(server, reward):
    server.script = [Answer(delay=0.1)]  # the first request is answered last
    completions = ["x" * n for n in range(23)]
    assert reward(request_size=5).score(["p"] * 23, completions) == [float(n) for n in range(23)]
    assert sorted(len(request["completions"]) for request in server.requests) == [3, 5, 5, 5, 5]


@pytest.mark.parametrize(
    "failure",
    [
        pytest.param(Answer(503, b"busy"), id="503"),
        pytest.param(Answer(500), id="500"),
        pytest.param(Answer(429, b"slow down"), id="429"),
        pytest.param(Answer(delay=2.0), id="slower than the timeout"),
        pytest.param(Answer(hang_up=True), id="hangs up"),
        pytest.param(Answer(headers={"Content-Length": "1000"}), id="ends in the middle"),
    ],
)
def test_what_may_pass_is_tried_again_and_said_once(server, reward, failure, capsys):
    server.script = [failure, failure]
    assert reward(timeout=0.4 if failure.delay else 10.0).score(["p", "q"], ["ab", "c"]) == [2.0, 1.0]
    assert len(server.requests) == 3
    assert server.requests[0] == server.requests[1] == server.requests[2]
    said = " ".join(capsys.readouterr().err.split())
    assert said.count("warning:") == 1
    assert "retrying in" in said
    assert server.url in said


def test_attempts_are_counted_and_the_last_failure_told(server, reward):
    server.script = [Answer(503, b"the queue\n\x1b[31mis full")] * 9
    with pytest.raises(DataError) as caught:
        reward(retries=2).score(["p"], ["c"])
    assert len(server.requests) == 3
    assert caught.value.exit_code == 65
    assert server.url in caught.value.message
    assert "status 503 service unavailable: the queue is full (3 attempts)" in caught.value.message


def test_a_server_that_is_not_there_is_named(reward, server):
    absent = HTTPReward(PPORewardSettings(url="http://127.0.0.1:1/score", retries=1), initial_backoff=0.001)
    with pytest.raises(
        DataError, match=r"http://127\.0\.0\.1:1/score: ConnectError: .*Connect call failed.* \(2 attempts\)"
    ):
        absent.score(["p"], ["c"])


def test_waits_grow_and_scatter(server, reward):
    server.script = [Answer(503)] * 3
    reward(initial_backoff=0.1).score(["p"], ["c"])
    waits = [after - before for before, after in zip(server.at, server.at[1:], strict=False)]
    for wait, full in zip(waits, (0.1, 0.2, 0.4), strict=True):
        assert full / 2 <= wait < full + 1.0


def test_retry_after_is_honored(server, reward):
    server.script = [Answer(429, headers={"Retry-After": "1"})]
    assert reward().score(["p"], ["abc"]) == [3.0]
    assert server.at[1] - server.at[0] >= 1.0


def test_more_patience_than_anyone_has_is_an_error(server, reward):
    server.script = [Answer(503, headers={"Retry-After": "7200"})]
    with pytest.raises(DataError, match=r"asks to wait 7,200 s"):
        reward().score(["p"], ["c"])
    assert len(server.requests) == 1


def test_retry_after_is_seconds_or_a_date():
    assert retry_after("3") == 3.0
    assert retry_after("Wed, 21 Oct 2015 07:28:00 GMT") == 0.0
    assert (retry_after("Fri, 31 Dec 9999 23:59:59 GMT") or 0.0) > 1e9
    assert retry_after("soon") is None
    assert retry_after("-3") is None
    assert retry_after(None) is None


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (Answer(400, b'{"detail": "no field completions"}'), r'status 400 bad request: {"detail": "no field'),
        (Answer(404, b""), r"status 404 not found: an empty body"),
        (Answer(299 + 300, b"?" * 500), r"status 599: \?{200}\.\.\. \(1 attempt"),
        (
            Answer(307, b"", {"Location": "http://127.0.0.1:1/else\x1b"}),
            r"status 307 .* the redirect to http://127\.0\.0\.1:1/else",
        ),
        (Answer(body=b"<html>hello</html>"), r"the response is not JSON: <html>hello</html>"),
        (Answer(body=b"[" * 100_000), r"the response is not JSON: \[\[\["),
        (Answer(body=b"\xff\xfe\xfa"), r"the response is not JSON"),
        (Answer(body=b"[1.0, 2.0]"), r"the response has no list `rewards`: \[1\.0, 2\.0\]"),
        (Answer(body=b'{"rewards": {"0": 1}}'), r"the response has no list `rewards`"),
        (Answer(body=b'{"scores": [1, 2]}'), r"the response has no list `rewards`"),
        (rewards_of(1.0), r"returned 1 scores for 2 completions, the first of them for the prompt 'why\?'"),
        (rewards_of(1.0, 2.0, 3.0), r"returned 3 scores for 2 completions"),
        (rewards_of(1.0, "2"), r"returned '2', which is not a number, for the prompt 'hi' and the completion 'beta'"),
        (rewards_of([1.0], 2.0), r"returned \[1\.0\], which is not a number, for the prompt 'why\?'"),
        (Answer(headers={"Content-Encoding": "gzip"}), r"the response has the encoding `gzip`"),
        (Answer(body=b'{"rewards": [' + b"0" * (2 << 20)), r"the response is larger than 1,050,624 bytes"),
    ],
)
def test_what_cannot_pass_is_not_tried_again_and_names_the_cause(server, reward, answer, message):
    server.script = [answer]
    with pytest.raises(DataError, match=message) as caught:
        reward(retries=0 if answer.status == 599 else 5).score(["why?", "hi"], ["alpha", "beta"])
    assert len(server.requests) == 1
    assert server.url in caught.value.message
    assert caught.value.hint is not None or "bytes" in message or "gzip" in message
    assert "\x1b" not in caught.value.message
    assert len(caught.value.message) < 450


@pytest.mark.parametrize("body", [b'{"rewards": [1.0, null]}', b'{"rewards": [1.0, NaN]}'])
def test_null_and_nan_are_nan(server, reward, body):
    server.script = [Answer(body=body)]
    first, second = reward().score(["p", "q"], ["a", "b"])
    assert first == 1.0
    assert math.isnan(second)


def test_a_trickle_is_cut_off_at_the_timeout(server, reward, monkeypatch):
    def trickle(handler: Handler) -> None:
        handler.rfile.read(int(handler.headers["Content-Length"]))
        handler.send_response(200)
        handler.end_headers()
        try:
            for _ in range(200):
                handler.wfile.write(b" ")
                handler.wfile.flush()
                time.sleep(0.05)
        except OSError:
            pass

    monkeypatch.setattr(Handler, "do_POST", trickle)
    began = time.monotonic()
    with pytest.raises(DataError, match=r"no response within 0\.3 s \(1 attempt\)"):
        reward(timeout=0.3, retries=0).score(["p"], ["c"])
    assert time.monotonic() - began < 5.0


@pytest.mark.parametrize("part", ["the status line", "headers"])
def test_one_deadline_holds_for_a_whole_attempt_wherever_it_dribbles(server, reward, monkeypatch, part):
    begun = {"the status line": b"", "headers": b"HTTP/1.1 200 OK\r\nX: "}[part]

    def dribble(handler: Handler) -> None:
        handler.rfile.read(int(handler.headers["Content-Length"]))
        try:
            handler.wfile.write(begun)
            for byte in b"HTTP/1.1 200 " + b"O" * 50:  # 6 s, never longer than 0.1 s without a byte
                handler.wfile.write(bytes([byte]))
                time.sleep(0.1)
        except OSError:
            pass

    monkeypatch.setattr(Handler, "do_POST", dribble)
    began = time.monotonic()
    with pytest.raises(DataError, match=r"no response within 0\.5 s \(1 attempt\)"):
        reward(timeout=0.5, retries=0).score(["p"], ["c"])
    assert time.monotonic() - began < 3.0


@pytest.mark.parametrize("after", [0.0, 1.0])
def test_a_stop_ends_the_wait_for_a_server_that_is_away(server, reward, capsys, after):
    server.script = [Answer(503, headers={"Retry-After": "20"})] * 9
    began = time.monotonic()
    with pytest.raises(Interrupted) as caught:
        reward(request_size=1, stop=StopInSeconds(after)).score(["p"] * 9, ["c"] * 9)
    assert caught.value.exit_code == 143
    assert after <= time.monotonic() - began < 10.0
    said = " ".join(capsys.readouterr().err.split())
    assert said.count("resumes from the last checkpoint") == 1


def test_a_stop_lets_a_server_that_answers_finish_the_step(server, reward):
    server.script = [Answer(delay=0.3)]
    assert reward(stop=StopInSeconds(0.0)).score(["p"], ["abc"]) == [3.0]


def test_the_first_failure_does_not_wait_for_requests_under_way(server, reward):
    server.script = [Answer(400, b"no", delay=0.3)] + [Answer(delay=6.0)] * 3
    began = time.monotonic()
    with pytest.raises(DataError, match="400"):
        reward(request_size=1, retries=0).score(["p"] * 4, ["c"] * 4)
    assert time.monotonic() - began < 4.0


def test_the_first_failure_ends_all_requests(server, reward):
    server.script = [Answer(400, b"no")] + [Answer(503)] * 500
    began = time.monotonic()
    with pytest.raises(DataError, match="400"):
        reward(request_size=1, retries=50, initial_backoff=30.0).score(["p"] * 100, ["c"] * 100)
    assert time.monotonic() - began < 10.0
    assert len(server.requests) < 20


def test_the_token_is_sent_and_shown_to_nobody(server, monkeypatch, capsys):
    monkeypatch.setenv("REWARD_TOKEN", f" {TOKEN}\n")
    reward = HTTPReward(PPORewardSettings(url=server.url, token_env="REWARD_TOKEN", retries=1), initial_backoff=0.001)
    echo = f"no {TOKEN} here".encode()
    escaped = json.dumps({"rewards": [TOKEN]}).replace("/", "\\/").encode()
    messages = []
    for script in ([Answer(503, echo), Answer(503, echo)], [Answer(401, echo)], [Answer(body=escaped)]):
        server.script = script
        with pytest.raises(DataError) as caught:
            reward.score(["p"], ["c"])
        messages.append(caught.value.message)
    assert all(headers["Authorization"] == f"Bearer {TOKEN}" for headers in server.headers)
    assert all("[token]" in message for message in messages)
    said = " ".join([*messages, capsys.readouterr().err, repr(reward)])
    assert TOKEN not in said


@pytest.mark.parametrize(
    ("url", "value", "message"),
    [
        ("https://host/score", None, r"environment variable REWARD_TOKEN, .* is not set"),
        ("https://host/score", " ", r"environment variable REWARD_TOKEN, .* is empty"),
        ("https://host/score", "Bearer abc", r"REWARD_TOKEN must hold a token"),
        ("https://host/score", "abcé", r"REWARD_TOKEN must hold a token"),
        ("https://me:word@host/score", "abc", r"https://host/score has a name or password"),
        ("https://host/score?key=word", "abc", r"https://host/score has a query or a fragment"),
        ("https://host/score#word", "abc", r"https://host/score has a query or a fragment"),
        ("https:///score", "abc", r"is not a valid URL"),
        ("http://host:99999/", "abc", r"is not a valid URL: Port out of range"),
        ("ftp://host/", "abc", r"is not a valid URL"),
        ("http://host/a b", "abc", r"is not a valid URL"),
    ],
)
def test_addresses_and_tokens_are_checked_before_any_work(url, value, message, monkeypatch):
    if value is None:
        monkeypatch.delenv("REWARD_TOKEN", raising=False)
    else:
        monkeypatch.setenv("REWARD_TOKEN", value)
    with pytest.raises(UsageError, match=message) as caught:
        check_endpoint(url, "REWARD_TOKEN")
    assert caught.value.exit_code == 2
    for secret in ("word", "abc"):
        assert secret not in caught.value.message.replace("password", "")
    if "query" in message:
        assert "token_env" in (caught.value.hint or "")


def test_a_token_that_travels_unencrypted_is_warned_of(monkeypatch, capsys):
    monkeypatch.setenv("REWARD_TOKEN", "abc")
    for url, is_warned in (("http://host/s", True), ("https://host/s", False), ("http://localhost:8000/s", False)):
        HTTPReward(PPORewardSettings(url=url, token_env="REWARD_TOKEN"))
        assert ("unencrypted" in capsys.readouterr().err) is is_warned


def test_a_proxy_of_the_environment_does_not_capture_the_loopback(server, reward, monkeypatch):
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    monkeypatch.delenv("NO_PROXY", raising=False)
    monkeypatch.delenv("no_proxy", raising=False)
    assert reward(retries=0).score(["p"], ["ab"]) == [2.0]


def test_a_proxy_that_cannot_be_used_is_named(monkeypatch):
    monkeypatch.setenv("ALL_PROXY", "gopher://127.0.0.1:1")
    with pytest.raises(UsageError, match="the proxy set in the environment"):
        HTTPReward(PPORewardSettings(url="http://host.invalid/score")).score(["p"], ["c"])
