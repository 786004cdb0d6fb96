"""N completions per prompt: drawn from a policy, or those of an earlier `best-of-n`; and their file."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf_cli.data.records import Message, Prompt, PromptRecord, prompt_key, prompt_to_json
from rlhf_cli.data.skips import SkipLog
from rlhf_cli.distributed.process_group import ProcessGroup
from rlhf_cli.errors import DataError
from rlhf_cli.generation.generator import Completion, Generator
from rlhf_cli.generation.progress import Drawing
from rlhf_cli.generation.prompts import PromptStyle
from rlhf_cli.progress import say
from rlhf_cli.rewards.base import Columns
from rlhf_cli.stages.best_of_n.stage import BestOfNContext
from rlhf_cli.stages.common import (
    load_policy,
    load_prompts,
    split_from,
    stage_sampling,
    warn_of_trained,
    write_contract,
)
from rlhf_cli.stages.completions import columns_of_drawn, draw_completions
from rlhf_cli.stages.generation import choose_generator
from rlhf_cli.stages.inputs import present
from rlhf_cli.training.timing import StepWatch

if TYPE_CHECKING:
    from rlhf_cli.generation.policy import Policy
    from rlhf_cli.generation.prompts import TokenizedPrompts

SAMPLES = "samples.jsonl"
"""File of the artifact: one line per prompt with its completions, their rewards and gold scores."""


@dataclass(frozen=True)
class Samples:
    """Completions to choose from.

    Attributes:
        prompts: P prompts.
        texts: (P, N) completions.
        processes: of the run.
        skips: skipped records.
        drawn: (P, N) completions of the policy; empty if they are of an earlier run.
        references: see `references_of`.
        policy: that drew them.
        watch: times sampling and scoring.
        tokens: number of tokens that were drawn in this attempt, if the generator tells.
    """

    prompts: Sequence[Prompt]
    texts: Sequence[Sequence[str]]
    processes: ProcessGroup
    skips: SkipLog = field(default_factory=SkipLog)
    drawn: Sequence[Sequence[Completion]] = ()
    references: Mapping[str, Any] = field(default_factory=dict)
    policy: Policy | None = None
    watch: StepWatch = field(default_factory=StepWatch)
    tokens: int = 0

    def columns(self, prompts: Sequence[Prompt], texts: Sequence[str]) -> Columns:
        """Return what is known about completions besides their text; of equal texts of a prompt, about the first."""
        drawn = zip(self.prompts, self.drawn, strict=True)
        return columns_of_drawn(prompts, texts, drawn, policy=self.policy, references=self.references)


def draw_samples(context: BestOfNContext, generator: Generator | None = None) -> Samples:
    """Draw N completions of each held-out prompt, or of each of `best_of_n.prompts`.

    Raises:
        DataError: no prompt is held out.
    """
    settings, path = context.settings, present(context.inputs.policy)
    sampling = stage_sampling(context, settings.sampling, path)
    policy = load_policy(context, path, sampling)
    prompts, skips = load_prompts(context, policy, "best_of_n.sampling.max_new_tokens")
    prompts = _chosen(context, prompts)
    each, count = settings.samples_per_prompt, len(prompts) * settings.samples_per_prompt
    say(f"best-of-n: {len(prompts):,} prompts x {each:,} completions = {count:,} completions to sample and score")
    warn_of_trained([PromptRecord(prompt) for prompt in prompts.prompts], path, "the best of n")
    processes, watch = ProcessGroup(policy.source.device), StepWatch(policy.source.device)
    drawings: list[Drawing] = []
    drawn = draw_completions(
        context,
        policy,
        prompts,
        settings.samples_per_prompt,
        generator=choose_generator(context, [policy], generator),
        processes=processes,
        watch=watch,
        drawings=drawings,
    )
    if processes.is_main:
        write_contract(context, path, PromptStyle.of(policy.format), sampling.settings(), ())
    texts = [[completion.text for completion in group] for group in drawn]
    tokens = sum(one.tokens for one in drawings)
    return Samples(prompts.prompts, texts, processes, skips, drawn, prompts.references, policy, watch, tokens)


def _chosen(context: BestOfNContext, prompts: TokenizedPrompts) -> TokenizedPrompts:
    """Return the held-out prompts, unless the section names its own, at most `best_of_n.max_prompts`."""
    from rlhf_cli.generation.prompts import TokenizedPrompts

    settings, split = context.settings, split_from(context, present(context.inputs.policy))
    rows = [
        row for row, prompt in enumerate(prompts.prompts) if settings.prompts is not None or split.holds_out(prompt)
    ]
    if not rows:
        raise DataError(
            f"{present(context.inputs.prompts)}: none of its {len(prompts):,} prompts is held out "
            f"(`data.holdout: {split.holdout:g}`)",
            hint="hold out more, or name prompts with `--set best_of_n.prompts=PATH`",
        )
    if settings.max_prompts is not None and settings.max_prompts < len(rows):
        rows = sorted(random.Random(context.recipe.seed).sample(rows, settings.max_prompts))
    return TokenizedPrompts(
        [prompts.prompts[row] for row in rows], [prompts.ids[row] for row in rows], prompts.references
    )


def earlier_samples(context: BestOfNContext) -> Samples:
    """Read the completions of `best_of_n.samples`.

    Raises:
        DataError: the file is not one that `best-of-n` wrote.
    """
    rows = read_samples(Path(present(context.inputs.samples)))
    device = None
    if context.settings.loads_model:
        from rlhf_cli.models.device import resolve_device

        device = resolve_device(context.recipe.model.device)
    references = {prompt_key(row.prompt): row.reference for row in rows if row.reference is not None}
    texts = [row.completions for row in rows]
    return Samples([row.prompt for row in rows], texts, ProcessGroup(device), references=references)


@dataclass(frozen=True)
class SampleRow:
    """A line of `samples.jsonl`.

    Attributes:
        prompt: of all completions.
        completions: N texts; equal ones stand there several times.
        rewards: (N,) by what chose.
        gold: (N,) by what measured; None without.
        reference: of the prompt's record, for functions that compare with it; None without.
    """

    prompt: Prompt
    completions: list[str]
    rewards: list[float] = field(default_factory=list)
    gold: list[float] | None = None
    reference: Any = None

    def to_line(self) -> str:
        """Return the line."""
        plain: dict[str, Any] = {"prompt": prompt_to_json(self.prompt), "completions": self.completions}
        plain |= {"rewards": self.rewards} if self.rewards else {}
        plain |= {} if self.gold is None else {"gold": self.gold}
        plain |= {} if self.reference is None else {"reference": self.reference}
        return json.dumps(plain, ensure_ascii=False) + "\n"


def read_samples(path: Path) -> list[SampleRow]:
    """Read a `samples.jsonl` of `best-of-n`.

    Raises:
        DataError: a line is not a prompt with two or more completions.
    """
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            plain = json.loads(line)
            given, completions = plain["prompt"], plain["completions"]
            prompt = given if isinstance(given, str) else tuple(Message(one["role"], one["content"]) for one in given)
            if len(completions) < 2 or not all(isinstance(text, str) for text in completions):
                raise ValueError
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(
                f"{path}:{number}: expected a prompt with two or more completions; got {line[:80]!r}",
                hint="name the `samples.jsonl` of an earlier `rlhf best-of-n`",
            ) from error
        found = plain.get("rewards", []), plain.get("gold"), plain.get("reference")
        rows.append(SampleRow(prompt, completions, *found))
    return rows
