"""Which prompts an evaluation uses: held out, fitting all models, and neither trained on nor chosen on."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rlhf_cli.errors import DataError
from rlhf_cli.generation.contract import keys_of, read_contract
from rlhf_cli.models.hub import local_folder
from rlhf_cli.progress import say, warn
from rlhf_cli.stages.common import CHOSEN_ON, EXCERPT, split_from
from rlhf_cli.stages.evaluate.people import ITEMS, PeopleLabels
from rlhf_cli.stages.evaluate.stage import EvaluateContext
from rlhf_cli.stages.inputs import source_of

if TYPE_CHECKING:
    from rlhf_cli.data.records import Prompt, PromptRecord
    from rlhf_cli.data.sources import LoadedRecords
    from rlhf_cli.generation.policy import Policy
    from rlhf_cli.stages.evaluate.settings import EvaluateSettings

_MAX_NEW_TOKENS = "evaluate.sampling.max_new_tokens"


def not_trained_on(context: EvaluateContext, records: list[PromptRecord]) -> list[PromptRecord]:
    """Return the records that `evaluate.trained_prompts` allows.

    Raises:
        DataError: a model was trained on some of them, and the setting refuses that, or none is left.
    """
    from rlhf_cli.data.records import split_key

    inputs, action = context.inputs, context.settings.trained_prompts
    trained = trained_prompts(context)
    _warn_of_reward_model(context, records)
    left = [record for record in records if split_key(record.prompt) not in trained]
    if not (seen := len(records) - len(left)):
        return records
    found = f"{seen:,} of the {len(records):,} prompts to evaluate on were in the training of {_models(context)}"
    if action == "use":
        warn(f"{found}: the result says nothing about new prompts")
        return records
    if action == "refuse" or not left:
        raise DataError(
            f"{inputs.prompts.source}: {found}",
            hint=f"evaluate on the other {len(left):,} with `--set evaluate.trained_prompts=skip`"
            if left
            else "name prompts that no stage trained on with `--set evaluate.prompts=PATH`",
        )
    say(f"evaluate: {found}; they are skipped")
    return left


def _warn_of_reward_model(context: EvaluateContext, records: Sequence[PromptRecord]) -> None:
    """Warn of prompts that the reward model was trained on, where it decides which completion wins."""
    path = source_of(context.inputs.reward_model)
    if path is None or context.settings.decided_by != "reward model":
        return
    contract = read_contract(path)
    if contract is not None and (seen := len(keys_of(records) & contract.trained_prompts)):
        warn(f"the reward model that judges was trained on {seen:,} of the {len(records):,} prompts to evaluate on")


def not_chosen_on(records: list[PromptRecord], policy: Path) -> list[PromptRecord]:
    """Return the records without those whose prompts decided which policy PPO wrote: on these it looks too good."""
    from rlhf_cli.data.records import prompt_key

    if not (policy / CHOSEN_ON).is_file():
        return records
    chosen_on = set(json.loads((policy / CHOSEN_ON).read_text(encoding="utf-8")))
    left = [record for record in records if prompt_key(record.prompt) not in chosen_on]
    if len(left) < len(records):
        used = len(records) - len(left)
        say(f"evaluate: {used:,} prompts were used to select the policy (`ppo.kl_budget`) and are skipped")
    return left


def trained_prompts(context: EvaluateContext) -> frozenset[str]:
    """Return the `split_key` of all prompts that a model of the evaluation was trained on, as far as is recorded."""
    models = (*context.inputs.evaluated, context.inputs.baseline)
    contracts = [read_contract(model.source) for model in models]
    return frozenset[str]().union(*(contract.trained_prompts for contract in contracts if contract is not None))


def _models(context: EvaluateContext) -> str:
    return "one of the models" if context.inputs.policies else "the policy or baseline"


def load_prompts(
    context: EvaluateContext,
    settings: EvaluateSettings,
    policies: Sequence[Policy],
    labels: PeopleLabels | None = None,
) -> tuple[list[Prompt], LoadedRecords]:
    """Read the held-out prompts, each once, that leave room for a completion in all models; with labels, those labeled.

    Raises:
        DataError: none is left, or some must not be used.
    """
    from rlhf_cli.data.records import prompt_key, prompt_text
    from rlhf_cli.data.sources import Skip, read_records

    recipe, source = context.recipe, context.inputs.prompts.source
    loaded = read_records(
        source, "prompt", columns=recipe.data.columns, comparison=recipe.data.comparison, max_skip=recipe.data.max_skip
    )
    for line in loaded.warnings:
        warn(line)
    records = loaded.records
    split = split_from(context, context.inputs.policy.source)
    if settings.prompts is None:
        records = [record for record in records if split.holds_out(record.prompt)]
    records = not_trained_on(context, records)
    held_out = records
    for policy in context.inputs.evaluated:
        records = not_chosen_on(records, local_folder(policy.source, with_weights=False))
    if held_out and not records:
        raise DataError(
            f"{source}: all of its {len(held_out):,} held-out prompts decided which policy PPO wrote (`ppo.kl_budget`)",
            hint="name other prompts with `--set evaluate.prompts=PATH`, or hold out more",
        )
    if not records:
        raise DataError(
            f"{source}: none of its {len(loaded.records):,} prompts is held out (`data.holdout: {split.holdout:g}`)",
            hint="name prompts that no stage trained on with `--set evaluate.prompts=PATH`, or hold out more",
        )
    limit = recipe.data.max_prompt_tokens
    longest = [min(limit, policy.longest_prompt(_MAX_NEW_TOKENS)) for policy in policies]
    kept: dict[str, Prompt] = {}
    for record in records:
        lengths = [len(policy.prompt_ids(record.prompt)) for policy in policies]
        if all(length <= most for length, most in zip(lengths, longest, strict=True)):
            kept.setdefault(prompt_key(record.prompt), record.prompt)
        else:
            reason = f"prompt longer than {min(longest):,} tokens"
            loaded.skips.add(Skip(record.location or source, reason, prompt_text(record.prompt)[:EXCERPT]))
    loaded.skips.check(loaded.total, recipe.data.max_skip, source)
    if not kept:
        raise DataError(
            f"{source}: all {len(records):,} held-out prompts are too long", hint="raise `data.max_prompt_tokens`"
        )
    prompts = list(kept.values()) if labels is None else _labeled(kept, labels)
    if settings.max_prompts is not None and settings.max_prompts < len(prompts):
        chosen = random.Random(recipe.seed).sample(range(len(prompts)), settings.max_prompts)
        prompts = [prompts[position] for position in sorted(chosen)]
    return prompts, loaded


def _labeled(prompts: Mapping[str, Prompt], labels: PeopleLabels) -> list[Prompt]:
    """Return the prompts that people labeled, by `prompt_key`."""
    found = [prompt for key, prompt in prompts.items() if key in labels.rankings]
    if not found:
        raise DataError(
            f"{labels.source}: none of the {len(prompts):,} prompts to evaluate on is labeled in it",
            hint=f"label the {ITEMS} that an evaluation on these prompts wrote",
        )
    if len(found) < len(prompts):
        say(f"evaluate: {len(found):,} of {len(prompts):,} prompts are labeled and used")
    return found
