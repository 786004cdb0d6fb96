"""Batch sizes that the scripts of `rlhf export` compute, against the rules of verl 0.9.1 and OpenRLHF 0.11.2."""

from __future__ import annotations

import itertools
import subprocess

import pytest

from rlhf_cli.export import openrlhf, verl
from rlhf_cli.export.batch_sizes import BatchSizes
from rlhf_cli.export.engine_run import read_run

SHAPES = [(64, 1, 2, 64), (8, 1, 2, 8), (8, 2, 4, 8), (7, 3, 2, 5), (12, 1, 5, 8), (6, 4, 24, 3), (1, 1, 1, 8)]
"""Prompts per step, completions per prompt, minibatches, micro-batch."""


def computed(sizes: BatchSizes, gpus: int | str | None, nodes: int | str = 1) -> tuple[int, list[int], str]:
    """Return the status, GPUs, minibatch and micro-batch, and the messages of the script's arithmetic."""
    script = "\n".join(["set -euo pipefail", *sizes.lines(), 'echo "$TOTAL $MINIBATCH $MICRO_BATCH"'])
    environment = {"NODES": str(nodes)} | ({} if gpus is None else {"GPUS": str(gpus)})
    done = subprocess.run(["bash", "-c", script], env=environment, capture_output=True, text=True, check=False)
    return done.returncode, [int(word) for word in done.stdout.split()], done.stderr


def of(engine: str, prompts: int, samples: int, minibatches: int, micro: int) -> BatchSizes:
    if engine == "verl":
        return BatchSizes(prompts, max(1, prompts // minibatches), samples, micro)
    return BatchSizes(prompts * samples, prompts * samples // minibatches, 1, micro)


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["verl", "openrlhf"])
@pytest.mark.parametrize("shape", SHAPES)
def test_sizes_are_those_that_the_engine_accepts(engine, shape):
    sizes = of(engine, *shape)
    completions = shape[0] * shape[1]
    for gpus, nodes in [*itertools.product((1, 2, 3, 4, 8), (1, 2)), (None, 1)]:
        status, found, messages = computed(sizes, gpus, nodes)
        if gpus is not None and completions % (gpus * nodes):
            assert (status, "cannot be divided" in messages) == (2, True)
            continue
        assert status == 0, messages
        total, minibatch, micro = found
        assert (minibatch, micro) == sizes.fitted(total)
        assert minibatch >= sizes.minibatch
        assert 1 <= micro <= shape[3]
        assert sizes.step % minibatch == 0
        assert minibatch * sizes.unit % (total * micro) == 0
        changed = (minibatch, micro) != (sizes.minibatch, sizes.micro_batch)
        assert ("do not divide evenly" in messages) == changed
        if gpus is None:
            assert bool(sizes.report()) == changed


@pytest.mark.slow
@pytest.mark.parametrize(("gpus", "nodes"), [("0", 1), ("abc", 1), ("-2", 1), ("2.5", 1), (4, "0"), (4, "two")])
def test_a_number_of_gpus_or_nodes_that_is_none_is_refused(gpus, nodes):
    status, found, messages = computed(BatchSizes(64, 32, 1, 64), gpus, nodes)
    assert (status, found) == (2, [])
    assert messages == f"train.sh: GPUS and NODES must be whole numbers from 1, got {gpus} and {nodes}\n"


@pytest.mark.slow
def test_sizes_of_the_recipe_are_kept_where_they_fit():
    assert computed(BatchSizes(64, 32, 1, 8), 4)[1] == [4, 32, 8]
    assert computed(BatchSizes(64, 32, 1, 64), 8)[1] == [8, 32, 4]
    assert computed(BatchSizes(8, 4, 1, 8), None)[1] == [4, 4, 1]
    assert computed(BatchSizes(8, 4, 1, 8), 8)[1] == [8, 8, 1]


@pytest.mark.parametrize("engine", [verl, openrlhf])
def test_the_sizes_come_from_the_recipe(made_run, engine):
    sizes = engine.batch_sizes(read_run(made_run))
    assert sizes == (BatchSizes(8, 2, 2, 8) if engine is verl else BatchSizes(16, 4, 1, 8))
    assert {"$MINIBATCH", "$MICRO_BATCH"} <= {
        value for value in engine.options(read_run(made_run), "policy").values() if isinstance(value, str)
    }
