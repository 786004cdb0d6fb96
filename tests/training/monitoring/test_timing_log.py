"""Throughput by hand, totals over a run, and the table at the end of a stage."""

from __future__ import annotations

import pytest

from rlhf_cli.training.monitoring.metrics_log import MetricsLog
from rlhf_cli.training.monitoring.run_logger import RunLogger
from rlhf_cli.training.monitoring.step_lines import read_rows
from rlhf_cli.training.monitoring.timing_log import (
    PEOPLE,
    TIMING,
    Work,
    append_attempt,
    append_evaluation,
    read_totals,
    show_table,
    timing_row,
    totals,
)

SECONDS = {"rollout": 8.0, "scoring": 0.5, "passes": 1.5, "update": 10.0, "checkpoint": 3.0, "eval": 7.0, "step": 30.0}
WORK = {"rollout": Work(400, 1e6), "passes": Work(600, 4e6), "update": Work(1200, 15e6)}


def test_each_rate_is_an_amount_per_time():
    row = timing_row(SECONDS, WORK, episodes=16, peak=2e7)
    assert row["throughput/generated_tokens_per_second"] == 400 / 8
    assert row["throughput/tokens_per_second"] == 1200 / 10
    assert row["throughput/episodes_per_second"] == 16 / 20  # without checkpoint and evaluation
    assert row["throughput/mfu"] == pytest.approx((1e6 + 4e6 + 15e6) / (20 * 2e7))


def test_what_is_not_known_is_left_out():
    assert timing_row({"update": 2.0, "step": 2.0}) == {"time/update": 2.0, "time/step": 2.0}
    unknown = timing_row(SECONDS, WORK | {"passes": Work(600)}, peak=2e7)
    assert "throughput/mfu" not in unknown
    assert "throughput/mfu" not in timing_row(SECONDS, WORK)
    assert "throughput/episodes_per_second" not in unknown
    untold = timing_row({"rollout": 2.0, "step": 2.0}, {"rollout": Work(0)})
    assert "throughput/generated_tokens_per_second" not in untold


def test_totals_weigh_steps_by_their_time():
    rows = [
        {"step": 0, **timing_row({"eval": 5.0, "step": 5.0})},
        {"step": 1, **timing_row({"update": 1.0, "step": 1.0}, {"update": Work(100, 10.0)}, peak=20.0)},
        {"step": 2, **timing_row({"update": 3.0, "step": 3.0}, {"update": Work(100, 10.0)}, peak=20.0)},
    ]
    found = totals(rows)
    assert found["time/step"] == 9
    assert found["throughput/tokens_per_second"] == 200 / 4
    assert found["throughput/mfu"] == 20 / (4 * 20)


def test_the_file_has_a_line_per_step_and_trackers_get_times_and_rates(tmp_path):
    sent: list[tuple[int, dict[str, float]]] = []

    class Trackers:
        def begin(self, **_) -> None: ...
        def flush(self) -> None: ...
        def finish(self) -> None: ...
        def write(self, step, metrics, histograms) -> None:
            sent.append((step, dict(metrics)))

    log = RunLogger(tmp_path, after_step=-1, make=lambda path, **given: MetricsLog(path, trackers=Trackers(), **given))
    log.write(1, {"loss": 0.5})
    log.time(1, timing_row(SECONDS, WORK, peak=2e7))
    log.close()
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1, "loss": 0.5}\n'
    assert sent[0] == (1, {"loss": 0.5})
    assert sent[1][0] == 1
    assert set(sent[1][1]) == {f"time/{name}" for name in SECONDS} | {
        f"throughput/{name}" for name in ("tokens_per_second", "generated_tokens_per_second", "mfu")
    }
    append_evaluation(tmp_path, 1, {"eval": 2.0, "step": 2.0})
    assert read_totals(tmp_path)["time/eval"] == 9
    assert read_totals(tmp_path)["tokens/update"] == 1200


def test_the_table_says_where_the_time_went(capsys):
    show_table("ppo", totals([timing_row(SECONDS, WORK, episodes=16, peak=2e7)]), 40.0)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert max(map(len, captured.err.splitlines())) <= 80
    assert captured.err.splitlines() == [
        "ppo: where the time went    time  share  tokens/s    MFU",
        "sampling                   8.0 s    20%        50   0.6%",
        "forward passes             1.5 s     4%       400  13.3%",
        "updates                   10.0 s    25%       120   7.5%",
        "checkpoints                3.0 s     8%",
        "evaluation                 7.0 s    18%",
        "other                     10.5 s    26%",
        "whole stage               40.0 s   100%             5.0%",
    ]


def test_a_resumed_stage_is_as_long_as_its_steps(capsys):
    show_table("sft", {"time/update": 60.0, "time/eval": 30.0, "time/step": 95.0}, 40.0)
    lines = capsys.readouterr().err.splitlines()
    assert [line.split()[0] for line in lines] == ["sft:", "updates", "evaluation", "other", "whole"]
    assert lines[-1].split() == ["whole", "stage", "1", "min", "35", "s", "100%"]


def test_people_are_no_part_of_the_whole(capsys):
    show_table("label", {"time/rollout": 200.0, "time/step": 215.0, PEOPLE: 723.4, "tokens/rollout": 8200}, 1.0)
    assert capsys.readouterr().err.splitlines() == [
        "label: where the time went          time  share  tokens/s  MFU",
        "sampling                      3 min 20 s    93%        41",
        "other                             15.0 s     7%",
        "whole stage, without people   3 min 35 s   100%",
        "people, while active         12 min 03 s",
    ]


def test_attempts_of_a_stage_without_steps_add_up(tmp_path):
    append_attempt(tmp_path, {"time/rollout": 3.0, "time/step": 4.0, "tokens/rollout": 30})
    append_attempt(tmp_path, {"time/step": 2.5})
    assert [row["step"] for row in read_rows(tmp_path / TIMING)] == [1, 2]
    assert read_totals(tmp_path) == {
        "time/rollout": 3.0, "time/step": 6.5, "tokens/rollout": 30, "throughput/generated_tokens_per_second": 10.0,
    }  # fmt: skip


@pytest.mark.parametrize("timing", [{}, {"time/rollout": 0.0}, {"time/rollout": 0.1}])
def test_a_stage_without_phases_that_took_time_has_no_table(timing, capsys):
    show_table("label", timing, 40.0)
    assert capsys.readouterr().err == ""
