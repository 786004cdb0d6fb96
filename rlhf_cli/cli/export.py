"""`rlhf export`: a model, or a run before PPO, in the form that another program reads."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from rlhf_cli.cli.completion import models

Target = Literal["llama", "gguf", "verl", "openrlhf"]
OutType = Literal["auto", "f32", "f16", "bf16", "q8_0"]


def export(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="RUN/STAGE, a model folder or a hub id; for verl and openrlhf a run directory.",
            autocompletion=models,
        ),
    ],
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="Folder to write; must not exist.")],
    to: Annotated[Target, typer.Option("--to", metavar="PROGRAM", help="llama, gguf, verl or openrlhf.")],
    llama_cpp: Annotated[
        Path | None, typer.Option(metavar="DIR", help="With gguf: folder of llama.cpp; default: LLAMA_CPP or PATH.")
    ] = None,
    out_type: Annotated[
        OutType | None,
        typer.Option("--outtype", metavar="TYPE", help="With gguf: auto (16 bits), f32, f16, bf16 or q8_0."),
    ] = None,
) -> None:
    """Write a model for other programs.

    \b
      llama     a folder that transformers loads without this package:
                adapters merged, reward models as sequence classifiers
      gguf      model.gguf, by llama.cpp's converter, and a Modelfile for Ollama
      verl      SFT model, reward model, prompts, a script with PPO's settings
      openrlhf  the same for OpenRLHF

    The outputs of every model are compared with those of the original; for gguf, before llama.cpp converts it.
    """
    from rlhf_cli.errors import UsageError
    from rlhf_cli.export.models import find_model, new_folder, write_plain
    from rlhf_cli.progress import say

    if to != "gguf" and (llama_cpp is not None or out_type is not None):
        raise UsageError("--llama-cpp and --outtype are options of `--to gguf`", hint="remove them, or use `--to gguf`")
    with new_folder(folder) as partial:
        if to == "llama":
            made = write_plain(find_model(model), partial)
        elif to == "gguf":
            from rlhf_cli.export.gguf import find_converter, write_gguf

            made = write_gguf(find_model(model), partial, find_converter(llama_cpp), out_type or "auto")
        else:
            from rlhf_cli.export.engine_run import read_run
            from rlhf_cli.export.openrlhf import write_openrlhf
            from rlhf_cli.export.verl import write_verl

            made = (write_verl if to == "verl" else write_openrlhf)(read_run(Path(model)), partial)
    say(made)
    typer.echo(folder)
