"""Computes the progress of a session and of its annotators."""

from __future__ import annotations

import statistics

from rlhf_cli.labeling.session.assignment import remaining_tasks
from rlhf_cli.labeling.session.plan import LabelPlan
from rlhf_cli.labeling.session.rows import Action
from rlhf_cli.labeling.session.state import LabelState
from rlhf_cli.labeling.session.types import AnnotatorOverview, SessionProgress

_PACE_OVER = 20
_ROUNDING = 1e-9


def progress_of(state: LabelState, annotator: int | None) -> SessionProgress:
    """Progress of the session, and of one annotator if given."""
    to_come = 0 if state.growth is None else state.growth.to_come
    items, unresolved = len(state.listed) + to_come, len(state.unresolved) + to_come
    done, left, hidden, mine = items - unresolved, 0, 0, []
    if annotator is not None:
        mine, ordinary = state.stack[annotator], unresolved - state.open_answered[annotator]
        left = remaining_tasks(state, annotator, ordinary)
        hidden = left - ordinary + sum(state.assignments[one.assignment].purpose != "label" for one in mine)
    return SessionProgress(
        items=items,
        done=done,
        set_aside=state.set_aside,
        labels=state.labels,
        labels_left=state.labels_left + to_come * state.plan.overlap,
        is_complete=state.growth is None and done >= state.plan.enough * items - _ROUNDING,  # 0.07 * 100 is above 7
        mine=len(mine),
        left_for_me=left,
        hidden=hidden,
        pace_seconds=_median_seconds(mine[-_PACE_OVER:]),
        growth=state.growth,
    )


def tasks_note(progress: SessionProgress, plan: LabelPlan) -> str:
    """Why an annotator has more tasks than prompts, without saying which; empty if there are not more."""
    tasks, count = progress.mine + progress.left_for_me, progress.hidden
    if not count:
        return ""
    prompts = f"{tasks:,} tasks: {tasks - count:,} {'prompt' if tasks - count == 1 else 'prompts'}"
    if plan.gold_share:
        return f"{prompts}, and {count:,} that {'checks' if count == 1 else 'check'} the labels"
    return f"{prompts}, {count:,} of them twice to measure your consistency"


def overview_of(state: LabelState) -> list[AnnotatorOverview]:
    """Work of each annotator so far, in the order in which they were created."""
    rows = []
    for number, annotator in state.annotators.items():
        given = state.stack[number]
        kinds = [action.kind for action in given]
        rows.append(
            AnnotatorOverview(
                annotator.name,
                labels=kinds.count("ranked"),
                skipped=kinds.count("skipped"),
                flagged=kinds.count("flagged"),
                active_seconds=sum(action.active_ms for action in given) / 1000,
                median_seconds=_median_seconds(given),
                last_at=max((action.at for action in given), default=None),
            )
        )
    return rows


def _median_seconds(actions: list[Action]) -> float | None:
    times = [action.active_ms / 1000 for action in actions if action.kind == "ranked"]
    return statistics.median(times) if times else None
