"""The environment of a launcher: whole and consistent, or refused by name; joining has a time limit."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from rlhf_cli.distributed.ranks import check_launcher_environment
from rlhf_cli.errors import UsageError
from tests.pipeline.toy import SCRIPT

WHOLE = {
    "RANK": "1",
    "LOCAL_RANK": "1",
    "WORLD_SIZE": "2",
    "LOCAL_WORLD_SIZE": "2",
    "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": "29400",
}
REQUIRED = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
NUMBERS = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_PORT")
NOT_NUMBERS = ("", " ", "two", "-1", "1.0", "0x1", "²", "1 2", "9" * 5000)


def without(name: str, *, only: tuple[str, ...] = tuple(WHOLE)) -> dict[str, str]:
    return {key: value for key, value in WHOLE.items() if key in only and key != name}


REFUSED = [
    *((without(name), name) for name in REQUIRED),
    *(({name: WHOLE[name]}, "the environment sets") for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE")),
    *(({name: ""}, "the environment sets") for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE")),
    *((WHOLE | {name: text}, f"{name} must be a whole number") for name in NUMBERS for text in NOT_NUMBERS),
    (WHOLE | {"RANK": "2"}, "RANK=2 and WORLD_SIZE=2"),
    (WHOLE | {"RANK": "3", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}, "RANK=3 and WORLD_SIZE=1"),
    (WHOLE | {"WORLD_SIZE": "0"}, "RANK=1 and WORLD_SIZE=0"),
    (WHOLE | {"RANK": "0", "WORLD_SIZE": "0", "LOCAL_RANK": "0"}, "RANK=0 and WORLD_SIZE=0"),
    (WHOLE | {"LOCAL_RANK": "2", "LOCAL_WORLD_SIZE": "4"}, "LOCAL_RANK=2 and WORLD_SIZE=2"),
    (WHOLE | {"LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "1"}, "LOCAL_RANK=1 and LOCAL_WORLD_SIZE=1"),
    (WHOLE | {"LOCAL_WORLD_SIZE": "0"}, "LOCAL_RANK=1 and LOCAL_WORLD_SIZE=0"),
    (WHOLE | {"LOCAL_WORLD_SIZE": "3"}, "LOCAL_WORLD_SIZE=3 and WORLD_SIZE=2"),
    (WHOLE | {"MASTER_PORT": "0"}, "MASTER_PORT must be from 1 to 65535, got 0"),
    (WHOLE | {"MASTER_PORT": "70000"}, "MASTER_PORT must be from 1 to 65535, got 70000"),
    (WHOLE | {"MASTER_ADDR": ""}, "MASTER_ADDR is empty"),
    ({"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "2"}, "one of 4 processes (OMPI_COMM_WORLD_SIZE=4, "),
    ({"PMI_SIZE": "2", "PMI_RANK": "0"}, "(PMI_SIZE=2, PMI_RANK=0)"),
    ({"MV2_COMM_WORLD_SIZE": "2", "MV2_COMM_WORLD_RANK": "1"}, "(MV2_COMM_WORLD_SIZE=2, MV2_COMM_WORLD_RANK=1)"),
    ({"SLURM_STEP_NUM_TASKS": "8", "SLURM_PROCID": "3", "SLURM_NTASKS": "8"}, "(SLURM_STEP_NUM_TASKS=8, SLURM_PROCID"),
    ({"ACCELERATE_USE_FSDP": "true"}, "ACCELERATE_USE_FSDP=true, which has no effect"),
    ({"ACCELERATE_USE_DEEPSPEED": "true"}, "ACCELERATE_USE_DEEPSPEED=true, which has no effect"),
    (WHOLE | {"ACCELERATE_MIXED_PRECISION": "bf16"}, "ACCELERATE_MIXED_PRECISION=bf16, which has no effect"),
]
ACCEPTED = [
    {},
    {"MASTER_ADDR": "a", "MASTER_PORT": "1"},
    {"MASTER_ADDR": "", "MASTER_PORT": "99999"},
    {"WORLD_SIZE": "1"},
    {"SLURM_NTASKS": "4", "SLURM_PROCID": "0"},  # the batch script of a job
    {"OMPI_COMM_WORLD_SIZE": "1", "OMPI_COMM_WORLD_RANK": "0"},
    {"ACCELERATE_MIXED_PRECISION": "no", "ACCELERATE_USE_FSDP": "False"},
    WHOLE | {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"},
]


@pytest.mark.parametrize(("variables", "said"), REFUSED, ids=range(len(REFUSED)))
def test_an_environment_that_is_not_whole_is_refused_by_name(variables, said, toy):
    refused = toy.run(**variables)
    assert refused.code == 2, refused.stderr
    assert said in refused.stderr
    assert "\nhint: " in refused.stderr
    assert "Traceback" not in refused.stderr
    assert toy.ran() == []


@pytest.mark.parametrize(("name", "value"), [("MASTER_PORT", "two"), ("MASTER_PORT", "99999"), ("MASTER_ADDR", " ")])
def test_the_hint_names_the_address_or_the_port_that_is_wrong(name: str, value: str):
    with pytest.raises(UsageError) as caught:
        check_launcher_environment(WHOLE | {name: value})
    assert (caught.value.hint or "").startswith(f"set {name} to ")


def test_a_value_that_mentions_a_variable_does_not_choose_the_hint():
    with pytest.raises(UsageError) as caught:
        check_launcher_environment(WHOLE | {"RANK": "$RANK MASTER_PORT 29400"})
    assert (caught.value.hint or "").startswith("unset RANK, LOCAL_RANK, WORLD_SIZE, ")


@pytest.mark.parametrize("variables", ACCEPTED, ids=range(len(ACCEPTED)))
def test_an_environment_that_describes_one_process_is_accepted(variables, toy):
    assert toy.run(**variables).code == 0
    assert toy.ran() != []


def test_no_command_believes_to_be_another_rank(toy):
    """Ranks other than 0 are silent: `rlhf recipe validate` would exit 0 without a word."""
    refused = toy.rlhf("recipe", "validate", "recipe.yaml", RANK="1")
    assert refused.code == 2
    assert "the environment sets RANK=1 but not" in refused.stderr


def test_a_time_limit_that_is_no_number_is_refused(toy):
    refused = toy.run(**WHOLE, RLHF_JOIN_SECONDS="soon")
    assert (refused.code, "RLHF_JOIN_SECONDS must be a positive number" in refused.stderr) == (2, True)


@contextmanager
def listening(reply: bytes) -> Iterator[str]:
    """A program that has the port, and answers whatever it is told with `reply`."""
    program = (
        "import socket; s = socket.create_server(('127.0.0.1', 0)); print(s.getsockname()[1], flush=True); kept = []\n"
        f"while True: c = s.accept()[0]; kept.append(c); c.sendall({reply!r})"
    )
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        yield process.stdout.readline().strip()
        process.kill()


def free_port() -> str:
    with socket.create_server(("127.0.0.1", 0)) as found:
        return str(found.getsockname()[1])


RANK_0 = WHOLE | {"RANK": "0", "LOCAL_RANK": "0"}


@pytest.mark.parametrize("given", [WHOLE, RANK_0], ids=["rank 1", "rank 0"])
def test_an_address_of_no_machine_is_refused_at_once(given, toy):
    began = time.monotonic()
    refused = toy.run(**given | {"MASTER_ADDR": "nowhere.invalid"})
    assert refused.code == 2
    assert "MASTER_ADDR=nowhere.invalid is not the address of a machine" in refused.stderr
    assert time.monotonic() - began < 10


def test_rank_0_refuses_an_address_of_another_machine(toy):
    refused = toy.run(**RANK_0 | {"MASTER_ADDR": "192.0.2.1", "MASTER_PORT": free_port()})  # TEST-NET-1, RFC 5737
    assert refused.code == 2
    assert "rank 0 cannot be reached at MASTER_ADDR=192.0.2.1" in refused.stderr


def test_rank_0_refuses_a_port_that_is_taken(toy):
    with listening(b"") as port:
        refused = toy.run(**RANK_0 | {"MASTER_PORT": port})
    assert refused.code == 2
    assert f"rank 0 cannot listen on MASTER_PORT={port}: address already in use" in refused.stderr


def joined(toy, *given: dict[str, str], seconds: str = "5") -> list[tuple[int, str, str]]:
    processes = [toy.start("run", "recipe.yaml", **one, RLHF_JOIN_SECONDS=seconds) for one in given]
    ended = [process.communicate(timeout=120) for process in processes]
    return [(process.returncode, *texts) for process, texts in zip(processes, ended, strict=True)]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (WHOLE, "rank 1 of 2 has waited 5 seconds for rank 0 at 127.0.0.1:{port}"),
        (RANK_0, "rank 0 of 2 has waited 5 seconds for rank 1 to join at 127.0.0.1:{port}"),
    ],
)
def test_a_process_that_nobody_joins_says_so_and_ends(given, said, toy):
    port = free_port()
    [(code, stdout, stderr)] = joined(toy, given | {"MASTER_PORT": port})
    assert (code, stdout) == (2, "")
    assert said.format(port=port) in stderr
    assert "is waiting for rank" in stderr, "said before the limit"
    assert "set RLHF_JOIN_SECONDS to more seconds" in stderr
    assert "Traceback" not in stderr
    assert toy.ran() == []


@pytest.mark.parametrize("reply", [b"", b"HTTP/1.1 400 Bad Request\r\n\r\n"], ids=["silent", "talking"])
def test_another_program_on_the_port_is_not_waited_for_for_ever(reply, toy):
    with listening(reply) as port:
        [(code, _, stderr)] = joined(toy, WHOLE | {"MASTER_PORT": port})
    assert code == 2, stderr
    assert f"rank 0 at 127.0.0.1:{port}" in stderr
    assert "Traceback" not in stderr


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_joining(signum, toy):
    process = toy.start("run", "recipe.yaml", **WHOLE | {"MASTER_PORT": free_port()}, RLHF_JOIN_SECONDS="100")
    assert "is waiting for rank 0" in process.stderr.readline()
    process.send_signal(signum)
    process.communicate(timeout=100)
    assert process.returncode == (130 if signum == signal.SIGINT else -signal.SIGTERM)


@pytest.mark.parametrize(
    ("others", "said"),
    [
        ({"WORLD_SIZE": "3", "LOCAL_WORLD_SIZE": "3"}, "WORLD_SIZE=3, but rank 0 with WORLD_SIZE=2"),
        ({"RANK": "0", "LOCAL_RANK": "0"}, "cannot listen on MASTER_PORT"),
    ],
    ids=["other size", "rank 0 twice"],
)
def test_processes_that_contradict_each_other_are_refused(others, said, toy):
    port = {"MASTER_PORT": free_port()}
    ended = joined(toy, RANK_0 | port, WHOLE | port | others)
    assert any(said in stderr for _, _, stderr in ended), ended
    assert [code for code, _, _ in ended] == [2, 2]
    assert toy.ran() == []


def test_two_processes_started_by_hand_do_the_work_of_one_run(toy):
    port = {"MASTER_PORT": free_port()}
    (first, _, stderr), (second, stdout, _) = joined(toy, RANK_0 | port, WHOLE | port, seconds="60")
    assert (first, second) == (0, 0), stderr
    assert stdout == ""
    assert len(toy.ran()) == 5


def test_a_process_that_loses_the_others_does_not_call_it_a_bug(toy):
    port = {"MASTER_PORT": free_port()}
    damaged = {"FAKE_RAISE": "sft:diverged", "FAKE_RANK": "0"}
    ended = joined(toy, RANK_0 | port | damaged, WHOLE | port, seconds="60")
    assert [code for code, _, _ in ended] == [70, 70], "the code of the process that failed"
    assert "this is a bug" not in ended[1][2]
    assert f"error: rank 0 of 2 on {socket.gethostname()}: it ended: loss was nan in 3 steps in a row" in ended[1][2]


@pytest.mark.parametrize(
    ("launcher", "count"),
    [
        (("torch.distributed.run", "--nproc-per-node", "1"), 1),
        (("torch.distributed.run", "--nproc-per-node", "2"), 2),
        (("accelerate.commands.launch", "--num_processes", "1"), 1),
    ],
    ids=["torchrun, 1", "torchrun, 2", "accelerate, 1"],
)
def test_a_launcher_starts_the_command(launcher, count, toy):
    ended = subprocess.run(
        [sys.executable, "-m", *launcher, str(SCRIPT), "run", "recipe.yaml", "--json"],
        cwd=toy.folder,
        env={**os.environ, "FAKE_LOG": str(toy.log), "ACCELERATE_USE_CPU": "1"},
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.count('"run_dir"') == 1
    assert len(toy.ran()) == 5, f"{count} processes do the work once"


def test_torchrun_starts_all_again_after_the_death_of_one_and_the_run_resumes(toy):
    """Also with the store of torchrun, in which the first start has left its traces."""
    ended = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--max-restarts", "1"),
            *(str(SCRIPT), "sft", "recipe.yaml"),
        ],
        cwd=toy.folder,
        env={**os.environ, "FAKE_LOG": str(toy.log), "FAKE_DIE": "sft", "FAKE_RANK": "1", "FAKE_ONCE": "1"},
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    assert toy.ran() == ["sft nothing", "sft step 3"]
