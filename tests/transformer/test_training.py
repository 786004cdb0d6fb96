"""Every setting trains, and the model of 2017 learns what a transformer of 2017 can."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from rlhf_cli.models.build import build_model
from rlhf_cli.models.loading import ModelSource, load_policy, load_tokenizer
from rlhf_cli.settings.shared import BuildSettings
from rlhf_cli.transformer import TransformerConfig, TransformerForSeq2SeqLM

SETTINGS: list[dict[str, Any]] = [
    {},
    {"positions": "learned"},
    {"positions": "sinusoidal", "scale_embeddings": True},
    {"norm": "layer"},
    {"norm_placement": "post"},
    {"feed_forward": "relu"},
    {"feed_forward": "gelu"},
    {"feed_forward": "gelu-tanh"},
    {"attention_biases": True},
    {"feed_forward_biases": True},
    {"num_key_value_heads": 1},
    {"head_dim": 16},
    {"tie_word_embeddings": True},
    {"rope_base": 100.0},
    {"norm_eps": 0.05},
    {
        "llama3_rope": {
            "factor": 4.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8,
        }
    },
]


def train(
    model: PreTrainedModel, batches: Iterator[dict[str, Tensor]], steps: int, learning_rate: float
) -> list[float]:
    optimizer = torch.optim.Adam(model.parameters(), lr=learning_rate)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / 20, 1.0) * (1.0 - step / steps)
    )
    losses = []
    model.train()
    for batch in itertools.islice(batches, steps):
        loss = model(**batch).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    model.eval()
    return losses


def copies(architecture: str) -> Iterator[dict[str, Tensor]]:
    """Five random tokens, then the same again: the second half is known to whoever looks six places back."""
    generator = torch.Generator().manual_seed(0)
    while True:
        words = torch.randint(8, 40, (32, 5), generator=generator)
        if architecture == "encoder-decoder":
            yield {"input_ids": words, "labels": words}
            continue
        ids = torch.cat([words, torch.full((32, 1), 2), words], dim=1)
        labels = ids.clone()
        labels[:, :6] = -100
        if architecture == "encoder":
            ids = ids.clone()
            ids[:, 6:] = 3  # hidden
        yield {"input_ids": ids, "labels": labels}


LEARNED = 0.9 * math.log(32)
"""In nats a word. Whoever does not look at the first half cannot do better than the logarithm of 32 words."""


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_every_setting_matters_and_trains(tiny: Callable[..., PreTrainedModel], setting: dict[str, Any]):
    sizes = {"hidden_size": 32, "intermediate_size": 32}
    model, plain = tiny(**(sizes | setting)), tiny(**sizes)
    ids = next(copies("decoder"))["input_ids"]
    with torch.no_grad():
        if {name: weight.shape for name, weight in model.named_parameters()} == {
            name: weight.shape for name, weight in plain.named_parameters()
        }:
            model.load_state_dict(plain.state_dict())
            assert setting == {} or (model(ids).logits - plain(ids).logits).abs().max() > 1e-3
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    losses = train(model, copies("decoder"), steps=100, learning_rate=1e-2)
    assert sum(losses[-5:]) / 5 < LEARNED
    assert all((weight != before[name]).any() for name, weight in model.named_parameters())


@pytest.mark.parametrize("architecture", ["encoder", "encoder-decoder"])
def test_every_architecture_trains(tiny: Callable[..., PreTrainedModel], architecture: str):
    model = tiny(architecture=architecture, hidden_size=32, intermediate_size=32)
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    losses = train(model, copies(architecture), steps=100, learning_rate=1e-2)
    assert sum(losses[-5:]) / 5 < LEARNED
    assert all((weight != before[name]).any() for name, weight in model.named_parameters())


START, END, FIRST, WORDS = 0, 1, 2, 12


def reversals(generator: torch.Generator, *, held_out: bool, size: int = 64) -> dict[str, Tensor]:
    """Sequences of 2 to 6 of ten words with their reversals; held out are those whose words sum to a multiple of 5."""
    ids, labels = torch.full((size, 6), START), torch.full((size, 7), -100)
    for row in range(size):
        while True:
            length = int(torch.randint(2, 7, (), generator=generator))
            words = torch.randint(FIRST, FIRST + 10, (length,), generator=generator)
            if (int(words.sum()) % 5 == 0) == held_out:
                break
        ids[row, :length] = words
        labels[row, : length + 1] = torch.cat([words.flip(0), torch.tensor([END])])
    return {"input_ids": ids, "attention_mask": (ids != START).long(), "labels": labels}


def test_model_of_2017_learns_to_reverse():
    config = TransformerConfig.vaswani_2017(
        vocab_size=WORDS,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=16,
        initializer_range=64**-0.5,
        pad_token_id=START,
        eos_token_id=END,
        decoder_start_token_id=START,
    )
    assert (config.positions, config.norm, config.norm_placement, config.feed_forward) == (
        "sinusoidal",
        "layer",
        "post",
        "relu",
    )
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    model = TransformerForSeq2SeqLM(config)
    train(model, iter(lambda: reversals(generator, held_out=False), None), steps=300, learning_rate=3e-3)
    test = reversals(generator, held_out=True, size=256)
    written = model.generate(
        test["input_ids"], attention_mask=test["attention_mask"], max_new_tokens=7, do_sample=False
    )[:, 1:]
    wanted = test["labels"].masked_fill(test["labels"] == -100, START)[:, : written.shape[1]]
    assert (written == wanted).all(dim=1).float().mean() > 0.95


@pytest.mark.parametrize(
    "parts",
    [
        {"architecture": "encoder-decoder", "positions": "sinusoidal", "norm": "layer", "norm_placement": "post"},
        {
            "positions": "learned",
            "feed_forward": "gelu-tanh",
            "norm": "layer",
            "biases": "all",
            "tied_embeddings": True,
        },
        {"key_heads": 2},
    ],
    ids=["2017", "gpt2", "grouped"],
)
def test_built_model_of_other_parts_trains_on_text(tmp_path: Path, parts: dict[str, Any]):
    texts = ["How often should I water my basil?", "Water basil in the morning, when the soil feels dry."]
    sizes = {
        "hidden_size": 32,
        "layers": 1,
        "heads": 4,
        "feed_forward_size": 64,
        "vocab_size": 300,
        "context_length": 64,
    }
    build_model(tmp_path, texts, BuildSettings(**sizes, **parts), seed=0)
    model, tokenizer = load_policy(ModelSource(str(tmp_path))), load_tokenizer(ModelSource(str(tmp_path)))
    question, answer = (tokenizer(text, return_tensors="pt").input_ids for text in texts)
    if model.config.is_encoder_decoder:
        batch = {"input_ids": question, "labels": answer}
    else:
        joined = torch.cat([question, answer], dim=1)
        batch = {"input_ids": joined, "labels": joined}
    losses = train(model, itertools.repeat(batch), steps=30, learning_rate=1e-2)
    assert losses[-1] < 0.3 * losses[0]
