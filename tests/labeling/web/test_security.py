"""Who gets in: other hosts, other origins, missing and wrong tokens; in plain HTTP."""

from __future__ import annotations

import socket
import threading
from pathlib import Path
from typing import Any

import pytest

from rlhf_cli.errors import UsageError
from rlhf_cli.labeling.session.types import Annotator
from rlhf_cli.labeling.web.serving import serve
from rlhf_cli.labeling.web.tokens import ServerLinks, Tokens, claimed_annotator, read_secret, secret_path
from rlhf_cli.web.security import RequestGuard, is_loopback
from tests.labeling.web.web_support import Client, token_of, whole_answer

# Hosts, origins, sites


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:{port}", "127.0.0.1.evil.example:{port}", "", "a b", "[::1"]
)
@pytest.mark.parametrize("path", ["/", "/admin", "/assets/label.js", "/api/session"])
def test_another_host_is_refused(client: Client, host: str, path: str) -> None:
    status, headers, body = client.ask("GET", path, host=host.format(port=client.port), token=client.of("Ada"))
    assert status in ((400, 403) if host == "" else (403,))  # HTTP/1.1 itself forbids a request without one
    if status == 403:
        assert headers["content-type"].startswith("text/plain")
        assert b"Host" in body


@pytest.mark.parametrize("host", ["localhost:{port}", "LOCALHOST:{port}", "127.0.0.1:9000", "[::1]:{port}"])
def test_names_of_this_machine_are_ours_whatever_the_port_of_a_tunnel(client: Client, host: str) -> None:
    assert client.ask("GET", "/", host=host.format(port=client.port))[0] == 200


@pytest.mark.parametrize(
    "origin", ["http://evil.example", "null", "https://{host}", "http://127.0.0.1:1", "http://localhost:{port}", ""]
)
def test_another_origin_is_refused_even_with_a_token(client: Client, store: Path, origin: str) -> None:
    body = whole_answer(client.task_of("Ada"), "from elsewhere")
    origin = origin.format(host=client.host, port=client.port)
    status, _, said = client.ask("POST", "/api/submit", token=client.of("Ada"), body=body, origin=origin)
    assert (status, b"foreign Origin" in said) == (403, True)


def test_our_own_origin_is_let_in(client: Client) -> None:
    origin = f"http://{client.host}"
    assert client.ask("POST", "/api/next", token=client.of("Ada"), body={}, origin=origin)[0] == 200


@pytest.mark.parametrize("site", ["cross-site", "same-site"])
@pytest.mark.parametrize("path", ["/", "/assets/label.js", "/api/session"])
def test_what_another_site_makes_a_browser_load_is_refused(client: Client, site: str, path: str) -> None:
    assert client.ask("GET", path, token=client.of("Ada"), sec_fetch_site=site)[0] == 403


def test_a_link_that_somebody_clicked_in_their_mail_opens_the_page_but_no_frame_and_nothing_else(
    client: Client,
) -> None:
    click: dict[str, Any] = {"sec_fetch_site": "cross-site", "sec_fetch_mode": "navigate", "sec_fetch_user": "?1"}
    assert client.ask("GET", "/", **click, sec_fetch_dest="document")[0] == 200
    assert client.ask("GET", "/", **click, sec_fetch_dest="iframe")[0] == 403
    assert client.ask("GET", "/api/session", **click, sec_fetch_dest="document", token=client.of("Ada"))[0] == 403
    assert client.ask("POST", "/", **click, sec_fetch_dest="document")[0] == 403


def test_a_page_in_the_network_goes_by_its_own_address_only() -> None:
    def names(bound: str, host: str) -> bool:
        scope: Any = {"headers": [(b"host", host.encode())], "method": "GET", "path": "/"}
        return RequestGuard(None, bound).refusal(scope) is None  # type: ignore[arg-type]

    assert names("192.168.1.5", "192.168.1.5:8100")
    assert not names("192.168.1.5", "192.168.1.6:8100")
    assert names("0.0.0.0", "10.1.2.3:8100")
    assert names("0.0.0.0", socket.gethostname())
    assert not names("0.0.0.0", "evil.example:8100")
    assert not names("127.0.0.1", "10.1.2.3:8100")
    assert names("fe80::1", "[fe80::1]:8100")


def test_two_hosts_in_one_request_are_refused() -> None:
    scope: Any = {"headers": [(b"host", b"localhost"), (b"host", b"evil.example")], "method": "GET", "path": "/"}
    assert RequestGuard(None, "127.0.0.1").refusal(scope) is not None  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("host", "expected"), [("127.0.0.1", True), ("::1", True), ("localhost", True), ("0.0.0.0", False), ("box", False)]
)
def test_loopback_is_what_only_this_machine_can_reach(host: str, expected: bool) -> None:
    assert is_loopback(host) is expected


# Tokens


@pytest.mark.parametrize("token", [None, "", "1", "1.", "1.wrong", "admin", "99.x", "é.x", "1" * 50, "-1.x", "²."])
@pytest.mark.parametrize(
    ("method", "path"), [("GET", "/api/session"), ("POST", "/api/submit"), ("GET", "/api/admin/overview")]
)
def test_without_the_right_token_there_is_nothing(client: Client, token: str | None, method: str, path: str) -> None:
    token = None if token is None else token.encode().decode("latin-1")
    body = {} if method == "POST" else None
    assert client.ask(method, path, token=token, body=body)[0] == 401


def test_nobody_has_the_rights_of_another(client: Client) -> None:
    ada, ben = client.of("Ada"), client.of("Ben")
    forged = ben.partition(".")[0] + "." + ada.partition(".")[2]
    admin = token_of(client.links.administrator)
    assert client.ask("GET", "/api/session", token=forged)[0] == 401
    assert client.ask("GET", "/api/admin/overview", token=ada)[0] == 401
    assert client.ask("POST", "/api/admin/annotators", token=ada, body={"name": "Eve"})[0] == 401
    assert client.ask("GET", "/api/admin/labels.jsonl", token=ada)[0] == 401
    assert client.ask("GET", "/api/session", token=admin)[0] == 401
    assert client.ask("GET", "/api/admin/overview", token=admin)[0] == 200


def test_anothers_task_is_unknown(client: Client) -> None:
    task = client.task_of("Ada")
    for path, more in (("submit", {"entry": {"tiers": [[0, 1, 2, 3]]}}), ("skip", {}), ("flag", {"reason": "x"})):
        body = {"task": task["id"], "key": "theirs", "active_seconds": 0} | more
        assert client.ask("POST", f"/api/{path}", token=client.of("Ben"), body=body)[0] == 404
    draft = {"task": task["id"], "entry": {}, "active_seconds": 0}
    assert client.ask("POST", "/api/draft", token=client.of("Ben"), body=draft)[0] == 404


def test_the_token_is_no_cookie_and_no_part_of_what_a_browser_sends_by_itself(client: Client) -> None:
    assert all("#" in link for link in (*client.links.annotators.values(), client.links.administrator))
    for path in ("/", "/api/session"):
        assert "set-cookie" not in client.ask("GET", path, token=client.of("Ada"))[1]


def test_links_survive_a_restart_and_change_with_the_secret(client: Client, store: Path) -> None:
    ada = Annotator(1, "Ada")
    assert Tokens(read_secret(store)).of(ada) == client.of("Ada")
    assert secret_path(store).stat().st_mode & 0o777 == 0o600
    assert Tokens(b"x" * 32).of(ada) != client.of("Ada")
    assert Tokens(read_secret(store)).of(Annotator(1, "Eve")) != client.of("Ada")  # of another store, same number
    assert claimed_annotator(client.of("Ada")) == 1


@pytest.mark.parametrize(("mode", "text"), [(0o644, "00" * 32), (0o600, "no secret"), (0o600, "00")])
def test_a_secret_that_others_can_read_or_that_is_none_is_refused(tmp_path: Path, mode: int, text: str) -> None:
    path = secret_path(tmp_path / "labels.sqlite")
    path.write_text(text)
    path.chmod(mode)
    with pytest.raises(UsageError, match="secret") as refused:
        read_secret(tmp_path / "labels.sqlite")
    assert "delete it" in str(refused.value.hint)


# Starting


def test_a_port_that_is_taken_and_a_host_that_is_not_ours_are_said_so(client: Client, store: Path) -> None:
    with pytest.raises(UsageError, match=f"port {client.port} is in use"):
        serve(store, port=client.port, announce=lambda _: None)
    with pytest.raises(UsageError, match=r"cannot listen on 203\.0\.113\.1"):
        serve(store, host="203.0.113.1", port=0, announce=lambda _: None)
    with pytest.raises(UsageError, match=r"not a valid address|cannot listen"):
        serve(store, host="no such host", port=0, announce=lambda _: None)


def test_missing_packages_are_named_with_the_command_that_brings_them(
    store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "uvicorn", None)
    with pytest.raises(UsageError, match="uvicorn") as refused:
        serve(store, port=0, announce=lambda _: None)
    assert refused.value.hint == "pip install 'rlhf-cli[web]'"


def test_listening_in_the_network_says_what_that_means(store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stop = threading.Event()
    stop.set()
    told: list[ServerLinks] = []
    serve(store, host="0.0.0.0", port=0, announce=told.append, stop=stop)
    assert "unencrypted" in " ".join(capsys.readouterr().err.split())
    assert token_of(told[0].administrator)
