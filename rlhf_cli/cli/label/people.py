"""Opens the terminal or the page where people label, between the stage that prepares and the stage that takes over."""

from __future__ import annotations

import getpass
import os
import signal
import sys
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from rlhf_cli.distributed.ranks import world_size
from rlhf_cli.errors import Interrupted, UsageError, WaitingForLabelsError

if TYPE_CHECKING:
    from rlhf_cli.labeling.web.tokens import Links


@dataclass(frozen=True)
class Face:
    """How people are to label.

    Attributes:
        serve: in a browser; otherwise at this terminal.
        host: address that the page listens at.
        port: of the page.
        annotators: who; none named is whoever runs the command.
    """

    serve: bool
    host: str
    port: int
    annotators: tuple[str, ...]

    def check(self) -> None:
        """Raise `UsageError` where several people would share one keyboard."""
        if len(self.annotators) > 1 and not self.serve:
            raise UsageError(
                "one person labels at a keyboard; several were named",
                hint="give each their own terminal and `--annotator`, or use --serve",
            )

    def named(self) -> tuple[str, ...]:
        """Who labels; raises `UsageError` where nobody was named and the system does not know whose session it is."""
        if self.annotators:
            return self.annotators
        try:
            return (getpass.getuser(),)
        except (KeyError, OSError) as error:  # a user without a name, as in containers
            raise UsageError("who labels? this system has no name for you", hint="add `--annotator NAME`") from error


def label_by_people(run_stage: Callable[[bool], None], face: Face, *, waits_in: Path | None, force: bool) -> None:
    """Run the stage; where it waits for people and can reach some, open their face, and run it again.

    Args:
        run_stage: runs `label`, anew if told so; prints the outcome.
        face: terminal or page.
        waits_in: a run directory given on its own, which may wait for people already; then nothing has to be run first.
        force: throw unfinished work away; labels stay.

    Raises:
        WaitingForLabelsError: labels are still needed when the face was closed, or there is nobody to ask.
    """
    from rlhf_cli.labeling.label_sources import STORE, waits_for_people
    from rlhf_cli.progress import say

    face.check()
    if waits_in is not None and (waits_in / STORE).is_file():
        if waits_for_people(waits_in):
            _open(waits_in / STORE, waits_in, face)
            say("all labels are in: run the command that began this run again to go on")
        else:
            _nothing_to_label()
            typer.echo(waits_in / "label")
        return
    if waits_in is not None:
        what = "nothing waits for labels there" if waits_in.is_dir() else "no such run directory"
        raise UsageError(
            f"{waits_in}: {what}", hint="name a run that waits, or give a recipe, or `--by` and what it needs"
        )
    try:
        run_stage(force)
        if face.serve or face.annotators:
            _nothing_to_label()
        return
    except WaitingForLabelsError as waiting:
        store = Path(waiting.store)
        if world_size() > 1 or not (face.serve or _has_keyboard()):
            raise
    _open(store, store.parents[2], face)
    run_stage(False)


def _nothing_to_label() -> None:
    from rlhf_cli.progress import say

    say("nobody needs to label anything: `label` is done")


def _show_links(links: Links) -> None:
    from rlhf_cli.progress import printable, say

    rows = [*((printable(name), link) for name, link in links.annotators.items()), ("to lead it", links.administrator)]
    width = max(len(name) for name, _ in rows)
    say("people label in a browser; whoever has a link is who it says:\n")
    for name, link in rows:
        say(f"  {name:<{width}}  {link}")
    say("\neverything acknowledged is on disk; stop with Ctrl-C, and the links stay good")


def _has_keyboard() -> bool:
    """Whether a person sits at this terminal."""
    return sys.stdin.isatty() and sys.stderr.isatty() and not os.environ.get("CI")


def _open(store: Path, run_dir: Path, face: Face) -> None:
    """Let people label; raises `WaitingForLabelsError` where labels lack when they are done."""
    from rlhf_cli.labeling.session.session import LabelSession
    from rlhf_cli.stages.label.human import waiting

    if face.serve:
        from rlhf_cli.labeling.web.serving import serve

        signum = serve(store, host=face.host, port=face.port, annotators=face.named(), announce=_show_links)
        if signum not in (None, signal.SIGINT):  # Ctrl-C is how the page is closed
            raise Interrupted(signum)
    else:
        _open_terminal(store, face.named()[0], again=f"rlhf label --run-dir {run_dir}")
    with closing(LabelSession(store, create=False)) as session:
        progress = session.progress()
    if not progress.is_complete:
        raise waiting(progress, store, run_dir)


def _open_terminal(store: Path, annotator: str, *, again: str) -> None:
    from rlhf_cli.labeling.session.session import LabelSession
    from rlhf_cli.labeling.terminal import label_in_terminal

    if not _has_keyboard():
        raise UsageError(
            "nobody can label here: this is no terminal",
            hint="run it in a terminal, or label in a browser with --serve",
        )
    with closing(LabelSession(store, create=False)) as session:
        outcome = label_in_terminal(session, annotator, again=again)
    if outcome.signum not in (None, signal.SIGINT):  # Ctrl-C is one more way to leave
        raise Interrupted(outcome.signum)
