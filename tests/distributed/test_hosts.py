"""Several hosts, as network namespaces: the end of a process or of a machine ends all processes, and is named."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.distributed import hosts as network
from tests.distributed.test_launcher import wait_until

pytestmark = [pytest.mark.slow, pytest.mark.skipif(network.why_not() is not None, reason=str(network.why_not()))]
SCRIPT = Path(__file__).parent / "watching.py"
NAMES = ("node-a", "node-b", "node-c")


RECIPE = """
name: three
model: {{path: {model}, precision: float32, device: cpu}}
data: {{prompts: prompts.jsonl}}
sft: {{data: demonstrations.jsonl, epochs: {epochs}, batch_size: 3, micro_batch_size: 1, checkpoint_steps: 10,
      lora: {{rank: 2}}}}
"""


@pytest.fixture
def three() -> Iterator[list[network.Host]]:
    with network.hosts(*NAMES) as found:
        yield found


def rank_environment(three: list[network.Host], number: int) -> dict[str, str]:
    given = {"RANK": number, "LOCAL_RANK": 0, "WORLD_SIZE": len(three), "LOCAL_WORLD_SIZE": 1}
    given |= {"MASTER_ADDR": three[0].address, "MASTER_PORT": 29400, "OMP_NUM_THREADS": 1}
    return dict(os.environ) | {name: str(value) for name, value in given.items()}


def watching(three: list[network.Host], folder: Path, *modes: str) -> list[subprocess.Popen[bytes]]:
    """Start a process on each host, and wait until all are connected."""
    started = [
        host.start(
            [sys.executable, str(SCRIPT), str(folder), mode],
            cwd=folder,
            environment=rank_environment(three, number),
            label=mode,
        )
        for number, (host, mode) in enumerate(zip(three, modes, strict=True))
    ]
    wait_until(lambda: all((folder / f"{number}.watching").exists() for number in range(len(three))), "connections")
    return started


def ended(three: list[network.Host], started: list[subprocess.Popen[bytes]], *modes: str) -> list[tuple[int, str]]:
    codes = [process.wait(timeout=60) for process in started]
    return [(code, host.output(mode)) for code, host, mode in zip(codes, three, modes, strict=True)]


@pytest.mark.parametrize(("gone", "others"), [(2, (0, 1)), (0, (1, 2))], ids=["a host", "the host of rank 0"])
@pytest.mark.parametrize(
    ("how", "why"),
    [("kill", "its process ended without reporting an error"), ("unplug", "its machine does not answer")],
)
def test_a_host_that_is_gone_ends_all_and_is_named(how, why, gone, others, three, tmp_path):
    modes = ("wait",) * 3
    started = watching(three, tmp_path, *modes)
    began = time.monotonic()
    getattr(three[gone], how)()
    found = [process.wait(timeout=60) for number, process in enumerate(started) if number != gone]
    assert time.monotonic() - began < 30
    assert found == [1, 1]
    for number in others:
        said = three[number].output("wait")
        assert f"error: rank {gone} of 3 on {NAMES[gone]} is gone: {why}" in said
        assert "\nhint: " in said
        assert "run the same command again on all machines to resume from the last checkpoint" in said


def test_a_process_that_fails_tells_the_others_why(three, tmp_path):
    modes = ("lose", "lose", "fail")
    started = watching(three, tmp_path, *modes)
    (tmp_path / "go").touch()
    found = ended(three, started, *modes)
    assert [code for code, _ in found] == [70, 70, 70], "the code of the process that failed"
    for _, said in found[:2]:
        assert "rank 2 of 3 on node-c: it ended: loss was nan in 3 steps in a row" in said


def test_processes_that_end_in_order_are_not_missed(three, tmp_path):
    modes = ("wait", "succeed", "succeed")
    started = watching(three, tmp_path, *modes)
    (tmp_path / "go").touch()
    assert [process.wait(timeout=60) for process in started[1:]] == [0, 0]
    with pytest.raises(subprocess.TimeoutExpired):
        started[0].wait(timeout=4)


def test_a_process_stopped_by_a_signal_gives_the_others_time_to_save(three, tmp_path):
    modes = ("wait", "wait", "stop")
    started = watching(three, tmp_path, *modes)
    (tmp_path / "go").touch()
    assert started[2].wait(timeout=60) == 143
    with pytest.raises(subprocess.TimeoutExpired):
        started[1].wait(timeout=12)


def test_a_suspended_process_is_not_taken_for_dead(three, tmp_path):
    modes = ("wait",) * 3
    started = watching(three, tmp_path, *modes)
    subprocess.run(["kill", "-STOP", str(started[2].pid)], check=True)
    with pytest.raises(subprocess.TimeoutExpired):
        started[0].wait(timeout=20)


def torchrun(host: network.Host, first: network.Host, folder: Path, label: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "3", "--nproc-per-node", "1"]
    command += ["--max-restarts", "1", "--rdzv-backend", "c10d", "--rdzv-id", "x", "--rdzv-endpoint"]
    command += [f"{first.name}:29400", "--rdzv-conf", "read_timeout=300"]
    command += ["-m", "rlhf_cli", "sft", "recipe.yaml"]
    more = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CI": "1"}
    return host.start(command, cwd=folder, environment=os.environ | more, label=label)


def test_three_hosts_train_and_resume_with_a_replacement_of_one_that_was_killed(three, tmp_path, tiny_llama):
    rows = [{"prompt": f"say {word}", "completion": word} for word in ("one", "two", "six")]
    (tmp_path / "demonstrations.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "say ten"}\n')
    (tmp_path / "recipe.yaml").write_text(RECIPE.format(model=tiny_llama, epochs=150))
    started = [torchrun(host, three[0], tmp_path, "first") for host in three]
    work = tmp_path / "runs" / "three" / ".sft.work"
    wait_until(lambda: (work / "step-00000020").exists(), "a checkpoint", 500)
    three[2].kill()
    began = time.monotonic()
    lost = "error: rank 2 of 3 on node-c is gone: its process ended without reporting an error"
    named = [False, False]
    while not all(named) and time.monotonic() - began < 30:
        time.sleep(0.02)
        named = [lost in host.output("first") for host in three[:2]]
    print(f"named after {time.monotonic() - began:.1f} s")
    assert all(named), "\n".join(host.output("first") for host in three[:2])
    started[2] = torchrun(three[2], three[0], tmp_path, "second")
    assert [process.wait(timeout=500) for process in started] == [0, 0, 0], three[0].output("first")
    log = (tmp_path / "runs" / "three" / "log.txt").read_text()
    assert log.count("sft: starting (") == log.count("sft: resuming (") == 1
    lines = (tmp_path / "runs" / "three" / "sft" / "metrics.jsonl").read_text().splitlines()
    steps = [row["step"] for row in map(json.loads, lines) if "loss" in row]
    assert steps == list(range(1, len(steps) + 1)), "every step once"
    assert len(steps) > 50
