"""`rlhf data`: look at data as the stages read it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, get_args

import typer

from rlhf_cli.cli.options import Json, Settings
from rlhf_cli.data.records import Kind

if TYPE_CHECKING:
    from rlhf_cli.data.chat_format import PromptFormat
    from rlhf_cli.data.preview import Limits
    from rlhf_cli.recipe.schema import Recipe

app = typer.Typer(rich_markup_mode=None, help="Show data as the stages read it.", no_args_is_help=True)

_KINDS = ", ".join(get_args(Kind))


@app.callback()
def data() -> None:
    """Show data as the stages read it."""


@app.command()
def preview(
    source: Annotated[str, typer.Argument(metavar="DATA", help="File, folder or hub data set.")],
    model: Annotated[str | None, typer.Option(metavar="MODEL", help="Model: a folder or hub id.")] = None,
    kind: Annotated[str, typer.Option(metavar="KIND", help=f"Kind of records: {_KINDS}.")] = "demonstration",
    template: Annotated[str | None, typer.Option(metavar="TEXT", help="Sets `data.prompt_template`.")] = None,
    count: Annotated[int, typer.Option(metavar="N", min=1, help="Number of records.")] = 3,
    recipe: Annotated[Path | None, typer.Option(metavar="RECIPE", help="Take the settings of a recipe.")] = None,
    settings: Settings = None,
    as_json: Json = False,
) -> None:
    """Show records as tokens: which are trained on, and what is skipped.

    Demonstrations are shown as SFT trains on them, prompts as the policy reads them, and rankings, preferences and
    candidates as a reward model reads them. The model's weights are not loaded.
    """
    from rlhf_cli.data.preview import preview_records

    loaded = _settings(source, model, kind, template, recipe, settings)
    prompt_format, limits = _reading(loaded, kind)
    records = preview_records(
        source,
        _kind(kind),
        prompt_format,
        limits,
        count=count,
        all_turns=loaded.sft is None or loaded.sft.assistant_turns == "all",
        columns=loaded.data.columns,
        comparison=loaded.data.comparison,
    )
    if as_json:
        shown = {"kind": kind, "model": loaded.model.path, "records": [record.to_json() for record in records]}
        typer.echo(json.dumps(shown, ensure_ascii=False, indent=2))
        return
    from rich.console import Console

    from rlhf_cli.data.preview_text import preview_text

    Console(highlight=False, emoji=False).print(preview_text(records))


def _kind(name: str) -> Kind:
    from rlhf_cli.errors import UsageError

    for kind in get_args(Kind):
        if kind == name:
            return kind
    raise UsageError(f"`--kind {name}`: unknown kind of records", hint=f"kinds are {_KINDS}")


def _settings(
    source: str, model: str | None, kind: str, template: str | None, recipe: Path | None, settings: list[str] | None
) -> Recipe:
    """Return the settings of a recipe with those of the command, and the section of the stage that reads `kind`."""
    from rlhf_cli.errors import UsageError
    from rlhf_cli.recipe.loader import load_recipe
    from rlhf_cli.recipe.overrides import override

    section = {"demonstration": "sft.data", "prompt": "data.prompts"}.get(_kind(kind), "train_rm.data")
    given = [override(section, source, source)]
    if model is not None:
        given.append(override("model.path", model, f"--model {model}"))
    if template is not None:
        given.append(override("data.prompt_template", template, f"--template {template}"))
    loaded = load_recipe(recipe, settings or [], given).recipe
    if loaded.model.path is None:
        raise UsageError("no model, whose tokenizer and chat template are needed", hint="name one with `--model PATH`")
    return loaded


def _reading(recipe: Recipe, kind: str) -> tuple[PromptFormat, Limits]:
    """Return how the model of the recipe reads records of a kind, and up to which length."""
    from rlhf_cli.data.preview import Limits
    from rlhf_cli.generation.prompts import prompt_format, prompt_style
    from rlhf_cli.models.loading import ModelSource, context_length, load_config, load_tokenizer
    from rlhf_cli.models.reward_model.classifier import check_reward_config
    from rlhf_cli.models.reward_model.loading import reward_format
    from rlhf_cli.stages.common import trusts_code

    path = recipe.model.path
    assert path is not None
    source = ModelSource(path, trust_remote_code=trusts_code(recipe, path))
    config, tokenizer = load_config(source), load_tokenizer(source)
    context = context_length(config)
    style = prompt_style(recipe.data, path, tokenizer, may_differ=True)
    if kind in ("demonstration", "prompt"):
        found = prompt_format(source, style, tokenizer)
        longest = recipe.sft.max_length if recipe.sft is not None else context
    else:
        is_encoder = check_reward_config(config, path)
        found = reward_format(source, style.template, is_encoder=is_encoder, template_kwargs=style.kwargs)
        longest = recipe.train_rm.max_length if recipe.train_rm is not None else context
    return found, Limits(recipe.data.max_prompt_tokens, min(longest, context), context)
