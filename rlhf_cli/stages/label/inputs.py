"""Inputs of the `label` stage."""

from __future__ import annotations

from dataclasses import dataclass

from rlhf_cli.settings.run import RunSettings
from rlhf_cli.stages.inputs import Input, InputFinder, StageInputs
from rlhf_cli.stages.label.settings import HumanSettings, LabelSettings
from rlhf_cli.stages.panel import judge_inputs


@dataclass(frozen=True)
class LabelInputs(StageInputs):
    """Inputs of labeling; which ones are present depends on `label.by`.

    Attributes:
        policy: model that samples completions.
        prompts: prompt records to sample completions for.
        items: completions to rank instead of sampled ones.
        rankings: rankings or preferences to import.
        function: function that scores completions.
        reward_model: reward model that scores completions.
        guidelines: instructions shown to annotators.
        gold: rankings with a known order, to check annotators.
        judges: judges in the order of `label.judge.panel`.
        rubric: file with the rubric of the judges.
        calibration: human rankings that judges are compared with.
        active_learning: reward models that select what is labeled.
    """

    policy: Input | None = None
    prompts: Input | None = None
    items: Input | None = None
    rankings: Input | None = None
    function: Input | None = None
    reward_model: Input | None = None
    guidelines: Input | None = None
    gold: Input | None = None
    judges: tuple[Input, ...] = ()
    rubric: Input | None = None
    calibration: Input | None = None
    active_learning: tuple[Input, ...] = ()


def find_inputs(settings: LabelSettings, recipe: RunSettings, find: InputFinder) -> LabelInputs:
    """Find the inputs of the stage; raises `UsageError` if one is missing."""
    shared = find.shared()
    if settings.by == "import":
        return LabelInputs(**shared, rankings=find.named("data", settings.data, "data", records="ranking"))
    human, judge = settings.human or HumanSettings(), settings.judge
    models = settings.active_learning.reward_models if settings.active_learning is not None else ()
    return LabelInputs(
        **shared,
        policy=find.policy("model", settings.model) if settings.samples else None,
        prompts=find.prompts(settings.prompts) if settings.samples else None,
        items=find.named("data", settings.items, "items", records="candidates"),
        function=find.named("function", settings.function, "function"),
        reward_model=find.named("model", settings.reward_model, "reward_model", role="reward model"),
        guidelines=find.named("file", human.guidelines, "human.guidelines"),
        gold=find.named("data", human.gold, "human.gold", records="ranking"),
        **judge_inputs(judge, "label", find),
        active_learning=tuple(
            Input("model", model, "label.active_learning.reward_models", role="reward model") for model in models
        ),
    )
