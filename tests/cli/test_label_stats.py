"""`rlhf label stats` through the real command: what it reads, prints and draws."""

from __future__ import annotations

import json
import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from rlhf_cli.errors import DataError
from rlhf_cli.labeling.label_records import write_labels
from rlhf_cli.labeling.statistics.source import labels_to_count
from rlhf_cli.labeling.statistics.summary import statistics
from tests.labeling.crowd import Person, crowd

HOSTILE = "b\x1b[31med\x1b]0;owned\x07\nline\u202e"
PEOPLE = [Person("ana", tie=0.2), Person(HOSTILE, noise=1.5), Person("a-very-long-name-of-an-annotator@example.com")]


@pytest.fixture(scope="module")
def labels_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """120 labels by three people, one of whom has a name with control characters."""
    file = tmp_path_factory.mktemp("labels") / "labels.jsonl"
    labels = crowd(PEOPLE, items=60, gold=4, seed=3)
    flagged = replace(labels[0], item="odd", prompt="odd", outcome="flagged", tiers=(), reason="\x1b[2Jprivate")
    write_labels(file, [*labels, flagged])
    return file


def test_tables_fit_80_columns_without_frames_colors_or_what_strangers_wrote_for_terminals(rlhf, labels_file):
    result = rlhf("label", "stats", labels_file)
    lines = result.stdout.splitlines()
    assert max(map(len, lines)) <= 80
    assert all(line == line.rstrip() for line in lines)
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u2500-\u257f\u202e]", result.stdout)
    assert "bed line" in result.stdout
    assert "private (1)" in result.stdout
    assert "120 labels by 3 annotators: 60 prompts, 60 of them ranked by two or more" in lines[0]
    for words in ("same winner, ties excluded", "InstructGPT 72.6%", "linear kappa", "earlier shown wins"):
        assert words in result.stdout
    assert lines[-1].endswith("`rlhf label export` writes them for other tools") or "next: " in lines[-2]
    assert result.stderr == ""


def test_one_newcomer_reads_what_each_number_means_in_units_that_fit(rlhf, tmp_path):
    """Thirty quick labels and a hidden repeat, as a first run has them."""
    labels = [
        replace(one, active_seconds=0.4) for one in crowd([Person("ana")], items=30, overlap=1, repeats=0.3, seed=1)
    ]
    repeats = [label for label in labels if label.purpose == "repeat"][:1]
    labels = [*(label for label in labels if label.purpose == "label"), *repeats]
    write_labels(tmp_path / "labels.jsonl", labels)
    lines = rlhf("label", "stats", tmp_path / "labels.jsonl").stdout.splitlines()
    assert max(map(len, lines)) <= 80
    assert lines[0] == "30 labels by 1 annotator: 30 prompts, none ranked by two"
    assert lines[1] == f"also: {len(repeats)} hidden repeat"
    text = " ".join(" ".join(lines).split())
    assert "median time 0.4 s half of them took 0.4 s to 0.4 s" in text
    assert "Hidden repeats, shown in reverse order, got the same verdict as before." in text
    assert "agreement - no item was ranked by two annotators Whether others would decide alike." in text
    assert "0.4 (0.4-0.4)" in text
    for column in ("with others", "among others", "linear kappa", "0.0 hours"):
        assert column not in text, "nothing is known of it"
    assert "next: read the warnings above" in text


def test_json_is_one_object_with_everything(rlhf, labels_file):
    found = json.loads(rlhf("label", "stats", labels_file, "--json").stdout)
    assert found == json.loads(json.dumps(statistics(labels_to_count(labels_file)[0], seed=0).to_json()))
    assert found["counts"]["ordinary"] == 120
    assert found["counts"]["flagged"] == 1
    assert found["agreement"]["with_ties"]["count"] == 360
    assert {person["name"] for person in found["annotators"]} == {person.name for person in PEOPLE}
    assert found["references"][1] == {
        "project": "InstructGPT",
        "agreement": 0.726,
        "of": "annotators with one another, K = 4 to 9, +- 0.015 (Ouyang et al. 2022)",
    }


def test_a_plot_is_drawn(rlhf, labels_file, tmp_path):
    pytest.importorskip("matplotlib")
    result = rlhf("label", "stats", labels_file, "--plot", tmp_path / "labels.png", "--json")
    assert (tmp_path / "labels.png").read_bytes().startswith(b"\x89PNG")
    assert "labels.png" in result.stderr
    json.loads(result.stdout)
    wrong = rlhf("label", "stats", labels_file, "--plot", tmp_path / "none" / "labels.png", code=2)
    assert "is not a folder" in wrong.stderr
    assert "must end in .png" in rlhf("label", "stats", labels_file, "--plot", "labels.txt", code=2).stderr


def test_a_plot_without_matplotlib_is_refused_before_any_work(rlhf, labels_file, tmp_path):
    (tmp_path / "hidden").mkdir()
    (tmp_path / "hidden" / "matplotlib.py").write_text("raise ImportError('hidden')\n")
    env = {"PYTHONPATH": str(tmp_path / "hidden")}
    result = rlhf("label", "stats", labels_file, "--plot", "labels.png", code=2, env=env)
    assert "pip install 'rlhf-cli[plots]'" in result.stderr
    assert result.stdout == ""


def test_reports_of_little_or_nothing_are_drawn_too(tmp_path):
    pytest.importorskip("matplotlib")
    from rlhf_cli.labeling.statistics.plot import draw_report

    before = set(sys.modules)
    plain = replace(crowd([Person("$a_1$")], items=1, overlap=1, completions=2)[0], shown=(), active_seconds=None)
    for number, labels in enumerate(([], [plain], crowd([Person(f"p{n:02}") for n in range(24)], items=48))):
        path = tmp_path / f"{number}.svg"
        draw_report(statistics(labels, seed=0), path, title="labels of $x_1$")
        assert path.stat().st_size > 5_000
    assert "matplotlib.pyplot" not in set(sys.modules) - before, "no window system is looked for"


def test_rankings_with_annotators_are_labels_without_order_and_time(rlhf, tmp_path):
    texts = ["good", "middling", "bad"]
    rows = []
    for number in range(12):
        for name, listed in (("ana", (0, 1, 2)), ("ben", (2, 0, 1))):  # files list completions as they please
            best_first = sorted(range(3), key=lambda place: listed[place])
            rows.append(
                {
                    "prompt": f"question {number}",
                    "completions": [texts[index] for index in listed],
                    "ranking": [[place] for place in best_first],
                    "annotator": name,
                }
            )
    rows.append(rows[0] | {"prompt": "nobody's"})
    del rows[-1]["annotator"]
    (tmp_path / "rankings.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    result = rlhf("label", "stats", "rankings.jsonl", "--json")
    found = json.loads(result.stdout)
    assert found["agreement"]["with_ties"]["value"] == 1.0
    assert found["agreement"]["with_ties"]["count"] == 36
    assert found["longer"]["value"] == pytest.approx(2 / 3)
    assert found["first_shown"]["value"] is None
    assert found["pace"] is None
    assert any("have no order of presentation" in sentence for sentence in found["unknown"])
    assert "1 of 25 rankings have no `annotator`" in result.stderr


def test_where_there_are_no_labels_it_says_so(rlhf, tmp_path, labels_file):
    assert "no labels found" in rlhf("label", "stats", "nowhere", code=65).stderr
    (tmp_path / "rankings.jsonl").write_text('{"prompt": "a", "completions": ["b", "c"], "ranking": [[0], [1]]}\n')
    assert "has an annotator" in rlhf("label", "stats", "rankings.jsonl", code=65).stderr
    (tmp_path / "labels.jsonl").write_text("")
    assert "is empty" in rlhf("label", "stats", "labels.jsonl", code=65).stderr


def test_a_run_directory_is_read_by_its_labels_and_else_by_its_rankings(tmp_path, labels_file):
    stage = tmp_path / "run" / "label"
    stage.mkdir(parents=True)
    row = {"prompt": "a", "completions": ["b", "c"], "ranking": [[0], [1]], "annotator": "ana"}
    (stage / "rankings.jsonl").write_text(json.dumps(row) + "\n")
    (label,), _ = labels_to_count(tmp_path / "run")
    assert (label.annotator, label.completions, label.tiers) == ("ana", ("b", "c"), ((0,), (1,)))
    (stage / "labels.jsonl").write_bytes(labels_file.read_bytes())
    assert len(labels_to_count(tmp_path / "run")[0]) > 120
    with pytest.raises(DataError, match="no labels found"):
        labels_to_count(tmp_path)
