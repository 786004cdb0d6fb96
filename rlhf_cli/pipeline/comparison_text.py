"""A comparison of runs as text: the groups, a table per pair, and what can be told."""

from __future__ import annotations

import string
import textwrap

from rlhf_cli.intervals import percent
from rlhf_cli.pipeline.run_comparison import MEASURES, SHARES, PairOfGroups, RunComparison, signed, span

_LETTERS = string.ascii_uppercase
_WIDTH = 80


def comparison_text(found: RunComparison, *, has_sentences: bool = True) -> str:
    """Return the comparison for people: the groups, a table per pair, and what can be told; fits 80 columns."""
    lines = []
    for letter, group in zip(_LETTERS, found.groups, strict=False):
        seeds = ", ".join(map(str, group.seeds))
        lines.append(f"{letter}  {group.name}  ({'seeds' if len(group.seeds) > 1 else 'seed'} {seeds})")
    for letter, pair in zip(_LETTERS[1:], found.pairs, strict=False):
        lines += ["", *_table(pair, _LETTERS[0], letter, found.prompts)]
        lines += ["", *textwrap.wrap(pair.says, _WIDTH)] if has_sentences else []
    for note in found.notes:
        lines += ["", *textwrap.wrap(f"note: {note}", _WIDTH)]
    return "\n".join(lines)


def _table(pair: PairOfGroups, first: str, second: str, prompts: int) -> list[str]:
    shared = f"{prompts:,} {'prompt' if prompts == 1 else 'prompts'}"
    lines = [f"{shared:<25}{first:>8}{second:>8}{f'{second} - {first}':>9}  95% interval over"]
    for name, found in pair.measures.items():
        size = found.second - found.first
        start = f"{MEASURES[name]:<25}{_value(name, found.first):>8}{_value(name, found.second):>8}"
        start += f"{signed(name, size):>9}  "
        for number, (measure, label) in enumerate(
            ((found.prompts, "prompts"), (found.seeds, "seeds"), (found.both, "both"))
        ):
            if measure.low is not None and measure.high is not None:
                lines.append(f"{start if number == 0 else ' ' * len(start)}{label:<9}{span(name, measure)}")
            elif number == 0:
                lines.append(start + (measure.missing or ""))
    return lines


def _value(name: str, value: float) -> str:
    return percent(value) if name in SHARES else f"{value:.3g}"
