"""How often the host waits for the device: once per decoded token, twice per micro-batch.

Two runs that differ in the number of tokens or micro-batches alone are subtracted, so that what happens once per run,
step or checkpoint does not count.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from tests.gpu.inputs import options, write_inputs
from tests.gpu.ledger import Event
from tests.gpu.running import Host, Outcome

SYNCS_PER_TOKEN = 1
UPLOADS_PER_TOKEN = 1
SYNCS_PER_MICRO_BATCH = 2


def growth(kind: str, few: Outcome, many: Outcome) -> Counter[Event]:
    """Return the events of a kind that `many` has more of."""
    difference = many.events.copy()
    difference.subtract(few.events)
    return Counter({event: count for event, count in difference.items() if event.kind == kind and count})


def check(kind: str, few: Outcome, many: Outcome, *, units: int, each: int, unit: str) -> None:
    """Fail with the offending lines where `units` more units cost over `each` events per unit."""
    found = growth(kind, few, many)
    total = sum(found.values())
    assert units > 0
    assert total <= units * each, (
        f"{total} of kind {kind} for {units} {unit}: {total / units:.1f} each, and {each} is allowed\n"
        + many.described(found)
    )


def decoded(
    gpu: Host, folder: Path, model: Path, *, tokens: int, rows: int = 3, ends: int = 0, **request: Any
) -> Outcome:
    """Draw `rows` completions; see `scenarios.decode`."""
    named = {"model": str(model), "rows": rows, "tokens": tokens, "ends": ends}
    return gpu.call(folder, "tests.gpu.scenarios:decode", named=named, **request)


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize(("kind", "each"), [("sync", SYNCS_PER_TOKEN), ("upload", UPLOADS_PER_TOKEN)])
def test_decoding_a_token(kind: str, each: int, rows: int, gpu: Host, tiny_llama: Path, tmp_path: Path):
    few, many = (decoded(gpu, tmp_path, tiny_llama, tokens=tokens, rows=rows) for tokens in (4, 12))
    assert many.result == [12] * rows
    check(kind, few, many, units=8, each=each, unit="tokens")


def test_rows_that_end_cost_nothing_more(gpu: Host, tiny_llama: Path, tmp_path: Path):
    few = decoded(gpu, tmp_path, tiny_llama, tokens=1, rows=6)
    many = decoded(gpu, tmp_path, tiny_llama, tokens=24, rows=6, ends=32)
    assert len(set(many.result)) > 2
    check("sync", few, many, units=max(many.result) - 1, each=SYNCS_PER_TOKEN, unit="tokens")


def micro_batches(outcome: Outcome) -> int:
    """Number of micro-batches that a stage trained on: as often its busiest line started a backward pass."""
    return max(count for event, count in outcome.events.items() if event.kind == "backward")


COMMANDS = {
    "sft": ("sft.micro_batch_size", ("--data", "demonstrations.jsonl"), 1),
    "train-rm": ("train_rm.micro_batch_size", ("--data", "rankings.jsonl"), 1),
    # Rollout passes and update: as many micro-batches each.
    "ppo": ("ppo.micro_batch_size", ("--prompts", "prompts.jsonl", "--function", "gold.py:score"), 2),
}


@pytest.mark.parametrize("adapter", ["lora", "none"])
@pytest.mark.parametrize("stage", COMMANDS)
def test_training_on_a_micro_batch(stage: str, adapter: str, gpu: Host, tiny_llama: Path, tmp_path: Path):
    setting, data, passes = COMMANDS[stage]
    section = stage.replace("-", "_")
    found = []
    for size in (4, 1):
        folder = write_inputs(tmp_path / str(size))
        changes = {setting: size, f"{section}.adapter": adapter}
        if stage == "ppo":
            changes["ppo.steps"] = 1
        outcome = gpu.command(folder, stage, "--model", tiny_llama, *data, *options(stage, changes))
        found.append(outcome)
    few, many = found
    units = passes * (micro_batches(many) - micro_batches(few))
    check("sync", few, many, units=units, each=SYNCS_PER_MICRO_BATCH, unit="micro-batches")
