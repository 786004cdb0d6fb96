"""`rlhf watch --serve`: the same as a page on this machine, which loads itself again while the run goes on."""

from __future__ import annotations

import asyncio
import importlib.resources
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import jinja2

from rlhf_cli.charts.chart import Chart
from rlhf_cli.charts.svg import svg
from rlhf_cli.report.curves import reward_against_kl, training_charts
from rlhf_cli.report.gather import RunFiles
from rlhf_cli.report.texts import Pieces, shortened, side_by_side
from rlhf_cli.training.monitoring.panels import PANELS
from rlhf_cli.watch.state import Completions, LiveRun, Watcher
from rlhf_cli.web.security import RequestGuard
from rlhf_cli.web.server import address_of, listen, require_packages, run_until_stopped

_EVERY = 5
"""Seconds after which the page loads itself again."""
_PROMPTS, _LONGEST_PROMPT = 8, 600


@dataclass(frozen=True)
class Shown:
    """Completions of a fixed prompt: each side's label and marked text."""

    prompt: str
    sides: Sequence[tuple[str, Pieces]]


def render(run: LiveRun) -> str:
    """Return the page of a run; every value is escaped but our own charts."""
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, undefined=jinja2.StrictUndefined)
    environment.filters["svg"] = svg
    template = environment.from_string(_asset("rlhf_cli.watch", "watch.html.j2"))
    shown = [_shown(one) for one in run.completions[:_PROMPTS]]
    return template.render(run=run, charts=_charts(run), shown=shown, every=_EVERY)


def _charts(run: LiveRun) -> list[Chart]:
    if run.stage is None or run.stage not in PANELS:
        return []
    files = RunFiles(run.folder, {}, metrics={run.stage: run.rows})
    found = training_charts([files], run.stage)
    against = reward_against_kl([files]) if run.stage == "ppo" else None
    return [*found, *([against] if against is not None else [])]


def _shown(one: Completions) -> Shown:
    prompt, rest = shortened(one.prompt, _LONGEST_PROMPT)
    score = "" if one.score is None else f" · reward {one.score:.2f}"
    newest = f"after step {one.last_step:,}{score}"
    if one.first_step == one.last_step:
        return Shown(f"{prompt}{rest}", [(newest, side_by_side(one.last, one.last)[1])])
    before, after = side_by_side(one.first, one.last)
    start = "before training" if one.first_step == 0 else f"after step {one.first_step:,}"
    return Shown(f"{prompt}{rest}", [(start, before), (newest, after)])


def _asset(package: str, name: str) -> str:
    return (importlib.resources.files(package) / "assets" / name).read_text(encoding="utf-8")


def serve(folder: Path, *, host: str, port: int, announce: Callable[[str], None]) -> int | None:
    """Serve the page of a run until SIGINT or SIGTERM arrives.

    Args:
        folder: run directory.
        host: address to listen on.
        port: 0 picks a free one.
        announce: called with the address of the page when the server listens.

    Returns:
        The signal that stopped it.

    Raises:
        UsageError: the folder cannot be a run directory; starlette or uvicorn is not installed; the port is in use.
    """
    require_packages("the page of `rlhf watch`")
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import HTMLResponse, PlainTextResponse, Response
    from starlette.routing import Route

    watcher = Watcher(folder)
    style = _asset("rlhf_cli.report", "report.css")

    def page(_: Request) -> Response:
        try:
            return HTMLResponse(render(watcher.look()))
        except OSError as error:  # of a mounted folder, perhaps for a moment
            return PlainTextResponse(f"cannot read {folder}: {error}", 503, {"Refresh": str(_EVERY)})

    def stylesheet(_: Request) -> Response:
        return Response(style, media_type="text/css")

    def icon(_: Request) -> Response:
        return Response(status_code=204)

    app = Starlette(routes=[Route("/", page), Route("/style.css", stylesheet), Route("/favicon.ico", icon)])
    listener = listen(host, port)
    try:
        address = address_of(host, listener)
        return asyncio.run(run_until_stopped(RequestGuard(app, host), listener, lambda: announce(address)))
    finally:
        listener.close()
