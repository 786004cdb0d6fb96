"""Run as a script by each process of a launch: the `rlhf` command with a vLLM server, a stand-in in process 0.

`served_command.py MODEL ARGUMENTS...`: the server has the architecture of MODEL.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from rlhf_cli import cli
from rlhf_cli.distributed.process_group import ProcessGroup
from rlhf_cli.generation import server_generator
from tests.generation import server_stand_in, vllm_stand_in


def main() -> int:
    patch, processes = pytest.MonkeyPatch(), ProcessGroup()
    vllm_stand_in.install(patch)
    server_stand_in.install_client(patch)
    patch.setattr(server_generator, "obstacle", lambda policies: None)  # the device is a CPU
    server = server_stand_in.StandIn(Path(sys.argv[1])) if processes.is_main else None
    url = processes.all_gather_object(None if server is None else server.url)[0]
    sys.argv = ["rlhf", *sys.argv[2:], "--set", f"generation.vllm_server={url}"]
    return cli.main()


if __name__ == "__main__":
    sys.exit(main())
