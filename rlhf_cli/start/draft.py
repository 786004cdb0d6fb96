"""The recipe that `rlhf start` writes: what differs from the defaults, and why."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import reduce
from operator import getitem
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from rlhf_cli.errors import RecipeError
from rlhf_cli.generation.sampling import Sampling
from rlhf_cli.quoting import word
from rlhf_cli.recipe.overrides import BadSetting, Layers, parse_set
from rlhf_cli.recipe.show import scalar
from rlhf_cli.settings.shared import SamplingSettings
from rlhf_cli.start.data_facts import DemonstrationFacts, PromptFacts
from rlhf_cli.start.label_choice import LabelChoice
from rlhf_cli.start.lengths import GUESS, LIMITS, Lengths
from rlhf_cli.start.model_facts import ModelFacts

SHORT_STEPS, FULL_STEPS = 10, 100
"""Steps of PPO of a first look, and of a full run."""
_FEW_STEPS = 50
"""Steps below which the default learning rate would hardly change the policy."""
_FEW_GROUPS = 200
"""Rankings below which the default batch size would leave a reward model too few optimizer steps."""
_BY_PEOPLE = {"short": 40, "full": 300}
"""Prompts that a person ranks at most before a run goes on: about ten minutes, and about an hour."""
_WIDTH = 79
"""A comment stands behind its line where both fit into this, else above it."""
TEMPERATURE = 0.7
"""Of sampling in all stages."""
LIMIT = "sampling.max_new_tokens"
"""Setting that limits completions in all stages."""
_STAGE_LIMITS = ("label.sampling.max_new_tokens", "ppo.max_new_tokens", "evaluate.sampling.max_new_tokens")
"""Limits of single stages, which `--set` may give."""
_ABOUT_SETTINGS = ("label", "train_rm", "ppo")
"""Sections whose comment repeats values of their settings."""
_NAME = re.compile(r"[^A-Za-z0-9._-]+")


@dataclass(frozen=True)
class Draft:
    """All that a recipe is made of.

    Attributes:
        model: the policy.
        prompts: of all stages.
        labels: where the reward comes from.
        steps: of PPO.
        demonstrations: for SFT; None runs none.
        settings: values of `--set`.
        lengths: of a few completions; None if none were looked at.
    """

    model: ModelFacts
    prompts: PromptFacts
    labels: LabelChoice
    steps: int
    demonstrations: DemonstrationFacts | None = None
    settings: Sequence[str] = field(default_factory=tuple)
    lengths: Lengths | None = None

    @property
    def is_short(self) -> bool:
        """Whether it is a first look, with small batches."""
        return self.steps < _FEW_STEPS

    @property
    def most_new_tokens(self) -> int:
        """Largest limit that is considered, which never is so large that a prompt does not fit."""
        given = self.given_limit
        most = LIMITS[-1] if given is None else 2 * given
        return max(1, min(most, self.model.context - self.prompts.tokens[2]))

    @property
    def given_limit(self) -> int | None:
        """The limit of completions that `--set` gives; None where it is chosen."""
        given = self._limits
        if LIMIT not in given:
            return None
        trained = () if self.model.contract is None else (self.model.contract.sampling,)
        return Sampling.resolve(SamplingSettings(max_new_tokens=given[LIMIT]), *trained).max_new_tokens

    @property
    def stage_limits(self) -> dict[str, int]:
        """The limits that `--set` gives for single stages, by setting."""
        return {name: limit for name, limit in self._limits.items() if name != LIMIT and limit is not None}

    @property
    def _limits(self) -> dict[str, int | None]:
        """The limits that `--set` gives, by setting, as the recipe reads them; what it refuses is reported there."""
        layers = Layers()
        found: dict[str, int | None] = {}
        for setting in self.settings:
            with suppress(BadSetting):
                layers.add(parse_set(setting))
        for name in (LIMIT, *_STAGE_LIMITS):
            if (keys := tuple(name.split("."))) in layers.origins:
                value: Any = reduce(getitem, keys, layers.data)
                with suppress(ValidationError):
                    found[name] = SamplingSettings(max_new_tokens=value).max_new_tokens
        return found

    def max_new_tokens(self) -> int:
        """Longest completion: as it was set, or such that most of them end, as far as that is known."""
        if (given := self.given_limit) is not None:
            return given
        found = None if self.lengths is None else self.lengths.limit(self.most_new_tokens)
        return found or min(GUESS, self.most_new_tokens)


@dataclass
class _Lines:
    """Sections and the comment of each."""

    sections: dict[str, Any] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)

    def add(self, name: str, value: Any, note: str = "") -> None:
        self.sections[name] = value
        self.notes[name] = note


def recipe_text(draft: Draft, path: Path, command: str) -> str:
    """Return the recipe.

    Args:
        draft: what to put into it.
        path: the file that it will be, whose name becomes that of the run.
        command: that writes it, for the first line.

    Raises:
        RecipeError: a value of `--set` cannot be applied.
    """
    lines = _Lines()
    lines.add("name", _NAME.sub("-", path.stem).strip("-._") or "mine")
    lines.add("model", {"path": draft.model.path}, draft.model.described)
    found = draft.prompts
    data = {"prompts": found.source, **found.settings, **draft.model.settings}
    lines.add("data", data, f"{found.training:,} prompts to train on, {found.held_out:,} held out")
    limit = draft.max_new_tokens()
    is_known = draft.lengths is not None and draft.lengths.tells(limit)
    cut = f"; about {1 - draft.lengths.share_ended(limit):.0%} are cut off" if draft.lengths and is_known else ""
    lines.add("sampling", {"temperature": TEMPERATURE, "max_new_tokens": limit}, f"in all stages{cut}")
    if draft.demonstrations is not None:
        lines.add("sft", _sft(draft.demonstrations, draft.model), draft.demonstrations.described)
    if draft.labels.label is not None:
        lines.add("label", _label(draft), draft.labels.note)
        lines.add("train_rm", _train_rm(draft), _groups(draft))
    lines.add("ppo", {"steps": draft.steps, **_ppo(draft)}, _why(draft))
    if draft.labels.evaluate is not None:
        decides = "the function" if "judge_function" in draft.labels.evaluate else "the reward model"
        lines.add("evaluate", _evaluate(draft), f"compares the models after and before PPO; {decides} decides")
    _apply(lines, draft.settings)
    labels_first = draft.labels.source == "people" and draft.demonstrations is None
    head = [
        f"# Written by `{command}`. Next: rlhf {'label' if labels_first else 'run'} {word(path)}",
        f"# Other settings have their defaults: `rlhf recipe show {word(path)}` lists them.",
    ]
    return "\n".join([*head, *_rendered(lines)]) + "\n"


def _sft(found: DemonstrationFacts, model: ModelFacts) -> dict[str, Any]:
    section: dict[str, Any] = {"data": found.source}
    if found.count < _FEW_GROUPS:
        section["batch_size"] = 8
    if found.longest > 1024:
        section["max_length"] = min(found.longest, model.context)
    return section


def _label(draft: Draft) -> dict[str, Any]:
    section = dict(draft.labels.label or {})
    most = _BY_PEOPLE["short" if draft.is_short else "full"]
    if draft.labels.source == "people" and draft.prompts.training + draft.prompts.held_out > most:
        section["active_learning"] = {"by": "random", "prompts": most}
    return section


def _ranked(draft: Draft) -> int:
    """Number of rankings that the reward model learns from, and is measured on."""
    if draft.labels.groups is not None:
        return draft.labels.groups
    chosen = _label(draft).get("active_learning")
    return chosen["prompts"] if chosen else draft.prompts.training + draft.prompts.held_out


def _train_rm(draft: Draft) -> dict[str, Any]:
    if _ranked(draft) >= _FEW_GROUPS:
        return {}
    return {"batch_size": 4, "epochs": 3, "learning_rate": 3e-4}


def _groups(draft: Draft) -> str:
    count = _ranked(draft)
    return f"only {count:,} rankings: small batches, three passes" if count < _FEW_GROUPS else ""


def _ppo(draft: Draft) -> dict[str, Any]:
    section: dict[str, Any] = dict(draft.labels.ppo)
    usual = 16 if draft.is_short else 64
    section["prompts_per_step"] = min(usual, draft.prompts.training)
    if section["prompts_per_step"] == 64:
        del section["prompts_per_step"]
    if draft.is_short:
        section |= {"epochs": 2, "learning_rate": 1e-4, "schedule": "constant"}
    if draft.labels.evaluate is None and draft.prompts.held_out > 1:
        section["eval_steps"] = max(1, draft.steps // 5)
    return section


def _why(draft: Draft) -> str:
    if not draft.is_short:
        return ""
    return f"a first look: `steps: {FULL_STEPS}` is a full run; with a constant rate they can change on the way"


def _evaluate(draft: Draft) -> dict[str, Any]:
    section = dict(draft.labels.evaluate or {})
    if draft.prompts.held_out < 50:
        section["samples_per_prompt"] = 4
    elif draft.is_short:
        section["max_prompts"] = 50
    return section


def _apply(lines: _Lines, settings: Sequence[str]) -> None:
    """Put values of `--set` into the sections; a comment that may now be wrong is dropped."""
    layers = Layers(data=lines.sections)
    problems = []
    for setting in settings:
        try:
            layers.add(parse_set(setting))
        except BadSetting as error:
            problems.append(str(error))
        if (section := setting.partition(".")[0]) in _ABOUT_SETTINGS:
            lines.notes[section] = ""
    if problems:
        raise RecipeError(problems)


def _rendered(lines: _Lines) -> list[str]:
    """One line per section, with its comment behind it, or above it where there is no room."""
    found: list[str] = []
    for name, value in lines.sections.items():
        line, note = f"{name}: {_value(value)}", lines.notes.get(name, "")
        if not note:
            found.append(line)
        elif len(behind := f"{line}  # {note}") <= _WIDTH:
            found.append(behind)
        else:
            found += [f"# {note}", line]
    return found


def _value(value: Any) -> str:
    """A value in YAML's flow style; rates as people write them."""
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{scalar(key)}: {_value(item)}" for key, item in value.items()) + "}"
    if isinstance(value, float) and 0 < abs(value) < 1e-2:
        return re.sub(r"\.?0*e-0?", "e-", f"{value:.6e}")
    return scalar(value) if not isinstance(value, list) else f"[{', '.join(map(_value, value))}]"
