"""The `best-of-n` stage: reward, gold score and KL bound of the best of n completions, for growing n."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from rlhf_cli.console import console
from rlhf_cli.data.records import Prompt, prompt_key, prompt_to_json
from rlhf_cli.labeling.scoring import FunctionScorer, RewardModelScorer, score_completions
from rlhf_cli.memory import free_memory
from rlhf_cli.progress import task, warn
from rlhf_cli.stages.base import StageOutcome
from rlhf_cli.stages.best_of_n.curve import Curve, curve_table, measure
from rlhf_cli.stages.best_of_n.samples import SAMPLES, SampleRow, Samples, draw_samples, earlier_samples
from rlhf_cli.stages.best_of_n.stage import BestOfNContext
from rlhf_cli.stages.common import load_reward_model
from rlhf_cli.stages.inputs import Input, source_of
from rlhf_cli.stages.precision import decide_precision
from rlhf_cli.stages.sharding import require_processes
from rlhf_cli.training.monitoring.timing_log import Work, timing_row

if TYPE_CHECKING:
    from rlhf_cli.generation.generator import Generator


def run(context: BestOfNContext, generator: Generator | None = None) -> StageOutcome:
    """Draw and score the completions, print and save the curve.

    Args:
        context: of the stage.
        generator: draws completions; None is that of `generation.engine`.
    """
    if context.settings.loads_model:
        require_processes(context.recipe)
    context = decide_precision(context)
    inputs = context.inputs
    samples = earlier_samples(context) if inputs.samples is not None else draw_samples(context, generator)
    rewards = _scores(context, samples, "rewards", inputs.reward_model, inputs.function)
    gold = None
    if inputs.gold_model is not None or inputs.gold_function is not None:
        gold = _scores(context, samples, "gold scores", inputs.gold_model, inputs.gold_function)
    if not samples.processes.is_main:
        return StageOutcome()
    rows = [
        SampleRow(
            prompt,
            list(texts),
            list(rewards[row]),
            None if gold is None else list(gold[row]),
            samples.references.get(prompt_key(prompt)),
        )
        for row, (prompt, texts) in enumerate(zip(samples.prompts, samples.texts, strict=True))
    ]
    with (context.output / SAMPLES).open("w", encoding="utf-8") as file:
        file.writelines(row.to_line() for row in rows)
    if context.settings.write_best is not None:
        _write_best(context.output / "best.jsonl", rows, context.settings.write_best)
    if samples.skips.total:
        samples.skips.write(context.output / "skips.jsonl")
    timing = timing_row(samples.watch.end_step(), {"rollout": Work(samples.tokens)})
    return _outcome(context, measure(rewards, gold), samples, timing)


def _scores(
    context: BestOfNContext, samples: Samples, label: str, model: Input | None, function: Input | None
) -> list[list[float]]:
    """Return (P, N) scores by a reward model or a function; a function, the user's code, runs in one process."""
    pairs = list(zip(samples.prompts, samples.texts, strict=True))
    with samples.watch.phase("scoring", "scoring"):
        score = partial(_score, context, samples, label, source_of(model), source_of(function))
        if function is not None:
            return score(pairs) if samples.processes.is_main else []
        return samples.processes.map(pairs, score)


def _score(
    context: BestOfNContext,
    samples: Samples,
    label: str,
    model: str | None,
    function: str | None,
    pairs: Sequence[tuple[Prompt, Sequence[str]]],
) -> list[list[float]]:
    if function is not None:
        from rlhf_cli.rewards.python_function import load_scoring_function

        rater = FunctionScorer(load_scoring_function(function), samples.columns)
    else:
        assert model is not None
        loaded = load_reward_model(context, model, policy=source_of(context.inputs.policy))
        rater = RewardModelScorer(loaded, context.settings.sampling.batch_size)
        del loaded
    prompts, texts = [prompt for prompt, _ in pairs], [group for _, group in pairs]
    total = sum(map(len, samples.texts))
    with task(label, total, "completions", share=sum(map(len, texts))) as bar:
        scores = score_completions(rater, prompts, texts, stop=context.stop.check, progress=bar.advance)
    del rater
    free_memory()
    return scores


def _write_best(path: Path, rows: Sequence[SampleRow], n: int) -> None:
    """Write demonstrations with the best of the first n completions of each prompt."""
    with path.open("w", encoding="utf-8") as file:
        for row in rows:
            best = max(range(min(n, len(row.completions))), key=row.rewards.__getitem__)
            plain = {
                "prompt": prompt_to_json(row.prompt),
                "completion": row.completions[best],
                "reward": row.rewards[best],
            }
            plain |= {} if row.gold is None else {"gold": row.gold[best]}
            file.write(json.dumps(plain, ensure_ascii=False) + "\n")


def _described(given: Input | None) -> str | None:
    """Return the stage of the same run that wrote an input, else its name; None without one."""
    return None if given is None else given.upstream or given.source


def _outcome(context: BestOfNContext, curve: Curve, samples: Samples, timing: dict[str, float]) -> StageOutcome:
    """Save the curve and print it."""
    inputs = context.inputs
    names = {
        "chosen_by": _described(inputs.reward_model or inputs.function),
        "measured_by": _described(inputs.gold_model or inputs.gold_function),
    }
    plain = json.dumps(names | curve.to_json(), indent=2, ensure_ascii=False, allow_nan=False)
    (context.output / "best_of_n.json").write_text(plain + "\n", encoding="utf-8")
    console.print(curve_table(curve), soft_wrap=False)
    if curve.prompts < 2:
        warn("one prompt says nothing about others: the intervals have no width")
    first, last = curve.points[0], curve.points[-1]
    summary = [
        (f"best of {last.n}", f"reward {first.reward.value:.2f} -> {last.reward.value:.2f}"),
        ("KL", f"at most {last.kl_bound:.1f} nats per completion"),
    ]
    if first.gold is not None and last.gold is not None:
        summary.insert(1, ("gold score", f"{first.gold.value:.2f} -> {last.gold.value:.2f}"))
    if curve.fit is not None:
        summary.append(("gold against sqrt(KL)", curve.fit.said()))
    return StageOutcome(curve.metrics(), samples.skips.counts, summary, timing)
