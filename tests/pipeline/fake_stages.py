"""The real `rlhf` command with fake stages that write small files instead of training; run as a script.

The output of each stage depends on its settings and inputs, so that an upstream change propagates.

FAKE_LOG: file with one line per stage that ran and the content of its work folder.
FAKE_DIE=stage[:signal]: the stage kills its own process after a checkpoint. FAKE_HANG=stage: it waits for a signal,
within a step. FAKE_LOAD=stage: it does so with nothing under way that is saved.
FAKE_RAISE=stage:kind: the stage raises an exception.
FAKE_RANK=n|all: the rank that does this; 0 by default. Other ranks do nothing in a stage.
FAKE_ONCE: it does so only before torchrun has started it again.
"""

from __future__ import annotations

import errno
import os
import signal
import sys
import time
import types
from pathlib import Path

from rlhf_cli.distributed.ranks import is_main, rank
from rlhf_cli.errors import DivergedError
from rlhf_cli.pipeline import preflight
from rlhf_cli.progress import task
from rlhf_cli.stages.base import StageContext, StageOutcome
from rlhf_cli.stages.registry import stages

FILES = {"sft": "model.safetensors", "label": "rankings.jsonl", "train-rm": "reward.json", "ppo": "model.safetensors"}


def read(source: str) -> str:
    path = Path(source)
    if path.is_dir():
        return "|".join(read(str(file)) for file in sorted(path.iterdir()) if file.name in FILES.values())
    return path.read_text() if path.is_file() else source


def run(context: StageContext) -> StageOutcome:
    name = context.stage.name
    if not is_main():
        misbehave(name, context)
        return StageOutcome()
    checkpoint = context.work / "checkpoint.txt"
    found = checkpoint.read_text() if checkpoint.exists() else "nothing"
    assert not list(context.output.iterdir()), "an attempt begins with an empty output folder"
    with Path(os.environ["FAKE_LOG"]).open("a") as log:
        log.write(f"{name} {found}\n")
    print(f"{name} prints to stdout, where only data belongs")
    (context.output / "half.txt").write_text("half")
    checkpoint.write_text("step 3")
    misbehave(name, context)
    (context.output / "half.txt").unlink()
    inputs = context.inputs.by_name()
    seen = {key: read(given.source) for key, given in inputs.items() if key != "base" or name == "sft"}
    text = f"{name} {context.settings.model_dump_json(exclude={'micro_batch_size'})} {context.recipe.seed} {seen}"
    (context.output / FILES.get(name, "metrics.json")).write_text(f"{name} {hash_of(text)}\n")
    (context.output / "sub").mkdir()
    (context.output / "sub" / "metrics.jsonl").write_text(f"{time.time()}\n")
    metrics, timing = {"score": 0.5, "undefined": float("nan")}, {"time/update": 2.5}
    if name == "train-rm":
        metrics |= {"rm/accuracy": 0.55, "rm/accuracy_low": 0.42, "rm/accuracy_high": 0.68, "rm/prompts": 60.0}
        metrics |= {"rm/calibration_error": 0.2}
    return StageOutcome(metrics, {"too long": 2}, [("score", "0.50")], timing)


def hash_of(text: str) -> str:
    import hashlib

    return hashlib.sha256(text.encode()).hexdigest()[:16]


def misbehave(name: str, context: StageContext) -> None:
    if os.environ.get("FAKE_RANK", "0") not in (str(rank()), "all"):
        return
    if "FAKE_ONCE" in os.environ and os.environ["TORCHELASTIC_RESTART_COUNT"] != "0":
        return
    stage, _, signum = os.environ.get("FAKE_DIE", "").partition(":")
    if stage == name:
        os.kill(os.getpid(), int(signum or signal.SIGKILL))
        time.sleep(0.1)
        context.stop.check()
    if os.environ.get("FAKE_LOAD") == name:
        Path(os.environ["FAKE_LOG"] + ".hanging").touch()
        time.sleep(30)
    if os.environ.get("FAKE_HANG") == name:
        with task(name, 3) as bar:
            bar.advance()
            Path(os.environ["FAKE_LOG"] + f".hanging{rank() or ''}").touch()
            for _ in range(600):
                time.sleep(0.05)
                if not os.environ.get("FAKE_DEAF"):
                    context.stop.check()
    stage, _, kind = os.environ.get("FAKE_RAISE", "").partition(":")
    if stage == name:
        raise_kind(kind)


def raise_kind(kind: str) -> None:
    if kind == "full":
        raise OSError(errno.ENOSPC, "No space left on device")
    if kind == "full-in-library":
        raise RuntimeError("Error while serializing: No space left on device (os error 28)")
    if kind == "memory":
        raise type("OutOfMemoryError", (RuntimeError,), {})("CUDA out of memory")
    if kind == "diverged":
        raise DivergedError("loss was nan in 3 steps in a row")
    if kind == "interrupt":
        raise KeyboardInterrupt
    raise ZeroDivisionError("a bug")


def install() -> None:
    preflight.check_models_of_run = lambda recipe, inputs: None  # the folders hold text in place of models
    preflight.check_with_tokenizer = lambda recipe, inputs, keys: None
    for stage in stages():
        module = types.ModuleType(stage.module)
        module.run = run  # type: ignore[attr-defined]
        sys.modules[module.__name__] = module


if __name__ == "__main__":
    from rlhf_cli.cli import main
    from rlhf_cli.distributed import launcher as launch

    launch.ENTRY = (__file__,)
    install()
    sys.exit(main())
