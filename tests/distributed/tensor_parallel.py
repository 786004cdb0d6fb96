"""Run as a script by several processes, some of which share a vLLM engine (a stand-in).

`tensor_parallel.py FOLDER SIZE CASE`: groups of SIZE processes draw from the model `FOLDER/llama`. What was found is
written to `FOLDER/CASE-RANK.json`.
"""

from __future__ import annotations

import json
import sys
import traceback
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch

from rlhf_cli.distributed.agreement import agreed
from rlhf_cli.distributed.process_group import ProcessGroup, exit_without_teardown, leave
from rlhf_cli.errors import Interrupted, ModelError, SharedEngineError
from rlhf_cli.generation import vllm_generator
from rlhf_cli.generation.generator import Completion, Request
from rlhf_cli.generation.policy import Policy
from rlhf_cli.generation.sampling import Sampling
from rlhf_cli.labeling.completions import CompletionFile
from rlhf_cli.models.loading import ModelSource, load_policy
from rlhf_cli.settings.shared import GenerationSettings
from tests.generation.vllm_stand_in import LLM, install

REQUESTS = [Request([5 + row % 7, *range(3, 3 + row % 5)], seed) for row, seed in enumerate(range(100, 147))]
"""An odd number: more than an engine's steps between two questions whether to stop."""


def policy_at(folder: Path) -> Policy:
    source = ModelSource(str(folder / "llama"))
    model = load_policy(source)
    return Policy.load(source, Sampling(max_new_tokens=6), weights=lambda: nullcontext(model))


def generator(size: int) -> vllm_generator.VLLMGenerator:
    return vllm_generator.VLLMGenerator(GenerationSettings(engine="vllm", tensor_parallel_size=size), longest_prompt=16)


def plain(drawn: list[Completion]) -> list[Any]:
    return [[one.ids, one.logprobs, one.finished] for one in drawn]


def shares(count: int) -> list[list[Request]]:
    """Of each process another number, and none of the last one."""
    ends = [len(REQUESTS) * (index + 1) * (index + 2) // (count * (count - 1)) for index in range(count - 1)]
    return [REQUESTS[first:last] for first, last in zip([0, *ends], [*ends, ends[-1]], strict=True)]


def in_all(draw: Callable[[], list[Completion]], processes: ProcessGroup) -> None:
    """Draw as PPO does: all processes agree on an error."""

    def work() -> None:
        draw()

    agreed(work, processes)


def draws(folder: Path, size: int, patch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Each process draws its requests, then one alone draws some, then those of uneven chunks are kept on disk."""
    processes, policy = ProcessGroup(), policy_at(folder)
    generating = generator(size)
    generating.start(policy)
    told: list[int] = []
    own = shares(processes.count)[processes.index]
    drawn = generating.generate(policy, own, progress=told.append)
    alone = generating.generate(policy, REQUESTS[:2] if processes.index == 0 else [])
    chunks = [[0, 1], [2], [3, 4], [5], [6]]
    file = CompletionFile(folder / "samples.jsonl", chunks, 1, processes)
    file.fill(lambda rows: generating.generate(policy, [REQUESTS[row] for row in rows]))
    nothing = generating.generate(policy, [])
    (engine,) = LLM.made
    return {
        "drawn": plain(drawn), "alone": plain(alone), "kept": [one.ids for (one,) in file.read()],
        "nothing": nothing, "told": [min(told, default=0), sum(told)], "own": len(own),
        "seeds": sorted({one.seed for one in engine.parameters}), "size": engine.arguments["tensor_parallel_size"],
    }  # fmt: skip


def stops(folder: Path, size: int, patch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A signal reaches the last process alone, once it draws."""
    processes, policy = ProcessGroup(), policy_at(folder)
    generating = generator(size)
    asked = 0

    def stop() -> None:
        nonlocal asked
        asked += 1
        if asked > 1 and processes.index == processes.count - 1:
            raise Interrupted(15)

    with pytest.raises(Interrupted) as caught:
        generating.generate(policy, REQUESTS[: 20 if processes.index == 0 else 2], stop=stop)
    (engine,) = LLM.made
    again = generating.generate(policy, REQUESTS[:2])
    return {"signum": caught.value.signum, "asked": asked, "aborted": len(engine.aborted), "again": plain(again)}


def stops_between(folder: Path, size: int, patch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A signal reaches the last process alone, once its first chunk is on disk."""
    processes, policy = ProcessGroup(), policy_at(folder)
    generating = generator(size)
    generating.start(policy)
    kept: list[object] = []

    def stop() -> None:
        if kept and processes.index == processes.count - 1:
            raise Interrupted(15)

    file = CompletionFile(folder / "stopped.jsonl", [[0], [1], [2], [3]], 1, processes)
    with pytest.raises(Interrupted) as caught:
        file.fill(lambda rows: generating.generate(policy, [REQUESTS[row] for row in rows], stop=stop), kept.append)
    (engine,) = LLM.made
    return {"signum": caught.value.signum, "kept": len(kept), "aborted": len(engine.aborted)}


def refuses(folder: Path, size: int, patch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The last process fails while its engine takes weights, which is no message: both say so."""
    processes, policy = ProcessGroup(), policy_at(folder)
    generating, take = generator(size), LLM.reload_weights

    def failing(engine: LLM, **given: Any) -> None:
        take(engine, **given)
        if processes.index == processes.count - 1:
            raise RuntimeError("no memory for more")

    patch.setattr(LLM, "reload_weights", failing)
    with pytest.raises(ModelError) as caught:
        generating.start(policy)
    return {"said": caught.value.message}


def fails(folder: Path, patch: pytest.MonkeyPatch, *, start: bool) -> None:
    """The last process fails while the others wait for it, where all would agree on an error."""
    processes, policy = ProcessGroup(), policy_at(folder)
    generating, is_it = generator(processes.count), processes.index == processes.count - 1

    def failing(*given: object, **named: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")

    if is_it and start:
        patch.setattr(LLM, "__init__", failing)
    agreed(lambda: generating.start(policy), processes)
    if is_it:
        patch.setattr(LLM, "before_step", staticmethod(failing))
    in_all(lambda: generating.generate(policy, REQUESTS), processes)


def step_fails(folder: Path, size: int, patch: pytest.MonkeyPatch) -> dict[str, Any]:
    fails(folder, patch, start=False)
    return {}


def start_fails(folder: Path, size: int, patch: pytest.MonkeyPatch) -> dict[str, Any]:
    fails(folder, patch, start=True)
    return {}


def differs(folder: Path, size: int, patch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The last process draws other tokens than the others."""
    differing(folder, size, patch, "off_by", 30.0, REQUESTS[:2])
    return {}


def differs_in_steps(folder: Path, size: int, patch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The scheduler of the last process takes 32 steps, those of the others 10."""
    differing(folder, size, patch, "further_steps", 22, REQUESTS[:10])
    return {}


def differs_early(folder: Path, size: int, patch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The last process draws other tokens than the others, of many completions."""
    with pytest.raises(SharedEngineError):
        differing(folder, size, patch, "off_by", 30.0, REQUESTS)
    (engine,) = LLM.made
    return {"aborted": len(engine.aborted)}


def differing(
    folder: Path, size: int, patch: pytest.MonkeyPatch, name: str, value: float, requests: list[Request]
) -> None:
    """Each process draws these requests; the engine of the last one has another value of an attribute."""
    processes = ProcessGroup()
    generating, policy = generator(size), policy_at(folder)
    generating.start(policy)
    if processes.index == processes.count - 1:
        patch.setattr(LLM, name, value)
    in_all(lambda: generating.generate(policy, requests if processes.is_main else []), processes)


CASES: dict[str, Callable[[Path, int, pytest.MonkeyPatch], dict[str, Any]]] = {
    "draws": draws,
    "stops": stops,
    "stops-between": stops_between,
    "refuses": refuses,
    "step-fails": step_fails,
    "start-fails": start_fails,
    "differs": differs,
    "differs-in-steps": differs_in_steps,
    "differs-early": differs_early,
}


def main(place: str, size: str, case: str) -> None:
    torch.set_num_threads(1)
    patch, folder = pytest.MonkeyPatch(), Path(place)
    install(patch)
    found = CASES[case](folder, int(size), patch)
    (folder / f"{case}-{ProcessGroup().index}.json").write_text(json.dumps(found))
    leave()


if __name__ == "__main__":
    try:
        main(*sys.argv[1:])
    except Exception:
        traceback.print_exc()
        exit_without_teardown(1)  # as the command does
