"""Run as a script by two processes: process 1 makes no pass over its filler, for which process 0 would wait."""

from __future__ import annotations

import sys

import torch

from rlhf_cli.distributed.process_group import ProcessGroup, exit_without_teardown, leave
from rlhf_cli.models.loading import ModelSource
from rlhf_cli.models.sharded_loading import open_policy
from rlhf_cli.models.sharding import computing, equal_passes


@torch.no_grad()
def main(model: str, *, skips: bool) -> None:
    processes, policy = ProcessGroup(), open_policy(ModelSource(model)).read()
    own = [[3, 4], [5, 6]] if processes.is_main else [[7, 8]]
    for ids, weight in equal_passes(policy, own, [3], processes):
        if weight or not skips:
            tokens = torch.tensor([ids])
            computing(policy, lambda tokens=tokens: policy(input_ids=tokens).logits)
    processes.barrier()
    leave()


if __name__ == "__main__":
    try:
        main(sys.argv[1], skips=sys.argv[2] == "skip")
    except RuntimeError as error:  # as the command does: torch's threads may abort while they are torn down
        print(error, file=sys.stderr)
        exit_without_teardown(1)
