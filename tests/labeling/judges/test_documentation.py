"""docs/judges.md: its recipe is one, its table names what the report holds."""

from __future__ import annotations

import json
import re
from pathlib import Path

from ruamel.yaml import YAML

from rlhf_cli.data.records import Candidates
from rlhf_cli.recipe.schema import Recipe

TEXT = (Path(__file__).resolve().parents[3] / "docs" / "judges.md").read_text(encoding="utf-8")


def test_the_recipe_is_one():
    (block,) = re.findall(r"```yaml\n(.*?)```", TEXT, flags=re.DOTALL)
    recipe = Recipe.model_validate(YAML(typ="safe").load(block))
    assert recipe.label is not None
    assert recipe.label.judge is not None
    assert len(recipe.label.judge.panel) == 2
    assert recipe.label.judge.max_cost == 5.0


def test_every_figure_of_the_table_is_in_the_report(endpoint, judged, report):
    judged([Candidates("why?", ("so", "so it is"), ((0,), (1,)))], panel=[{"url": endpoint.url, "name": "judge"}])
    said = json.dumps(report())
    table = TEXT[TEXT.index("| figure in `judge.json`") : TEXT.index("Most of these also give a warning")]
    named = re.findall(r"`([a-z_.]+)`", " ".join(line.split("|")[1] for line in table.splitlines()[2:] if line))
    assert len(named) > 10
    for name in named:
        for part in name.split(".") if not name.startswith("...") else []:
            assert f'"{part}"' in said, name


def test_what_is_said_to_be_sent_is_sent(endpoint, judged):
    judged([Candidates("why?", ("so", "so it is"))], panel=[{"url": endpoint.url, "name": "judge"}])
    fields = re.search(r'`\{"model", "messages": \[system, user\], "temperature": 0, "max_tokens"\}`', TEXT)
    assert fields is not None
    assert list(endpoint.requests[0]) == ["model", "messages", "temperature", "max_tokens"]
    assert [message["role"] for message in endpoint.requests[0]["messages"]] == ["system", "user"]


def test_exit_codes_are_those_of_the_errors():
    from rlhf_cli.errors import EXIT_COST, EXIT_DATA

    assert f"ends with exit code {EXIT_COST}" in TEXT.replace("\n", " ")
    assert f"ends with exit code {EXIT_DATA}" in TEXT.replace("\n", " ")
