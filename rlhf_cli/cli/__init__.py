"""The `rlhf` command: parses arguments, calls the pipeline, prints. Heavy imports wait until a command is known."""

from __future__ import annotations

import atexit
import os
import sys
import threading
from typing import NoReturn


def entry() -> NoReturn:
    """Run `main`, and end the process without Python's teardown, which takes about a second once torch is loaded.

    After Ctrl-C, a person waits for that second. What was registered with `atexit` runs as usual.
    """
    try:
        code = main()
    except SystemExit as left:  # after SIGTERM or SIGHUP, see `echo.leaving_on_signals`
        if not isinstance(left.code, int):
            raise
        code = left.code
    is_alone = all(one is threading.main_thread() or one.daemon for one in threading.enumerate())
    if "torch" in sys.modules and is_alone:
        from rlhf_cli.distributed.process_group import exit_without_teardown

        atexit._run_exitfuncs()
        exit_without_teardown(code)
    sys.exit(code)


def main() -> int:
    """Run the command line and return the exit code (see `rlhf_cli.errors`)."""
    from rlhf_cli import run_log
    from rlhf_cli.cli.environment import prepare, prepare_streams
    from rlhf_cli.echo import leaving_on_signals

    prepare_streams()
    prepare()
    try:
        with leaving_on_signals():
            return _run()
    finally:
        run_log.close()


def _run() -> int:
    from rlhf_cli.cli.completion import COMPLETE, prepare_completion
    from rlhf_cli.cli.environment import check_arguments
    from rlhf_cli.cli.error_rendering import print_error, report
    from rlhf_cli.distributed import peers
    from rlhf_cli.distributed.process_group import exit_without_teardown, is_joined, is_lost_peer, leave
    from rlhf_cli.distributed.rendezvous import is_meeting
    from rlhf_cli.distributed.worker import Worker

    if COMPLETE in os.environ:
        prepare_completion()
    worker = Worker.adopt()
    try:
        from rlhf_cli.cli.app import app

        check_arguments(sys.argv[1:])
        code = app(args=sys.argv[1:] or ["--help"], prog_name="rlhf", standalone_mode=False)
        if code == 130:  # typer returns 130 for a KeyboardInterrupt instead of raising it
            raise KeyboardInterrupt
        sys.stdout.flush()
    except (Exception, KeyboardInterrupt) as error:
        if worker is not None:
            worker.fail(error, lambda failure: print_error(failure).as_json())
        code = report(error)
        if is_joined() or is_meeting():  # started by torchrun or `accelerate launch`
            why = getattr(error, "message", None) or f"{type(error).__name__}: {error}"
            peers.say_goodbye(code, why, is_consequence=is_lost_peer(error))
            exit_without_teardown(code)
        return code
    code = code if isinstance(code, int) else 0
    if is_joined():
        peers.say_goodbye(code, "")
        leave()
        exit_without_teardown(code)
    return code
