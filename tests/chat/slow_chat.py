"""A chat with a model that writes a word every 0.1 s; run as a script in a pseudo-terminal."""

from __future__ import annotations

import time
from types import SimpleNamespace
from typing import Any, cast

from rich.console import Console

from rlhf_cli.chat.conversation import Conversation, Reply
from rlhf_cli.chat.files import ChatFiles
from rlhf_cli.chat.terminal import Chat
from rlhf_cli.generation.generator import Completion

WORDS = 20


class SlowConversation:
    """Replies to `question` with `word0 word1 ... end of the reply to <question>`."""

    keeps_history, forgotten = True, 0
    models = SimpleNamespace(models=[SimpleNamespace(name="slow")])

    def ask(self, text: str, show: Any) -> Any:
        words = [*(f"word{number}" for number in range(WORDS)), f"end of the reply to <{text}>"]
        for count in range(1, len(words) + 1):
            time.sleep(0.1)
            show("slow", " ".join(words[:count]))
        yield Reply("slow", Completion([1], " ".join(words), finished=True))

    def turn_to_json(self) -> dict[str, Any]:
        return {}


if __name__ == "__main__":
    Chat(cast("Conversation", SlowConversation()), ChatFiles(None, None), Console(highlight=False)).run()
