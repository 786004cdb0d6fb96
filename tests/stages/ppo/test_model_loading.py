"""What PPO's models share: the reward adapter on the policy's backbone gives the rewards the artifact gives alone."""

import pytest
import torch
from safetensors.torch import load_file

from rlhf_cli.generation.logprobs import completion_hidden
from rlhf_cli.generation.sequence_batch import SequenceBatch
from rlhf_cli.models.adapter_layers import adapter_state
from rlhf_cli.models.loading import ModelSource
from rlhf_cli.models.reward_model.files import save_reward_model
from rlhf_cli.models.reward_model.loading import load_reward_model, new_reward_model
from rlhf_cli.settings.shared import LoraSettings
from rlhf_cli.stages.ppo.model_loading import load_ppo_models
from rlhf_cli.stages.ppo.settings import PPOSettings

LORA = LoraSettings(rank=4, alpha=8.0)
PROMPTS = ["What is bread?", "Why?", "The cat sat on the warm stone"]
ANSWERS = ["Flour and water.", "Because air scatters light.", "and watched the river."]


def load(folder, reward=None, *, adapter="lora", source=None, **settings):
    """Load PPO's models on the model in `folder`."""
    lora = {"lora": LORA} if adapter == "lora" else {}
    return load_ppo_models(
        source or ModelSource(str(folder)),
        PPOSettings(adapter=adapter, **lora, **settings),
        reward_path=None if reward is None else str(reward),
        template=None,
    )


def reward_model(base, folder, **lora):
    """An adapter reward model with random weights, so that its rewards differ from those of a fresh one."""
    reward_model = new_reward_model(
        ModelSource(str(base)), template=None, lora=LoraSettings(rank=4, alpha=8.0, **lora), seed=3
    )
    torch.manual_seed(5)
    with torch.no_grad():
        for parameter in reward_model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn_like(parameter))
        reward_model.bias += 0.7
    reward_model.mean, reward_model.std = 0.4, 2.0
    folder.mkdir()
    save_reward_model(reward_model, folder)
    return folder


@pytest.mark.parametrize("name", ["tiny_llama", "tiny_gpt2"])
def test_shared_and_separate_reward_agree(name, request, tmp_path):
    base = request.getfixturevalue(name)
    folder = reward_model(base, tmp_path / "rm")
    alone = load_reward_model(ModelSource(str(base)).at(str(folder)), template=None).score(PROMPTS, ANSWERS)
    reward = load(base, folder).reward_model
    assert reward.is_shared
    assert reward.score(PROMPTS, ANSWERS) == pytest.approx(alone, abs=1e-5)
    assert len({round(score, 4) for score in alone}) == 3


def test_the_critic_starts_as_the_reward_model(tiny_llama, tmp_path):
    folder = reward_model(tiny_llama, tmp_path / "rm")
    made = load(tiny_llama, folder)
    models, reward = made.models, made.reward_model
    ids = reward.model.format.pair_ids(PROMPTS[0], ANSWERS[0])
    # One token more than the answer, so that the last value is read at the answer's own last token.
    batch = SequenceBatch.of([ids[:4]], [[*ids[4:], 1]], models.model.device)
    with torch.no_grad(), models.critic() as model:
        value = models.value_head(completion_hidden(model, batch))[0, -1]
    assert float(value) == pytest.approx(reward.score(PROMPTS[:1], ANSWERS[:1])[0], abs=1e-5)


def test_training_the_critic_leaves_the_reward_alone(tiny_llama, tmp_path):
    folder = reward_model(tiny_llama, tmp_path / "rm")
    made = load(tiny_llama, folder)
    models, reward = made.models, made.reward_model
    before = reward.score(PROMPTS, ANSWERS)
    with torch.no_grad():
        for parameter in [*models.policy_parameters(), *models.critic_parameters()]:
            parameter.add_(torch.randn_like(parameter))
    assert reward.score(PROMPTS, ANSWERS) == before
    assert not any(parameter.requires_grad for parameter in adapter_parameters(models, "reward"))


def adapter_parameters(models, name):
    wanted = {tensor.data_ptr() for tensor in adapter_state(models.model, name).values()}
    return [parameter for parameter in models.model.parameters() if parameter.data_ptr() in wanted]


def test_a_reward_model_on_another_base_is_loaded_apart(tiny_llama, tiny_gpt2, tmp_path):
    folder = reward_model(tiny_gpt2, tmp_path / "rm")
    reward = load(tiny_llama, folder).reward_model
    assert not reward.is_shared
    alone = load_reward_model(ModelSource(str(folder)), template=None).score(PROMPTS, ANSWERS)
    assert reward.score(PROMPTS, ANSWERS) == alone


def test_offloading_says_where_nothing_can_be_offloaded(tiny_llama, tiny_gpt2, tmp_path):
    shared, other = reward_model(tiny_llama, tmp_path / "rm"), reward_model(tiny_gpt2, tmp_path / "other")
    notes = {folder: load(tiny_llama, folder, offload_frozen=True).notes for folder in (None, shared, other)}
    said = {folder: any("`ppo.offload_frozen` has no effect" in note for note in notes[folder]) for folder in notes}
    assert said == {None: True, shared: True, other: False}


@pytest.mark.parametrize("policy", ["lora", "none"], ids=["adapters", "full"])
def test_gradient_checkpointing_recomputes_and_changes_nothing(policy, tiny_llama):
    gradients = []
    for recompute in (False, True):
        models = load(tiny_llama, adapter=policy, gradient_checkpointing=recompute).models
        torch.nn.init.ones_(models.value_head.weight)
        batch = SequenceBatch.of([[5, 6, 7]], [[8, 9, 10]], torch.device("cpu"))
        for role in (models.policy, models.critic):
            calls = []
            with role() as model:
                layer = model.get_decoder().layers[0].mlp
                hook = layer.register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
                completion_hidden(model, batch).float().pow(2).sum().backward()
            assert len(calls) == (2 if recompute else 1)
            hook.remove()
        gradients.append([p.grad for p in [*models.policy_parameters(), *models.critic_parameters()]])
    for mine, theirs in zip(*gradients, strict=True):
        assert (mine is None) == (theirs is None)
        if mine is not None:
            torch.testing.assert_close(mine, theirs)


def test_the_artifact_keeps_the_head_it_was_given(tiny_llama, tmp_path):
    folder = reward_model(tiny_llama, tmp_path / "rm")
    models = load(tiny_llama, folder).models
    head = load_file(folder / "head.safetensors")
    torch.testing.assert_close(models.value_head.weight.detach(), head["weight"] / 2.0)
    torch.testing.assert_close(models.value_head.bias.detach(), (head["bias"] - 0.4) / 2.0)


def test_a_full_reference_is_the_policy_to_the_bit_in_bfloat16_too(tiny_llama):
    source = ModelSource(str(tiny_llama), dtype=torch.bfloat16, precision=torch.bfloat16)
    models = load(tiny_llama, adapter="none", source=source).models
    batch = SequenceBatch.of([[5, 6, 7]], [[8, 9, 10]], torch.device("cpu"))
    seen = []
    for role in (models.policy, models.reference):
        with role() as model, torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
            seen.append(completion_hidden(model, batch))
    assert torch.equal(*seen)


def test_dropout_of_the_reward_model_s_training_stays_behind(tiny_llama, tmp_path):
    folder = reward_model(tiny_llama, tmp_path / "rm", dropout=0.5)
    made = load(tiny_llama, folder, gradient_checkpointing=True)
    models, reward = made.models, made.reward_model
    assert models.model.training  # recomputing activations needs it, and it would switch dropout on
    assert reward.score(PROMPTS, ANSWERS) == reward.score(PROMPTS, ANSWERS)


def test_an_encoder_without_chat_template_scores_beside_a_chat_policy(tiny_bert, tmp_path):
    folder = tmp_path / "rm"
    folder.mkdir()
    save_reward_model(new_reward_model(ModelSource(str(tiny_bert)), template="chat", lora=None), folder)
    reward_model = load_reward_model(ModelSource(str(folder)), template="chat")
    assert len(set(reward_model.score(PROMPTS, ANSWERS))) == 3
