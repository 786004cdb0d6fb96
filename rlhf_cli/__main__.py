"""`python -m rlhf_cli`, which is how `--processes` starts its workers."""

from rlhf_cli.cli import entry

entry()
