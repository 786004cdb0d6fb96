"""`rlhf label`: the stage, the two annotation interfaces, and commands that process labels."""

from __future__ import annotations

from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

from rlhf_cli.cli.global_options import FLAGS
from rlhf_cli.cli.label import export as label_export
from rlhf_cli.cli.label import import_labels as label_import
from rlhf_cli.cli.label import stats as label_stats
from rlhf_cli.cli.options import parameter, with_parameters
from rlhf_cli.cli.stage_command import run_stage, stage_parameters
from rlhf_cli.errors import UsageError
from rlhf_cli.quoting import word
from rlhf_cli.stages import registry

_STAGE = "stage"
"""Internal name of the command that runs for `rlhf label` without a subcommand."""


class _OneStageOrMore(TyperGroup):
    """Runs `stats`, `export` and `import` as subcommands; any other arguments go to the stage."""

    def parse_args(self, ctx: typer.Context, args: list[str]) -> list[str]:
        """See click; inserts the internal name of the stage, which is never typed."""
        if ctx.resilient_parsing and not args:  # a shell completes the first word
            return super().parse_args(ctx, args)
        word = next((one for one in args if one not in FLAGS), "")
        names = [name for name in self.commands if name != _STAGE]
        if word not in names:
            if word.isalpha() and not Path(word).exists() and (close := get_close_matches(word, names)):
                raise UsageError(
                    f"`rlhf label {word}`: no such command and no such recipe, did you mean `rlhf label {close[0]}`?"
                )
            args = [_STAGE, *args]
        return super().parse_args(ctx, args)

    def shell_complete(self, ctx: typer.Context, incomplete: str) -> Any:
        """See click; the options of the stage follow too."""
        stage = self.commands[_STAGE]
        own = stage.make_context(ctx.info_name, [], parent=ctx, resilient_parsing=True)
        return [*super().shell_complete(ctx, incomplete), *stage.shell_complete(own, incomplete)]


class _Stage(TyperCommand):
    """The stage, shown in usage lines under the name of its group."""

    def make_context(self, info_name: str | None, args: list[str], parent: Any = None, **extra: Any) -> Any:
        """See click."""
        return super().make_context(parent.info_name, args, parent=parent.parent, **extra)


app = typer.Typer(cls=_OneStageOrMore, rich_markup_mode=None, help="Rank completions: sample, label, measure, export.")


def label(**given: Any) -> None:
    """Sample completions and rank them: by annotators, judges, a function or a reward model; or import rankings.

    Annotators label in the terminal, or in a browser with --serve. A run directory that waits for labels needs no
    recipe: `rlhf label --run-dir runs/mine`. Exit code 76 means that labels are still missing.
    """
    from rlhf_cli.cli.label.human import AnnotationInterface, label_by_annotators
    from rlhf_cli.cli.label.sampling import background_sampling
    from rlhf_cli.recipe.overrides import override
    from rlhf_cli.settings.judges import judge_panel

    judge = given["judge"]
    by = (given["by"], f"--by {given['by']}") if given["by"] is not None else _implied_by(given)
    own = [] if by is None else [override("label.by", *by)]
    if judge:
        own.append(override("label.judge.panel", judge_panel(judge), f"--judge {' '.join(judge)}"))
    says_nothing_else = given["recipe"] is None and not given["settings"] and not judge
    says_nothing_else &= all(given[flag.name] is None for flag in registry.stage("label").flags)
    joins = says_nothing_else and (by is None or by[0] == "human")
    is_waiting_run = joins and given["run_dir"] is not None and not (given["force"] or given["dry_run"])
    label_by_annotators(
        lambda force: run_stage("label", {**given, "force": force}, own),
        lambda: background_sampling(given, own),
        AnnotationInterface(given["serve"], given["host"], given["port"], tuple(given["annotator"] or ())),
        waits_in=given["run_dir"] if is_waiting_run else None,
        force=given["force"],
        continuation=_continuation(given),
    )


def _continuation(given: Mapping[str, Any]) -> str | None:
    """The command that runs the rest of the recipe; None without a recipe in a file."""
    recipe = given["recipe"]
    if not isinstance(recipe, Path):
        return None
    run_dir = [] if given["run_dir"] is None else ["--run-dir", str(given["run_dir"])]
    settings = [part for setting in given["settings"] or () for part in ("--set", setting)]
    return " ".join(map(word, ["rlhf", "run", str(recipe), *run_dir, *settings]))


def _implied_by(given: Mapping[str, Any]) -> tuple[str, str] | None:
    """Who labels, as implied by the options if there is no recipe, and the option that implies it."""
    if given["recipe"] is not None:
        return None
    implied = [
        ("function", "--function", given["function"]),
        ("reward-model", "--reward-model", given["reward_model"]),
        ("import", "--data", given["data"]),
        ("judge", "--judge", given["judge"] or None),
        ("human", "--serve", given["serve"] or None),
        ("human", "--overlap", given["overlap"]),
        ("human", "--guidelines", given["guidelines"]),
    ]
    return next(((who, flag) for who, flag, value in implied if value is not None), None)


_OWN = (
    (
        "judge",
        list[str] | None,
        None,
        typer.Option(
            metavar="MODEL",
            help="Judge: model folder, hub id, or NAME@URL of an OpenAI-compatible endpoint; repeatable.",
            show_default=False,
        ),
    ),
    (
        "by",
        str | None,
        None,
        typer.Option(
            metavar="WHO", help="human, judge, function, reward-model or import; default: implied by the other options."
        ),
    ),
    ("serve", bool, False, typer.Option("--serve", help="Label in a browser: start a web server and print the links.")),
    ("host", str, "127.0.0.1", typer.Option(metavar="ADDRESS", help="Address for --serve.")),
    ("port", int, 8100, typer.Option(metavar="N", min=0, max=65535, help="Port for --serve; 0 picks a free port.")),
    (
        "annotator",
        list[str] | None,
        None,
        typer.Option(
            metavar="NAME", help="Annotator; repeatable with --serve. Default: your user name.", show_default=False
        ),
    ),
)
"""Options of this command that are not short for one setting: name, type, default, option."""


_own = [parameter(name, Annotated[kind, option], default) for name, kind, default, option in _OWN]
app.command(
    _STAGE,
    cls=_Stage,
    hidden=True,
    epilog="For existing labels: rlhf label stats | export | import, each with its own --help.",
)(with_parameters(label, stage_parameters("label", _own)))
app.command("stats")(label_stats.stats)
app.command("export")(label_export.export)
app.command("import")(label_import.import_)
