"""What each stage reads: an earlier stage's artifact, or the setting that replaces it, or files of the user's."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

from rlhf_cli.data.records import Kind
from rlhf_cli.errors import UsageError
from rlhf_cli.pipeline.run_directory import RunDirectory
from rlhf_cli.recipe.schema import (
    EvaluateSettings,
    LabelSettings,
    PPOSettings,
    Recipe,
    RewardModelSettings,
    SFTSettings,
)
from rlhf_cli.settings.base import Names
from rlhf_cli.settings.shared import is_own_function
from rlhf_cli.stages.base import STAGES, Stage
from rlhf_cli.stages.label.settings import HumanSettings, JudgeSettings
from rlhf_cli.stages.ppo.settings import PPORewardSettings


@dataclass(frozen=True)
class Input:
    """One thing a stage reads.

    Attributes:
        name: key in `StageContext.inputs`.
        source: folder, file, hub id, `file.py:function`, URL, or "build"; of a critic a folder.
        what: how it is checked and hashed.
        setting: the setting that named it, for messages; empty for an artifact.
        upstream: the stage that writes it, for an artifact.
        records: kind of records, for data.
        matters: whether the stage's result depends on it; the base model is shown to all and read by one, and a URL
            counts as the setting that it is.
        token_env: environment variable that has to hold a URL's token.
    """

    name: str
    source: str
    what: Literal["artifact", "model", "critic", "data", "file", "function", "endpoint", "build"]
    setting: str = ""
    upstream: str | None = None
    records: Kind | None = None
    matters: bool = True
    token_env: str | None = None


class InputResolver:
    """Finds the inputs of the stages that are going to run.

    Args:
        recipe: resolved settings.
        run: the run directory, whose finished artifacts count.
        planned: names of stages that write their artifacts before they are read.
    """

    def __init__(self, recipe: Recipe, run: RunDirectory, planned: frozenset[str]) -> None:
        self._recipe = recipe
        self._run = run
        self._planned = planned

    def inputs(self, stage: Stage) -> list[Input]:
        """All inputs of a stage; raises `UsageError` for one that is missing."""
        settings = getattr(self._recipe, stage.section)
        find: dict[str, Callable[..., Iterator[Input]]] = {
            "sft": self._sft,
            "label": self._label,
            "train-rm": self._train_rm,
            "ppo": self._ppo,
            "evaluate": self._evaluate,
        }
        found = list(find[stage.name](settings))
        names = {given.name for given in found}
        found += [base for base in self._base(matters=False) if base.name not in names]
        loads_a_model = not (isinstance(settings, LabelSettings) and not settings.loads_a_model)
        attention = self._recipe.model.attention
        if loads_a_model and is_own_function(attention):
            found.append(Input("model.attention", attention, "function", "model.attention"))
        return found

    def _base(self, *, matters: bool) -> Iterator[Input]:
        model = self._recipe.model
        if model.path is not None:
            yield Input("base", model.path, "model", "model.path", matters=matters)
        elif model.build is not None:
            yield Input("base", "build", "build", "model.build", matters=matters)

    def _sft(self, settings: SFTSettings) -> Iterator[Input]:
        base = list(self._base(matters=True))
        if not base:
            raise UsageError(
                "no base model: `sft` starts from one",
                hint="name one with `--set model.path=FOLDER` (or a hub id), or make one with `model.build`",
            )
        yield from base
        yield Input("sft.data", settings.data, "data", "sft.data", records="demonstration")

    def _label(self, settings: LabelSettings) -> Iterator[Input]:
        if settings.by == "import":
            yield Input("label.data", settings.data or "", "data", "label.data", records="ranking")
            return
        if settings.items is not None:
            yield Input("label.items", settings.items, "data", "label.items", records="candidates")
        else:
            yield self._policy("label", "model", settings.model)
            yield self._prompts("label", settings.prompts)
        for index, model in enumerate(settings.choose.reward_models if settings.choose else ()):
            yield Input(f"label.choose.{index}", model, "model", "label.choose.reward_models")
        if settings.human is not None:
            yield from self._human(settings.human)
        if settings.judge is not None:
            yield from self._judge(settings.judge)
        if settings.reward_model is not None:
            yield Input("train-rm", settings.reward_model, "model", "label.reward_model")
        if settings.function is not None:
            yield Input("label.function", settings.function, "function", "label.function")

    def _human(self, settings: HumanSettings) -> Iterator[Input]:
        if settings.guidelines is not None:
            yield Input("label.guidelines", settings.guidelines, "file", "label.human.guidelines")
        if settings.gold is not None:
            yield Input("label.gold", settings.gold, "data", "label.human.gold", records="ranking")

    def _judge(self, settings: JudgeSettings) -> Iterator[Input]:
        for index, judge in enumerate(settings.panel):
            name = f"label.judge.panel.{index}"
            if judge.model is not None:
                yield Input(f"{name}.model", judge.model, "model", f"{name}.model")
            if judge.url is not None:
                yield Input(
                    f"{name}.url", judge.url, "endpoint", f"{name}.url", matters=False, token_env=judge.token_env
                )
        if settings.rubric_file is not None:
            yield Input("label.rubric", settings.rubric_file, "file", "label.judge.rubric_file")
        if settings.calibration is not None:
            yield Input("label.calibration", settings.calibration, "data", "label.judge.calibration", records="ranking")

    def _train_rm(self, settings: RewardModelSettings) -> Iterator[Input]:
        yield self._policy("train-rm", "model", settings.model)
        if settings.data is not None:
            yield Input("label", settings.data, "data", "train_rm.data", records="ranking")
        elif self._have("label"):
            rankings = str(self._run.artifact("label") / "rankings.jsonl")
            yield Input("label", rankings, "artifact", upstream="label")
        else:
            raise self._missing("train-rm", "label", "data")

    def _ppo(self, settings: PPOSettings) -> Iterator[Input]:
        yield self._policy("ppo", "model", settings.model)
        if settings.reward_model is not None:
            yield Input("train-rm", settings.reward_model, "model", "ppo.reward_model")
        elif self._recipe.train_rm is not None or (not settings.rewards and self._have("train-rm")):
            yield self._artifact("ppo", "train-rm", "reward_model")
        elif not settings.rewards:
            raise self._missing("ppo", "train-rm", "reward_model")
        elif len(settings.rewards) == 1 and settings.reward_combination != "sum":
            raise UsageError(
                f"`ppo.reward_combination: {settings.reward_combination}` has no effect on one reward alone",
                hint="leave it out, or give further `ppo.rewards` or a reward model",
            )
        if (start := settings.critic_from) not in Names.CRITIC_WORDS:
            yield Input("ppo.critic_from", start, "critic", "ppo.critic_from")
        yield self._prompts("ppo", settings.prompts)
        if settings.ptx is not None:
            yield self._demonstrations(settings)
        for index, reward in enumerate(settings.rewards):
            yield _reward(f"ppo.rewards.{index}", reward)

    def _demonstrations(self, settings: PPOSettings) -> Input:
        assert settings.ptx is not None
        if settings.ptx.data is not None:
            return Input("ppo.ptx.data", settings.ptx.data, "data", "ppo.ptx.data", records="demonstration")
        if self._recipe.sft is None:
            raise UsageError(
                "`ppo.ptx` has no demonstrations: the recipe has no `sft` to take them from",
                hint="name a file, folder or hub data set with `--set ppo.ptx.data=PATH`",
            )
        return Input("ppo.ptx.data", self._recipe.sft.data, "data", "sft.data", records="demonstration")

    def _evaluate(self, settings: EvaluateSettings) -> Iterator[Input]:
        # What PPO started from, unless something else is named: the KL and the wins are then about PPO alone.
        started = None if self._recipe.ppo is None else self._recipe.ppo.model
        yield self._policy("evaluate", "baseline", settings.baseline or started)
        if settings.policy is not None:
            yield Input("ppo", settings.policy, "model", "evaluate.policy")
        else:
            yield self._artifact("evaluate", "ppo", "policy")
        reward = self._evaluated_reward(settings)
        if reward is not None:
            yield reward
        elif settings.judge_function is None:
            raise UsageError(
                "`evaluate` has nothing to judge by: no reward model and no `evaluate.judge_function`",
                hint="name one with `--set evaluate.judge_function=FILE.py:FUNCTION` or `evaluate.reward_model=PATH`",
            )
        if settings.judge_function is not None:
            yield Input("evaluate.judge_function", settings.judge_function, "function", "evaluate.judge_function")
        yield self._prompts("evaluate", settings.prompts)

    def _evaluated_reward(self, settings: EvaluateSettings) -> Input | None:
        if settings.reward_model is not None:
            return Input("train-rm", settings.reward_model, "model", "evaluate.reward_model")
        ppo = self._recipe.ppo
        if self._recipe.train_rm is None and ppo is not None and ppo.reward_model is not None:
            return Input("train-rm", ppo.reward_model, "model", "ppo.reward_model")
        if self._have("train-rm"):
            return self._artifact("evaluate", "train-rm", "reward_model")
        return None

    def _policy(self, stage: str, setting: str, replaced: str | None) -> Input:
        """The SFT model: what a setting names, else what `sft` writes, else the base model where no `sft` is."""
        section = stage.replace("-", "_")
        if replaced is not None:
            return Input("sft", replaced, "model", f"{section}.{setting}")
        if self._recipe.sft is None and self._recipe.model.path is not None:
            return Input("sft", self._recipe.model.path, "model", "model.path")
        return self._artifact(stage, "sft", setting)

    def _artifact(self, reader: str, writer: str, setting: str) -> Input:
        if not self._have(writer):
            raise self._missing(reader, writer, setting)
        return Input(writer, str(self._run.artifact(writer)), "artifact", upstream=writer)

    def _have(self, writer: str) -> bool:
        return writer in self._planned or self._run.artifact(writer).is_dir()

    def _missing(self, reader: str, writer: str, setting: str) -> UsageError:
        writes = next(stage.writes for stage in STAGES if stage.name == writer)
        named = f"or name one with `--set {reader.replace('-', '_')}.{setting}=PATH`"
        if reader == "ppo" and writer == "train-rm":
            named += ", or give another reward with `--function` or `--reward-url`"
        return UsageError(
            f"no {writes} in {self._run.path}: `{reader}` reads what `{writer}` writes",
            hint=f"run `rlhf {writer} --run-dir {self._run.path}` first, {named}",
        )

    def _prompts(self, section: str, own: str | None) -> Input:
        source, setting = (
            (own, f"{section}.prompts") if own is not None else (self._recipe.data.prompts, "data.prompts")
        )
        if source is None:
            raise UsageError(
                f"no prompts: `{section}` needs `{section}.prompts` or `data.prompts`",
                hint="name a file, folder or hub data set with `--set data.prompts=PATH`",
            )
        return Input("prompts", source, "data", setting, records="prompt")


def _reward(name: str, reward: PPORewardSettings) -> Input:
    if reward.function is not None:
        return Input(f"{name}.function", reward.function, "function", f"{name}.function")
    if reward.model is not None:
        return Input(f"{name}.model", reward.model, "model", f"{name}.model")
    assert reward.url is not None
    return Input(f"{name}.url", reward.url, "endpoint", f"{name}.url", matters=False, token_env=reward.token_env)
