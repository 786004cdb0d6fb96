"""Active learning in the `label` stage: reward models score the completions, and the prompts to label are selected."""

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

from rlhf_cli.data.records import Candidates, Prompt, prompt_text, prompt_to_json
from rlhf_cli.data.skips import Skip
from rlhf_cli.errors import DataError, ModelError
from rlhf_cli.files import write_whole
from rlhf_cli.labeling.active_learning import Item, SelectedItem, Selection, select
from rlhf_cli.labeling.scoring import RewardModelScorer, score_completions
from rlhf_cli.progress import say, task, warn
from rlhf_cli.stages.common import EXCERPT, load_reward_model
from rlhf_cli.stages.inputs import source_of
from rlhf_cli.stages.label.sampling import ALL_EQUAL, Sampled
from rlhf_cli.stages.label.selection import items_of
from rlhf_cli.stages.label.stage import LabelContext

if TYPE_CHECKING:
    from rlhf_cli.stages.label.settings import ActiveLearningSettings

FILE_NAME = "chosen.jsonl"
_NO_DIFFERENCE = 1e-9


def select_candidates(context: LabelContext, settings: ActiveLearningSettings, sampled: Sampled) -> Sampled:
    """Select the prompts and completions to label, in their original order; writes `chosen.jsonl`.

    The selection is saved with the samples. A run that waits for annotators calls this on every attempt, and reads the
    saved selection instead of scoring again.

    Raises:
        DataError: no prompt has two different completions.
        ModelError: a reward model cannot be loaded, or its reward is not finite.
    """
    rows, seed = sampled.candidates, context.recipe.seed
    items = items_of(context, [row.prompt for row in rows], [row.completions for row in rows])
    file = _SavedSelection(context.work / FILE_NAME, items)
    saved = sampled.processes.all_gather_object(file.read() if sampled.processes.is_main else None)[0]
    if saved is None:
        given = _with_rewards(context, settings, sampled, items)
        found = select(given, by=settings.by, prompts=settings.prompts, completions=settings.completions, seed=seed)
        if sampled.processes.is_main:
            file.write(found)
        chosen = found.selected
        _report(settings, len(items), sampled.selected_from, found)
    else:
        say(f"reusing the selection of {len(saved):,} of {len(rows):,} prompts")
        chosen = [SelectedItem(**{**row, "completions": tuple(row["completions"])}) for row in saved]
    identical = [row for row in rows if len(set(row.completions)) < 2]
    for row in identical:
        sampled.skips.add(Skip(row.location, ALL_EQUAL, prompt_text(row.prompt)[:EXCERPT]))
    if not chosen:
        raise DataError(
            f"active learning has nothing to select from: the completions of each of {len(rows):,} prompts are equal",
            hint="sample at a higher temperature, or from a model that was trained less",
        )
    if sampled.processes.is_main:
        _write(context.output / FILE_NAME, rows, chosen)
    return dataclasses.replace(
        sampled,
        candidates=[_only(rows[one.item], one.completions) for one in chosen],
        completions=[[sampled.completions[one.item][number] for number in one.completions] for one in chosen]
        if sampled.completions
        else [],
    )


def _with_rewards(
    context: LabelContext, settings: ActiveLearningSettings, sampled: Sampled, items: Sequence[Item]
) -> list[Item]:
    """Add rewards to the items that need them; one reward model is in memory at a time."""
    asked = [number for number, item in enumerate(items) if not item.is_held_out and len(set(item.completions)) > 1]
    pairs = [(sampled.candidates[number].prompt, list(items[number].completions)) for number in asked]
    total = sum(len(completions) for _, completions in pairs)
    found: list[list[list[float]]] = []
    for index in range(len(settings.reward_models)):
        work = partial(rewards_of, context, context.inputs.active_learning[index].source, total)
        found.append(sampled.processes.map(pairs, work))
    if not found:
        return list(items)
    rewards = {number: np.array([model[position] for model in found]) for position, number in enumerate(asked)}
    return [dataclasses.replace(item, rewards=rewards.get(number)) for number, item in enumerate(items)]


def rewards_of(
    context: LabelContext, path: str, total: int, pairs: list[tuple[Prompt, list[str]]]
) -> list[list[float]]:
    """Rewards of each prompt's completions by one model, on the scale of its preferences.

    Args:
        context: of the stage.
        path: of the reward model.
        total: completions that all processes score with it.
        pairs: prompts of this process, with their completions.
    """
    from rlhf_cli.memory import free_memory

    model = load_reward_model(context, path, policy=source_of(context.inputs.policy))
    # Stages use normalized rewards, but preferences are defined on raw ones: the ranking loss was computed on them.
    model.mean, model.std = 0.0, 1.0
    scorer = RewardModelScorer(model, context.settings.sampling.batch_size)
    prompts, texts = [prompt for prompt, _ in pairs], [completions for _, completions in pairs]
    own = sum(map(len, texts))
    with task(f"scoring with {Path(path).name}", total, "completions", share=own) as bar:
        scores = score_completions(scorer, prompts, texts, stop=context.stop.check, progress=bar.advance)
    del model, scorer
    free_memory()
    if not np.isfinite([score for group in scores for score in group]).all():
        raise ModelError(
            f"the reward model `{path}` gave a reward that is not finite, so active learning cannot use it",
            hint="set `model.precision: float32`, or use another model in `label.active_learning.reward_models`",
        )
    return scores


def _report(settings: ActiveLearningSettings, sampled: int, selected_from: int | None, selection: Selection) -> None:
    """Say what was selected.

    Args:
        settings: of the selection.
        sampled: number of prompts with completions.
        selected_from: see `Sampled`.
        selection: what was found.
    """
    chosen, equal = selection.selected, len(selection.identical)
    held_out = sum(one.is_held_out for one in chosen)
    if selected_from is None:
        usable = sampled - equal
        skipped = f"{equal:,} of {sampled:,} prompts are skipped: their completions are all equal"
    else:  # no other prompt takes the place of one whose completions are all equal
        usable = selected_from
        skipped = (
            f"{equal:,} of the {sampled:,} selected prompts are skipped: their completions are all equal; "
            f"{len(chosen):,} are labeled"
        )
    if equal:
        warn(skipped)
    if usable < settings.prompts:
        warn(f"`label.active_learning.prompts: {settings.prompts:,}` exceeds the {usable:,} prompts: all are labeled")
    scores = [one.score for one in chosen if one.score is not None]
    every = [*scores, *selection.not_selected]
    if len(every) > 1 and max(every) - min(every) < _NO_DIFFERENCE:
        warn(f"{_reason(settings.by, max(every))}: selection by {settings.by} is no better than random here")
    if not chosen:
        return
    text = f"selected by {settings.by}: {len(chosen):,} of {usable:,} prompts"
    text += "" if settings.completions is None else f", {settings.completions} completions each"
    text += f"; {held_out:,} of them held out and selected at random" if held_out else ""
    if scores:
        unit = "bits of entropy" if settings.by == "uncertainty" else "standard deviation"
        text += f"; mean score {fmean(scores):.3f} ({unit})"
        text += f", of the rest {fmean(selection.not_selected):.3f}" if selection.not_selected else ""
    say(text)


def _reason(by: str, score: float) -> str:
    if by == "disagreement" and score < _NO_DIFFERENCE:
        return "the preferences of the reward models do not differ at all (are they copies of one model?)"
    return "all prompts have the same score"


def _only(row: Candidates, completions: Sequence[int]) -> Candidates:
    """Keep these completions alone; a known order stays known."""
    if len(completions) == len(row.completions):
        return row
    positions = {number: position for position, number in enumerate(completions)}
    known = None
    if row.known is not None:
        tiers = [tuple(sorted(positions[number] for number in tier if number in positions)) for tier in row.known]
        known = tuple(tier for tier in tiers if tier)
    return dataclasses.replace(
        row,
        completions=tuple(row.completions[number] for number in completions),
        known=known,
        cut_off=tuple(row.cut_off[number] for number in completions) if row.cut_off else (),
    )


def _write(path: Path, rows: Sequence[Candidates], chosen: Sequence[SelectedItem]) -> None:
    with path.open("w", encoding="utf-8") as file:
        for one in chosen:
            row = {
                "prompt": prompt_to_json(rows[one.item].prompt),
                "completions": list(one.completions),
                "score": one.score,
                "rank": one.rank,
                "held_out": one.is_held_out,
            }
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


class _SavedSelection:
    """A selection, saved in a file with a checksum and a hash of the items it was made from.

    Args:
        path: of the file.
        items: available items.
    """

    def __init__(self, path: Path, items: Sequence[Item]) -> None:
        self._path = path
        self._of = _sha256([[item.key, item.completions, item.is_held_out] for item in items])

    def read(self) -> list[dict[str, Any]] | None:
        """Return the fields of each `SelectedItem`; None if the file is missing, damaged, or about other items."""
        try:
            plain = json.loads(self._path.read_bytes())
            is_whole = plain["of"] == self._of and plain["sha256"] == _sha256(plain["chosen"])
            return plain["chosen"] if is_whole else None
        except (OSError, ValueError, KeyError, TypeError):
            return None  # selected again; only time is lost

    def write(self, selection: Selection) -> None:
        """Save a selection."""
        chosen = [dataclasses.asdict(one) for one in selection.selected]
        text = json.dumps({"of": self._of, "sha256": _sha256(chosen), "chosen": chosen})
        write_whole(self._path, text)


def _sha256(plain: Any) -> str:
    return hashlib.sha256(json.dumps(plain).encode()).hexdigest()
