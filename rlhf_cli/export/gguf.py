"""GGUF for llama.cpp and Ollama: llama.cpp's own converter writes the weights, and an Ollama Modelfile is added."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Literal, cast

from rlhf_cli.errors import ModelError, UsageError
from rlhf_cli.export.models import ExportedModel, write_plain
from rlhf_cli.generation.contract import read_contract
from rlhf_cli.generation.sampling import Sampling
from rlhf_cli.models.json_files import read_json
from rlhf_cli.settings.shared import SamplingSettings

CONVERTER = "convert_hf_to_gguf.py"
VARIABLE = "LLAMA_CPP"
OutType = Literal["auto", "f32", "f16", "bf16", "q8_0"]

_GET = "git clone --depth 1 https://github.com/ggml-org/llama.cpp"
_NEEDS = "pip install gguf sentencepiece protobuf"
_SHOWN_LINES = 5


def find_converter(llama_cpp: Path | None) -> Path:
    """Return llama.cpp's converter: in the given folder, in that of LLAMA_CPP, or on the PATH.

    Raises:
        UsageError: it is in none of them.
    """
    named = llama_cpp or (Path(os.environ[VARIABLE]) if os.environ.get(VARIABLE) else None)
    if named is not None:
        path = named.expanduser() / CONVERTER
        if path.is_file():
            return path
        what = "--llama-cpp" if llama_cpp else VARIABLE
        raise UsageError(f"{what}: there is no {CONVERTER} in {named}", hint=f"`{_GET}` makes a folder with it")
    if (found := shutil.which(CONVERTER)) is not None:
        return Path(found)
    raise UsageError(
        f"GGUF is written by llama.cpp's {CONVERTER}, which is not on the PATH",
        hint=f"run `{_GET}` and add `--llama-cpp llama.cpp` to this command, or set {VARIABLE}",
    )


def write_gguf(model: ExportedModel, folder: Path, converter: Path, out_type: OutType) -> str:
    """Write `model.gguf` and `Modelfile` to a new folder, and return one sentence on the plain model.

    Raises:
        UsageError: a reward model, which writes no text.
        ModelError: the converter fails; its last lines say why.
    """
    if model.is_reward_model:
        raise UsageError(
            f"{model.name} is a reward model, which writes no text", hint="export it with `--to llama` instead"
        )
    folder.mkdir(parents=True)
    plain, weights = folder / "plain", folder / "model.gguf"
    made = write_plain(model, plain)
    command = [sys.executable, str(converter), str(plain), "--outfile", str(weights), "--outtype", out_type]
    # The converter reads the model's own files; nothing of it may come from the hub.
    found = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603  (the user's converter)
    if found.returncode != 0 or not weights.is_file():
        lines = found.stderr.strip().splitlines()[-_SHOWN_LINES:]
        missing = any("ModuleNotFoundError" in line for line in lines)
        raise ModelError(
            f"{converter} ended with {found.returncode}:\n" + "\n".join(lines),
            hint=f"install what it needs: `{_NEEDS}`"
            if missing
            else "llama.cpp may not support this architecture or tokenizer, or only in a later version",
        )
    (folder / "Modelfile").write_text(modelfile(model, plain), encoding="utf-8")
    shutil.rmtree(plain)
    return made


def modelfile(model: ExportedModel, plain: Path) -> str:
    """Return an Ollama Modelfile: template, ends and sampling as the model was trained.

    Args:
        model: with its contract, if it has one.
        plain: the plain folder written of it.
    """
    contract = read_contract(model.folder)
    sampling = Sampling.resolve(contract.sampling if contract else SamplingSettings())
    has_chat = (plain / "chat_template.jinja").is_file() or "chat_template" in read_json(
        plain / "tokenizer_config.json"
    )
    template = contract.prompt_template if contract else "chat" if has_chat else None
    lines = ["FROM ./model.gguf", "", *template_lines(template), ""]
    lines += ["# As in training: the model's own distribution, without the filters that Ollama applies by default."]
    lines += [f"PARAMETER temperature {sampling.temperature:g}", f"PARAMETER top_p {sampling.top_p:g}"]
    lines += ["PARAMETER top_k 0", "PARAMETER min_p 0", "PARAMETER repeat_penalty 1"]
    lines += [f"PARAMETER num_predict {sampling.max_new_tokens}"]
    lines += [f"PARAMETER stop {json.dumps(text, ensure_ascii=False)}" for text in _stops(plain, sampling)]
    return "\n".join(lines) + "\n"


def template_lines(template: str | None) -> list[str]:
    """Return the TEMPLATE of a Modelfile where it is exact, else a comment."""
    if template == "chat":
        return [
            "# No TEMPLATE: Ollama takes the one of its own that fits the chat template in model.gguf, else the bare",
            "# prompt. `ollama show NAME --template` says which; compare it with the model's chat template.",
        ]
    text = "{prompt}" if template is None else template
    if any(mark in text for mark in ("{{", "}}", '"""')):
        return ["# No TEMPLATE: Go's templates cannot hold the text around the prompt, which is", f"# {text!r}"]
    return ['TEMPLATE """' + text.replace("{prompt}", "{{ .Prompt }}") + '"""']


def _stops(plain: Path, sampling: Sampling) -> list[str]:
    """Return the texts of the tokens that end a completion."""
    from transformers import AutoTokenizer

    ids = read_json(plain / "generation_config.json").get("eos_token_id")
    tokenizer = AutoTokenizer.from_pretrained(plain)
    ends = cast(list[str], tokenizer.convert_ids_to_tokens([ids] if isinstance(ids, int) else list(ids or [])))
    return list(dict.fromkeys([*ends, *sampling.stop_tokens]))
