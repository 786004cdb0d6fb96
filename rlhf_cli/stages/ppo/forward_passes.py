"""One step's experience: answers sampled, scored as text, and passed once through policy, reference and critic.

In several processes each samples, scores and passes its share; what comes out is small (ids, text, one number a token),
so it is exchanged whole, and everything behind it is computed by all of them alike, as a single process would.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from rlhf_cli.data.records import Prompt
from rlhf_cli.distributed.process_group import ProcessGroup
from rlhf_cli.distributed.watchdog import beat
from rlhf_cli.errors import DivergedError
from rlhf_cli.generation.logprobs import Projection, TokenLogprobs, response_hidden
from rlhf_cli.generation.sequence_batch import SequenceBatch
from rlhf_cli.models.backbone import reads_groups


class Actors(Protocol):
    """The models a step needs; see `models.roles`."""

    value_head: nn.Linear

    def policy(self) -> AbstractContextManager[PreTrainedModel]:
        """The model being trained."""
        ...

    def reference(self) -> AbstractContextManager[PreTrainedModel]:
        """The SFT model."""
        ...

    def critic(self) -> AbstractContextManager[PreTrainedModel]:
        """The model under the value head."""
        ...


@dataclass(frozen=True)
class Answers:
    """Sampled answers of one step, as ids and as text.

    Attributes:
        prompts: N prompts.
        prompt_ids: their ids.
        response_ids: the answers' ids, end token included where there is one.
        texts: the answers as people and rewards read them.
        ended: whether each ended of itself.
        scores: (N,) rewards as they were given, all of them combined; not finite where one was broken.
        parts: name of a reward -> (N,) what it gave, before weights.
        faults: for each reward that gave what is not finite: which, and for which answer first.
    """

    prompts: list[Prompt]
    prompt_ids: list[list[int]]
    response_ids: list[list[int]]
    texts: list[str]
    ended: list[bool]
    scores: Tensor
    parts: Mapping[str, Tensor] = field(default_factory=dict)
    faults: Sequence[str] = ()

    @property
    def lengths(self) -> Tensor:
        """Tokens of each answer, the end token included: (N,)."""
        return torch.tensor([len(ids) for ids in self.response_ids])

    @property
    def ended_flags(self) -> Tensor:
        """`ended` as a tensor: (N,) bool."""
        return torch.tensor(self.ended)

    def __len__(self) -> int:
        return len(self.prompts)


@dataclass(frozen=True)
class RolloutTensors:
    """What the models say of the answers before the update; all (N, T), 0 on padding, constant.

    Attributes:
        logprobs: nats, policy.
        reference_logprobs: nats, SFT model.
        values: reward, critic.
        entropy: nats, policy.
        is_response: bool.
    """

    logprobs: Tensor
    reference_logprobs: Tensor
    values: Tensor
    entropy: Tensor
    is_response: Tensor


class TokenPairs(Protocol):
    """N prompts with their answers, as ids."""

    @property
    def prompt_ids(self) -> Sequence[list[int]]:
        """None empty."""
        ...

    @property
    def response_ids(self) -> Sequence[list[int]]:
        """None empty."""
        ...


class ForwardPasses:
    """Forward passes over answers, in micro-batches of answers that cost least together.

    Args:
        actors: the models.
        autocast: makes the context in which they compute.
        micro_batch_size: answers in one pass; changes memory and speed only.
        temperature: logits are divided by it, as in sampling.
        processes: that share the passes; by default this one alone.
    """

    def __init__(
        self,
        actors: Actors,
        *,
        autocast: Callable[[], AbstractContextManager[object]],
        micro_batch_size: int,
        temperature: float,
        processes: ProcessGroup | None = None,
    ) -> None:
        self.actors = actors
        self.autocast = autocast
        self.temperature = temperature
        self.processes = processes or ProcessGroup()
        self._micro_batch_size = micro_batch_size
        with actors.policy() as model:
            self.device = model.device
            self._grouped = reads_groups(model)

    def batch(self, texts: TokenPairs, rows: Sequence[int]) -> SequenceBatch:
        """Some of the answers as tensors, as the policy reads them, and with it reference and critic."""
        with self.actors.policy() as model:
            return SequenceBatch.for_model(
                model, [texts.prompt_ids[row] for row in rows], [texts.response_ids[row] for row in rows]
            )

    def micro_batches(self, answers: TokenPairs, rows: Sequence[int]) -> Iterator[list[int]]:
        """This process's share of `rows`, cut into micro-batches: of answers to the same prompts where a prompt is read
        once for all of them, else of answers of like length, so that little is padding.
        """

        def place(row: int) -> tuple[object, ...]:
            prompt, response = answers.prompt_ids[row], answers.response_ids[row]
            if self._grouped:
                return len(prompt), prompt, len(response), row
            return len(prompt) + len(response), row

        ordered = sorted(rows, key=place)
        # No more than the share of one process in each, so that all of them have work where there is enough.
        size = min(self._micro_batch_size, -(-len(ordered) // self.processes.count))
        mine = self.processes.shard([ordered[start : start + size] for start in range(0, len(ordered), max(size, 1))])
        for rows in mine:
            yield rows
            beat()

    def logprobs(
        self, model: PreTrainedModel, batch: SequenceBatch, *, temperature: float | None = None
    ) -> TokenLogprobs:
        """Log-probabilities and entropy at each answer token: (N, T) nats. Gradient as the context allows.

        `temperature` is the engine's unless another is given.
        """
        with self.autocast():
            hidden = response_hidden(model, batch)
        temperature = self.temperature if temperature is None else temperature
        return Projection.of(model).token_logprobs(hidden, batch, temperature=temperature)

    def values(self, model: PreTrainedModel, batch: SequenceBatch) -> Tensor:
        """The critic's prediction before each answer token: (N, T), 0 on padding."""
        with self.autocast():
            hidden = response_hidden(model, batch)
        predicted = self.actors.value_head(hidden.float()).squeeze(-1)
        return predicted.masked_fill(~batch.is_response, 0.0)

    @torch.no_grad()
    def passes(self, answers: Answers, progress: Callable[[int], object] | None = None) -> RolloutTensors:
        """One pass of each model over all answers, each process taking its share.

        Raises:
            DivergedError: a log-probability or a value is not finite.
        """
        longest = max(len(ids) for ids in answers.response_ids)
        rows = {
            name: torch.zeros(len(answers), longest, device=self.device)
            for name in ("policy", "ref", "value", "entropy")
        }
        for part in self.micro_batches(answers, range(len(answers))):
            batch = self.batch(answers, part)
            width = batch.response_ids.shape[1]
            with self.actors.policy() as model:
                policy = self.logprobs(model, batch)
            with self.actors.reference() as model:
                reference = self.logprobs(model, batch)
            with self.actors.critic() as model:
                values = self.values(model, batch)
            found = {"policy": policy.logprobs, "ref": reference.logprobs, "value": values, "entropy": policy.entropy}
            for name, tensor in found.items():
                rows[name][part, :width] = tensor
            if progress is not None:
                progress(len(part))
        # Every row was filled by one process and is 0 elsewhere, so the sum is exact.
        self.processes.all_reduce(list(rows.values()))
        is_response = (torch.arange(longest) < answers.lengths.unsqueeze(1)).to(self.device)
        for name, tensor in rows.items():
            if not torch.isfinite(tensor).all():
                raise DivergedError(f"the {name} pass over a step's answers gave values that are not finite")
        return RolloutTensors(rows["policy"], rows["ref"], rows["value"], rows["entropy"], is_response)
