"""The table of model families in docs/families.md is what the commands do today.

Each family goes through every stage, and plain transformers computes the same from what the stages wrote.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.conftest import byte_level_tokenizer
from tests.families.cells import cells_of
from tests.families.table import PAGE, STAGES, documented, table
from tests.families.zoo import FAMILIES


def test_the_page_has_a_row_for_every_family():
    assert list(documented(PAGE.read_text(encoding="utf-8"))) == sorted(FAMILIES)


def test_the_table_is_read_back_as_it_was_written():
    rows = {
        "a": dict(zip(STAGES, ("yes", "refused: it is an x", "yes", "n/a"), strict=True)),
        "b": dict(zip(STAGES, ("refused: no. Not at all", "refused: it is an x", "yes", "yes"), strict=True)),
    }
    rows["b"]["ppo"] = f"refused: it {'keeps its state in a cache of its own type, ' * 5}so no"
    assert max(map(len, table(rows).splitlines())) <= 120
    assert documented(table(rows)) == rows


@pytest.mark.slow
@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_a_family_does_what_the_page_says(family: str, tmp_path: Path):
    assert cells_of(family, byte_level_tokenizer(pad=True), tmp_path) == documented(PAGE.read_text("utf-8"))[family]
