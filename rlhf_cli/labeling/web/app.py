"""The web application: pages from memory, and a JSON API."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp

from rlhf_cli.data.records import prompt_to_json
from rlhf_cli.errors import DiskError, RLHFError, RunInUseError
from rlhf_cli.labeling.label_records import STRENGTHS
from rlhf_cli.labeling.session.progress import tasks_note
from rlhf_cli.labeling.session.session import LabelSession
from rlhf_cli.labeling.session.types import (
    COMPLETION_LETTERS,
    MARK_RANGE,
    MAX_NOTE,
    MAX_REASON,
    Annotator,
    Entry,
    LabelConflictError,
    LabelRefusedError,
    LabelTask,
    PlanChangedError,
    UnknownTaskError,
)
from rlhf_cli.labeling.web.admin import AdminSnapshots
from rlhf_cli.labeling.web.pages import page_routes
from rlhf_cli.labeling.web.request_schema import RequestError, read_object
from rlhf_cli.labeling.web.tokens import ServerLinks, Tokens, claimed_annotator
from rlhf_cli.labeling.web.writer import Writer
from rlhf_cli.web.security import RequestGuard

_LABEL_FIELDS = {"task": int, "key": str, "active_seconds": float}
_STATUS = ((UnknownTaskError, 404), (LabelConflictError, 409), (PlanChangedError, 412), (LabelRefusedError, 422))
_CODES = {412: "plan_changed"}


class LabelApp:
    """Handles all requests to one store.

    Args:
        writer: writes to the session of the store.
        admin: data of the admin page.
        tokens: access tokens of the store.
        address: of the server, such as `http://127.0.0.1:8100`.
        on_complete: called once, when enough is labeled for the pipeline to continue.
        is_sampling: whether completions are being sampled, if the session says that some are to come.
    """

    def __init__(
        self,
        writer: Writer,
        admin: AdminSnapshots,
        tokens: Tokens,
        *,
        address: str,
        on_complete: Callable[[], None],
        is_sampling: Callable[[], bool] = lambda: False,
    ) -> None:
        self._writer = writer
        self._admin = admin
        self._tokens = tokens
        self._address = address
        self._on_complete = on_complete
        self._is_sampling = is_sampling
        self._is_complete = False
        self._annotators: dict[int, Annotator] = {}

    async def begin(self, names: list[str]) -> ServerLinks:
        """Create annotators for new names; return the links of all annotators."""

        def all_annotators(session: LabelSession) -> tuple[list[Annotator], bool]:
            for name in names:
                session.annotator(name)
            return session.annotators(), session.progress().is_complete

        annotators, self._is_complete = await self._writer.run(all_annotators)
        self._annotators = {annotator.id: annotator for annotator in annotators}
        own = {annotator.name: self._link(annotator) for annotator in annotators}
        return ServerLinks(self._address, f"{self._address}/admin#{self._tokens.administrator}", own)

    def asgi(self, host: str) -> ASGIApp:
        """The application with its request filter.

        Args:
            host: address the server listens on.
        """
        routes = [
            *page_routes(),
            Route("/api/session", self._session, methods=["GET"]),
            Route("/api/next", self._next, methods=["POST"]),
            Route("/api/draft", self._draft, methods=["POST"]),
            Route("/api/submit", self._submit, methods=["POST"]),
            Route("/api/skip", self._skip, methods=["POST"]),
            Route("/api/flag", self._flag, methods=["POST"]),
            Route("/api/undo", self._undo, methods=["POST"]),
            Route("/api/admin/overview", self._overview, methods=["GET"]),
            Route("/api/admin/labels.jsonl", self._labels, methods=["GET"]),
            Route("/api/admin/annotators", self._add_annotator, methods=["POST"]),
        ]
        handlers: Any = {RLHFError: _explain, ClientDisconnect: _disconnected}
        return RequestGuard(Starlette(routes=routes, exception_handlers=handlers), host)

    # Labeling

    async def _session(self, request: Request) -> Response:
        who = await self._who(request)

        def details(session: LabelSession) -> dict[str, Any]:
            plan = session.plan
            return {
                "annotator": who.name,
                "store": f"{self._tokens.store_name}-{who.id}",
                "letters": COMPLETION_LETTERS,
                "criteria": list(plan.criteria),
                "strengths": list(STRENGTHS) if plan.strengths else [],
                "marks": list(MARK_RANGE),
                "guidelines": plan.guidelines,
                "plan": plan.display_hash,
                "set_aside_after": plan.set_aside_after,
                "max_note": MAX_NOTE,
                "max_reason": MAX_REASON,
                **self._now(session, who),
            }

        return JSONResponse(await self._writer.run(details))

    async def _next(self, request: Request) -> Response:
        who = await self._who(request)
        await read_object(request, {})
        return JSONResponse(await self._writer.run(lambda session: self._now(session, who)))

    async def _draft(self, request: Request) -> Response:
        who = await self._who(request)
        sent = await read_object(request, {"task": int, "entry": dict, "active_seconds": float})
        entry = Entry.of(sent["entry"])
        seconds = sent["active_seconds"]
        await self._writer.run(lambda session: session.save_draft(who.id, sent["task"], entry, active_seconds=seconds))
        return JSONResponse({"saved": True})

    async def _submit(self, request: Request) -> Response:
        who = await self._who(request)
        sent = await read_object(request, _LABEL_FIELDS | {"entry": dict, "plan": str}, optional=frozenset({"plan"}))
        entry = Entry.of(sent.pop("entry"))
        return await self._store_label(who, lambda session: session.submit(who.id, entry=entry, **sent))

    async def _skip(self, request: Request) -> Response:
        who = await self._who(request)
        sent = await read_object(request, _LABEL_FIELDS | {"reason": str}, optional=frozenset({"reason"}))
        return await self._store_label(who, lambda session: session.skip(who.id, **sent))

    async def _flag(self, request: Request) -> Response:
        who = await self._who(request)
        sent = await read_object(request, _LABEL_FIELDS | {"reason": str})
        return await self._store_label(who, lambda session: session.flag(who.id, **sent))

    async def _store_label(self, who: Annotator, give: Callable[[LabelSession], Any]) -> Response:
        """Store a label and return the receipt with the next task: one round trip per label."""

        def store(session: LabelSession) -> dict[str, Any]:
            return {"receipt": asdict(give(session)), **self._now(session, who)}

        stored = await self._writer.run(store)
        if stored["progress"]["is_complete"] and not self._is_complete:
            self._on_complete()
        self._is_complete = stored["progress"]["is_complete"]
        return JSONResponse(stored)

    async def _undo(self, request: Request) -> Response:
        who = await self._who(request)
        key = (await read_object(request, {"key": str}))["key"]

        def undone(session: LabelSession) -> dict[str, Any]:
            return {"undone": session.undo(who.id, key=key) is not None, **self._now(session, who)}

        return JSONResponse(await self._writer.run(undone))

    def _now(self, session: LabelSession, who: Annotator) -> dict[str, Any]:
        """The annotator's next task and the progress; the task comes first, since it may be assigned just now."""
        task, progress = session.next(who.id), session.progress(who.id)
        return {
            "task": None if task is None else _task_to_json(task),
            "progress": asdict(progress),
            "tasks": tasks_note(progress, session.plan),
            "is_sampling": progress.growth is not None and self._is_sampling(),
        }

    # Administration

    async def _overview(self, request: Request) -> Response:
        self._administrator(request)
        shown = await self._admin.snapshot()
        links = {annotator.name: self._link(annotator) for annotator in await self._all_annotators()}
        for row in shown["annotators"]:
            row["link"] = links[row["name"]]
        return JSONResponse(shown)

    async def _labels(self, request: Request) -> Response:
        self._administrator(request)
        name = {"content-disposition": 'attachment; filename="labels.jsonl"'}
        return Response(await self._admin.labels_jsonl(), media_type="application/x-ndjson", headers=name)

    async def _add_annotator(self, request: Request) -> Response:
        self._administrator(request)
        name = (await read_object(request, {"name": str}))["name"]
        annotator = await self._writer.run(lambda session: session.annotator(name))
        self._annotators[annotator.id] = annotator
        return JSONResponse({"name": annotator.name, "link": self._link(annotator)})

    # Authentication

    async def _all_annotators(self) -> list[Annotator]:
        annotators = await self._writer.run(lambda session: session.annotators())
        self._annotators = {annotator.id: annotator for annotator in annotators}
        return annotators

    async def _who(self, request: Request) -> Annotator:
        token = _token(request)
        number = claimed_annotator(token)
        if number is not None:
            if number not in self._annotators:  # created by another process
                await self._all_annotators()
            known = self._annotators.get(number)
            if known is not None and self._tokens.is_of(token, known):
                return known
        raise RequestError(401, "this link is not valid (any more)", hint="ask the administrator for your link")

    def _administrator(self, request: Request) -> None:
        if not self._tokens.is_administrator(_token(request)):
            raise RequestError(401, "this is not the admin link", hint="the server printed it when it started")

    def _link(self, annotator: Annotator) -> str:
        return f"{self._address}/#{self._tokens.of(annotator)}"


def _token(request: Request) -> str:
    scheme, _, token = request.headers.get("authorization", "").partition(" ")
    return token if scheme.lower() == "bearer" else ""


def _task_to_json(task: LabelTask) -> dict[str, Any]:
    draft = None
    if task.draft is not None:
        draft = asdict(task.draft)
    return {
        "id": task.id,
        "number": task.number,
        "prompt": prompt_to_json(task.prompt),
        "completions": list(task.completions),
        "endings": list(task.endings),
        "draft": draft,
        "plan": task.plan,
        "active_seconds": task.active_seconds,
    }


def _explain(_: Request, error: Exception) -> Response:
    assert isinstance(error, RLHFError)
    status = next((code for kind, code in _STATUS if isinstance(error, kind)), 500)
    if isinstance(error, RequestError):
        status = error.status
    elif isinstance(error, DiskError | RunInUseError):
        status = 503  # nothing was stored, and the page will try again
    said = {"error": error.message, "hint": error.hint, "code": _CODES.get(status)}
    return JSONResponse(said, status_code=status)


def _disconnected(_: Request, __: Exception) -> Response:
    return Response(status_code=400)
