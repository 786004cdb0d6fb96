"""Rollouts: which prompts a step takes, the policy's completions of them, and their rewards.

Everything is a function of seed and step: a resumed run, or one on another number of processes, takes the same prompts
and draws the same completions.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

from rlhf_cli.data.records import Prompt, seed_for
from rlhf_cli.distributed.agreement import agreed
from rlhf_cli.distributed.process_group import ProcessGroup
from rlhf_cli.errors import ServerLostError, UsageError
from rlhf_cli.generation.generator import Completion, Generator, Request
from rlhf_cli.generation.policy import Policy
from rlhf_cli.generation.prompts import TokenizedPrompts
from rlhf_cli.generation.server_draw import Drawn, DrawsAhead, PendingDraw
from rlhf_cli.generation.weights_to_draw import weights_to_draw
from rlhf_cli.models.sharding import is_sharded
from rlhf_cli.progress import warn
from rlhf_cli.rewards.base import Columns, Scores, columns_of
from rlhf_cli.settings.shared import StageSamplingSettings
from rlhf_cli.stages.ppo.forward_passes import Completions
from rlhf_cli.stages.ppo.settings import PPOSettings
from rlhf_cli.training.shuffle import EndlessShuffle
from rlhf_cli.training.timing import StepWatch

RewardFunction = Callable[[Sequence[Prompt], Sequence[str], Columns], Scores]
"""N prompts, N completions as text, and what else is known of them -> one reward each, higher is better. N may be 0 if
the policy is sharded."""


def own_sampling(settings: PPOSettings) -> StageSamplingSettings:
    """Return what the section says of sampling. PPO draws from the whole distribution, whose log-probabilities it
    takes."""
    return StageSamplingSettings(
        temperature=settings.temperature,
        top_p=1.0,
        max_new_tokens=settings.max_new_tokens,
        stop_tokens=settings.stop_tokens,
        batch_size=settings.rollout_batch_size,
    )


class Rollouts:
    """Draws completions from the policy and scores them.

    Args:
        policy: what is being trained.
        generator: draws completions from it.
        reward: scores completions, as text.
        settings: section `ppo` of the recipe.
        seed: of prompt order and sampling.
        processes: of the run, which share the work.

    Raises:
        UsageError: `overlap_rollouts` is set, and the generator needs the policy's own weights to draw.
    """

    def __init__(
        self,
        policy: Policy,
        generator: Generator,
        reward: RewardFunction,
        settings: PPOSettings,
        *,
        seed: int,
        processes: ProcessGroup,
    ) -> None:
        self._policy, self._generator, self._reward = policy, generator, reward
        self._settings, self._seed, self._processes = settings, seed, processes
        self._orders: dict[int, EndlessShuffle] = {}
        self._ahead = generator if settings.overlap_rollouts and isinstance(generator, DrawsAhead) else None
        self._pending: PendingDraw | None = None
        self._restored: list[Drawn] | None = None  # what an interrupted run had drawn ahead
        if settings.overlap_rollouts and self._ahead is None:
            raise UsageError(
                "`ppo.overlap_rollouts` needs a vllm server, and another engine draws the completions",
                hint="an unfinished stage keeps its engine: use `--force`, or `--set ppo.overlap_rollouts=false`",
            )

    def numbered_rows(self, step: int, count: int) -> tuple[list[int], range]:
        """Return `rows_of` a step, and the numbers of its completions, which no other step has."""
        rows = self.rows_of(step, count)
        return rows, range(step * len(rows), (step + 1) * len(rows))

    def rows_of(self, step: int, count: int) -> list[int]:
        """Return the prompts of a step, one row per completion: each epoch is one shuffle of all prompts.

        Args:
            step: 0-based.
            count: number of prompts.
        """
        needed = self._settings.prompts_per_step
        if count not in self._orders:
            self._orders[count] = EndlessShuffle(count, seed=self._seed, name="prompts")
        chosen = self._orders[count].slice(step * needed, (step + 1) * needed)
        return [row for row in chosen for _ in range(self._settings.samples_per_prompt)]

    def next_step(self, source: TokenizedPrompts, step: int, watch: StepWatch) -> Completions:
        """Return the completions of a 0-based step; with `overlap_rollouts`, begin to draw those of the step after.

        Args:
            source: prompts.
            step: 0-based.
            watch: times sampling and scoring.
        """
        rows, numbers = self.numbered_rows(step, len(source))
        if self._ahead is None:
            return self.completions(source, rows, numbers, watch)
        with self._policy.model(), weights_to_draw(self._policy, self._generator):
            drawn, is_stale = self._take(self._ahead, source, rows, numbers, watch)
            if step + 1 < self._settings.steps:
                self._begin(self._ahead, source, step + 1, watch, current=drawn if is_stale else None)
            completions = self._scored(source, rows, numbers, drawn, watch)
        return dataclasses.replace(completions, is_stale=is_stale)

    def _begin(
        self,
        ahead: DrawsAhead,
        source: TokenizedPrompts,
        step: int,
        watch: StepWatch,
        *,
        current: Sequence[Completion] | None,
    ) -> None:
        """Begin to draw the completions of a step. Where the server is lost, those of the current step are kept if the
        policy that drew them is gone: the run that resumes trains on them."""
        mine = self._processes.shard(list(zip(*self.numbered_rows(step, len(source)), strict=True)))
        try:
            with watch.phase("rollout", "handing weights over"):
                self._pending = ahead.begin(self._policy, self._requests(source, mine))
        except ServerLostError:
            if current is not None:
                own = [Drawn(one.ids, one.logprobs or []) for one in current]
                self._pending = PendingDraw((), None, own)
            raise

    def _take(
        self,
        ahead: DrawsAhead,
        source: TokenizedPrompts,
        rows: Sequence[int],
        numbers: Sequence[int],
        watch: StepWatch,
    ) -> tuple[list[Completion], bool]:
        """Return this process's completions of a step, and whether they were drawn before the last update."""
        mine = self._processes.shard(list(zip(rows, numbers, strict=True)))
        pending, self._pending = self._pending, None
        if self._restored is not None:
            restored, self._restored = self._processes.shard(self._restored), None
            pending = PendingDraw(self._requests(source, mine), None, restored)
        is_stale = False

        def draw() -> list[Completion]:
            nonlocal is_stale
            if pending is None:
                return self._draw(source, mine, watch, len(rows))
            progress = watch.drawing(len(mine), self._policy.sampling.max_new_tokens, total=len(rows))
            drawn, is_stale = ahead.finish(self._policy, pending, progress=progress)
            return drawn

        return self._in_all(draw, watch), is_stale

    def ahead_state(self) -> list[list[Any]] | None:
        """Return what is drawn ahead, as JSON values in the order of the step's rows; None if nothing is.

        Waits for what is on its way. All processes call this together.
        """
        if self._restored is not None:
            return [[one.ids, one.logprobs] for one in self._restored]
        drawn = None
        if self._ahead is not None and self._pending is not None:
            self._ahead.wait(self._pending)
            drawn = self._pending.drawn
        plain = None if drawn is None else [[one.ids, one.logprobs] for one in drawn]
        shares = self._processes.all_gather_object(plain)
        if None in shares:  # drawn with the policy of the next step, resumed or not
            return None
        return [shares[row % len(shares)][row // len(shares)] for row in range(sum(map(len, shares)))]

    def restore_ahead(self, state: list[list[Any]] | None) -> None:
        """Take what `ahead_state` returned, in place of what is on its way."""
        self._pending = None
        self._restored = None if state is None else [Drawn(list(ids), list(logprobs)) for ids, logprobs in state]

    def completions(
        self, source: TokenizedPrompts, rows: Sequence[int], numbers: Sequence[int], watch: StepWatch
    ) -> Completions:
        """Draw one completion per row and score it. Processes share the rows, and all of them get all completions.

        Args:
            source: prompts.
            rows: N rows of `source`.
            numbers: N numbers that tell completions of one prompt apart: each gives another seed.
            watch: times sampling and scoring.

        Raises:
            DivergedError: the policy's logits are not finite in some process; raised in all of them.
            ModelError: the engine of some process failed; likewise.
        """
        mine = self._processes.shard(list(zip(rows, numbers, strict=True)))
        with self._policy.model():
            with weights_to_draw(self._policy, self._generator):  # not to score: a reward model is gathered itself
                drawn = self._in_all(lambda: self._draw(source, mine, watch, len(rows)), watch)
            return self._scored(source, rows, numbers, drawn, watch)

    def _in_all(self, draw: Callable[[], list[Completion]], watch: StepWatch) -> list[Completion]:
        """Draw in all processes; a policy that diverged, or an engine that fails, is an error in all of them."""
        drawn: list[Completion] = []

        def sample() -> None:
            with watch.phase("rollout", "sampling"):
                drawn.extend(draw())

        agreed(sample, self._processes)
        return drawn

    def _scored(
        self,
        source: TokenizedPrompts,
        rows: Sequence[int],
        numbers: Sequence[int],
        drawn: Sequence[Completion],
        watch: StepWatch,
    ) -> Completions:
        """Score this process's completions, and return those of all processes."""
        mine = self._processes.shard(list(zip(rows, numbers, strict=True)))
        with self._policy.model() as model:
            all_score = is_sharded(model)  # a reward model may share its weights
        with watch.phase("scoring", "scoring"):
            prompts = [source.prompts[row] for row, _ in mine]
            scores = self._score(prompts, drawn, source) if mine or all_score else Scores([], {})
            shares = self._processes.all_gather_object(_plain(drawn, scores))
        for share in shares[1:]:  # the reward has reported the faults of the first process itself
            for fault in share["faults"]:
                warn(fault)
        return _merged(source, rows, shares)

    def _score(self, prompts: Sequence[Prompt], drawn: Sequence[Completion], source: TokenizedPrompts) -> Scores:
        columns = columns_of(prompts, source.references, drawn, partial(self._policy.decode, raw=True))
        return self._reward(prompts, [completion.text for completion in drawn], columns)

    def _draw(
        self, source: TokenizedPrompts, mine: Sequence[tuple[int, int]], watch: StepWatch, total: int
    ) -> list[Completion]:
        requests = self._requests(source, mine)
        progress = watch.drawing(len(requests), self._policy.sampling.max_new_tokens, total=total)
        return self._generator.generate(self._policy, requests, progress=progress)

    def _requests(self, source: TokenizedPrompts, mine: Sequence[tuple[int, int]]) -> list[Request]:
        # Numbers count completions over the whole run: a prompt that comes again gets a new seed.
        return [Request(source.ids[row], seed_for(source.prompts[row], self._seed, number)) for row, number in mine]


def _plain(drawn: Sequence[Completion], scores: Scores) -> dict[str, Any]:
    """Return one process's completions and scores as JSON values."""
    return {
        "ids": [completion.ids for completion in drawn],
        "finished": [completion.finished for completion in drawn],
        "texts": [completion.text for completion in drawn],
        "logprobs": [completion.logprobs for completion in drawn],
        "scores": scores.total,
        "parts": scores.parts,
        "faults": scores.faults,
    }


def _merged(source: TokenizedPrompts, rows: Sequence[int], shares: Sequence[dict[str, Any]]) -> Completions:
    """Return all processes' completions in the order of `rows`: process p of P had rows p, p + P, p + 2P, ..."""
    count = len(shares)

    def whole(get: Callable[[dict[str, Any]], Sequence[Any]]) -> list[Any]:
        return [get(shares[position % count])[position // count] for position in range(len(rows))]

    sampled = whole(lambda share: share["logprobs"])
    # A process without rows called no reward, so it does not know their names.
    names = max((list(share["parts"]) for share in shares), key=len)
    return Completions(
        prompts=[source.prompts[row] for row in rows],
        prompt_ids=[source.ids[row] for row in rows],
        completion_ids=whole(lambda share: share["ids"]),
        texts=whole(lambda share: share["texts"]),
        finished=whole(lambda share: share["finished"]),
        scores=torch.tensor(whole(lambda share: share["scores"]), dtype=torch.float32),
        parts={
            name: torch.tensor(whole(lambda share, name=name: share["parts"][name]), dtype=torch.float32)
            for name in names
        },
        faults=[fault for share in shares for fault in share["faults"]],
        sampler_logprobs=None if None in sampled else sampled,
    )
