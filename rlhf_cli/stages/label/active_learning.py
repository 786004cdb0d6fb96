"""Active choice in the `label` stage: reward models read the answers, and say which of them are worth a label."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

import numpy as np

from rlhf_cli.data.records import Candidates, Prompt, is_held_out, prompt_key, prompt_text, prompt_to_json
from rlhf_cli.data.skips import Skip
from rlhf_cli.errors import DataError, ModelError
from rlhf_cli.files import write_whole
from rlhf_cli.generation.prompts import prompt_template
from rlhf_cli.labeling.active_learning import Choice, Chosen, Item, choose
from rlhf_cli.labeling.labelers import RewardModelLabeler, score_answers
from rlhf_cli.progress import say, task, warn
from rlhf_cli.stages.common import EXCERPT, model_source
from rlhf_cli.stages.inputs import source_of
from rlhf_cli.stages.label.sampling import ALL_EQUAL, Sampled
from rlhf_cli.stages.label.stage import LabelContext

if TYPE_CHECKING:
    from rlhf_cli.stages.label.settings import ActiveLearningSettings

FILE_NAME = "chosen.jsonl"
_NO_DIFFERENCE = 1e-9


def choose_candidates(context: LabelContext, settings: ActiveLearningSettings, sampled: Sampled) -> Sampled:
    """The prompts and answers to label, in the order they came in; writes `chosen.jsonl`.

    A choice is kept beside the samples: a run that waits for people comes through here whenever it is looked at, and
    reward models are not asked again.

    Raises:
        DataError: no prompt has two different answers.
        ModelError: a reward model gave no finite number, or is none.
    """
    rows = sampled.candidates
    share, seed = context.recipe.data.holdout, context.recipe.seed
    items = [Item(prompt_key(row.prompt), row.completions, is_held_out(row.prompt, share, seed)) for row in rows]
    kept = _Kept(context.work / FILE_NAME, items)
    choice = sampled.processes.all_gather_object(kept.read() if sampled.processes.is_main else None)[0]
    if choice is None:
        given = _with_rewards(context, settings, sampled, items)
        found = choose(given, by=settings.by, prompts=settings.prompts, completions=settings.completions, seed=seed)
        if sampled.processes.is_main:
            kept.write(found)
        chosen = found.chosen
        _tell(settings, items, found)
    else:
        say(f"{len(choice):,} of {len(rows):,} prompts were chosen before")
        chosen = [Chosen(**{**row, "answers": tuple(row["answers"])}) for row in choice]
    alike = [row for row in rows if len(set(row.completions)) < 2]
    for row in alike:
        sampled.skips.add(Skip(row.location, ALL_EQUAL, prompt_text(row.prompt)[:EXCERPT]))
    if not chosen:
        raise DataError(
            f"there is nothing to choose from: the answers to each of {len(rows):,} prompts are equal to one another",
            hint="sample at a higher temperature, or from a model that is trained less",
        )
    if sampled.processes.is_main:
        _write(context.output / FILE_NAME, rows, chosen)
    return dataclasses.replace(
        sampled,
        candidates=[_only(rows[one.item], one.answers) for one in chosen],
        completions=[[sampled.completions[one.item][number] for number in one.answers] for one in chosen]
        if sampled.completions
        else [],
    )


def _with_rewards(
    context: LabelContext, settings: ActiveLearningSettings, sampled: Sampled, items: Sequence[Item]
) -> list[Item]:
    """The items, those that the reward models are asked about with rewards; one model is in memory at a time."""
    asked = [number for number, item in enumerate(items) if not item.is_held_out and len(set(item.answers)) > 1]
    pairs = [(sampled.candidates[number].prompt, list(items[number].answers)) for number in asked]
    found: list[list[list[float]]] = []
    for index in range(len(settings.reward_models)):
        work = partial(_rewards, context, context.inputs.active_learning[index].source)
        found.append(sampled.processes.map(pairs, work))
    if not found:
        return list(items)
    rewards = {number: np.array([model[place] for model in found]) for place, number in enumerate(asked)}
    return [dataclasses.replace(item, rewards=rewards.get(number)) for number, item in enumerate(items)]


def _rewards(context: LabelContext, path: str, pairs: list[tuple[Prompt, list[str]]]) -> list[list[float]]:
    """Rewards of each prompt's answers by one model, in the scale of its preferences."""
    from rlhf_cli.generation.policy import free_memory
    from rlhf_cli.models.reward_model.model import load_reward_model

    scorer = load_reward_model(
        model_source(context.recipe, path),
        template=prompt_template(context.recipe.data.prompt_template, source_of(context.inputs.policy) or path),
    )
    # Stages read normalized rewards. A difference of those is no log-odds of a preference: the ranking loss was
    # computed on raw ones.
    scorer.mean, scorer.std = 0.0, 1.0
    labeler = RewardModelLabeler(scorer, context.settings.sampling.batch_size)
    prompts, texts = [prompt for prompt, _ in pairs], [answers for _, answers in pairs]
    with task(f"choosing: {Path(path).name}", sum(map(len, texts)), "answers") as bar:
        scores = score_answers(labeler, prompts, texts, stop=context.stop.check, progress=bar.advance)
    del scorer, labeler
    free_memory()
    if not np.isfinite([score for group in scores for score in group]).all():
        raise ModelError(
            f"`{path}` gave a reward that is not finite, so it has no preferences to choose by",
            hint="set `model.precision: float32`, or choose by another reward model (`label.choose.reward_models`)",
        )
    return scores


def _tell(settings: ActiveLearningSettings, items: Sequence[Item], choice: Choice) -> None:
    chosen = choice.chosen
    usable, held_out = len(items) - len(choice.alike), sum(one.is_held_out for one in chosen)
    if choice.alike:
        warn(f"{len(choice.alike):,} of {len(items):,} prompts have answers that are all equal; they are left out")
    if usable < settings.prompts:
        warn(f"`label.choose.prompts: {settings.prompts:,}` is more than there are: all {usable:,} prompts are taken")
    scores = [one.score for one in chosen if one.score is not None]
    every = [*scores, *choice.passed_over]
    if len(every) > 1 and max(every) - min(every) < _NO_DIFFERENCE:
        warn(f"{_reason(settings.by, max(every))}: the choice by {settings.by} is one by chance")
    if not chosen:
        return
    text = f"chosen by {settings.by}: {len(chosen):,} of {usable:,} prompts"
    text += "" if settings.completions is None else f", {settings.completions} answers each"
    text += f"; {held_out:,} of them held out and drawn at random" if held_out else ""
    if scores:
        unit = "bits of entropy" if settings.by == "uncertainty" else "standard deviation"
        text += f"; mean score {fmean(scores):.3f} ({unit})"
        text += f", of those passed over {fmean(choice.passed_over):.3f}" if choice.passed_over else ""
    say(text)


def _reason(by: str, score: float) -> str:
    if by == "disagreement" and score < _NO_DIFFERENCE:
        return "the preferences of the reward models do not differ at all (are they copies of one another?)"
    return "the scores of all prompts are alike"


def _only(row: Candidates, answers: Sequence[int]) -> Candidates:
    """The same with these answers alone; an order that is known stays known."""
    if len(answers) == len(row.completions):
        return row
    places = {number: place for place, number in enumerate(answers)}
    known = None
    if row.known is not None:
        tiers = [tuple(sorted(places[number] for number in tier if number in places)) for tier in row.known]
        known = tuple(tier for tier in tiers if tier)
    return dataclasses.replace(row, completions=tuple(row.completions[number] for number in answers), known=known)


def _write(path: Path, rows: Sequence[Candidates], chosen: Sequence[Chosen]) -> None:
    with path.open("w", encoding="utf-8") as file:
        for one in chosen:
            row = {
                "prompt": prompt_to_json(rows[one.item].prompt),
                "answers": list(one.answers),
                "score": one.score,
                "rank": one.rank,
                "held_out": one.is_held_out,
            }
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


class _Kept:
    """A choice among certain items, in a file that says which and whether it is whole.

    Args:
        path: of the file.
        items: what was chosen from.
    """

    def __init__(self, path: Path, items: Sequence[Item]) -> None:
        self._path = path
        self._of = _sha256([[item.key, item.answers, item.is_held_out] for item in items])

    def read(self) -> list[dict[str, Any]] | None:
        """The fields of `Chosen`; None where there is no such choice, or a damaged one."""
        try:
            plain = json.loads(self._path.read_bytes())
            is_whole = plain["of"] == self._of and plain["sha256"] == _sha256(plain["chosen"])
            return plain["chosen"] if is_whole else None
        except (OSError, ValueError, KeyError, TypeError):
            return None  # made again; nothing is lost but time

    def write(self, choice: Choice) -> None:
        """Keep a choice."""
        chosen = [dataclasses.asdict(one) for one in choice.chosen]
        text = json.dumps({"of": self._of, "sha256": _sha256(chosen), "chosen": chosen})
        write_whole(self._path, text)


def _sha256(plain: Any) -> str:
    return hashlib.sha256(json.dumps(plain).encode()).hexdigest()
