"""`rlhf chat`: the models of a run reply side by side, with reward and KL under each reply."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from rlhf_cli.cli.completion import run_directories
from rlhf_cli.cli.options import Json

if TYPE_CHECKING:
    from rlhf_cli.chat.conversation import Conversation
    from rlhf_cli.chat.files import ChatFiles


def chat(
    where: Annotated[
        list[str],
        typer.Argument(
            metavar="RUN|MODEL...",
            help="Run directory, model folder or hub id; repeatable.",
            autocompletion=run_directories,
        ),
    ],
    prompt: Annotated[
        list[str] | None, typer.Option("--prompt", "-p", metavar="TEXT", help="Reply to this and exit; repeatable.")
    ] = None,
    models: Annotated[
        str | None, typer.Option(metavar="NAMES", help="Models that reply, such as sft,ppo; default: all.")
    ] = None,
    system: Annotated[str, typer.Option(metavar="TEXT", help="System message.")] = "",
    temperature: Annotated[
        float | None, typer.Option(metavar="T", min=1e-6, help="Temperature; default: as the model was trained.")
    ] = None,
    top_p: Annotated[
        float | None, typer.Option(metavar="P", min=1e-6, max=1.0, help="Nucleus sampling; below 1, no KL is shown.")
    ] = None,
    max_new_tokens: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Maximum reply length in tokens.")
    ] = None,
    seed: Annotated[int, typer.Option(metavar="N", min=0, help="Random seed.")] = 0,
    device: Annotated[
        str | None, typer.Option(metavar="NAME", help="auto, cpu or cuda; default: as in the run.")
    ] = None,
    transcript: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Save the conversation here; default: RUN/kept/chat/.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Talk to the models of a run: base, SFT and PPO reply to the same prompts.

    Under each reply are its reward and its log-probability ratio between the model that replied and the one it was
    trained from (the mean is the KL). Without a terminal, the prompt is read from stdin. `/best NAME` in the chat saves
    a label that `train-rm` can learn from.
    """
    from rlhf_cli.console import working

    names = [] if models is None else [name.strip() for name in models.split(",") if name.strip()]
    with working("loading libraries ..."):
        from rlhf_cli.chat.conversation import Conversation
        from rlhf_cli.chat.files import ChatFiles
        from rlhf_cli.chat.models import find_models
        from rlhf_cli.settings.shared import SamplingSettings

        sampling = SamplingSettings(temperature=temperature, top_p=top_p, max_new_tokens=max_new_tokens)
        found = find_models(where, only=names, sampling=sampling, device=device)
    conversation = Conversation(found, seed=seed, system=system)
    prompts = list(prompt or [])
    if not prompts and not sys.stdin.isatty():
        prompts = [sys.stdin.read().strip()]
    _check(prompts, as_json)
    files = ChatFiles.of(found.run, transcript) if transcript is not None or not prompts else ChatFiles(None, None)
    with conversation.loading_models():
        _reply(conversation, files, prompts, as_json)


def _check(prompts: list[str], as_json: bool) -> None:
    from rlhf_cli.errors import UsageError

    if any(not one for one in prompts):
        raise UsageError("the prompt is empty", hint='write it: `rlhf chat RUN --prompt "..."`')
    if as_json and not prompts:
        raise UsageError("`--json` needs a prompt", hint='add `--prompt "..."`, or send one to stdin')


def _reply(conversation: Conversation, files: ChatFiles, prompts: list[str], as_json: bool) -> None:
    from rich.console import Console

    from rlhf_cli.chat.terminal import Chat

    chat = Chat(conversation, files, Console(highlight=False, emoji=False))
    for one in prompts:
        conversation.start_over()
        if as_json:
            for _ in conversation.ask(one, lambda name, text: None):
                pass
            typer.echo(json.dumps(conversation.turn_to_json(), ensure_ascii=False))
            files.add_turn(conversation.turn_to_json())
        else:
            chat.ask(one)
    if not prompts:
        chat.run()
