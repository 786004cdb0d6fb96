"""Who says which completions are better, as `rlhf start` asks it: people, preferences of a file, judges or a reward."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from rlhf_cli.errors import UsageError
from rlhf_cli.http_client.addresses import check_endpoint, without_query
from rlhf_cli.rewards.python_function import load_scoring_function
from rlhf_cli.settings.judges import judge_panel
from rlhf_cli.settings.shared import DataSettings
from rlhf_cli.start.data_facts import PromptFacts, inspect_rankings
from rlhf_cli.start.model_facts import ModelFacts, check_role

Source = Literal["people", "preferences", "judge", "reward"]
_TRIAL = "This is a short reply."


@dataclass(frozen=True)
class LabelChoice:
    """Where the reward of PPO comes from.

    Attributes:
        source: who decides.
        described: what was found, for the person.
        note: the same for the recipe, in a few words.
        label: section `label`; None without one: PPO is then rewarded directly.
        ppo: settings of `ppo` that say the reward.
        evaluate: settings of `evaluate` that say who decides; None if nothing of the run can.
        groups: number of rankings to train a reward model on; None if it is the number of prompts.
    """

    source: Source
    described: str
    note: str
    label: Mapping[str, Any] | None = None
    ppo: Mapping[str, Any] = field(default_factory=dict)
    evaluate: Mapping[str, Any] | None = field(default_factory=dict)
    groups: int | None = None


def people() -> LabelChoice:
    """Rankings by the person who runs this, or by others in browsers."""
    found = "the run stops for you to rank its completions, then continues"
    return LabelChoice("people", found, "you rank four completions per prompt", label={"by": "human"})


def preferences(source: str, model: ModelFacts, data: DataSettings) -> LabelChoice:
    """Preferences or rankings of a file; raises `DataError` if they cannot be read."""
    found = inspect_rankings(source, model, data)
    section = {"by": "import", "data": source}
    return LabelChoice("preferences", found.described, found.described, label=section, groups=found.count)


def judges(names: Sequence[str]) -> LabelChoice:
    """Rankings by language models: folders, hub ids, or `NAME@URL`.

    Raises:
        UsageError: a URL cannot be used.
        ModelError: a model cannot be a judge.
    """
    panel = judge_panel(names)
    for judge in panel:
        if "url" in judge:
            check_endpoint(judge["url"], None)
        else:
            check_role(judge["model"], "judge")
    listed = ", ".join(one.get("model") or f"{one['name']} at {without_query(one['url'])}" for one in panel)
    found = f"{listed}: asked about every pair of completions, in both orders"
    return LabelChoice("judge", found, "language models rank them", label={"by": "judge", "judge": {"panel": panel}})


def reward(spec: str, model: ModelFacts, prompts: PromptFacts) -> LabelChoice:
    """What scores completions directly: a Python function, an HTTP endpoint or a reward model.

    A function is called once, with the first prompt.

    Args:
        spec: `file.py:function` or `package.module:function`, a URL, or a folder or hub id.
        model: the policy.
        prompts: of the run.

    Raises:
        DataError: the function does not return one number per completion.
        ModelError: the model has no reward head.
        UsageError: there is no such function, or the URL cannot be used.
    """
    if spec.startswith(("http://", "https://")):
        check_endpoint(spec, None)
        found = f"will send prompts and completions to {without_query(spec)}"
        return LabelChoice("reward", found, "an HTTP endpoint", ppo={"rewards": [{"url": spec}]}, evaluate=None)
    if is_function(spec):
        function = load_scoring_function(spec)
        ids = model.format.completion_ids(_TRIAL)
        columns = {**prompts.columns, "completion_ids": [ids], "raw_completions": [_TRIAL]}
        score = function.score([prompts.example], [_TRIAL], columns)[0]
        found = f"`{function.name}` gives {_TRIAL!r}, as a reply to the first prompt, a score of {score:g}"
        ppo = {"rewards": [{"function": spec}]}
        return LabelChoice("reward", found, "a Python function", ppo=ppo, evaluate={"judge_function": spec})
    if spec.endswith(".py"):
        raise UsageError(f"`{spec}` names a file, not a function in it", hint=f"write {spec}:score")
    check_role(spec, "reward model")
    return LabelChoice("reward", "a reward model", "a reward model", ppo={"reward_model": spec})


def is_function(spec: str) -> bool:
    """Whether a reward is `file.py:function` or `package.module:function`, not a model or a URL."""
    before, colon, name = spec.rpartition(":")
    return bool(colon) and name.isidentifier() and (before.endswith(".py") or "/" not in before)
