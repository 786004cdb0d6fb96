"""What the system refuses is an error with the path, the reason and a way out; only bugs are called bugs."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from rlhf_cli.cli.error_rendering import report
from rlhf_cli.errors import EXIT_DISK, ModelError


def reported(error: BaseException, capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    try:
        raise error
    except BaseException as raised:
        code = report(raised)
    return code, capsys.readouterr().err


@pytest.mark.parametrize(
    ("number", "said", "code"),
    [
        (errno.EACCES, "change the permissions", 1),
        (errno.EPERM, "change the permissions", 1),
        (errno.EROFS, "mounted read-only", EXIT_DISK),
        (errno.ENOSPC, "free some space", EXIT_DISK),
        (errno.EDQUOT, "quota", EXIT_DISK),
        (errno.EIO, "the disk or network share fails", EXIT_DISK),
        (errno.ENAMETOOLONG, "use a shorter name", 1),
        (errno.ELOOP, "symbolic links", 1),
        (errno.EMFILE, "ulimit -n", 1),
    ],
)
def test_an_error_of_the_system_names_path_reason_and_way_out(number, said, code, capsys):
    found, text = reported(OSError(number, os.strerror(number), "some/file"), capsys)
    assert found == code
    assert text.startswith(f"error: some/file: {os.strerror(number).lower()}\n\nhint: ")
    assert said in text
    assert "`--verbose`" in text


@pytest.mark.parametrize(
    ("number", "said"),
    [
        (errno.ENOENT, "check the path"),
        (errno.ENOTDIR, "a part of the path is a file"),
        (errno.EISDIR, "name a file"),
        (errno.EEXIST, "move it away"),
        (errno.ENOTEMPTY, "another program writes"),
    ],
)
def test_a_wrong_path_is_a_mistake_where_it_was_given_and_else_a_bug(number, said, tmp_path, monkeypatch, capsys):
    (tmp_path / "run" / "ppo").mkdir(parents=True)
    (tmp_path / "run" / ".lock").touch()
    (tmp_path / "r.yml").write_text("name: ''\nmodel: {path: m}\nsft: {data: [{path: d/a.jsonl}]}\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["rlhf", "run", "r.yml", "--run-dir=run", "--set", "x.y=out/z"])
    for path in ("m", "m/config.json", "d/a.jsonl", str(tmp_path / "out" / "z"), "run", "r.yml"):
        code, text = reported(OSError(number, os.strerror(number), path), capsys)
        assert code == 1
        assert text.startswith(f"error: {path}: {os.strerror(number).lower()}\n\nhint: ")
        assert said in text
    for path in ("run/ppo/samples.jsonl", "run/ppo", "other", "d/b.jsonl", str(tmp_path.parent / "m"), b"other"):
        _, text = reported(OSError(number, os.strerror(number), path), capsys)
        assert "Traceback" in text
        assert "this is a bug in rlhf" in text
    assert said in reported(OSError(number, os.strerror(number)), capsys)[1]  # as of a removed working directory
    assert said in reported(OSError(number, os.strerror(number), "other", None, "m/a"), capsys)[1]


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory: you tried to"),
    ],
)
def test_too_little_memory_is_no_bug(error, capsys):
    assert "error: out of memory\n" in reported(error, capsys)[1]


def test_a_library_that_cannot_be_imported_is_named(capsys):
    _, text = reported(ModuleNotFoundError("No module named 'peft'", name="peft"), capsys)
    assert text.startswith("error: cannot import peft: No module named 'peft'\n")


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.EBADF, "Bad file descriptor"),
        ValueError("x"),
        ImportError("cannot import name 'x'", name="rlhf_cli.files"),
        RuntimeError("shape"),
    ],
)
def test_a_bug_keeps_its_traceback(error, capsys):
    code, text = reported(error, capsys)
    assert code == 1
    assert "Traceback" in text
    assert "this is a bug in rlhf" in text


def shell(line: str, folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    rlhf = f"{sys.executable} -m rlhf_cli"
    return subprocess.run(
        ["bash", "-c", line.replace("rlhf ", f"{rlhf} ")],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), **environment},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "r.yaml").write_text("name: r\nmodel: {path: m}\nsft: {data: d.jsonl}\n")
    return tmp_path


@pytest.mark.slow
@pytest.mark.parametrize(
    ("line", "code", "said"),
    [
        ("rlhf recipe show r.yaml >&-", 0, ""),
        ("rlhf recipe validate r.yaml 2>&-", 0, ""),
        ("rlhf recipe validate r.yaml <&- >&- 2>&-", 0, ""),
        ("rlhf nothing 2>&-", 2, ""),
        ("rlhf recipe show r.yaml >/dev/full", 74, "error: cannot write to stdout: no space left on device"),
        ("rlhf --help >/dev/full", 74, "error: cannot write to stdout: no space left on device"),
        ("rlhf nothing 2>/dev/full", 2, ""),
        ("rlhf recipe schema 2>err | head -1; [ ! -s err ]", 0, ""),
        ("rlhf recipe schema 2>&1 | head -1", 0, ""),
        ("rlhf recipe validate $'\\xff.yaml'", 2, "error: the argument `\\udcff.yaml` is not valid utf-8"),
        ("rlhf recipe show r.yaml --set model.path=漢", 0, ""),
    ],
)
def test_streams_and_names_of_every_kind(line, code, said, folder):
    ended = shell(line, folder, PYTHONIOENCODING="ascii")
    assert ended.returncode == code, ended.stderr
    assert ended.stderr.startswith(said)
    assert "Traceback" not in ended.stderr
    assert "Exception ignored" not in ended.stderr


@pytest.mark.slow
def test_a_closed_stream_is_not_taken_by_a_file(folder):
    """Otherwise what is written to stderr lands in the file that got its number."""
    code = (
        "import os, sys; from rlhf_cli.cli.environment import prepare_streams; prepare_streams(); "
        "f = open('d', 'w'); assert f.fileno() > 2, f.fileno(); print('x'); os.write(2, b'y')"
    )
    ended = shell(f'{sys.executable} -c "{code}" <&- >&- 2>&-', folder)
    assert (ended.returncode, (folder / "d").read_text()) == (0, "")


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt" or os.geteuid() != 0, reason="needs root, to act as a user without rights")
@pytest.mark.parametrize("name", ["r.yaml", "d.jsonl"])
def test_what_may_not_be_read_is_named(name, folder):
    (folder / "d.jsonl").write_text('{"prompt": "p", "completion": "c"}\n')
    (folder / "m").mkdir()
    (folder / "m" / "config.json").write_text("{}")
    (folder / name).chmod(0)
    for one in (folder, *folder.parents):
        if one != Path("/") and one.stat().st_uid == os.geteuid() and one.is_relative_to("/tmp"):
            one.chmod(0o755)
    ended = shell("setpriv --reuid=65534 --regid=65534 --clear-groups rlhf run r.yaml --dry-run", folder)
    assert ended.returncode != 0
    assert name in ended.stderr.splitlines()[0] or "not readable" in ended.stderr
    assert "Traceback" not in ended.stderr


def test_a_line_is_wrapped_without_its_colors_and_a_command_stays_whole(monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "40")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    command = "    python -c 'import glob, torch; print(glob.glob(\"*.bin\"), torch.__version__)'"
    report(ModelError("a message of forty characters, counted", hint=f"convert it once, if you trust it:\n{command}"))
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "\033[1;31merror:\033[0m a message of forty characters,"
    assert command in lines


@pytest.mark.slow
def test_the_home_folder_in_run_dir_is_expanded(rlhf, tiny_llama, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "data.jsonl").write_text('{"prompt": "Why?", "completion": "So."}\n' * 9)
    arguments = ("--model", tiny_llama, "--data", tmp_path / "data.jsonl", "--run-dir=~/runs/a", "--dry-run", "--json")
    assert json.loads(rlhf("sft", *arguments).stdout)["run_dir"] == str(tmp_path / "home/runs/a")
