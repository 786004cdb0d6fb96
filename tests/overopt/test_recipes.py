"""The recipes of a study: nothing in them may end a seed because it went too far, which is what is studied."""

from __future__ import annotations

from pathlib import Path

import pytest

from rlhf_cli.errors import UsageError
from rlhf_cli.overopt.recipes import Recipes, proxies
from rlhf_cli.pipeline.paths import resolve_paths
from rlhf_cli.recipe.loader import load_recipe

RECIPE = Path(__file__).resolve().parents[2] / "recipes" / "overopt.yaml"


def recipes(*settings: str) -> Recipes:
    return Recipes(resolve_paths(load_recipe(RECIPE, settings)), Path("study"))


def test_no_seed_ends_early():
    changed = ("ppo.kl_stop=20", "ppo.kl_budget=9", "ppo.eval_steps=2", "ppo.detectors.kl={warn: 7, stop: 15}")
    study = recipes(*changed)
    ppo = study.for_proxy(proxies(study.settings)[0], seed=1).recipe.ppo
    assert (ppo.kl_stop, ppo.kl_budget) == (None, None)
    assert (ppo.detectors.kl.warn, ppo.detectors.kl.stop) == (7.0, None)


def test_an_ensemble_is_refused():
    with pytest.raises(UsageError, match=r"needs `train_rm\.members: 1`"):
        recipes("train_rm.members=2", "ppo.reward_combination=mean")
