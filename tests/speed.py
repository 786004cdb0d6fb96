"""What is slow: marks such tests, insists that all others start no process, and prints the seconds per folder."""

from __future__ import annotations

import gc
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

import pytest

TESTS = Path(__file__).parent

SLOW_PATHS = (
    "attention/kernels",  # Triton's interpreter
    "attention/test_groups.py",
    "attention/test_parity.py",
    "chat/test_conversation.py",
    "cli/test_commands.py",
    "cli/test_global_options.py",
    "cli/test_label_command.py",
    "cli/test_plan.py",
    "distributed",
    "end_to_end",
    "faults",
    "generation",
    "gpu",
    "invariants",
    "labeling/judges",
    "labeling/terminal/test_drawing.py",
    "labeling/terminal/test_pseudo_terminal.py",
    "labeling/test_completions.py",
    "labeling/test_exports.py",
    "labeling/test_session_stateful.py",
    "labeling/test_statistics_warnings.py",
    "labeling/web/test_browser.py",
    "labeling/web/test_browser_labels.py",
    "models",
    "pipeline",
    "real",
    "rewards/test_columns.py",
    "stages",
    "start",
    "statistics/test_kl.py",
    "statistics/test_seeds.py",
    "test_data_samples.py",
    "training/monitoring/test_detectors.py",
    "training/test_distributed.py",
    "training/test_loop.py",
    "training/test_micro_batches.py",
    "transformer/test_training.py",
)
"""Folders and files whose tests start processes, drive a browser, run stages, or take long on average. The others take
three minutes of one core: a minute and a half of two, and a quarter of a minute until they are collected."""
SLOW_FIXTURES = frozenset({"rlhf", "browser", "shared_data", "real_model"})
"""Fixtures that start a process in every test, or load real data and models."""

_PROCESS_EVENTS = ("subprocess.Popen", "os.fork", "os.forkpty", "os.posix_spawn")
_started: list[str] = []


def pytest_configure(config: pytest.Config) -> None:
    """Record every process that this one starts."""
    sys.addaudithook(_record)


def _record(event: str, arguments: tuple) -> None:
    # matplotlib lists the fonts of a machine that it has not seen before, once, whichever test plots first. A fork has
    # no arguments.
    if event in _PROCESS_EVENTS and arguments[:1] != ("fc-list",):
        _started.append(f"{event}{arguments[:2]}")


def _is_slow_path(path: Path) -> bool:
    name = path.relative_to(TESTS).as_posix() if path.is_relative_to(TESTS) else ""
    return any(name == slow or name.startswith(f"{slow}/") for slow in SLOW_PATHS)


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Do not import files of which `-m "not slow"` would run nothing."""
    return True if config.option.markexpr == "not slow" and _is_slow_path(collection_path) else None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark as slow what `SLOW_PATHS` and `SLOW_FIXTURES` name."""
    for item in items:
        is_real = item.get_closest_marker("real") is not None
        if _is_slow_path(item.path) or is_real or SLOW_FIXTURES & set(getattr(item, "fixturenames", ())):
            item.add_marker(pytest.mark.slow)


def pytest_collection_finish() -> None:
    """Take all that was imported out of garbage collection: stages collect between models, half a second each time."""
    gc.collect()
    gc.freeze()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    """Fail a test that starts a process without the mark `slow`; what fixtures start is not counted."""
    _started.clear()
    yield
    if _started and item.get_closest_marker("slow") is None:
        pytest.fail(f"starts a process ({_started[0][:200]}): mark it `@pytest.mark.slow`", pytrace=False)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print tests and seconds per folder, the slowest first; the processes of xdist report here too."""
    seconds: dict[str, float] = defaultdict(float)
    counts: dict[str, int] = defaultdict(int)
    for reports in terminalreporter.stats.values():
        for report in reports:
            if isinstance(report, pytest.TestReport):
                folder = str(PurePosixPath(report.nodeid.partition("::")[0]).parent)
                seconds[folder] += report.duration
                counts[folder] += report.when == "call"
    if len(seconds) < 2:
        return
    terminalreporter.write_sep("-", "seconds per folder")
    for folder, total in sorted(seconds.items(), key=lambda pair: -pair[1]):
        terminalreporter.write_line(f"{total:8.1f} s {counts[folder]:5d} tests  {folder}")
    terminalreporter.write_line(f"{sum(seconds.values()):8.1f} s {sum(counts.values()):5d} tests")
