"""The generation contract of a model: how it was prompted, sampled and ended, and which prompts it was trained on.

Every stage that writes a model or its completions writes the contract beside it, and the next stage inherits what its
recipe leaves open. Two files hold it: `contract.json`, and `trained_prompts.txt` with one `split_key` per line. What
transformers and vLLM need is in `generation_config.json` and the tokenizer too. Imports no torch.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from rlhf_cli.data.records import Record, split_key
from rlhf_cli.data.splits import Split, question
from rlhf_cli.errors import ModelError
from rlhf_cli.models.hub import local_folder
from rlhf_cli.settings.shared import DataSettings, SamplingSettings

CONTRACT_FILE = "contract.json"
TRAINED_FILE = "trained_prompts.txt"

_FORMAT = 1
_KEY_LENGTH = 16
_DEFAULT_SPLIT = Split(holdout=0.1, seed=0)


@dataclass(frozen=True)
class Contract:
    """How a model is prompted and sampled, and what it was trained on.

    Attributes:
        prompt_template: of plain-text prompts: None, "chat" or text around `{prompt}`.
        template_kwargs: arguments of the chat template.
        sampling: how completions are drawn, as far as it was said.
        samples_in_training: whether training drew completions in this way, as PPO does.
        split: which prompts were held out.
        trained_prompts: `split_key` of every prompt that it, or a model that it started from, was trained on.
    """

    prompt_template: str | None
    template_kwargs: Mapping[str, Any]
    sampling: SamplingSettings
    split: Split
    samples_in_training: bool = False
    trained_prompts: frozenset[str] = field(default=frozenset(), repr=False)

    def write(self, folder: Path) -> None:
        """Write both files to an existing folder."""
        plain = {
            "format": _FORMAT,
            "prompt_template": self.prompt_template,
            "template_kwargs": dict(self.template_kwargs),
            "sampling": self.sampling.model_dump(),
            "samples_in_training": self.samples_in_training,
            "split": {"holdout": self.split.holdout, "seed": self.split.seed},
        }
        text = json.dumps(plain, indent=2, ensure_ascii=False)
        (folder / CONTRACT_FILE).write_text(text + "\n", encoding="utf-8")
        keys = "".join(f"{key}\n" for key in sorted(self.trained_prompts))
        (folder / TRAINED_FILE).write_text(keys, encoding="ascii")


def read_contract(model: str | Path) -> Contract | None:
    """Return the contract beside a model or an artifact; None if there is none, as with models of others.

    Args:
        model: folder or hub id; a `Path` is a folder, which need not exist.

    Raises:
        ModelError: a file is damaged, another version of rlhf wrote it, or there is no such model.
    """
    folder = model if isinstance(model, Path) else local_folder(model, with_weights=False)
    path = folder / CONTRACT_FILE
    if not path.is_file():
        return None
    try:
        plain = json.loads(path.read_text(encoding="utf-8"))
        if plain["format"] != _FORMAT:
            raise ModelError(
                f"{path}: format must be {_FORMAT}, got {plain['format']}",
                hint="use the version of rlhf that wrote it, or run its stage again",
            )
        keys = frozenset((folder / TRAINED_FILE).read_text(encoding="ascii").split())
        if any(len(key) != _KEY_LENGTH for key in keys):
            raise ValueError(f"{TRAINED_FILE} holds lines that are not keys")
        split = plain["split"]
        data = DataSettings(
            prompt_template=plain["prompt_template"],
            template_kwargs=plain["template_kwargs"],
            holdout=split["holdout"],
            split_seed=split["seed"],
        )
        return Contract(
            data.prompt_template,
            data.template_kwargs or {},
            SamplingSettings.model_validate(plain["sampling"]),
            split_of(data),
            bool(plain["samples_in_training"]),
            keys,
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(
            f"{path} or {TRAINED_FILE} beside it is damaged: {_reason(error)}",
            hint="run the stage that wrote them again",
        ) from error


def _reason(error: Exception) -> str:
    """Say in one line what is wrong; pydantic's own message has several."""
    if isinstance(error, ValidationError):
        first = error.errors()[0]
        return f"`{'.'.join(map(str, first['loc']))}`: {first['msg']}"
    return f"`{error.args[0]}` is missing" if isinstance(error, KeyError) else str(error)


def split_of(data: DataSettings, *contracts: Contract | None) -> Split:
    """Return which prompts are held out: by the recipe, else by the first contract, else by the defaults."""
    inherited = next((contract.split for contract in contracts if contract is not None), _DEFAULT_SPLIT)
    return Split(
        inherited.holdout if data.holdout is None else data.holdout,
        inherited.seed if data.split_seed is None else data.split_seed,
    )


def keys_of(records: Iterable[Record]) -> frozenset[str]:
    """Return the keys of the prompts of records, as `Contract.trained_prompts` has them."""
    return frozenset(split_key(question(record)) for record in records)
