"""What the benchmarks against TRL share: models and texts, measured processes, rounds, ratios and tables."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.scripts import load_script

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "benchmarks" / "comparison.py"


@pytest.fixture(scope="module")
def comparison():
    return load_script(SCRIPT)


def side(seconds: float, cpu: float, gigabytes: float, **more) -> dict:
    return {"seconds": seconds, "cpu_seconds": cpu, "process_gb": gigabytes, "gpu_gb": None, "versions": "x 1", **more}


# Models and texts


@pytest.mark.parametrize("size", [400, 1024])
def test_every_word_of_the_tokenizer_is_one_token_again_when_its_text_is_read(comparison, size):
    tokenizer = comparison.word_tokenizer(size)
    assert len(tokenizer) == size
    words = [token for token in range(size - 2) if len(tokenizer.decode([token])) > 1]
    assert len(words) > size - 300
    assert tokenizer(tokenizer.decode(words)).input_ids == words
    assert [tokenizer.eos_token_id, tokenizer.pad_token_id] == [size - 2, size - 1]


def test_random_texts_have_the_number_of_tokens_asked_for(comparison):
    tokenizer = comparison.word_tokenizer(1024)
    texts = comparison.random_texts(5, 17, vocabulary=1024)
    assert {len(tokenizer(text).input_ids) for text in texts} == {17}
    assert len(set(texts)) == 5


def test_padding_uses_a_special_token_that_no_text_has(comparison):
    tokenizer = comparison.word_tokenizer(400)
    tokenizer.pad_token = None
    tokenizer.add_special_tokens({"bos_token": "<|begin|>", "unk_token": "<|unknown|>"})
    begin = tokenizer.bos_token_id
    assert comparison.padding_token(tokenizer, []) == "<|begin|>"
    assert comparison.padding_token(tokenizer, [[begin, 5]]) == "<|unknown|>"


# Measures


def test_checkpoints_do_not_count_as_training(comparison):
    training, saving = comparison.Clock(10.0, 8.0), comparison.Clock(4.0, 1.0)
    found = comparison.measured(training, saving)
    assert (found["seconds"], found["cpu_seconds"], found["checkpoint_seconds"]) == (6.0, 7.0, 4.0)


def test_a_clock_adds_up_what_it_is_around(comparison):
    clock = comparison.Clock()
    calls = []
    measured = clock.around(lambda value: calls.append(value) or value)
    assert measured(3) == 3
    first = clock.wall
    measured(4)
    assert calls == [3, 4]
    assert clock.wall > first > 0.0


PEAK = """
import sys; sys.path.insert(0, {folder!r})
import comparison
before = comparison.peak_resident_gb()
block = bytearray(b"x") * 100_000_000
del block
print(before, comparison.peak_resident_gb())
"""


@pytest.mark.slow
def test_peak_memory_is_that_of_the_process_alone_and_outlives_what_it_was_for():
    block = bytearray(b"x") * 400_000_000  # of this process, which the child's own peak must not include
    command = [sys.executable, "-c", PEAK.format(folder=str(SCRIPT.parent))]
    before, after = map(float, subprocess.run(command, capture_output=True, text=True, check=True).stdout.split())
    assert len(block) == 400_000_000
    assert before < 0.1
    assert after - before == pytest.approx(0.1, abs=0.01)


def test_times_of_phases_add_up_over_steps_and_rates_are_the_last(comparison, tmp_path):
    rows = [{"time/rollout": 2.0, "throughput/mfu": 0.1}, {"time/rollout": 3.0, "throughput/mfu": 0.2}]
    (tmp_path / "timing.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n')
    assert comparison.phases(tmp_path) == {"time/rollout": 5.0, "throughput/mfu": 0.2}


@pytest.mark.slow
def test_a_side_that_fails_ends_the_comparison_with_what_it_said(comparison, tmp_path):
    runner = comparison.Runner(tmp_path, 1)
    with pytest.raises(SystemExit, match="out of luck"):
        runner.call([sys.executable, "-c", "import sys; sys.exit('out of luck')", comparison.RESULT])


# Rounds and tables


def test_rounds_run_forwards_and_backwards_in_turn(comparison):
    order = []
    sides = {name: lambda name=name: order.append(name) or side(1, 1, 1) for name in "ab"}
    results = comparison.alternate(sides, 3)
    assert order == ["a", "b", "b", "a", "a", "b"]
    assert {name: len(rows) for name, rows in results.items()} == {"a": 3, "b": 3}


def test_ratios_are_those_of_each_round(comparison):
    results = {
        "rlhf float32": [side(2, 1, 3), side(4, 2, 3), side(1, 4, 6)],
        "TRL float32": [side(8, 6, 9), side(8, 6, 6), side(8, 6, 8)],
    }
    text = comparison.markdown(results, unit="episodes", count=16, is_ours=lambda name: name.startswith("rlhf"))
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines()]
    assert lines[2] == ["rlhf float32", "8.000 (4.000-16.000)", "2.0 (1.0-4.0)", "3.00 (3.00-6.00)"]
    assert lines[3] == ["TRL float32", "2.000 (2.000-2.000)", "6.0 (6.0-6.0)", "8.00 (6.00-9.00)"]
    name = "rlhf float32 to TRL float32"  # faster: theirs / ours; less memory: ours / theirs
    assert lines[-1] == [name, "4.00x (2.00-8.00)", "3.00x (1.50-6.00)", "0.50x (0.33-0.75)"]


def test_memory_is_that_of_the_gpu_where_there_is_one(comparison):
    assert comparison.memory(side(1, 1, 3)) == 3
    assert comparison.memory(side(1, 1, 3) | {"gpu_gb": 2}) == 2


def test_loss_curves_are_compared_step_by_step(comparison):
    assert comparison.curve_difference([1.0, 2.0], [1.1, 1.5]) == pytest.approx(0.5)
    with pytest.raises(ValueError, match="shorter"):
        comparison.curve_difference([1.0, 2.0], [1.0])


def test_the_heading_says_which_side_has_which_versions(comparison):
    results = {"rlhf float32": [side(1, 1, 1)], "TRL float32": [side(1, 1, 1) | {"versions": "trl 1.12.0"}]}
    text = comparison.heading("PPO", results, 2)
    assert "rlhf float32: x 1; TRL float32: trl 1.12.0" in text
    assert "Alternating rounds: 1" in text
