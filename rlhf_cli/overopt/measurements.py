"""What the runs of a study measured: proxy and gold reward of best of n and of PPO's checkpoints."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from rlhf_cli.data.records import PromptRecord, prompt_text
from rlhf_cli.errors import DataError
from rlhf_cli.files import write_whole
from rlhf_cli.stages.best_of_n.samples import SAMPLES, SampleRow, read_samples
from rlhf_cli.statistics.best_of_n import expected_best, kl_bound, sizes_up_to
from rlhf_cli.statistics.overoptimization import Array


@dataclass(frozen=True)
class Course:
    """How proxy and gold reward change while a proxy is optimized, in S seeds, on P prompts, at C points.

    Attributes:
        points: (C,) n of best of n, or steps of PPO; the first is the initial policy.
        kl: (S, P, C) nats: log-ratios of single completions, or an upper bound that holds for all.
        proxy: (S, P, C) reward of the proxy.
        gold: (S, P, C) reward of gold.
    """

    points: Sequence[int]
    kl: Array
    proxy: Array
    gold: Array

    @property
    def gain(self) -> Array:
        """(S, P, C) gold relative to the initial policy on the same prompt."""
        return self.gold - self.gold[:, :, :1]

    @property
    def proxy_gain(self) -> Array:
        """(S, P, C) proxy relative to the initial policy on the same prompt."""
        return self.proxy - self.proxy[:, :, :1]


def best_of_n_course(base: Path, runs: Sequence[Path]) -> Course:
    """Return the course of best of n by the proxies of S run directories.

    Args:
        base: run directory whose best of n has the gold scores of the completions.
        runs: run directories whose best of n has the proxy's rewards of the same completions.
    """
    gold = read_samples(base / "best-of-n" / SAMPLES)
    sizes = sizes_up_to(min(len(row.completions) for row in gold))
    rewards = [read_samples(run / "best-of-n" / SAMPLES) for run in runs]

    proxy = np.stack([[expected_best(row.rewards, row.rewards, sizes) for row in rows] for rows in rewards])
    measured = np.stack(
        [
            [expected_best(row.rewards, known.rewards, sizes) for row, known in zip(rows, gold, strict=True)]
            for rows in rewards
        ]
    )
    kl = np.broadcast_to(np.array([kl_bound(n) for n in sizes]), proxy.shape)
    return Course(sizes, kl, proxy, measured)


@dataclass(frozen=True)
class Checkpoints:
    """What PPO's policies wrote along a run for the same P prompts, from its `samples.jsonl`.

    Attributes:
        steps: (C,).
        prompts: (P,) as text.
        texts: (P, C) completions.
        kl: (P, C) log-ratios to the initial policy, in nats.
        proxy: (P, C) rewards.
    """

    steps: list[int]
    prompts: list[str]
    texts: list[list[str]]
    kl: Array
    proxy: Array

    @staticmethod
    def read(run: Path) -> Checkpoints:
        """Read the samples of the run's PPO.

        Raises:
            DataError: there are none, or a reward is not finite.
        """
        path = run / "ppo" / SAMPLES
        lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
        cells: dict[tuple[str, int], dict] = {}
        for line in lines:
            row = json.loads(line)
            cells[row["prompt"], row["step"]] = row
        steps = sorted({step for _, step in cells})
        prompts = list(dict.fromkeys(prompt for prompt, _ in cells))
        if len(steps) < 2 or any(row[name] is None for row in cells.values() for name in ("kl", "score")):
            raise DataError(
                f"{path}: expected rewards and log-ratios of completions at two or more steps",
                hint=f"remove {run / 'ppo'} and run the same command again",
            )

        def table(name: str) -> list[list]:
            return [[cells[prompt, step][name] for step in steps] for prompt in prompts]

        return Checkpoints(steps, prompts, table("completion"), np.array(table("kl")), np.array(table("score")))

    def write(self, path: Path, records: Sequence[PromptRecord]) -> None:
        """Write the completions as `best_of_n.samples` reads them.

        Args:
            path: of the file.
            records: all prompts of the run, of which text alone is in PPO's samples.
        """
        known = {prompt_text(record.prompt): record for record in records}
        rows = [
            SampleRow(known[prompt].prompt, texts, reference=known[prompt].reference)
            for prompt, texts in zip(self.prompts, self.texts, strict=True)
        ]
        write_whole(path, "".join(row.to_line() for row in rows))


def ppo_course(runs: Sequence[Path]) -> Course:
    """Return the course of PPO in S run directories, each with the gold scores of its completions in `gold`."""
    read = [Checkpoints.read(run) for run in runs]
    gold = [[row.rewards for row in read_samples(run / "gold" / "best-of-n" / SAMPLES)] for run in runs]
    first = read[0]
    if any(one.steps != first.steps or one.prompts != first.prompts for one in read):
        raise DataError(
            f"the PPO runs beside {runs[0]} were measured at different steps or on different prompts",
            hint="remove those that are older than the recipe, and run the same command again",
        )
    return Course(
        first.steps, np.stack([one.kl for one in read]), np.stack([one.proxy for one in read]), np.array(gold)
    )
