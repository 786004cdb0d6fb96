"""Completions to look at: of a few fixed prompts during training, and those behind a warning."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.text import Text

from rlhf_cli.console import console
from rlhf_cli.data.records import Prompt, prompt_text
from rlhf_cli.plain_text import printable
from rlhf_cli.progress import say, warn
from rlhf_cli.training.monitoring.detectors.observation import Detection
from rlhf_cli.training.monitoring.step_lines import StepLines

_LINES_SHOWN = 12
"""Lines of a completion that are printed; the file has all of it."""
_PROMPT_EXCERPT, _COMPLETION_EXCERPT = 60, 120
_QUOTES_PRINTED = 2
"""Completions that a warning quotes; `detections.jsonl` has more."""


@dataclass(frozen=True)
class ShownCompletion:
    """A completion and the values that describe it.

    Attributes:
        prompt: as text.
        completion: as rewards see it.
        score: its reward.
        kl: its log-ratio of policy to SFT model, in nats.
        tokens: its number of tokens, the end token included.
        ended: whether it finished.
    """

    prompt: str
    completion: str
    score: float
    kl: float
    tokens: int
    ended: bool


class SampleLog:
    """Prints completions and appends them to a `samples.jsonl`.

    Args:
        path: the file.
        after_step: lines of later steps are dropped, because those steps run again.
    """

    def __init__(self, path: Path, *, after_step: int = 0) -> None:
        self._lines = StepLines(path, after_step=after_step, sparse=True)

    def show(self, step: int, rows: Sequence[ShownCompletion]) -> None:
        """Append and print the completions sampled after `step` steps; those of a step that stayed are there."""
        if step > self._lines.kept_step:
            self._lines.append(*({"step": step} | _plain(row) for row in rows))
            self._lines.sync()
        console.print(view(step, rows), soft_wrap=False)  # wrapped in logs too

    def close(self) -> None:
        """Close the file."""
        self._lines.close()


def _plain(row: ShownCompletion) -> dict[str, Any]:
    """Return a completion as JSON has it."""
    return {
        name: value if not isinstance(value, float) or math.isfinite(value) else None
        for name, value in asdict(row).items()
    }


def view(step: int, rows: Sequence[ShownCompletion]) -> RenderableType:
    """Return the completions as they are printed: the prompt on one line, the completion under it, and its values."""
    parts: list[RenderableType] = [Text(f"completions after step {step:,}", style="bold")]
    for row in rows:
        prompt = Text(_one_line(row.prompt) or "(an empty prompt)", style="cyan", no_wrap=True, overflow="ellipsis")
        lines = [line for line in printable(row.completion).strip().expandtabs(4).splitlines() if line.strip()]
        shown = [line.rstrip() for line in lines[:_LINES_SHOWN]]
        if len(lines) > _LINES_SHOWN:
            shown.append(f"... {len(lines) - _LINES_SHOWN:,} more lines")
        completion = Text("\n".join(shown)) if shown else Text("(an empty completion)", style="dim")
        end = "" if row.ended else ", did not finish"
        tokens = f"{row.tokens:,} token{'' if row.tokens == 1 else 's'}{end}"
        values = Text(f"reward {row.score:+.2f}, KL {row.kl:z.1f} nats, {tokens}", style="dim")
        parts += [_indented(prompt, 2, above=1), _indented(completion, 4), _indented(values, 4)]
    return Group(*parts, Text())


def warn_of_ratio(*, step: int, skipped: int, limit: float, prompt: Prompt, completion: str, token: str) -> None:
    """Warn of optimizer steps that were skipped because their mean ratio exceeded a limit.

    Args:
        step: 1-based.
        skipped: number of optimizer steps.
        limit: `ppo.ratio_limit`.
        prompt: text or turns, of the completion with the largest ratio.
        completion: as text.
        token: its token with that ratio, as text.
    """
    steps = f"{skipped:,} optimizer step{' was' if skipped == 1 else 's were'}"
    warn(
        f"step {step:,}: {steps} skipped, because the mean probability ratio exceeded `ppo.ratio_limit: {limit:g}`; "
        f"it is largest at {_quoted(token, 30)} in {_quoted(completion, _COMPLETION_EXCERPT)}, the completion of "
        f"{_quoted(prompt_text(prompt), _PROMPT_EXCERPT)}"
    )


def warn_of_detection(found: Detection) -> None:
    """Say in a warning that a detector passed a threshold, or in a line that it is back under it."""
    subject = f"step {found.step:,}: detector `{found.detector}`"
    if found.threshold is None:
        say(f"{subject}: back to normal: {found.seen}")
        return
    lines = [f"{subject}: {found.seen} (`ppo.detectors.{found.detector}.{found.status}: {found.threshold:g}`)"]
    lines += [
        f"  {_quoted(one.completion, _COMPLETION_EXCERPT)} (reward {one.score:+.2f}), the completion of "
        f"{_quoted(one.prompt, _PROMPT_EXCERPT)}"
        for one in found.completions[:_QUOTES_PRINTED]
    ]
    warn("\n".join(lines))


def _indented(text: Text, columns: int, *, above: int = 0) -> Padding:
    return Padding(text, (above, 0, 0, columns), expand=False)


def _one_line(text: str) -> str:
    return " ".join(printable(text).split())


def _quoted(text: str, length: int) -> str:
    """Quote text on one line, cut to `length` characters; white space alone is escaped."""
    plain = _one_line(text)
    if not plain:
        return f'"{text.encode("unicode_escape").decode()[:length]}"'
    return f'"{plain[:length].rstrip()}..."' if len(plain) > length else f'"{plain}"'
