"""The explicit transformer as a Hugging Face model: masks, caches, padding, packing, files, adapters."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModel, AutoModelForSequenceClassification, AutoTokenizer, PreTrainedModel

from rlhf_cli.cache_names import cache_of
from rlhf_cli.errors import ModelError
from rlhf_cli.generation.logprobs import check_projection
from rlhf_cli.generation.sequence_batch import SequenceBatch
from rlhf_cli.models.adapter_files import load_adapter, save_adapter
from rlhf_cli.models.loading import ModelSource, load_policy, recompute_activations
from rlhf_cli.models.lora import add_lora
from rlhf_cli.models.reward_model.batch import Encoded
from rlhf_cli.models.reward_model.loading import load_reward_model, new_reward_model
from rlhf_cli.settings.shared import LoraSettings
from rlhf_cli.transformer import TransformerForCausalLM, TransformerForSequenceClassification, TransformerModel
from rlhf_cli.transformer.positions import sinusoids

Tiny = Callable[..., PreTrainedModel]

OLD = {
    "positions": "sinusoidal",
    "norm": "layer",
    "norm_placement": "post",
    "feed_forward": "relu",
    "scale_embeddings": True,
}
GPT2 = {"positions": "learned", "norm": "layer", "feed_forward": "gelu-tanh", "attention_biases": True}
LLAMA = {"num_key_value_heads": 2}
every_kind = pytest.mark.parametrize("parts", [OLD, GPT2, LLAMA], ids=["2017", "gpt2", "llama"])
every_backend = pytest.mark.parametrize("backend", ["eager", "sdpa"])


def ids(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(2, 40, shape, generator=torch.Generator().manual_seed(seed))


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-5)


def classifier(tiny: Tiny, **parts: Any) -> TransformerForSequenceClassification:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return TransformerForSequenceClassification(tiny(**parts).config).eval()


@every_backend
@every_kind
def test_decoder_never_looks_ahead(tiny: Tiny, parts: dict, backend: str):
    model = tiny(**parts)
    model.set_attn_implementation(backend)
    a = ids(1, 8)
    b = a.clone()
    b[0, 5] = (b[0, 5] - 1) % 38 + 2
    with torch.no_grad():
        before, after = model(a).logits, model(b).logits
    close(after[:, :5], before[:, :5])
    assert (after[:, 5:] - before[:, 5:]).abs().amax(-1).min() > 1e-3


@every_backend
@every_kind
def test_encoder_looks_both_ways_and_never_at_padding(tiny: Tiny, parts: dict, backend: str):
    model = tiny(architecture="encoder", **parts)
    model.set_attn_implementation(backend)
    a = ids(1, 6)
    b = a.clone()
    b[0, 5] = (b[0, 5] - 1) % 38 + 2
    mask = torch.tensor([[1, 1, 1, 1, 1, 0]])
    with torch.no_grad():
        assert (model(a).logits - model(b).logits).abs().amax(-1).min() > 1e-3
        close(model(a, attention_mask=mask).logits[:, :5], model(b, attention_mask=mask).logits[:, :5])
        close(model(a, attention_mask=mask).logits[:, :5], model(a[:, :5]).logits)


@every_backend
@every_kind
def test_padding_on_the_left_changes_nothing(tiny: Tiny, parts: dict, backend: str):
    model = tiny(**parts)
    model.set_attn_implementation(backend)
    a = ids(1, 5)
    padded = torch.cat([ids(1, 3, seed=9), a], dim=1)
    mask = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1]])
    with torch.no_grad():
        alone = model(a).logits
        found = model(padded, attention_mask=mask, position_ids=(mask.cumsum(-1) - 1).clamp(min=0)).logits
    close(found[:, 3:], alone)


@every_backend
@every_kind
def test_packed_rows_are_as_if_apart(tiny: Tiny, parts: dict, backend: str):
    model = tiny(**parts)
    model.set_attn_implementation(backend)
    a, b = ids(1, 5), ids(1, 4, seed=1)
    positions = torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2, 3]])
    with torch.no_grad():
        packed = model(torch.cat([a, b], dim=1), position_ids=positions, use_cache=False).logits
        close(packed[:, :5], model(a).logits)
        close(packed[:, 5:], model(b).logits)


@every_backend
@every_kind
def test_encoder_decoder_reads_real_tokens_only_and_writes_left_to_right(tiny: Tiny, parts: dict, backend: str):
    model = tiny(architecture="encoder-decoder", **parts)
    model.set_attn_implementation(backend)
    source, target = ids(1, 6), ids(1, 5, seed=1)
    mask = torch.tensor([[1, 1, 1, 1, 0, 0]])
    with torch.no_grad():
        full = model(source, attention_mask=mask, decoder_input_ids=target).logits
        close(full, model(source[:, :4], decoder_input_ids=target).logits)
        close(full[:, :3], model(source, attention_mask=mask, decoder_input_ids=target[:, :3]).logits)
        other = source.clone()
        other[0, 0] = (other[0, 0] - 1) % 38 + 2
        assert (model(other, attention_mask=mask, decoder_input_ids=target).logits - full).abs().max() > 1e-3


@every_kind
@pytest.mark.parametrize("architecture", ["decoder", "encoder-decoder"])
def test_cached_generation_equals_uncached(tiny: Tiny, parts: dict, architecture: str):
    model = tiny(architecture=architecture, **parts)
    prompts = ids(2, 5)
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    arguments = {"max_new_tokens": 8, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    cached, plain = (model.generate(prompts, attention_mask=mask, use_cache=use, **arguments) for use in (True, False))
    assert cached.sequences.shape[1] > 4
    assert torch.equal(cached.sequences, plain.sequences)
    close(torch.stack(cached.logits), torch.stack(plain.logits))


@pytest.mark.parametrize("architecture", ["decoder", "encoder-decoder"])
def test_positions_that_are_not_asked_for_never_reach_the_vocabulary(tiny: Tiny, architecture: str):
    model = tiny(architecture=architecture)
    arguments = {"decoder_input_ids": ids(2, 5, seed=1)} if architecture == "encoder-decoder" else {}
    with torch.no_grad():
        every = model(ids(2, 5), **arguments).logits
        last = model(ids(2, 5), logits_to_keep=2, **arguments).logits
        some = model(ids(2, 5), logits_to_keep=torch.tensor([0, 3]), **arguments).logits
    close(last, every[:, -2:])
    close(some, every[:, [0, 3]])


def test_loss_is_of_the_next_token_or_of_the_answers_own(tiny: Tiny):
    read, written = ids(2, 5), ids(2, 5, seed=1)
    written[0, 3:] = -100
    decoder, both, encoder = (tiny(architecture=name) for name in ("decoder", "encoder-decoder", "encoder"))
    started = torch.cat([torch.zeros(2, 1, dtype=torch.long), written[:, :-1]], dim=1).clamp(min=0)

    def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
        picked = logits.log_softmax(-1).gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1)
        return -picked[labels != -100].mean()

    with torch.no_grad():
        close(decoder(read, labels=written).loss, cross_entropy(decoder(read).logits[:, :-1], written[:, 1:]))
        close(encoder(read, labels=written).loss, cross_entropy(encoder(read).logits, written))
        own = cross_entropy(both(read, decoder_input_ids=started).logits, written)
        close(both(read, labels=written).loss, own)


def test_encoder_runs_once_in_a_generation(tiny: Tiny, monkeypatch: pytest.MonkeyPatch):
    model = tiny(architecture="encoder-decoder")
    projected = []
    layer = model.model.decoder.layers[0].cross_attention.k_proj
    layer.register_forward_hook(lambda *call: projected.append(1))
    model.generate(ids(1, 4), max_new_tokens=4, min_new_tokens=4, do_sample=False)
    assert len(projected) == 1


@pytest.mark.parametrize("architecture", ["decoder", "encoder-decoder"])
def test_recomputed_activations_change_no_gradient(tiny: Tiny, architecture: str):
    gradients = []
    for recompute in (False, True):
        model = tiny(architecture=architecture)
        if recompute:
            recompute_activations(model)
            assert model.get_decoder().layers[0].gradient_checkpointing
        model(input_ids=ids(2, 6), labels=ids(2, 6)).loss.backward()
        gradients.append({name: weight.grad for name, weight in model.named_parameters()})
    for name, gradient in gradients[0].items():
        assert gradient is not None, name
        close(gradients[1][name], gradient)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("architecture", ["decoder", "encoder", "encoder-decoder"])
def test_saved_model_loads_the_same_and_tying_is_kept(tiny: Tiny, tmp_path: Path, architecture: str, tied: bool):
    model = tiny(architecture=architecture, tie_word_embeddings=tied, **OLD)
    model.save_pretrained(tmp_path)
    loaded, report = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    arguments = {"decoder_input_ids": ids(1, 3)} if architecture == "encoder-decoder" else {}
    with torch.no_grad():
        assert torch.equal(loaded(ids(1, 5), **arguments).logits, model(ids(1, 5), **arguments).logits)
    for one in (model, loaded):
        embeddings = [
            stack.embed_tokens.weight
            for stack in (one.get_encoder(), one.get_decoder())
            if hasattr(stack, "embed_tokens")
        ]
        assert all((weight is one.lm_head.weight) == tied for weight in embeddings)
    assert isinstance(AutoModel.from_pretrained(tmp_path), TransformerModel)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("architecture", ["decoder", "encoder-decoder"])
def test_more_tokens_reach_every_embedding(tiny: Tiny, architecture: str, tied: bool):
    model = tiny(architecture=architecture, tie_word_embeddings=tied)
    model.resize_token_embeddings(44, mean_resizing=False)
    logits = model(input_ids=torch.tensor([[2, 43]]), labels=torch.tensor([[43, 42]])).logits
    assert logits.shape == (1, 2, 44)
    assert (model.get_input_embeddings().weight is model.get_output_embeddings().weight) == tied


def test_hidden_states_and_weights_of_attention_are_recorded(tiny: Tiny):
    model = tiny(architecture="encoder-decoder")
    model.set_attn_implementation("eager")
    found = model(ids(1, 6), decoder_input_ids=ids(1, 4), output_attentions=True, output_hidden_states=True)
    assert [weights.shape for weights in found.cross_attentions] == [(1, 4, 4, 6)] * 2
    assert [weights.shape for weights in found.decoder_attentions] == [(1, 4, 4, 4)] * 2
    assert [weights.shape for weights in found.encoder_attentions] == [(1, 4, 6, 6)] * 2
    assert len(found.decoder_hidden_states) == len(found.encoder_hidden_states) == 3
    close(found.cross_attentions[0].sum(-1), torch.ones(1, 4, 4))


def test_first_block_reads_scaled_embeddings_and_positions(tiny: Tiny):
    model = tiny(**OLD)
    first = model(ids(1, 6), output_hidden_states=True).hidden_states[0]
    close(first, model.get_input_embeddings()(ids(1, 6)) * 16**0.5 + sinusoids(torch.arange(6), 16))
    model = tiny(**GPT2)
    first = model(ids(1, 6), output_hidden_states=True).hidden_states[0]
    close(first, model.get_input_embeddings()(ids(1, 6)) + model.model.decoder.positions.table.weight[:6])


@every_kind
@pytest.mark.parametrize("architecture", ["decoder", "encoder-decoder"])
def test_projection_and_adapters_fit(tiny: Tiny, tmp_path: Path, parts: dict, architecture: str):
    model = tiny(architecture=architecture, **parts)
    check_projection(model, "tiny")
    linear = [layer for layer in model.model.modules() if isinstance(layer, torch.nn.Linear)]
    parameters = add_lora(model, LoraSettings(rank=2, alpha=4.0))
    assert len(parameters) == 2 * len(linear)
    torch.nn.init.normal_(parameters[-1])
    save_adapter(model, tmp_path)
    again = tiny(architecture=architecture, **parts)
    load_adapter(again, tmp_path)
    arguments = {"decoder_input_ids": ids(1, 3)} if architecture == "encoder-decoder" else {}
    with torch.no_grad():
        close(again(ids(1, 5), **arguments).logits, model(ids(1, 5), **arguments).logits)
        apart = (
            model(ids(1, 5), **arguments).logits
            - tiny(architecture=architecture, **parts)(ids(1, 5), **arguments).logits
        )
    assert apart.abs().max() > 1e-3


def test_encoder_is_no_policy(tiny: Tiny, tmp_path: Path):
    tiny(architecture="encoder").save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="cannot generate text"):
        load_policy(ModelSource(str(tmp_path)))
    with pytest.raises(ValueError, match="TransformerForCausalLM needs `architecture: decoder`, got encoder"):
        TransformerForCausalLM(tiny(architecture="encoder").config)


@pytest.mark.parametrize("architecture", ["decoder", "encoder"])
def test_reward_model_scores_by_real_tokens_and_is_kept(
    tiny: Tiny, tmp_path: Path, tiny_llama: Path, architecture: str
):
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    model = tiny(architecture=architecture, vocab_size=len(tokenizer), max_position_embeddings=256)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    reward_model = new_reward_model(ModelSource(str(tmp_path)), template=None, lora=None)
    assert isinstance(reward_model.model, TransformerForSequenceClassification)
    assert reward_model.is_encoder == (architecture == "encoder")
    short = Encoded(ids(1, 5)[0].tolist())
    with torch.no_grad():
        alone = reward_model(reward_model.batch([short]))
        close(reward_model(reward_model.batch([short, Encoded(ids(1, 8, seed=1)[0].tolist())]))[:1], alone)
        mask = torch.tensor([[1, 1, 1, 1, 1, 0, 0, 0]])
        own = reward_model.model(torch.cat([ids(1, 5), ids(1, 3)], dim=1), attention_mask=mask).logits[:, 0]
        close(own, alone)
    reward_model.model.save_pretrained(tmp_path / "kept")
    assert type(AutoModelForSequenceClassification.from_pretrained(tmp_path / "kept")) is type(reward_model.model)
    tokenizer.save_pretrained(tmp_path / "kept")
    kept = load_reward_model(ModelSource(str(tmp_path / "kept")), template=None)
    with torch.no_grad():
        close(kept(kept.batch([short])), alone)


@every_kind
@pytest.mark.parametrize("architecture", ["decoder", "encoder"])
def test_scores_do_not_move_with_padding_on_the_left(tiny: Tiny, parts: dict, architecture: str):
    model = classifier(tiny, **parts | {"architecture": architecture})
    text = ids(1, 6)
    padded, mask = torch.cat([torch.zeros(1, 3, dtype=torch.long), text], dim=1), torch.tensor([[0] * 3 + [1] * 6])
    with torch.no_grad():
        alone = model(text).logits
        close(model(padded, attention_mask=mask).logits, alone)
        close(model(padded, attention_mask=mask.bool()).logits, alone)


@every_kind
@pytest.mark.parametrize("name", ["cache", "past_key_values"])  # since transformers 5.24, and before
def test_cached_steps_behind_padding_count_as_uncached_ones(tiny: Tiny, parts: dict, name: str):
    model = tiny(**parts | {"architecture": "decoder"})
    text, mask = torch.cat([torch.zeros(1, 3, dtype=torch.long), ids(1, 6)], dim=1), torch.tensor([[0] * 3 + [1] * 6])
    with torch.no_grad():
        whole = model(text, attention_mask=mask, use_cache=False).logits
        first = model(text[:, :5], attention_mask=mask[:, :5], use_cache=True)
        then = model(text[:, 5:], attention_mask=mask, **{name: cache_of(first)}).logits
    close(then, whole[:, 5:])


def test_without_a_mask_a_decoders_score_is_of_the_last_token_that_is_no_padding(tiny: Tiny):
    model = classifier(tiny)
    text = ids(2, 6)
    text[1, 4:] = 0
    with torch.no_grad():
        close(model(text).logits[1:], model(text[1:, :4]).logits)
        model.config.pad_token_id = None
        close(model(text).logits, model(text, attention_mask=torch.ones_like(text)).logits)


def test_without_a_mask_an_encoders_score_is_the_mean_over_what_is_no_padding(tiny: Tiny):
    model = classifier(tiny, architecture="encoder")
    text = torch.tensor([[5, 6, 7, 0]])
    with torch.no_grad():
        hidden = model.model(text).last_hidden_state
        close(model(text).logits, model.score(hidden[:, :3].mean(dim=1)))


def test_what_an_encoder_decoder_lacks_is_named(tiny: Tiny):
    model = tiny(architecture="encoder-decoder")
    with pytest.raises(ValueError, match="the decoder has no input: give `decoder_input_ids`"):
        model(input_ids=ids(1, 4))


def test_encoder_decoder_is_no_reward_model(tiny: Tiny, tmp_path: Path, tiny_llama: Path):
    tiny(architecture="encoder-decoder").save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(tiny_llama).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="cannot be a reward model"):
        new_reward_model(ModelSource(str(tmp_path)), template=None, lora=None)


def test_shared_prompt_is_as_if_repeated(tiny: Tiny):
    from rlhf_cli.attention.hugging_face import implementation
    from rlhf_cli.attention.layout import Layout

    model = tiny(num_key_value_heads=2)
    prompt, answers = ids(1, 4), [ids(1, 3, seed=1), ids(1, 2, seed=2)]
    with torch.no_grad():
        apart = [model(torch.cat([prompt, answer], dim=1)).logits[:, 4:] for answer in answers]
        model.set_attn_implementation(implementation("reference"))
        layout = Layout.tree([(4, [3, 2])])
        found = model(
            torch.cat([prompt, *answers], dim=1),
            position_ids=layout.positions(),
            attention_layout=layout,
            use_cache=False,
        ).logits
    close(found[:, 4:7], apart[0])
    close(found[:, 7:], apart[1])


def test_bfloat16_weights_and_autocast_run(tiny: Tiny):
    model = tiny(**LLAMA)
    plain = model(ids(1, 6)).logits
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = model(ids(1, 6)).logits
    half = model.to(torch.bfloat16)(ids(1, 6)).logits
    assert mixed.dtype == half.dtype == torch.bfloat16
    assert (mixed - plain).abs().max() < 0.2
    assert (half - plain).abs().max() < 0.2


def test_batch_of_rollout_is_read(tiny: Tiny):
    from rlhf_cli.generation.logprobs import completion_hidden

    batch = SequenceBatch.of([[3, 4], [5]], [[6, 7], [8, 9]], torch.device("cpu"), decoder_start=0)
    assert completion_hidden(tiny(architecture="encoder-decoder"), batch).shape == (2, 2, 16)
