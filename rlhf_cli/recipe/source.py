"""Recipes that are not files: from stdin (`-`) and from an https address."""

from __future__ import annotations

import sys
from http import HTTPStatus
from pathlib import Path
from typing import TYPE_CHECKING

from rlhf_cli.errors import RecipeError
from rlhf_cli.http_client.addresses import is_loopback, network_error, without_query
from rlhf_cli.plain_text import printable
from rlhf_cli.progress import say
from rlhf_cli.recipe.document import MAX_BYTES, RecipeText, decode

if TYPE_CHECKING:
    import httpx2

STDIN = "-"
_SECONDS = 20.0
_MOST_REDIRECTS = 5


def recipe_source(argument: str) -> Path | RecipeText:
    """Return what an argument of the command line names as the recipe: a file, or what was read.

    Args:
        argument: a path, `-` for stdin, or an address that begins with https:// (or http:// on this machine).

    Raises:
        RecipeError: it cannot be read, or is larger than a recipe may be.
    """
    if argument == STDIN:
        found = _from_stdin()
    elif argument.lower().startswith(("https://", "http://")):
        found = _from_url(argument)
    else:
        return Path(argument)
    say(f"recipe from {found.name}: relative paths in it are looked up in the working directory, {Path.cwd()}")
    return found


def _from_stdin() -> RecipeText:
    if sys.stdin.isatty():
        say("type or paste the recipe; Ctrl-D ends it", always=True)
    raw = sys.stdin.buffer.read(MAX_BYTES + 1)
    return RecipeText("stdin", decode("stdin", raw))


def _from_url(url: str) -> RecipeText:
    import httpx2

    for _ in range(_MOST_REDIRECTS + 1):
        name = _checked(url)
        try:
            # To a proxy, localhost is another machine.
            with (
                httpx2.Client(timeout=_SECONDS, trust_env=not is_loopback(url)) as client,
                client.stream("GET", url, headers={"Accept-Encoding": "identity"}) as response,
            ):
                if response.next_request is None:
                    return RecipeText(name, decode(name, _content(name, response)))
                url = str(response.next_request.url)
        except (httpx2.HTTPError, httpx2.InvalidURL, OSError) as error:
            reason = str(network_error(error)) or type(error).__name__
            hint = "check the address and the network, or save the recipe to a file"
            raise RecipeError([f"{name}: cannot be read: {printable(reason)}"], hint=hint) from error
    raise RecipeError([f"{name}: redirected more than {_MOST_REDIRECTS} times"], hint="save the recipe to a file")


def _content(name: str, response: httpx2.Response) -> bytes:
    """Return the body of a response, up to one byte more than a recipe may have."""
    if response.status_code != HTTPStatus.OK:
        raise RecipeError([f"{name}: the server replied {response.status_code}"], hint="check the address")
    if response.headers.get("Content-Type", "").startswith("text/html"):
        raise RecipeError([f"{name}: is a web page"], hint="give the address of the raw file, as of GitHub's `Raw`")
    raw = b""
    for part in response.iter_raw():
        raw += part
        if len(raw) > MAX_BYTES:
            break
    return raw[: MAX_BYTES + 1]


def _checked(url: str) -> str:
    """Return the address for messages; raises `RecipeError` if it is not to be read."""
    name = printable(without_query(url))
    if "@" in url.partition("://")[2].partition("/")[0]:
        raise RecipeError([f"{name}: a name or password in the address"], hint="save the recipe to a file")
    if url.lower().startswith("http://") and not is_loopback(url):
        raise RecipeError(
            [f"{name}: http is not encrypted: anybody on the way could change the recipe, which names code to run"],
            hint="use https, or save the recipe to a file",
        )
    if not url.lower().startswith(("https://", "http://")):
        raise RecipeError([f"{name}: redirected to an address that is not https"], hint="save the recipe to a file")
    return name
