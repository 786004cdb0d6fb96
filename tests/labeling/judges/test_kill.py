"""A real process, killed in the middle: verdicts that came are never asked for, or paid for, again."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

IN_FLIGHT = 4


def test_a_kill_and_a_rerun_and_force_repeat_no_paid_call(endpoint, rlhf, tmp_path):
    rows = [{"prompt": f"why {n}?", "chosen": "because it is so", "rejected": "no"} for n in range(40)]
    (tmp_path / "items.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    judge = f"{{url: '{endpoint.url}', name: judge, concurrency: {IN_FLIGHT}, prompt_price: 1.0}}"
    arguments = ["label", "--by", "judge", "--items", "items.jsonl", "--set", f"label.judge.panel=[{judge}]"]
    arguments += ["--run-dir", "run"]
    endpoint.delay = 0.1
    command = [str(Path(sys.executable).with_name("rlhf")), *arguments]
    process = subprocess.Popen(command, cwd=tmp_path, env=os.environ | {"CI": "1"}, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while len(endpoint.requests) < 30:
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    killed = len(endpoint.requests)
    assert killed < 60

    endpoint.delay = 0.0
    done = json.loads(rlhf(*arguments, "--json").stdout)
    asked = Counter(json.dumps(request) for request in endpoint.requests)
    assert len(asked) == 80
    assert max(asked.values()) <= 2
    assert sum(count - 1 for count in asked.values()) <= IN_FLIGHT, "those in flight, whose replies nobody heard"
    assert done["stages"][0]["metrics"]["judge/accuracy"] == 1.0
    report = json.loads((tmp_path / "run" / "label" / "judge.json").read_text())
    assert report["judges"][0]["replies_of_this_run"] == len(endpoint.requests) - killed

    before = len(endpoint.requests)
    rlhf(*arguments, "--force")
    assert len(endpoint.requests) == before
