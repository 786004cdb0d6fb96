"""The metrics log: what stands in it, and what a resumed run finds of it, whatever happened to the file."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from rlhf_cli.training.monitoring.metrics_log import BINS, MetricsLog, histogram_of, read_rows
from rlhf_cli.training.monitoring.step_lines import StepLines


def written(path: Path, steps: int) -> dict:
    """Position behind `steps` steps of a file that goes on for two more."""
    with MetricsLog(path) as log:
        for step in range(1, steps + 1):
            log.write(step, {"loss": 1.0 / step}, {"length": [step, step + 1]})
        position = log.position()
        for step in (steps + 1, steps + 2):
            log.write(step, {"loss": 1.0 / step})
    return position


def test_a_line_a_step_and_figures_that_are_not_finite_are_null(tmp_path):
    with MetricsLog(tmp_path / "metrics.jsonl") as log:
        log.write(1, {"loss": 0.5, "accuracy": math.nan, "norm": -math.inf, "steps": 3})
    text = (tmp_path / "metrics.jsonl").read_text()
    assert text == '{"step": 1, "loss": 0.5, "accuracy": null, "norm": null, "steps": 3}\n'


def test_histograms_stand_under_a_key_of_their_own(tmp_path):
    with MetricsLog(tmp_path / "metrics.jsonl") as log:
        log.write(1, {"length/mean": 2.0}, {"length": [1, 2, 2, 3], "reward": []})
    (row,) = read_rows(tmp_path / "metrics.jsonl")
    assert row["histograms"] == {
        "length": {"edges": [0.5, 1.5, 2.5, 3.5], "counts": [1, 2, 1]},
        "reward": {"edges": [], "counts": []},
    }


@pytest.mark.parametrize(
    ("values", "edges", "counts", "non_finite"),
    [
        pytest.param([], (), (), 0, id="nothing"),
        pytest.param([math.nan, math.inf], (), (), 2, id="nothing finite"),
        pytest.param([3.0, 3.0], (2.5, 3.5), (2,), 0, id="all alike"),
        pytest.param([5, math.nan, 7], (4.5, 5.5, 6.5, 7.5), (1, 0, 1), 1, id="whole numbers, one not finite"),
        pytest.param([-1e308, 1e308], (-1e308, 0.0, 1e308), (1, 1), 0, id="a range that overflows"),
        pytest.param([1e17, 1e17], (1e17 - 1e11, 1e17 + 1e11), (2,), 0, id="alike, and floats are far apart"),
    ],
)
def test_histograms_of_odd_data(values, edges, counts, non_finite):
    found = histogram_of(values)
    assert (found.edges, found.counts, found.non_finite) == (edges, counts, non_finite)


@pytest.mark.parametrize("values", [[0.001 * n**2 for n in range(100)], [float(n) for n in range(1000)], [0.1, 0.3]])
def test_every_value_is_in_the_bin_whose_edges_hold_it(values):
    found = histogram_of(values)
    edges, bins = found.edges, len(found.counts)
    assert bins <= BINS
    assert len(edges) == bins + 1
    assert list(edges) == sorted(set(edges))
    for number, count in enumerate(found.counts):
        last = number == bins - 1
        assert count == sum(edges[number] <= v < edges[number + 1] or (last and v == edges[-1]) for v in values)
    assert sum(found.counts) == len(values)
    assert found.total == pytest.approx(sum(values))
    assert found.squares == pytest.approx(sum(v * v for v in values))


def test_a_histogram_of_whole_numbers_is_no_comb():
    assert set(histogram_of(list(range(1, 65))).counts) == {4}
    assert set(histogram_of(list(range(1, 51))).counts[:-1]) == {4}  # 50 = 12 x 4 + 2


def test_a_run_goes_on_behind_the_step_it_resumes_from(tmp_path):
    path = tmp_path / "metrics.jsonl"
    written(path, 3)
    with MetricsLog(path, after_step=3) as log:
        log.write(4, {"loss": 9.0})
    assert [(row["step"], row["loss"]) for row in read_rows(path)] == [(1, 1.0), (2, 0.5), (3, 1 / 3), (4, 9.0)]


def test_a_position_gives_back_exactly_the_bytes_it_knew(tmp_path, capsys):
    path = tmp_path / "metrics.jsonl"
    position = written(path, 3)
    whole = path.read_bytes()
    assert json.loads(json.dumps(position)) == position  # a checkpoint holds it as JSON
    with MetricsLog(path, after_step=3, position=position) as log:
        assert log.position() == position
        assert path.read_bytes() == whole[: position["bytes"]]
        log.write(4, {"loss": 0.25})
        log.write(5, {"loss": 0.2})
    assert path.read_bytes() == whole
    assert capsys.readouterr().err == ""


def test_a_line_torn_by_a_kill_is_dropped_without_a_word(tmp_path, capsys):
    path = tmp_path / "metrics.jsonl"
    position = written(path, 3)
    with path.open("a") as file:
        file.write('{"step": 6, "lo')
    for resumed in (None, position):
        with MetricsLog(path, after_step=3, position=resumed):
            assert [row["step"] for row in read_rows(path)] == [1, 2, 3]
    assert capsys.readouterr().err == ""


def flip_a_bit(content: bytes) -> bytes:
    place = content.index(b'"loss": 0.5') + 8  # of step 2; 0 becomes a letter
    return content[:place] + bytes([content[place] ^ 0x40]) + content[place + 1 :]


def change_a_figure(content: bytes) -> bytes:
    return content.replace(b'"loss": 0.5', b'"loss": 0.7', 1)


def truncate(content: bytes) -> bytes:
    return content[: content.index(b'{"step": 3') + 12]


def spoil_the_encoding(content: bytes) -> bytes:
    return content.replace(b"loss", b"l\xffss", 1)


@pytest.mark.parametrize(
    ("damage", "kept"),
    [
        pytest.param(flip_a_bit, [1, 3], id="a bit flipped"),
        pytest.param(change_a_figure, [1, 2, 3], id="a figure changed"),
        pytest.param(truncate, [1, 2], id="truncated"),
        pytest.param(spoil_the_encoding, [2, 3], id="not UTF-8"),
        pytest.param(lambda content: b"\0" * len(content), [], id="zeros"),
        pytest.param(lambda content: b"[1]\n42\n{}\n" + content, [1, 2, 3], id="lines that are no rows"),
        pytest.param(lambda content: content[content.index(b"\n") + 1 :] + content, [2, 3], id="lines out of order"),
        pytest.param(None, [], id="missing"),
    ],
)
def test_a_damaged_file_is_named_and_what_can_be_read_stays(tmp_path, capsys, damage, kept):
    path = tmp_path / "metrics.jsonl"
    position = written(path, 3)
    if damage is None:
        path.unlink()
    else:
        path.write_bytes(damage(path.read_bytes()[: position["bytes"]]))
    with MetricsLog(path, after_step=3, position=position) as log:
        log.write(4, {"loss": 0.25})
        assert log.position()["bytes"] == path.stat().st_size
    assert [row["step"] for row in read_rows(path)] == [*kept, 4]
    said = capsys.readouterr().err
    assert said.count("warning:") == 1
    assert str(path) in said


def test_without_a_position_unreadable_lines_are_counted(tmp_path, capsys):
    path = tmp_path / "metrics.jsonl"
    written(path, 3)
    path.write_bytes(spoil_the_encoding(path.read_bytes()))
    MetricsLog(path, after_step=3).close()
    assert [row["step"] for row in read_rows(path)] == [2, 3]
    assert f"{path}: 1 line cannot be read" in capsys.readouterr().err


def test_text_with_line_ends_of_unicode_stays_on_one_line(tmp_path):
    lines = StepLines(tmp_path / "samples.jsonl", sparse=True)
    lines.append({"step": 1, "answer": "a\u2028b\x85c\nd \ud800 é"})
    lines.close()
    (line,) = (tmp_path / "samples.jsonl").read_text(encoding="utf-8").splitlines()
    assert json.loads(line)["answer"] == "a\u2028b\x85c\nd ? é"


@pytest.mark.parametrize(
    "content", [b"", b'{"step": 1, "loss": 1.0}\n', b'{"step": 1, "loss": 1.0}\n{"step": 2, "lo', None]
)
def test_metrics_of_a_step_whose_line_is_lost_get_a_line(content, tmp_path):
    path = tmp_path / "metrics.jsonl"
    log = MetricsLog(path)
    log.write(1, {"loss": 1.0})
    log.write(2, {"loss": 0.5})
    if content is None:
        path.unlink()
    else:
        path.write_bytes(content)
    log.amend(2, {"eval/loss": 0.7})
    log.write(3, {"loss": 0.2})
    position = log.position()
    log.close()
    before = [{"step": 1, "loss": 1.0}] if content else []
    assert read_rows(path) == [*before, {"step": 2, "eval/loss": 0.7}, {"step": 3, "loss": 0.2}]
    assert position["bytes"] == path.stat().st_size


def test_an_exception_leaves_the_log_closed_and_whole(tmp_path):
    log = MetricsLog(tmp_path / "metrics.jsonl")

    def train() -> None:
        with log:
            log.write(1, {"loss": 1.0})
            raise KeyError

    with pytest.raises(KeyError):
        train()
    with pytest.raises(ValueError, match="closed"):
        log.write(2, {"loss": 1.0})
    assert [row["step"] for row in read_rows(tmp_path / "metrics.jsonl")] == [1]
