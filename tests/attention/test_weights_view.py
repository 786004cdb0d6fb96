"""`rlhf attention show`: weights equal those of the model's own attention, and the page is self-contained."""

from __future__ import annotations

import base64
import json
import re
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer
from typer.testing import CliRunner

from rlhf_cli.attention import model_zoo, weights, weights_view
from rlhf_cli.attention.weights import AttentionWeights, LayerWeights, collect_weights
from rlhf_cli.cli.app import app
from rlhf_cli.errors import ModelError, UsageError
from rlhf_cli.models.build import build_model
from rlhf_cli.settings.shared import BuildSettings

TEXT = "the cat sat <b>on</b> the mat"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A model with two layers and two heads, and a tokenizer for the vocabulary size of the other tiny models."""
    made = tmp_path_factory.mktemp("show") / "tiny"
    sizes = {"hidden_size": 16, "layers": 2, "heads": 2, "feed_forward_size": 24, "vocab_size": 300}
    build_model(made, [TEXT] * 3, BuildSettings(**sizes, context_length=64), seed=0)
    return made


@pytest.fixture(scope="module")
def tokenizer(folder):
    return AutoTokenizer.from_pretrained(folder)


def tiny(family: str, monkeypatch):
    """A tiny model of a family, with the vocabulary of the tokenizer."""
    monkeypatch.setattr(model_zoo, "VOCAB_SIZE", 300)
    return model_zoo.tiny_model(family)


def page_data(page: str) -> dict:
    found = re.search(r'<script id="data" type="application/json">(.*?)</script>', page, re.DOTALL)
    assert found is not None
    return json.loads(found[1])


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_oss", "bert", "gemma2"])
def test_weights_are_those_of_the_models_own_attention(family, tokenizer, monkeypatch):
    model = tiny(family, monkeypatch)
    seen = collect_weights(model, tokenizer, TEXT, name="m")
    model.set_attn_implementation("eager")
    expected = model(torch.tensor([tokenizer(TEXT)["input_ids"]]), output_attentions=True).attentions
    assert [layer.label for layer in seen.layers] == ["layer 0", "layer 1"]
    for layer, theirs in zip(seen.layers, expected, strict=True):
        torch.testing.assert_close(layer.weights, theirs[0].detach(), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("family", ["t5", "bart"])
def test_an_encoder_decoder_has_encoder_decoder_and_cross_weights(family, tokenizer, monkeypatch):
    model = tiny(family, monkeypatch)
    seen = collect_weights(model, tokenizer, TEXT, name="m", decoder_text="the mat")
    model.set_attn_implementation("eager")
    decoder_ids = [{"t5": 0, "bart": 2}[family], *tokenizer("the mat")["input_ids"]]
    inputs = {
        "input_ids": torch.tensor([tokenizer(TEXT)["input_ids"]]),
        "decoder_input_ids": torch.tensor([decoder_ids]),
    }
    found = model(**inputs, output_attentions=True)
    theirs = {"encoder": found.encoder_attentions, "decoder": found.decoder_attentions, "cross": found.cross_attentions}
    assert {layer.label for layer in seen.layers} == {f"{part} {n}" for part in theirs for n in (0, 1)}
    for layer in seen.layers:
        torch.testing.assert_close(layer.weights, theirs[layer.part][layer.number][0].detach(), atol=1e-5, rtol=1e-4)
        queries, keys = seen.tokens_of(layer)
        assert layer.weights.shape[1:] == (len(queries), len(keys))
    assert len(seen.decoder_tokens) == len(decoder_ids)


def test_a_model_that_ignores_the_interface_is_refused_by_name(tokenizer, monkeypatch):
    monkeypatch.setattr(model_zoo, "VOCAB_SIZE", 300)
    model = model_zoo.tiny_model("bloom")
    with pytest.raises(ModelError, match="bloom"):
        collect_weights(model, tokenizer, TEXT, name="m")


def test_the_command_prints_two_paths_and_the_page_holds_the_weights(folder, tokenizer, tmp_path):
    pytest.importorskip("matplotlib")
    out = tmp_path / "new" / "folder"
    arguments = ["attention", "show", "--model", str(folder), "--text", TEXT, "--out", str(out)]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    assert done.stdout.splitlines() == [str(out / "attention.png"), str(out / "attention.html")]
    assert (out / "attention.png").read_bytes().startswith(b"\x89PNG")
    part = page_data((out / "attention.html").read_text())["parts"][0]
    assert part["queries"] == part["keys"] == [tokenizer.decode([i]) for i in tokenizer(TEXT)["input_ids"]]
    assert [layer["heads"] for layer in part["layers"]] == [[0, 1], [0, 1]]
    count = len(part["queries"])
    raw = base64.b64decode(part["layers"][1]["weights"])
    weights = (torch.tensor(list(raw)).view(2, count, count) / 255) ** 2
    assert weights.triu(1).abs().max() == 0
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, count), atol=0.03, rtol=0)


def test_one_head_of_one_layer(folder, tmp_path):
    pytest.importorskip("matplotlib")
    common = ["attention", "show", "--model", str(folder), "--text", TEXT]
    done = CliRunner().invoke(app, [*common, "--out", str(tmp_path), "--layer", "1", "--head", "1"])
    assert done.exit_code == 0, done.output
    (layer,) = page_data((tmp_path / "attention.html").read_text())["parts"][0]["layers"]
    assert (layer["number"], layer["heads"]) == (1, [1])
    for wrong, message in (
        (["--layer", "2"], "layer 2 does not exist; use 0 to 1"),
        (["--head", "2"], "head 2 does not exist"),
    ):
        refused = CliRunner().invoke(app, [*common, "--out", str(tmp_path), *wrong])
        assert isinstance(refused.exception, UsageError)
        assert message in str(refused.exception)


def test_text_is_escaped_in_the_page():
    evil = "</script><script>alert(1)</script>@DATA@"
    seen = AttentionWeights(f"<i>{evil}", (LayerWeights("", 0, torch.ones(1, 1, 1)),), (evil,))
    page = weights_view.render_html(seen)
    assert "<script>alert" not in page
    assert "<i>" not in page
    assert page_data(page)["parts"][0]["queries"] == [evil]


def test_the_page_loads_nothing():
    page = weights_view.render_html(AttentionWeights("m", (LayerWeights("", 0, torch.ones(1, 1, 1)),), ("a",)))
    assert "default-src 'none'" in page
    assert not re.search(r"https?:|//[a-z]|src=|@import|url\(|<link", page)


@pytest.mark.parametrize(
    ("text", "message"),
    [("", "the text is empty"), ("  \n", "the text is empty"), ("the cat " * 200, "the maximum is 256")],
)
def test_texts_too_short_or_too_long_are_refused(text, message, tokenizer, monkeypatch):
    with pytest.raises(UsageError, match=message):
        collect_weights(tiny("llama", monkeypatch), tokenizer, text, name="m")


def test_a_page_too_large_to_open_is_refused(tokenizer, monkeypatch):
    monkeypatch.setattr(weights, "MAX_WEIGHTS", 100)
    with pytest.raises(UsageError, match="8 heads over") as error:
        collect_weights(tiny("llama", monkeypatch), tokenizer, TEXT, name="m")
    assert "`--layer` and `--head`" in str(error.value.hint)


@pytest.mark.parametrize(
    ("token", "label"),
    [(" cat", "cat"), ("  ", "␣␣"), ("\n", "⏎"), ("$x$", "$x$"), ("a\x1bb", "a·b"), ("x" * 30, "x" * 13 + "…")],
)
def test_labels_show_whitespace_and_are_truncated(token, label):
    assert weights_view.token_label(token) == label
