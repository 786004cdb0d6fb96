"""The loop of `rlhf chat` in a terminal: a prompt or a command, then the replies."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator

from rich.console import Console

from rlhf_cli.chat.conversation import Conversation, Reply
from rlhf_cli.chat.display import Display
from rlhf_cli.chat.files import ChatFiles
from rlhf_cli.echo import without_echo
from rlhf_cli.errors import DataError, RLHFError
from rlhf_cli.quoting import word

_HELP = """\
/best NAME         the reply of NAME is the best; saves labels
/rank A > B = C    order replies, best first, = for a tie; saves a label
/again             reply again, with other random numbers
/new               start a new conversation
/system TEXT       set the system message, and start over
/help, /quit       this list; quit (also Ctrl-D)
A line that ends with \\ continues on the next."""
_CONTINUES = """
The conversation continues with the reply you prefer, else with that of the last model."""


class Chat:
    """A chat in a terminal.

    Args:
        conversation: with its models.
        files: what is kept.
        console: to print on.
    """

    def __init__(self, conversation: Conversation, files: ChatFiles, console: Console) -> None:
        self._conversation, self._files, self._console = conversation, files, console
        self._display = Display(console, [model.name for model in conversation.models.models])

    def run(self) -> None:
        """Read and reply until the person leaves."""
        with contextlib.suppress(ImportError):  # arrow keys and history in `input`; Windows has them without it
            import readline  # noqa: F401
        names = ", ".join(model.name for model in self._conversation.models.models)
        self._say(f"{names} reply. /help lists commands, Ctrl-D leaves.")
        if not self._conversation.keeps_history:
            self._say(
                "not all of these models have a chat template, so each prompt is sent without the turns before it"
            )
        if self._files.transcript is not None:
            self._say(f"transcript: {self._files.transcript}")
        while True:
            try:
                line = self._read()
            except EOFError:
                self._console.print()
                return
            except KeyboardInterrupt:
                self._say("\nCtrl-D or /quit leaves")
                continue
            try:
                with without_echo():
                    if not self._obey(line):
                        return
            except KeyboardInterrupt:
                self._say("stopped")
            except RLHFError as error:
                self._say(f"{error.message}{f' ({error.hint})' if error.hint else ''}")

    def reply(self, replies: Iterator[Reply]) -> None:
        """Show replies as they come, and keep the turn."""
        with self._display.turn():
            for reply in replies:
                self._display.finish(reply)
        self._files.add_turn(self._conversation.turn_to_json())
        if forgotten := self._conversation.forgotten:
            turns = "1 turn does" if forgotten == 1 else f"{forgotten:,} turns do"
            self._say(f"the earliest {turns} not fit into the context any more")

    def ask(self, prompt: str) -> None:
        """Reply to a prompt."""
        self.reply(self._conversation.ask(prompt, self._display.show))

    def _read(self) -> str:
        line = input("> ")
        while line.endswith("\\"):
            line = f"{line[:-1]}\n{input('. ')}"
        return line.strip()

    def _obey(self, line: str) -> bool:
        """Carry out a command or reply to a prompt; return whether the chat goes on."""
        command, _, rest = line.partition(" ")
        if not line:
            return True
        if not line.startswith("/"):
            self.ask(line)
        elif command == "/quit":
            return False
        elif command == "/help":
            self._say(_HELP + (_CONTINUES if self._conversation.keeps_history else ""))
        elif command == "/again":
            self.reply(self._conversation.again(self._display.show))
        elif command == "/new":
            self._conversation.start_over()
            self._say("a new conversation")
        elif command == "/system":
            self._conversation.start_over()
            self._conversation.system = rest.strip()
            self._say("a new conversation with this system message" if rest.strip() else "no system message")
        elif command == "/best":
            self._best(rest.strip())
        elif command == "/rank":
            tiers = [[name.strip() for name in tier.split("=")] for tier in rest.split(">")]
            self._prefer([tiers])
        else:
            raise DataError(f"unknown command {command}", hint="/help lists them")
        return True

    def _best(self, name: str) -> None:
        others = [model.name for model in self._conversation.models.models if model.name != name]
        self._prefer([[[name], [other]] for other in others] or [[[name]]])

    def _prefer(self, orders: list[list[list[str]]]) -> None:
        kept = None
        for ranking in [self._conversation.prefer(tiers) for tiers in orders]:
            kept = self._files.add_ranking(ranking)
        count = "1 label" if len(orders) == 1 else f"{len(orders)} labels"
        where = "not saved: add `--transcript FILE`"
        if kept:
            model = self._conversation.models.models[0].policy.source.path
            train = f"rlhf train-rm --model {word(model)} --data {word(kept)}"
            where = f"saved to {kept}; once it holds more labels, train on them: `{train}`"
        self._say(f"{count} {where}")

    def _say(self, text: str) -> None:
        self._console.print(re.sub(r"\s+\n", "\n", text), style="dim", markup=False, highlight=False)
