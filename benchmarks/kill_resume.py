"""kill -9 at many moments of a small PPO run: does the same command always go on, and to the same bytes?

    python benchmarks/kill_resume.py [--kills 50] [--seed 0] [--warm] [-- further arguments of `rlhf ppo`]

Half of the kills fall uniformly over the run, from its first step on to its end (publishing the artifact takes about as
long as a step); the others in turn inside rollout, scoring, update and saving of a random step. After each the command
is given once more. Compared with a run that nothing disturbed, byte by byte: every file of the artifact (policy,
critic, metrics) but the manifest, which holds times, and the checkpoint of the last step (weights, critic, optimizer,
counters, random states), caught before the stage removes it.

A fresh interpreter each time: about 12 s a kill on an idle core. With `--warm` only the undisturbed run is one, and the
others are forked from a process that has imported everything: 3 s a kill. Ends with 1 if any did not come back equal.
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
    """What came of one kill.

    Attributes:
        aim: where it was to fall.
        fell: where it fell, as the files it left tell.
        step: steps done when it fell; None before the first checkpoint.
        resumed: the same command ended with 0.
        differing: files that are not what the undisturbed run wrote.
    """

    aim: str
    fell: str
    step: int | None
    resumed: bool
    differing: list[str]


def main() -> int:
    """Kill, resume, compare, print."""
    options = _options()
    os.environ |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}  # as the started processes have it; read on import
    chance = random.Random(options.seed)
    with tempfile.TemporaryDirectory(prefix="kill-resume-") as folder:
        place = Path(folder)
        whole = SmallRun.new(place / "whole", place / "parts", None, *options.arguments)
        span = _undisturbed(whole, warm=False)
        expected = whole.digests()
        if options.warm:
            _import_all()
            again = SmallRun.new(place / "again", place / "parts", None, *options.arguments)
            span = _undisturbed(again, warm=True)
            if again.digests() != expected:
                raise SystemExit("a forked process does not come to what a fresh one does")
        print(
            f"undisturbed: {STEPS} steps in {span:.1f} s behind its start; {len(expected)} files to compare", flush=True
        )
        print(f"{'kill':>4}  {'aimed at':<10} {'fell in':<11} {'behind step':>11}  {'resumed':<8} equal", flush=True)
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
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--warm", action="store_true", help="fork instead of starting interpreters")
    parser.add_argument("arguments", nargs="*", help="of `rlhf ppo`, such as `-- --set ppo.adapter=none`")
    return parser.parse_args()


def _import_all() -> None:
    import torch

    from rlhf_cli.cli.environment import prepare

    prepare()
    torch.set_num_threads(1)  # as the others have by OMP_NUM_THREADS; and threads do not survive a fork
    for name in ("stages.ppo", "stages.rewards", "training.ppo", "models.actors", "models.saving", "models.merging"):
        importlib.import_module(f"rlhf_cli.{name}")


def _undisturbed(run: SmallRun, *, warm: bool) -> float:
    """Run it to its end; returns the seconds from its first checkpoint on."""
    process = run.fork() if warm else run.start()
    run.wait_for(process, "rollout", 1)
    began = time.monotonic()
    end = run.finish(process)
    if end.code != 0:
        raise SystemExit(f"the undisturbed run ended with {end.code}\n{end.stderr}")
    return time.monotonic() - began


def _kill_and_resume(
    run: SmallRun, aim: str, span: float, expected: dict[str, str], chance: random.Random, *, warm: bool
) -> Outcome:
    process = run.fork() if warm else run.start()
    if aim == "any moment":
        # The machine may be busy with other things by now, so most of the way is measured in steps.
        steps, rest = divmod(chance.uniform(0, STEPS + 1), 1)
        run.wait_for(process, "rollout", int(steps) + 1)
        _wait(run, rest * span / (STEPS + 1))
    else:
        run.wait_for(process, aim, chance.randint(1, STEPS))
        if aim != "saving":  # which is over in milliseconds
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
