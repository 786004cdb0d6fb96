"""What `evaluate` asks of its models: completions, log-probabilities and rewards, divided among processes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

from rlhf_cli.distributed.process_group import ProcessGroup
from rlhf_cli.errors import ModelError, UsageError
from rlhf_cli.generation.generator import Completion, Generator, Request
from rlhf_cli.generation.progress import Drawing
from rlhf_cli.generation.prompts import PromptStyle, prompt_style, text_template
from rlhf_cli.labeling.completions import CompletionFile
from rlhf_cli.progress import Task, say, task, warn
from rlhf_cli.stages.common import load_policy, model_source, stage_sampling
from rlhf_cli.stages.evaluate.stage import EvaluateContext
from rlhf_cli.stages.inputs import source_of
from rlhf_cli.training.monitoring.timing_log import Work, timing_row
from rlhf_cli.training.timing import StepWatch

if TYPE_CHECKING:
    from rlhf_cli.data.records import Prompt
    from rlhf_cli.generation.policy import Policy
    from rlhf_cli.models.reward_model.model import RewardModel


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

    def complete(self, policy: Policy, name: str) -> list[Completion]:
        """Return one completion per prompt; all processes call this.

        Each batch is on disk before the next begins, so that an interrupted evaluation resumes after it.

        Args:
            policy: the model that writes.
            name: of the file in the work folder, and of the progress bar.
        """
        requests = self._requests(policy)
        # Prompts of similar length are sampled together; which ones is settled before anything is sampled.
        order = sorted(range(len(requests)), key=lambda row: len(requests[row].prompt_ids))
        size = policy.sampling.batch_size
        file = CompletionFile(
            self.context.work / f"{name}.jsonl",
            [order[start : start + size] for start in range(0, len(order), size)],
            per_prompt=1,
            processes=self.processes,
        )
        if file.done:
            say(f"{file.done:,} {name} completions were sampled before")
        stop = self.context.stop.check
        if file.left:
            with policy.model():
                pass  # loads the weights, which is not sampling
        with (
            task(f"{name} completions", file.done + file.left, "completions", done=file.done) as bar,
            self.watch.phase("rollout", "sampling"),
        ):
            progress = self._drawing(file.left, policy, bar)

            def draw(rows: Sequence[int]) -> list[Completion]:
                chosen = [requests[row] for row in rows]
                return self.generator.generate(policy, chosen, progress=progress, stop=stop)

            file.fill(draw, stop)
        return [completion for (completion,) in file.read()]

    def complete_alone(self, policy: Policy, rows: Sequence[int], label: str) -> list[Completion]:
        """Return completions of some prompts in this process alone, without keeping them; `label` is of the bar."""
        requests = self._requests(policy)
        with task(label, len(rows), "completions") as bar, self.watch.phase("rollout", "sampling"):
            progress = self._drawing(len(rows), policy, bar)
            chosen = [requests[row] for row in rows]
            return self.generator.generate(policy, chosen, progress=progress, stop=self.context.stop.check)

    def _drawing(self, count: int, policy: Policy, bar: Task) -> Drawing:
        self.drawn.append(Drawing(count, policy.sampling.max_new_tokens, bar))
        return self.drawn[-1]

    def timing(self) -> dict[str, float]:
        """Return where the time of this attempt went."""
        tokens = sum(one.tokens for one in self.drawn)
        return timing_row(self.watch.end_step(), {"rollout": Work(tokens)})

    def _requests(self, policy: Policy) -> list[Request]:
        from rlhf_cli.data.records import seed_for

        seed, rows = self.context.recipe.seed, zip(self.prompts, self.numbers, strict=True)
        return [Request(policy.prompt_ids(prompt), seed_for(prompt, seed, number)) for prompt, number in rows]

    def logprobs(self, policy: Policy, prompt_ids: Sequence[list[int]], given: Sequence[Completion]) -> list[float]:
        """Return log pi(completion | prompt) of each completion in nats."""
        rows = list(zip(prompt_ids, given, strict=True))

        def score(own: Sequence[tuple[list[int], Completion]]) -> list[float]:
            prompts, completions = [ids for ids, _ in own], [completion for _, completion in own]
            return policy.logprobs(prompts, completions, stop=self.context.stop.check)

        with self.watch.phase("passes", "passes"):
            return _map(self.processes, rows, score)


def _map(processes: ProcessGroup | None, items: Sequence[Any], work: Callable[[list[Any]], list[Any]]) -> list[Any]:
    """Do `work` in this process alone, or see `ProcessGroup.map`."""
    return work(list(items)) if processes is None else processes.map(items, work)


def compare(
    sampler: Sampler, policy: Policy, baseline: Policy
) -> tuple[list[Completion], list[Completion], list[float] | None]:
    """Complete the prompts with both models, one in memory at a time.

    Returns:
        Completions of the policy, completions of the baseline, and log pi_policy - log pi_baseline of each completion
        of the policy in nats; None if the KL cannot be estimated.
    """
    of_policy = sampler.complete(policy, "policy")
    prompt_ids = [policy.prompt_ids(prompt) for prompt in sampler.prompts]
    refusal = _no_kl(policy, baseline)
    under_policy = [] if refusal else sampler.logprobs(policy, prompt_ids, of_policy)
    policy.release()
    sampler.context.stop.check()
    of_baseline = sampler.complete(baseline, "baseline")
    under_baseline = [] if refusal else sampler.logprobs(baseline, prompt_ids, of_policy)
    baseline.release()
    sampler.context.stop.check()
    if refusal:
        warn(refusal)
        return of_policy, of_baseline, None
    return of_policy, of_baseline, [own - other for own, other in zip(under_policy, under_baseline, strict=True)]


def _no_kl(policy: Policy, baseline: Policy) -> str | None:
    """Return why the KL cannot be estimated from completions of the policy; None if it can."""
    if policy.sampling.top_p < 1.0:
        # The estimate needs completions drawn from the very distribution whose log-probabilities are taken.
        return "the KL cannot be estimated with a `top_p` below 1: it is not reported"
    if policy.reading != baseline.reading:
        return "the two models read text differently (tokenizer or chat template), so their KL is not defined"
    return None


def load_policies(context: EvaluateContext) -> tuple[Policy, Policy]:
    """Return policy and baseline. Both are sampled as the policy was trained, or as the recipe says.

    Raises:
        UsageError: the two are prompted in different ways.
    """
    from rlhf_cli.models.loading import load_tokenizer

    paths = [context.inputs.policy.source, context.inputs.baseline.source]
    sampling = stage_sampling(context, context.settings.sampling, paths[0])
    styles = []
    for name, path in zip(("the policy", "the baseline"), paths, strict=True):
        tokenizer = load_tokenizer(model_source(context.recipe, path))
        styles.append(prompt_style(context.recipe.data, path, tokenizer, name=name, may_differ=True))
    if styles[0] != styles[1]:
        raise UsageError(
            f"the policy `{paths[0]}` is prompted {styles[0]} and the baseline `{paths[1]}` {styles[1]}",
            hint="prompt both alike: `--set data.prompt_template=null --set data.template_kwargs={}` uses plain text; "
            "if both have a chat template, write `chat` in place of `null`",
        )
    policy, baseline = (load_policy(context, path, sampling, style=styles[0]) for path in paths)
    return policy, baseline


def base_policy(context: EvaluateContext, of: Policy) -> Policy | None:
    """Return the model before any training, sampled and prompted like another; None if it is the baseline."""
    from rlhf_cli.generation.policy import Policy

    recipe, path, baseline = context.recipe, source_of(context.inputs.base), context.inputs.baseline.source
    style = PromptStyle.of(of.format)
    if path is None or path == baseline:
        return None
    if path == "build":
        return Policy.untrained(model_source(recipe, baseline), of.sampling, seed=recipe.seed, style=style)
    return load_policy(context, path, of.sampling, style=style)


def base_completions(sampler: Sampler, of: Policy, rows: Sequence[int]) -> tuple[Policy, list[Completion]] | None:
    """Return the model before any training, sampled and prompted like another policy, with its completions of some
    prompts; None if there is none or it cannot be loaded."""
    try:
        policy = base_policy(sampler.context, of)
        if policy is None:
            return None
        with policy.model():
            pass  # loads the weights
        completions = sampler.complete_alone(policy, rows, "base completions")
    except ModelError as error:
        warn(f"completions of the base model are not shown: {error.message}")
        return None
    policy.release()
    return policy, completions


def rewarded(
    context: EvaluateContext,
    prompts: Sequence[Prompt],
    *sides: Sequence[Completion],
    processes: ProcessGroup | None = None,
) -> list[tuple[float, ...]] | None:
    """Return the normalized rewards of each prompt's completions, as PPO saw them; None if there is no reward model.

    If `processes` is given, all of them call this and each scores its share.
    """
    from rlhf_cli.memory import free_memory
    from rlhf_cli.models.reward_model.model import load_reward_model

    if (path := source_of(context.inputs.reward_model)) is None:
        return None
    template = text_template(context.recipe.data, context.inputs.baseline.source)
    reward_model = load_reward_model(model_source(context.recipe, path), template=template)
    rows = [(prompt, side[row].text) for side in sides for row, prompt in enumerate(prompts)]
    share = partial(_score, reward_model)
    scores = _map(processes, rows, share)
    del reward_model, share
    free_memory()
    return list(
        zip(*(scores[start : start + len(prompts)] for start in range(0, len(rows), len(prompts))), strict=True)
    )


def _score(reward_model: RewardModel, rows: list[tuple[Prompt, str]]) -> list[float]:
    with task("rewards", len(rows), "completions") as bar:
        return reward_model.score([prompt for prompt, _ in rows], [text for _, text in rows], progress=bar.advance)
