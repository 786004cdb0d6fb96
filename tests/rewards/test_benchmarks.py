"""Benchmarks of reward models in their published columns; every metric is computed by hand."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from rlhf_cli.errors import DataError
from rlhf_cli.models.loading import ModelSource
from rlhf_cli.models.reward_model.files import save_reward_model
from rlhf_cli.models.reward_model.loading import load_reward_model, new_reward_model
from rlhf_cli.rewards.benchmarks.formats import read_benchmark
from rlhf_cli.rewards.benchmarks.run import score_benchmark
from rlhf_cli.rewards.benchmarks.scores import BenchmarkReport, benchmark_report

REWARDBENCH = [
    {"prompt": f"{subset} {n}", "chosen": f"c {won}", "rejected": "r 1", "subset": subset, "id": n}
    | {"chosen_model": "a", "rejected_model": "b"}
    for subset, wins in {
        "alpacaeval-easy": [2, 2, 2, 0],
        "mt-bench-med": [2, 0],
        "donotanswer": [2, 1],  # equal rewards are wrong
        "math-prm": [0],
        "hep-python": [2],
    }.items()
    for n, won in enumerate(wins)
]
BEST_OF_4 = [
    {
        "prompt": f"{subset} {n}",
        "chosen": [f"c {right}"],
        "rejected": ["r 1", "r 2", "r 3"],
        "num_correct": 1,
        "num_rejected": 3,
        "total_completions": 4,
        "subset": subset,
        "id": f"{n}",
    }
    for subset, rewards in {"Factuality": [4, 3, 2], "Math": [4, 4]}.items()  # 3 shares the highest reward
    for n, right in enumerate(rewards)
]
TIES = [
    # kind:number, rewards of the correct, rewards of the incorrect
    ("ref:0", [5], [2]),  # gap 3
    ("tied:0", [6, 5], [3, 1]),  # gap 2, spread 1
    ("ref:1", [4], [5]),  # gap -1
    ("tied:1", [9, 3], [2]),  # gap 1, spread 6
    ("ref:2", [5], [4.5]),  # gap 0.5
    ("tied:2", [6, 5], [2]),  # gap 3, spread 1
]
RM_BENCH = [
    # domain, rewards of the chosen styles, rewards of the rejected styles
    ("chat", [1, 2, 3], [0, 0, 0]),
    ("safety-refuse", [1, 2, 3], [1.5, 2.5, 3.5]),
    ("safety-response", [1, 2, 3], [4, 4, 4]),
]
JUDGEBENCH = [
    # source, label, reward of A, reward of B
    ("mmlu-pro-law", "A>B", 2, 1),
    ("mmlu-pro-math", "B>A", 2, 1),
    ("livebench-math", "B>A", 1, 2),
    ("livecodebench", "A>B", 1, 1),
]


def ties_rows():
    return [
        {"prompt": f"name a color {id}", "chosen": [f"c {reward}" for reward in right]}
        | {"rejected": [f"r {reward}" for reward in wrong], "num_correct": len(right), "subset": "Ties", "id": id}
        for id, right, wrong in TIES
    ]


def rm_bench_rows():
    return [
        {"id": n, "prompt": f"p {n}", "chosen": [f"c {r}" for r in right], "rejected": [f"r {r}" for r in wrong]}
        | {"domain": domain}
        for n, (domain, right, wrong) in enumerate(RM_BENCH)
    ]


def judgebench_rows():
    return [
        {"pair_id": f"{n}", "original_id": "1", "source": source, "question": f"q {n}", "response_model": "m"}
        | {"response_A": f"A {first}", "response_B": f"B {second}", "label": label}
        for n, (source, label, first, second) in enumerate(JUDGEBENCH)
    ]


def write(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def report_of(path: Path) -> BenchmarkReport:
    """The last word of a completion is its reward."""
    benchmark = read_benchmark(str(path))

    def rewards(texts):
        return [float(text.split()[-1]) for text in texts]

    return benchmark_report(benchmark, [(rewards(one.chosen), rewards(one.rejected)) for one in benchmark.items])


def values(report: BenchmarkReport) -> dict[str, float]:
    return {name: metric.value for name, metric in report.metrics.items()}


def test_rewardbench_weighs_subsets_as_published_and_sections_alike(tmp_path):
    report = report_of(write(tmp_path / "rewardbench.jsonl", REWARDBENCH))
    assert report.format == "rewardbench"
    chat = (100 * 3 / 4 + 40 * 1 / 2) / 140
    reasoning = (984 * 0 + 164 * 1) / (984 + 164)
    assert values(report) == pytest.approx(
        {"Chat": chat, "Safety": 0.5, "Reasoning": reasoning}
        | {"alpacaeval-easy": 0.75, "mt-bench-med": 0.5, "donotanswer": 0.5, "math-prm": 0.0, "hep-python": 1.0}
    )
    assert report.score.value == pytest.approx((chat + 0.5 + reasoning) / 3)
    assert report.score_is == "mean of 3 sections, without prior sets"
    assert report.rows == 10


def test_rows_of_other_subsets_have_the_accuracy_of_all_rows(tmp_path):
    rows = [row | {"subset": "mine"} for row in REWARDBENCH]
    report = report_of(write(tmp_path / "r.jsonl", rows))
    assert report.score.value == pytest.approx(6 / 10)
    assert values(report) == {"mine": pytest.approx(0.6)}


def test_rewardbench_2_takes_the_best_of_4_and_shares_an_equal_best(tmp_path):
    report = report_of(write(tmp_path / "r.jsonl", BEST_OF_4))
    assert report.format == "rewardbench-2"
    assert values(report) == pytest.approx({"Factuality": (1 + 1 / 2 + 0) / 3, "Math": 1.0})
    assert report.score.value == pytest.approx((0.5 + 1.0) / 2)


def test_ties_of_rewardbench_2(tmp_path):
    report = report_of(write(tmp_path / "r.jsonl", ties_rows()))
    found = values(report)
    # 0: gaps 3 and 2, both above the spread 1, m = 2. 1: gaps -1 and 1, spread 6, m = -1. 2: only the gap of the tied
    # row is above the spread 1, m = 0.5.
    margin = (math.tanh(2 / 1 - 1) + math.tanh(-1 / 6 - 1) + math.tanh(0.5 / 1 - 1)) / 3
    assert found.pop("Ties") == pytest.approx(0.3 * 1.0 + 0.3 * 2 / 3 + 0.2 * 2 / 3 + 0.2 * 1 / 3 + 0.01 * margin)
    assert found == pytest.approx(
        {
            "Ties: tied accuracy": 1.0,
            "Ties: reference accuracy": 2 / 3,
            "Ties: gap above spread": 2 / 3,
            "Ties: both gaps above spread": 1 / 3,
        }
    )
    assert report.score.prompts == 3, "a `ref` row and its `tied` row are one observation"


@pytest.mark.parametrize(
    ("right", "wrong", "margin"),
    [([5, 5], [5], 0.0), ([5, 5], [4], 1.0), ([5, 5], [6], -1.0)],
    ids=["0 / 0", "no spread, right", "no spread, wrong"],
)
def test_a_spread_of_0_in_ties(right, wrong, margin, tmp_path):
    rows = [{"prompt": "p", "chosen": ["c 9"], "rejected": ["r 0"], "num_correct": 1, "subset": "Ties", "id": "ref:7"}]
    rows += [{"prompt": "q", "chosen": [f"c {r}" for r in right], "rejected": [f"r {r}" for r in wrong]}]
    rows[1] |= {"num_correct": 2, "subset": "Ties", "id": "tied:7"}
    expected = 0.3 * (margin > 0) + 0.3 + 0.4 * (margin > 0) + 0.01 * margin
    assert report_of(write(tmp_path / "r.jsonl", rows)).score.value == pytest.approx(expected)


def test_ties_are_one_subset_beside_the_others(tmp_path):
    ties = report_of(write(tmp_path / "t.jsonl", ties_rows())).score.value
    report = report_of(write(tmp_path / "r.jsonl", BEST_OF_4 + ties_rows()))
    assert report.score.value == pytest.approx((0.5 + 1.0 + ties) / 3)
    assert report.score_is == "mean of 3 subsets"


def test_rm_bench_compares_styles_and_averages_domains(tmp_path):
    report = report_of(write(tmp_path / "r.jsonl", rm_bench_rows()))
    assert report.format == "rm-bench"
    # chat: all won. safety-refuse: chosen 1, 2, 3 against 1.5, 2.5, 3.5: 2 > 1.5, 3 > 1.5, 3 > 2.5 (easy), others lost.
    # safety-response: all lost. The two make one domain.
    easy, normal, hard = (1 + 1 / 2) / 2, (1 + 0) / 2, (1 + 0) / 2
    assert values(report) == pytest.approx(
        {"easy": easy, "normal": normal, "hard": hard, "chat": 1.0, "safety": (3 / 9 + 0) / 2}
    )
    assert report.score.value == pytest.approx((easy + normal + hard) / 3) == pytest.approx((1 + 1 / 6) / 2)


def test_judgebench_follows_its_labels_by_source(tmp_path):
    report = report_of(write(tmp_path / "r.jsonl", judgebench_rows()))
    assert report.format == "judgebench"
    assert values(report) == {"knowledge": 0.5, "math": 1.0, "coding": 0.0}
    assert report.score.value == 0.5


def test_every_figure_has_an_interval_and_the_report_is_json(tmp_path):
    for rows in (REWARDBENCH, BEST_OF_4 + ties_rows(), rm_bench_rows(), judgebench_rows()):
        written = json.loads(json.dumps(report_of(write(tmp_path / "r.jsonl", rows)).to_json(), allow_nan=False))
        for metric in (written["score"], *written["metrics"].values()):
            assert 0 <= metric["low"] <= metric["value"] <= metric["high"] <= 1
            assert metric["high"] > metric["low"]


def test_the_samples_we_ship_are_recognized():
    samples = Path(__file__).resolve().parents[2] / "data_samples" / "formats"
    assert read_benchmark(str(samples / "rewardbench.jsonl")).format == "rewardbench"


ROW = {"prompt": "p", "chosen": ["c 1"], "rejected": ["r 1"], "num_correct": 1, "subset": "Ties", "id": "tied:1"}


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"prompt": "p", "completion": "c"}], "no benchmark has these columns: `prompt`, `completion`"),
        ([{"prompt": "p", "chosen": "c", "rejected": "r"}], "no benchmark has these columns"),
        ([REWARDBENCH[0], BEST_OF_4[0]], "r.jsonl:2: this row is in the format of rewardbench-2"),
        ([BEST_OF_4[0] | {"chosen": ["a", "b"]}], "`chosen` has 2 completions; rows of subset `Factuality` have one"),
        ([BEST_OF_4[0] | {"chosen": []}], "`chosen` is []"),
        ([ROW], "a `tied` row of the Ties subset has several correct completions"),
        ([ROW | {"id": "7"}], '`id` is "7"; the Ties subset has `ref:N` and `tied:N`'),
        ([ROW | {"id": "ref:1"}] * 2, "r.jsonl:2: `id` is `ref:1`, as at"),
        ([ROW | {"id": "ref:1"}], "no pair of rows `ref:N` and `tied:N`"),
        ([rm_bench_rows()[0] | {"chosen": ["a 1", "b 2"]}], "`chosen` has 2 and `rejected` 3 completions"),
        ([judgebench_rows()[0] | {"label": "A=B"}], '`label` is "A=B"'),
        ([judgebench_rows()[0] | {"response_A": None}], "`response_A` is null"),
    ],
)
def test_what_is_no_benchmark_is_an_error_that_says_where(rows, message, tmp_path):
    with pytest.raises(DataError) as caught:
        report_of(write(tmp_path / "r.jsonl", rows))
    assert message in caught.value.message


@pytest.mark.slow
def test_the_real_command(rlhf, tiny_llama, tmp_path):
    reward_model = new_reward_model(ModelSource(str(tiny_llama)), template=None, lora=None, seed=3)
    (tmp_path / "rm").mkdir()
    save_reward_model(reward_model, tmp_path / "rm")
    files = {"rb": REWARDBENCH, "rb2": BEST_OF_4 + ties_rows(), "rmb": rm_bench_rows(), "jb": judgebench_rows()}
    names = [str(write(tmp_path / f"{name}.jsonl", rows)) for name, rows in files.items()]
    found = json.loads(rlhf("benchmark-rm", "rm", *names, "--json", "--out", "scores.json").stdout)
    assert json.loads((tmp_path / "scores.json").read_text()) == found
    assert [one["benchmark"] for one in found["benchmarks"]] == [
        "rewardbench",
        "rewardbench-2",
        "rm-bench",
        "judgebench",
    ]
    loaded = load_reward_model(ModelSource(str(tmp_path / "rm")), template=None)
    for one, name in zip(found["benchmarks"], names, strict=True):
        benchmark = read_benchmark(name)
        expected = benchmark_report(benchmark, score_benchmark(loaded, benchmark, batch_size=5))
        assert one["score"]["value"] == pytest.approx(expected.score.value)
    lines = rlhf("benchmark-rm", "rm", names[3]).stdout.splitlines()
    assert lines[0].endswith("jb.jsonl: judgebench, 4 rows; score: accuracy on all pairs")
    assert lines[1].split()[0] == "score"
    refused = rlhf("benchmark-rm", tiny_llama, names[0], code=65)
    assert "has no reward head" in refused.stderr
