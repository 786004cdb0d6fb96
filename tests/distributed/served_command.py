"""Run as a script by each process of a launch: the `rlhf` command with stand-ins for vLLM.

`served_command.py MODEL ARGUMENTS...`: a server in process 0, which has the architecture of MODEL; with `-` in place of
MODEL each process has an engine.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from rlhf_cli import cli
from rlhf_cli.distributed.process_group import ProcessGroup
from rlhf_cli.generation import server_obstacle, vllm_generator
from tests.generation import server_stand_in, vllm_stand_in


def main() -> int:
    patch, processes = pytest.MonkeyPatch(), ProcessGroup()
    vllm_stand_in.install(patch)
    server_stand_in.install_client(patch)
    for module in (server_obstacle, vllm_generator):
        patch.setattr(module, "obstacle", lambda policies: None)  # the device is a CPU
    model, setting = sys.argv[1], "generation.engine=vllm"
    if model != "-":
        server = server_stand_in.StandIn(Path(model)) if processes.is_main else None
        url = processes.all_gather_object(None if server is None else server.url)[0]
        setting = f"generation.vllm_server={url}"
    sys.argv = ["rlhf", *sys.argv[2:], "--set", setting]
    return cli.main()


if __name__ == "__main__":
    sys.exit(main())
