"""`benchmarks/generate.py` on tiny shapes."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest
import torch

BENCHMARK = Path(__file__).resolve().parents[2] / "benchmarks" / "generate.py"


def test_the_benchmark_checks_both_sides_and_measures(capsys, tmp_path):
    benchmark = runpy.run_path(str(BENCHMARK))
    benchmark["main"](["--smoke", "--device", "cpu", "--plot", str(tmp_path / "plot.png")])
    said = capsys.readouterr().out
    assert "greedy: 2 of 2 completions equal" in said
    for part in ("sampled: chi-square", "ours:", "generate:", "ratio:", "apart from attention"):
        assert part in said
    assert (tmp_path / "plot.png").stat().st_size > 1000


def test_chi_square_sees_other_probabilities():
    chi_square = runpy.run_path(str(BENCHMARK))["_chi_square"]
    probabilities = torch.tensor([0.5, 0.3, 0.2])
    tokens = [0] * 500 + [1] * 300 + [2] * 200
    assert chi_square(tokens, probabilities) == (pytest.approx(0.0, abs=1e-3), 2)
    found, freedom = chi_square([0] * 300 + [1] * 300 + [2] * 400, probabilities)
    assert found > 100 * freedom
