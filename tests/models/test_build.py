"""A model from nothing: an ordinary folder, the same bytes every time, a tokenizer that loses nothing."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from rlhf_cli.data.chat_format import PromptFormat
from rlhf_cli.errors import ModelError
from rlhf_cli.models.build import build_model, random_model, train_tokenizer
from rlhf_cli.models.loading import ModelSource, load_config, load_policy, load_tokenizer
from rlhf_cli.settings.shared import BuildSettings
from rlhf_cli.transformer.config import TransformerConfig
from rlhf_cli.transformer.conversion_configs import explicit_config
from tests.gpu.ledger import Ledger

SIZES = {"hidden_size": 32, "layers": 2, "heads": 4, "feed_forward_size": 48, "vocab_size": 300, "context_length": 64}
TEXTS = ["How often should I water my basil?", "Water basil in the morning, when the soil feels dry."] * 3


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("built") / "model"
    build_model(folder, TEXTS, BuildSettings(**SIZES), seed=3)
    return folder


def test_folder_loads_as_any_other_model(folder: Path):
    source = ModelSource(str(folder))
    model, tokenizer = load_policy(source), load_tokenizer(source)
    assert model.config.model_type == "llama"
    assert model.config.max_position_embeddings == 64
    assert model.config.num_hidden_layers == 2
    assert model.config.vocab_size == len(tokenizer) <= 300
    assert model.get_input_embeddings().weight is not model.get_output_embeddings().weight
    assert not list(folder.glob("*.bin"))


def test_special_tokens_are_distinct_and_agree_with_the_model(folder: Path):
    source = ModelSource(str(folder))
    model, tokenizer = load_policy(source), load_tokenizer(source)
    assert tokenizer.eos_token_id != tokenizer.pad_token_id
    assert model.config.eos_token_id == model.generation_config.eos_token_id == tokenizer.eos_token_id
    assert model.config.pad_token_id == tokenizer.pad_token_id


@pytest.mark.parametrize(
    ("setting", "parts"),
    [
        ({}, {"positions": "rotary", "norm": "rms", "norm_placement": "pre", "feed_forward": "swiglu"}),
        ({"positions": "learned"}, {"positions": "learned", "scale_embeddings": False}),
        (
            {"positions": "sinusoidal", "heads": 32},
            {"positions": "sinusoidal", "scale_embeddings": True, "head_dim": 1},
        ),
        ({"norm": "layer"}, {"norm": "layer"}),
        ({"norm_placement": "post"}, {"norm_placement": "post"}),
        ({"feed_forward": "gelu-tanh"}, {"feed_forward": "gelu-tanh"}),
        ({"key_heads": 2}, {"num_attention_heads": 4, "num_key_value_heads": 2}),
        ({"biases": "all"}, {"attention_biases": True, "feed_forward_biases": True}),
        ({"biases": "feed-forward"}, {"attention_biases": False, "feed_forward_biases": True}),
        ({"head_dim": 6, "heads": 5}, {"head_dim": 6, "num_attention_heads": 5}),
        ({"rope_base": 500.0, "norm_eps": 1e-3}, {"rope_base": 500.0, "norm_eps": 1e-3}),
        ({"tied_embeddings": True}, {"tie_word_embeddings": True}),
    ],
    ids=str,
)
def test_every_part_reaches_the_model(tmp_path: Path, setting: dict[str, Any], parts: dict[str, Any]):
    build_model(tmp_path, TEXTS, BuildSettings(**SIZES | setting), seed=0)
    config = load_policy(ModelSource(str(tmp_path))).config
    if not isinstance(config, TransformerConfig):
        config = explicit_config(config)
    assert {name: getattr(config, name) for name in parts} == parts


@pytest.mark.parametrize(
    ("parts", "kind"),
    [
        ({}, "llama"),
        ({"positions": "learned", "norm": "layer", "feed_forward": "gelu-tanh", "biases": "all"}, "gpt2"),
        ({"norm": "layer"}, "rlhf-transformer"),
        ({"architecture": "encoder-decoder"}, "rlhf-transformer"),
    ],
)
def test_models_that_others_have_a_name_for_get_that_name(tmp_path: Path, parts: dict[str, Any], kind: str):
    build_model(tmp_path, TEXTS, BuildSettings(**SIZES | parts), seed=0)
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == kind


def test_encoder_decoder_starts_from_padding_and_writes(tmp_path: Path):
    build_model(tmp_path, TEXTS, BuildSettings(**SIZES, architecture="encoder-decoder"), seed=0)
    model, tokenizer = load_policy(ModelSource(str(tmp_path))), load_tokenizer(ModelSource(str(tmp_path)))
    assert model.config.is_encoder_decoder
    assert model.config.decoder_start_token_id == tokenizer.pad_token_id
    written = model.generate(tokenizer("Why?", return_tensors="pt").input_ids, max_new_tokens=4, min_new_tokens=4)
    assert written.shape == (1, 5)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"hidden_size": 32, "heads": 5}, "`heads` must divide `hidden_size`; got 5 and 32"),
        ({"hidden_size": 32, "heads": 32}, "rotary positions need an even head dimension; got 32 / 32 = 1"),
        ({"key_heads": 3}, "`key_heads` must divide `heads`; got 3 and 4"),
        ({"vocab_size": 200}, "greater than or equal to 260"),
        ({"hidden_size": 36, "heads": 12}, "rotary positions need an even head dimension; got 36 / 12 = 3"),
        ({"head_dim": 7}, "rotary positions need an even head dimension; got `head_dim: 7`"),
        ({"positions": "learned", "rope_base": 5.0}, "`rope_base` has no effect with `positions: learned`"),
        ({"biases": True}, "Input should be 'none', 'feed-forward' or 'all'"),
        ({"architecture": "encoder"}, "Input should be 'decoder' or 'encoder-decoder'"),
    ],
)
def test_recipe_refuses_parts_that_do_not_fit(setting: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=re.escape(message)):
        BuildSettings(**setting)


@pytest.mark.parametrize("text", ["Water basil.", "  two  spaces\n\nand\ttabs ", "don't , stop !", "Grüße, 水, 🌱", ""])
def test_tokenizer_loses_nothing(folder: Path, text: str):
    tokenizer = load_tokenizer(ModelSource(str(folder)))
    assert tokenizer.decode(tokenizer(text).input_ids) == text


def test_tokenizer_adds_no_token_of_its_own(folder: Path):
    form = PromptFormat(load_tokenizer(ModelSource(str(folder))), "Q: {prompt}\nA:\n")
    ids = form.prompt_ids("Why?")
    assert form.tokenizer.decode(ids) == "Q: Why?\nA:\n"
    assert form.completion_ids("Water it.")[-1] == form.tokenizer.eos_token_id


def test_tokenizer_learned_from_the_texts(folder: Path):
    tokenizer = load_tokenizer(ModelSource(str(folder)))
    assert len(tokenizer(" basil").input_ids) < len(tokenizer(" lisab").input_ids)


def test_same_seed_same_bytes_and_another_seed_other_weights(folder: Path, tmp_path: Path):
    before = torch.random.get_rng_state()
    build_model(tmp_path / "same", iter(TEXTS), BuildSettings(**SIZES), seed=3)
    build_model(tmp_path / "other", TEXTS, BuildSettings(**SIZES), seed=4)
    assert torch.equal(before, torch.random.get_rng_state())
    names = sorted(path.name for path in folder.iterdir())
    assert names == sorted(path.name for path in (tmp_path / "same").iterdir())
    for name in names:
        assert (folder / name).read_bytes() == (tmp_path / "same" / name).read_bytes(), name
    weights = "model.safetensors"
    assert (folder / weights).read_bytes() != (tmp_path / "other" / weights).read_bytes()


PARTS = {
    "llama": {},
    "tied llama": {"tied_embeddings": True, "key_heads": 2},
    "gpt2": {"positions": "learned", "norm": "layer", "feed_forward": "gelu-tanh", "biases": "all"},
    "decoder": {"norm": "layer", "norm_placement": "post", "biases": "feed-forward"},
    "encoder-decoder": {"architecture": "encoder-decoder", "tied_embeddings": True},
}


@pytest.mark.parametrize("parts", PARTS.values(), ids=PARTS)
def test_the_files_are_those_of_a_model_that_is_built_whole(parts: dict[str, Any], tmp_path: Path):
    """Drawn one at a time, each weight has the random numbers that it has in the whole model."""
    build_model(tmp_path / "drawn", TEXTS, BuildSettings(**SIZES | parts), seed=5)
    source = ModelSource(str(tmp_path / "drawn"))
    whole = random_model(load_config(source), seed=5)
    whole.generation_config = load_policy(source).generation_config
    whole.save_pretrained(tmp_path / "whole")
    names = [path.name for path in (tmp_path / "whole").iterdir()]
    assert {"config.json", "generation_config.json", "model.safetensors"} <= set(names)
    for name in names:
        assert (tmp_path / "drawn" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name


def test_weights_of_existing_recipes_do_not_change(folder: Path):
    """Some numbers of the model of seed 3, as the first version drew it whole."""
    weights = load_policy(ModelSource(str(folder))).state_dict()
    embedding, down = (weights[f"model.{name}.weight"] for name in ("embed_tokens", "layers.1.mlp.down_proj"))
    assert embedding[0, :3].tolist() == pytest.approx([0.0115480423, 0.0807685480, -0.1286667436], abs=1e-6)
    assert down[-1, -3:].tolist() == pytest.approx([0.3456681371, -0.1682380736, -0.0263471119], abs=1e-6)


class Held(TorchDispatchMode):
    """Follows the bytes of tensors that are alive."""

    def __init__(self) -> None:
        super().__init__()
        self.ledger = Ledger()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(found):
            if isinstance(leaf, torch.Tensor) and leaf.device.type == "cpu":
                self.ledger.hold(leaf.untyped_storage(), 0)
        return found


def test_no_more_than_a_few_matrices_are_in_memory(tmp_path: Path):
    build = BuildSettings(**SIZES | {"hidden_size": 64, "layers": 12, "feed_forward_size": 128})
    with Held() as held:
        build_model(tmp_path / "model", TEXTS, build, seed=0)
    largest = 4 * 128 * 300  # bytes; of the embedding, more than that of any other matrix
    whole = (tmp_path / "model" / "model.safetensors").stat().st_size
    assert whole > 20 * largest / 2
    assert largest / 4 < held.ledger.peak[0] < 4 * largest


def test_first_logits_have_unit_scale(folder: Path):
    source = ModelSource(str(folder))
    with torch.no_grad():
        logits = load_policy(source)(torch.arange(10, 40)[None]).logits
    assert 0.7 < float(logits.std()) < 1.4


def test_a_vocabulary_smaller_than_the_bytes_is_an_error():
    with pytest.raises(ModelError, match=r"must be at least 258 .*, got 200"):
        train_tokenizer(TEXTS, vocab_size=200, context_length=64)


def test_no_text_is_an_error(tmp_path: Path):
    with pytest.raises(ModelError, match="no text"):
        build_model(tmp_path / "model", [], BuildSettings(**SIZES), seed=0)
