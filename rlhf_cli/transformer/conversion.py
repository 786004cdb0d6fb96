"""GPT-2 and Llama checkpoints as explicit transformers, and back: the same weights under other names.

    GPT-2    learned positions, LayerNorm before each part, GELU; linear layers stored input first, Q, K and V in one
    Llama    rotary positions, RMSNorm before each part, SwiGLU, fewer key than query heads

Logits are the same to rounding. What a checkpoint has that the explicit transformer has not is refused by name.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor
from transformers import GPT2LMHeadModel, LlamaForCausalLM, PretrainedConfig, PreTrainedModel

from rlhf_cli.errors import ModelError
from rlhf_cli.transformer.config import TransformerConfig
from rlhf_cli.transformer.conversion_configs import TOKENS, explicit_config, gpt2_config, llama_config
from rlhf_cli.transformer.heads import TransformerForCausalLM

_OUTER = "model.decoder"


def as_explicit(model: PreTrainedModel, name: str = "the model") -> TransformerForCausalLM:
    """The same language model as an explicit transformer: its own weights, copied.

    Args:
        model: of transformers' `GPT2LMHeadModel` or `LlamaForCausalLM`.
        name: of it, for messages.

    Raises:
        ModelError: another architecture, or a setting or weight that the explicit transformer has not.
    """
    family = _family(model, name)
    config = explicit_config(model.config, name)
    state = _renamed(model, family, config.num_hidden_layers, name, to_ours=True)
    return _filled(TransformerForCausalLM, config, state, model, name)


def as_transformers(model: TransformerForCausalLM, name: str = "the model") -> PreTrainedModel:
    """The inverse of `as_explicit`, for programs that do not know the explicit transformer.

    Raises:
        ModelError: it is no explicit decoder, or has parts or weights that neither GPT-2 nor Llama has together.
    """
    if type(model) is not TransformerForCausalLM:
        raise ModelError(
            f"`{name}` is a {type(model).__name__}, and only an explicit decoder can be exported",
            hint="`rlhf transformer convert` makes one of a GPT-2 or a Llama",
        )
    reasons = []
    for family in _FAMILIES:
        try:
            theirs = family.config_of(model.config)
            found, wanted = (_parts(config) for config in (explicit_config(theirs, name), model.config))
        except (ValueError, StrictDataclassError) as error:  # sizes that this family cannot have
            reasons.append(f"as a {family.name}, {' '.join(str(error).split())}")
            continue
        differing = [key for key in wanted if wanted[key] != found[key]]
        if not differing:
            state = _renamed(model, family, model.config.num_hidden_layers, name, to_ours=False)
            return _filled(family.kind, theirs, state, model, name)
        reasons.append(f"{family.name} has no `{differing[0]}: {getattr(model.config, differing[0])}`")
    raise ModelError(
        f"`{name}` is neither a GPT-2 nor a Llama: {'; '.join(reasons)}",
        hint="use it as it is: after `import rlhf_cli.transformer`, `AutoModelForCausalLM.from_pretrained` loads it",
    )


@dataclass(frozen=True)
class _Family:
    """How an architecture names its modules.

    Attributes:
        name: of the family.
        kind: transformers' class.
        config_of: its configuration, of one of ours.
        layers: what stands before a layer's number.
        outside: modules outside the layers, theirs to ours.
        inside: modules of a layer, theirs to ours; several of ours where theirs are one.
        is_input_first: linear layers inside are stored (in, out).
    """

    name: str
    kind: type[PreTrainedModel]
    config_of: Callable[[TransformerConfig], PretrainedConfig]
    layers: str
    outside: dict[str, str]
    inside: dict[str, tuple[str, ...]]
    is_input_first: bool = False

    def modules(self, layers: int) -> Iterator[tuple[str, tuple[str, ...], bool]]:
        """Every module: theirs, ours, and whether its matrix is stored the other way round."""
        for theirs, ours in self.outside.items():
            yield theirs, (ours,), False
        for layer in range(layers):
            for theirs, names in self.inside.items():
                ours = tuple(f"{_OUTER}.layers.{layer}.{name}" for name in names)
                yield f"{self.layers}.{layer}.{theirs}", ours, self.is_input_first


_GPT2 = _Family(
    name="GPT-2",
    kind=GPT2LMHeadModel,
    config_of=gpt2_config,
    layers="transformer.h",
    outside={
        "transformer.wte": f"{_OUTER}.embed_tokens",
        "transformer.wpe": f"{_OUTER}.positions.table",
        "transformer.ln_f": f"{_OUTER}.norm",
        "lm_head": "lm_head",
    },
    inside={
        "ln_1": ("self_attention_norm",),
        "attn.c_attn": ("self_attention.q_proj", "self_attention.k_proj", "self_attention.v_proj"),
        "attn.c_proj": ("self_attention.o_proj",),
        "ln_2": ("feed_forward_norm",),
        "mlp.c_fc": ("feed_forward.up_proj",),
        "mlp.c_proj": ("feed_forward.down_proj",),
    },
    is_input_first=True,
)
_LLAMA = _Family(
    name="Llama",
    kind=LlamaForCausalLM,
    config_of=llama_config,
    layers="model.layers",
    outside={
        "model.embed_tokens": f"{_OUTER}.embed_tokens",
        "model.norm": f"{_OUTER}.norm",
        "lm_head": "lm_head",
    },
    inside={
        "input_layernorm": ("self_attention_norm",),
        **{f"self_attn.{name}": (f"self_attention.{name}",) for name in ("q_proj", "k_proj", "v_proj", "o_proj")},
        "post_attention_layernorm": ("feed_forward_norm",),
        **{f"mlp.{name}": (f"feed_forward.{name}",) for name in ("gate_proj", "up_proj", "down_proj")},
    },
)
_FAMILIES = (_GPT2, _LLAMA)


def _family(model: PreTrainedModel, name: str) -> _Family:
    for family in _FAMILIES:
        if type(model) is family.kind:
            return family
    raise ModelError(
        f"`{name}` is a {type(model).__name__}, which the explicit transformer cannot be",
        hint="it takes language models of the GPT-2 and Llama families (SmolLM2 and TinyLlama are Llamas)",
    )


def _parts(config: TransformerConfig) -> dict[str, Any]:
    """What the weights mean, without what only says how to train or store them."""
    own = {key for key in TransformerConfig.__annotations__ if key not in ("initializer_range", "use_cache", *TOKENS)}
    return {key: value for key, value in config.to_dict().items() if key in own}


def _renamed(model: PreTrainedModel, family: _Family, layers: int, name: str, *, to_ours: bool) -> dict[str, Tensor]:
    """Weights under the other names, split or joined, and transposed where the family stores them so.

    Raises:
        ModelError: a weight that has no other name; dropped, the model would compute something else.
    """
    state = model.state_dict()
    renamed: dict[str, Tensor] = {}
    used: set[str] = set()
    for theirs, ours, input_first in family.modules(layers):
        for leaf in ("weight", "bias"):
            names, source = [f"{module}.{leaf}" for module in ours], f"{theirs}.{leaf}"
            if to_ours and source in state:
                used.add(source)
                tensor = state[source]
                turned = tensor.t() if input_first and tensor.dim() == 2 else tensor
                renamed.update(zip(names, turned.chunk(len(names)), strict=True))
            elif not to_ours and all(module in state for module in names):
                used.update(names)
                joined = torch.cat([state[module] for module in names])
                renamed[source] = joined.t() if input_first and joined.dim() == 2 else joined
    if strange := [weight for weight in state if weight not in used]:
        raise ModelError(
            f"`{name}` has {len(strange):,} weights that a plain {family.name} has not, such as `{strange[0]}`",
            hint="merge adapters first; other changes to a model cannot be converted",
        )
    return renamed


def _filled(
    kind: type[Any], config: PretrainedConfig, state: dict[str, Tensor], like: PreTrainedModel, name: str
) -> Any:
    """A model of these weights, copied, in the precision and on the device of another."""
    model = kind(config).to(device=like.device, dtype=like.dtype)
    try:
        model.load_state_dict(state, strict=True)
    except RuntimeError as error:
        raise ModelError(
            f"the weights of `{name}` are not those of its configuration: {' '.join(str(error).split())}",
            hint="give the folder of a whole, unchanged language model",
        ) from error
    model.generation_config = copy.deepcopy(like.generation_config)
    return model.train(like.training)
