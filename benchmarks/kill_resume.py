"""kill -9 at many moments of a small PPO run: does the same command always resume and produce the same bytes?

    python benchmarks/kill_resume.py [--kills 50] [--seed 0] [--warm] [-- more arguments of `rlhf ppo`]

Half of the kills are uniform over the run, from its first step to its end (publishing the artifact takes about as long
as a step). The others are, in turn, inside rollout, scoring, update and saving of a random step. After each kill the
command runs again. The result is compared byte by byte with that of an uninterrupted run: every file of the artifact
(policy, critic, metrics) except the manifest and `timing.jsonl`, which contain times, and the checkpoint of the last
step (weights, critic, optimizer, counters, random states), copied before the stage removes it.

Every run starts a new interpreter, about 12 s per kill on an idle core. With `--warm` all but one uninterrupted run are
forked from a process that has imported everything, 3 s per kill. Exits with 1 if any result differs.
"""

from __future__ import annotations

import argparse
import importlib
import os
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tests.faults.harness import PHASES, STEPS, SmallRun


@dataclass(frozen=True)
class Outcome:
    """Result of one kill.

    Attributes:
        aim: intended phase.
        fell: actual phase, derived from the files left behind.
        step: completed steps at the kill; None before the first checkpoint.
        resumed: the same command then exited with 0.
        differing: files that differ from those of the uninterrupted run.
    """

    aim: str
    fell: str
    step: int | None
    resumed: bool
    differing: list[str]


def main() -> int:
    """Kill, resume, compare, print."""
    options = _options()
    os.environ |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}  # as in the started processes; read at import
    chance = random.Random(options.seed)
    with tempfile.TemporaryDirectory(prefix="kill-resume-") as folder:
        place = Path(folder)
        whole = SmallRun.new(place / "whole", place / "parts", None, *options.arguments)
        span = _uninterrupted(whole, warm=False)
        expected = whole.digests()
        if options.warm:
            _import_all()
            again = SmallRun.new(place / "again", place / "parts", None, *options.arguments)
            span = _uninterrupted(again, warm=True)
            if again.digests() != expected:
                raise SystemExit("a forked process produces other results than a new one")
        print(
            f"uninterrupted: {STEPS} steps in {span:.1f} s after its start; {len(expected)} files to compare",
            flush=True,
        )
        print(f"{'kill':>4}  {'aimed at':<10} {'killed in':<11} {'after step':>11}  {'resumed':<8} equal", flush=True)
        outcomes = []
        for number in range(options.kills):
            run = SmallRun.new(place / f"kill-{number}", place / "parts", None, *options.arguments)
            aim = "any moment" if number % 2 == 0 else PHASES[number // 2 % len(PHASES)]
            outcome = _kill_and_resume(run, aim, span, expected, chance, warm=options.warm)
            outcomes.append(outcome)
            equal = "yes" if not outcome.differing else f"NO: {', '.join(outcome.differing)}"
            done = "-" if outcome.step is None else outcome.step
            yes = "yes" if outcome.resumed else "NO"
            print(f"{number + 1:>4}  {aim:<10} {outcome.fell:<11} {done:>11}  {yes:<8} {equal}", flush=True)
            if outcome.resumed and not outcome.differing:
                shutil.rmtree(run.folder)
    return _conclude(outcomes)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0, help="random seed of the moments")
    parser.add_argument("--warm", action="store_true", help="fork instead of starting interpreters")
    parser.add_argument("arguments", nargs="*", help="arguments of `rlhf ppo`, such as `-- --set ppo.adapter=none`")
    return parser.parse_args()


def _import_all() -> None:
    import torch

    from rlhf_cli.cli.environment import prepare

    prepare()
    torch.set_num_threads(1)  # as OMP_NUM_THREADS sets for the others; threads do not survive a fork
    for name in ("stages.ppo.run", "stages.ppo.trainer", "models.saving", "generation.policy_saving"):
        importlib.import_module(f"rlhf_cli.{name}")


def _uninterrupted(run: SmallRun, *, warm: bool) -> float:
    """Run to the end. Returns the seconds from the first rollout to the end."""
    process = run.fork() if warm else run.start()
    run.wait_for(process, "rollout", 1)
    began = time.monotonic()
    end = run.finish(process)
    if end.code != 0:
        raise SystemExit(f"the uninterrupted run exited with {end.code}\n{end.stderr}")
    return time.monotonic() - began


def _kill_and_resume(
    run: SmallRun, aim: str, span: float, expected: dict[str, str], chance: random.Random, *, warm: bool
) -> Outcome:
    process = run.fork() if warm else run.start()
    if aim == "any moment":
        # The load of the machine may change, so most of the delay is measured in steps.
        steps, rest = divmod(chance.uniform(0, STEPS + 1), 1)
        run.wait_for(process, "rollout", int(steps) + 1)
        _wait(run, rest * span / (STEPS + 1))
    else:
        run.wait_for(process, aim, chance.randint(1, STEPS))
        if aim != "saving":  # saving takes only milliseconds
            _wait(run, chance.uniform(0, 0.05))
    fell = run.kill(process)
    run.catch()
    step = run.newest()
    end = run.finish(run.fork() if warm else run.start())
    found = run.digests()
    differing = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
    if end.code != 0:
        print(end.stderr, file=sys.stderr)
    return Outcome(aim, fell, step, end.code == 0, differing)


def _wait(run: SmallRun, seconds: float) -> None:
    until = time.monotonic() + seconds
    while (left := until - time.monotonic()) > 0:
        run.catch()
        time.sleep(min(left, 0.002))


def _conclude(outcomes: list[Outcome]) -> int:
    fell = Counter(outcome.fell for outcome in outcomes)
    resumed = sum(outcome.resumed for outcome in outcomes)
    equal = sum(outcome.resumed and not outcome.differing for outcome in outcomes)
    print(f"\n{len(outcomes)} killed ({', '.join(f'{count} in {where}' for where, count in fell.most_common())})")
    print(f"{resumed} resumed, {equal} with equal bytes")
    return 0 if equal == len(outcomes) else 1


if __name__ == "__main__":
    sys.exit(main())
