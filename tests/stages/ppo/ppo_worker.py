"""One process of a PPO run on a tiny model: `ppo_worker.py MODEL WORK CHANGES VARIABLES`.

Changes of settings, and the environment variables that a launcher would set, are JSON.
"""

import importlib.util
import json
import os
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

from rlhf_cli.distributed.process_group import ProcessGroup, exit_without_teardown, leave
from rlhf_cli.errors import Interrupted, RLHFError
from rlhf_cli.stages.ppo.ptx import Demonstrations


class Signaled:
    """A signal that has come once `steps` were done."""

    def __init__(self, steps):
        self.left = steps

    def check(self):
        self.left -= 1
        if self.left <= 0:
            raise Interrupted(15)


def main() -> int:
    torch.set_num_threads(1)
    os.environ.update(json.loads(sys.argv[4]))
    spec = importlib.util.spec_from_file_location("ppo_conftest", Path(__file__).with_name("conftest.py"))
    fixtures = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(fixtures)
    model, work, changes = sys.argv[1], Path(sys.argv[2]), json.loads(sys.argv[3])
    if changes.pop("with_ptx", False):
        changes["demonstrations"] = Demonstrations.of([([5, 6, 7], [8, 9, 0]), ([], [10, 11, 0]), ([12], [13, 0])])
    processes = ProcessGroup(torch.device("cpu"))
    steps = changes.pop("stop_process_1_after", None)
    stop = Signaled(steps) if steps and processes.index == 1 else fixtures.StopAfter()
    trainer = fixtures.make_trainer(model, work, processes=processes, stop=stop, **changes)
    try:
        trainer.train()
    except RLHFError as error:
        print(f"process {processes.index}: {type(error).__name__}: {error}", file=sys.stderr)
        exit_without_teardown(error.exit_code)  # as the command does
    state = {name: tensor.detach().contiguous().clone() for name, tensor in trainer.models.state().items()}
    save_file(state, work / f"end-{processes.index}.safetensors")
    return 0


if __name__ == "__main__":
    code = main()
    leave()  # as the command does
    sys.exit(code)
