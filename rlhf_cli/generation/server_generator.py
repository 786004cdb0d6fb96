"""`VLLMServerGenerator`: draws completions with a vLLM server on GPUs of its own, with the weights of the policy.

The same contract as `VLLMGenerator`. The server may go away and come back: what it had not drawn yet is drawn again,
after it got the weights again.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import torch

from rlhf_cli.distributed.agreement import agreed
from rlhf_cli.distributed.process_group import ProcessGroup
from rlhf_cli.errors import ModelError, ServerLostError
from rlhf_cli.generation.engine_check import PROBE, check_probabilities, finite, probe_requests
from rlhf_cli.generation.generator import Completion, Progress, Request, ignore
from rlhf_cli.generation.policy import Policy
from rlhf_cli.generation.sampling import Sampling
from rlhf_cli.generation.server_draw import Draw, Drawn, PendingDraw
from rlhf_cli.generation.vllm_engine import shape_of
from rlhf_cli.generation.vllm_server import LostError, VLLMServer
from rlhf_cli.models.gathering import GatheredItems
from rlhf_cli.models.loading import context_length
from rlhf_cli.models.merged_weights import merged_weights
from rlhf_cli.models.sharding import is_sharded
from rlhf_cli.progress import warn
from rlhf_cli.settings.shared import GenerationSettings

_ATTEMPTS = 3
"""How often a server may be lost while it draws the same completions."""


class VLLMServerGenerator:
    """Completions by a vLLM server; implements `Generator` and `DrawsAhead`.

    A policy that trains sends its weights before every draw, and all processes of the run draw at the same time, also
    for no requests. So they do for a sharded policy, which sends its weights where the server has others. Other ones
    send them once, in `start`, or, with one process, when they are first used.

    Args:
        settings: section `generation` of the recipe, with `vllm_server`.
        policy: of the stage, whose architecture and size the server has.
        longest_prompt: in tokens.

    Attributes:
        version: of the server's vLLM, once `start` was called.
    """

    def __init__(self, settings: GenerationSettings, policy: Policy, *, longest_prompt: int) -> None:
        assert settings.vllm_server is not None
        self._server = VLLMServer(
            settings.vllm_server,
            model=policy.source.path,
            device=policy.source.device,
            patience=settings.server_timeout,
        )
        self._processes = ProcessGroup(policy.source.device)
        self._shape = shape_of(policy.config, policy.source.precision)
        self._longest_prompt, self.version = longest_prompt, ""
        self._holds: Callable[[], object] = lambda: None
        self._pending: PendingDraw | None = None

    def start(self, policy: Policy) -> None:
        """Connect to the server, hand the policy's weights over, and check that it computes the policy's probabilities.

        In a run of several processes all of them must call this at the same time.

        Raises:
            ServerLostError: it does not respond in time.
            ModelError: it cannot be used, or computes something else.
        """
        self._server.connect()
        length = min(context_length(policy.config), self._longest_prompt + policy.sampling.max_new_tokens)
        try:
            self.version = self._server.check(length=length)
        except LostError as error:
            raise self._gone(str(error)) from error
        requests = probe_requests(policy)
        drawn = self._drawn(policy, requests, PROBE, (), jointly=True)
        with policy.model() as model:
            found = [(one.ids, finite(one.logprobs)) for one in drawn]
            agreed(lambda: check_probabilities(policy, model, requests, found), self._processes)

    @torch.no_grad()
    def generate(
        self,
        policy: Policy,
        requests: Sequence[Request],
        *,
        progress: Progress = ignore,
        stop: Callable[[], object] = lambda: None,
    ) -> list[Completion]:
        """Draw one completion per request; see `Generator.generate`.

        Raises:
            ServerLostError: the server was lost and did not come back; raised in all processes if they draw together.
            ModelError: a prompt is empty, or the server refuses a request.
            DivergedError: the policy's log-probabilities are not finite.
        """
        drawn = self._drawn(policy, requests, policy.sampling, policy.stop_ids, progress=progress, stop=stop)
        return [_completion(policy, one) for one in drawn]

    def begin(self, policy: Policy, requests: Sequence[Request]) -> PendingDraw:
        """See `DrawsAhead`."""
        draw = None
        if self._hand_over(policy, jointly=True) is None:
            draw = self._draw(requests, policy.sampling, policy.stop_ids)
        self._pending = PendingDraw(requests, draw)
        return self._pending

    def wait(self, pending: PendingDraw, *, progress: Progress = ignore) -> None:
        """See `DrawsAhead`."""
        if pending.draw is not None:
            pending.drawn, reason = self._collected(pending.draw, progress)
            pending.draw = None
            if reason is not None:
                self._warn(reason)

    def finish(
        self, policy: Policy, pending: PendingDraw, *, progress: Progress = ignore
    ) -> tuple[list[Completion], bool]:
        """See `DrawsAhead`."""
        agreed(lambda: self.wait(pending, progress=progress), self._processes)
        if self._processes.any(pending.drawn is None):
            return self.generate(policy, pending.requests, progress=progress), False
        return [_completion(policy, one) for one in pending.drawn or ()], True

    def _drawn(
        self,
        policy: Policy,
        requests: Sequence[Request],
        sampling: Sampling,
        stop_ids: Iterable[int],
        *,
        progress: Progress = ignore,
        stop: Callable[[], object] = lambda: None,
        jointly: bool = False,
    ) -> list[Drawn]:
        """Draw all requests with the policy's weights; from the beginning where the server was lost meanwhile.

        Args:
            policy: whose weights draw.
            requests: N requests.
            sampling: how.
            stop_ids: tokens that end a completion.
            progress: is told of each completion.
            stop: may raise.
            jointly: whether all processes call this at the same time.
        """
        if not all(request.prompt_ids for request in requests):
            raise ModelError(
                "a prompt has no tokens, and this tokenizer adds none",
                hint='give the model something to start from: `--set data.prompt_template="Question: {prompt}"`',
            )
        if shape_of(policy.config, policy.source.precision) != self._shape:
            raise ModelError(
                f"the vllm server at {self._server.url} has a model of another architecture or size than "
                f"`{policy.source.path}`"
            )
        jointly = jointly or policy.may_change or policy.is_sharded or self._processes.count == 1
        drawn: list[Drawn] | None = None
        reason: str | None = None

        def draw() -> None:
            nonlocal drawn, reason
            if reason is None:  # else this process waits for the others, which may be drawing
                drawn, reason = self._collected(self._draw(requests, sampling, stop_ids), progress, stop)

        for _ in range(_ATTEMPTS):
            drawn, reason = None, self._hand_over(policy, jointly=jointly, stop=stop)
            agreed(draw, self._processes if jointly else None)
            is_lost = self._processes.any(drawn is None) if jointly else drawn is None
            if drawn is not None and not is_lost:
                return drawn
            reason = reason or "another process could not reach it"
            self._warn(reason)
        raise self._gone(f"it was lost {_ATTEMPTS} times while it drew the same completions: {reason}")

    def _gone(self, reason: str) -> ServerLostError:
        return ServerLostError(
            f"the vllm server at {self._server.url} was lost: {reason}",
            hint="its log says more; run the same command again to resume",
        )

    def _warn(self, reason: str) -> None:
        warn(f"the vllm server at {self._server.url} was lost: {reason}; its completions are drawn again")

    def _draw(self, requests: Sequence[Request], sampling: Sampling, stop_ids: Iterable[int]) -> Draw:
        return Draw(partial(self._server.complete, sampling=sampling, stop_ids=sorted(stop_ids)), requests)

    def _collected(
        self, draw: Draw, progress: Progress, stop: Callable[[], object] = lambda: None
    ) -> tuple[list[Drawn] | None, str | None]:
        """Return what was drawn, all of it with the weights that the server was given; or None, and why not."""
        failure = draw.collect(progress, stop)
        try:
            with self._server.explained("sampling"):
                if failure is not None:
                    raise failure
                if not self._server.is_ours():
                    raise LostError("it restarted, or another run gave it weights")
        except LostError as error:
            self._server.forget()
            return None, str(error)
        return [one for one in draw.drawn if one is not None], None

    def _hand_over(self, policy: Policy, *, jointly: bool, stop: Callable[[], object] = lambda: None) -> str | None:
        """Give the server the policy's weights, unless it has them and they cannot have changed.

        Returns:
            Why the server was lost meanwhile, in all processes; None if it has them.

        Raises:
            ServerLostError: it did not come back in time, or it has lost them and not all processes are here.
        """
        if self._pending is not None:  # what is on its way needs the weights that the server has
            self.wait(self._pending)
            self._pending = None
        server = self._server
        if not jointly:
            try:
                if server.is_ours():
                    return None
            except LostError as error:
                raise self._gone(str(error)) from error
            raise self._gone("it restarted without the policy's weights, or another run gave it weights")
        told = self._told(lambda: self._connected(policy, stop))
        if "needed" in told:
            told = self._told(lambda: self._sent(policy), lambda: self._gathered(policy))
        if "gone" in told:
            raise ServerLostError(told["gone"], hint=told["hint"])
        if "lost" in told:
            server.forget()
            return told["lost"]
        try:
            server.connect(stop)
        except ServerLostError as error:  # in this process alone, so that it is raised in all of them together
            return error.message
        server.weights = told["weights"]
        return None

    def _told(
        self, by_main: Callable[[], dict[str, str | None]], by_others: Callable[[], None] = lambda: None
    ) -> dict[str, Any]:
        """Return to all processes what process 0 found, while the others do something else; see `agreed`."""
        found: dict[str, str | None] = {}

        def work() -> None:
            if self._processes.is_main:
                found.update(by_main())
            else:
                by_others()

        agreed(work, self._processes)
        return self._processes.all_gather_object(found)[0]

    def _connected(self, policy: Policy, stop: Callable[[], object]) -> dict[str, str | None]:
        """Connect process 0, which alone sends weights; return whether the server needs them, or that it was lost."""
        server = self._server
        try:
            server.connect(stop)
            if policy.may_change or self._holds() is not policy or not server.is_ours():
                return {"needed": None}
        except LostError as error:
            return {"lost": str(error)}
        except ServerLostError as error:
            return {"gone": error.message, "hint": error.hint}
        return {"weights": server.weights}

    def _sent(self, policy: Policy) -> dict[str, str | None]:
        """Send the weights; return what came of it."""
        self._holds = lambda: None
        with policy.model() as model:
            weights = GatheredItems(merged_weights(model))
            try:
                self._server.take(weights)
            except LostError as error:
                return {"lost": str(error)}
            finally:
                if is_sharded(model):  # the other processes gather what was not sent, too
                    weights.finish()
        self._holds = weakref.ref(policy)
        return {"weights": self._server.weights}

    def _gathered(self, policy: Policy) -> None:
        """Take part in gathering the weights that process 0 sends."""
        if policy.is_sharded:
            with policy.model() as model:
                GatheredItems(merged_weights(model)).finish()


def _completion(policy: Policy, drawn: Drawn) -> Completion:
    return Completion(drawn.ids, policy.decode(drawn.ids), drawn.ids[-1] in policy.stop_ids, finite(drawn.logprobs))
