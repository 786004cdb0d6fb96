"""`VLLMGenerator`: draws completions with vLLM on the GPU of the policy, which hands its weights over in memory.

The same contract as `TorchGenerator`: prompts are token ids, each completion has its own seed, tokens are drawn from
the policy's distribution at the sampling temperature, and the stop tokens of the policy end a completion. Only the
arithmetic is another: vLLM rounds differently, and holds adapters merged in its own precision. So each completion keeps
the log-probabilities under which it was drawn, from which PPO corrects for the difference (docs/generation.md).
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from rlhf_cli.distributed.agreement import agreed
from rlhf_cli.distributed.process_group import ProcessGroup
from rlhf_cli.distributed.ranks import world_size
from rlhf_cli.errors import ModelError, RLHFError, SharedEngineError, is_raised_here
from rlhf_cli.generation.engine_check import PROBE, TORCH, check_probabilities, probe_requests, sampled_logprobs
from rlhf_cli.generation.engine_group import EngineGroup, GroupRequests
from rlhf_cli.generation.generator import Completion, Request
from rlhf_cli.generation.policy import Policy
from rlhf_cli.generation.tensor_parallel import indivisible
from rlhf_cli.generation.vllm_engine import SUPPORTED, Engine, has_architecture, installed_version, shape_of
from rlhf_cli.memory import is_out_of_memory, machine_memory
from rlhf_cli.models.gathering import GatheredItems
from rlhf_cli.models.loading import context_length
from rlhf_cli.models.merged_weights import merged_weights
from rlhf_cli.models.quantize import quantized
from rlhf_cli.models.sharding import class_of, is_sharded
from rlhf_cli.settings.shared import GenerationSettings

_LOWEST_TEMPERATURE = 0.01
"""vLLM raises lower temperatures to this."""


@dataclass(frozen=True)
class Obstacle:
    """Why vLLM cannot draw a policy's completions.

    Attributes:
        reason: a clause.
        fix: how to remove it.
    """

    reason: str
    fix: str = TORCH


def obstacle_of_size(policy: Policy, settings: GenerationSettings) -> Obstacle | None:
    """Return why a policy cannot be divided as the settings say, or vLLM's share of the device's memory cannot hold its
    weights; None if nothing speaks against it. Loads the weights.

    The processes of an engine have whole weights together, also those of a sharded policy.
    """
    size, share = settings.tensor_parallel_size, settings.gpu_memory_utilization
    if (reason := indivisible(policy.config.to_dict(), size)) is not None:
        return Obstacle(reason, f"choose another `generation.tensor_parallel_size`, or {TORCH}")
    with policy.model() as model:
        needed = model.num_parameters() * policy.source.precision.itemsize / size
    memory = machine_memory(policy.source.device.type)
    if needed <= share * memory:
        return None
    among = "" if size == 1 else f" on each of {size} GPUs"
    return Obstacle(
        f"its weights take {needed / 1e9:,.1f} GB{among}, and `generation.gpu_memory_utilization: {share:g}` of "
        f"{memory / 1e9:,.1f} GB is less",
        "give vllm a larger share, divide the weights with `generation.tensor_parallel_size`, use a server "
        f"(`generation.vllm_server`), or {TORCH}",
    )


def obstacle(policies: Sequence[Policy]) -> Obstacle | None:
    """Return why vLLM cannot draw the completions of a stage's policies here; None if it can, as far as is known
    without their weights."""
    policy, version = policies[0], installed_version()
    if policy.source.device.type != "cuda":
        return Obstacle(f"the device is `{policy.source.device.type}`, and vllm is supported on CUDA only")
    if version is None:
        return Obstacle("vllm is not installed", "see docs/generation.md for an environment with vllm")
    if not version.startswith(f"{SUPPORTED}."):
        return Obstacle(
            f"vllm {version} is installed, and only {SUPPORTED} is supported",
            f"install it with `pip install 'vllm=={SUPPORTED}.*'`",
        )
    if policy.config.is_encoder_decoder:
        return Obstacle("the model is an encoder-decoder, which vllm does not support")
    if policy.source.trust_remote_code:
        return Obstacle("the model has code of its own, which vllm does not know")
    if policy.sampling.temperature < _LOWEST_TEMPERATURE:
        return Obstacle(f"vllm samples at a temperature of {_LOWEST_TEMPERATURE:g} or more")
    if len({shape_of(one.config, one.source.precision) for one in policies}) > 1:
        return Obstacle("the models differ in their architecture or size, and an engine holds one model")
    return None


def obstacle_of_weights(policy: Policy) -> Obstacle | None:
    """Return why vLLM cannot take the weights of a policy for which `obstacle` found nothing; None if it can.

    Loads the weights, those of a sharded policy in all processes together.
    """
    with policy.model() as model:
        if quantized(model) != "none":
            return Obstacle("the policy's weights are quantized, and quantized weights cannot be handed to vllm")
        if not has_architecture(name := class_of(model).__name__):
            return Obstacle(f"vllm {installed_version()} has no implementation of {name}")
    return None


class VLLMGenerator:
    """Completions by vLLM; implements `Generator`.

    A process can have one engine, so all generators of a process share it. It sleeps while the policy trains, and after
    `Policy.release`; its memory is then free but for CUDA graphs. Weights are handed over before the first completion
    and after every sleep.

    With `generation.tensor_parallel_size` several processes share an engine. They draw their requests together, so all
    of them call `generate` equally often, also for no requests.

    Of a sharded policy every engine gets the whole weights, gathered one layer after another, so all processes of the
    run draw at the same time, also for no requests. An engine that fails while it takes weights or is checked is an
    error in all of them. Where others wait in the middle of a message, a process that fails ends, and the launcher ends
    the others: while weights are gathered, while engines start, which is a message to all, and in a shared engine.

    Args:
        settings: section `generation` of the recipe.
        longest_prompt: in tokens.
    """

    def __init__(self, settings: GenerationSettings, *, longest_prompt: int) -> None:
        self._settings, self._longest_prompt = settings, longest_prompt
        self._group = EngineGroup(settings.tensor_parallel_size)
        self._checked: weakref.WeakSet[Policy] = weakref.WeakSet()

    def start(self, policy: Policy) -> None:
        """Make the engine, hand the policy's weights over, and check that it computes the policy's probabilities.

        In a run of several processes all of them must call this at the same time.

        Raises:
            ModelError: vLLM cannot be started, or computes something else.
            SharedEngineError: likewise, while other processes wait for this one.
        """
        _ = self._group.members  # made by all processes of the run together, not between the steps of an engine
        try:
            self._loaded(policy)
        except SharedEngineError:
            raise  # the GPU may wait for those of the others: nothing may wait for it
        except RLHFError:
            for engine in engines:
                engine.sleep()  # it takes no memory from what is used in its place
            raise
        self._rest(policy)

    @torch.no_grad()
    def generate(
        self,
        policy: Policy,
        requests: Sequence[Request],
        *,
        progress: Callable[[int], object] = lambda count: None,
        stop: Callable[[], object] = lambda: None,
    ) -> list[Completion]:
        """Draw one completion per request; see `Generator.generate`.

        Raises:
            ModelError: a prompt is empty, or vLLM fails.
            SharedEngineError: vLLM fails, and the processes that share the engine wait for this one.
            DivergedError: the policy's log-probabilities are not finite.
        """
        gathered = self._group.gather(requests, stop)
        if not gathered.every and not policy.is_sharded:
            return []
        if not all(request.prompt_ids for request in gathered.every):
            raise ModelError(
                "a prompt has no tokens, and this tokenizer adds none",
                hint='give the model something to start from: `--set data.prompt_template="Question: {prompt}"`',
            )
        longest = max((len(request.prompt_ids) for request in gathered.every), default=0)
        engine = self._loaded(policy, longest + policy.sampling.max_new_tokens)
        try:
            outputs = []
            if gathered.every:
                with self._explained("sampling", is_awaited=self.is_shared):
                    outputs = self._group.draw(
                        engine, gathered, policy.sampling, policy.stop_ids, progress=progress, stop=stop
                    )
        except SharedEngineError:
            raise  # as in `start`
        except BaseException:
            self._rest(policy)
            raise
        self._rest(policy)
        return [_completion(policy, output) for output in outputs]

    @property
    def is_shared(self) -> bool:
        """Whether other processes draw with the engine of this one, so that none of them can draw alone."""
        return self._group.size > 1

    def _loaded(self, policy: Policy, needed: int = 0) -> Engine:
        """Return the engine with the weights of a policy, awake."""
        with policy.model() as model:
            processes = ProcessGroup(policy.source.device) if is_sharded(model) else self._group.members
            agreed(lambda: self._make(policy, model, needed), processes)
            (engine,) = engines
            if engine.is_asleep or engine.holds() is not policy:
                agreed(lambda: self._hand_over(model, engine), processes)
                engine.holds = weakref.ref(policy)
            if policy not in self._checked:
                self._check(policy, model, engine, processes)
                policy.at_release(engine.sleep)
                self._checked.add(policy)
        return engine

    def _hand_over(self, model: PreTrainedModel, engine: Engine) -> None:
        """Let the engine take the weights of a model.

        Of a sharded one all processes gather all weights, also those that an engine does not take. An error of
        gathering stays what it is, and so ends this process at once: see `models.gathering`.
        """
        weights = GatheredItems(merged_weights(model))
        failure: ModelError | None = None
        try:
            with self._explained("taking the policy's weights"):
                engine.load(weights)
        except ModelError as error:
            failure = error
        if is_sharded(model):
            weights.finish()
        if failure is not None:
            raise failure

    def _make(self, policy: Policy, model: PreTrainedModel, needed: int) -> None:
        """Make the engine of this process if there is none; raise `ModelError` if it cannot serve the policy."""
        dtype, longest = policy.source.precision, context_length(policy.config)
        shape = shape_of(policy.config, dtype)
        length = min(longest, max(needed, self._longest_prompt + policy.sampling.max_new_tokens))
        if not engines:
            with self._explained("starting", is_awaited=world_size() > 1):
                engines.append(Engine(model, self._settings, shape=shape, dtype=dtype, length=length, longest=longest))
        (engine,) = engines
        if engine.shape != shape or engine.length < length:
            raise ModelError(
                "vllm already runs in this process for another model or shorter sequences, and a process can have one "
                "engine",
                hint=f"run this stage by a command of its own, or {TORCH}",
            )

    def _rest(self, policy: Policy) -> None:
        """Give the memory back while the policy trains."""
        for engine in engines if policy.may_change else ():
            engine.sleep()

    def _check(self, policy: Policy, model: PreTrainedModel, engine: Engine, processes: ProcessGroup | None) -> None:
        requests, drawn = probe_requests(policy), list[tuple[list[int], list[float]]]()

        def draw() -> None:
            with self._explained("sampling", is_awaited=self.is_shared):
                outputs = self._group.draw(engine, GroupRequests(requests, slice(None)), PROBE, ())
            drawn.extend((list(one.token_ids), sampled_logprobs(one)) for one in outputs)

        agreed(draw, processes)
        agreed(lambda: check_probabilities(policy, model, requests, drawn), processes)

    @contextmanager
    def _explained(self, what: str, *, is_awaited: bool = False) -> Iterator[None]:
        """Turn what vLLM raises into an error that says what to do; `is_awaited` while other processes wait for it."""
        try:
            yield
        except Exception as error:
            if isinstance(error, RLHFError) or (is_raised_here(error) and not is_out_of_memory(error)):
                raise
            reason = (str(error).strip().splitlines() or ["no message"])[0]
            share = self._settings.gpu_memory_utilization
            kind = SharedEngineError if is_awaited else ModelError
            raise kind(
                f"vllm failed while {what}: {type(error).__name__}: {reason}",
                hint=f"{TORCH}, or, if it is about memory, another `generation.gpu_memory_utilization` than {share:g}",
            ) from error


engines: list[Engine] = []
"""The engine of this process, if it has been made: vLLM's sleep mode allows one."""


def _completion(policy: Policy, output: Any) -> Completion:
    if output.finish_reason not in ("stop", "length"):
        raise ModelError(f"vllm ended a completion for the reason `{output.finish_reason}`", hint=TORCH)
    ids = list(output.token_ids)
    return Completion(ids, policy.decode(ids), output.finish_reason == "stop", sampled_logprobs(output))
