"""Labeling at the keyboard: `label_in_terminal`.

`keys` reads bytes, `machine` says what a key does to the state, `drawing` says what the state looks like; none of them
knows a terminal or a store. `device` is the terminal, `desk` the way to the session, `face` brings them together.
"""

from rlhf_cli.labeling.terminal.app import Outcome, label_in_terminal

__all__ = ["Outcome", "label_in_terminal"]
