"""Damage to any file of an unfinished PPO stage: it warns and ends with the same bytes, or stops and names the file."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.faults.harness import SmallRun


def flip_one_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1 << 4
    path.write_bytes(content)


DAMAGE = {
    "deleted": Path.unlink,
    "truncated": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "one bit flipped": flip_one_bit,
}
CHECKPOINT = ("tensors.safetensors", "state.json", "SHA256SUMS")


def go_on(run: SmallRun):
    """To the end of the last step, whose checkpoint is then there to be compared."""
    return run.run_here(FAULT="signal:4")


def scored_steps(run: SmallRun) -> int:
    return sum(event.startswith("scored") for event in run.events())


@pytest.mark.parametrize("kind", DAMAGE)
@pytest.mark.parametrize("name", CHECKPOINT)
def test_damage_to_the_newest_checkpoint_costs_a_step_and_changes_nothing(broken, expected, name, kind):
    DAMAGE[kind](broken.work / "step-00000002" / name)
    end = go_on(broken)
    assert end.code == 143, end.stderr
    assert "warning: skipping the damaged checkpoint run/.ppo.work/step-00000002: " in end.stderr
    assert scored_steps(broken) == 3, "it went back to step 1"
    assert broken.stopped() == expected


def test_with_no_whole_checkpoint_it_begins_anew_and_says_so(broken, expected):
    for folder in broken.work.glob("step-*"):
        DAMAGE["one bit flipped"](folder / "state.json")
    end = go_on(broken)
    assert end.stderr.count("state.json does not match its checksum") == 2
    assert "no checkpoint in run/.ppo.work is intact: starting from the beginning" in end.stderr
    assert scored_steps(broken) == 4
    assert broken.stopped() == expected


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_to_the_record_of_what_it_began_with_stops_it(broken, kind):
    DAMAGE[kind](broken.run_dir / ".ppo.began.json")
    end = go_on(broken)
    assert end.code == 2, end.stderr
    assert ".ppo.began.json, which records its settings, is missing or damaged" in end.stderr
    assert "hint: " in end.stderr
    assert broken.events() == []


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_to_the_metrics_is_named_and_touches_no_weight(broken, expected, kind):
    DAMAGE[kind](broken.work / "metrics.jsonl")
    end = go_on(broken)
    assert end.code == 143, end.stderr
    assert "warning: " in end.stderr
    assert "metrics.jsonl" in end.stderr
    # The checkpoint's JSON says how long the metrics are; weights, critic and optimizer do not hang on them.
    name = "checkpoint/tensors.safetensors"
    assert broken.stopped()[name] == expected[name]


def test_strangers_and_half_files_among_the_checkpoints_change_nothing(broken, expected):
    (broken.work / "step-abc").mkdir()
    (broken.work / ".step-00000003.partial").mkdir()
    (broken.work / ".step-00000003.partial/tensors.safetensors").write_text("half")
    (broken.work / "step-00000002/.DS_Store").write_text("extra")
    (broken.run_dir / ".ppo.output/model.safetensors").write_text("half")
    (broken.run_dir / ".lock").write_bytes(b"\xff\xfe 99999999")
    end = go_on(broken)
    assert end.code == 143, end.stderr
    assert "damaged" not in end.stderr
    assert broken.stopped() == expected
