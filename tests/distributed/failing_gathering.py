"""Run as a script by two processes: one fails while it gathers weights, for which the other would wait.

`failing_gathering.py MODEL PLACE RANK HOW`. PLACE is where weights are gathered: for an engine, or a checkpoint. RANK
fails at the third one, or with HOW `early` its engine reads one alone.
"""

from __future__ import annotations

import sys
import tempfile
import traceback
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from rlhf_cli.distributed.process_group import ProcessGroup, exit_without_teardown, leave
from rlhf_cli.generation import vllm_generator
from rlhf_cli.generation.policy import Policy
from rlhf_cli.generation.sampling import Sampling
from rlhf_cli.models import gathering, merged_weights
from rlhf_cli.models.loading import ModelSource
from rlhf_cli.models.sharded_loading import open_policy
from rlhf_cli.models.sharding import whole
from rlhf_cli.settings.shared import GenerationSettings
from rlhf_cli.training.checkpoint.store import save_checkpoint
from tests.generation import vllm_stand_in


def fail_in(patch: pytest.MonkeyPatch, module: ModuleType) -> None:
    """Let gathering fail at the third tensor."""
    calls = list[Tensor]()

    def failing(tensor: Tensor) -> Tensor:
        calls.append(tensor)
        if len(calls) == 3:
            raise torch.OutOfMemoryError("CUDA out of memory while gathering")
        return whole(tensor)

    patch.setattr(module, "whole", failing)


def hand_over(patch: pytest.MonkeyPatch, source: ModelSource, model: PreTrainedModel, *, reads_one: bool) -> None:
    """Let an engine take the weights."""

    def take(engine: object, weights_iterator: Iterator[tuple[str, Tensor]]) -> None:
        for _ in weights_iterator:
            if reads_one:
                return

    vllm_stand_in.install(patch)
    patch.setattr(vllm_stand_in.LLM, "reload_weights", take)
    patch.setattr(vllm_generator, "check_probabilities", lambda *given: None)
    policy = Policy.load(source, Sampling(max_new_tokens=4), weights=lambda: nullcontext(model))
    vllm_generator.VLLMGenerator(GenerationSettings(), longest_prompt=8).start(policy)


def main(path: str, place: str, rank: str, how: str) -> None:
    torch.set_num_threads(1)
    processes, source, patch = ProcessGroup(), ModelSource(path), pytest.MonkeyPatch()
    model = open_policy(source).read()
    is_it = processes.index == int(rank)
    if is_it and how == "fails":
        fail_in(patch, merged_weights if place == "engine" else gathering)
    if place == "engine":
        hand_over(patch, source, model, reads_one=is_it and how == "early")
    else:
        with tempfile.TemporaryDirectory() as folder:
            save_checkpoint(Path(folder), 1, dict(model.named_parameters()), {}, processes=processes)
    processes.barrier()
    leave()


if __name__ == "__main__":
    try:
        main(*sys.argv[1:])
    except Exception:
        traceback.print_exc()
        exit_without_teardown(1)  # as the command does
