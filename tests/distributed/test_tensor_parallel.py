"""Processes that share a vLLM engine (`generation.tensor_parallel_size`) draw what one process draws, or all end."""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.sharded_models import make_model
from tests.distributed.tensor_parallel import REQUESTS, generator, plain, policy_at, shares
from tests.distributed.test_sharding import started_by_rank
from tests.distributed.test_sharding_options import launch
from tests.generation.vllm_stand_in import vllm

__all__ = ["vllm"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("models")
    make_model("llama", place / "llama")
    return place


def ended(folder: Path, count: int, size: int, case: str) -> list[tuple[int, str]]:
    """Exit status and output of each process, the last one first: where one fails, it is that one."""
    started = started_by_rank("tensor_parallel.py", [folder, size, case], count)
    try:
        outputs = [process.communicate(timeout=600) for process in reversed(started)]
    finally:
        for process in started:
            if process.poll() is None:
                process.send_signal(signal.SIGKILL)
    return [(process.returncode, "".join(said)) for process, said in zip(reversed(started), outputs, strict=True)]


def run(folder: Path, count: int, size: int, case: str) -> list[dict[str, Any]]:
    """Run a case in several processes; returns what each of them found."""
    for status, said in ended(folder, count, size, case):
        assert status == 0, said
    return [json.loads((folder / f"{case}-{rank}.json").read_text()) for rank in range(count)]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("count", "size"),
    [
        pytest.param(2, 2, id="one engine of two"),
        pytest.param(4, 2, id="two engines of two"),
        pytest.param(4, 4, id="one engine of four"),
    ],
)
def test_completions_do_not_depend_on_how_many_processes_share_an_engine(
    count: int, size: int, folder: Path, vllm, tmp_path: Path
):
    """Each process has another number of requests, chunks are uneven, and some have nothing to draw."""
    (tmp_path / "llama").symlink_to(folder / "llama")
    found = run(tmp_path, count, size, "draws")
    expected = plain(generator(1).generate(policy_at(folder), REQUESTS))
    own = shares(count)
    assert len({len(one) for one in own}) == count
    assert not own[-1]
    for ours, theirs in zip([row for one in found for row in one["drawn"]], expected, strict=True):
        assert ours[0] == theirs[0]
        assert ours[1] == pytest.approx(theirs[1], abs=1e-5)
        assert ours[2] == theirs[2]
    assert [row[0] for row in found[0]["alone"]] == [row[0] for row in expected[:2]]
    assert not any(one["alone"] for one in found[1:])
    for index, one in enumerate(found):
        assert one["size"] == size
        assert one["kept"] == [row[0] for row in expected[:7]]
        assert one["nothing"] == []
        least, total = one["told"]
        assert least >= 0, "progress never goes back"
        assert total == one["own"] == len(own[index])
        group = range(index - index % size, index - index % size + size)
        drawn = {request.seed for member in group for request in own[member]}
        assert drawn <= set(one["seeds"]), "an engine draws what all of its processes want"


@pytest.mark.slow
def test_a_signal_in_one_process_stops_all_of_an_engine_at_the_same_step(folder: Path):
    found = run(folder, 2, 2, "stops")
    assert [one["signum"] for one in found] == [15, 15]
    assert [one["asked"] for one in found] == [2, 2], "before the first step and after 16"
    assert [one["aborted"] for one in found] == [22, 22]
    assert found[0]["again"] == found[1]["again"], "they can draw again"


@pytest.mark.slow
def test_a_signal_between_two_chunks_stops_all_of_an_engine(folder: Path):
    assert run(folder, 2, 2, "stops-between") == 2 * [{"signum": 15, "kept": 1, "aborted": 0}]


@pytest.mark.slow
def test_an_engine_that_fails_to_take_weights_is_an_error_in_all_of_its_processes(folder: Path):
    found = run(folder, 2, 2, "refuses")
    assert found[0] == found[1]
    assert "vllm failed while taking the policy's weights: RuntimeError: no memory for more" in found[0]["said"]


@pytest.mark.slow
@pytest.mark.parametrize(("case", "what"), [("step-fails", "sampling"), ("start-fails", "starting")])
def test_a_process_that_fails_while_others_wait_for_it_ends_with_its_message(case: str, what: str, folder: Path):
    """An error that all agree on would wait for them, and they for it. Without a launcher they end as they lose it."""
    (status, said), (other, _) = ended(folder, 2, 2, case)
    assert status == 1
    assert f"SharedEngineError: vllm failed while {what}: OutOfMemoryError: CUDA out of memory" in said
    assert other != 0


@pytest.mark.slow
@pytest.mark.parametrize("case", ["differs", "differs-in-steps"])
def test_processes_of_an_engine_that_draw_different_tokens_all_end(case: str, folder: Path):
    """Also where their schedulers took different numbers of steps, so that one asks whether to stop as another ends."""
    for status, said in ended(folder, 2, 2, case):
        assert status == 1
        assert "SharedEngineError: the 2 processes that share an engine drew different tokens" in said


@pytest.mark.slow
def test_a_difference_ends_an_engine_before_all_is_drawn(folder: Path):
    assert [one["aborted"] for one in run(folder, 2, 2, "differs-early")] == [47, 47]


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["evaluate", "best-of-n"])
def test_a_stage_that_only_draws_writes_what_one_process_writes(
    stage: str, rlhf_here, vllm, tiny_llama: Path, tmp_path: Path, monkeypatch
):
    """Batches are uneven; `evaluate` also shows completions of the base model, which process 0 alone draws."""
    base = tmp_path / "base"
    shutil.copytree(tiny_llama, base)
    (tmp_path / "p.jsonl").write_text("".join(json.dumps({"prompt": "Why" * (n + 1)}) + "\n" for n in range(5)))
    (tmp_path / "rate.py").write_text("def score(p, c):\n    return [float(text.count('e')) for text in c]\n")
    models = ["--baseline", tiny_llama] if stage == "evaluate" else ["--n", 2]
    section = stage.replace("-", "_")
    changes = {
        f"{section}.sampling.batch_size": 2, "sampling.max_new_tokens": 6, "data.prompt_template": "null",
        "model.precision": "float32", "model.device": "cpu", "model.path": base,
    }  # fmt: skip
    pairs = [part for name, value in changes.items() for part in ("--set", f"{name}={value}")]
    given = [stage, "--policy", tiny_llama, *models, "--prompts", "p.jsonl", "--function", "rate.py:score", *pairs]
    shared = ["--set", "generation.tensor_parallel_size=2", "--run-dir", "two"]
    launch("served_command.py", ["-", *given, *shared], 2, cwd=tmp_path)
    monkeypatch.setattr("rlhf_cli.generation.vllm_generator.obstacle", lambda policies: None)
    code, said = rlhf_here(*given, "--set", "generation.engine=vllm", "--run-dir", "one")
    assert code == 0, said
    two, one = (
        [json.loads(line) for line in (tmp_path / run / stage / "samples.jsonl").read_text().splitlines()]
        for run in ("two", "one")
    )
    for row in (*two, *one):
        assert ("base" in row) == (stage == "evaluate")
        row.pop("base", None)
        row.pop("base_score", None)
    assert two == one
    assert len(two) == 5
