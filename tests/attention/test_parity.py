"""Attention backends in Hugging Face models: results do not change, and other models are refused by name."""

from __future__ import annotations

import os
import sys
from dataclasses import replace

import pytest
import torch
from transformers import (
    AttentionMaskInterface,
    AutoConfig,
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    StaticCache,
)
from transformers.masking_utils import blockwise_overlay, causal_mask_function, or_masks

from rlhf_cli.attention import hugging_face, model_zoo, parity, registry
from rlhf_cli.attention.contract import Request
from rlhf_cli.attention.layout import Layout
from rlhf_cli.cache_names import cache_argument
from rlhf_cli.errors import ModelError, UsageError
from rlhf_cli.generation.decoding import check_decoding, decoded_logprobs, scored_logprobs
from rlhf_cli.generation.slots import takes_slots
from rlhf_cli.models.backbone import reads_groups

SEQUENCES = parity.ProbeSequences.random(model_zoo.VOCAB_SIZE)


@pytest.mark.parametrize("family", model_zoo.SUPPORTED)
def test_a_family_computes_the_same_under_every_backend(family):
    model = model_zoo.tiny_model(family)
    baseline = parity.Baseline(model, SEQUENCES, with_gradients=True)
    for backend in ("reference", "tiled", "torch"):
        implementation = hugging_face.implementation(backend)
        parity.require(model, family, implementation)
        for layout in parity.batch_layouts_for(model):
            found = parity.compare(model, layout, baseline, implementation)
            assert found.forward < 2e-5, (backend, layout)
            assert found.gradient is None or found.gradient < 5e-5, (backend, layout)


@pytest.mark.parametrize("family", model_zoo.UNSUPPORTED)
def test_a_family_that_does_not_honor_the_interface_is_refused_by_name(family):
    with pytest.raises(ModelError, match=f"the {family} model `theirs` does not support custom attention"):
        parity.require(model_zoo.tiny_model(family), "theirs", hugging_face.implementation("reference"))


@pytest.fixture(autouse=True)
def _importable(monkeypatch):
    """Makes the functions of this file importable as a user's module."""
    monkeypatch.setitem(sys.modules, "our_own", sys.modules[__name__])


def leaky(query, key, value, layout, **rules):
    """A backend that ignores the layout."""
    everybody = Layout.dense(layout.batch, layout.query_length, layout.key_length)
    return registry.attention(query, key, value, everybody, **rules, backend="reference")


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert", "t5"])
def test_a_backend_that_leaks_is_refused(family):
    implementation = hugging_face.implementation("our_own:leaky")
    model = model_zoo.tiny_model(family)
    with pytest.raises(ModelError, match="computes different values under our attention"):
        parity.require(model, family, implementation)


def test_a_model_that_never_calls_its_attention_is_refused(monkeypatch):
    model = model_zoo.tiny_model("llama")
    kind = type(model.layers[0].self_attn)
    monkeypatch.setattr(kind, "forward", lambda self, hidden_states, **_: (hidden_states, None))
    with pytest.raises(ModelError, match="never calls the attention function it is given"):
        parity.require(model, "ignoring", hugging_face.implementation("reference"))


def test_attention_dropout_is_refused():
    model = LlamaForCausalLM(LlamaConfig(vocab_size=9, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
                                         num_attention_heads=2, attention_dropout=0.5)).train()  # fmt: skip
    model.set_attn_implementation(hugging_face.implementation("torch"))
    with pytest.raises(ModelError, match=r"attention dropout of 0\.5"):
        model(input_ids=torch.tensor([[3, 4]]))


def test_generation_writes_the_same_tokens_with_either_cache():
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(model_zoo.tiny_model("mistral").config, attn_implementation="eager").eval()
    ids, mask = torch.randint(3, 61, (2, 6)), torch.tensor([[0, 0, 1, 1, 1, 1], [1] * 6])
    settings = {"attention_mask": mask, "do_sample": False, "max_new_tokens": 8, "min_new_tokens": 8}
    expected = model.generate(ids, **settings)
    model.set_attn_implementation(hugging_face.implementation("torch"))
    for cache in (None, "static"):
        assert model.generate(ids, cache_implementation=cache, **settings).tolist() == expected.tolist(), cache


@pytest.mark.parametrize("is_masked", [True, False])
def test_a_static_cache_hides_what_was_not_written_and_a_copied_mask_is_refused(is_masked):
    model = model_zoo.tiny_model("llama")
    ids = torch.randint(3, 61, (2, 5), generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([[0, 0, 1, 1, 1], [1] * 5]) if is_masked else None

    def last_token(implementation: str):
        model.set_attn_implementation(implementation)
        cache = StaticCache(config=model.config, max_cache_len=9)
        for start, end in ((0, 4), (4, 5)):
            seen = None if mask is None else mask[:, :end]
            found = model(ids[:, start:end], attention_mask=seen, use_cache=True, **cache_argument(cache))
        return found.last_hidden_state

    expected = last_token("eager")
    ours = hugging_face.implementation("torch")
    torch.testing.assert_close(last_token(ours), expected, atol=1e-5, rtol=1e-5)
    copied = lambda **given: hugging_face.attention_mask(**given).clone()  # noqa: E731
    AttentionMaskInterface.register(ours, copied)
    with pytest.raises(ModelError, match="the model copied its attention mask"):
        last_token(ours)
    hugging_face.implementation("torch")


@pytest.mark.parametrize("family", ["llama", "mistral", "gpt2"])
def test_positions_that_start_again_separate_sequences(family):
    """transformers detects packed rows without boundaries this way, except in opt and gpt-oss."""
    model = model_zoo.tiny_model(family)
    baseline = parity.Baseline(model, SEQUENCES, with_gradients=False)
    model.set_attn_implementation(hugging_face.implementation("torch"))
    positions = Layout.packed([SEQUENCES.lengths]).positions()
    hidden = model(torch.cat(SEQUENCES.ids).unsqueeze(0), position_ids=positions, use_cache=False).last_hidden_state
    for found, expected in zip(hidden[0].split(SEQUENCES.lengths), baseline.hidden, strict=True):
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


def test_a_hole_in_the_padding_mask_is_refused():
    model = model_zoo.tiny_model("llama")
    model.set_attn_implementation(hugging_face.implementation("torch"))
    with pytest.raises(ModelError, match="row 0 of the attention mask has padding between real tokens"):
        model(input_ids=torch.tensor([[3, 4, 5]]), attention_mask=torch.tensor([[1, 0, 1]]))


def test_a_layout_of_another_batch_is_refused():
    model = model_zoo.tiny_model("llama")
    model.set_attn_implementation(hugging_face.implementation("torch"))
    with pytest.raises(ModelError, match=r"the attention layout has .* \(1, 4, 4\), but the model expects \(1, 3"):
        model(input_ids=torch.tensor([[3, 4, 5]]), attention_layout=Layout.dense(1, 4), use_cache=False)


def test_a_four_dimensional_mask_is_used_as_given():
    model = model_zoo.tiny_model("llama")
    ids = torch.tensor([[3, 4, 5, 6]])
    mask = torch.ones(4, 4, dtype=torch.bool).tril()
    mask[3, 0] = False
    mask = mask[None, None]
    found = []
    for implementation in ("sdpa", hugging_face.implementation("torch"), hugging_face.implementation("tiled")):
        model.set_attn_implementation(implementation)
        found.append(model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state)
    torch.testing.assert_close(found[1], found[0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found[2], found[0], atol=1e-5, rtol=1e-5)


def test_transformers_does_not_mistake_our_names_for_its_own():
    name = hugging_face.implementation("rlhf_cli.attention.backends.tiled:attend")
    assert name.startswith("rlhf_rlhf_cli_attention_backends_tiled_attend_")
    assert "flash" not in hugging_face.implementation("our_own:flash_sdpa_flex")


def flash_sdpa_flex(query, key, value, layout, **rules):
    """A name that transformers would treat as its own."""
    return registry.attention(query, key, value, layout, **rules, backend="reference")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("tild", "unknown attention backend `tild`"),
        ("nowhere.at_all:attend", "cannot import attention backend `nowhere.at_all:attend`"),
        ("rlhf_cli.attention.layout:NO_PARENT", "must be a function, got int"),
    ],
)
def test_an_unknown_backend_is_named(name, message):
    with pytest.raises(UsageError, match=message):
        hugging_face.implementation(name)


def test_auto_reports_what_it_rejected():
    query = torch.randn(1, 1, 2, 4)
    request = replace(parity_request(query), layout=Layout.packed([[1, 1]]))
    choice = registry.choose(request)
    expected = "triton" if torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1" else "torch"
    assert choice.backend.name == expected
    if expected == "torch":
        assert "not `triton`: " in choice.reason


def parity_request(query):
    from rlhf_cli.attention.contract import Request

    return Request.of(
        query, query, query, Layout.dense(1, 2), causal=True, window=None, softcap=None, sinks=None, bias=None
    )


@pytest.mark.real
def test_the_real_model_computes_the_same(real_model):
    from rlhf_cli.models.loading import load_any

    model = load_any(str(real_model), torch.device("cpu"))
    sequences = parity.ProbeSequences.random(model.config.vocab_size, prefix_length=12, suffix_lengths=(9, 1, 5))
    baseline = parity.Baseline(model, sequences, with_gradients=False)
    for backend in ("tiled", "torch"):
        for layout in parity.batch_layouts_for(model):
            found = parity.compare(model, layout, baseline, hugging_face.implementation(backend))
            assert found.forward < 1e-5, (backend, layout)


def test_nan_is_an_infinite_error():
    ones, spoilt = torch.ones(2), torch.tensor([1.0, torch.nan])
    assert parity.relative_error([ones, spoilt], [ones, ones]) == float("inf")
    assert parity.relative_error([ones, ones], [ones, ones]) == 0.0


@pytest.mark.parametrize("precision", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("backend", ["reference", "tiled", "torch"])
def test_training_under_autocast(backend, precision):
    """Rotary embeddings return queries in float32 with values in half precision; autocast casts all to one dtype."""
    model = model_zoo.tiny_model("llama")
    ids = SEQUENCES.ids[0].unsqueeze(0)

    def gradient(implementation: str, dtype: torch.dtype):
        model.set_attn_implementation(implementation)
        with torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32):
            hidden = model(ids, use_cache=False).last_hidden_state
        return torch.autograd.grad(hidden.square().sum(), model.embed_tokens.weight)[0]

    exact = gradient("eager", torch.float32)
    # Norms, not maxima: a maximum is a single rounding, and sdpa's own for this gradient in float16 is 0.139 by its
    # kernels for AVX2 and 0.227 by those for AVX-512, the norms 0.70 and 0.81.
    theirs = (gradient("sdpa", precision) - exact).norm()
    found = (gradient(hugging_face.implementation(backend), precision) - exact).norm()
    assert found <= 2 * theirs


def test_a_backward_pass_inside_autocast_keeps_the_precision_of_its_sums():
    query, key, value = (torch.randn(1, 2, 5, 8, requires_grad=True) for _ in range(3))
    expected = torch.autograd.grad(
        registry.attention(query, key, value, causal=True, backend="tiled").output.sum(), query
    )
    output = registry.attention(query, key, value, causal=True, backend="tiled").output
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = torch.autograd.grad(output.sum(), query)
    torch.testing.assert_close(found, expected)


def other_model(family: str, **settings):
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = AutoConfig.for_model(
        family, vocab_size=61, num_key_value_heads=2, max_position_embeddings=64, pad_token_id=0, bos_token_id=1,
        eos_token_id=2, **shape, **settings,
    )  # fmt: skip
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    for parameter in model.parameters():
        with torch.no_grad():
            parameter.add_(torch.randn_like(parameter), alpha=0.2 if parameter.dim() > 1 else 0.0)
    return model


ONLY_IN_THE_MASK = [
    ("qwen2_moe", {"sliding_window": 8, "use_sliding_window": True, "layer_types": ["sliding_attention"] * 2,
                   "num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 16,
                   "shared_expert_intermediate_size": 16}),
    ("phimoe", {"sliding_window": 8, "num_local_experts": 2, "num_experts_per_tok": 1}),
    ("llama4_text", {"intermediate_size_mlp": 48, "attention_chunk_size": 8, "num_local_experts": 2, "head_dim": 8}),
]  # fmt: skip


@pytest.mark.parametrize(("family", "settings"), ONLY_IN_THE_MASK)
@pytest.mark.parametrize("is_padded", [True, False])
def test_a_window_or_chunks_defined_only_by_the_mask(family, settings, is_padded):
    """These models pass no window to the attention function; ours must hide the same keys as their own."""
    model = other_model(family, **settings)
    ids = torch.randint(3, 61, (2, 20), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    if is_padded:
        mask[0, :3] = 0
    expected = model(ids, attention_mask=mask, use_cache=False).logits
    generation = {"attention_mask": mask, "do_sample": False, "max_new_tokens": 12, "min_new_tokens": 12}
    expected_ids = model.generate(ids, **generation)
    for backend in ("torch", "tiled"):
        model.set_attn_implementation(hugging_face.implementation(backend))
        found = model(ids, attention_mask=mask, use_cache=False).logits
        torch.testing.assert_close(found[mask.bool()], expected[mask.bool()], atol=1e-4, rtol=1e-3)
        assert model.generate(ids, **generation).tolist() == expected_ids.tolist()


@pytest.mark.parametrize(("family", "settings"), ONLY_IN_THE_MASK)
def test_such_a_model_reads_padded_rows_and_refuses_longer_sequences_without_a_mask(family, settings):
    """There, no mask is made, and attention would see all keys."""
    model, implementation = other_model(family, **settings), hugging_face.implementation("torch")
    prompts, completions = [[5, 9, 11, 20, 7], [4, 8]], [[3, 4, 5, 6, 7, 9], [6]]
    expected = scored_logprobs(model, prompts, completions)
    parity.require(model, family, implementation)
    model.set_attn_implementation(implementation)
    assert not reads_groups(model)
    assert not takes_slots(model)
    for found in (scored_logprobs(model, prompts, completions), decoded_logprobs(model, prompts, completions)):
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)

    layout = Layout.tree([(3, [6, 2])])
    ids = torch.full((1, layout.query_length), 7)
    with pytest.raises(ModelError, match="a sequence of 9 tokens is longer than the window or chunk of 8"):
        model(ids, position_ids=layout.positions(), attention_layout=layout, use_cache=False)
    ends = torch.tensor([0, 9, 11])
    with pytest.raises(ModelError, match="a sequence of 9 tokens is longer"):  # as TRL packs
        model(ids, cu_seq_lens_q=ends, cu_seq_lens_k=ends, use_cache=False)


def through_a_layer(mask: torch.Tensor, **arguments) -> torch.Tensor:
    """Attention over ones, as a layer calls it with a mask."""
    query = torch.ones(len(mask), 1, mask.shape[1], 4)
    return hugging_face.attention_forward(torch.nn.Module(), query, query, query, mask, backend="torch", **arguments)[0]


def test_a_mask_that_is_not_a_layout_is_refused():
    blocks = torch.tensor([[-1, 0, 0, -1, -1, -1]])
    mask_function = or_masks(causal_mask_function, blockwise_overlay(blocks))
    with pytest.raises(ModelError, match="lets only some tokens attend to the next one"):
        through_a_layer(hugging_face.attention_mask(1, 6, 6, mask_function=mask_function))

    def forgets_one(batch, head, query, key):
        return (key <= query) & ~((key == 2) & (query > 20))

    with pytest.raises(ModelError, match="hides tokens in a way that attention layouts cannot express"):
        through_a_layer(hugging_face.attention_mask(4, 64, 64, mask_function=forgets_one))


def test_any_exception_of_a_model_becomes_a_model_error(monkeypatch):
    model = model_zoo.tiny_model("llama")

    def fails(*arguments, **named):
        raise IndexError("too many")

    monkeypatch.setattr(model, "forward", fails)
    with pytest.raises(ModelError, match="failed under our attention: IndexError: too many"):
        parity.require(model, "odd", hugging_face.implementation("torch"))


def test_a_mask_that_is_no_layout_is_refused_by_the_layer_that_would_use_it():
    """Where the caller passes a layout nobody reads the mask, and on a GPU nobody waits for it."""
    mask = hugging_face.attention_mask(1, 3, 3, attention_mask=torch.tensor([[1, 0, 1]]))
    with pytest.raises(ModelError, match="padding between real tokens"):
        through_a_layer(mask)
    assert torch.equal(through_a_layer(mask, attention_layout=Layout.dense(1, 3)), torch.ones(1, 3, 1, 4))


class _WrongBeyondOneTile(torch.autograd.Function):
    """The identity, whose gradient is lost from the 129th token on, as in a kernel that runs one tile only."""

    @staticmethod
    def forward(ctx, tensor):
        return tensor

    @staticmethod
    def backward(ctx, gradient):
        gradient = gradient.clone()
        gradient[:, :, 128:] = 0
        return gradient


def one_tile(query, key, value, layout, **rules):
    """A backend whose backward pass covers one tile of keys."""
    key = _WrongBeyondOneTile.apply(key)
    return registry.attention(query, key, value, layout, **rules, backend="reference").output


def test_a_backward_pass_of_several_tiles_is_checked_at_loading():
    model = model_zoo.tiny_model("llama")
    with pytest.raises(ModelError, match="`theirs` gets other gradients under our attention: they differ by"):
        parity.require(model, "theirs", hugging_face.implementation("our_own:one_tile"))


@pytest.fixture
def rounded_products():
    """Products of float32 whose inputs are rounded: to TF32 on a GPU, to bfloat16 on a CPU that multiplies those."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    yield
    assert torch.get_float32_matmul_precision() == "medium"  # checks leave it as it was
    torch.set_float32_matmul_precision(before)


def test_rounding_that_users_allow_is_not_a_fault(rounded_products, monkeypatch):
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=61, **sizes)).eval()
    seen = []
    attend = registry.attention

    def spy(*tensors, **arguments):
        seen.append((torch.backends.cuda.matmul.fp32_precision, torch.backends.mkldnn.matmul.fp32_precision))
        return attend(*tensors, **arguments)

    monkeypatch.setattr(registry, "attention", spy)
    implementation = hugging_face.implementation("reference")
    parity.require(model, "llama", implementation)
    model.set_attn_implementation(implementation)
    check_decoding(model, "llama")
    assert set(seen) == {("ieee", "ieee")}


def test_on_a_gpu_gradients_have_a_fixed_order_of_sums():
    query = torch.zeros(1, 2, 4, 8, requires_grad=True)
    rules = {"causal": True, "window": None, "softcap": None, "sinks": None, "bias": None}
    request = Request.of(query, query, query, Layout.dense(1, 4, 4), **rules)
    assert registry.order_of(request)[0] == "torch"
    on_gpu = replace(request, device=torch.device("cuda"))
    assert registry.order_of(on_gpu)[0] == "triton"
    assert registry.order_of(replace(on_gpu, needs_grad=False))[0] == "torch"
