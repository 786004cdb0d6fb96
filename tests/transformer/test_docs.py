"""docs/transformer.md names what exists: every file, and the function beside every equation."""

from __future__ import annotations

import functools
import importlib
import re
from pathlib import Path

import pytest

from rlhf_cli.settings.shared import BuildSettings

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "docs" / "transformer.md").read_text(encoding="utf-8")
MODULES = [
    importlib.import_module(f"rlhf_cli.transformer.{path.stem}")
    for path in sorted((ROOT / "rlhf_cli" / "transformer").glob("[!_]*.py"))
]
EQUATIONS = {
    "sinusoids": "positions",
    "rotation": "positions",
    "rotate": "positions",
    "scaled_frequencies": "positions",
    "scaled_dot_product_attention": "multi_head",
    "MultiHeadAttention": "multi_head",
    "FeedForward": "feed_forward",
    "GatedFeedForward": "feed_forward",
    "LayerNorm": "norms",
    "RMSNorm": "norms",
    "residual": "blocks",
    "Block": "blocks",
    "Stack": "model",
    "TransformerModel": "model",
    "as_explicit": "conversion",
    "as_transformers": "conversion",
}


@pytest.mark.parametrize(("name", "module"), EQUATIONS.items())
def test_what_computes_an_equation_is_named_and_there(name: str, module: str):
    assert f"`{name}`" in TEXT
    assert getattr(importlib.import_module(f"rlhf_cli.transformer.{module}"), name).__doc__


def test_every_class_and_method_named_exists():
    named = set(re.findall(r"`([A-Z][a-z]+[A-Za-z]*(?:\.\w+)?)`", TEXT)) - {"AutoModelForCausalLM.from_pretrained"}
    assert {"Stack._masks", "MultiHeadAttention._memory_heads", "TransformerConfig.vaswani_2017"} <= named
    for name in named:
        owners = [module for module in MODULES if hasattr(module, name.split(".")[0])]
        assert owners, name
        functools.reduce(getattr, name.split("."), owners[0])


def test_every_file_named_exists():
    files = re.findall(r"^    (\w+\.py) ", TEXT, flags=re.MULTILINE)
    assert len(files) == 9
    assert all((ROOT / "rlhf_cli" / "transformer" / name).is_file() for name in files)


def test_settings_of_the_example_and_the_table_are_the_recipes():
    used = re.findall(r"model\.build\.(\w+)=", TEXT)
    tabled = {
        "architecture",
        "positions",
        "norm",
        "norm_placement",
        "feed_forward",
        "biases",
        "tied_embeddings",
        "key_heads",
    }
    assert used
    assert all(f"`{name}`" in TEXT for name in tabled)
    assert set(used) | tabled <= BuildSettings.model_fields.keys()
