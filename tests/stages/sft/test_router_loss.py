"""SFT adds the load-balancing loss that the model's own forward pass adds."""

from __future__ import annotations

import pytest
import torch

from rlhf_cli.data.examples import Example
from rlhf_cli.errors import UsageError
from rlhf_cli.models.router_loss import RouterLoss
from rlhf_cli.stages.sft.loss import TokenCounts, collator_for, sft_loss
from rlhf_cli.stages.sft.settings import SFTSettings
from rlhf_cli.stages.sft.trainer import router_loss
from rlhf_cli.stages.sft.training import train_sft
from tests.conftest import byte_level_tokenizer
from tests.families.zoo import tiny_model
from tests.stops import NeverStop

EXAMPLES = [Example([5, 6, 7], [8, 9, 10, 44]), Example([50, 60], [70, 12])]


def made(family: str):
    return tiny_model(family, byte_level_tokenizer(pad=True))


@pytest.mark.parametrize("family", ["mixtral", "qwen3_5_moe", "gpt_oss", "jamba", "granitemoe"])
def test_the_loss_is_that_of_the_model_itself(family):
    model = made(family)
    router = RouterLoss.of(model, 0.5)
    assert router is not None
    batch = collator_for(model, packed=False)([[example] for example in EXAMPLES])
    ours = sft_loss(model, batch, TokenCounts.of([batch]), lm_coef=0.0, router=router)
    labels = torch.full((2, 7), -100)
    for row, example in enumerate(EXAMPLES):
        labels[row, len(example.prompt_ids) : len(example)] = torch.tensor(example.completion_ids)
    mask = torch.tensor([[1] * 7, [1] * 4 + [0] * 3])
    # The model's own weight of its load-balancing loss is replaced by 0.5.
    theirs = model(input_ids=batch["input_ids"], attention_mask=mask, labels=labels, output_router_logits=True)
    own = float(model.config.get_text_config().router_aux_loss_coef)
    torch.testing.assert_close(ours, theirs.loss + (0.5 - own) * theirs.aux_loss, atol=1e-5, rtol=1e-5)
    assert theirs.aux_loss > 0.5


def test_padding_does_not_count():
    model = made("mixtral")
    router = RouterLoss.of(model, 1.0)
    batches = [collator_for(model, packed=False)([[example]]) for example in EXAMPLES]
    both = collator_for(model, packed=False)([[EXAMPLES[1]], [Example([5] * 9, [6] * 9)]])
    alone = router_part(model, batches[1], router)
    both["is_real"][1] = False
    torch.testing.assert_close(router_part(model, both, router), alone)


def router_part(model, batch, router) -> torch.Tensor:
    counts = TokenCounts.of([batch])
    return sft_loss(model, batch, counts, lm_coef=0.0, router=router) - sft_loss(model, batch, counts, lm_coef=0.0)


def test_micro_batches_are_weighted_by_their_tokens():
    model = made("mixtral")
    router = RouterLoss.of(model, 1.0)
    batches = [collator_for(model, packed=False)([[example]]) for example in EXAMPLES]
    counts = TokenCounts.of(batches)
    assert counts.text == 6 + 3
    whole = sum(sft_loss(model, batch, counts, lm_coef=0.0, router=router) for batch in batches)
    plain = sum(sft_loss(model, batch, counts, lm_coef=0.0) for batch in batches)
    first, second = (router_part(model, batch, router) for batch in batches)
    torch.testing.assert_close(whole - plain, first * 6 / 9 + second * 3 / 9, atol=1e-6, rtol=1e-5)


def test_the_weight_is_that_of_the_configuration_unless_set(capsys):
    model = made("olmoe")
    found = router_loss(model, SFTSettings(data="x"))
    assert found is not None
    assert found.coef == model.config.router_aux_loss_coef == 0.01
    assert "load-balancing loss with weight 0.01" in " ".join(capsys.readouterr().err.split())
    assert router_loss(model, SFTSettings(data="x", router_aux_coef=0.0)) is None
    assert router_loss(made("llama"), SFTSettings(data="x")) is None


def test_a_weight_for_a_model_without_such_a_loss_is_refused(tmp_path):
    settings = SFTSettings(data="x", router_aux_coef=0.1)
    with pytest.raises(UsageError, match="has no load-balancing loss"):
        train_sft(made("llama"), EXAMPLES, [], settings, seed=0, work=tmp_path, stop=NeverStop())
