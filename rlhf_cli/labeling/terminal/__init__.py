"""Labeling in the terminal: `label_in_terminal`.

`keys` parses bytes, `key_bindings` maps a key and a state to a new state, `drawing` renders a state; none of them uses
a terminal or a store. `tty` is the terminal, `controller` talks to the session, `app` runs the loop.
"""

from rlhf_cli.labeling.terminal.app import Outcome, label_in_terminal

__all__ = ["Outcome", "label_in_terminal"]
