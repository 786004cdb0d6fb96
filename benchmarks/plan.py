"""What `rlhf plan` predicts beside what stages take: peak memory and seconds of training.

    python benchmarks/plan.py                                                    the model of recipes/quickstart.yaml
    python benchmarks/plan.py --model FOLDER --demonstrations FILE --rankings FILE
    python benchmarks/plan.py --stages ppo --adapters lora --rounds 3 --json results.json

For each adapter, `sft`, `train-rm` and `ppo` of one recipe follow each other: `rlhf plan` of the stage with its trial,
and then the stage, each in a process of its own. Memory is the peak resident memory of the stage's process. Time is
that of the phases in `timing.jsonl` but `checkpoint`; loading and saving of models is in neither number. With
`--rounds`, each number is the median of the rounds.

With `--clock cpu`, trial and stage count the CPU time of their process in the place of wall time: on a machine with
other jobs, and with one thread, that is about the time on an idle machine.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
STAGES = ("sft", "train-rm", "ppo")
BESIDE = ("other", "save", "checkpoint", "step")
"""Of the seconds that a plan or a stage gives: what is not training, and the sum."""
QUICKSTART = ("sft.epochs=0.5", "ppo.steps=10", "evaluate=null")
"""Changes to the quickstart: less work of the same kind."""

Row = dict[str, Any]


@dataclass(frozen=True)
class Compared:
    """A stage of one round: bytes and seconds, by `predicted` and `measured`."""

    stage: str
    adapter: str
    memory: dict[str, float]
    seconds: dict[str, float]
    details: Row


def main(arguments: Sequence[str] | None = None) -> None:
    """Plan and run the stages, and print a table."""
    options = _options(arguments)
    if options.clock == "cpu" and options.threads != 1:
        sys.exit("CPU time is the sum of all threads: add `--threads 1`")
    found: list[Compared] = []
    for number in range(options.rounds):
        for adapter in options.adapters:
            with tempfile.TemporaryDirectory() as folder:
                for one in _round(options, Path(folder), adapter):
                    found.append(one)
                    print(f"round {number + 1}: {_line(one.stage, adapter, [one])}", file=sys.stderr, flush=True)
    if options.json:
        options.json.write_text(json.dumps([vars(one) for one in found], indent=1), encoding="utf-8")
    print("| stage | adapter | memory predicted, GB | measured | ratio | training predicted, s | measured | ratio |")
    print("|---|---|---|---|---|---|---|---|")
    for stage, adapter in dict.fromkeys((one.stage, one.adapter) for one in found):
        print(_line(stage, adapter, [one for one in found if (one.stage, one.adapter) == (stage, adapter)]))
    print(f"\nload averages at the end: {', '.join(f'{load:.2f}' for load in os.getloadavg())}", file=sys.stderr)


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="folder of a language model; default: the one that quickstart makes")
    samples = ROOT / "data_samples"
    parser.add_argument("--demonstrations", type=Path, default=samples / "demonstrations.jsonl")
    parser.add_argument("--rankings", type=Path, default=samples / "rankings.jsonl")
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=STAGES, help="those that are compared")
    parser.add_argument("--adapters", nargs="+", choices=("none", "lora"), default=("none", "lora"))
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall")
    parser.add_argument("--precision", default="auto", help="of a model of `--model`")
    parser.add_argument("--set", nargs="*", default=[], metavar="A=B", help="further settings of the recipe")
    parser.add_argument("--json", type=Path, help="file for the results")
    return parser.parse_args(arguments)


def _round(options: argparse.Namespace, folder: Path, adapter: str) -> Iterator[Compared]:
    """Plan and run one stage after another in a run directory of their own; each reads what the one before it wrote."""
    recipe, settings = ROOT / "recipes" / "quickstart.yaml", [f"model.threads={options.threads}", *QUICKSTART]
    if options.model:
        recipe, settings = _recipe(options, folder), []
    settings += [f"{section}.adapter={adapter}" for section in ("sft", "train_rm", "ppo")] + options.set
    run = ["--run-dir", folder / "run", *(part for setting in settings for part in ("--set", setting))]
    last = max(STAGES.index(stage) for stage in options.stages)
    for stage in STAGES[: last + 1]:
        span = ["--from", stage, "--to", stage]
        if stage == "train-rm" and not options.model:
            _rlhf(options.clock, "run", recipe, "--json", "--from", "label", "--to", "label", *run)
        planned = _rlhf(options.clock, "plan", recipe, "--json", *span, *run)[0] if stage in options.stages else None
        result, peak = _rlhf(options.clock, "run", recipe, "--json", *span, *run)
        if planned is not None:
            yield _compared(planned["stages"][0], result["stages"][0], peak, adapter)


def _recipe(options: argparse.Namespace, folder: Path) -> Path:
    """Write a recipe with short work for a model, and its data: rows of similar length."""
    files = {"demonstrations": (options.demonstrations, 20), "rankings": (options.rankings, 10)}
    for name, (source, count) in files.items():
        lines = source.read_text(encoding="utf-8").splitlines()
        lines = sorted(lines, key=len)[len(lines) // 2 :][:count]
        (folder / f"{name}.jsonl").write_text("\n".join(lines), encoding="utf-8")
    content = {
        "name": "plan",
        "model": {"path": str(options.model.resolve()), "precision": options.precision, "threads": options.threads},
        "data": {"prompts": "demonstrations.jsonl", "holdout": 0.2},
        "sampling": {"max_new_tokens": 32},
        "sft": {"data": "demonstrations.jsonl", "batch_size": 4, "micro_batch_size": 4},
        "train_rm": {"data": "rankings.jsonl", "batch_size": 2, "micro_batch_size": 2},
        "ppo": {"steps": 2, "prompts_per_step": 8, "epochs": 2, "micro_batch_size": 4, "rollout_batch_size": 8},
    }
    file = folder / "recipe.yaml"
    file.write_text(json.dumps(content), encoding="utf-8")  # JSON is YAML
    return file


def _rlhf(clock: str, *arguments: object) -> tuple[Row, int]:
    """Run a command in a process of its own; returns what it printed as JSON, and its peak resident memory in bytes.

    A process starts with the peak of the one that forked it; this one imports no library, so it is small.
    """
    command = [sys.executable, __file__, f"--as-rlhf-{clock}", *map(str, arguments)]
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        process = subprocess.Popen(command, stdout=out, stderr=err, env=os.environ | {"CI": "1"})
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        out.seek(0)
        err.seek(0)
        if process.returncode:
            sys.exit(f"{' '.join(command)}\nended with {process.returncode}\n{err.read().decode()[-4000:]}")
        return json.loads(out.read()), usage.ru_maxrss * 1024


def _as_rlhf(clock: str, arguments: Sequence[str]) -> int:
    """Be the command `rlhf`, whose trial and stages read another clock."""
    from rlhf_cli.cli import main as rlhf

    if clock == "cpu":
        from rlhf_cli.stages import trial
        from rlhf_cli.training import timing

        cpu = SimpleNamespace(perf_counter=time.process_time, monotonic=time.process_time)
        trial.time = timing.time = cpu  # pyright: ignore[reportAttributeAccessIssue]
    sys.argv = ["rlhf", *arguments]
    return rlhf()


def _compared(planned: Row, result: Row, peak: int, adapter: str) -> Compared:
    timed = {name.removeprefix("time/"): took for name, took in result["timing"].items() if name.startswith("time/")}
    details = {"planned": planned["seconds_by_phase"], "timed": timed, "memory": planned["memory"]}
    details |= {"completion_tokens": planned["completion_tokens"], "whole": result["seconds"]}
    details["precision"] = planned["precision"]
    return Compared(
        stage=planned["name"],
        adapter=adapter,
        memory={"predicted": planned["memory"]["peak_bytes"], "measured": peak},
        seconds={"predicted": _training(planned["seconds_by_phase"]), "measured": _training(timed)},
        details=details,
    )


def _training(seconds: dict[str, float]) -> float:
    return sum(took for phase, took in seconds.items() if phase not in BESIDE)


def _line(stage: str, adapter: str, rounds: Sequence[Compared]) -> str:
    cells = [stage, "LoRA" if adapter == "lora" else "all weights"]
    for numbers, unit, digits in (([one.memory for one in rounds], 1e9, 2), ([one.seconds for one in rounds], 1.0, 1)):
        cells += [
            f"{statistics.median(row[side] for row in numbers) / unit:.{digits}f}" for side in ("predicted", "measured")
        ]
        cells.append(f"{statistics.median(row['predicted'] / row['measured'] for row in numbers):.2f}")
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    if sys.argv[1:] and sys.argv[1].startswith("--as-rlhf-"):
        sys.exit(_as_rlhf(sys.argv[1].removeprefix("--as-rlhf-"), sys.argv[2:]))
    main()
