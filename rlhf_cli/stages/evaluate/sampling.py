"""What `evaluate` asks of its models: completions, log-probabilities and rewards, divided among processes."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

from rlhf_cli.distributed.process_group import ProcessGroup
from rlhf_cli.generation.generator import Completion, Generator, Request
from rlhf_cli.generation.progress import Drawing
from rlhf_cli.intervals import Measure
from rlhf_cli.labeling.completions import CompletionFile
from rlhf_cli.progress import Task, say, task, warn
from rlhf_cli.stages.evaluate.demonstrations import tokenized
from rlhf_cli.stages.evaluate.rewards import rewarded
from rlhf_cli.stages.evaluate.scores import ScoreFile, share_of_chunks
from rlhf_cli.stages.evaluate.sides import Side
from rlhf_cli.stages.evaluate.stage import EvaluateContext
from rlhf_cli.stages.evaluate.tasks import task_measures
from rlhf_cli.training.monitoring.timing_log import Work, timing_row
from rlhf_cli.training.timing import StepWatch

if TYPE_CHECKING:
    from rlhf_cli.data.records import Demonstration, Prompt
    from rlhf_cli.generation.policy import Policy, TokenScores


@dataclass(frozen=True)
class Sampler:
    """Draws completions of the same prompts from one policy after another.

    The same prompt and number give every policy the same random numbers.

    Attributes:
        context: of the stage.
        generator: draws completions.
        prompts: N prompts; a prompt that is completed several times stands there several times.
        numbers: N; they tell completions of one prompt apart.
        processes: of the run, which share the prompts and all get all results.
        watch: times sampling, forward passes and scoring.
        drawn: of each sampling in this attempt.
    """

    context: EvaluateContext
    generator: Generator
    prompts: Sequence[Prompt]
    numbers: Sequence[int]
    processes: ProcessGroup
    watch: StepWatch = field(default_factory=StepWatch)
    drawn: list[Drawing] = field(default_factory=list)

    def complete(self, policy: Policy, slot: str, name: str, *, best_of: int = 1) -> list[list[Completion]]:
        """Return `best_of` completions per prompt; all processes call this.

        Each batch is on disk before the next begins, so that an interrupted evaluation resumes after it.

        Args:
            policy: the model that writes.
            slot: name of the file in the work folder.
            name: of the model, for the progress bar.
            best_of: completions per prompt.
        """
        from rlhf_cli.generation.weights_to_draw import weights_to_draw

        requests = self.requests(policy, best_of)
        # Prompts of similar length are sampled together; which ones is settled before anything is sampled.
        order = sorted(range(len(requests)), key=lambda row: len(requests[row][0].prompt_ids))
        size = max(1, policy.sampling.batch_size // best_of)
        file = CompletionFile(
            self.context.work / f"{slot}.jsonl",
            [order[start : start + size] for start in range(0, len(order), size)],
            per_prompt=best_of,
            processes=self.processes,
        )
        if file.done:
            say(f"{file.done:,} {name} completions were sampled before")
        stop = self.context.stop.check
        # A sharded policy is loaded and drawn from by all processes, also by those without prompts.
        draws = file.total > file.done if policy.is_sharded else file.left > 0
        if draws:
            with policy.model():
                pass  # loads the weights, which is not sampling
        with (
            weights_to_draw(policy, self.generator) if draws else nullcontext(),
            task(f"{name} completions", file.total, "completions", done=file.done, share=file.left) as bar,
            self.watch.phase("rollout", "sampling"),
        ):
            progress = self.drawing(file.left, policy, bar)

            def draw(rows: Sequence[int]) -> list[Completion]:
                chosen = [request for row in rows for request in requests[row]]
                return self.generator.generate(policy, chosen, progress=progress, stop=stop)

            file.fill(draw)
        return file.read()

    def best(self, drawn: Sequence[Sequence[Completion]], slot: str) -> list[Completion]:
        """Return the completion of each prompt with the highest reward, the first of equal ones.

        Args:
            drawn: (N, n) completions.
            slot: name of the file in the work folder.
        """
        prompts = [prompt for prompt, own in zip(self.prompts, drawn, strict=True) for _ in own]
        completions = [completion for own in drawn for completion in own]
        file = ScoreFile(self.context.work / f"{slot}_rewards.jsonl", self.processes)
        found = rewarded(self.context, prompts, completions, file=file, processes=self.processes)
        assert found is not None, "the stage does not start without a reward model"
        rewards = iter(found[0])
        return [max(own, key=lambda _: next(rewards)) for own in drawn]

    def drawing(self, count: int, policy: Policy, bar: Task) -> Drawing:
        """Return what counts the tokens of so many completions, for the bar and the timing."""
        self.drawn.append(Drawing(count, policy.sampling.max_new_tokens, bar))
        return self.drawn[-1]

    def timing(self) -> dict[str, float]:
        """Return where the time of this attempt went."""
        tokens = sum(one.tokens for one in self.drawn)
        return timing_row(self.watch.end_step(), {"rollout": Work(tokens)})

    def requests(self, policy: Policy, best_of: int = 1) -> list[list[Request]]:
        """Return the requests of each prompt."""
        from rlhf_cli.data.records import seed_for

        seed = self.context.recipe.seed
        return [
            [
                Request(policy.prompt_ids(prompt), seed_for(prompt, seed, draw))
                for draw in range(number * best_of, (number + 1) * best_of)
            ]
            for prompt, number in zip(self.prompts, self.numbers, strict=True)
        ]

    def scores(
        self,
        policy: Policy,
        slot: str,
        prompt_ids: Sequence[list[int]],
        given: Sequence[list[int]],
        *,
        label: str,
        temperature: float | None = None,
    ) -> list[TokenScores]:
        """Return what a policy says of each token of completions; those of finished chunks are read from disk.

        Args:
            policy: that reads.
            slot: name of the file in the work folder.
            prompt_ids: (N,) token ids of prompts.
            given: (N,) token ids of completions.
            label: of the bar.
            temperature: see `Policy.token_scores`.
        """
        from rlhf_cli.generation.policy import TokenScores

        stop, chunk = self.context.stop.check, 8 * policy.sampling.batch_size

        def share(rows: list[int]) -> list[tuple[list[float], float]]:
            completions = [Completion(given[row], "", finished=True) for row in rows]
            prompts = [prompt_ids[row] for row in rows]
            found = policy.token_scores(
                prompts,
                completions,
                temperature=temperature,
                stop=stop,
                progress=bar.advance,
            )
            return [(one.logprobs, one.entropy) for one in found]

        file = ScoreFile(self.context.work / f"{slot}_scores.jsonl", self.processes)
        if not (left := file.lacks(len(given))):
            return [TokenScores(logprobs, entropy) for logprobs, entropy in file.fill(len(given), share, chunk=1)]
        own = share_of_chunks(self.processes, left, chunk)
        with policy.model():
            pass  # loads the weights, which is not a pass
        with (
            task(label, len(given), "completions", done=len(given) - left, share=own) as bar,
            self.watch.phase("passes", "passes"),
        ):
            found = file.fill(len(given), partial(self.processes.map, work=share), chunk=chunk)
        return [TokenScores(logprobs, entropy) for logprobs, entropy in found]

    def tasks(self, policy: Policy, slot: str) -> dict[str, Measure]:
        """Return the figures of `evaluate.tasks`; rank 0 runs them, and those of finished tasks are read from disk."""
        names, processes = self.context.settings.tasks, self.processes

        def score(rows: list[int]) -> list[dict[str, Any]]:
            seed = self.context.recipe.seed
            with policy.whole():
                own = [task_measures(policy, names[row], seed) for row in rows] if processes.is_main else []
            return processes.all_gather_object(own)[0]

        file = ScoreFile(self.context.work / f"{slot}_tasks.jsonl", processes)
        found = file.fill(len(names), score, chunk=1, before_chunk=self.context.stop.check)
        return {name: Measure(**one) for each in found for name, one in each.items()}


def measure(
    sampler: Sampler,
    policies: Sequence[tuple[str, Policy]],
    baseline: tuple[str, Policy],
    demonstrations: Sequence[Demonstration],
) -> tuple[Side, list[Side]]:
    """Complete the prompts with all models, one in memory at a time, and take log-probabilities.

    Args:
        sampler: with the prompts.
        policies: name and policy of each model under evaluation.
        baseline: name and policy of the baseline.
        demonstrations: to measure perplexity on; may be empty.

    Returns:
        The baseline, and the policies with their log-ratios to it.
    """
    best_of = sampler.context.settings.best_of(len(policies))
    sides = [
        _measured(sampler, name, policy, _slot("policy", number), demonstrations, best_of=best_of[number])
        for number, (name, policy) in enumerate(policies)
    ]
    of_baseline = _measured(sampler, *baseline, "baseline", demonstrations, keep=True)
    compared = []
    for number, side in enumerate(sides):
        if side.best_of > 1:
            compared.append(side)
            continue
        if refusal := _no_kl(side, of_baseline, alone=len(sides) == 1):
            warn(refusal)
            compared.append(side)
            continue
        given = [completion.ids for completion in side.completions]
        slot = f"{_slot('policy', number)}_by_baseline"
        label = f"{side.name} completions read by {baseline[0]}"
        other = sampler.scores(baseline[1], slot, _ids(sampler, side.policy), given, label=label)
        ratios = [
            [own - base for own, base in zip(mine.logprobs, theirs.logprobs, strict=True)]
            for mine, theirs in zip(side.scores, other, strict=True)
        ]
        compared.append(dataclasses.replace(side, log_ratios=ratios))
    baseline[1].release()
    sampler.context.stop.check()
    return of_baseline, compared


def _slot(role: str, number: int) -> str:
    return f"{role}_{number + 1}" if number else role


def _ids(sampler: Sampler, policy: Policy) -> list[list[int]]:
    return [policy.prompt_ids(prompt) for prompt in sampler.prompts]


def _measured(
    sampler: Sampler,
    name: str,
    policy: Policy,
    slot: str,
    demonstrations: Sequence[Demonstration],
    *,
    best_of: int = 1,
    keep: bool = False,
) -> Side:
    """Return a model's completions with its own scores of them; its weights are released unless `keep`."""
    drawn = sampler.complete(policy, slot, name, best_of=best_of)
    if best_of > 1:
        policy.release()
        return Side(name, policy, sampler.best(drawn, slot), [], best_of=best_of)
    completions = [completion for (completion,) in drawn]
    own = [completion.ids for completion in completions]
    scores = sampler.scores(policy, slot, _ids(sampler, policy), own, label=f"{name} completions read by itself")
    examples = [tokenized(record, policy) for record in demonstrations]
    read = sampler.scores(
        policy,
        f"{slot}_demonstrations",
        [example.prompt_ids for example in examples],
        [example.completion_ids for example in examples],
        label=f"demonstrations read by {name}",
        temperature=1.0,
    )
    tasks = sampler.tasks(policy, slot)
    if not keep:
        policy.release()
    sampler.context.stop.check()
    return Side(name, policy, completions, scores, [one.logprobs for one in read], tasks=tasks)


def _no_kl(policy: Side, baseline: Side, *, alone: bool) -> str | None:
    """Return why the KL cannot be estimated from completions of the policy; None if it can."""
    if policy.policy.sampling.top_p < 1.0:
        # The estimate needs completions drawn from the very distribution whose log-probabilities are taken.
        return "the KL cannot be estimated with a `top_p` below 1: it is not reported"
    if policy.policy.reading != baseline.policy.reading:
        which = "the two models" if alone else f"{policy.name} and {baseline.name}"
        return f"{which} read text differently (tokenizer or chat template), so their KL is not defined"
    return None
