"""Peak memory of each process of a sharded run, loading, resuming and saving included, against its part of the whole.

    python benchmarks/sharding_memory.py [--ranks 1 2 4] [--runs sft-none train-rm-lora ...] [--hidden 768]

Each run is the real command with gloo on the CPU, in float32: two steps on short texts, ended by SIGTERM after the
first one is saved, and the same command again, which resumes and writes the artifact. `ppo-none` has a reward model
of its own. `train-rm` draws completions to normalize rewards over. The processes are forks of one that has imported the
libraries. Each notes its resident memory, resets the peak of the kernel, runs the command and reports the difference
(VmHWM), with the line of rlhf_cli that ran then. What the same command with a model of 100,000 weights holds, which is
modules, buffers and sockets, is subtracted. `file pages` are the part of the peak that is mapped from files, which the
kernel may drop at any time. CPU seconds are those of all ranks and both commands, without imports. Linux only. With
MALLOC_TOP_PAD_=131072 in the environment, which is glibc's default, rlhf leaves glibc as it is.

The bound is 1.15 x whole / ranks + what no rank divides: activations, and the weights that are gathered for passes and
to draw, as `rlhf plan` counts them. `whole` is what one process would hold: weights, gradients, moments. Each is of the
phase in which it is largest. The SFT model that `train-rm` draws from is whole in every process.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Iterable, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from forked_ranks import Forks

RUNS = tuple(f"{stage}-{adapter}" for adapter in ("none", "lora") for stage in ("sft", "train-rm", "ppo"))
SLACK = 1.15
RECORDS = 16
"""Demonstrations, prompts and rankings."""
LIMIT = 3_600
"""Seconds after which a command is killed."""
DIVIDED = (
    *("policy", "critic", "reference", "reward model", "SFT model"),
    *("gradients", "optimizer", "trained weights", "other models"),
)
"""Roles of `rlhf plan` that ranks divide; the others each has whole."""


def make_inputs(folder: Path, hidden: int, layers: int) -> None:
    """Write a language model with random weights, a reward model of the same size, texts and rankings."""
    from rlhf_cli.models.build import build_model
    from rlhf_cli.settings.shared import BuildSettings

    folder.mkdir(exist_ok=True)
    texts = [f"What is {number}? It is {number * 7} or so." for number in range(200)]
    heads = hidden // 64
    build = BuildSettings(
        hidden_size=hidden, layers=layers, heads=heads, feed_forward_size=3 * hidden, vocab_size=400, context_length=64
    )
    build_model(folder / "model", texts, build, seed=1)
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    torch.manual_seed(2)
    classifier = AutoModelForSequenceClassification.from_pretrained(folder / "model", num_labels=1)
    classifier.save_pretrained(folder / "reward")
    AutoTokenizer.from_pretrained(folder / "model").save_pretrained(folder / "reward")
    texts = [(f"What is {number}?", f"It is {number * 7}.") for number in range(RECORDS)]
    write_records(folder / "demonstrations.jsonl", ({"prompt": one, "completion": text} for one, text in texts))
    pairs = ({"prompt": one, "chosen": text, "rejected": "It is."} for one, text in texts)
    write_records(folder / "rankings.jsonl", pairs)


def write_records(path: Path, records: Iterable[dict[str, str]]) -> None:
    """Write records, a line each."""
    path.write_text("".join(f"{json.dumps(record)}\n" for record in records), encoding="utf-8")


def recipe(folder: Path, run: str, ranks: int, device: str = "cpu") -> Path:
    """Write the recipe of a run; returns its path."""
    stage, adapter = run.rsplit("-", 1)
    training: dict[str, Any] = {"adapter": adapter, "micro_batch_size": 1, "checkpoint_steps": 1}
    supervised = {**training, "batch_size": 4, "epochs": 0.6, "max_length": 48}
    sections: dict[str, Any] = {
        "sft": {"sft": {**supervised, "data": "demonstrations.jsonl"}},
        "train-rm": {
            "train_rm": {**supervised, "model": "model", "data": "rankings.jsonl"},
            "sampling": {"max_new_tokens": 8},
        },
        "ppo": {
            "ppo": {
                **training, "model": "model", "prompts": "demonstrations.jsonl", "critic_from": "policy", "steps": 2,
                "prompts_per_step": 4, "epochs": 1, "rollout_batch_size": 2, "max_new_tokens": 8,
                "reward_model": "reward" if adapter == "none" else None,
                "rewards": [{"function": f"{folder / 'reward.py'}:score"}],
            }
        },
    }  # fmt: skip
    (folder / "reward.py").write_text(
        "def score(prompts, completions):\n    return [float(len(one)) for one in completions]\n", encoding="utf-8"
    )
    model = {"path": "model", "precision": "float32", "device": device, "threads": 1}
    content = {
        "name": "memory",
        "model": model | ({"sharding": "fsdp"} if ranks > 1 else {}),
        "data": {"prompts": "demonstrations.jsonl", "max_prompt_tokens": 24},
        **sections[stage],
    }
    path = folder / f"{run}-{ranks}.yaml"
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


def memory(name: str) -> int:
    """Bytes of a line of /proc/self/status."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return int(next(line for line in lines if line.startswith(name)).split()[1]) * 1024


def work(report: Path, stop_after: str, arguments: Sequence[str]) -> None:
    """Run a command in this process and write the peak of its resident memory above that after the imports."""
    import peft  # noqa: F401
    import torch.distributed.fsdp  # noqa: F401
    import transformers.models.llama.modeling_llama  # noqa: F401

    import rlhf_cli.stages.ppo.trainer
    import rlhf_cli.stages.reward_model.trainer
    import rlhf_cli.stages.sft.training  # noqa: F401
    from rlhf_cli.cli import entry

    baseline, since = {name: memory(name) for name in ("VmRSS", "RssFile")}, time.process_time()
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # resets VmHWM
    threading.Thread(target=_watch, args=(report, baseline, since), daemon=True).start()
    if stop_after:
        threading.Thread(target=_stop, args=(Path(stop_after),), daemon=True).start()
    sys.argv = ["rlhf", *arguments]
    entry()


def _watch(report: Path, baseline: dict[str, int], since: float) -> None:
    """Write peak, its line and CPU seconds again and again, since a stopped command ends without another word."""
    line, largest, files = "", 0, 0
    while True:
        if (resident := memory("VmRSS")) > largest:
            line, largest, files = _line(), resident, memory("RssFile") - baseline["RssFile"]
        partial = report.with_suffix(".partial")
        peak, seconds = memory("VmHWM") - baseline["VmRSS"], time.process_time() - since
        found = {"peak": peak, "files": files, "line": line, "seconds": seconds}
        partial.write_text(json.dumps(found), encoding="utf-8")
        partial.replace(report)
        time.sleep(0.01)


def _line() -> str:
    """Return the innermost line of rlhf_cli that the main thread runs."""
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    while frame is not None and "/rlhf_cli/" not in frame.f_code.co_filename:
        frame = frame.f_back
    return "" if frame is None else f"{frame.f_code.co_filename.rpartition('/rlhf_cli/')[2]}:{frame.f_lineno}"


def _stop(checkpoint: Path) -> None:
    while not checkpoint.exists():
        time.sleep(0.01)
    os.kill(os.getpid(), signal.SIGTERM)


def measured(forks: Forks, folder: Path, run: str, ranks: int, *, resumes: bool) -> list[dict[str, Any]]:
    """Run a command with several ranks; returns the report of each: bytes of its peak, the line there, CPU seconds.

    Raises:
        RuntimeError: a rank failed, or did not end; its output is shown.
    """
    from forked_ranks import Ranks  # of this folder, where the tests do not look

    stage = run.rsplit("-", 1)[0]
    target = folder / f"run-{run}-{ranks}"
    stop_after = "" if resumes else str(target / f".{stage}.work" / "step-00000001")
    reports = [folder / f"report-{rank}.json" for rank in range(ranks)]
    for report in reports:
        report.unlink(missing_ok=True)
    arguments = [stage, str(recipe(folder, run, ranks)), "--run-dir", str(target)]
    started = Ranks(forks, ranks, [__file__, "--worker", str(folder), stop_after, *arguments], folder)
    started.wait_for(LIMIT)
    codes = started.codes
    if any(code not in ((0,) if resumes else (128 + signal.SIGTERM, -signal.SIGTERM)) for code in codes):
        started.end()
        output = [file.read_text(encoding="utf-8", errors="replace") for file in sorted(folder.glob("stderr*"))]
        raise RuntimeError(f"{run} on {ranks} ended with {codes}:\n" + "\n".join(output)[-4_000:])
    return [json.loads(report.read_text(encoding="utf-8")) for report in reports]


def counted(folder: Path, run: str, ranks: int, device: str = "cpu") -> dict[str, tuple[float, float]]:
    """Return bytes that one process would hold in each phase, and those that each of several ranks holds whole."""
    import yaml

    from rlhf_cli.models.model_shape import ModelShape
    from rlhf_cli.models.resources import Extent
    from rlhf_cli.recipe.schema import Recipe
    from rlhf_cli.stages.registry import stage as stage_named

    content = yaml.safe_load(recipe(folder, run, max(ranks, 2), device).read_text(encoding="utf-8"))
    stage = stage_named(run.rsplit("-", 1)[0])
    shape, found = ModelShape.required(folder / "model"), Recipe.model_validate(content)
    settings, reward = found.section(stage.name), shape if run == "ppo-none" else None
    extent = Extent(shape, reward, on_cpu=device == "cpu", process=0, tokens=48, records=RECORDS)

    def planned(extent: Extent, *, divided: bool) -> dict[str, float]:
        need = stage.memory(settings, found, extent)
        phases = {} if need is None else need.phases
        return {
            phase: sum(size for role, size in roles.items() if (role in DIVIDED) is divided)
            for phase, roles in phases.items()
        }

    # On a GPU one process holds what only scores all the time, as ranks do.
    alone = planned(replace(extent, on_cpu=False), divided=True)
    alone["save"] = max(size for phase, size in alone.items() if phase != "save")
    rest = planned(replace(extent, processes=ranks), divided=False)
    return {phase: (alone[phase], rest[phase]) for phase in rest}


def main() -> None:
    """Measure and print the table."""
    from forked_ranks import Forks

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--runs", nargs="+", choices=RUNS, default=RUNS)
    parser.add_argument("--hidden", type=int, default=768, help="width of the model, a multiple of 64")
    parser.add_argument("--layers", type=int, default=14)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch, closing(Forks()) as forks:
        folder, small = Path(scratch), Path(scratch) / "small"
        make_inputs(folder, options.hidden, options.layers)
        make_inputs(small, 64, 1)
        from rlhf_cli.models.model_shape import ModelShape

        print(f"{ModelShape.required(folder / 'model').weights:,} weights in float32; peaks of the largest rank in MB")
        print(
            "| run | ranks | first steps | resumed, saved | without a model | file pages | whole / ranks | "
            "not divided | bound | within | CPU s | at the peaks |"
        )
        print("|" + "---|" * 12)
        for run in options.runs:
            for ranks in options.ranks:
                empty = [_largest(one) for one in both(forks, small, run, ranks)]
                without = [one["peak"] for one in empty]
                reports = both(forks, folder, run, ranks)
                largest = [_largest(one) for one in reports]
                whole, rest = map(max, zip(*counted(folder, run, ranks).values(), strict=True))
                bound = SLACK * whole / ranks + rest
                peaks = [one["peak"] - process for one, process in zip(largest, without, strict=True)]
                files = max(one["files"] - process["files"] for one, process in zip(largest, empty, strict=True))
                verdict = "yes" if max(peaks) <= bound else "no"
                seconds = sum(report["seconds"] for one in reports for report in one)
                figures = [*peaks, max(without), files, whole / ranks, rest, bound]
                cells = [*(f"{size / 1e6:,.0f}" for size in figures), verdict, f"{seconds:,.1f}"]
                lines = ", ".join(f"`{one['line']}`" for one in largest)
                print(f"| {run} | {ranks} | {' | '.join(cells)} | {lines} |", flush=True)


def both(forks: Forks, folder: Path, run: str, ranks: int) -> list[list[dict[str, Any]]]:
    """Run the first steps, and resume; returns the reports of each."""
    return [measured(forks, folder, run, ranks, resumes=resumes) for resumes in (False, True)]


def _largest(reports: list[dict[str, Any]]) -> dict[str, Any]:
    return max(reports, key=lambda report: report["peak"])


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        work(Path(sys.argv[2]) / f"report-{os.environ.get('RANK', '0')}.json", sys.argv[3], sys.argv[4:])
    else:
        main()
