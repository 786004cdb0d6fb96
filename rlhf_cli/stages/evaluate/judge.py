"""What decides which completion wins, beside the reward model: the judge function, or a panel of judges."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from rlhf_cli.distributed.process_group import ProcessGroup
from rlhf_cli.stages.common import EXCERPT
from rlhf_cli.stages.evaluate.comparison import Winner
from rlhf_cli.stages.evaluate.stage import EvaluateContext
from rlhf_cli.stages.inputs import present
from rlhf_cli.stages.panel import ask_panel

if TYPE_CHECKING:
    from rlhf_cli.data.records import Prompt
    from rlhf_cli.data.sources import LoadedRecords
    from rlhf_cli.generation.generator import Completion
    from rlhf_cli.generation.policy import Policy
    from rlhf_cli.rewards.base import Reward
    from rlhf_cli.stages.evaluate.results import PanelVerdicts
    from rlhf_cli.stages.evaluate.sides import Side

_WINNERS: dict[int, Winner] = {1: "baseline", 0: "tie", -1: "policy"}
"""Verdict on a pair (i, j), see `labeling.judges.verdicts`, with j as the policy."""


@dataclass(frozen=True)
class Judge:
    """The judge function.

    Attributes:
        function: the function.
        references: see `references_of`.
    """

    function: Reward
    references: Mapping[str, Any]

    def scores(self, prompts: Sequence[Prompt], policy: Policy, completions: Sequence[Completion]) -> list[float]:
        """Return the gold scores of a policy's N completions of N prompts."""
        from rlhf_cli.rewards.base import columns_of
        from rlhf_cli.rewards.validation import finite_scores

        columns = columns_of(prompts, self.references, completions, partial(policy.decode, raw=True))
        texts = [completion.text for completion in completions]
        return finite_scores(self.function, prompts, texts, columns)


def load_judge(context: EvaluateContext, loaded: LoadedRecords) -> Judge | None:
    """Load the judge function before anything is sampled; None if the reward model decides."""
    from rlhf_cli.data.records import references_of
    from rlhf_cli.rewards.python_function import load_scoring_function

    if context.settings.judge_function is None:
        return None
    return Judge(load_scoring_function(present(context.inputs.judge_function)), references_of(loaded.records))


def panel_verdicts(
    context: EvaluateContext, prompts: Sequence[Prompt], sides: Sequence[Side], processes: ProcessGroup
) -> PanelVerdicts | None:
    """Ask the panel of `evaluate.judge` about all completions of each row; None without a panel, and except on rank 0.

    Every process of the run calls this. Replies are kept, so that a killed evaluation asks nothing twice.

    Raises:
        DataError: too many rows have a pair without a verdict; the few others count as ties.
    """
    from rlhf_cli.data.records import Candidates, prompt_text
    from rlhf_cli.data.skips import Skip, SkipLog

    settings = context.settings.judge
    if settings is None:
        return None
    rows = [
        Candidates(prompt, tuple(side.completions[row].text for side in sides)) for row, prompt in enumerate(prompts)
    ]
    asked = ask_panel(context, settings, rows, processes)
    if not processes.is_main:
        return None
    pairs, skips = list(itertools.combinations(range(len(sides)), 2)), SkipLog(keep=1)
    for row, found in zip(rows, asked.verdicts, strict=True):
        if any(pair not in found for pair in pairs):
            skips.add(Skip("an item", "no verdict by any judge", prompt_text(row.prompt)[:EXCERPT]))
    asked.write_report(context, rows, {"rows_without_verdict": skips.total})
    skips.check(len(rows), context.recipe.data.max_skip, "evaluate.judge")
    return {pair: [_WINNERS[found.get(pair, 0)] for found in asked.verdicts] for pair in pairs}
