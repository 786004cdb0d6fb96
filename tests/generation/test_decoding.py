"""Cached decoding of families with recurrent layers, experts or states of their own, and the check at loading."""

from __future__ import annotations

import pytest
import torch

from rlhf_cli.errors import ModelError
from rlhf_cli.generation import decoding
from rlhf_cli.generation.decoding import Decoding, batches, check_decoding
from rlhf_cli.generation.generator import Request
from rlhf_cli.generation.policy import Policy
from rlhf_cli.generation.sampling import Sampling
from rlhf_cli.generation.torch_generator import TorchGenerator
from rlhf_cli.models.backbone import is_recurrent
from rlhf_cli.models.loading import ModelSource, recompute_activations
from tests.conftest import byte_level_tokenizer
from tests.families.zoo import save_tiny, tiny_model

RECURRENT = ("jamba", "lfm2", "qwen3_5_text", "mamba", "falcon_h1")
PROMPTS = [[5, 6, 7], list(range(9, 28)), list(range(40, 59)), [3], [70, 71, 72]]


@pytest.mark.parametrize("family", [*RECURRENT, "llama4_text"])
def test_completions_are_the_same_in_a_batch_and_alone(family, tmp_path):
    source = ModelSource(str(save_tiny(family, byte_level_tokenizer(pad=True), tmp_path)))
    policy = Policy.load(source, Sampling(max_new_tokens=12, temperature=1.3))
    policy.stop_ids = set(range(0, 320, 9))  # rows end at different steps
    requests = [Request(ids, seed) for seed, ids in enumerate(PROMPTS)]
    together = TorchGenerator().generate(policy, requests)
    assert len({len(one.ids) for one in together}) > 1
    assert together == [TorchGenerator().generate(policy, [one])[0] for one in requests]


@pytest.mark.parametrize(("family", "expected"), [*((family, True) for family in RECURRENT), ("gemma3", False)])
def test_recurrent_layers_are_found_in_the_configuration(family, expected):
    assert is_recurrent(tiny_model(family, byte_level_tokenizer(pad=True))) is expected


def test_batches_of_a_recurrent_model_have_prompts_of_one_length(monkeypatch):
    lengths = [1, 1, 1, 2, 4, 4]
    for recurrent, expected in ((True, [(0, 2), (2, 3), (3, 4), (4, 6)]), (False, [(0, 2), (2, 4), (4, 6)])):
        monkeypatch.setattr(decoding, "is_recurrent", lambda model, found=recurrent: found)
        assert [(span.start, span.stop) for span in batches(None, lengths, 2)] == expected  # pyright: ignore


def test_a_model_with_a_state_of_its_own_is_refused_by_name():
    with pytest.raises(ModelError, match="the recurrent_gemma model `it` cannot be sampled from: it keeps its state"):
        check_decoding(tiny_model("recurrent_gemma", byte_level_tokenizer(pad=True)), "it")


def test_a_model_that_samples_otherwise_than_it_scores_is_refused(monkeypatch):
    model = tiny_model("llama", byte_level_tokenizer(pad=True))
    check_decoding(model, "it")
    monkeypatch.setattr(Decoding, "keep", lambda self, rows: keep(self, [0] * len(rows)))
    with pytest.raises(ModelError, match="scores tokens otherwise when it is sampled than when it is scored"):
        check_decoding(model, "it")


keep = Decoding.keep


def test_the_check_does_not_mind_recomputed_activations_and_leaves_training_mode():
    model = tiny_model("qwen2", byte_level_tokenizer(pad=True))
    recompute_activations(model)
    check_decoding(model, "it")
    assert model.training


def test_a_model_whose_results_depend_on_the_batch_is_refused(monkeypatch):
    model = tiny_model("llama", byte_level_tokenizer(pad=True))
    forward = type(model.model).forward

    def shifted(self, *, input_ids: torch.Tensor, **arguments):
        return forward(self, input_ids=input_ids + (len(input_ids) > 1), **arguments)

    monkeypatch.setattr(type(model.model), "forward", shifted)
    with pytest.raises(ModelError, match="scores tokens otherwise in a batch than alone"):
        check_decoding(model, "it")


def test_a_model_that_fails_is_refused_and_a_bug_of_ours_is_not(monkeypatch):
    model = tiny_model("mistral", byte_level_tokenizer(pad=True))
    with monkeypatch.context() as broken:
        broken.setattr(decoding, "pad", lambda prompts, side: (0, 0))
        with pytest.raises(AttributeError, match="'int' object"):
            check_decoding(model, "it")
    forward = type(model.model).forward

    def fail(self, *, input_ids, attention_mask=None, **arguments):
        if attention_mask is not None:
            raise KeyError("theirs")
        return forward(self, input_ids=input_ids, **arguments)

    monkeypatch.setattr(type(model.model), "forward", fail)
    with pytest.raises(ModelError, match="the mistral model `it` cannot be sampled from: KeyError: 'theirs'"):
        check_decoding(model, "it")
