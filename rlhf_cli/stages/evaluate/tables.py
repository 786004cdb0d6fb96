"""An evaluation in the terminal: a table of both models, and their completions of the same prompts side by side."""

from __future__ import annotations

from collections.abc import Mapping

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from rlhf_cli.data.records import prompt_text
from rlhf_cli.stages.evaluate.comparison import Comparison
from rlhf_cli.stages.evaluate.text_statistics import printable

_ROWS = (
    ("gold score", "gold/{}_mean", "{:.2f}"),
    ("reward", "reward/{}_mean", "{:.2f}"),
    ("length in tokens", "length/{}_mean", "{:.1f}"),
    ("finished", "finished/{}", "{:.0%}"),
    ("most common completion", "diversity/{}_most_common_share", "{:.1%}"),
    ("distinct word pairs", "diversity/{}_distinct_2", "{:.2f}"),
    ("repeated 4-grams", "diversity/{}_repeated_4", "{:.1%}"),
)


def metrics_table(metrics: Mapping[str, float], names: tuple[str, str]) -> Table:
    """Return a table with the metrics of both models; fits 80 columns.

    Args:
        metrics: see `comparison_metrics`.
        names: of the baseline and of the policy.
    """
    table = Table(box=box.SIMPLE, pad_edge=False)
    table.add_column(f"{metrics['prompts']:,.0f} prompts", no_wrap=True)
    table.add_column("baseline", justify="right", overflow="fold")
    table.add_column("policy", justify="right", overflow="fold")
    table.add_row("model", *map(Text, names))
    for label, key, pattern in _ROWS:
        names = key.format("baseline"), key.format("policy")
        if names[0] in metrics:
            table.add_row(label, *(pattern.format(metrics[name]) for name in names))
    table.add_section()
    interval = f"{metrics['win_rate_low']:.1%} to {metrics['win_rate_high']:.1%}"
    table.add_row("policy preferred (ties 1/2)", "", f"{metrics['win_rate']:.1%}")
    table.add_row("  95 % interval", "", interval)
    if "kl_nats" in metrics:
        table.add_row("KL to baseline, nats per completion", "", f"{metrics['kl_nats']:z.1f}")
    return table


def side_by_side(comparison: Comparison, tie_margin: float, *, number: int, longest: int = 600) -> RenderableType:
    """Return a prompt with the completion of every model below it, each with its score.

    Args:
        comparison: what to show.
        tie_margin: see `Comparison.winner`.
        number: of the sample, 1-based.
        longest: characters shown of each text.
    """
    scores = comparison.gold if comparison.gold is not None else comparison.reward
    assert scores is not None
    winner = comparison.winner(tie_margin)
    grid = Table.grid(padding=(0, 2))
    grid.add_column(justify="right", no_wrap=True)
    grid.add_column(overflow="fold")
    grid.add_row(Text(f"{number}", style="bold"), Text(_cut(prompt_text(comparison.prompt), longest), style="bold"))
    if comparison.base is not None:
        label = "base" if comparison.base_score is None else f"base {comparison.base_score:.2f}"
        grid.add_row(Text(label, style="dim"), Text(_cut(comparison.base.text, longest // 3), style="dim"))
    sides = (("baseline", comparison.baseline, scores[0]), ("policy", comparison.policy, scores[1]))
    for name, completion, score in sides:
        style = "green" if winner == name else ""
        grid.add_row(Text(f"{name} {score:.2f}", style=style), Text(_cut(completion.text, longest)))
    return Group(grid, Text(""))


def _cut(text: str, longest: int) -> str:
    clean = printable(text).strip()
    if not clean:
        return "(empty)"
    return clean if len(clean) <= longest else clean[:longest].rstrip() + " ..."
