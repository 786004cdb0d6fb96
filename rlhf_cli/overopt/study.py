"""`rlhf overopt`: trains proxies of a gold reward, optimizes them, and measures when gold stops following.

Every part is an ordinary run directory, so that a finished part is skipped and an interrupted one is resumed:

    base/                      the policy, gold labels, completions of held-out prompts with their gold scores
    4x-noise-0.2/seed-1/       a proxy: its reward model, best of n by it, PPO against it
    4x-noise-0.2/seed-1/gold/  gold scores of what PPO's policies wrote along the run
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rlhf_cli.data.records import PromptRecord
from rlhf_cli.durations import format_duration
from rlhf_cli.errors import DivergedError, RLHFError
from rlhf_cli.files import write_whole
from rlhf_cli.generation.contract import read_contract, split_of
from rlhf_cli.overopt.labels import LabelPool
from rlhf_cli.overopt.measurements import Checkpoints, best_of_n_course, ppo_course
from rlhf_cli.overopt.recipes import Proxy, Recipes, proxies
from rlhf_cli.overopt.results import Optimized, Result
from rlhf_cli.pipeline import runner
from rlhf_cli.pipeline.paths import resolve_paths
from rlhf_cli.pipeline.selection import Selection
from rlhf_cli.progress import say, warn
from rlhf_cli.recipe.loader import LoadedRecipe
from rlhf_cli.recipe.schema import Recipe
from rlhf_cli.run_log import LOG

RESULT = "overopt.json"


@dataclass
class _Progress:
    """Counts the parts of a study and says how far it is."""

    total: int
    done: int = 0
    began: float = field(default_factory=time.monotonic)

    def next(self, what: str) -> None:
        """Say what runs now."""
        self.done += 1
        say(
            f"overopt: {self.done} of {self.total}: {what} "
            f"({format_duration(time.monotonic() - self.began)} since the start)"
        )


class Study:
    """A study of over-optimization.

    Args:
        loaded: recipe with the sections `label`, `train_rm`, `ppo`, and `sft` unless `model.path` is the policy.
        folder: where it is kept.

    Raises:
        UsageError: see `Recipes`.
    """

    def __init__(self, loaded: LoadedRecipe, folder: Path) -> None:
        self._recipe: Recipe = resolve_paths(loaded)
        self._recipes, self._folder = Recipes(self._recipe, folder), folder
        self._settings = self._recipes.settings
        self._proxies = proxies(self._settings)
        self._seeds = range(self._settings.seeds)
        self._progress = _Progress(1 + 2 * len(self._proxies) * len(self._seeds))

    def run(self) -> list[Result]:
        """Run what is not finished and return the results, which are also in `overopt.json`.

        Raises:
            RLHFError: of any part; the same command resumes.
        """
        self._progress.next("the policy, gold labels and completions for best of n")
        self._execute(self._recipes.for_base(), self._recipes.base)
        self._write_labels()
        for proxy, seed in self._all():
            self._progress.next(f"{proxy.name}, seed {seed}: reward model and best of n")
            recipe, folder = self._recipes.for_proxy(proxy, seed), self._recipes.run_dir(proxy, seed)
            self._execute(recipe, folder, last="train-rm")
            self._execute(recipe, folder, first="best-of-n")
        records = self._prompts()
        diverged = [(proxy, seed) for proxy, seed in self._all() if not self._optimized(proxy, seed, records)]
        results = [self._result(proxy, [s for p, s in diverged if p == proxy]) for proxy in self._proxies]
        self._write(results)
        return results

    def _all(self) -> Iterator[tuple[Proxy, int]]:
        return ((proxy, seed) for seed in self._seeds for proxy in self._proxies)

    def _write_labels(self) -> None:
        """Write the labels of every proxy from the gold rankings."""
        from rlhf_cli.data.sources import read_records

        rankings = read_records(str(self._recipes.base / "label" / "rankings.jsonl"), "ranking", keep_blank=True)
        split = split_of(self._recipe.data, read_contract(self._recipes.policy))
        pool = LabelPool.of(rankings.records, split)
        for proxy, seed in self._all():
            labels = pool.draw(proxy.labels, noise=proxy.noise, seed=self._recipe.seed + seed)
            pool.write(self._recipes.labels(proxy, seed), labels)

    def _prompts(self) -> list[PromptRecord]:
        from rlhf_cli.data.sources import read_records

        data = self._recipe.data
        source = self._recipe.value("ppo.prompts") or data.prompts
        assert source is not None  # `Recipes` checks it
        return read_records(
            source, "prompt", columns=data.columns, comparison=data.comparison, max_skip=data.max_skip
        ).records

    def _optimized(self, proxy: Proxy, seed: int, records: Sequence[PromptRecord]) -> bool:
        """Run PPO against a proxy and score what its policies wrote with gold; return False if it diverged."""
        self._progress.next(f"{proxy.name}, seed {seed}: PPO")
        folder = self._recipes.run_dir(proxy, seed)
        try:
            self._execute(self._recipes.for_proxy(proxy, seed), folder, first="ppo", last="ppo")
        except DivergedError as error:
            warn(f"PPO of {proxy.name}, seed {seed}, is not part of the result: {error.message}")
            return False
        samples = folder / "ppo-samples.jsonl"
        Checkpoints.read(folder).write(samples, records)
        self._execute(self._recipes.for_gold(samples), folder / "gold")
        return True

    def _execute(
        self, recipe: LoadedRecipe, folder: Path, *, first: str | None = None, last: str | None = None
    ) -> None:
        """Run stages with their messages in the log of the run directory alone."""
        try:
            with Path(os.devnull).open("w", encoding="utf-8") as nowhere, contextlib.redirect_stderr(nowhere):
                runner.run(recipe, folder, Selection(first, last))
        except RLHFError:
            say(f"overopt: the messages of this part are in {folder / LOG}")
            raise

    def _result(self, proxy: Proxy, diverged: Sequence[int]) -> Result:
        runs = [self._recipes.run_dir(proxy, seed) for seed in self._seeds]
        whole = [self._recipes.run_dir(proxy, seed) for seed in self._seeds if seed not in diverged]
        return Result(
            proxy,
            [_accuracy(run) for run in runs],
            Optimized.of("best-of-n", best_of_n_course(self._recipes.base, runs)),
            Optimized.of("rl", ppo_course(whole)) if whole else None,
            diverged,
        )

    def _write(self, results: Sequence[Result]) -> None:
        gold = self._recipe.value("label.function") or self._recipe.value("label.reward_model")
        base = json.loads((self._recipes.base / "best-of-n" / "best_of_n.json").read_text(encoding="utf-8"))
        plain = {
            "gold": gold,
            "settings": self._settings.model_dump(mode="json"),
            "best_of_n_by_gold": base["points"],
            "proxies": [result.to_json() for result in results],
        }
        text = json.dumps(plain, indent=2, ensure_ascii=False, allow_nan=False)
        write_whole(self._folder / RESULT, text + "\n")


def _accuracy(run: Path) -> float | None:
    manifest = json.loads((run / "train-rm" / "manifest.json").read_text(encoding="utf-8"))
    return manifest["metrics"].get("rm/accuracy")
