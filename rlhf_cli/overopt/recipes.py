"""The recipes of the runs that `rlhf overopt` consists of, derived from the user's."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf_cli.errors import UsageError
from rlhf_cli.recipe.loader import LoadedRecipe
from rlhf_cli.recipe.schema import Recipe
from rlhf_cli.settings.overopt import OveroptSettings

_STAGES = ("sft", "label", "train_rm", "ppo", "evaluate", "best_of_n")


@dataclass(frozen=True)
class Proxy:
    """A kind of proxy: how many labels it is trained on, and how noisy they are.

    Attributes:
        multiple: of `overopt.labels`.
        labels: number of labels.
        noise: share of them that is swapped.
    """

    multiple: int
    labels: int
    noise: float

    @property
    def name(self) -> str:
        """Name of its folder, such as `4x-noise-0.2`."""
        return f"{self.multiple}x-noise-{self.noise:g}"


def proxies(settings: OveroptSettings) -> list[Proxy]:
    """Return all proxies, the smallest first."""
    return [
        Proxy(multiple, multiple * settings.labels, noise)
        for noise in sorted(set(settings.noise))
        for multiple in sorted(set(settings.multiples))
    ]


class Recipes:
    """Derives recipes.

    Args:
        recipe: the user's, with resolved paths.
        folder: of the study.

    Raises:
        UsageError: a section is missing, or nothing can be the gold reward.
    """

    def __init__(self, recipe: Recipe, folder: Path) -> None:
        for name in ("label", "train_rm", "ppo"):
            if recipe.value(name) is None:
                raise UsageError(
                    f"`rlhf overopt` needs the section `{name}` of the recipe",
                    hint="recipes/overopt.yaml is an example",
                )
        if recipe.value("label.by") not in ("function", "reward-model"):
            raise UsageError(
                f"`label.by: {recipe.value('label.by')}` cannot be the gold reward, which scores thousands of "
                "completions",
                hint="set `label.by` to `function` or `reward-model`",
            )
        if recipe.data.prompts is None:
            raise UsageError(
                "`rlhf overopt` needs `data.prompts`: some of them are held out to measure on",
                hint="specify a file, folder or hub data set with `--set data.prompts=PATH`",
            )
        if recipe.remote is not None:
            raise UsageError(
                "`rlhf overopt` consists of many runs, which cannot share the copy of `remote`",
                hint="remove `remote`, and copy the folder of the study when it is done",
                setting="remote",
            )
        if recipe.value("train_rm.members") > 1:
            raise UsageError(
                "`rlhf overopt` needs `train_rm.members: 1`: best of n would go by one member, and PPO by all",
                hint="remove `train_rm.members`",
            )
        self._plain, self._folder = recipe.model_dump(), folder
        self.settings: OveroptSettings = recipe.overopt or OveroptSettings()

    @property
    def base(self) -> Path:
        """Run directory of the policy, the gold labels and the completions for best of n."""
        return self._folder / "base"

    @property
    def policy(self) -> str:
        """The model that PPO and best of n start from."""
        trained = self._plain["sft"] is not None
        return str(self.base / "sft") if trained else self._plain["ppo"]["model"] or self._plain["model"]["path"]

    def run_dir(self, proxy: Proxy, seed: int) -> Path:
        """Run directory of a proxy; `seed` counts from 0."""
        return self._folder / proxy.name / f"seed-{seed}"

    def labels(self, proxy: Proxy, seed: int) -> Path:
        """File of the proxy's labels."""
        return self._folder / "labels" / f"{proxy.name}-seed-{seed}.jsonl"

    def for_base(self) -> LoadedRecipe:
        """Recipe of the run with SFT, gold labels, and completions of held-out prompts with their gold scores."""
        best = {
            **self._gold(),
            "max_prompts": self.settings.eval_prompts,
            "samples_per_prompt": self.settings.samples_per_prompt,
            "sampling": self._plain["label"]["sampling"],
        }
        return self._derived({"sft": self._plain["sft"], "label": self._plain["label"], "best_of_n": best}, {})

    def for_proxy(self, proxy: Proxy, seed: int) -> LoadedRecipe:
        """Recipe of a proxy's reward model, its best of n and its PPO."""
        settings, train_rm = self.settings, self._plain["train_rm"]
        shown = {"show_steps": settings.eval_steps, "shown_prompts": settings.eval_prompts}
        sections = {
            "train_rm": train_rm | {"data": str(self.labels(proxy, seed)), "model": train_rm["model"] or self.policy},
            "ppo": self._plain["ppo"] | {"model": self.policy, "reward_model": None, **shown, **self._unstopped()},
            "best_of_n": {"samples": str(self.base / "best-of-n" / "samples.jsonl")},
        }
        return self._derived(sections, {"seed": self._plain["seed"] + seed})

    def _unstopped(self) -> dict[str, Any]:
        """Settings of PPO without which a seed would end early: those that go too far are what is studied."""
        detectors = self._plain["ppo"]["detectors"]
        return {
            "kl_stop": None,
            "kl_budget": None,
            "detectors": {name: {**limits, "stop": None} for name, limits in detectors.items()},
        }

    def for_gold(self, samples: Path) -> LoadedRecipe:
        """Recipe that scores the completions in `samples` with the gold reward."""
        return self._derived({"best_of_n": {**self._gold(), "samples": str(samples)}}, {})

    def _gold(self) -> dict[str, Any]:
        label = self._plain["label"]
        return {"function": label["function"], "reward_model": label["reward_model"]}

    def _derived(self, sections: Mapping[str, Any], shared: Mapping[str, Any]) -> LoadedRecipe:
        plain = {**self._plain, **dict.fromkeys((*_STAGES, "overopt")), **shared, **sections}
        if plain["model"]["build"] is not None and plain["sft"] is None:  # it is built and trained by now
            plain["model"] = plain["model"] | {"build": None, "path": self.policy}
        return LoadedRecipe(Recipe.model_validate(plain), None, {})
