"""What a checkpoint costs the training: written while it waits, and in the background (`checkpoint_async`).

    python benchmarks/background_saving.py MODEL [--steps 12] [--every 3] [--tokens 64] [--rows 2] [--rounds 3]

Full fine-tuning in float32 on random tokens, on the CPU: 12 bytes per weight and checkpoint. Each run is a process of
its own, the two forms in turn, and the files of their checkpoints are compared. Printed are, for each form, the median
over the rounds of: seconds of all steps, seconds in which the training waited for checkpoints (`time/checkpoint`), CPU
seconds of the process, and its largest resident memory. Exits with 1 if a byte differs.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))


def main() -> int:
    """Run both forms in turn, and print what they took."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--every", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rows", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--run", choices=("waits", "background"), help=argparse.SUPPRESS)
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.run is not None:
        print(json.dumps(measured(given)))
        return 0
    found: dict[str, list[dict[str, float]]] = {"waits": [], "background": []}
    digests = set()
    for number in range(given.rounds):
        for form in found if number % 2 == 0 else reversed(found):
            with tempfile.TemporaryDirectory(prefix="saving-") as work:
                command = [sys.executable, __file__, *sys.argv[1:], "--run", form, "--work", work]
                row = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout.splitlines()[-1])
            digests.add(row.pop("digest"))
            found[form].append(row)
            print(form, row, flush=True)
    for form, rows in found.items():
        print(form, {name: round(statistics.median(row[name] for row in rows), 2) for name in rows[0]})
    print("equal bytes" if len(digests) == 1 else "THE BYTES DIFFER")
    return int(len(digests) != 1)


def measured(given: argparse.Namespace) -> dict[str, float | str]:
    """Train once in this process."""
    import torch

    from rlhf_cli.data.examples import Example
    from rlhf_cli.distributed.signals import SignalStop
    from rlhf_cli.files import hash_folder
    from rlhf_cli.models.loading import ModelSource, load_policy
    from rlhf_cli.stages.sft.settings import SFTSettings
    from rlhf_cli.stages.sft.training import train_sft
    from rlhf_cli.training.monitoring.metrics_log import read_rows

    torch.set_num_threads(given.threads)
    model = load_policy(ModelSource(given.model))
    numbers = torch.Generator().manual_seed(0)
    examples = [
        Example(ids[:8], ids[8:])
        for ids in torch.randint(3, 1_000, (given.steps * given.rows, given.tokens), generator=numbers).tolist()
    ]
    settings = SFTSettings(
        data="random",
        adapter="none",
        epochs=1,
        batch_size=given.rows,
        micro_batch_size=given.rows,
        checkpoint_steps=given.every,
    )
    began, cpu = time.perf_counter(), time.process_time()
    train_sft(
        model, examples, [], settings, seed=0, work=given.work, stop=SignalStop(),
        checkpoint_async=given.run == "background",
    )  # fmt: skip
    seconds, cpu = time.perf_counter() - began, time.process_time() - cpu
    waited = sum(row.get("time/checkpoint", 0.0) for row in read_rows(given.work / "timing.jsonl"))
    newest = sorted(given.work.glob("step-*"))
    return {
        "seconds": seconds,
        "waited": waited,
        "cpu": cpu,
        "peak_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6,
        "digest": " ".join(hash_folder(folder) for folder in newest),
    }


if __name__ == "__main__":
    sys.exit(main())
