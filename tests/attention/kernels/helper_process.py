"""A program that answers lines of stdin with lines of JSON, so that Triton's mode is its own and it starts once."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def answers_of(program: str, environment: dict[str, str], *arguments: str) -> Iterator[Callable[[str], dict]]:
    """Ask a program, by its path from this folder, which finds nothing that others compiled."""
    command = [sys.executable, str(Path(__file__).parent / program), *arguments]
    with (
        tempfile.TemporaryDirectory() as cache,
        tempfile.TemporaryFile("w+") as log,
        subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            env=environment | {"TRITON_CACHE_DIR": cache},
        ) as process,
    ):
        stdin, stdout = process.stdin, process.stdout
        assert stdin is not None
        assert stdout is not None

        def ask(question: str) -> dict:
            stdin.write(f"{question}\n")
            stdin.flush()
            line = stdout.readline()
            if not line:
                process.wait()
                log.seek(0)
                raise AssertionError(f"{program} ended on `{question}`: {log.read()[-3000:]}")
            return json.loads(line)

        yield ask
        stdin.close()
