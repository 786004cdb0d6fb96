"""Options that take a number: what each command says about a value that is none."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any

import pytest
import typer
from pydantic import Field, TypeAdapter, ValidationError

from rlhf_cli.cli.app import COMMANDS, app
from rlhf_cli.cli.error_report import describe
from rlhf_cli.cli.option_values import refused_number

NUMBERS = {"N", "T", "P", "SHARE", "GBIT"}
"""What `--help` writes for the value of an option that is a number."""
STAGE = "stage"
"""Command of `rlhf label` that is meant without a name."""


def commands(found: Any, words: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Yield a command with the words that call it, and those below it."""
    yield words, found
    for name, one in getattr(found, "commands", {}).items():
        yield from commands(one, words if name == STAGE else (*words, name))


def numeric_options() -> list[tuple[str, ...]]:
    group: Any = typer.main.get_command(app)
    every = [pair for name in COMMANDS for pair in commands(group.get_command(None, name), (name,))]
    return [
        (*words, next(option for option in one.opts if option.startswith("--")))
        for words, command in every
        for one in command.params
        if one.metavar in NUMBERS and one.param_type_name == "option"
    ]


def test_options_of_numbers_are_found():
    found = set(numeric_options())
    assert {("run", "--processes"), ("ppo", "--seed"), ("chat", "--temperature"), ("plan", "--interconnect")} <= found
    assert {("label", "--overlap"), ("benchmark-rm", "--batch-size"), ("watch", "--port")} <= found


@pytest.mark.parametrize("words", numeric_options(), ids=" ".join)
def test_a_value_that_is_no_number_is_refused_in_our_words(words):
    try:
        app([*words, "two"], standalone_mode=False)
    except Exception as error:
        found = describe(error)
    else:
        pytest.fail("the value is accepted")
    assert found.exit_code == 2
    assert found.messages in [(f"`{words[-1]}` must be {kind}; got two",) for kind in ("a number", "a whole number")]


@pytest.mark.parametrize(
    ("value", "bounds", "said"),
    [
        ("0", {"ge": 1}, "at least 1"),
        ("9", {"le": 8}, "at most 8"),
        ("1.5", {}, "a whole number"),
        ("", {}, "a whole number"),
    ],
)
def test_bounds_are_named(value, bounds, said):
    """As recent versions of typer refuse values, and as earlier ones do, which use click."""
    click = pytest.importorskip("click")
    with pytest.raises(ValidationError) as caught:
        TypeAdapter(Annotated[int, Field(**bounds)]).validate_python(value)
    kind = click.IntRange(bounds.get("ge"), bounds.get("le")) if bounds else click.INT
    option = click.Option(["--size"], type=kind)
    with pytest.raises(click.BadParameter) as refused:
        kind.convert(value, option, None)
    error = click.BadParameter("", param=option)
    error.__cause__ = caught.value
    for one in (error, refused.value):
        assert refused_number(one) == f"`--size` must be {said}; got {value or 'nothing'}"
