"""The table of traps in docs/ppo.md is whole, and every test it names exists."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def rows() -> dict[int, list[str]]:
    """Trap -> tests named in its row."""
    text = (ROOT / "docs" / "ppo.md").read_text(encoding="utf-8")
    found = re.findall(r"^\| (\d+) \|(.*)\|$", text.split("## Traps")[1], flags=re.MULTILINE)
    return {int(number): re.findall(r"`(test_\w+)`", row) for number, row in found}


def test_every_trap_has_a_row_and_a_test():
    assert list(rows()) == list(range(1, 27))
    assert [number for number, tests in rows().items() if not tests] == []


def test_every_named_test_exists():
    defined = {
        name
        for path in (ROOT / "tests").rglob("test_*.py")
        for name in re.findall(r"^def (test_\w+)", path.read_text(encoding="utf-8"), flags=re.MULTILINE)
    }
    assert [name for tests in rows().values() for name in tests if name not in defined] == []
