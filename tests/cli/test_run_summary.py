"""The summary at the end of a run repeats what puts the labels in doubt."""

from __future__ import annotations

import json

import pytest

from rlhf_cli.cli.run_summary import show_outcome
from rlhf_cli.labeling.statistics.summary import statistics
from rlhf_cli.labeling.warnings import write_warnings
from rlhf_cli.pipeline.runner import RunResult, StageResult
from tests.labeling.crowd import Person, crowd


@pytest.mark.parametrize("status", ["done", "cached"])
def test_warnings_about_labels_are_repeated(tmp_path, capsys, status):
    folder = tmp_path / "label"
    folder.mkdir()
    hasty = crowd([Person("ana", noise=0, first=100, seconds=1.5)], items=60, overlap=1)
    write_warnings(folder, statistics(hasty, seed=0).warnings)
    show_outcome(RunResult(tmp_path, [StageResult("label", status, "", folder, 1.0, {}, [], {})]))
    text = " ".join(capsys.readouterr().err.split())
    assert "warning: label: ana: favors the completion shown first" in text
    assert f"`rlhf label stats {tmp_path}` says what to do about these labels" in text
    assert "are by one annotator" not in text, "which puts nothing in doubt"


def test_warnings_about_judges_are_repeated(tmp_path, capsys):
    folder = tmp_path / "evaluate"
    folder.mkdir()
    warning = {"kind": "accuracy", "about": "judge-7b", "text": "is no better than chance", "advice": "use another"}
    warnings = [warning | {"is_doubt": True}, warning | {"is_doubt": False}]
    (folder / "judge.json").write_text(json.dumps({"warnings": warnings}))
    show_outcome(RunResult(tmp_path, [StageResult("evaluate", "done", "", folder, 1.0, {}, [], {})]))
    text = " ".join(capsys.readouterr().err.split())
    assert text.count("warning: evaluate: judge-7b: is no better than chance") == 1
    assert "label stats" not in text
