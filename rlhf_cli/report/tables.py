"""Tables of a report: figures of the models, and what changed in their completions, from `evaluation.json`."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rlhf_cli.intervals import percent
from rlhf_cli.report.gather import RunFiles
from rlhf_cli.report.texts import visible
from rlhf_cli.report.verdict import first_pair

_SCORES = (
    ("gold", "gold score", "{:z.2f}"),
    ("reward", "reward", "{:z.2f}"),
    ("entropy", "entropy, nats per token", "{:z.2f}"),
    ("kl_upper_bound", "upper bound of the KL to the sampled model, nats", "{:z.1f}"),
    ("perplexity", "perplexity of demonstrations", "{:z.2f}"),
)
_TEXTS = (
    ("tokens", "length in tokens", "{:.1f}"),
    ("finished", "finished", "{:z.1%}"),
    ("repeated_4", "repeated sequences of 4 words", "{:z.1%}"),
    ("distinct_2", "distinct-2 (variety)", "{:z.2f}"),
    ("most_common_share", "most common completion", "{:z.1%}"),
)
_EQUAL = 0.05
"""Relative difference up to which lengths, or shares of distinct word pairs, are called about equal."""
_REPEATS = 0.01
"""Difference of repeated sequences from which it is named, as a share."""
_ENDS = 0.05
"""Difference of the shares of finished completions from which it is named."""
_RARE = 0.02
"""Difference of the shares of a phrase from which it is named."""


@dataclass(frozen=True)
class Table:
    """Rows of cells; the first cell of a row names it."""

    head: Sequence[str]
    rows: Sequence[Sequence[str]]


def score_tables(run: RunFiles) -> list[Table]:
    """Return the scores of all models, with their intervals."""
    return _model_tables(run, _SCORES)


def text_tables(run: RunFiles) -> list[Table]:
    """Return the figures of the completions of all models, and the phrases that are most common in the first two."""
    pair = first_pair(run)
    if pair is None:
        return []
    found = _model_tables(run, _TEXTS)
    for name, title in (("openings", "completions begin with"), ("endings", "completions end with")):
        if rows := pair.get("phrases", {}).get(name):
            cells = [[f"“{visible(row['text'])}”", percent(row["baseline"]), percent(row["policy"])] for row in rows]
            found.append(Table([title, pair["baseline"], pair["policy"]], cells))
    return found


def _model_tables(run: RunFiles, metrics: Sequence[tuple[str, str, str]]) -> list[Table]:
    if run.evaluation is None:
        return []
    models: Mapping[str, Mapping[str, Any]] = run.evaluation["models"]
    rows = []
    for name, label, pattern in metrics:
        if any(name in measures for measures in models.values()):
            rows.append([label, *(_measured(measures.get(name), pattern) for measures in models.values())])
    return [Table(["mean (95% interval)", *models], rows)] if rows else []


def _measured(measure: Mapping[str, Any] | None, pattern: str) -> str:
    if measure is None or measure["value"] is None:
        return ""
    value = pattern.format(measure["value"])
    if measure.get("low") is None:
        return value
    return f"{value} ({pattern.format(measure['low'])} to {pattern.format(measure['high'])})"


def changes(run: RunFiles) -> list[str]:
    """Return what changed in the completions from the baseline to the policy, in sentences; none without evaluation."""
    pair = first_pair(run)
    if pair is None:
        return []
    assert run.evaluation is not None
    policy, baseline = (run.evaluation["models"][pair[side]] for side in ("policy", "baseline"))
    parts = list(_of_texts(policy, baseline))
    listed = f"{', '.join(parts[:-1])} and {parts[-1]}" if len(parts) > 1 else parts[0]
    found = [f"Completions of {pair['policy']} are {listed}, compared with those of {pair['baseline']}."]
    if (same := pair.get("identical_share")) is not None:
        found[0] += f" {'None' if same == 0 else percent(same)} of them are the same as the baseline's."
    if said := list(_of_phrases(pair)):
        found.append(f"The largest change in phrases: more of them {' and '.join(said)}.")
    return found


def _of_texts(policy: Mapping[str, Any], baseline: Mapping[str, Any]) -> Iterator[str]:
    """Yield how the policy's completions are: length, variety, repetition."""

    def both(name: str) -> tuple[float, float]:
        return policy[name]["value"], baseline[name]["value"]

    (now, before), ratio = both("tokens"), _ratio(*both("tokens"))
    length = "about as long" if abs(ratio - 1) <= _EQUAL else f"{ratio:.2f} times as long"
    yield f"{length} ({now:.1f} instead of {before:.1f} tokens)"
    now, before = both("finished")
    if abs(now - before) >= _ENDS:
        often = "more" if now > before else "less"
        yield f"{often} often finished before the token limit ({percent(now)} instead of {percent(before)})"
    (now, before), ratio = both("distinct_2"), _ratio(*both("distinct_2"))
    varied = "about as" if abs(ratio - 1) <= _EQUAL else "more" if ratio > 1 else "less"
    yield f"{varied} varied (distinct-2: {now:.2f} instead of {before:.2f})"
    now, before = both("repeated_4")
    if abs(now - before) >= _REPEATS:
        more = "more" if now > before else "less"
        yield f"{more} repetitive ({percent(now)} instead of {percent(before)} of the sequences of 4 words)"


def _ratio(now: float, before: float) -> float:
    return now / before if before else (math.inf if now else 1.0)


def _of_phrases(pair: Mapping[str, Any]) -> Iterator[str]:
    """Yield the opening and the ending that became more common by most."""
    for name, verb in (("openings", "begin"), ("endings", "end")):
        rows = pair.get("phrases", {}).get(name, ())
        row = max(rows, key=lambda one: one["policy"] - one["baseline"], default=None)
        if row is not None and row["policy"] - row["baseline"] >= _RARE:
            shares = f"{percent(row['policy'])} instead of {percent(row['baseline'])}"
            yield f"{verb} with “{visible(row['text'])}” ({shares})"
