"""A process with fake GPUs and all libraries imported, which forks one child for every request on stdin.

    host.py LIBRARY DEVICES

The package of this checkout is imported once, too; a request that names another one imports that. A request is an
object: `package`, the folder that holds the rlhf_cli to run; `folder`, the working directory; `answer`, the file that
the child writes its answer to; and `arguments` of the command, or `call`, a function `module:name`, with `named`. The
child sends itself SIGTERM once the path `stop_after` exists, if that is given. The host reads lists of requests (JSON,
a line each), which as many children answer at once, and replies with their statuses.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import signal
import sys
import threading
import time
import traceback
from pathlib import Path
from typing import Any

from tests.gpu import guard
from tests.preloaded import preload

ROOT = Path(__file__).resolve().parents[2]
LIBRARIES = ("numpy", "transformers", "peft", "accelerate", "safetensors.torch", "triton", "tokenizers", "datasets",
             "transformers.models.llama.modeling_llama", "transformers.models.t5.modeling_t5", "typer",
             "pydantic", "rich.table", "ruamel.yaml", "matplotlib.backends.backend_agg")  # fmt: skip
TIMEOUT = 570.0


def main() -> None:
    """Answer requests until stdin is closed."""
    loaded = guard.load(Path(sys.argv[1]))
    import torch

    from tests.gpu import library

    torch.set_num_threads(1)
    library.install(loaded, int(sys.argv[2]))
    for name in LIBRARIES:
        importlib.import_module(name)
    preload()
    gc.collect()
    gc.freeze()  # stages collect garbage, which is slow with the objects of all libraries
    replies = os.fdopen(os.dup(1), "w")
    print("ready", file=replies, flush=True)
    for line in sys.stdin:
        children = []
        for request in json.loads(line):
            if (child := os.fork()) == 0:
                os._exit(_serve(request))
            children.append(child)
        print(*map(_wait, children), file=replies, flush=True)


def _wait(child: int) -> int:
    end = time.monotonic() + TIMEOUT
    while time.monotonic() < end:
        found, status = os.waitpid(child, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.02)
    os.kill(child, 9)
    os.waitpid(child, 0)
    return -9


def _serve(request: dict[str, Any]) -> int:
    """Run a request in this process, which is the child's; returns 0 once its answer is written."""
    folder = Path(request["folder"])
    os.chdir(folder)
    for number, name in ((1, "stdout"), (2, "stderr")):
        stream = folder / (name + request.get("suffix", ""))
        os.dup2(os.open(stream, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), number)
    os.environ.update(request.get("environment", {}))
    if Path(request["package"]) != ROOT:
        for name in [name for name in sys.modules if name.partition(".")[0] == "rlhf_cli"]:
            del sys.modules[name]
    sys.path.insert(0, request["package"])
    answer: dict[str, Any] = {"code": 0, "result": None, "raised": ""}
    try:
        import tests.gpu.kernels as kernels
        from tests.gpu.device import ledger

        kernels.install()
        ledger.follow = bool(request.get("follow"))
        if "call" in request:
            module, name = request["call"].split(":")
            answer["result"] = getattr(importlib.import_module(module), name)(**request["named"])
        else:
            if request.get("stop_after"):
                threading.Thread(target=_stop_after, args=(Path(request["stop_after"]),), daemon=True).start()
            from rlhf_cli.cli import main as command
            from rlhf_cli.distributed import process_group
            from rlhf_cli.stages.reward_model import quality
            from rlhf_cli.training.monitoring import plots

            # A second per picture, in which no GPU takes part.
            plots.draw_curves = quality.draw_quality = lambda *_, **__: False
            sys.argv = ["rlhf", *request["arguments"]]
            process_group.exit_without_teardown = sys.exit  # of a rank; its answer is not written yet
            try:
                answer["code"] = command()
            except SystemExit as end:
                answer["code"] = end.code
        events = [[*event, count] for event, count in ledger.events.items()]
        answer |= {"events": events, "peak": dict(ledger.peak), "largest": ledger.largest}
    except BaseException:
        answer |= {"code": 99, "raised": traceback.format_exc()}
    sys.stdout.flush()
    sys.stderr.flush()
    Path(request["answer"]).write_text(json.dumps(answer), encoding="utf-8")
    return 0


def _stop_after(path: Path) -> None:
    while not path.exists():
        time.sleep(0.01)
    os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    main()
