"""Bodies of every wrong kind, paths that lead elsewhere, methods, and the headers of every answer."""

from __future__ import annotations

import http.client
import json

import pytest

from rlhf_cli.labeling.web.request_schema import MAX_BODY
from tests.labeling.web.web_support import Client, token_of, whole_answer


@pytest.mark.parametrize(
    ("body", "kind", "expected"),
    [
        pytest.param(b"{}", "text/plain", 415, id="what a form of another site could send"),
        pytest.param(b"{}", "application/x-www-form-urlencoded", 415, id="form"),
        pytest.param(b"{", "application/json", 400, id="cut off"),
        pytest.param(b"\xff{}", "application/json", 400, id="not UTF-8"),
        pytest.param(b"[]", "application/json", 400, id="a list"),
        pytest.param(b"[" * 60_000, "application/json", 400, id="very deep"),
        pytest.param(b'{"task": NaN}', "application/json", 400, id="NaN"),
        pytest.param(b'{"task": ' + b"9" * 5000 + b"}", "application/json", 400, id="a number of 5,000 digits"),
        pytest.param(b'{"a": 1}', "application/json", 400, id="unknown field"),
        pytest.param(b"{}", "application/json", 400, id="missing fields"),
    ],
)
def test_bodies_that_are_none_are_refused(client: Client, body: bytes, kind: str, expected: int) -> None:
    status, _, said = client.ask("POST", "/api/submit", token=client.of("Ada"), body=body, content_type=kind)
    assert status == expected
    assert json.loads(said)["error"]


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"task": True}, 400),
        ({"task": 1.5}, 400),
        ({"task": "1"}, 400),
        ({"active_seconds": "1"}, 400),
        ({"active_seconds": -1}, 422),
        ({"active_seconds": 10**400}, 400),
        ({"key": ""}, 422),
        ({"key": "x" * 101}, 422),
        ({"key": 1}, 400),
        ({"entry": []}, 400),
        ({"entry": {"tiers": [[0], [1]]}}, 422),
        ({"entry": {"tiers": [[0, 1, 2, 99]]}}, 422),
        ({"entry": {"tiers": [[0, 1, 2, 3]], "winner": 1}}, 422),
        ({"entry": {"tiers": [[0, 1, 2, 3]], "note": "\ud800"}}, 422),
        ({"extra": 1}, 400),
    ],
)
def test_labels_of_the_wrong_form_are_refused_and_not_stored(client: Client, change: dict, expected: int) -> None:
    body = whole_answer(client.task_of("Ada"), "wrong form") | change
    status, _, said = client.ask("POST", "/api/submit", token=client.of("Ada"), body=body)
    assert status == expected, said
    overview = json.loads(client.ask("GET", "/api/admin/overview", token=token_of(client.links.administrator))[2])
    assert overview["progress"]["labels"] == 0


def test_bodies_that_are_too_long_are_refused_announced_or_not(client: Client) -> None:
    long = b'{"note": "' + b"x" * MAX_BODY + b'"}'
    assert client.ask("POST", "/api/draft", token=client.of("Ada"), body=long)[0] == 413
    connection = http.client.HTTPConnection("127.0.0.1", client.port, timeout=10)
    headers = {"Host": client.host, "Authorization": f"Bearer {client.of('Ada')}", "Content-Type": "application/json"}
    chunks = (b"x" * 1024 for _ in range(MAX_BODY // 1024 + 2))
    connection.request("POST", "/api/draft", body=chunks, headers=headers, encode_chunked=True)
    assert connection.getresponse().status == 413
    connection.close()


@pytest.mark.parametrize(
    "path",
    [
        "/../pyproject.toml",
        "/assets/../app.py",
        "/assets/..%2fapp.py",
        "/assets/%2e%2e/app.py",
        "/assets//etc/passwd",
        "/assets/label.html",
        "/assets/",
        "//evil.example/",
        "/labels.sqlite.secret",
    ],
)
def test_no_path_leads_to_another_file(client: Client, path: str) -> None:
    status, headers, _ = client.ask("GET", path)
    assert status == 404
    assert "location" not in headers


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", "/"),
        ("GET", "/api/submit"),
        ("PUT", "/api/submit"),
        ("DELETE", "/api/session"),
        ("OPTIONS", "/api/next"),
    ],
)
def test_methods_are_bounded(client: Client, method: str, path: str) -> None:
    assert client.ask(method, path, token=client.of("Ada"))[0] == 405


def test_every_answer_carries_the_rules_for_the_browser(client: Client) -> None:
    for path, host in (
        ("/", None),
        ("/assets/label.js", None),
        ("/api/session", None),
        ("/nothing", None),
        ("/", "evil"),
    ):
        headers = client.ask("GET", path, host=host)[1]
        policy = headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "frame-ancestors 'none'" in policy
        assert "unsafe" not in policy
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["x-frame-options"] == "DENY"
        assert headers["referrer-policy"] == "no-referrer"
        assert headers["cache-control"] == "no-store"
        assert "access-control-allow-origin" not in headers
