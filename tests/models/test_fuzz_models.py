"""A fixed share of the damaged models of `benchmarks/fuzz_models.py`: no traceback and no wrong artifact."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from tests.scripts import load_script

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "fuzz_models.py"


@pytest.mark.slow
def test_damaged_models_are_refused_or_right(tmp_path):
    fuzz = load_script(SCRIPT)
    fuzz.make_models(tmp_path)
    counts: Counter[str] = Counter()
    for number in range(25):
        case = fuzz.make_case(tmp_path, number, seed=0)
        outcome, said = fuzz.outcome_of(case, tmp_path)
        assert outcome not in fuzz.FAULTS, f"{case}: {said}"
        counts[outcome] += 1
    assert counts["right"] >= 3
    assert counts["refused before the run"] >= 8
