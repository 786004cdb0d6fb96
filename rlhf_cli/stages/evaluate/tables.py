"""An evaluation in the terminal: a table of both models, and their completions of the same prompts side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from rlhf_cli.data.records import prompt_text
from rlhf_cli.intervals import percent, percent_span
from rlhf_cli.stages.evaluate.comparison import Comparison
from rlhf_cli.stages.evaluate.results import Evaluation
from rlhf_cli.stages.evaluate.text_statistics import printable

_ROWS = (
    ("gold score", "gold/{}_mean", "{:.2f}"),
    ("reward", "reward/{}_mean", "{:.2f}"),
    ("length in tokens", "length/{}_mean", "{:.1f}"),
    ("finished", "finished/{}", "{:z.1%}"),
    ("most common completion", "diversity/{}_most_common_share", "{:z.1%}"),
    ("distinct-2 (variety)", "diversity/{}_distinct_2", "{:.2f}"),
    ("repeated 4-grams", "diversity/{}_repeated_4", "{:z.1%}"),
    ("entropy, nats per token", "entropy/{}", "{:.2f}"),
    ("perplexity of demonstrations", "perplexity/{}", "{:.2f}"),
)
_LONGEST_NAME = 24
_COLUMNS = (
    ("gold", "gold", "{:.2f}"),
    ("reward", "reward", "{:.2f}"),
    ("tokens", "tokens", "{:.1f}"),
    ("ended", "finished", "{:z.1%}"),
    ("entropy", "entropy", "{:.2f}"),
    ("perplexity", "perplexity", "{:.2f}"),
)


def metrics_table(metrics: Mapping[str, float], names: Sequence[str]) -> Table:
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
    interval = percent_span(metrics["win_rate_low"], metrics["win_rate_high"])
    table.add_row("policy preferred (ties 1/2)", "", percent(metrics["win_rate"]))
    table.add_row("  95% interval", "", interval)
    if "win_rate_length_controlled" in metrics:
        table.add_row("  at equal lengths", "", percent(metrics["win_rate_length_controlled"]))
    if "kl_nats" in metrics:
        table.add_row("KL to baseline, nats per completion", "", f"{metrics['kl_nats']:z.1f}")
        table.add_row("  standard error", "", f"{metrics['kl_nats_se']:.1f}")
    return table


def models_table(evaluation: Evaluation) -> Table:
    """Return a table with a row per model; fits 80 columns."""
    table = Table(box=box.SIMPLE, pad_edge=False)
    table.add_column(f"{evaluation.pairs[0].win_rate.n:,} prompts", overflow="fold")
    columns = [one for one in _COLUMNS if any(one[1] in found for found in evaluation.models.values())]
    for heading, _, _ in columns:
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("KL", justify="right", no_wrap=True)
    kl = {pair.policy: f"{pair.kl[0].mean.value:z.1f}" for pair in evaluation.against_baseline if pair.kl}
    for name, found in evaluation.models.items():
        cells = [pattern.format(found[key].value) if key in found else "" for _, key, pattern in columns]
        table.add_row(Text(name), *cells, kl.get(name, ""))
    return table


def pairs_table(evaluation: Evaluation) -> Table:
    """Return a table with the win rate of each pair of models; fits 80 columns."""
    table = Table(box=box.SIMPLE, pad_edge=False)
    for heading in ("preferred", "to"):
        table.add_column(heading, overflow="fold")
    for heading in ("win rate", "95% interval", "equal lengths", "sign p"):
        table.add_column(heading, justify="right", no_wrap=True)
    for pair in evaluation.pairs:
        rate, controlled = pair.win_rate, pair.length_controlled.win_rate.value
        table.add_row(
            Text(pair.policy),
            Text(pair.baseline),
            percent(rate.value),
            percent_span(rate.low, rate.high),
            "" if controlled is None else percent(controlled),
            "<0.001" if pair.sign_test.p_value < 0.001 else f"{pair.sign_test.p_value:.3f}",
        )
    return table


def tasks_table(evaluation: Evaluation) -> Table | None:
    """Return a table with the figures of `evaluate.tasks`; None without tasks. Fits 80 columns."""
    table = Table(box=box.SIMPLE, pad_edge=False)
    for heading in ("task", "model"):
        table.add_column(heading, overflow="fold")
    for heading in ("value", "95% interval"):
        table.add_column(heading, justify="right", no_wrap=True)
    for task in (name for name in evaluation.models[evaluation.baseline] if name.startswith("task/")):
        for model, measures in evaluation.models.items():
            if task not in measures:
                continue  # best-of-n completions are not what a task asks a model for
            found = measures[task]
            interval = "" if found.low is None else f"{found.low:.3f} to {found.high:.3f}"
            table.add_row(Text(task.removeprefix("task/")), Text(model), f"{found.value:.3f}", interval)
    return table if table.row_count else None


def side_by_side(
    comparison: Comparison,
    tie_margin: float,
    *,
    number: int,
    others: Mapping[str, Comparison] = {},
    longest: int = 600,
) -> RenderableType:
    """Return a prompt with the completion of every model below it, each with its score.

    Args:
        comparison: what to show.
        tie_margin: see `Comparison.winner`.
        number: of the sample, 1-based.
        others: name -> comparison of further policies with the baseline.
        longest: characters shown of each text.
    """
    winner = comparison.winner(tie_margin)
    grid = Table.grid(padding=(0, 2))
    grid.add_column(justify="right", no_wrap=True)
    grid.add_column(overflow="fold")
    grid.add_row(Text(f"{number}", style="bold"), Text(_cut(prompt_text(comparison.prompt), longest), style="bold"))
    if comparison.base is not None:
        label = "base" if comparison.base_score is None else f"base {comparison.base_score:.2f}"
        grid.add_row(Text(label, style="dim"), Text(_cut(comparison.base.text, longest // 3), style="dim"))
    sides = [("baseline", comparison.baseline, _score(comparison, 0), winner == "baseline")]
    sides += [("policy", comparison.policy, _score(comparison, 1), winner == "policy")]
    sides += [
        (name[:_LONGEST_NAME], other.policy, _score(other, 1), other.winner(tie_margin) == "policy")
        for name, other in others.items()
    ]
    for name, completion, score, is_better in sides:
        label = Text(f"{name}{score}", style="green" if is_better else "")
        grid.add_row(label, Text(_cut(completion.text, longest)))
    return Group(grid, Text(""))


def _score(comparison: Comparison, side: int) -> str:
    """Return the score that decides, if there is one, as it follows a name."""
    scores = comparison.gold if comparison.gold is not None else comparison.reward
    return "" if scores is None else f" {scores[side]:.2f}"


def _cut(text: str, longest: int) -> str:
    clean = printable(text).strip()
    if not clean:
        return "(empty)"
    return clean if len(clean) <= longest else clean[:longest].rstrip() + " ..."
