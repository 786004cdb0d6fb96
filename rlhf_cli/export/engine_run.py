"""What verl and OpenRLHF get of a run: models, prompts, and the settings of PPO."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf_cli.data.chat_format import PromptFormat
from rlhf_cli.data.records import Prompt, prompt_key
from rlhf_cli.data.sources import read_records
from rlhf_cli.errors import DataError, UsageError
from rlhf_cli.export.batch_sizes import BatchSizes
from rlhf_cli.export.models import ExportedModel, find_model, write_plain
from rlhf_cli.generation.contract import read_contract, split_of
from rlhf_cli.generation.prompts import prompt_style
from rlhf_cli.generation.sampling import Sampling
from rlhf_cli.pipeline.manifest import FILE_NAME
from rlhf_cli.pipeline.record import RECIPE
from rlhf_cli.quoting import word
from rlhf_cli.recipe.loader import load_recipe
from rlhf_cli.recipe.schema import Recipe
from rlhf_cli.settings.shared import SamplingSettings

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from rlhf_cli.stages.ppo.settings import PPOSettings

POLICY, REWARD_MODEL = "policy", "reward-model"
"""Folders of the models in what is written."""


@dataclass(frozen=True)
class EngineRun:
    """A run as another engine needs it.

    Attributes:
        name: of the run.
        recipe: its recipe.
        policy: model that PPO starts from, which is its reference too.
        reward_model: that scores the completions.
        tokenizer: of the policy.
        format: turns prompts into text of the policy.
        train: prompts to train on.
        held_out: the others.
        sampling: how completions are drawn.
        context: tokens that the policy can read, see `models.loading.context_length`.
        reward_context: the same of the reward model, whose input the engines do not cut.
    """

    name: str
    recipe: Recipe
    policy: ExportedModel
    reward_model: ExportedModel
    tokenizer: PreTrainedTokenizerBase
    format: PromptFormat
    train: list[Prompt]
    held_out: list[Prompt]
    sampling: Sampling
    context: int
    reward_context: int

    @property
    def ppo(self) -> PPOSettings:
        """Section `ppo` of the recipe."""
        assert self.recipe.ppo is not None
        return self.recipe.ppo

    @property
    def is_chat(self) -> bool:
        """Whether the chat template of the policy renders every prompt."""
        return all(self.format.is_chat(prompt) for prompt in (*self.train, *self.held_out))

    def text(self, prompt: Prompt) -> str:
        """Return a prompt as the policy reads it, for tokenizers that add nothing to it."""
        text = self.format.prompt_string(prompt)
        return text if self.format.is_chat(prompt) else self.beginning + text

    @property
    def beginning(self) -> str:
        """The token that the tokenizer puts before plain text; empty for none."""
        bos = self.tokenizer.bos_token
        ids = self.tokenizer("a").input_ids
        return str(bos) if bos is not None and ids[0] == self.tokenizer.bos_token_id else ""

    @property
    def max_prompt_tokens(self) -> int:
        """Longest prompt in tokens: with its completion it fits into the contexts of policy and reward model.

        Completions that fill a context on their own leave half of it to the prompt.
        """
        longest, context, completion = self.recipe.data.max_prompt_tokens, self._context, self.sampling.max_new_tokens
        return min(longest, context - completion if completion < context else max(1, context // 2))

    @property
    def max_new_tokens(self) -> int:
        """Longest completion in tokens: that of the recipe, or what a context leaves for it."""
        return min(self.sampling.max_new_tokens, self._context - self.max_prompt_tokens)

    @property
    def _context(self) -> int:
        return min(self.context, self.reward_context)

    def lengths_report(self) -> str:
        """Return which lengths are not those of the recipe; empty if they are."""
        given = (
            ("prompts", self.recipe.data.max_prompt_tokens, self.max_prompt_tokens),
            ("completions", self.sampling.max_new_tokens, self.max_new_tokens),
        )
        changed = [f"{name} have at most {used} tokens instead of {was}" for name, was, used in given if used != was]
        reader = "policy" if self.context <= self.reward_context else "reward model"
        return f"train.sh: {' and '.join(changed)}, because the {reader} reads {self._context}" if changed else ""

    @property
    def passes(self) -> int:
        """Passes over the prompts that hold all steps."""
        return math.ceil(self.ppo.steps * self.ppo.prompts_per_step / len(self.train))

    def write_models(self, folder: Path) -> str:
        """Write both models, and return a sentence on each."""
        made = [write_plain(self.policy, folder / POLICY), write_plain(self.reward_model, folder / REWARD_MODEL)]
        return "\n".join(made)

    def critic(self, folder: Path) -> str:
        """Return the folder from which the critic starts: the reward model if it has the policy's tokenizer."""
        tokens = [(folder / name / "tokenizer.json").read_bytes() for name in (POLICY, REWARD_MODEL)]
        return REWARD_MODEL if tokens[0] == tokens[1] and self.ppo.critic_from != "policy" else POLICY


def read_run(folder: Path) -> EngineRun:
    """Read a run whose stages before PPO are finished.

    Raises:
        UsageError: it is not a run directory, has no recipe with `ppo`, or a model is missing.
        DataError: the prompts cannot be read.
    """
    from rlhf_cli.models.loading import ModelSource, context_length, load_config, load_tokenizer

    if not (folder / RECIPE).is_file():
        raise UsageError(f"{folder} is not a run directory: it has no {RECIPE}", hint="give one, such as runs/mine")
    recipe = load_recipe(folder / RECIPE).recipe
    ppo = recipe.ppo
    if ppo is None:
        raise UsageError(
            f"the recipe of {folder} has no section `ppo`, whose settings the engine gets",
            hint="add it, at least `ppo: {}`, and run `rlhf run RECIPE --to train-rm` again",
        )
    policy = _model(folder, ppo.model, "sft", "ppo.model")
    reward_model = _model(folder, ppo.reward_model, "train-rm", "ppo.reward_model")
    if not reward_model.is_reward_model:
        raise UsageError(f"{reward_model.name} is not a reward model", hint="set `ppo.reward_model` to one")
    tokenizer = load_tokenizer(ModelSource(policy.name))
    style = prompt_style(recipe.data, policy.name, tokenizer)
    own = SamplingSettings(temperature=ppo.temperature, max_new_tokens=ppo.max_new_tokens, stop_tokens=ppo.stop_tokens)
    contract = read_contract(policy.folder)
    sampling = Sampling.resolve(own, recipe.sampling, contract.sampling if contract else SamplingSettings())
    prompt_format = PromptFormat(tokenizer, style.template, template_kwargs=style.kwargs)
    train, held_out = _prompts(recipe, policy)
    return EngineRun(
        name=folder.resolve().name,
        recipe=recipe,
        policy=policy,
        reward_model=reward_model,
        tokenizer=tokenizer,
        format=prompt_format,
        train=train,
        held_out=held_out,
        sampling=sampling,
        context=context_length(load_config(ModelSource(policy.name))),
        reward_context=_reward_context(reward_model),
    )


def _reward_context(model: ExportedModel) -> int:
    """Return how many tokens a reward model reads: those of the model that it is an adapter on, if it is one."""
    from rlhf_cli.models.loading import ModelSource, context_length, load_config
    from rlhf_cli.models.reward_model.files import read_reward_config

    source = ModelSource(model.name)
    config = read_reward_config(source.folder)
    return context_length(load_config(config.base_source(source) if config is not None and config.adapter else source))


def _model(folder: Path, named: str | None, stage: str, setting: str) -> ExportedModel:
    if named is not None:
        return find_model(named)
    if not (folder / stage / FILE_NAME).is_file():
        raise UsageError(
            f"{folder} has no finished `{stage}`, whose model the engine needs",
            hint=f"run `rlhf run {word(folder / RECIPE)} --to {stage}`, or name a model by `{setting}` in the recipe",
        )
    return find_model(str(folder / stage))


def _prompts(recipe: Recipe, policy: ExportedModel) -> tuple[list[Prompt], list[Prompt]]:
    """Return the prompts of PPO to train on and those held out, each once, as the stage divides them."""
    assert recipe.ppo is not None
    data, source = recipe.data, recipe.ppo.prompts or recipe.data.prompts
    if source is None:
        raise UsageError("the recipe names no prompts", hint="set `data.prompts`")
    loaded = read_records(source, "prompt", columns=data.columns, comparison=data.comparison, max_skip=data.max_skip)
    distinct = {prompt_key(record.prompt): record.prompt for record in loaded.records}
    split = split_of(data, read_contract(policy.folder))
    train = [prompt for prompt in distinct.values() if not split.holds_out(prompt)]
    if not train:
        raise DataError(f"{source}: all prompts are held out", hint="lower `data.holdout` or give more prompts")
    return train, [prompt for prompt in distinct.values() if split.holds_out(prompt)]


def changed_settings(ppo: PPOSettings, carried: Iterable[str]) -> dict[str, Any]:
    """Return the settings of PPO that differ from their defaults and that the engine does not get, by dotted name."""
    dropped = {"model", "reward_model", "prompts", *carried}
    changed = ppo.model_dump(exclude_defaults=True)
    return {f"ppo.{name}": value for name, value in changed.items() if name not in dropped}


def missing_generation(run: EngineRun) -> dict[str, Any]:
    """Return the settings of `generation` that no engine gets: a server, since engines draw on the GPUs that train."""
    server = run.recipe.generation.vllm_server
    return {} if server is None else {"generation.vllm_server": server}


def start_script(
    name: str, version: str, run: EngineRun, sizes: BatchSizes, command: str, missing: Mapping[str, Any]
) -> str:
    """Return a script that starts an engine in the folder it is in.

    Args:
        name: of the engine.
        version: whose options the command uses.
        run: that is continued.
        sizes: of minibatches, which the script adapts to the GPUs.
        command: with one option per line.
        missing: settings of the recipe that the engine does not get, see `changed_settings`.
    """
    lines = ["#!/usr/bin/env bash", f"# PPO of the run {run.name} in {name}. Options are those of {name} {version}."]
    if missing:
        lines += ["# Settings of the recipe that have no equivalent here:"]
        lines += [f"#   {key}: {json.dumps(value, default=str)}" for key, value in missing.items()]
    lines += ["set -euo pipefail", 'cd "$(dirname "$0")"', *sizes.lines()]
    return "\n".join([*lines, "", command]) + "\n"
