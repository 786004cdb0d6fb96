"""What `evaluate` asks of the models: answers, log-probabilities, rewards; shared among the processes of a run."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from rlhf_cli.distributed.process_group import ProcessGroup
from rlhf_cli.errors import ModelError
from rlhf_cli.progress import task, warn
from rlhf_cli.stages.common import model_source, prompt_format, prompt_template
from rlhf_cli.stages.evaluate.stage import EvaluateContext
from rlhf_cli.stages.inputs import source_of

if TYPE_CHECKING:
    from rlhf_cli.data.records import Prompt
    from rlhf_cli.generation.policy import Answer, Policy, Sampling
    from rlhf_cli.models.reward_model.model import RewardModel


def _load(context: EvaluateContext, name: str) -> Policy:
    from rlhf_cli.generation.policy import Policy

    source = model_source(context.recipe, getattr(context.inputs, name).source)
    return Policy.load(source, prompt_format(context.recipe, source))


def both_answers(
    context: EvaluateContext,
    prompts: Sequence[Prompt],
    numbers: Sequence[int],
    sampling: Sampling,
    processes: ProcessGroup,
) -> tuple[list[Answer], list[Answer], list[float] | None]:
    """Answers of PPO and of SFT, drawn with the same random numbers, and log pi_ppo - log pi_sft of each PPO answer."""
    from rlhf_cli.generation.policy import free_memory

    rows = list(zip(prompts, numbers, strict=True))
    policy = _load(context, "policy")
    found = processes.map(rows, partial(_drawn, context, policy, sampling=sampling, label="PPO answers"))
    ppo = _restored(found)
    under_ppo = processes.map(ppo, partial(_logprobs, context, policy, sampling=sampling))
    reading = policy.reading
    del policy
    free_memory()
    context.stop.check()
    baseline = _load(context, "baseline")
    sft = _restored(processes.map(rows, partial(_drawn, context, baseline, sampling=sampling, label="SFT answers")))
    if sampling.top_p < 1.0:
        # The estimate needs answers drawn from the very distribution whose log-probabilities are taken.
        warn("with `evaluate.sampling.top_p` below 1 the KL cannot be estimated from the answers; it is left out")
        return ppo, sft, None
    if baseline.reading != reading:
        warn("the two models read text differently (tokenizer or chat template), so their KL is not defined")
        return ppo, sft, None
    under_sft = processes.map(ppo, partial(_logprobs, context, baseline, sampling=sampling))
    del baseline
    free_memory()
    context.stop.check()
    return ppo, sft, [own - other for own, other in zip(under_ppo, under_sft, strict=True)]


def _drawn(
    context: EvaluateContext, policy: Policy, rows: Sequence[tuple[Prompt, int]], *, sampling: Sampling, label: str
) -> list[dict[str, Any]]:
    """One process's share of the answers, as JSON can say them."""
    answers = policy.answer(
        [prompt for prompt, _ in rows],
        [number for _, number in rows],
        sampling,
        seed=context.recipe.seed,
        label=label,
        stop=context.stop.check,
    )
    return [dataclasses.asdict(answer) for answer in answers]


def _restored(found: Sequence[dict[str, Any]]) -> list[Answer]:
    from rlhf_cli.generation.policy import Answer

    return [Answer(**row) for row in found]


def _logprobs(context: EvaluateContext, policy: Policy, answers: list[Answer], *, sampling: Sampling) -> list[float]:
    return policy.logprobs(
        answers, temperature=sampling.temperature, batch_size=sampling.batch_size, stop=context.stop.check
    )


def base_answers(
    context: EvaluateContext, prompts: Sequence[Prompt], numbers: Sequence[int], sampling: Sampling
) -> list[Answer] | None:
    """Answers of the model before any training, to the prompts that are shown; None where there is none to ask."""
    from rlhf_cli.generation.policy import Policy, free_memory

    path = source_of(context.inputs.base)
    if path is None or path == context.inputs.baseline.source:
        return None
    if path == "build":
        source = model_source(context.recipe, context.inputs.baseline.source)
        policy = Policy.untrained(source, prompt_format(context.recipe, source), seed=context.recipe.seed)
    else:
        try:
            policy = _load(context, "base")
        except ModelError as error:
            warn(f"the base model's answers are not shown: {error.message}")
            return None
    answers = policy.answer(prompts, numbers, sampling, seed=context.recipe.seed, label="base answers")
    del policy
    free_memory()
    return answers


def rewarded(
    context: EvaluateContext, prompts: Sequence[Prompt], *sides: Sequence[Answer], processes: ProcessGroup | None = None
) -> list[tuple[float, ...]] | None:
    """Normalized rewards of each prompt's answers, as PPO saw them; None where there is no reward model.

    Given the processes, all of them call this, and each scores its share.
    """
    from rlhf_cli.generation.policy import free_memory
    from rlhf_cli.models.reward_model.model import load_reward_model

    if (path := source_of(context.inputs.reward_model)) is None:
        return None
    scorer = load_reward_model(
        model_source(context.recipe, path), template=prompt_template(context.recipe, context.inputs.baseline.source)
    )
    rows = [(prompt, side[row].text) for side in sides for row, prompt in enumerate(prompts)]
    share = partial(_scored, scorer)
    scores = share(rows) if processes is None else processes.map(rows, share)
    del scorer, share
    free_memory()
    return list(
        zip(*(scores[start : start + len(prompts)] for start in range(0, len(rows), len(prompts))), strict=True)
    )


def _scored(scorer: RewardModel, rows: list[tuple[Prompt, str]]) -> list[float]:
    with task("rewards", len(rows), "answers") as bar:
        return scorer.score([prompt for prompt, _ in rows], [text for _, text in rows], progress=bar.advance)
