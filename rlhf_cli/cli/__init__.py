"""The `rlhf` command: parses arguments, calls the pipeline, prints. Heavy imports wait until a command is known."""

from __future__ import annotations

import sys


def main() -> int:
    """Run the command line and return the exit code (see `rlhf_cli.errors`)."""
    from rlhf_cli.cli.environment import check_arguments, debugging, prepare, prepare_streams
    from rlhf_cli.cli.error_rendering import report

    prepare_streams()
    prepare()
    from rlhf_cli.distributed.process_group import exit_without_teardown, is_joined, leave
    from rlhf_cli.distributed.rendezvous import is_meeting
    from rlhf_cli.distributed.worker import Worker

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
            worker.fail(error, report)
        if debugging() and not isinstance(error, KeyboardInterrupt):
            raise
        code = report(error)
        if is_joined() or is_meeting():  # started by torchrun or `accelerate launch`
            exit_without_teardown(code)
        return code
    code = code if isinstance(code, int) else 0
    if is_joined():
        leave()
        exit_without_teardown(code)
    return code
