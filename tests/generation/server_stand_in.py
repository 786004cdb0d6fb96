"""A stand-in for `vllm serve`: its HTTP interface over loopback, on tiny models of transformers.

TRL's client is the real one. What it imports of vLLM is replaced: above all the communicator, which here is a queue in
this process, and in reality is NCCL. docs/generation.md lists the interface, read in the source of vLLM 0.32.0.
"""

from __future__ import annotations

import contextlib
import json
import queue
import socket
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from rlhf_cli.generation import server_draw, vllm_server
from tests.generation.vllm_stand_in import LLM, VERSION, SamplingParams, vllm

__all__ = ["vllm"]

_SECONDS = 20.0
"""Longest wait of one side for the other."""


class Group:
    """Stands for a `PyNcclCommunicator` between the trainer and one worker: a broadcast waits for its receiver."""

    def __init__(self) -> None:
        self.group = SimpleNamespace(store=object(), socket=object())
        self.joined, self.aborted = threading.Event(), threading.Event()
        self._tensors: queue.Queue[torch.Tensor] = queue.Queue(maxsize=1)

    def broadcast(self, tensor: torch.Tensor, src: int) -> None:
        assert src == 0
        while not self.aborted.is_set():
            with contextlib.suppress(queue.Full):
                return self._tensors.put(tensor.clone(), timeout=0.02)
        raise RuntimeError("NCCL error: the communicator was aborted")

    def receive(self) -> torch.Tensor:
        return self._tensors.get(timeout=_SECONDS)

    def destroy(self) -> None:
        self.aborted.set()


GROUPS: dict[int, Group] = {}
"""Port of the rendezvous -> group."""


def trainer_init(init_info: dict[str, Any]) -> Group:
    """Join as rank 0, and wait for the worker."""
    group = GROUPS.setdefault(init_info["master_port"], Group())
    assert init_info["world_size"] == 2
    if not group.joined.wait(_SECONDS):
        raise RuntimeError("Timed out waiting for the other ranks")
    return group


def packed_nccl_broadcast_producer(iterator: Any, group: Group, src: int, post_iter_func: Any) -> None:
    for item in iterator:
        group.broadcast(post_iter_func(item), src=src)


class StandIn:
    """One server on a port of its own. Settings are class attributes of the real one's options.

    Attributes:
        paths: POST requests but completions, in their order.
        drawn: the payload of every completion request.
        dies_after: it dies in the completion after so many; None never does.
        dies_in_transfer: it dies when the next weights come.
        comes_back: seconds after which it starts again when it died; None never does.
        refuses: message of an error 400 for every completion.
    """

    def __init__(self, model: Path) -> None:
        self.config = AutoConfig.from_pretrained(model)
        self.version, self.mode, self.transfer, self.longest = VERSION, "processed_logprobs", {"backend": "nccl"}, 64
        self.is_dev = True
        self.paths: list[str] = []
        self.drawn: list[dict[str, Any]] = []
        self.names: list[str] = []
        self.dies_after: int | None = None
        self.dies_in_transfer = False
        self.comes_back: float | None = None
        self.refuses = ""
        self.pause = 0.0
        self._lock = threading.Lock()
        self._port = 0
        self.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._port}"

    def start(self) -> None:
        """Start, also again: with weights of its own."""
        self.weights_version, self._group, self._is_updating = "default", None, False
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(99)
            self.model = AutoModelForCausalLM.from_config(self.config, dtype=torch.float32).eval()
        self._connections: set[socket.socket] = set()
        handler = type("Handler", (_Handler,), {"stand_in": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", self._port), handler)
        self._server.daemon_threads = True
        self._port = self._server.server_address[1]
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()

    def kill(self) -> None:
        """End at once: connections break off."""
        self._server.shutdown()
        self._server.server_close()
        for connection in list(self._connections):
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def die(self) -> None:
        """End as `kill` does, while a request is answered."""
        self.kill()
        if self.comes_back is not None:
            threading.Timer(self.comes_back, self.start).start()
        raise ConnectionResetError

    def get(self, path: str) -> dict[str, Any] | None:
        answers: dict[str, Any] = {
            "/health": {},
            "/version": {"version": self.version},
            "/v1/models": {"data": [{"id": "model"}]},
        }
        if self.is_dev:
            model = {"logprobs_mode": self.mode, "max_model_len": self.longest}
            answers |= {
                "/server_info": {"vllm_config": {"model_config": model, "weight_transfer_config": self.transfer}},
                "/get_world_size": {"world_size": 1},
                "/weight_info": {"weight_version": self.weights_version},
            }
        return answers.get(path)

    def post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        if path == "/v1/completions":
            return self._complete(body)
        self.paths.append(path)
        if path == "/init_weight_transfer_engine":
            info = body["init_info"]
            assert info["rank_offset"] == 1
            assert info["packed"] is True
            self._group = GROUPS.setdefault(info["master_port"], Group())
            self._group.joined.set()
        elif path == "/start_weight_update":
            assert not self._is_updating
            self._is_updating = True
        elif path == "/update_weights":
            self._receive(body["update_info"])
        elif path == "/finish_weight_update":
            self._is_updating = False
        elif path == "/update_weight_version":
            self.weights_version = body["new_version"]
        else:
            assert path == "/reset_prefix_cache"
        return {"success": True}

    def _receive(self, info: dict[str, Any]) -> None:
        if self.dies_in_transfer:
            self.dies_in_transfer = False
            self.die()
        assert self._is_updating
        assert self._group is not None
        own = self.model.state_dict(keep_vars=True)
        self.names = []
        with torch.no_grad():
            for name, dtype, shape in zip(info["names"], info["dtype_names"], info["shapes"], strict=True):
                value = self._group.receive()
                assert (str(value.dtype), list(value.shape)) == (f"torch.{dtype}", shape)
                own[name].copy_(value)
                self.names.append(name)

    def _complete(self, body: dict[str, Any]) -> dict[str, Any]:
        with self._lock:
            if self.dies_after is not None and len(self.drawn) >= self.dies_after:
                self.dies_after = None
                self.die()
            self.drawn.append(body)
            time.sleep(self.pause)
            if self.refuses:
                raise ValueError(self.refuses)
            given = dict(body)
            assert given.pop("model") == "model"
            assert given.pop("return_token_ids") is given.pop("return_tokens_as_token_ids") is True
            assert given.pop("repetition_penalty") == 1.0
            (prompt,) = given.pop("prompt")
            assert len(prompt) + given["max_tokens"] <= self.longest
            output = LLM.complete(self, prompt, SamplingParams(**given))  # type: ignore[arg-type]
        values = [next(iter(row.values())).logprob for row in output.logprobs]
        tokens = [f"token_id:{token}" for token in output.token_ids]
        logprobs = {
            "tokens": tokens,
            "token_logprobs": values,
            "top_logprobs": [{token: value} for token, value in zip(tokens, values, strict=True)],
        }
        choice = {"prompt_token_ids": prompt, "token_ids": output.token_ids, "logprobs": logprobs}
        return {"choices": [choice | {"finish_reason": output.finish_reason}]}


class _Handler(BaseHTTPRequestHandler):
    stand_in: StandIn
    protocol_version = "HTTP/1.1"

    def setup(self) -> None:
        super().setup()
        self.stand_in._connections.add(self.connection)

    def do_GET(self) -> None:
        found = self.stand_in.get(self.path.partition("?")[0])
        self._answer(404 if found is None else 200, found or {})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers.get("Content-Length") or 0)) or "{}")
        try:
            self._answer(200, self.stand_in.post(self.path, body))
        except ConnectionResetError:
            self.close_connection = True
        except ValueError as error:
            self._answer(400, {"error": {"message": str(error)}})

    def _answer(self, status: int, content: dict[str, Any]) -> None:
        text = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        with contextlib.suppress(OSError):
            self.wfile.write(text)

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing."""


def _module(name: str, **values: Any) -> ModuleType:
    module = ModuleType(name)
    vars(module).update(values)
    return module


def _forget_client() -> None:
    """TRL looks for vLLM when its modules are imported."""
    for name in [name for name in sys.modules if name.startswith("trl.generation")]:
        del sys.modules[name]


@pytest.fixture
def server_of(vllm, monkeypatch):
    """Makes a stand-in server for a model; TRL's client finds what it needs of vLLM."""
    install_client(monkeypatch)
    made: list[StandIn] = []

    def make(model: Path) -> StandIn:
        made.append(StandIn(model))
        return made[-1]

    yield make
    for one in made:
        one.kill()
    _forget_client()


def install_client(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let TRL's client find what it needs of vLLM, which is installed."""
    package = sys.modules["vllm"]
    package.__spec__, package.__version__, package.RequestOutput = ModuleSpec("vllm", None), VERSION, object
    for name, values in {
        "vllm.sampling_params": {"StructuredOutputsParams": object},
        "vllm.utils": {},
        "vllm.utils.network_utils": {"get_ip": lambda: "127.0.0.1"},
        "vllm.distributed": {},
        "vllm.distributed.weight_transfer": {},
        "vllm.distributed.weight_transfer.nccl_common": {"trainer_init": trainer_init},
        "vllm.distributed.weight_transfer.packed_tensor": {
            "packed_nccl_broadcast_producer": packed_nccl_broadcast_producer
        },
    }.items():
        monkeypatch.setitem(sys.modules, name, _module(name, **values))
    _forget_client()
    for module in (vllm_server, server_draw):
        monkeypatch.setattr(module, "POLL", 0.02)
    monkeypatch.setitem(GROUPS, 0, Group())  # the registry is empty again afterwards
