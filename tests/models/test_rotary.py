"""With rope types `dynamic` and `longrope` no number depends on what else is in a batch."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from rlhf_cli.generation.decoding import decoded_logprobs, scored_logprobs
from rlhf_cli.models.attention import set_attention
from rlhf_cli.models.loading import ModelSource, context_length, load_policy
from rlhf_cli.models.rotary import pin_rotary_frequencies, switching_length
from tests.conftest import byte_level_tokenizer

SIZES = {"vocab_size": 320, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2}
SIZES |= {"num_attention_heads": 4, "num_key_value_heads": 4, "pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0}


def longrope(original: int) -> dict:
    factors = {"short_factor": [1.0] * 8, "long_factor": [float(number + 1) for number in range(8)]}
    return {"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": original, **factors}


def dynamic(base: float) -> dict:
    return {"rope_type": "dynamic", "factor": 4.0, "rope_theta": base}


PER_LAYER = {"full_attention": dynamic(5e3), "sliding_attention": {"rope_type": "default", "rope_theta": 100.0}}
WINDOWS = {"head_dim": 16, "sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}
MODELS = {
    "phi3": (
        {"max_position_embeddings": 128, "original_max_position_embeddings": 32, "rope_parameters": longrope(32)},
        32,
    ),
    "llama": ({"max_position_embeddings": 32, "rope_parameters": dynamic(1e4)}, 32),
    "qwen2": ({"max_position_embeddings": 256, "rope_parameters": longrope(16)}, 16),
    "gpt_neox": ({"max_position_embeddings": 24, "rope_parameters": dynamic(5e3)}, 24),
    "gemma3_text": ({"max_position_embeddings": 24, "rope_parameters": PER_LAYER, **WINDOWS}, 24),
}


def made(family: str):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **SIZES | MODELS[family][0])).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(4)
    return model


def texts() -> tuple[list[list[int]], list[list[int]]]:
    ids = torch.randint(5, 300, (90,), generator=torch.Generator().manual_seed(1)).tolist()
    return [ids[:4], ids[:4], ids[4:34]], [ids[34:40], ids[40:80], ids[60:90]]


@torch.no_grad()
def differences(model) -> list[float]:
    """Of a short completion, alone and in a batch; of a long one, sampled and scored."""
    prompts, completions = texts()
    together, drawn = (read(model, prompts, completions) for read in (scored_logprobs, decoded_logprobs))
    alone = scored_logprobs(model, prompts[:1], completions[:1])[0]
    long = scored_logprobs(model, prompts[2:], completions[2:])[0]
    return [float((one - other).abs().max()) for one, other in ((together[0], alone), (drawn[2], long))]


@pytest.mark.parametrize("attention", ["auto", "sdpa"])
@pytest.mark.parametrize("family", MODELS)
def test_log_probabilities_are_the_same_in_a_batch_and_alone(family, attention):
    model = made(family)
    assert differences(model)[0] > 1e-3, "transformers' own choice depends on the batch"
    model = made(family)
    pin_rotary_frequencies(model, "it")
    if attention == "auto":
        set_attention(model, "auto", "it")
    assert max(differences(model)) < 1e-4


@pytest.mark.parametrize("family", MODELS)
def test_texts_up_to_the_original_length_are_those_of_transformers(family, tmp_path, capsys):
    model = made(family)
    model.save_pretrained(tmp_path)
    byte_level_tokenizer().save_pretrained(tmp_path)
    ours, limit = load_policy(ModelSource(str(tmp_path))), MODELS[family][1]
    said = f"reads at most {limit:,} tokens" in capsys.readouterr().err
    assert said == (limit < model.config.max_position_embeddings)
    assert context_length(ours.config) == limit == switching_length(ours.config)
    ids = torch.arange(5, 5 + limit).unsqueeze(0)
    with torch.no_grad():
        torch.testing.assert_close(ours(input_ids=ids).logits, model(input_ids=ids).logits, atol=1e-4, rtol=1e-4)


def test_other_rope_types_keep_their_length():
    config = AutoConfig.for_model("llama", max_position_embeddings=64)
    assert switching_length(config) is None
    assert context_length(config) == 64
