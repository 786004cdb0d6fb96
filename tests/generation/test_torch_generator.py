"""Sampling: the right distribution, the right end, and a function of prompt and seed alone."""

import pytest
import torch

from rlhf_cli.errors import DivergedError, ModelError
from rlhf_cli.generation.torch_generator import Sample, draw, sample, stop_ids
from rlhf_cli.models.loading import ModelSource, load_policy, load_tokenizer, recompute_activations

PROMPTS = [[5, 6, 7, 8], [9], [3, 4, 5, 6, 7, 8, 9], [10, 11]]


def settings(**changes):
    return {"max_new_tokens": 12, "temperature": 1.0, "eos_ids": {0}} | changes


def test_draw_inverts_the_cumulative_distribution():
    logits = torch.tensor([[0.2, 0.5, 0.3]]).log().expand(5, 3)
    uniforms = torch.tensor([0.0, 0.19, 0.21, 0.69, 0.71], dtype=torch.float64)
    assert draw(logits, uniforms, temperature=1.0).tolist() == [0, 0, 1, 1, 2]


def test_draw_divides_by_the_temperature():
    logits = torch.tensor([[0.0, 1.0]])
    uniforms = torch.linspace(0, 0.9999, 4001, dtype=torch.float64)
    share = draw(logits.expand(len(uniforms), 2), uniforms, temperature=0.5).float().mean()
    assert float(share) == pytest.approx(float(torch.softmax(torch.tensor([0.0, 2.0]), 0)[1]), abs=1e-3)


def test_nucleus_keeps_the_smallest_set_that_reaches_top_p():
    logits = torch.tensor([[0.05, 0.5, 0.3, 0.15]]).log()
    uniforms = torch.linspace(0, 0.9999, 999, dtype=torch.float64)
    drawn = draw(logits.expand(999, 4), uniforms, temperature=1.0, top_p=0.6)
    assert set(drawn.tolist()) == {1, 2}
    assert float((drawn == 1).float().mean()) == pytest.approx(0.5 / 0.8, abs=2e-3)
    assert set(draw(logits.expand(999, 4), uniforms, temperature=1.0, top_p=0.01).tolist()) == {1}


def test_a_token_without_probability_is_never_drawn():
    logits = torch.tensor([[float("-inf"), 0.0, float("-inf")]])
    uniforms = torch.tensor([0.0], dtype=torch.float64)
    assert draw(logits, uniforms, temperature=1.0).tolist() == [1]


def test_logits_that_are_not_finite_are_refused():
    with pytest.raises(DivergedError, match="not finite"):
        draw(torch.tensor([[float("nan"), 0.0]]), torch.zeros(1, dtype=torch.float64), temperature=1.0)


@pytest.mark.parametrize("name", ["tiny_llama", "tiny_gpt2", "tiny_t5"])
def test_an_answer_depends_on_prompt_and_seed_alone(name, request):
    model = load_policy(ModelSource(str(request.getfixturevalue(name))))
    together = sample(model, PROMPTS, [1, 2, 3, 4], **settings())
    alone = [sample(model, [p], [s], **settings())[0] for p, s in zip(PROMPTS, [1, 2, 3, 4], strict=True)]
    assert together == alone
    assert sample(model, PROMPTS, [1, 2, 3, 4], **settings(batch_size=2)) == together
    assert sample(model, PROMPTS, [5, 6, 7, 8], **settings()) != together


@pytest.mark.parametrize("name", ["tiny_llama", "tiny_t5"])
def test_tokens_follow_the_model_s_distribution_step_by_step(name, request):
    """Replays an answer by full forward passes without a cache: each token is where its uniform number points."""
    model = load_policy(ModelSource(str(request.getfixturevalue(name))))
    (answer,) = sample(model, [PROMPTS[0]], [7], **settings(temperature=0.8, eos_ids=set()))
    uniforms = torch.rand(12, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    for step in range(12):
        with torch.no_grad():
            if model.config.is_encoder_decoder:
                decoded = torch.tensor([[model.config.decoder_start_token_id, *answer.ids[:step]]])
                logits = model(input_ids=torch.tensor([PROMPTS[0]]), decoder_input_ids=decoded).logits[:, -1]
            else:
                logits = model(input_ids=torch.tensor([PROMPTS[0] + answer.ids[:step]])).logits[:, -1]
        assert draw(logits, uniforms[step : step + 1], temperature=0.8).item() == answer.ids[step]


def test_an_answer_ends_with_any_stop_token_and_keeps_it(tiny_llama):
    model = load_policy(ModelSource(str(tiny_llama)))
    (free,) = sample(model, [PROMPTS[0]], [3], **settings(eos_ids=set()))
    assert not free.ended
    assert len(free.ids) == 12
    stop = free.ids[4]
    first = free.ids.index(stop)
    (ended,) = sample(model, [PROMPTS[0]], [3], **settings(eos_ids={stop, 319}))
    assert ended == Sample(free.ids[: first + 1], ended=True)


def test_the_models_own_generation_settings_are_not_obeyed(tiny_llama):
    model = load_policy(ModelSource(str(tiny_llama)))
    plain = sample(model, PROMPTS, [1, 2, 3, 4], **settings())
    model.generation_config.update(top_k=1, repetition_penalty=9.0, min_new_tokens=11, do_sample=False)
    assert sample(model, PROMPTS, [1, 2, 3, 4], **settings()) == plain


def test_stop_tokens_are_the_tokenizer_s_and_the_model_s(tiny_llama):
    source = ModelSource(str(tiny_llama))
    model, tokenizer = load_policy(source), load_tokenizer(source)
    model.generation_config.eos_token_id = [7, 8]
    assert stop_ids(model, tokenizer) == {tokenizer.eos_token_id, 7, 8}


def test_an_empty_prompt_is_refused(tiny_llama):
    model = load_policy(ModelSource(str(tiny_llama)))
    with pytest.raises(ModelError, match="prompt 1 has no tokens"):
        sample(model, [[1], []], [1, 2], **settings())


def test_a_model_that_recomputes_activations_samples_the_same(tiny_llama):
    model = load_policy(ModelSource(str(tiny_llama)))
    plain = sample(model, PROMPTS, [1, 2, 3, 4], **settings())
    recompute_activations(model)
    assert sample(model, PROMPTS, [1, 2, 3, 4], **settings()) == plain
    assert model.training
