"""Several processes: launch options, and how the supervisor handles signals, deaths and failures."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from rlhf_cli.distributed import launcher as launch
from rlhf_cli.distributed.ranks import check_launcher_environment
from rlhf_cli.errors import UsageError
from rlhf_cli.pipeline.record import command_line

LAUNCHED = {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
SCRIPT = Path(__file__).parent / "supervised.py"
ALL = ["sft", "label", "train-rm", "ppo", "evaluate"]


def start(folder: Path, mode: str, count: int = 2, **more: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, str(SCRIPT), "supervise", mode, str(count)],
        cwd=folder,
        env=os.environ | more,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def run(folder: Path, mode: str, count: int = 2) -> subprocess.CompletedProcess[str]:
    process = start(folder, mode, count)
    stdout, stderr = process.communicate(timeout=30)
    return subprocess.CompletedProcess([mode], process.returncode, stdout, stderr)


def wait_until(condition: Callable[[], bool], what: str, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"{what} never came"
        time.sleep(0.02)


def is_alive(pid: int) -> bool:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, 0)
        return Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z" if Path("/proc").is_dir() else True
    return False


def test_only_rank_0_has_the_terminal(tmp_path):
    ended = run(tmp_path, "well", 3)
    assert ended.returncode == 0
    assert ended.stdout == "data of rank 0\n"
    assert ended.stderr == "words of rank 0\n"


def test_an_exception_in_one_rank_ends_all_with_its_traceback(tmp_path):
    began = time.monotonic()
    ended = run(tmp_path, "raise", 3)
    assert time.monotonic() - began < 20, "the others would sleep for a minute"
    assert ended.returncode == 1
    assert ended.stderr.index("rank 1 of 3 failed:") < ended.stderr.index("ValueError: only in rank 1")
    assert ended.stderr.count("this is a bug in rlhf") == 1


def test_a_killed_rank_is_named_and_ends_all(tmp_path):
    began = time.monotonic()
    ended = run(tmp_path, "kill", 3)
    assert time.monotonic() - began < 20
    assert ended.returncode == 128 + signal.SIGKILL
    assert "words of rank 1" in ended.stderr, "the last it said"
    assert "error: rank 1 of 3 was killed by SIGKILL" in ended.stderr
    assert "hint: the system kills a process when memory runs out; run the same command again" in ended.stderr


@pytest.mark.parametrize("how", ["raise", "kill"])
def test_programs_that_a_failed_rank_started_are_killed(how, tmp_path):
    assert run(tmp_path, f"orphan, {how}").returncode != 0
    pid = int((tmp_path / "orphan.pid").read_text())
    wait_until(lambda: not is_alive(pid), "its end", 5)


def test_a_rank_that_ends_without_an_error_gives_its_exit_code(tmp_path):
    ended = run(tmp_path, "leave")
    assert ended.returncode == 3
    assert "rank 1 of 2 ended with exit code 3" in ended.stderr
    assert "  words of rank 1" in ended.stderr


def test_an_error_about_a_lost_peer_is_not_shown(tmp_path):
    ended = run(tmp_path, "lost peer")
    assert ended.returncode == 1
    assert "ValueError: the cause" in ended.stderr
    assert "Connection closed" not in ended.stderr


def test_an_error_of_all_ranks_is_shown_once_with_its_exit_code(tmp_path):
    ended = run(tmp_path, "all diverge", 3)
    assert ended.returncode == 70
    assert ended.stderr == "words of rank 0\nerror: loss was nan in 3 steps in a row\n"


def test_the_reason_of_a_stop_that_a_rank_asked_for_is_shown(tmp_path):
    ended = run(tmp_path, "takeover")
    assert ended.returncode == 75
    assert ended.stderr == "words of rank 0\nerror: s3://bucket/run was taken over by node-b\n"


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGUSR1, 143)])
def test_a_signal_reaches_each_rank_once_and_all_may_save(signum, code, tmp_path):
    process = start(tmp_path, "signals")
    wait_until(lambda: (tmp_path / "0.listening").exists() and (tmp_path / "1.listening").exists(), "the workers")
    os.kill(process.pid, signum)
    time.sleep(0.1)
    if signum != signal.SIGINT:
        os.kill(process.pid, signum)  # schedulers repeat themselves
    _, stderr = process.communicate(timeout=30)
    assert process.returncode == code
    assert [(tmp_path / f"{rank}.seen").read_text() for rank in (0, 1)] == [str(int(signum))] * 2
    assert stderr.count(f"error: stopped by {signum.name}; finished steps and batches are saved") == 1
    assert "failed" not in stderr


def test_an_interrupt_of_every_process_of_the_job_lets_all_save(tmp_path):
    process = start(tmp_path, "step")
    files = [tmp_path / f"{rank}.pid" for rank in (0, 1)]
    wait_until(lambda: all(file.exists() and file.read_text() for file in files), "the workers")
    for file in files:
        os.kill(int(file.read_text()), signal.SIGINT)
    wait_until(lambda: all(file.with_suffix(".told").exists() for file in files), "the first signal")
    process.send_signal(signal.SIGINT)  # which passes it on
    _, stderr = process.communicate(timeout=30)
    assert process.returncode == 130
    assert all(file.with_suffix(".saved").exists() for file in files)
    assert stderr.count("error: stopped by SIGINT; finished steps and batches are saved") == 1


def test_a_second_interrupt_ends_at_once(tmp_path):
    process = start(tmp_path, "signals", DEAF="1")
    wait_until(lambda: (tmp_path / "0.listening").exists() and (tmp_path / "1.listening").exists(), "the workers")
    process.send_signal(signal.SIGINT)
    wait_until(lambda: (tmp_path / "0.seen").exists(), "the first signal")
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=10)
    assert process.returncode == 130
    assert "stopped by SIGINT" in stderr


def test_workers_do_not_outlive_a_killed_supervisor(tmp_path):
    process = start(tmp_path, "pids")
    files = [tmp_path / f"{rank}.pid" for rank in (0, 1)]
    wait_until(lambda: all(file.exists() and file.read_text() for file in files), "the workers")
    process.kill()
    pids = [int(file.read_text()) for file in files]
    wait_until(lambda: not any(map(is_alive, pids)), "the workers' end", 10)
    process.communicate()


def test_each_process_has_its_share_of_the_cores_unless_the_user_says_otherwise(monkeypatch):
    monkeypatch.setattr(launch, "cores", lambda: 8)
    assert launch.worker_environment({}, 3, threads=None)["OMP_NUM_THREADS"] == "2"
    assert launch.worker_environment({}, 16, threads=None)["OMP_NUM_THREADS"] == "1"
    assert launch.worker_environment({"OMP_NUM_THREADS": "5"}, 3, threads=None)["OMP_NUM_THREADS"] == "5"
    assert "OMP_NUM_THREADS" not in launch.worker_environment({}, 3, threads=2), "`model.threads` is of each process"


def test_workers_get_the_command_without_launch_options(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/usr/bin/rlhf"])
    given = [
        "run",
        "r.yaml",
        "--processes",
        "2",
        "--json",
        "--accelerate-config=x.yaml",
        "--processes=3",
        "--seed",
        "1",
    ]
    command = launch.worker_command(given)
    assert command == [sys.executable, "-P", "-m", "rlhf_cli", "run", "r.yaml", "--json", "--seed", "1"]


def test_a_launcher_inside_a_launcher_is_refused(toy):
    refused = toy.run("--processes", "2", **LAUNCHED)
    assert refused.code == 2
    assert "`--processes` inside a launcher: this is already process 1 of 2" in refused.stderr


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"WORLD_SIZE": "2", "RANK": "0"}, "sets RANK=0 and WORLD_SIZE=2 but not LOCAL_RANK, MASTER_ADDR, MASTER_PORT"),
        ({"RANK": "1"}, "sets RANK=1 but not LOCAL_RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT"),
        ({"LOCAL_RANK": "0"}, "sets LOCAL_RANK=0 but not RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT"),
        (LAUNCHED | {"WORLD_SIZE": "two"}, "WORLD_SIZE must be a whole number, got `two`"),
        (LAUNCHED | {"RANK": "2"}, "RANK=2 and WORLD_SIZE=2: RANK must be less than WORLD_SIZE"),
    ],
)
def test_half_a_launchers_environment_is_refused_by_name(variables, message):
    with pytest.raises(UsageError, match=re.escape(message)):
        check_launcher_environment(variables)


@pytest.mark.parametrize("variables", [{}, {"MASTER_ADDR": "a", "MASTER_PORT": "1"}, {"WORLD_SIZE": "1"}])
def test_an_environment_without_a_launch_is_accepted(variables):
    check_launcher_environment(variables)


def test_the_command_refuses_half_a_launchers_environment(toy):
    refused = toy.run(RANK="1")
    assert refused.code == 2
    assert "the environment sets RANK=1 but not LOCAL_RANK, WORLD_SIZE" in refused.stderr


def test_processes_and_accelerate_config_exclude_each_other(toy):
    assert "exclude each other" in toy.run("--processes", "2", "--accelerate-config", "a.yaml").stderr


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            "distributed_type: DEEPSPEED\nnum_processes: 2\n",
            "must be NO or MULTI_GPU, got `DEEPSPEED`",
        ),
        ("distributed_type: FSDP\nnum_processes: 2\n", "the recipe's settings decide how the processes share models"),
        ("distributed_type: MULTI_CPU\nnum_processes: 2\n", "accelerate silently starts one process, not 2"),
        ("distributed_type: 'NO'\nnum_processes: 4\n", "accelerate silently starts one process, not 4"),
        ("distributed_type: MULTI_GPU\nnum_processes: 2\nmixed_precision: bf16\n", "`mixed_precision: bf16` has no"),
        (
            "compute_environment: AMAZON_SAGEMAKER\n",
            "must be LOCAL_MACHINE, got `AMAZON_SAGEMAKER`",
        ),
        ("a: 1\nb: {c\n", "a.yaml:3: not valid YAML: expected ',' or '}', but got '<stream end>'"),
        ("a: !!python/name:os.system\n", "a.yaml:1: not valid YAML: could not determine a constructor"),
        ("[" * 5000, "a.yaml: not valid YAML: nested too deeply"),
        ("a: '\x07'\n", "a.yaml: not valid YAML: unacceptable character"),
        ("# " + "a" * (1 << 20), "a.yaml: larger than 1 MiB"),
        ("- 1\n", "a configuration of accelerate must be a mapping, got list"),
        (None, "no such file"),
    ],
)
def test_an_unsupported_configuration_of_accelerate_is_refused(tmp_path, text, said):
    config = tmp_path / "a.yaml"
    if text is not None:
        config.write_text(text)
    with pytest.raises(UsageError, match=re.escape(said)):
        launch.check_accelerate_config(config)


def test_the_command_refuses_an_unsupported_configuration_of_accelerate(toy):
    toy.write("a.yaml", "distributed_type: FSDP\n")
    refused = toy.run("--accelerate-config", "a.yaml")
    assert refused.code == 2
    assert "got `FSDP`" in refused.stderr


def test_a_bare_no_in_a_configuration_is_the_word_and_not_false(tmp_path):
    config = tmp_path / "a.yaml"
    config.write_text("distributed_type: NO\nnum_processes: 1\nmixed_precision: no\n")
    launch.check_accelerate_config(config)


def test_a_configuration_is_passed_to_accelerates_launcher(tmp_path, monkeypatch):
    config = tmp_path / "a.yaml"
    config.write_text("compute_environment: LOCAL_MACHINE\ndistributed_type: MULTI_GPU\nnum_processes: 8\n")
    commands = []
    monkeypatch.setattr(os, "execv", lambda path, command: commands.append(command))
    monkeypatch.setattr(sys, "argv", ["rlhf", "ppo", "--accelerate-config", str(config), "--seed", "4"])
    monkeypatch.setenv(launch.TYPED, "")  # so that it is removed afterwards
    launch.exec_accelerate(config)
    launcher = ["-m", "accelerate.commands.launch", "--config_file", str(config)]
    assert commands == [[sys.executable, *launcher, "-m", "rlhf_cli", "ppo", "--seed", "4"]]
    monkeypatch.setattr(sys, "argv", ["rlhf", "ppo", "--seed", "4"])  # what each process gets
    monkeypatch.setenv("WORLD_SIZE", "8")
    assert command_line() == f"rlhf ppo --accelerate-config {config} --seed 4"
    monkeypatch.delenv("WORLD_SIZE")
    assert command_line() == "rlhf ppo --seed 4", "a command that a reward function starts"


def test_zero_processes_are_refused(toy):
    assert toy.run("--processes", "0").code == 2


def test_every_rank_does_every_stage_and_a_second_run_nothing(toy):
    first = toy.start("run", "recipe.yaml", "--json", "--processes", "2")
    stdout, stderr = first.communicate(timeout=120)
    assert first.returncode == 0, stderr
    assert stdout.count('"run_dir"') == 1
    assert toy.ran() == [f"{stage} nothing" for stage in ALL]
    assert toy.run("--processes", "1").statuses == dict.fromkeys(ALL, "cached"), "the count changes no result"
    again = toy.start("run", "recipe.yaml", "--processes", "2")
    _, stderr = again.communicate(timeout=60)
    assert again.returncode == 0
    assert "nothing to do: everything is up to date" in stderr


def test_a_run_resumes_after_kill_9_of_a_rank_that_another_waited_for(toy):
    began = time.monotonic()
    first = toy.start("run", "recipe.yaml", "--processes", "2", FAKE_DIE="sft", FAKE_RANK="1")
    _, stderr = first.communicate(timeout=90)
    assert first.returncode == 137, stderr
    assert time.monotonic() - began < 60
    assert "error: rank 1 of 2 was killed by SIGKILL" in stderr
    assert "Traceback" not in stderr
    assert not (toy.run_dir / "sft").exists()
    toy.ran()
    assert toy.run("--to", "sft").code == 0
    assert toy.ran() == ["sft step 3"], "with another number of processes, too"


def test_a_bug_in_rank_1_alone_is_shown_first(toy):
    first = toy.start("run", "recipe.yaml", "--processes", "2", FAKE_RAISE="sft:bug", FAKE_RANK="1")
    _, stderr = first.communicate(timeout=90)
    assert first.returncode == 1
    assert stderr.index("rank 1 of 2 failed:") < stderr.index("ZeroDivisionError: a bug")
    assert stderr.count("Traceback") == 1


def test_a_running_command_holds_the_lock_and_ctrl_c_stops_all_of_it_resumably(toy):
    first = toy.start("run", "recipe.yaml", "--processes", "2", FAKE_HANG="sft", FAKE_RANK="all")
    hanging = [Path(f"{toy.log}.hanging"), Path(f"{toy.log}.hanging1")]
    wait_until(lambda: all(path.exists() for path in hanging), "the stage")
    second = toy.run()
    assert second.code == 75
    assert "runs/toy is in use by process" in second.stderr
    first.send_signal(signal.SIGINT)
    _, stderr = first.communicate(timeout=60)
    assert first.returncode == 130, stderr
    assert stderr.count("error: stopped by SIGINT") == 1
    toy.ran()
    assert toy.run("--to", "sft").code == 0
    assert toy.ran() == ["sft step 3"]


def test_a_failure_of_rank_0_before_any_stage_ends_all(toy):
    toy.write("prompts.jsonl", "not json\n")
    first = toy.start("run", "recipe.yaml", "--processes", "2")
    _, stderr = first.communicate(timeout=60)
    assert first.returncode == 65
    assert "prompts.jsonl:1" in stderr
    assert "rank" not in stderr
