"""The `label` stage: K answers to each prompt, ranked; or rankings that people made, brought into the same form."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from rlhf_cli.data.records import Prompt, Ranking, prompt_to_json, seed_for
from rlhf_cli.labeling.answers import Answer, AnswerFile
from rlhf_cli.labeling.labelers import (
    FunctionLabeler,
    Labeler,
    LabelStatistics,
    RewardModelLabeler,
    score_answers,
    tiers_from_scores,
)
from rlhf_cli.pipeline.stage import StageContext, StageOutcome
from rlhf_cli.processes import Processes
from rlhf_cli.progress import say, task, warn
from rlhf_cli.ranks import is_main
from rlhf_cli.stages.common import Prompts, load_prompts, model_source, prompt_format, prompt_template
from rlhf_cli.stages.sharing import divide

if TYPE_CHECKING:
    from rlhf_cli.recipe.schema import LabelSettings


def run(context: StageContext) -> StageOutcome:
    """Write `rankings.jsonl`."""
    settings = context.recipe.label
    assert settings is not None
    if settings.by == "import":
        return _import(context) if is_main() else StageOutcome()
    prompts, answers, processes = _sampled(context, settings)
    texts = [[answer.text for answer in group] for group in answers]
    pairs = list(zip(prompts.prompts, texts, strict=True))
    if settings.by == "function":  # the user's code: it runs once, in one process
        scores = _scores(context, settings, pairs) if processes.is_main else []
    else:
        scores = divide(processes, pairs, partial(_scores, context, settings))
    if not processes.is_main:
        return StageOutcome()
    rankings = [
        Ranking(prompt, tuple(group), tiers_from_scores(numbers, settings.tie_margin))
        for prompt, group, numbers in zip(prompts.prompts, texts, scores, strict=True)
    ]
    write_rankings(context.output / "rankings.jsonl", rankings, scores)
    if prompts.skips.total:
        prompts.skips.write(context.output / "skips.jsonl")
    return _outcome(LabelStatistics.of(rankings), prompts.skips.counts, answers, scores)


def _import(context: StageContext) -> StageOutcome:
    from rlhf_cli.data.sources import read_records

    data = context.recipe.data
    loaded = read_records(context.inputs["label.data"], "ranking", columns=data.columns, max_skip=data.max_skip)
    write_rankings(context.output / "rankings.jsonl", loaded.records)
    if loaded.skips.total:
        loaded.skips.write(context.output / "skips.jsonl")
    return _outcome(LabelStatistics.of(loaded.records), loaded.skips.counts)


def _scores(
    context: StageContext, settings: LabelSettings, pairs: Sequence[tuple[Prompt, list[str]]]
) -> list[list[float]]:
    """Scores of each prompt's answers."""
    labeler = _labeler(context, settings)
    prompts, texts = [prompt for prompt, _ in pairs], [answers for _, answers in pairs]
    with task("scoring answers", sum(map(len, texts)), "answers") as bar:
        return score_answers(labeler, prompts, texts, stop=context.stop.check, progress=bar.advance)


def _sampled(context: StageContext, settings: LabelSettings) -> tuple[Prompts, list[list[Answer]], Processes]:
    """K answers to every prompt, held-out ones too: train-rm measures its accuracy on their rankings."""
    import torch

    from rlhf_cli.models.loading import load_policy, load_tokenizer
    from rlhf_cli.rollout.experience import decode
    from rlhf_cli.rollout.sampling import sample, stop_ids

    recipe, sampling, per_prompt = context.recipe, settings.sampling, settings.completions_per_prompt
    source = model_source(recipe, context.inputs["sft"])
    tokenizer = load_tokenizer(source)
    model = load_policy(source)
    form = prompt_format(recipe, source, tokenizer)
    prompts = load_prompts(context, form, model.config, max_new_tokens=sampling.max_new_tokens)
    eos_ids = stop_ids(model, tokenizer)
    processes = Processes(source.device)
    # Prompts of like length are sampled together; which ones is settled before anything is sampled.
    order = sorted(range(len(prompts.ids)), key=lambda number: len(prompts.ids[number]))
    size = max(1, sampling.batch_size // per_prompt)
    file = AnswerFile(
        context.work / "samples.jsonl",
        [order[start : start + size] for start in range(0, len(order), size)],
        per_prompt,
        processes,
    )
    if file.done:
        say(f"{file.done:,} answers were sampled before")
    with task("sampling answers", file.done + file.left, "answers", done=file.done) as bar:

        def draw(chunk: Sequence[int]) -> list[Answer]:
            rows = [(number, k) for number in chunk for k in range(per_prompt)]
            with torch.autocast(source.device.type, dtype=source.precision, enabled=source.precision != torch.float32):
                drawn = sample(
                    model,
                    [prompts.ids[number] for number, _ in rows],
                    [seed_for(prompts.prompts[number], recipe.seed, k) for number, k in rows],
                    max_new_tokens=sampling.max_new_tokens,
                    temperature=sampling.temperature,
                    top_p=sampling.top_p,
                    eos_ids=eos_ids,
                    batch_size=sampling.batch_size,
                    progress=bar.advance,
                )
            return [
                Answer(number, decode(tokenizer, one.ids), len(one.ids), one.ended)
                for (number, _), one in zip(rows, drawn, strict=True)
            ]

        file.fill(draw, context.stop.check)
    return prompts, file.read(), processes


def _labeler(context: StageContext, settings: LabelSettings) -> Labeler:
    if settings.by == "function":
        from rlhf_cli.rewards.functions import load_scoring_function

        return FunctionLabeler(load_scoring_function(context.inputs["label.function"]))
    from rlhf_cli.models.scorer import load_scorer

    source = model_source(context.recipe, context.inputs["train-rm"])
    scorer = load_scorer(source, template=prompt_template(context.recipe, context.inputs["sft"]))
    return RewardModelLabeler(scorer, settings.sampling.batch_size)


def write_rankings(path: Path, rankings: Sequence[Ranking], scores: Sequence[Sequence[float]] | None = None) -> None:
    """Write rankings as `rlhf train-rm` and people read them, one JSON object a line."""
    with path.open("w", encoding="utf-8") as file:
        for number, ranking in enumerate(rankings):
            row = {
                "prompt": prompt_to_json(ranking.prompt),
                "completions": list(ranking.completions),
                "ranking": [list(tier) for tier in ranking.tiers],
            }
            if ranking.margin is not None:
                row["margin"] = ranking.margin
            if ranking.annotator is not None:
                row["annotator"] = ranking.annotator
            if scores is not None:
                row["scores"] = list(scores[number])
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def _outcome(
    statistics: LabelStatistics,
    skipped: dict[str, int],
    answers: Sequence[Sequence[Answer]] | None = None,
    scores: Sequence[Sequence[float]] | None = None,
) -> StageOutcome:
    metrics = {
        "prompts": float(statistics.prompts),
        "completions": float(statistics.completions),
        "mean_tiers": statistics.mean_tiers,
        "tie_share": statistics.tie_share,
        "mean_characters": statistics.mean_characters,
    }
    summary = [
        ("rankings", f"{statistics.prompts:,} prompts, {statistics.completions:,} answers"),
        ("ties", f"{statistics.tie_share:.1%} of pairs"),
    ]
    if statistics.longest_wins is not None:
        metrics["longer_wins_share"] = statistics.longest_wins
        summary.append(("longer answer wins", f"{statistics.longest_wins:.1%} of untied pairs"))
    if answers is not None and scores is not None:
        flat, numbers = [answer for group in answers for answer in group], [x for group in scores for x in group]
        metrics |= {
            "mean_tokens": sum(answer.tokens for answer in flat) / len(flat),
            "ended_share": sum(answer.ended for answer in flat) / len(flat),
            "empty_share": sum(not answer.text for answer in flat) / len(flat),
            "mean_score": sum(numbers) / len(numbers),
        }
        summary.append(
            ("answers", f"{metrics['mean_tokens']:.1f} tokens, {metrics['ended_share']:.0%} ended by themselves")
        )
        if metrics["empty_share"]:
            warn(f"{sum(not answer.text for answer in flat):,} of {len(flat):,} sampled answers are empty")
    return StageOutcome(metrics=metrics, skipped=skipped, summary=summary)
