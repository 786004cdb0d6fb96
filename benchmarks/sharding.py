"""`model.sharding: fsdp` on the CPU: does it compute what one process computes, start each time, and survive kill -9?

    python benchmarks/sharding.py [--matrix] [--launches [100]] [--kills [20]] [--processes 2 4] [--seed 0]

Without any of the first three, all of them.

- `--matrix`: the largest difference of a trained weight to one process after 5 steps, for each family, stage, adapter
  and number of processes. Texts are uneven, a process has no work in some steps, and steps have fewer prompts than
  there are 4 processes. Weights must agree to 1e-5.
- `--launches N`: processes start, join, divide a model, train 2 steps and exit, N times, with 2 and 4 processes in
  turn. A launch of more than `--seconds` is a hang, an exit code other than 0 an abort.
- `--kills N`: `kill -9` of a random rank at a random moment of `rlhf ppo` on 2 processes, N times. The others must end
  on their own. The command runs again, and every file of its artifact and its last checkpoint must equal those of an
  uninterrupted run, but for the files that contain times (as in kill_resume.py). At last a run begins on 4 processes,
  goes on with 2 and ends with 1 without sharding; its weights must agree with those of 4 to 1e-5.

All processes are forks of one that has imported everything, since an import takes longer than what is measured. They
exit as any Python process does, so that aborts at the end are seen. They get the environment that torchrun sets.
Exits with 1 if anything differs, hangs or aborts.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import random
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from forked_ranks import Forks, Ranks
from safetensors.torch import load_file
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tests.faults.harness import STEPS, SmallRun

FAMILIES = ("llama", "qwen3", "gemma3_text", "t5", "qwen3_moe")
TOLERANCE = 1e-5
_SHARDED = Path(__file__).resolve().parents[1] / "tests" / "distributed" / "sharded.py"


def main() -> int:
    """Run the parts that are asked for."""
    options = _options()
    everything = not options.matrix and options.launches is None and options.kills is None
    forks = Forks()
    failures = 0
    with tempfile.TemporaryDirectory(prefix="sharding-") as place, contextlib.closing(forks):
        if everything or options.matrix:
            failures += _matrix(forks, Path(place), options.processes, options.families, options.seconds)
        if everything or options.launches is not None:
            failures += _launches(forks, Path(place), options.launches or 100, options.processes, options.seconds)
        if everything or options.kills is not None:
            failures += _kills(forks, Path(place), options.kills or 20, random.Random(options.seed))
            failures += _fewer(forks, Path(place))
    return int(failures > 0)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--matrix", action="store_true")
    parser.add_argument("--families", nargs="+", default=FAMILIES, help="of the matrix")
    parser.add_argument("--launches", type=int, nargs="?", const=100)
    parser.add_argument("--kills", type=int, nargs="?", const=20)
    parser.add_argument("--processes", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--seconds", type=float, default=300, help="after which a launch is a hang")
    parser.add_argument("--seed", type=int, default=0, help="random seed of ranks and moments")
    return parser.parse_args()


def _matrix(forks: Forks, place: Path, counts: Sequence[int], families: Sequence[str], seconds: float) -> int:
    """Print the difference of each cell to one process; returns the number of those that are too large or missing."""
    failures, largest, cells = 0, 0.0, 0
    print(f"{'processes':>9}  {'family':<12} {'stage':<7} {'adapter':<8} {'difference':>10} {'moved':>7}", flush=True)
    for count in counts:
        for family in families:
            folder = _model(place / f"matrix-{count}-{family}", family)
            for stage, adapter in _stages(family):
                case = f"{stage}-{family}-{adapter}"
                found = _run(forks, count, folder, case, seconds)
                cells += 1
                row = f"{count:>9}  {family:<12} {stage:<7} {adapter:<8}"
                if found is None:
                    failures += 1
                    print(f"{row} FAILED", flush=True)
                    continue
                failures += not (found["difference"] < TOLERANCE and max(found["losses"]) < TOLERANCE)
                largest = max(largest, found["difference"])
                print(f"{row} {found['difference']:>10.1e} {found['moved']:>7.1e}", flush=True)
    print(f"{cells} cells, {failures} failed; largest difference {largest:.1e}\n", flush=True)
    return failures


def _stages(family: str) -> Iterator[tuple[str, str]]:
    for stage in ("sft", "reward", "ppo"):
        if stage != "reward" or family != "t5":  # an encoder-decoder cannot be a reward model
            yield from ((stage, adapter) for adapter in ("none", "lora"))


def _model(folder: Path, family: str) -> Path:
    from tests.distributed.sharded_models import make_model  # imports torch

    folder.mkdir()
    make_model(family, folder / family)
    return folder


def _run(forks: Forks, count: int, folder: Path, case: str, seconds: float) -> dict[str, Any] | None:
    ranks = Ranks(forks, count, [str(_SHARDED), str(folder), case], folder)
    if (code := ranks.wait_for(seconds)) != 0:
        ranks.end()
        print(f"exit code {code}; the end of its messages:", *_messages(folder, count), sep="\n", file=sys.stderr)
        return None
    return json.loads((folder / f"{case}.json").read_text())


def _messages(folder: Path, count: int) -> list[str]:
    names = ["stderr", *(f"stderr-{rank}" for rank in range(1, count))]
    return [(folder / name).read_text(errors="replace")[-1500:] for name in names]


def _launches(forks: Forks, place: Path, launches: int, counts: Sequence[int], seconds: float) -> int:
    folder = _model(place / "launches", "llama")
    hangs, aborts, times = 0, 0, []
    for number in range(launches):
        count, began = counts[number % len(counts)], time.monotonic()
        ranks = Ranks(forks, count, [str(_SHARDED), str(folder), f"launch-llama-none-{number}"], folder)
        code = ranks.wait_for(seconds)
        times.append(time.monotonic() - began)
        hangs += code is None
        aborts += code not in (None, 0)
        if code != 0:
            print(f"launch {number + 1}: {ranks.codes}", *_messages(folder, count), sep="\n", flush=True)
            ranks.end()
    print(
        f"{launches} launches on {' and '.join(map(str, counts))} processes: {hangs} hangs, {aborts} aborts; "
        f"{min(times):.1f} to {max(times):.1f} s\n",
        flush=True,
    )
    return hangs + aborts


def _kills(forks: Forks, place: Path, kills: int, chance: random.Random) -> int:
    """Kill ranks and resume; returns the number of times that went wrong."""
    whole = SmallRun.new(place / "whole", place / "parts")
    ranks = _start(forks, whole, 2)
    whole.wait_for(ranks, "rollout", 1, 600)
    began = time.monotonic()
    _finish(whole, ranks)
    expected, span = whole.digests(), time.monotonic() - began
    print(f"uninterrupted: {STEPS} steps in {span:.1f} s; {len(expected)} files to compare", flush=True)
    print(f"{'kill':>4}  {'rank':>4} {'after step':>11}  {'others ended':<12} {'resumed':<8} equal", flush=True)
    counts = [0, 0, 0]
    for number in range(kills):
        run, rank = SmallRun.new(place / f"kill-{number}", place / "parts"), chance.randrange(2)
        ranks = _start(forks, run, 2)
        _wait(run, ranks, chance.uniform(0, STEPS + 1), span)
        ranks.send_signal(signal.SIGKILL, rank)
        has_ended = ranks.wait_for(120) is not None
        ranks.end()
        done = run.newest()
        code = run.finish(_start(forks, run, 2), 600).code
        found = run.digests()
        differing = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
        outcome = (has_ended, code == 0, code == 0 and not differing)
        counts = [count + yes for count, yes in zip(counts, outcome, strict=True)]
        others, resumed, equal = ("yes" if yes else "NO" for yes in outcome)
        step = "-" if done is None else done
        row = f"{number + 1:>4}  {rank:>4} {step:>11}  {others:<12} {resumed:<8} {equal}"
        print(row, *differing, flush=True)
        if code != 0:
            print(run.stderr, file=sys.stderr)
    print(
        f"{kills} killed: the other rank ended {counts[0]} times, {counts[1]} resumed, {counts[2]} with equal bytes\n"
    )
    return kills - min(counts)


def _start(forks: Forks, run: SmallRun, count: int) -> Ranks:
    """Start or resume a run on a number of processes."""
    (run.folder / "events").write_text("")
    sharding = "fsdp" if count > 1 else "none"
    return Ranks(forks, count, ["rlhf", *run.command[3:], "--set", f"model.sharding={sharding}"], run.folder)


def _finish(run: SmallRun, ranks: Ranks) -> None:
    if (end := run.finish(ranks, 600)).code != 0:
        raise SystemExit(f"a run exited with {end.code}\n{end.stderr}")


def _wait(run: SmallRun, ranks: Ranks, moment: float, span: float) -> None:
    """Wait until a run is at a moment, in steps; the load of the machine may change, so most of it is counted."""
    run.wait_for(ranks, "rollout", int(moment) + 1, 600)
    until = time.monotonic() + moment % 1 * span / (STEPS + 1)
    while time.monotonic() < until:
        run.catch()
        time.sleep(0.002)


def _fewer(forks: Forks, place: Path) -> int:
    """Go from 4 processes to 2 and to 1, and compare with 4; returns whether the weights differ too much."""
    four, fewer = (SmallRun.new(place / name, place / "parts") for name in ("four", "fewer"))
    for run in (four, fewer):  # each process has its own random numbers, so another number of them has others
        reward = run.folder / "reward.py"
        text = reward.read_text()
        reward.write_text(text.replace(" + random.gauss(0, 0.1)", ""))
        assert reward.read_text() != text
    _finish(four, _start(forks, four, 4))
    done = []
    for count, steps in ((4, 1), (2, 2)):
        ranks = _start(forks, fewer, count)
        fewer.wait_for(ranks, "rollout", steps + 1, 600)
        ranks.end()
        done.append(fewer.newest())
    _finish(fewer, _start(forks, fewer, 1))
    one, other = (_weights(run.run_dir) for run in (four, fewer))
    assert one.keys() == other.keys()
    assert one
    largest = max(float((one[file][name] - other[file][name]).abs().max()) for file in one for name in one[file])
    print(
        f"4 processes to step {done[0]}, 2 to step {done[1]}, 1 without sharding to step {STEPS}: weights differ by "
        f"{largest:.1e} from those of 4 processes",
        flush=True,
    )
    return int(not largest < TOLERANCE)


def _weights(folder: Path) -> dict[Path, dict[str, Tensor]]:
    return {path.relative_to(folder): load_file(path) for path in sorted((folder / "ppo").rglob("*.safetensors"))}


if __name__ == "__main__":
    sys.exit(main())
