"""`python -m rlhf_cli`, which is how `--processes` starts its workers."""

import sys

from rlhf_cli.cli import main

sys.exit(main())
