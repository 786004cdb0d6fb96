"""Opens the terminal or the web page for annotators, between two runs of the `label` stage."""

from __future__ import annotations

import getpass
import os
import signal
import sys
import threading
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from rlhf_cli import run_log
from rlhf_cli.cli.label.sampling import OtherCommand
from rlhf_cli.distributed.ranks import world_size
from rlhf_cli.distributed.worker import is_background
from rlhf_cli.errors import Interrupted, UsageError, WaitingForLabelsError
from rlhf_cli.quoting import word

if TYPE_CHECKING:
    from rlhf_cli.distributed.background import BackgroundCommand
    from rlhf_cli.labeling.session.types import SamplerStatus, SessionProgress
    from rlhf_cli.labeling.web.tokens import ServerLinks

_THEN = "the pipeline can continue"


@dataclass(frozen=True)
class AnnotationInterface:
    """Where annotators label.

    Attributes:
        serve: in a browser; otherwise in this terminal.
        host: address the server listens on.
        port: port the server listens on.
        annotators: names; if empty, the user who runs the command.
    """

    serve: bool
    host: str
    port: int
    annotators: tuple[str, ...]

    def check(self) -> None:
        """Raise `UsageError` if several annotators would share one terminal."""
        if len(self.annotators) > 1 and not self.serve:
            raise UsageError(
                f"only one annotator can label in a terminal; got {len(self.annotators)}",
                hint="start one terminal per annotator with `--annotator NAME`, or use `--serve`",
            )

    def check_usable(self) -> None:
        """Raise `UsageError` if the interface cannot be opened, before anything is sampled for it."""
        self.names()
        if self.serve:
            from rlhf_cli.web.server import require_packages

            require_packages("the labeling page")
        else:
            from rlhf_cli.labeling.terminal.tty import check_terminal

            check_terminal()

    def names(self) -> tuple[str, ...]:
        """Names of the annotators; raises `UsageError` if none was given and the user has no name."""
        if self.annotators:
            return self.annotators
        try:
            return (getpass.getuser(),)
        except (KeyError, OSError) as error:  # a user without a name, as in containers
            raise UsageError(
                "no annotator given, and this system has no user name", hint="add `--annotator NAME`"
            ) from error


def label_by_annotators(
    run_stage: Callable[[bool], None],
    background: Callable[[], BackgroundCommand | None],
    interface: AnnotationInterface,
    *,
    waits_in: Path | None,
    force: bool,
    continuation: str | None = None,
) -> None:
    """Run the stage; if it waits for labels, open the interface, then run the stage again.

    Where completions are sampled for people, the first run is a process of its own, and the interface opens as soon as
    there is something to label.

    Args:
        run_stage: runs `label`, discarding unfinished work if its argument is true; prints the outcome.
        background: returns the same as a process; None if all completions are sampled before the interface opens.
        interface: terminal or web page.
        waits_in: a run directory given without a recipe; if it waits for labels, the stage is not run first.
        force: discard unfinished work; labels are kept.
        continuation: the command that runs what follows the stage.

    Raises:
        WaitingForLabelsError: labels are still missing after the interface was closed, or no interface can be opened.
    """
    interface.check()
    if waits_in is not None:
        _label_waiting_run(waits_in, interface)
        return
    opens = not is_background() and world_size() == 1 and (interface.serve or _is_interactive())
    sampling = background() if opens else None
    if sampling is not None:
        if _label_while_sampling(sampling, interface):
            _finish(run_stage, continuation)
        return
    try:
        run_stage(force)
        if interface.serve or interface.annotators:
            _nothing_to_label()
        return
    except WaitingForLabelsError as waiting:
        store = Path(waiting.store)
        if not opens:
            raise
    run_log.close()  # the links hold secrets
    _open(store, store.parents[2], interface, _THEN, OtherCommand(store.parents[2]))
    _finish(run_stage, continuation)


def _label_waiting_run(run_dir: Path, interface: AnnotationInterface) -> None:
    """Open the interface of a run that waits for labels; its stage is not run.

    Raises:
        UsageError: the run does not wait for labels, or does not exist.
        WaitingForLabelsError: labels are still missing after the interface was closed.
    """
    from rlhf_cli.labeling.label_sources import STORE, waits_for_people
    from rlhf_cli.pipeline.record import last_command
    from rlhf_cli.progress import say

    store = run_dir / STORE
    if not store.is_file():
        what = "this run does not wait for labels" if run_dir.is_dir() else "no such run directory"
        raise UsageError(
            f"{run_dir}: {what}", hint="name a run that waits for labels, or add a recipe, or `--by` and its options"
        )
    if not waits_for_people(run_dir):
        _nothing_to_label()
        typer.echo(run_dir / "label")
        return
    afterwards = f"continue with `{last_command(run_dir) or 'rlhf run RECIPE'}`"
    _open(store, run_dir, interface, afterwards, OtherCommand(run_dir), is_last=True)
    if interface.serve:
        say(f"enough prompts are labeled: {afterwards}")


def _label_while_sampling(sampling: BackgroundCommand, interface: AnnotationInterface) -> bool:
    """Open the interface as soon as there is something to label; return whether there ever was.

    Raises:
        WaitingForLabelsError: labels are still missing after the interface was closed.
    """
    interface.check_usable()
    with sampling:
        message = sampling.wait()
        if message is None:
            return False
        store = Path(message["store"])
        _open(store, store.parents[2], interface, _THEN, sampling)
    return True


def _finish(run_stage: Callable[[bool], None], continuation: str | None) -> None:
    """Write the rankings, and say what follows."""
    from rlhf_cli.progress import say

    run_stage(False)
    if continuation is not None:
        say(f"continue with `{continuation}`")


def _nothing_to_label() -> None:
    from rlhf_cli.progress import say

    say("no labels are needed: `label` is done")


def _show_links(links: ServerLinks) -> None:
    from rlhf_cli.plain_text import printable
    from rlhf_cli.progress import say

    rows = [*((printable(name), link) for name, link in links.annotators.items()), ("(admin)", links.administrator)]
    width = max(len(name) for name, _ in rows)
    say("send each annotator their own link; a link identifies its annotator:\n", always=True)
    for name, link in rows:
        say(f"  {name:<{width}}  {link}", always=True)
    say("\nsubmitted labels are on disk; stop the server with Ctrl-C, the links stay valid", always=True)


def _is_interactive() -> bool:
    """Whether a person uses this terminal."""
    return sys.stdin.isatty() and sys.stderr.isatty() and not os.environ.get("CI")


def _open(
    store: Path,
    run_dir: Path,
    interface: AnnotationInterface,
    afterwards: str,
    sampling: BackgroundCommand | OtherCommand,
    *,
    is_last: bool = False,
) -> None:
    """Open the interface; raise `WaitingForLabelsError` if labels are still missing when it is closed.

    Args:
        store: the labels.
        run_dir: of the run that waits for them.
        interface: terminal or web page.
        afterwards: what to do once labeling is complete, for the person at the terminal.
        sampling: what may be sampling meanwhile.
        is_last: the stage is not run afterwards.

    Raises:
        ReportedError, ProcessDiedError: sampling in the background failed.
    """
    from rlhf_cli.labeling.session.types import SamplerStatus
    from rlhf_cli.pipeline.record import last_command
    from rlhf_cli.pipeline.remote.attach import known_remote_copy
    from rlhf_cli.stages.label.human import waiting

    own = None if isinstance(sampling, OtherCommand) else sampling
    has_failed = threading.Event() if own is None else own.has_failed
    status = SamplerStatus(lambda: sampling.is_running, has_failed)
    with known_remote_copy(run_dir, is_last=is_last):
        if interface.serve:
            _serve(store, interface, status)
        else:
            resume = f"rlhf label --run-dir {word(run_dir)}"
            if own is not None:  # which also samples
                resume = last_command(run_dir) or resume
            _open_terminal(store, interface.names()[0], status, resume_command=resume, afterwards=afterwards)
    if own is not None:
        if _progress(store).growth is not None:
            own.stop()
        own.finish()
        own.check()
    progress = _progress(store)
    if not progress.is_complete:
        raise waiting(progress, store, run_dir)


def _progress(store: Path) -> SessionProgress:
    from rlhf_cli.labeling.session.session import LabelSession

    with closing(LabelSession(store, create=False)) as session:
        return session.progress()


def _serve(store: Path, interface: AnnotationInterface, sampler: SamplerStatus) -> None:
    from rlhf_cli.labeling.web.serving import serve

    signum = serve(
        store,
        host=interface.host,
        port=interface.port,
        annotators=interface.names(),
        announce=_show_links,
        stop=sampler.has_failed,
        is_sampling=sampler.is_running,
    )
    if signum not in (None, signal.SIGINT):  # Ctrl-C is the normal way to stop the server
        raise Interrupted(signum)


def _open_terminal(
    store: Path, annotator: str, sampler: SamplerStatus, *, resume_command: str, afterwards: str
) -> None:
    from rlhf_cli.labeling.session.session import LabelSession
    from rlhf_cli.labeling.terminal import label_in_terminal

    if not _is_interactive():
        raise UsageError(
            "labeling needs an interactive terminal",
            hint="run the command in a terminal, or label in a browser with `--serve`",
        )
    with closing(LabelSession(store, create=False)) as session:
        outcome = label_in_terminal(
            session, annotator, resume_command=resume_command, afterwards=afterwards, sampler=sampler
        )
    if outcome.signum not in (None, signal.SIGINT):  # Ctrl-C is a normal way to quit
        raise Interrupted(outcome.signum)
