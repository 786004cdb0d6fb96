"""People as judges of an evaluation: they rank its completions in a label session, and the next run of it reads that.

`items.jsonl` of an evaluation has the completions of all models by prompt, without names. Labeled with `label.items`,
it becomes rankings, which `evaluate.labels` names. The same evaluation draws the same completions again.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rlhf_cli.errors import DataError
from rlhf_cli.stages.evaluate.comparison import Winner
from rlhf_cli.stages.evaluate.stage import EvaluateContext
from rlhf_cli.stages.inputs import source_of

if TYPE_CHECKING:
    from rlhf_cli.data.records import Prompt, Ranking
    from rlhf_cli.stages.evaluate.results import PanelVerdicts
    from rlhf_cli.stages.evaluate.sides import Side

ITEMS = "items.jsonl"


@dataclass(frozen=True)
class PeopleLabels:
    """What people preferred.

    Attributes:
        source: of the rankings, for messages.
        rankings: `prompt_key` -> rankings of completions of the prompt, one per annotator.
    """

    source: str
    rankings: Mapping[str, Sequence[Ranking]]

    def verdict(self, key: str, policy: str, baseline: str) -> Winner | None:
        """Return which of two completions more annotators preferred; None if none ranked both."""
        if policy == baseline:
            return "tie"
        votes = []
        for ranking in self.rankings.get(key, ()):
            levels = dict(zip(ranking.completions, ranking.levels(), strict=True))
            if policy in levels and baseline in levels:
                votes.append(levels[baseline] - levels[policy])
        if not votes:
            return None
        balance = sum((vote > 0) - (vote < 0) for vote in votes)
        return "tie" if balance == 0 else "policy" if balance > 0 else "baseline"


def load_labels(context: EvaluateContext) -> PeopleLabels | None:
    """Read the rankings of `evaluate.labels`; None without."""
    from rlhf_cli.data.records import prompt_key
    from rlhf_cli.data.sources import read_records

    if (source := source_of(context.inputs.labels)) is None:
        return None
    rankings: dict[str, list[Ranking]] = defaultdict(list)
    for ranking in read_records(source, "ranking", keep_blank=True).records:
        rankings[prompt_key(ranking.prompt)].append(ranking)
    return PeopleLabels(source, rankings)


def people_verdicts(labels: PeopleLabels, prompts: Sequence[Prompt], sides: Sequence[Side]) -> PanelVerdicts:
    """Return the verdicts of people on each pair of models.

    Raises:
        DataError: completions of a prompt are not those that were labeled.
    """
    from rlhf_cli.data.records import prompt_key, prompt_text

    found: dict[tuple[int, int], list[Winner]] = {}
    for i, j in itertools.combinations(range(len(sides)), 2):
        found[i, j] = []
        for row, prompt in enumerate(prompts):
            texts = sides[j].completions[row].text, sides[i].completions[row].text
            winner = labels.verdict(prompt_key(prompt), *texts)
            if winner is None:
                raise DataError(
                    f"{labels.source}: no label ranks the completions of {prompt_text(prompt)[:80]!r} by "
                    f"{sides[i].name} and {sides[j].name}",
                    hint=f"label the {ITEMS} of an evaluation of the same models with the same settings; on another "
                    "kind of machine, models may write other completions",
                )
            found[i, j].append(winner)
    return found


def items_of(prompts: Sequence[Prompt], sides: Sequence[Side]) -> Iterator[dict[str, Any]]:
    """Yield the lines of `items.jsonl`: per prompt, the different completions of all models, if there are several."""
    from rlhf_cli.data.records import prompt_key, prompt_to_json

    rows: dict[str, list[int]] = defaultdict(list)
    for row, prompt in enumerate(prompts):
        rows[prompt_key(prompt)].append(row)
    for own in rows.values():
        texts = dict.fromkeys(side.completions[row].text for row in own for side in sides)
        if len(texts) > 1:
            yield {"prompt": prompt_to_json(prompts[own[0]]), "completions": list(texts)}
