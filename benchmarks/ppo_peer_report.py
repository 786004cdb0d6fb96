"""Evaluate the runs of `ppo_peer.py` and `ppo_peer_trl.py` alike: reward by KL and by episodes.

    python benchmarks/ppo_peer_report.py WORK --plot curves.png

Every snapshot samples completions of the held-out questions of its seed with our sampler and the same random numbers.
The gold function scores the completions as text, and KL is the mean of log pi(y) - log pi_SFT(y) over them with our
log-probabilities, so neither trainer measures itself. Results are kept in `WORK/evaluations.jsonl`; only new snapshots
are evaluated.

Intervals are Student's t, 95 %, over seeds; differences are paired by seed. "Equal KL" interpolates the reward of both
sides where their curves cross a KL. "Equal KL and episodes" interpolates on the frontier of several KL coefficients
after all episodes.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import statistics
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import load_file

from rlhf_cli.data.records import seed_for
from rlhf_cli.generation.generator import Request
from rlhf_cli.generation.policy import Policy
from rlhf_cli.generation.prompts import PromptStyle
from rlhf_cli.generation.sampling import Sampling
from rlhf_cli.generation.torch_generator import TorchGenerator
from rlhf_cli.models.loading import ModelSource

sys.path.append(str(Path(__file__).resolve().parents[1] / "recipes"))
from quickstart_gold import score  # pyright: ignore[reportMissingImports]

STUDENT = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365}
"""97.5 % quantile of Student's t, by number of values in the mean."""


class Run(NamedTuple):
    """A side, its KL coefficient, and the seed."""

    side: str
    kl_coef: float
    seed: int


class Snapshot(NamedTuple):
    """Evaluation of one policy: mean gold score, KL in nats per completion, tokens per completion."""

    gold: float
    kl: float
    length: float


Curves = dict[Run, dict[int, Snapshot]]
"""Run -> step -> snapshot; step 0 is the SFT model, which is also the run (`sft`, 0, seed)."""


def main() -> None:
    """Evaluate new snapshots, print the tables, draw the plot."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument("--samples", type=int, default=4, help="completions per held-out question")
    parser.add_argument("--every", type=int, default=10, help="evaluate snapshots of these steps")
    parser.add_argument("--sides", nargs=2, default=["ours", "trl"])
    parser.add_argument("--levels", type=float, nargs="+", default=[1, 2, 3, 4, 5, 6, 8])
    parser.add_argument("--plot", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    settings = json.loads((options.work / "settings.json").read_text(encoding="utf-8"))
    found = evaluate(options.work, settings, options.samples, options.every)
    curves: Curves = defaultdict(dict)
    for run, step, snapshot in found:
        curves[run][step] = snapshot
    for run, curve in curves.items():
        if run.side != "sft":
            curve[0] = curves[Run("sft", 0.0, run.seed)][0]
    tables(curves, options.sides, settings["prompts_per_step"], options.levels)
    if options.plot:
        draw(curves, options.sides, settings["prompts_per_step"], options.plot)


def evaluate(work: Path, settings: dict, samples: int, every: int) -> list[tuple[Run, int, Snapshot]]:
    """Return every snapshot; those evaluated before are read from the file."""
    path = work / "evaluations.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    found = [(Run(*row["run"]), row["step"], Snapshot(*row["found"])) for row in map(json.loads, lines)]
    done = {(run, step) for run, step, _ in found}
    with path.open("a", encoding="utf-8") as file:
        for folder in sorted(work.glob("seed*")):
            seed = int(folder.name.removeprefix("seed"))
            todo = [item for item in _snapshots(folder, seed, every) if item[:2] not in done]
            measure = None
            for run, step, weights in todo:
                measure = measure or measurer(folder, settings, samples, seed)
                snapshot = measure(weights)
                found.append((run, step, snapshot))
                file.write(json.dumps({"run": run, "step": step, "found": snapshot}) + "\n")
                file.flush()
    return found


def _snapshots(folder: Path, seed: int, every: int) -> Iterable[tuple[Run, int, Path | None]]:
    yield Run("sft", 0.0, seed), 0, None
    for seconds in sorted(folder.glob("*/seconds.json")):  # completed runs
        side, _, kl_coef = seconds.parent.name.rpartition("-")
        for path in sorted(seconds.parent.glob("step-*.safetensors")):
            step = int(path.stem.removeprefix("step-"))
            if step and step % every == 0:
                yield Run(side, float(kl_coef), seed), step, path


def measurer(folder: Path, settings: dict, samples: int, seed: int) -> Callable[[Path | None], Snapshot]:
    """Return a function that evaluates weights of a policy, or the SFT model of `folder` for None."""
    source = ModelSource(str(folder / "sft"))
    sampling = Sampling(temperature=settings["temperature"], max_new_tokens=settings["max_new_tokens"], batch_size=128)
    reference, policy = (Policy.load(source, sampling, style=PromptStyle("{prompt}\n")) for _ in range(2))
    rows = json.loads((folder / "prompts.json").read_text(encoding="utf-8"))["held_out"]
    prompts = [row["text"] for row in rows for _ in range(samples)]
    numbers = list(range(samples)) * len(rows)
    ids = [policy.prompt_ids(prompt) for prompt in prompts]
    seeds = [seed_for(prompt, seed, number) for prompt, number in zip(prompts, numbers, strict=True)]
    requests = [Request(*row) for row in zip(ids, seeds, strict=True)]

    def measure(weights: Path | None) -> Snapshot:
        if weights is not None:
            tensors = load_file(weights)
            with torch.no_grad(), policy.model() as model:
                for name, parameter in model.named_parameters():
                    parameter.copy_(tensors[name])
        completions = TorchGenerator().generate(policy, requests)
        mine, theirs = (one.logprobs(ids, completions) for one in (policy, reference))
        return Snapshot(
            gold=statistics.fmean(score(prompts, [completion.text for completion in completions])),
            kl=statistics.fmean(a - b for a, b in zip(mine, theirs, strict=True)),
            length=statistics.fmean(len(completion.ids) for completion in completions),
        )

    return measure


def tables(curves: Curves, sides: Sequence[str], answers: int, levels: Sequence[float]) -> None:
    """Print the comparisons at equal episodes, at equal KL, and at both, in Markdown."""
    first, second = sides
    gold = ("seeds", f"gold, {first}", f"gold, {second}", "difference")
    measures = [f"{name}, {side}" for name in ("KL", "tokens") for side in sides]
    _table("Equal episodes", ("kl_coef", "episodes", *gold, *measures), at_episodes(curves, sides, answers))
    there = (f"episodes needed, {first}", second)
    _table("Equal KL, along a run", ("kl_coef", "KL", *gold, *there), at_kl(curves, sides, answers, levels))
    last = max(step for curve in curves.values() for step in curve)
    title = f"Equal KL and episodes ({last * answers:,}), on the frontier of the KL coefficients"
    _table(title, ("KL", *gold), at_both(curves, sides, last, levels))


def _table(title: str, head: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    print(f"\n{title}:\n")
    for row in (head, ["---"] * len(head), *rows):
        print("| " + " | ".join(row) + " |")


def at_episodes(curves: Curves, sides: Sequence[str], answers: int) -> Iterable[list[str]]:
    """One row per KL coefficient and number of episodes."""
    for kl_coef in _coefficients(curves, sides):
        pairs = _pairs(curves, sides, kl_coef)
        for step in sorted({step for mine, _ in pairs for step in mine}):
            both = [(mine[step], theirs[step]) for mine, theirs in pairs if step in mine and step in theirs]
            gold, kl, length = (
                [[getattr(pair[side], name) for pair in both] for side in (0, 1)] for name in Snapshot._fields
            )
            means = [f"{statistics.fmean(values):.2f}" for values in kl]
            means += [f"{statistics.fmean(values):.1f}" for values in length]
            yield [f"{kl_coef:g}", f"{step * answers:,}", *_compared(gold), *means]


def at_kl(curves: Curves, sides: Sequence[str], answers: int, levels: Sequence[float]) -> Iterable[list[str]]:
    """One row per KL coefficient and KL."""
    for kl_coef, level in itertools.product(_coefficients(curves, sides), levels):
        read = [[crossing(curve, level) for curve in pair] for pair in _pairs(curves, sides, kl_coef)]
        both = [(mine, theirs) for mine, theirs in read if mine is not None and theirs is not None]
        if len(both) > 1:
            gold, steps = ([[pair[side][place] for pair in both] for side in (0, 1)] for place in (0, 1))
            episodes = [f"{statistics.fmean(values) * answers:,.0f}" for values in steps]
            yield [f"{kl_coef:g}", f"{level:g}", *_compared(gold), *episodes]


def at_both(curves: Curves, sides: Sequence[str], last: int, levels: Sequence[float]) -> Iterable[list[str]]:
    """One row per KL, after `last` steps."""
    for level in levels:
        both = []
        for seed in sorted({run.seed for run in curves}):
            read = [on_frontier(points, level) for points in frontiers(curves, sides, seed, last)]
            if None not in read:
                both.append(read)
        if len(both) > 1:
            yield [f"{level:g}", *_compared([[pair[side] for pair in both] for side in (0, 1)])]


def _coefficients(curves: Curves, sides: Sequence[str]) -> list[float]:
    return sorted({run.kl_coef for run in curves if run.side in sides})


def _pairs(curves: Curves, sides: Sequence[str], kl_coef: float) -> list[list[dict[int, Snapshot]]]:
    """Curves of both sides, for the seeds that both have."""
    keys = ([Run(side, kl_coef, seed) for side in sides] for seed in sorted({run.seed for run in curves}))
    return [[curves[key] for key in pair] for pair in keys if all(key in curves for key in pair)]


def crossing(curve: dict[int, Snapshot], level: float) -> tuple[float, float] | None:
    """Gold score and step where a curve first crosses a KL, interpolated linearly between snapshots."""
    steps = sorted(curve)
    for before, after in itertools.pairwise(steps):
        one, two = curve[before], curve[after]
        if one.kl <= level < two.kl:
            share = (level - one.kl) / (two.kl - one.kl)
            return one.gold + share * (two.gold - one.gold), before + share * (after - before)
    return None


def frontiers(curves: Curves, sides: Sequence[str], seed: int, step: int) -> list[list[tuple[float, float]]]:
    """Per side, (KL, gold score) after `step` steps, sorted by KL, for all coefficients that both sides have."""
    runs = [[Run(side, kl_coef, seed) for side in sides] for kl_coef in _coefficients(curves, sides)]
    both = [pair for pair in runs if all(step in curves.get(run, {}) for run in pair)]
    ends = [[curves[pair[side]][step] for pair in both] for side in range(len(sides))]
    return [sorted((end.kl, end.gold) for end in points) for points in ends]


def on_frontier(points: Sequence[tuple[float, float]], level: float) -> float | None:
    """Gold score at a KL, interpolated linearly between points; None outside their range."""
    for (low, gold), (high, following) in itertools.pairwise(points):
        if low <= level <= high:
            return gold + (following - gold) * (level - low) / max(high - low, 1e-9)
    return None


def half_width(values: Sequence[float]) -> float:
    """Half of the 95 % interval of the mean; NaN for one value."""
    if len(values) < 2:
        return math.nan
    return STUDENT[len(values)] * statistics.stdev(values) / math.sqrt(len(values))


def _compared(gold: Sequence[Sequence[float]]) -> list[str]:
    """Number of seeds, both means, and the mean difference with its interval."""
    differences = [mine - theirs for mine, theirs in zip(*gold, strict=True)]
    middle, half = statistics.fmean(differences), half_width(differences)
    means = [f"{statistics.fmean(values):.2f}" for values in gold]
    return [str(len(differences)), *means, f"{middle:+.2f} ({middle - half:+.2f} to {middle + half:+.2f})"]


def draw(curves: Curves, sides: Sequence[str], answers: int, path: Path) -> None:
    """Plot gold score over episodes and over KL: mean over seeds with its interval."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, panels = plt.subplots(1, 2, figsize=(9, 3.6), sharey=True)
    for side, color in zip(sides, ("tab:blue", "tab:orange"), strict=True):
        coefficients = sorted({run.kl_coef for run in curves if run.side == side})
        for kl_coef, style in zip(coefficients, ("-", "--", ":"), strict=False):
            chosen = [curve for run, curve in curves.items() if (run.side, run.kl_coef) == (side, kl_coef)]
            steps = sorted(set.intersection(*(set(curve) for curve in chosen)))
            gold = [[curve[step].gold for curve in chosen] for step in steps]
            means = [statistics.fmean(values) for values in gold]
            low, high = ([statistics.fmean(values) + sign * half_width(values) for values in gold] for sign in (-1, 1))
            episodes = [step * answers for step in steps]
            kl = [statistics.fmean(curve[step].kl for curve in chosen) for step in steps]
            for panel, x in zip(panels, (episodes, kl), strict=True):
                panel.plot(x, means, style, color=color, marker="o", markersize=3, label=f"{side}, kl_coef {kl_coef:g}")
                panel.fill_between(x, low, high, color=color, alpha=0.12, linewidth=0)
    panels[0].set(xlabel="episodes", ylabel="gold score, held-out questions")
    panels[1].set(xlabel="KL to the SFT model, nats per completion")
    panels[1].legend(fontsize=7, loc="lower right")
    figure.tight_layout()
    figure.savefig(path, dpi=90)


if __name__ == "__main__":
    main()
