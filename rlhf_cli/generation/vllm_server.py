"""A vLLM server on GPUs of its own, through TRL's client: the only module that calls either.

docs/generation.md lists what it relies on. TRL, vLLM and requests are optional dependencies; this module is imported
where `generation.vllm_server` is set and `server_obstacle` found none.
"""

from __future__ import annotations

import json
import socket
import time
import uuid
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import requests
import torch
from requests.adapters import HTTPAdapter
from torch import Tensor

from rlhf_cli.distributed.watchdog import beat
from rlhf_cli.errors import ModelError, RLHFError, ServerLostError
from rlhf_cli.generation.generator import Request
from rlhf_cli.generation.sampling import Sampling
from rlhf_cli.generation.server_draw import Drawn
from rlhf_cli.generation.vllm_engine import SUPPORTED
from rlhf_cli.http_client.addresses import network_error
from rlhf_cli.memory import is_out_of_memory
from rlhf_cli.progress import warn

START = (
    "VLLM_SERVER_DEV_MODE=1 vllm serve {model} --weight-transfer-config {transfer} --logprobs-mode processed_logprobs"
)
"""How a server is started that can take our weights."""

_CONNECTIONS = 256
_HEALTH_SECONDS = 5.0
"""Longest answer to a question of state."""
POLL = 1.0
"""Seconds between two questions whether a server is up."""
_CLEARINGS = 10
"""Attempts to clear the cache: blocks of the last completions may be freed a moment later."""
CHUNK_BYTES = 2**29
"""Weights are announced and sent in parts of about this size, so that no copy of the model is made."""


def start_command(model: str) -> str:
    """Return the command that starts a server for a policy."""
    return START.format(model=model, transfer="'" + json.dumps({"backend": "nccl"}) + "'")


class LostError(Exception):
    """The server did not answer, or it is not the one that took the weights; it may come back."""


class _UnusableError(Exception):
    """The server answered with what cannot be used."""


class VLLMServer:
    """One server. It is used by `connect`, `take`, then any number of `complete`.

    Args:
        url: where it listens.
        model: that it has to serve, for messages.
        device: of the weights that it takes.
        patience: seconds that one request may take, and that a server may be away.

    Attributes:
        weights: name of the weights that it was given; "" before the first.
    """

    def __init__(self, url: str, *, model: str, device: torch.device, patience: float) -> None:
        self.url, self.weights = url.rstrip("/"), ""
        self._model, self._device, self._patience = model, device, patience
        self._client: Any = None

    def connect(self, stop: Callable[[], object] = lambda: None) -> None:
        """Return once the server is up and connected to; waits up to `patience` seconds.

        Raises:
            ServerLostError: it did not come up in time.
        """
        self._wait(stop)
        if self._client is None:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # TRL names the versions that it was tested with; `check` does so too
                from trl.generation.vllm_client import VLLMClient

                self._client = VLLMClient(base_url=self.url)
            adapter = _Adapter(self._patience, self._abort)
            for scheme in ("http://", "https://"):
                self._client.session.mount(scheme, adapter)

    def _wait(self, stop: Callable[[], object]) -> None:
        began, told = time.monotonic(), False
        while (reason := self.trouble()) is not None:
            if time.monotonic() - began >= self._patience:
                raise ServerLostError(
                    f"the vllm server at {self.url} has not responded for {self._patience:g} s "
                    f"(`generation.server_timeout`): {reason}",
                    hint=f"start it with `{start_command(self._model)}`, then run the same command again; it resumes",
                )
            if not told:
                warn(f"the vllm server at {self.url} does not respond ({reason}); waiting up to {self._patience:g} s")
                told = True
            beat()
            stop()
            time.sleep(min(POLL, self._patience))

    def trouble(self) -> str | None:
        """Return why the server cannot be used now; None if it can."""
        try:
            status = requests.get(f"{self.url}/health", timeout=_HEALTH_SECONDS).status_code
        except requests.RequestException as error:
            found = network_error(error)
            return str(found.strerror) if isinstance(found, OSError) and found.strerror else type(error).__name__
        return None if status == requests.codes.ok else f"status {status}"

    def forget(self) -> None:
        """Drop the connection: the server has gone, or is another one."""
        if self._client is not None:
            self._client.close_communicator()
        self._client = None

    def check(self, *, length: int) -> str:
        """Return the server's version of vLLM.

        Args:
            length: longest sequence, in tokens, that it has to hold.

        Raises:
            ModelError: the server is of another version, or was started with other options than those we need.
            LostError: it does not answer.
        """
        version = str(self._asked("version").get("version"))
        command = start_command(self._model)
        if not version.startswith(f"{SUPPORTED}."):
            raise ModelError(
                f"the vllm server at {self.url} is of version {version}, and only {SUPPORTED} is supported",
                hint=f"install it with `pip install 'vllm=={SUPPORTED}.*'`",
            )
        config = self._asked("server_info?config_format=json", seconds=self._patience).get("vllm_config")
        if config is None:
            raise ModelError(
                f"the vllm server at {self.url} cannot take weights: it is not in development mode",
                hint=f"start it with `{command}`",
            )
        transfer = (config["weight_transfer_config"] or {}).get("backend")
        mode, longest = config["model_config"]["logprobs_mode"], config["model_config"]["max_model_len"]
        if transfer != "nccl" or mode != "processed_logprobs":
            raise ModelError(
                f"the vllm server at {self.url} was started with the weight transfer `{transfer}` and the logprobs "
                f"mode `{mode}`, not `nccl` and `processed_logprobs`",
                hint=f"start it with `{command}`",
            )
        if longest < length:
            raise ModelError(
                f"the vllm server at {self.url} holds sequences of {longest:,} tokens, and {length:,} are needed",
                hint=f"start it with `--max-model-len {length}`",
            )
        return version

    def take(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Give the server weights, named as in a checkpoint of the model, and name them in `weights`.

        What the old weights left in the prefix cache is forgotten. No completion may be running.

        Raises:
            LostError: the server was lost meanwhile.
            ModelError: it refuses them.
        """
        with self.explained("taking the policy's weights"), self._on_device():
            if self._client.communicator is None:
                self._client.group_port = _free_port()
                self._client.init_communicator(device="cuda")
            elif not self.is_ours():  # our connection is to one that has gone
                raise LostError("it restarted, or another run gave it weights")
            self._rename()  # from here on the weights are not those of before
            with self._client.weight_update():
                for part in _parts(weights):
                    metadata = [
                        (name, str(value.dtype).removeprefix("torch."), list(value.shape)) for name, value in part
                    ]
                    self._client.update_named_params(metadata, iter(part))
            self._clear_cache()
            self._rename()

    def _rename(self) -> None:
        """Give the weights a new name, in the server and here."""
        name = uuid.uuid4().hex
        self._posted("update_weight_version", new_version=name)
        self.weights = name

    def _clear_cache(self) -> None:
        """Let the server forget what it computed with old weights."""
        for _ in range(_CLEARINGS):
            if self._posted("reset_prefix_cache")["success"]:
                return
            time.sleep(POLL)
        raise _UnusableError("the prefix cache cannot be cleared, since other requests are running")

    def is_ours(self) -> bool:
        """Whether the server still has the weights that it was given last: it did not restart, and nobody else uses
        it."""
        return bool(self.weights) and self._asked("weight_info").get("weight_version") == self.weights

    def complete(self, request: Request, sampling: Sampling, stop_ids: list[int]) -> Drawn:
        """Draw one completion. May be called from several threads.

        Raises:
            Exception: of the client; see `explained`.
        """
        found = self._client.generate(
            [list(request.prompt_ids)],
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            max_tokens=sampling.max_new_tokens,
            logprobs=0,  # of the drawn token alone
            # What ends a completion is in `stop_ids`, all of it.
            generation_kwargs={"seed": request.seed, "stop_token_ids": stop_ids, "ignore_eos": True},
        )
        ids = found["completion_ids"][0]
        if len(ids) < sampling.max_new_tokens and (not ids or ids[-1] not in stop_ids):
            raise _UnusableError(f"a completion ended after {len(ids)} tokens without a stop token")
        values = [row[0] for row in found["logprobs"][0]]
        return Drawn(ids, [float("nan") if value is None else float(value) for value in values])

    @contextmanager
    def explained(self, what: str) -> Iterator[None]:
        """Turn what the client raises into `LostError`, or into a `ModelError` where the server is in order."""
        try:
            yield
        except (LostError, RLHFError):
            raise
        except Exception as error:
            if is_out_of_memory(error):  # of ours, merging an adapter
                raise
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
            if isinstance(error, requests.ConnectionError) or self._has_gone():
                raise LostError(reason) from error
            timed_out = isinstance(error, requests.Timeout)
            raise ModelError(
                f"the vllm server at {self.url} failed while {what}: {reason}",
                hint="raise `generation.server_timeout`, the longest time of a request" if timed_out
                else f"its log says more; it must be started with `{start_command(self._model)}`",
            ) from error  # fmt: skip

    def _has_gone(self) -> bool:
        """Whether the server is down, or came back without the weights that it was given."""
        if self.trouble() is not None:
            return True
        try:
            return bool(self.weights) and not self.is_ours()
        except LostError:
            return True

    def _asked(self, path: str, *, seconds: float = _HEALTH_SECONDS) -> dict[str, Any]:
        try:
            return self._client.session.get(f"{self.url}/{path}", timeout=seconds).json()
        except (requests.RequestException, ValueError) as error:
            raise LostError(f"no answer to /{path}: {type(error).__name__}") from error

    def _posted(self, path: str, **body: str) -> dict[str, Any]:
        response = self._client.session.post(f"{self.url}/{path}", json=body)
        response.raise_for_status()
        return response.json()

    def _on_device(self) -> AbstractContextManager[object]:
        return torch.cuda.device(self._device) if self._device.type == "cuda" else nullcontext()

    def _abort(self) -> None:
        """End a broadcast whose receiver has failed: NCCL would wait for it without end."""
        if self._client is not None and self._client.communicator is not None:
            self._client.communicator.destroy()


class _Adapter(HTTPAdapter):
    """Gives every request a limit of time, which TRL's client does not, and leaves retries to the caller.

    Args:
        seconds: the limit.
        abort: is called where the server fails to take weights.
    """

    def __init__(self, seconds: float, abort: Callable[[], object]) -> None:
        super().__init__(pool_maxsize=_CONNECTIONS)
        self._seconds, self._abort = seconds, abort

    def send(self, request: Any, *arguments: Any, **options: Any) -> Any:
        """Send a request."""
        options["timeout"] = options.get("timeout") or self._seconds
        takes_weights, is_done = request.url.endswith("/update_weights"), False
        try:
            response = super().send(request, *arguments, **options)
            is_done = response.ok
        finally:
            if takes_weights and not is_done:
                self._abort()
        return response


def _parts(weights: Iterable[tuple[str, Tensor]]) -> Iterator[list[tuple[str, Tensor]]]:
    """Weights in parts of about `CHUNK_BYTES`."""
    part: list[tuple[str, Tensor]] = []
    size = 0
    for name, value in weights:
        part.append((name, value))
        size += value.numel() * value.element_size()
        if size >= CHUNK_BYTES:
            yield part
            part, size = [], 0
    if part:
        yield part


def _free_port() -> int:
    """Return a port on which this process can wait for the server's workers."""
    with socket.socket() as found:
        found.bind(("", 0))
        return found.getsockname()[1]
