"""The SFT loss against plain cross-entropy of the model's own logits, and its invariances."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import transformers.masking_utils
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from rlhf_cli.data.examples import Example
from rlhf_cli.errors import ModelError
from rlhf_cli.models.attention import set_attention
from rlhf_cli.models.backbone import reads_groups
from rlhf_cli.stages.sft.loss import (
    TokenCounts,
    check_packing,
    collator_for,
    mean_completion_nll,
    perplexity,
    sft_loss,
)
from tests.conftest import byte_level_tokenizer
from tests.families.zoo import tiny_model

EXAMPLES = [
    Example([11, 12, 13], [21, 22, 23, 24, 0]),
    Example([14], [25, 0]),
    Example([15, 16], [26, 27, 28, 0]),
    Example([], [31, 32, 33, 0]),
    Example([17, 18, 19, 20, 17], [0], earlier_turns=((1, 3),)),
    Example([12, 13], [34, 35, 36, 37, 38, 39, 0]),
]


def load(request: pytest.FixtureRequest, name: str) -> PreTrainedModel:
    if name == "neox":
        torch.manual_seed(1)
        sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
        return GPTNeoXForCausalLM(GPTNeoXConfig(vocab_size=320, **sizes)).eval()
    if name == "qwen3":
        torch.manual_seed(1)
        sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
        return Qwen3ForCausalLM(Qwen3Config(vocab_size=320, num_key_value_heads=2, head_dim=8, **sizes)).eval()
    kind = AutoModelForSeq2SeqLM if name == "tiny_t5" else AutoModelForCausalLM
    return kind.from_pretrained(request.getfixturevalue(name)).eval()


def batches(model: PreTrainedModel, rows: list[list[int]], sizes: list[int], *, packed: bool = False):
    collate, laid_out = collator_for(model, packed=packed), [[EXAMPLES[number] for number in row] for row in rows]
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    return [collate(laid_out[start : start + size]) for start, size in zip(starts, sizes, strict=True)]


def by_hand(model: PreTrainedModel, examples: list[Example], lm_coef: float) -> torch.Tensor:
    """Cross-entropy from the logits of one example at a time, as a textbook has it."""
    completion, text = [], []
    for example in examples:
        if model.config.is_encoder_decoder:
            if not example.prompt_ids:
                continue
            targets = torch.tensor(example.completion_ids)
            logits = model(input_ids=torch.tensor([example.prompt_ids]), labels=targets[None]).logits[0]
            completion.append(F.cross_entropy(logits.float(), targets, reduction="none"))
            continue
        ids = torch.tensor(example.prompt_ids + example.completion_ids)
        losses = F.cross_entropy(model(input_ids=ids[None]).logits[0, :-1].float(), ids[1:], reduction="none")
        text.append(losses)
        trained = range(len(example.prompt_ids), len(ids))
        trained = [*trained, *(token for turn in example.earlier_turns for token in range(*turn))]
        completion.append(losses[[token - 1 for token in trained if token]])
    loss = torch.cat(completion).mean()
    return loss + lm_coef * torch.cat(text).mean() if lm_coef else loss


def gradients(model: PreTrainedModel) -> torch.Tensor:
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


@pytest.mark.parametrize(
    ("name", "lm_coef"),
    [
        *[(name, lm_coef) for name in ("tiny_llama", "tiny_gpt2", "neox", "qwen3") for lm_coef in (0.0, 0.5)],
        ("tiny_t5", 0.0),
    ],
)
def test_loss_is_the_textbooks(name: str, lm_coef: float, request: pytest.FixtureRequest):
    model = load(request, name)
    chosen = [n for n in range(len(EXAMPLES)) if EXAMPLES[n].prompt_ids or name != "tiny_t5"]
    [batch] = batches(model, [[n] for n in chosen], [len(chosen)])
    loss = sft_loss(model, batch, TokenCounts.of([batch]), lm_coef=lm_coef)
    loss.backward()
    ours = gradients(model)
    model.zero_grad()
    expected = by_hand(model, [EXAMPLES[n] for n in chosen], lm_coef)
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), abs=1e-5)
    assert torch.allclose(ours, gradients(model), atol=1e-5)


@pytest.mark.parametrize("lm_coef", [0.0, 0.7])
@pytest.mark.parametrize("sizes", [[1] * 6, [2, 2, 2], [4, 2], [5, 1]])
def test_cutting_a_step_differently_changes_nothing(sizes: list[int], lm_coef: float, tiny_llama: Path):
    model = AutoModelForCausalLM.from_pretrained(tiny_llama)
    rows = [[n] for n in range(6)]

    def whole(cut: list[int]) -> tuple[float, torch.Tensor]:
        model.zero_grad()
        parts = batches(model, rows, cut)
        counts = TokenCounts.of(parts)
        total = 0.0
        for part in parts:
            loss = sft_loss(model, part, counts, lm_coef=lm_coef)
            loss.backward()
            total += loss.item()
        return total, gradients(model)

    loss, gradient = whole([6])
    other_loss, other_gradient = whole(sizes)
    assert other_loss == pytest.approx(loss, rel=1e-5)
    assert torch.allclose(gradient, other_gradient, atol=1e-6)


@pytest.mark.parametrize("name", ["tiny_llama", "tiny_gpt2", "neox", "qwen3"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_packed_equals_apart(name: str, attention: str, request: pytest.FixtureRequest):
    model = load(request, name)
    model.set_attn_implementation(attention)
    check_packing(model, name)
    results = []
    for rows, packed in [([[n] for n in range(6)], False), ([[0, 3, 1], [5], [2, 4]], True)]:
        model.zero_grad()
        [batch] = batches(model, rows, [len(rows)], packed=packed)
        loss = sft_loss(model, batch, TokenCounts.of([batch]), lm_coef=0.3)
        loss.backward()
        results.append((loss.item(), gradients(model)))
    assert results[0][0] == pytest.approx(results[1][0], abs=1e-5)
    assert torch.allclose(results[0][1], results[1][1], atol=1e-5)


def test_packing_that_would_leak_is_refused_by_name(tiny_llama: Path, tiny_t5: Path, monkeypatch: pytest.MonkeyPatch):
    model = AutoModelForCausalLM.from_pretrained(tiny_llama).eval()
    with torch.no_grad():  # freshly made weights hardly attend to anything: make what is seen matter
        for parameter in model.parameters():
            parameter.mul_(3.0)
    check_packing(model, "tiny")
    monkeypatch.setattr(transformers.masking_utils, "find_packed_sequence_indices", lambda position_ids: None)
    with pytest.raises(ModelError, match=r"`tiny` with attention `sdpa` does not keep packed examples apart"):
        check_packing(model, "tiny")
    with pytest.raises(ModelError, match="`five` is an encoder-decoder"):
        check_packing(AutoModelForSeq2SeqLM.from_pretrained(tiny_t5), "five")


@pytest.mark.parametrize("name", ["tiny_llama", "tiny_gpt2", "tiny_t5"])
def test_evaluation_is_a_mean_over_tokens_whatever_the_batch(name: str, request: pytest.FixtureRequest):
    model = load(request, name)
    examples = [example for example in EXAMPLES if example.prompt_ids]
    with torch.no_grad():
        expected = by_hand(model, examples, 0.0).item()
    for size in (1, 2, 16):
        nll = mean_completion_nll(model, examples, batch_size=size, precision=torch.float32)
        assert nll == pytest.approx(expected, abs=1e-5)
    assert perplexity(nll) == pytest.approx(math.exp(expected), rel=1e-4)
    assert perplexity(1e9) == math.inf


@pytest.mark.parametrize("name", ["tiny_llama", "tiny_gpt2", "tiny_t5"])
def test_padding_brings_no_token_into_a_row(name: str, request: pytest.FixtureRequest):
    model = load(request, name)
    examples = [Example([11, 12, 13], [21, 22, 23, 24, 5]), Example([14], [25, 5])]
    batch = collator_for(model, packed=False)([[example] for example in examples])
    counts = TokenCounts.of([batch])
    clean = sft_loss(model, batch, counts, lm_coef=0.0)
    used = {11, 12, 13, 21, 22, 23, 24, 5, 14, 25, model.config.decoder_start_token_id if name == "tiny_t5" else 5}
    unused = [token for token in range(model.config.vocab_size) if token not in used]
    poisoned = model.get_input_embeddings().weight.detach().clone()
    poisoned[unused] = float("nan")
    head = model.get_output_embeddings().weight.detach().clone()
    model.get_input_embeddings().weight = torch.nn.Parameter(poisoned)
    model.get_output_embeddings().weight = torch.nn.Parameter(head)
    loss = sft_loss(model, batch, counts, lm_coef=0.0)
    assert torch.equal(loss, clean)


@pytest.mark.parametrize("family", ["lfm2", "mamba2", "qwen3_5"])
def test_recurrent_models_are_neither_packed_nor_grouped(family):
    model = tiny_model(family, byte_level_tokenizer(pad=True))
    with pytest.raises(ModelError, match="`it` has layers that carry a state from token to token"):
        check_packing(model, "it")
    with pytest.raises(ModelError, match="which our layouts cannot keep apart"):
        set_attention(model, "torch", "it")
    set_attention(model, "auto", "it")
    assert not reads_groups(model)
