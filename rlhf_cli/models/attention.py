"""Set the attention of a loaded model: transformers' own, or one of our backends after a parity check."""

from __future__ import annotations

from transformers import PreTrainedModel

from rlhf_cli.attention import hugging_face, parity, registry
from rlhf_cli.errors import ModelError
from rlhf_cli.models.backbone import is_recurrent
from rlhf_cli.progress import detail, say_once


def is_our_attention(name: str) -> bool:
    """Return whether a name is `auto`, one of our backends or a user's function, not a name of transformers."""
    return name in registry.names() or (":" in name and "/" not in name.partition(":")[0])


def set_attention(model: PreTrainedModel, attention: str, name: str) -> None:
    """Switch a model to one of our attention backends, if it computes the same outputs with it.

    With `auto`, a model that fails the parity check keeps transformers' own attention, and a message says so.

    Args:
        model: a model on its device.
        attention: as in `ModelSource`.
        name: of the model, for messages.

    Raises:
        ModelError: the model fails the check, and the backend was selected by name.
    """
    implementation = hugging_face.implementation(attention)
    try:
        if is_recurrent(model):
            raise ModelError(
                f"the {model.config.model_type} model `{name}` has layers that carry a state from token to token, "
                "which our layouts cannot keep apart",
                hint="rerun with `--attention sdpa`; batches are then padded",
            )
        parity.require(model, name, implementation)
    except ModelError as error:
        if attention != registry.AUTO:
            raise
        say_once(f"attention: transformers' own `{model.config._attn_implementation}`, because {error.message}")
        return
    model.set_attn_implementation(implementation)
    if attention == registry.AUTO:
        for backend, reason in registry.auto_choices.items():
            detail(f"attention: `{backend}`, {reason}")
