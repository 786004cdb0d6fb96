"""Which attention a loaded model computes with: transformers' own, or one of our backends once it has shown parity."""

from __future__ import annotations

from functools import cache

from transformers import PreTrainedModel

from rlhf_cli.attention import hugging_face, parity, registry
from rlhf_cli.errors import ModelError
from rlhf_cli.progress import say


def is_our_attention(name: str) -> bool:
    """Whether a name is `auto`, one of our backends or a user's function, and not one that transformers knows."""
    return name in registry.names() or (":" in name and "/" not in name.partition(":")[0])


def set_attention(model: PreTrainedModel, attention: str, name: str) -> None:
    """Let a model compute its attention by one of our backends, once it has shown that nothing changes by that.

    Under `auto` a model that cannot keeps transformers' own attention, and a line says so.

    Args:
        model: on its device.
        attention: as in `ModelSource`.
        name: of the model, for messages.

    Raises:
        ModelError: the model does not honor our attention, and it was asked for by name.
    """
    implementation = hugging_face.implementation(attention)
    try:
        parity.require(model, name, implementation)
    except ModelError as error:
        if attention != registry.AUTO:
            raise
        _tell_once(f"attention: transformers' own `{model.config._attn_implementation}`, since {error.message}")
        return
    model.set_attn_implementation(implementation)
    if attention == registry.AUTO:
        for backend, reason in registry.auto_choices.items():
            _tell_once(f"attention: `{backend}`, {reason}")


@cache
def _tell_once(line: str) -> None:
    say(line)
