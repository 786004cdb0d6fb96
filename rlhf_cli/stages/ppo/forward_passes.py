"""Forward passes of policy, reference and critic over the completions of one PPO step.

With several processes, each one samples, scores and passes its share. The results are small (ids, text, one number per
token), so every process receives all of them and computes the rest of the step as a single process would.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import groupby
from typing import Protocol, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from rlhf_cli.data.records import Prompt
from rlhf_cli.distributed.process_group import ProcessGroup
from rlhf_cli.distributed.watchdog import beat
from rlhf_cli.errors import DivergedError
from rlhf_cli.generation.logprobs import Projection, TokenLogprobs, completion_hidden
from rlhf_cli.generation.sequence_batch import SequenceBatch
from rlhf_cli.models.backbone import reads_groups
from rlhf_cli.models.sharding import computing, equal_passes, is_sharded
from rlhf_cli.stages.ppo.models import PPOModels
from rlhf_cli.training.micro_batches import MicroBatches

Result = TypeVar("Result")


@dataclass(frozen=True)
class Completions:
    """Completions sampled in one step, as ids and as text.

    Attributes:
        prompts: N prompts.
        prompt_ids: N lists of prompt token ids.
        completion_ids: N lists of completion token ids, with the end token if the completion has one.
        texts: N completions as text, as people and rewards read them.
        finished: N flags, True if the completion finished with an end token.
        scores: (N,) combined rewards before scaling; not finite where a reward was not finite.
        parts: reward name -> (N,) its scores before weighting.
        faults: one message per reward with scores that are not finite, naming the first such completion.
        sampler_logprobs: N lists of log-probabilities under which the tokens were drawn; None if these are by
            construction those of the policy.
        is_stale: whether the policy was updated since it began to draw them.
    """

    prompts: list[Prompt]
    prompt_ids: list[list[int]]
    completion_ids: list[list[int]]
    texts: list[str]
    finished: list[bool]
    scores: Tensor
    parts: Mapping[str, Tensor] = field(default_factory=dict)
    faults: Sequence[str] = ()
    sampler_logprobs: list[list[float]] | None = None
    is_stale: bool = False

    @property
    def lengths(self) -> Tensor:
        """Tokens per completion, end token included: (N,)."""
        return torch.tensor([len(ids) for ids in self.completion_ids])

    @property
    def finished_flags(self) -> Tensor:
        """`finished` as a tensor: (N,) bool."""
        return torch.tensor(self.finished)

    def tokens(self, row: int) -> int:
        """Return the tokens of a prompt and its completion."""
        return len(self.prompt_ids[row]) + len(self.completion_ids[row])

    def __len__(self) -> int:
        return len(self.prompts)


@dataclass(frozen=True)
class RolloutTensors:
    """Outputs of the models on a step's completions before its update; all (N, T), 0 on padding, without gradient.

    Attributes:
        logprobs: log-probabilities under the policy, in nats.
        reference_logprobs: log-probabilities under the SFT model, in nats.
        values: values predicted by the critic, in units of reward.
        entropy: entropy of the policy's next-token distribution, in nats.
        is_completion: bool, True on completion tokens, False on padding.
    """

    logprobs: Tensor
    reference_logprobs: Tensor
    values: Tensor
    entropy: Tensor
    is_completion: Tensor


class TokenPairs(Protocol):
    """N prompts and completions as token ids; no list is empty."""

    @property
    def prompt_ids(self) -> Sequence[list[int]]:
        """N lists of prompt token ids."""
        ...

    @property
    def completion_ids(self) -> Sequence[list[int]]:
        """N lists of completion token ids."""
        ...


class ForwardPasses:
    """Runs policy, reference and critic over completions, in micro-batches.

    Args:
        models: policy, reference and critic.
        autocast: returns the autocast context for the passes.
        micro_batch_size: completions per pass; affects memory and speed only.
        micro_batch_tokens: tokens per pass instead; None is by `micro_batch_size`.
        temperature: logits are divided by it, as in sampling.
        trains_entropy: the loss has a term with the entropy.
        processes: processes that share the passes; by default this process alone.

    Attributes:
        is_sharded: whether the processes divide the models among themselves.
        count: called after the work of each micro-batch with its tokens, prompts included, times the models that passed
            over them, for progress.
    """

    def __init__(
        self,
        models: PPOModels,
        *,
        autocast: Callable[[], AbstractContextManager[object]],
        micro_batch_size: int,
        micro_batch_tokens: int | None = None,
        temperature: float,
        trains_entropy: bool = False,
        processes: ProcessGroup | None = None,
    ) -> None:
        self.models = models
        self.autocast = autocast
        self.temperature = temperature
        self._trains_entropy = trains_entropy
        self.processes = processes or ProcessGroup()
        self.count: Callable[[int], object] = lambda tokens: None
        with models.policy() as model:
            self._reader = model  # only read: device, attention and configuration are those of policy and critic
        self.is_sharded = is_sharded(model)
        self._cuts = MicroBatches(
            micro_batch_size, micro_batch_tokens, setting="ppo.micro_batch_tokens", repeats=not self.is_sharded
        )
        self.device = self._reader.device
        self._grouped = reads_groups(self._reader)
        self._of_step: Completions | None = None
        self._batches: dict[tuple[int, ...], SequenceBatch] = {}

    @property
    def passing(self) -> int:
        """Models that pass over the completions of a step before its update."""
        return 2 if self.models.critic_is_head else 3

    def batch(self, texts: TokenPairs, rows: Sequence[int]) -> SequenceBatch:
        """Batch some of the completions in the layout that the policy reads; reference and critic read the same.

        The batches of a step's completions, which do not change, are kept until the next step: with one minibatch, all
        epochs read the same.
        """
        if not isinstance(texts, Completions):
            return self._new_batch(texts, rows)
        if texts is not self._of_step:
            self._of_step, self._batches = texts, {}
        if (key := tuple(rows)) not in self._batches:
            self._batches[key] = self._new_batch(texts, rows)
        batch = self._batches[key]
        # A layout holds the masks that attention made of it, which are large: each pass gets its own.
        return batch if batch.layout is None else replace(batch, layout=replace(batch.layout))

    def _new_batch(self, texts: TokenPairs, rows: Sequence[int]) -> SequenceBatch:
        prompts, completions = ([ids[row] for row in rows] for ids in (texts.prompt_ids, texts.completion_ids))
        return SequenceBatch.for_model(self._reader, prompts, completions)

    def micro_batches(self, completions: TokenPairs, rows: Sequence[int], models: int = 1) -> Iterator[list[int]]:
        """Yield this process's share of `rows` in micro-batches, over which so many models pass.

        Models that read a shared prompt once get completions of the same prompt together. Other models get completions
        of similar length together, to keep padding low.
        """

        def sort_key(row: int) -> tuple[object, ...]:
            prompt, completion = completions.prompt_ids[row], completions.completion_ids[row]
            if self._grouped:
                return len(prompt), prompt, len(completion), row
            return len(prompt) + len(completion), row

        ordered = sorted(rows, key=sort_key)
        # At most one process's share per micro-batch, so that every process gets work if there is enough of it.
        share = -(-len(ordered) // self.processes.count)
        measure = partial(self._tokens, completions)
        for part in self._cuts.own(self.processes.shard(self._cuts.cut(ordered, measure, most=share)), measure):
            yield part
            beat()
            if isinstance(completions, Completions):  # not the demonstrations of PPO-ptx
                self.count(models * sum(map(completions.tokens, part)))

    def passes(
        self, completions: TokenPairs, rows: Sequence[int], models: int = 1
    ) -> Iterator[tuple[list[int], float]]:
        """Yield what `micro_batches` yields with weight 1; of sharded models also fillers, see `equal_passes`."""
        if not self.is_sharded:
            yield from ((part, 1.0) for part in self.micro_batches(completions, rows, models))
            return
        own = list(self.micro_batches(completions, rows, models))
        yield from equal_passes(self._reader, own, [rows[0]], self.processes)

    def _tokens(self, completions: TokenPairs, rows: Sequence[int]) -> int:
        """Count the tokens that the policy reads in a pass over these rows."""
        pairs = [(completions.prompt_ids[row], completions.completion_ids[row]) for row in rows]
        if self._grouped:  # a prompt is read once; micro-batches are ordered by prompt
            shared = sum(len(prompt) for prompt, _ in groupby(pairs, key=lambda pair: pair[0]))
            return shared + sum(len(completion) for _, completion in pairs)
        return len(pairs) * max(len(prompt) + len(completion) for prompt, completion in pairs)

    def repeated(self, work: Callable[[], Result], undo: Callable[[], object] = lambda: None) -> Result:
        """Return `work()`, repeated in smaller micro-batches if it gets no memory; see `MicroBatches.run`."""
        return self._cuts.run(work, undo)

    def logprobs(
        self, model: PreTrainedModel, batch: SequenceBatch, *, temperature: float | None = None
    ) -> TokenLogprobs:
        """Compute log-probability and entropy per completion token: (N, T), in nats.

        Gradient flows unless the caller disables it. `temperature` defaults to that of the constructor.
        """
        temperature = self.temperature if temperature is None else temperature

        def compute() -> tuple[Tensor, Tensor]:
            with self.autocast():
                hidden = completion_hidden(model, batch)
                found = self._token_logprobs(model, hidden, batch, temperature)
            return found.logprobs, found.entropy

        return TokenLogprobs(*computing(model, compute))

    def values(self, model: PreTrainedModel, batch: SequenceBatch, *, trains_head_only: bool = False) -> Tensor:
        """Predict the value before each completion token: (N, T), 0 on padding.

        Gradient flows unless the caller disables it; with `trains_head_only` it ends at the value head.
        """
        with self.autocast(), torch.set_grad_enabled(torch.is_grad_enabled() and not trains_head_only):
            hidden = computing(model, lambda: completion_hidden(model, batch))
        return self._values_of(hidden, batch)

    def logprobs_and_values(self, model: PreTrainedModel, batch: SequenceBatch) -> tuple[TokenLogprobs, Tensor]:
        """Compute what `logprobs` and `values` compute, from one pass of the model that both read."""

        def compute() -> tuple[Tensor, Tensor, Tensor]:
            with self.autocast():
                hidden = completion_hidden(model, batch)
                found = self._token_logprobs(model, hidden, batch, self.temperature)
            return found.logprobs, found.entropy, hidden

        logprobs, entropy, hidden = computing(model, compute)
        return TokenLogprobs(logprobs, entropy), self._values_of(hidden, batch)

    def _token_logprobs(
        self, model: PreTrainedModel, hidden: Tensor, batch: SequenceBatch, temperature: float
    ) -> TokenLogprobs:
        return Projection.of(model).token_logprobs(
            hidden, batch, temperature=temperature, trains_entropy=self._trains_entropy
        )

    def _values_of(self, hidden: Tensor, batch: SequenceBatch) -> Tensor:
        predicted = self.models.value_head(hidden.float()).squeeze(-1)
        return predicted.masked_fill(~batch.is_completion, 0.0)

    def _policy_and_values(self, batch: SequenceBatch) -> tuple[TokenLogprobs, Tensor]:
        with self.models.policy() as model:
            if self.models.critic_is_head:
                return self.logprobs_and_values(model, batch)
            policy = self.logprobs(model, batch)
        with self.models.critic() as model:
            return policy, self.values(model, batch)

    @torch.no_grad()
    def rollout_tensors(self, completions: Completions) -> RolloutTensors:
        """Run each model once over all completions; each process takes its share and receives every result.

        Raises:
            DivergedError: a log-probability or a value is not finite.
        """
        longest = max(len(ids) for ids in completions.completion_ids)
        rows = {
            name: torch.zeros(len(completions), longest, device=self.device)
            for name in ("policy", "ref", "value", "entropy")
        }
        self.repeated(lambda: self._fill(rows, completions))
        # One process filled each row and it is 0 on the others, so the sum is exact.
        self.processes.all_reduce(list(rows.values()))
        is_completion = (torch.arange(longest) < completions.lengths.unsqueeze(1)).to(self.device)
        are_finite = torch.stack([torch.isfinite(tensor).all() for tensor in rows.values()]).tolist()
        for name, is_finite in zip(rows, are_finite, strict=True):
            if not is_finite:
                raise DivergedError(f"the {name} pass over a step's completions gave values that are not finite")
        return RolloutTensors(rows["policy"], rows["ref"], rows["value"], rows["entropy"], is_completion)

    def _fill(self, rows: dict[str, Tensor], completions: Completions) -> None:
        """Run each model over this process's completions and put what it gives into `rows`."""
        found: dict[str, list[Tensor]] = {name: [] for name in rows}
        order: list[int] = []
        for part, weight in self.passes(completions, range(len(completions)), self.passing - 1):
            policy, values = self._policy_and_values(self.batch(completions, part))
            if not weight:
                continue
            for name, tensor in (("policy", policy.logprobs), ("value", values), ("entropy", policy.entropy)):
                found[name].append(tensor)
            order += part
        if not order and not self.is_sharded:
            return
        with self.models.reference() as model:  # once: its weights may have to be copied to the device
            for part, weight in self.passes(completions, range(len(completions))):
                logprobs = self.logprobs(model, self.batch(completions, part)).logprobs
                found["ref"] += [logprobs] if weight else []
        if not order:
            return
        index = torch.tensor(order, device=self.device)
        for name, tensors in found.items():
            longest = rows[name].shape[1]
            rows[name][index] = torch.cat([F.pad(tensor, (0, longest - tensor.shape[1])) for tensor in tensors])
