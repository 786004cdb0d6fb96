"""A scripted OpenAI-compatible endpoint on the loopback, and a stage's surroundings to run judges in."""

from __future__ import annotations

import itertools
import json
import re
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import pytest

from rlhf_cli.data.records import Candidates
from rlhf_cli.distributed.process_group import ProcessGroup
from rlhf_cli.recipe.schema import Recipe
from rlhf_cli.stages.label.judge import Judged, run_judges
from tests.loopback import serving
from tests.stages.context import stage_context

_ANSWER = re.compile(r"\[BEGIN ANSWER (\w) (\w+)\]\n(.*?)\n\[END ANSWER \1 \2\]", re.DOTALL)


@dataclass
class Response:
    """What the endpoint does with one request, in place of judging."""

    status: int = 200
    body: bytes | None = None
    headers: dict[str, str] = field(default_factory=dict)
    delay: float = 0.0
    hang_up: bool = False


def completion(text: str | None, *, usage: Any = (100, 10), finish: str = "stop") -> bytes:
    """The body of a chat completion."""
    counted = {"prompt_tokens": usage[0], "completion_tokens": usage[1]} if isinstance(usage, tuple) else usage
    choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": finish}
    return json.dumps({"choices": [choice], "usage": counted}).encode()


def longer_wins(model: str, answers: Sequence[str]) -> str:
    """A judge that goes by length alone; it writes an order, which a pair's question takes too."""
    order = sorted(range(len(answers)), key=lambda index: -len(answers[index]))
    text = "ABCDEFGH"[order[0]]
    for before, after in itertools.pairwise(order):
        text += (" = " if len(answers[before]) == len(answers[after]) else " > ") + "ABCDEFGH"[after]
    return f"Because it is longer.\n[[{text}]]"


@dataclass
class Endpoint:
    """A server and what it was asked."""

    url: str
    judge: Callable[[str, Sequence[str]], str] = longer_wins
    script: list[Response] = field(default_factory=list)
    requests: list[dict[str, Any]] = field(default_factory=list)
    headers: list[Any] = field(default_factory=list)
    at: list[float] = field(default_factory=list)
    under_way: int = 0
    most_under_way: int = 0
    delay: float = 0.0
    usage: Any = (100, 10)

    def then(self, *, times: int = 1, **response: Any) -> None:
        """What comes next, in place of a verdict; `text` and `usage` and `finish` make a completion."""
        if "text" in response:
            made = {name: response.pop(name) for name in ("text", "usage", "finish") if name in response}
            response["body"] = completion(made.pop("text"), **made)
        self.script += [Response(**response)] * times


class Handler(BaseHTTPRequestHandler):
    state: Endpoint
    lock: threading.Lock

    def do_POST(self) -> None:
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        state = self.state
        with self.lock:
            state.requests.append(request)
            state.headers.append((self.path, self.headers))
            state.at.append(time.monotonic())
            state.under_way += 1
            state.most_under_way = max(state.most_under_way, state.under_way)
            response = state.script.pop(0) if state.script else Response()
        time.sleep(response.delay or state.delay)
        with self.lock:
            state.under_way -= 1
        if response.hang_up:
            self.close_connection = True
            return
        body = response.body
        if body is None:
            answers = [text for _, _, text in _ANSWER.findall(request["messages"][1]["content"])]
            body = completion(state.judge(request["model"], answers), usage=state.usage)
        try:
            self.send_response(response.status)
            for key, value in ({"Content-Length": str(len(body))} | response.headers).items():
                self.send_header(key, value)
            self.end_headers()
            self.wfile.write(body)
        except OSError:  # the client lost patience, as the test wants
            pass

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def endpoint() -> Iterator[Endpoint]:
    handler = type("OneHandler", (Handler,), {"lock": threading.Lock()})
    with serving(handler) as address:
        handler.state = Endpoint(f"{address}/v1")
        yield handler.state


@pytest.fixture
def judged(tmp_path: Path) -> Callable[..., Judged]:
    """Runs the judges of a recipe: `judged(candidates, panel=[...], floor=0.7, data={"max_skip": 1.0})`.

    `calibration` and `rubric_file` are files. What is kept stays from call to call, the output does not.
    """

    def run(
        candidates: Sequence[Candidates],
        *,
        data: dict[str, Any] | None = None,
        stop: Any = None,
        processes: ProcessGroup | None = None,
        **judge: Any,
    ) -> Judged:
        recipe = Recipe.model_validate(
            {
                "label": {"by": "judge", "items": "items.jsonl", "judge": judge},
                "data": data or {},
                "model": {"precision": "float32"},
            }
        )
        judges = [one["model"] if "model" in one else one["url"] for one in judge["panel"]]
        files = {"calibration": judge.get("calibration"), "rubric": judge.get("rubric_file")}
        output = tmp_path / ".label.output"
        output.mkdir(exist_ok=True)
        work = tmp_path / ".label.work"
        context = stage_context(
            "label", recipe, output=output, work=work, stop=stop, items="items.jsonl", judges=judges, **files
        )
        return run_judges(context, candidates, processes or ProcessGroup())

    return run


@pytest.fixture(scope="session")
def roomy_llama(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny Llama with room for whole questions: rotary positions go as far as they are let."""
    folder = tmp_path_factory.mktemp("judge") / "roomy-llama"
    shutil.copytree(tiny_llama, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 8192}))
    return folder


@pytest.fixture
def report(tmp_path: Path) -> Callable[[], dict[str, Any]]:
    """Reads `judge.json`."""
    return lambda: json.loads((tmp_path / ".label.output" / "judge.json").read_text())


@pytest.fixture
def votes(tmp_path: Path) -> Callable[[], list[dict[str, Any]]]:
    """Reads `votes.jsonl`."""
    return lambda: [json.loads(line) for line in (tmp_path / ".label.output" / "votes.jsonl").read_text().splitlines()]
