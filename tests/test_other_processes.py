"""Whether other processes take processor time from a measurement, and that this one is not among them."""

from __future__ import annotations

from collections import namedtuple
from types import SimpleNamespace

import pytest

from rlhf_cli import other_processes
from rlhf_cli.other_processes import ProcessorUse

Times = namedtuple("Times", ["user", "nice", "system", "idle"])


@pytest.mark.parametrize(
    ("own", "others", "expected"),
    [
        pytest.param(20.0, 0.0, None, id="this process alone"),
        pytest.param(10.0, 0.0, None, id="one core is idle"),
        pytest.param(10.0, 10.0, "used 1.0 of 2 processor cores", id="both share the machine"),
        pytest.param(4.0, 16.0, "used 1.6 of 2 processor cores", id="others take most"),
        pytest.param(19.0, 1.0, None, id="others hardly count"),
        pytest.param(5.0, 8.0, None, id="there is room for more"),
    ],
)
def test_others_are_named_where_they_take_time_from_this_process(own, others, expected, monkeypatch):
    """Ten seconds on two cores."""
    now, used = [0.0], [0.0, 0.0]
    monkeypatch.setattr(other_processes.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(other_processes.psutil, "cpu_count", lambda: 2)
    monkeypatch.setattr(other_processes.psutil, "cpu_times", lambda: Times(100 + used[0], used[1], 5.0, 20 * now[0]))
    own_times = lambda: SimpleNamespace(user=used[0], system=0.0, children_user=0.0, children_system=0.0)  # noqa: E731
    monkeypatch.setattr(other_processes.os, "times", own_times)
    use = ProcessorUse()
    now[0], used[:] = 10.0, [own, others]
    said = use.others()
    assert said is None if expected is None else expected in said
