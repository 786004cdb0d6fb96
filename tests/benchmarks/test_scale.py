"""The tables of docs/scale.md are those that benchmarks/scale.py makes."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.scripts import load_script

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "scale.py"


@pytest.fixture(scope="module")
def scale():
    return load_script(SCRIPT)


def test_the_page_has_the_tables_of_now(scale):
    page = scale.PAGE.read_text(encoding="utf-8")
    for name, table in scale.tables().items():
        assert f"<!-- table: {name} -->\n{table}\n<!-- end -->" in page, "run `python benchmarks/scale.py --write`"
    assert scale.with_tables(page) == page


def test_a_cell_is_what_is_computed_by_hand(scale):
    """All weights of Llama 3.1 8B on 8 H100: 60 GB per GPU, while it draws.

    Weights: 32 layers of 2 x 4,096 x 4,096 + 2 x 4,096 x 1,024 (attention), 3 x 4,096 x 14,336 (feed-forward) and
    2 x 4,096 (norms) are 32 x 218,112,000 = 6,979,584,000. Two matrices of 128,256 x 4,096 are 1,050,673,152, and the
    last norm is 4,096: n = 8,030,261,248.

    Bytes: an eighth of policy, critic and reference (4 each), reward model (2) and two moments of policy and critic
    (16) is 30 n / 8 = 30,113,479,680. The policy in bfloat16, whole: 2 n = 16,060,522,496. Each GPU draws 64 rows at
    once of 512 / 8; keys and values in bfloat16: 2 x 64 x 1,536 tokens x 1,024 x (32 + 1 layers) x 2 bytes =
    13,287,555,072. Logits: 64 x 128,256 x 28 bytes = 229,834,752. Together 59,691,392,000.
    """
    page = scale.PAGE.read_text(encoding="utf-8")
    table = page.partition("<!-- table: h100 -->")[2].partition("<!-- end -->")[0]
    row = next(line for line in table.splitlines() if line.startswith("| 8B | 8 |"))
    assert row.split("|")[3].strip() == f"{59_691_392_000 / 1e9:.0f}" == "60"


def test_tables_that_changed_are_replaced_and_the_rest_stays(scale):
    tables = scale.tables()
    page = "".join(f"a\n<!-- table: {name} -->\nold\n<!-- end -->\nb\n" for name in tables)
    expected = "".join(f"a\n<!-- table: {name} -->\n{table}\n<!-- end -->\nb\n" for name, table in tables.items())
    assert scale.with_tables(page) == expected
    assert scale.with_tables(page.replace("old\n", "")) == expected


def test_the_settings_of_the_step_are_those_of_the_page(scale):
    page = scale.PAGE.read_text(encoding="utf-8")
    for setting, value in scale.STEP.items():
        if setting != "steps":
            assert f"{setting}: {str(value).lower()}" in page
