"""Answer log-probabilities against the plain definition, on every kind of policy."""

import pytest
import torch

from rlhf_cli.errors import ModelError
from rlhf_cli.generation.logprobs import Projection, check_projection, completion_hidden
from rlhf_cli.generation.sequence_batch import SequenceBatch
from rlhf_cli.models.loading import ModelSource, load_policy

PROMPTS = [[5, 6, 7, 8], [9], [3, 4]]
RESPONSES = [[11, 12], [13, 14, 15], [16]]


def start_token(model):
    return model.config.decoder_start_token_id if model.config.is_encoder_decoder else None


def logits_of(model, prompt, response):
    """Logits that predict each answer token, one sequence alone, the whole vocabulary: (T, V)."""
    if model.config.is_encoder_decoder:
        shifted = torch.tensor([[start_token(model), *response[:-1]]])
        return model(input_ids=torch.tensor([prompt]), decoder_input_ids=shifted).logits[0]
    logits = model(input_ids=torch.tensor([prompt + response])).logits[0]
    return logits[len(prompt) - 1 : -1]


@pytest.mark.parametrize("name", ["tiny_llama", "tiny_gpt2", "tiny_t5"])
def test_logprobs_and_entropy_are_those_of_each_sequence_alone(name, request):
    model = load_policy(ModelSource(str(request.getfixturevalue(name))))
    batch = SequenceBatch.of(PROMPTS, RESPONSES, model.device, decoder_start=start_token(model))
    with torch.no_grad():
        got = Projection.of(model).token_logprobs(completion_hidden(model, batch), batch, temperature=0.7)
        for row, (prompt, response) in enumerate(zip(PROMPTS, RESPONSES, strict=True)):
            expected = (logits_of(model, prompt, response) / 0.7).log_softmax(-1)
            chosen = expected.gather(-1, torch.tensor(response).unsqueeze(-1)).squeeze(-1)
            entropy = -(expected.exp() * expected).sum(-1)
            torch.testing.assert_close(got.logprobs[row, : len(response)], chosen, atol=2e-5, rtol=1e-5)
            torch.testing.assert_close(got.entropy[row, : len(response)], entropy, atol=2e-5, rtol=1e-5)
            assert got.logprobs[row, len(response) :].abs().sum() == 0
    check_projection(model, name)


def test_gradient_is_that_of_the_plain_definition(tiny_llama):
    model = load_policy(ModelSource(str(tiny_llama)))
    weight = model.model.layers[0].self_attn.q_proj.weight
    model.requires_grad_(False)
    weight.requires_grad_(True)
    batch = SequenceBatch.of(PROMPTS, RESPONSES, model.device)
    Projection.of(model).token_logprobs(
        completion_hidden(model, batch), batch, temperature=0.7
    ).logprobs.sum().backward()
    got, weight.grad = weight.grad, None
    for prompt, response in zip(PROMPTS, RESPONSES, strict=True):
        expected = (logits_of(model, prompt, response) / 0.7).log_softmax(-1)
        expected.gather(-1, torch.tensor(response).unsqueeze(-1)).sum().backward()
    torch.testing.assert_close(got, weight.grad, atol=1e-5, rtol=1e-4)


def test_what_stands_on_padding_changes_nothing(tiny_llama):
    model = load_policy(ModelSource(str(tiny_llama)))
    results = []
    for filler in (0, 99):
        batch = SequenceBatch.of(PROMPTS, RESPONSES, model.device)
        lengths = torch.tensor([len(p) + len(r) for p, r in zip(PROMPTS, RESPONSES, strict=True)])
        is_pad = torch.arange(batch.input_ids.shape[1]) >= lengths.unsqueeze(1)
        batch.input_ids[is_pad] = filler
        batch.completion_ids[~batch.is_completion] = filler
        with torch.no_grad():
            results.append(
                Projection.of(model).token_logprobs(completion_hidden(model, batch), batch, temperature=1.0).logprobs
            )
    assert torch.equal(*results)


def test_an_unknown_final_step_is_refused_by_name(tiny_llama, monkeypatch):
    model = load_policy(ModelSource(str(tiny_llama)))
    plain = type(model).forward

    def scaled(self, *arguments, **keywords):
        output = plain(self, *arguments, **keywords)
        output.logits = output.logits * 3
        return output

    monkeypatch.setattr(type(model), "forward", scaled)
    with pytest.raises(ModelError, match="llama model `acme/odd`"):
        check_projection(model, "acme/odd")


@pytest.mark.parametrize("settings", [{"final_logit_softcapping": 2.0}, {}])
def test_softcap_of_gemma(settings):
    from transformers import Gemma2Config, Gemma2ForCausalLM

    torch.manual_seed(0)
    config = Gemma2Config(
        vocab_size=40, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8, **settings,
    )  # fmt: skip
    check_projection(Gemma2ForCausalLM(config).eval(), "tiny-gemma")


def test_scaled_logits_of_granite():
    from transformers import GraniteConfig, GraniteForCausalLM

    torch.manual_seed(0)
    config = GraniteConfig(
        vocab_size=40, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, logits_scaling=4.0,
    )  # fmt: skip
    model = GraniteForCausalLM(config).eval()
    assert Projection.of(model).scale == 0.25
    check_projection(model, "tiny-granite")
