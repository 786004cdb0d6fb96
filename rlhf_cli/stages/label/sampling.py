"""What the `label` stage ranks: K completions per prompt, sampled from the policy or given by the user."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from rlhf_cli.data.records import Candidates, Prompt, references_of
from rlhf_cli.data.skips import SkipLog
from rlhf_cli.distributed.process_group import ProcessGroup
from rlhf_cli.distributed.ranks import world_size
from rlhf_cli.errors import DataError
from rlhf_cli.generation.generator import Completion, Generator
from rlhf_cli.generation.progress import Drawing
from rlhf_cli.generation.prompts import PromptStyle
from rlhf_cli.labeling.session.types import COMPLETION_LETTERS
from rlhf_cli.progress import warn
from rlhf_cli.rewards.base import Columns
from rlhf_cli.stages.common import load_policy, load_prompts, stage_sampling, write_contract
from rlhf_cli.stages.completions import Receive, columns_of_drawn, draw_completions
from rlhf_cli.stages.generation import choose_generator
from rlhf_cli.stages.inputs import present
from rlhf_cli.stages.label.stage import LabelContext
from rlhf_cli.training.timing import StepWatch

if TYPE_CHECKING:
    from rlhf_cli.generation.policy import Policy
    from rlhf_cli.generation.prompts import TokenizedPrompts
    from rlhf_cli.stages.label.settings import LabelSettings


MAX_COMPLETIONS = len(COMPLETION_LETTERS)
ALL_EQUAL = "all completions are equal"
"""Why a prompt is skipped."""


@dataclass
class Effort:
    """What an attempt of the stage did so far, also one that ends early.

    Attributes:
        watch: times sampling and scoring.
        drawings: count the tokens that were sampled, if the generator tells.
    """

    watch: StepWatch = field(default_factory=StepWatch)
    drawings: list[Drawing] = field(default_factory=list)


@dataclass(frozen=True)
class Sampled:
    """Completions to rank.

    Attributes:
        candidates: one per prompt.
        completions: what was sampled for each, in the same order; empty if the user gave the completions.
        skips: skipped records.
        processes: of the run.
        references: see `references_of`.
        policy: that sampled them; None if the user gave the completions.
        watch: times sampling and scoring.
        selected_from: number of prompts of which those of `candidates` were selected before sampling; None if none
            were selected by then.
    """

    candidates: list[Candidates]
    completions: list[list[Completion]]
    skips: SkipLog
    processes: ProcessGroup
    references: Mapping[str, Any] = field(default_factory=dict)
    policy: Policy | None = None
    watch: StepWatch = field(default_factory=StepWatch)
    selected_from: int | None = None

    def columns(self, prompts: Sequence[Prompt], texts: Sequence[str]) -> Columns:
        """Return what is known about completions besides their text; of equal texts of a prompt, about the first."""
        drawn = zip((row.prompt for row in self.candidates), self.completions, strict=True)
        return columns_of_drawn(prompts, texts, drawn, policy=self.policy, references=self.references)


def given_completions(context: LabelContext, settings: LabelSettings, effort: Effort) -> Sampled:
    """Read the completions of `label.items`; imports no torch unless a model is to judge them."""
    from rlhf_cli.data.sources import read_records

    device = None
    if settings.loads_model:
        from rlhf_cli.models.device import resolve_device

        device = resolve_device(context.recipe.model.device)
    data = context.recipe.data
    loaded = read_records(
        present(context.inputs.items),
        "candidates",
        columns=data.columns,
        comparison=data.comparison,
        max_skip=data.max_skip,
        keep_blank=True,
    )
    for warning in loaded.warnings:
        warn(warning)
    references, processes = references_of(loaded.records), ProcessGroup(device)
    return Sampled(loaded.records, [], loaded.skips, processes, references, watch=effort.watch)


def sample_completions(
    context: LabelContext,
    settings: LabelSettings,
    effort: Effort,
    generator: Generator | None = None,
    open_session: Callable[[Mapping[int, Prompt]], AbstractContextManager[Receive]] | None = None,
) -> Sampled:
    """Sample K completions per prompt, held-out prompts too: `train-rm` measures its accuracy on their rankings.

    Args:
        context: of the stage.
        settings: its section.
        effort: of this attempt; its watch is replaced by one for the device of the policy.
        generator: draws them; None is that of `generation.engine`.
        open_session: what receives the completions of these prompts, by number, while others are sampled.
    """
    path, per_prompt = present(context.inputs.policy), settings.completions_per_prompt
    sampling = stage_sampling(context, settings.sampling, path)
    policy = load_policy(context, path, sampling)
    style = PromptStyle.of(policy.format)
    prompts, skips = load_prompts(context, policy, "label.sampling.max_new_tokens")
    processes = ProcessGroup(policy.source.device)
    draws = choose_generator(context, [policy], generator)
    effort.watch = StepWatch(policy.source.device)
    # With several processes the completions of the others reach this one at the end of sampling.
    chosen = {number: prompts.prompts[number] for number in prompts_to_label(context, prompts)}
    session = nullcontext() if open_session is None or world_size() > 1 else open_session(chosen)
    with session as receive:
        completions = draw_completions(
            context, policy, prompts, per_prompt, generator=draws, processes=processes, watch=effort.watch,
            drawings=effort.drawings, numbers=list(chosen), is_early=open_session is not None, receive=receive,
        )  # fmt: skip
    if processes.is_main:
        write_contract(context, path, style, sampling.settings(), ())
    candidates = [candidates_of(prompt, own) for prompt, own in zip(chosen.values(), completions, strict=True)]
    total = len(prompts) if settings.selects_first else None
    return Sampled(candidates, completions, skips, processes, prompts.references, policy, effort.watch, total)


def prompts_to_label(context: LabelContext, prompts: TokenizedPrompts) -> Sequence[int]:
    """Return the numbers of the prompts to sample completions for, ascending: all, unless a selection comes first."""
    if not context.settings.selects_first:
        return range(len(prompts))
    from rlhf_cli.stages.label.selection import select_before_sampling

    return select_before_sampling(context, prompts.prompts)


def candidates_of(prompt: Prompt, completions: Sequence[Completion]) -> Candidates:
    """Return sampled completions of a prompt as candidates."""
    cut_off = tuple(None if one.finished else len(one.ids) for one in completions)
    return Candidates(prompt, tuple(one.text for one in completions), cut_off=cut_off)


def distinct(candidates: Candidates) -> Candidates:
    """Return the candidates with each text once.

    A known order keeps each text's best place. A text that the policy ended in one of its copies is not cut off.
    """
    texts = list(dict.fromkeys(candidates.completions))
    if len(texts) == len(candidates.completions):
        return candidates
    tiers: list[tuple[int, ...]] = []
    placed: set[int] = set()
    for tier in candidates.known or ():
        numbers = {texts.index(candidates.completions[index]) for index in tier} - placed
        placed |= numbers
        tiers += [tuple(sorted(numbers))] if numbers else []
    known = None if candidates.known is None else tuple(tiers)
    cut_off: tuple[int | None, ...] = ()
    if candidates.cut_off:
        copies = list(zip(candidates.completions, candidates.cut_off, strict=True))
        cut_off = tuple(None if (text, None) in copies else dict(copies)[text] for text in texts)
    return Candidates(candidates.prompt, tuple(texts), known, candidates.subset, candidates.location, cut_off=cut_off)


def check_count(candidates: Candidates) -> None:
    """Raise `DataError` if there are more completions than letters to name them."""
    if (count := len(candidates.completions)) > MAX_COMPLETIONS:
        raise DataError(
            f"{candidates.location or 'an item'} has {count} completions; at most {MAX_COMPLETIONS} can be ranked",
            hint="reduce them, or set `label.active_learning.completions`",
        )
