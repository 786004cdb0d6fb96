"""What `rlhf start` finds out about a model: whether it can be a policy, its size, how it is prompted."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rlhf_cli.data.chat_format import PromptFormat
from rlhf_cli.errors import raise_all
from rlhf_cli.generation.contract import Contract, read_contract
from rlhf_cli.generation.prompts import PromptStyle, prompt_format
from rlhf_cli.models.role import ModelRole
from rlhf_cli.progress import warn

_PLAIN = "{prompt}\n"
"""Template for a model without a chat template: where the prompt ends, so that a completion can begin."""


@dataclass(frozen=True)
class ModelFacts:
    """A model that can be a policy.

    Attributes:
        path: folder or hub id.
        family: such as "llama".
        weights: number of weights; None where they are not on this machine.
        context: tokens that it reads.
        has_template: whether its tokenizer has a chat template.
        contract: how it was trained, if a stage of ours did.
        settings: settings of `data` by which it is prompted, as far as they differ from the defaults.
        format: how its prompts become tokens.
    """

    path: str
    family: str
    weights: int | None
    context: int
    has_template: bool
    contract: Contract | None
    settings: Mapping[str, Any]
    format: PromptFormat

    @property
    def described(self) -> str:
        """Size and prompting, in a line."""
        size = "weights not downloaded yet" if self.weights is None else f"{_count(self.weights)} parameters"
        return f"{self.family}, {size}, {self.context:,}-token context, prompted {PromptStyle.of(self.format)}"

    @property
    def continues_text(self) -> bool:
        """Whether it was neither trained here nor has a chat template: it continues text, and replies to nobody."""
        return not self.has_template and self.contract is None


def inspect_model(path: str) -> ModelFacts:
    """Check a model as a policy, from its small files and the headers of its weights, and say how it is prompted.

    Raises:
        ModelError: there is no such model, or it cannot be a policy.
    """
    from rlhf_cli.models.loading import ModelSource, context_length, load_config, load_tokenizer
    from rlhf_cli.models.model_shape import ModelShape

    source = ModelSource(path)
    contract = read_contract(path)
    check_role(path, "policy")
    config, tokenizer = load_config(source), load_tokenizer(source)
    template = getattr(tokenizer, "chat_template", None)
    settings = {} if contract is not None else _settings(template)
    if contract is not None:
        style = PromptStyle(contract.prompt_template, contract.template_kwargs)
    else:
        chat = "chat" if template else None
        style = PromptStyle(settings.get("prompt_template", chat), settings.get("template_kwargs", {}))
    shape = ModelShape.of(source.folder)
    return ModelFacts(
        path=path,
        family=str(config.model_type),
        weights=None if shape is None else shape.weights,
        context=context_length(config),
        has_template=bool(template),
        contract=contract,
        settings=settings,
        format=prompt_format(source, style, tokenizer),
    )


def check_role(path: str, role: ModelRole) -> None:
    """Check that a model can have a role; warns of what a run can go on with.

    Raises:
        ModelError: it cannot.
    """
    from rlhf_cli.models.findings import ModelUse
    from rlhf_cli.models.loading import ModelSource
    from rlhf_cli.models.preflight import check_model

    found = check_model(ModelUse(ModelSource(path), role))
    raise_all(found.errors)
    for warning in found.warnings:
        warn(warning)


def _settings(template: object) -> dict[str, Any]:
    """Settings of `data` for a model that no stage of ours has trained."""
    if not template:
        return {"prompt_template": _PLAIN}
    # A reasoning block would fill a short completion, and only the reply behind it is what people rank.
    return {"template_kwargs": {"enable_thinking": False}} if "enable_thinking" in str(template) else {}


def _count(number: int) -> str:
    """A number of weights in words: 135 million, 1.2 billion."""
    for size, word in ((10**9, "billion"), (10**6, "million")):
        if number >= size:
            share = number / size
            return f"{share:.1f} {word}" if share < 10 else f"{share:,.0f} {word}"
    return f"{number:,}"
