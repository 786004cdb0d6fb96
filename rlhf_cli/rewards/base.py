"""The interface of rewards: prompts and completions in, one number per completion out.

Rewards receive text, so each may use its own tokenizer (trap 11 of docs/ppo.md) or none. `Columns` hold what else is
known about a completion, for rewards that ask for it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Protocol

from rlhf_cli.data.records import Prompt, prompt_key
from rlhf_cli.errors import DataError
from rlhf_cli.generation.generator import Completion

Columns = Mapping[str, Sequence[Any]]
"""Name of `COLUMNS` -> one value per completion; a name that is not known is absent."""

NO_COLUMNS: Columns = MappingProxyType({})

COLUMNS = ("references", "completion_ids", "raw_completions")
"""The `reference` of the prompt's row (None if it has none); the policy's token ids, stop token included; the same as
text with all special tokens."""

_ADVICE = {
    "references": (
        "no prompt has a `reference`",
        "add the field `reference` to the prompts, or name the field that holds it: "
        "`--set 'data.columns={reference: solution}'`",
    )
}
_NOT_SAMPLED = ("these completions were not sampled, so they have no token ids", "sample them, or rate text alone")


def columns_of(
    prompts: Sequence[Prompt],
    references: Mapping[str, Any],
    completions: Sequence[Completion] | None,
    decode_raw: Callable[[Sequence[int]], str] | None,
) -> Columns:
    """Return what is known about N completions besides their text.

    Args:
        prompts: N prompts.
        references: see `references_of`.
        completions: N completions; None if they were not sampled.
        decode_raw: token ids -> text with special tokens; None if they were not sampled.
    """
    found: dict[str, Sequence[Any]] = {}
    if references:
        found["references"] = [references.get(prompt_key(prompt)) for prompt in prompts]
    if completions is not None and decode_raw is not None:
        found["completion_ids"] = [completion.ids for completion in completions]
        found["raw_completions"] = [decode_raw(completion.ids) for completion in completions]
    return found


def check_known(origin: str, names: Iterable[str], columns: Columns) -> None:
    """Raise `DataError` if one of the columns that a reward needs is not known.

    Args:
        origin: the reward, for the message.
        names: what it needs.
        columns: what is known.
    """
    for name in names:
        if name not in columns:
            reason, hint = _ADVICE.get(name, _NOT_SAMPLED)
            raise DataError(f"{origin} asks for `{name}`, but {reason}", hint=hint)


class Reward(Protocol):
    """Scores completions. It may return numbers that are not finite: the caller decides how to handle them."""

    @property
    def name(self) -> str:
        """Short name for messages and metrics."""
        ...

    def score(
        self, prompts: Sequence[Prompt], completions: Sequence[str], columns: Columns = NO_COLUMNS
    ) -> list[float]:
        """Return one float per completion, higher is better; NaN if the reward is unknown.

        Args:
            prompts: N prompts, text or conversations.
            completions: N completions as text, one per prompt.
            columns: what else is known about them.

        Raises:
            DataError: the scores are unusable; names the reward and, if possible, the sample at fault.
        """
        ...


@dataclass(frozen=True)
class Scores:
    """Scores of N completions by several rewards.

    Attributes:
        total: (N,) combined scores; finite in float32, or NaN.
        parts: reward name -> (N,) its scores before weighting.
        faults: one message per reward with scores that are not finite in float32: how many, and the first such sample.
    """

    total: list[float]
    parts: dict[str, list[float]]
    faults: list[str] = field(default_factory=list)
