"""Recipes from stdin and from an address."""

from __future__ import annotations

import io
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from rlhf_cli.errors import RecipeError
from rlhf_cli.recipe.document import MAX_BYTES, RecipeText
from rlhf_cli.recipe.loader import load_recipe
from rlhf_cli.recipe.source import recipe_source
from tests.pipeline.toy import RECIPE, toy

__all__ = ["toy"]

REPLIES = {
    "/good.yaml": (200, {"Content-Type": "text/plain"}, b"name: served\nseed: 4\n"),
    "/bad.yaml": (200, {}, b"name: x\nsed: 4\n"),
    "/moved.yaml": (302, {"Location": "/good.yaml"}, b""),
    "/away.yaml": (302, {"Location": "http://example.com/x.yaml"}, b""),
    "/file.yaml": (302, {"Location": "ftp://example.com/x.yaml"}, b""),
    "/loop.yaml": (302, {"Location": "/loop.yaml"}, b""),
    "/page": (200, {"Content-Type": "text/html; charset=utf-8"}, b"<html>"),
    "/gone.yaml": (404, {}, b"no"),
    "/large.yaml": (200, {}, b"#" * (MAX_BYTES + 1)),
    "/binary.yaml": (200, {}, b"name: \xff\n"),
}


class Server(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        status, headers, body = REPLIES[self.path.partition("?")[0]]
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(scope="module")
def address():
    server = HTTPServer(("127.0.0.1", 0), Server)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.mark.parametrize("path", ["/good.yaml", "/moved.yaml", "/good.yaml?token=secret"])
def test_an_address_is_read_and_named_as_the_origin(address, path, capsys):
    source = recipe_source(address + path)
    assert isinstance(source, RecipeText)
    loaded = load_recipe(source)
    assert loaded.recipe.seed == 4
    assert loaded.origin(("seed",)).endswith(".yaml:2")
    assert loaded.origin(("seed",)).startswith(address)
    said = capsys.readouterr().err
    assert "working directory" in said
    assert "secret" not in said


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("/away.yaml", "http is not encrypted"),
        ("/file.yaml", "redirected to an address that is not https"),
        ("/loop.yaml", "redirected more than 5 times"),
        ("/page", "is a web page"),
        ("/gone.yaml", "the server replied 404"),
        ("/large.yaml", "larger than 1 MiB"),
        ("/binary.yaml", ":1: byte 0xff is not UTF-8"),
    ],
)
def test_what_cannot_be_a_recipe_is_refused(address, path, said):
    with pytest.raises(RecipeError, match=said):
        recipe_source(address + path)


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("http://example.com/x.yaml", "http is not encrypted"),
        ("https://me:secret@example.com/x.yaml", "a name or password in the address"),
        ("http://127.0.0.1:1/x.yaml", "cannot be read"),
    ],
)
def test_addresses_that_are_refused_or_do_not_reply(url, said):
    with pytest.raises(RecipeError, match=said) as error:
        recipe_source(url)
    assert "secret" not in str(error.value)
    assert error.value.hint


def test_problems_name_the_address_and_the_line(address):
    with pytest.raises(RecipeError, match=r"/bad.yaml:2: unknown setting `sed`, did you mean `seed`"):
        load_recipe(recipe_source(f"{address}/bad.yaml"))


@pytest.fixture
def stdin(monkeypatch):
    def write(text: str) -> None:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text.encode())))

    return write


def test_a_run_from_stdin_keeps_what_was_read(toy, stdin):
    stdin(RECIPE)
    done = toy.rlhf("run", "-", "--json")
    assert done.code == 0, done.stderr
    assert (toy.run_dir / "recipe.read.yaml").read_text() == RECIPE
    assert "# stdin:3" in (toy.run_dir / "recipe.yaml").read_text()
    where = f"recipe from stdin: relative paths in it are looked up in the working directory, {toy.folder}"
    assert where in done.stderr
    again = toy.run()
    assert set(again.statuses.values()) == {"cached"}, "the same recipe in a file is the same run"


def test_stdin_is_read_by_one_process_alone(toy, stdin):
    stdin(RECIPE)
    done = toy.rlhf("run", "-", "--processes", "2")
    assert (done.code, "several processes cannot read their recipe from stdin" in done.stderr) == (2, True)


def test_problems_of_stdin_name_the_line(toy, stdin):
    stdin("name: x\nsed: 4\n")
    done = toy.rlhf("recipe", "validate", "-")
    assert "error: stdin:2: unknown setting `sed`" in done.stderr
