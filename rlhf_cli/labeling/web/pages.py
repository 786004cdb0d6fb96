"""Serves the two pages and their assets from memory."""

from __future__ import annotations

from importlib.resources import files

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

_TYPES = {
    "html": "text/html; charset=utf-8",
    "css": "text/css; charset=utf-8",
    "js": "text/javascript; charset=utf-8",
    "svg": "image/svg+xml",
}
PAGES = {"/": "label.html", "/admin": "admin.html"}
ASSETS = (
    "style.css",
    "icon.svg",
    "label.js",
    "admin.js",
    "ranking.js",
    "api.js",
    "board.js",
    "cards.js",
    "clock.js",
    "form.js",
    "text.js",
)


def page_routes() -> list[Route]:
    """One route per page and asset; the path of a request never names a file on disk."""
    served = dict(PAGES) | {f"/assets/{name}": name for name in ASSETS}
    return [_route(path, name) for path, name in served.items()]


def _route(path: str, name: str) -> Route:
    content = files("rlhf_cli.labeling.web").joinpath("assets", name).read_bytes()
    kind = _TYPES[name.rpartition(".")[2]]

    async def serve(_: Request) -> Response:
        return Response(content, media_type=kind)

    return Route(path, serve, methods=["GET"])
