"""The tables of docs/scale.md are those that benchmarks/scale.py makes."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "scale.py"


@pytest.fixture(scope="module")
def scale():
    spec = importlib.util.spec_from_file_location("scale", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look it up
    spec.loader.exec_module(module)
    return module


def test_the_page_has_the_tables_of_now(scale):
    page = scale.PAGE.read_text(encoding="utf-8")
    for name, table in scale.tables().items():
        assert f"<!-- table: {name} -->\n{table}\n<!-- end -->" in page, "run `python benchmarks/scale.py --write`"
    assert scale.with_tables(page) == page


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
