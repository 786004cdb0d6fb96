"""Run as a script by several processes: `groups.py FOLDER SIZE` uses collectives of groups of SIZE processes.

What was found is written to `FOLDER/SIZE-RANK.json`.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
import torch.distributed as distributed

from rlhf_cli.distributed.process_group import ProcessGroup, leave


def main(folder: str, size: str) -> None:
    make, made = distributed.new_subgroups, []
    distributed.new_subgroups = lambda *given, **named: made.append(given) or make(*given, **named)
    everyone, group = ProcessGroup(), ProcessGroup(size=int(size))
    total = torch.tensor([2.0**everyone.index])
    group.all_reduce([total])
    found = {
        "place": [group.index, group.count],
        "gathered": group.all_gather_object("x" * everyone.index),
        "sum": total.item(),
        "mapped": group.map([*range(5)], lambda own: [10 * everyone.index + one for one in own]),
        "again": ProcessGroup(size=int(size)).all_gather_object(everyone.index),
        "made": len(made),
        "everyone": everyone.all_gather_object(everyone.index),
    }
    (Path(folder) / f"{size}-{everyone.index}.json").write_text(json.dumps(found))
    leave()


if __name__ == "__main__":
    main(*sys.argv[1:])
