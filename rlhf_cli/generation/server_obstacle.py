"""Why a vLLM server cannot be used; imports neither TRL nor what its client needs."""

from __future__ import annotations

import importlib.metadata
import importlib.util
from collections.abc import Sequence

from rlhf_cli.distributed.process_group import ProcessGroup
from rlhf_cli.generation.policy import Policy
from rlhf_cli.generation.vllm_generator import Obstacle, obstacle

CLIENT = "1.16"
"""The series of TRL whose client `vllm_server` knows."""


def server_obstacle(policies: Sequence[Policy]) -> Obstacle | None:
    """Return why a vLLM server cannot draw the completions of a stage's policies; None if it can, as far as is known
    without it and without their weights."""
    version, fix = client_version(), f"install it with `pip install 'trl=={CLIENT}.*' requests`"
    if version is None:
        return Obstacle("trl, whose client of vllm's server is used, is not installed", fix)
    if not version.startswith(f"{CLIENT}."):
        return Obstacle(f"trl {version} is installed, and only {CLIENT} is supported", fix)
    if importlib.util.find_spec("requests") is None:
        return Obstacle("requests, which trl's client of vllm's server uses, is not installed", fix)
    is_alone = ProcessGroup(policies[0].source.device).count == 1
    if len(policies) > 1 and not is_alone and not policies[0].is_sharded:
        return Obstacle(
            "several models take turns on the server, which works with one process or `model.sharding: fsdp` only",
            "run this stage with `--processes 1` or `--set model.sharding=fsdp`, or without `generation.vllm_server`",
        )
    return obstacle(policies)


def client_version() -> str | None:
    """Return the version of TRL that is installed; None if none is."""
    try:
        return importlib.metadata.version("trl")
    except importlib.metadata.PackageNotFoundError:
        return None
