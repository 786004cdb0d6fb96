"""Sizes that follow from a recipe's settings: computed and shown, never set twice."""

from __future__ import annotations

import math
from pathlib import Path

from rlhf_cli.recipe.schema import (
    EvaluateSettings,
    LabelSettings,
    PPOSettings,
    Recipe,
    RewardModelSettings,
    SFTSettings,
)

Rows = dict[str, int | str]


def default_run_dir(recipe: Recipe) -> Path:
    """`runs/NAME`, in the current directory."""
    return Path("runs") / recipe.name


def derived_sizes(recipe: Recipe) -> dict[str, Rows]:
    """Section -> what -> figure, for the sections that are present."""
    found: dict[str, Rows] = {}
    for name, section in (
        ("sft", recipe.sft),
        ("label", recipe.label),
        ("train_rm", recipe.train_rm),
        ("ppo", recipe.ppo),
        ("evaluate", recipe.evaluate),
    ):
        if section is not None and (rows := _sizes(section, recipe)):
            found[name] = rows
    return found


def _sizes(section: object, recipe: Recipe) -> Rows:
    match section:
        case SFTSettings():
            return {"micro-batches per optimizer step": math.ceil(section.batch_size / section.micro_batch_size)}
        case LabelSettings():
            return _label(section)
        case RewardModelSettings():
            return _train_rm(section, recipe)
        case PPOSettings():
            return _ppo(section)
        case EvaluateSettings():
            return {"answers per prompt, both models": 2 * section.samples_per_prompt}
    return {}


def _label(label: LabelSettings) -> Rows:
    if not label.samples:
        return {}
    count = label.completions_per_prompt
    return {"answers per prompt": count, "pairs per prompt, ties aside": math.comb(count, 2)}


def _train_rm(train: RewardModelSettings, recipe: Recipe) -> Rows:
    rows: Rows = {"micro-batches per optimizer step": math.ceil(train.batch_size / train.micro_batch_size)}
    if train.data is None and recipe.label is not None and recipe.label.samples:
        rows["pairs per optimizer step, ties aside"] = train.batch_size * math.comb(
            recipe.label.completions_per_prompt, 2
        )
    return rows


def _ppo(ppo: PPOSettings) -> Rows:
    answers = ppo.prompts_per_step * ppo.samples_per_prompt
    largest = math.ceil(answers / ppo.minibatches)
    per_step = ppo.epochs * ppo.minibatches
    rows: Rows = {
        "answers per step": answers,
        "episodes in total": ppo.steps * answers,
        "optimizer steps per step": per_step,
        "optimizer steps in total": ppo.steps * per_step,
        "answers per minibatch": largest if answers % ppo.minibatches == 0 else f"{largest - 1} to {largest}",
        "micro-batches per minibatch": math.ceil(largest / ppo.micro_batch_size),
        "most tokens sampled per step": answers * ppo.max_new_tokens,
        "most tokens sampled in total": ppo.steps * answers * ppo.max_new_tokens,
        "checkpoints kept": ppo.keep_checkpoints + (ppo.kl_budget is not None),
    }
    if ppo.warmup_share:
        rows["optimizer steps of the warm-up"] = round(ppo.warmup_share * ppo.steps * per_step)
    if ppo.ptx is not None:
        rows["demonstrations read in total"] = ppo.steps * per_step * ppo.ptx.batch_size
    if ppo.eval_steps is not None:
        rows["evaluations"] = 1 + math.ceil(ppo.steps / ppo.eval_steps)
    return rows
