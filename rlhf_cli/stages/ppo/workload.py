"""The work of `ppo`, for `rlhf plan`."""

from __future__ import annotations

from pathlib import Path

from rlhf_cli.errors import ModelError
from rlhf_cli.generation.prompts import prompt_style
from rlhf_cli.models.model_shape import FLOAT32, ModelShape
from rlhf_cli.stages.common import load_policy, model_source, stage_sampling
from rlhf_cli.stages.inputs import source_of
from rlhf_cli.stages.ppo.data import load_data
from rlhf_cli.stages.ppo.rollout import own_sampling
from rlhf_cli.stages.ppo.settings import PPOSettings
from rlhf_cli.stages.ppo.stage import PPOContext
from rlhf_cli.stages.workload import Reading, Work, Workload, comparing, drawing, scoring


def read(context: PPOContext) -> Reading:
    """Read the prompts as the stage does."""
    from rlhf_cli.models.loading import load_tokenizer

    settings, start = context.settings, context.inputs.policy.source
    source = model_source(context.recipe, start)
    sampling = stage_sampling(context, own_sampling(settings), start)
    policy = load_policy(
        context, start, sampling, style=prompt_style(context.recipe.data, start, load_tokenizer(source))
    )
    data, _ = load_data(context, policy)
    shape, reward = context.shape_of(source.folder), _separate_reward(context)
    lengths = [len(ids) for ids in data.prompts.ids]
    held_out = [] if data.held_out is None or settings.eval_steps is None else [len(ids) for ids in data.held_out.ids]
    longest = sampling.max_new_tokens

    def at(mean: float | None) -> Workload:
        return ppo_work(
            settings, (shape, reward), (lengths, held_out[: settings.eval_prompts]), mean or longest, longest,
            has_reward_model=context.inputs.reward_model is not None,
        )  # fmt: skip

    return Reading(
        at,
        start,
        shape,
        sample=[(ids, []) for ids in data.prompts.ids[: max(settings.rollout_batch_size, settings.micro_batch_size)]],
        rows=min(settings.micro_batch_size, settings.completions_per_step),
        longest=longest,
        rank=settings.lora.rank if settings.adapter == "lora" else None,
        trains=True,
    )


def _separate_reward(context: PPOContext) -> ModelShape | None:
    """Return the shape of a reward model with a backbone of its own; None if it shares that of the policy."""
    path, recipe = source_of(context.inputs.reward_model), context.recipe
    if path is None:
        return None
    if not Path(path).exists() and context.inputs.reward_model is not None and context.inputs.reward_model.upstream:
        is_shared = context.settings.adapter == "lora" and recipe.value("train_rm.adapter") == "lora"
        return None if is_shared else context.shape_of(model_source(recipe, _start(context)).folder)
    from rlhf_cli.models.reward_model.files import read_reward_config
    from rlhf_cli.stages.ppo.critic_initialization import shared_reward_config

    source = model_source(recipe, path)
    if context.settings.adapter == "lora" and shared_reward_config(model_source(recipe, _start(context)), path):
        return None
    config = read_reward_config(source.folder)
    folder = config.base_source(source).folder if config is not None and config.adapter else source.folder
    try:
        return context.shape_of(folder)
    except ModelError:  # an encoder that says its sizes by other names
        return None


def _start(context: PPOContext) -> str:
    return context.inputs.policy.source


def ppo_work(
    settings: PPOSettings,
    shapes: tuple[ModelShape, ModelShape | None],
    prompts: tuple[list[int], list[int]],
    mean: float,
    longest: int,
    *,
    has_reward_model: bool,
) -> Workload:
    """Return the work of PPO.

    Args:
        settings: of the stage.
        shapes: of the policy, and of a reward model with a backbone of its own.
        prompts: tokens of each prompt that is trained on, and of each that is held out and evaluated.
        mean: tokens of a completion.
        longest: most tokens of a completion.
        has_reward_model: whether a reward model scores the completions.
    """
    (training, held_out), (shape, reward) = prompts, shapes
    rank = settings.lora.rank if settings.adapter == "lora" else None
    # Prompts come in shuffled epochs, so those of all steps have the mean length of all prompts.
    average = sum(training) / len(training)
    of_steps = [round(average)] * (settings.steps * settings.prompts_per_step)
    per = settings.samples_per_prompt
    passing = {"per_prompt": per, "mean": mean, "rows": settings.micro_batch_size, "calls": settings.steps}
    work = [
        drawing(shape, "rollout", of_steps, per_prompt=per, mean=mean, longest=longest,
                rows=settings.rollout_batch_size, calls=settings.steps),
        # Policy and reference compute logits, the critic does not unless it is a head on the policy.
        scoring(shape, "passes", of_steps, **passing, logits=True, times=2),
        *_update(settings, shape, of_steps, mean, rank),
        # What was written is compared on short completions that are drawn for it.
        drawing(shape, "save", [32] * 8, per_prompt=1, mean=min(32.0, mean), longest=min(32, longest), rows=8),
        comparing(shape),
    ]  # fmt: skip
    if not settings.critic_is_head:
        work.append(scoring(shape, "passes", of_steps, **passing, logits=False))
    if has_reward_model:
        work.append(scoring(reward or shape, "scoring", of_steps, **passing, logits=False))
    work += _evaluations(settings, shape, held_out, mean, longest)
    adapter = shape.adapter(settings.lora.rank)
    critic = adapter if settings.critic_is_adapter else shape.weights if settings.critic_is_separate else 0
    trained = (shape.weights if rank is None else adapter) + critic
    saved = 0 if settings.save_steps is None else (settings.steps - 1) // settings.save_steps
    return Workload(
        records=len(training),
        unit="prompts",
        optimizer_steps=settings.optimizer_steps,
        trained=trained,
        work=tuple(work),
        loads=2 + 2 * int(rank is None) + int(reward is not None) + saved,
        written=FLOAT32 * (shape.weights * (1 + saved) + critic
                           + 3 * trained * (1 + (settings.steps - 1) // settings.checkpoint_steps)),
        largest=_largest(settings, training, longest),
        prompt=max(training),
        reward=reward,
        notes=("functions and servers that give rewards are not counted",) if settings.rewards else (),
        steps=settings.steps,
    )  # fmt: skip


def _largest(settings: PPOSettings, prompts: list[int], longest: int) -> int:
    """Return the tokens of the largest micro-batch, in which completions share their prompts."""
    rows = settings.micro_batch_size if settings.micro_batch_tokens is None else settings.completions_per_step
    most = sorted(prompts)[-max(1, rows // settings.samples_per_prompt) :]
    largest = round(sum(most) + min(rows, settings.completions_per_step) * longest)
    return min(largest, settings.micro_batch_tokens or largest)


def _evaluations(
    settings: PPOSettings, shape: ModelShape, held_out: list[int], mean: float, longest: int
) -> list[Work]:
    """Return the completions of held-out prompts, and the passes over them."""
    if not held_out:
        return []
    count = 1 + -(-settings.steps // (settings.eval_steps or 1))
    again = held_out * count
    drawn = drawing(shape, "eval", again, per_prompt=1, mean=mean, longest=longest,
                    rows=settings.rollout_batch_size, calls=count)  # fmt: skip
    return [drawn, scoring(shape, "eval", again, per_prompt=1, mean=mean, logits=True, times=3,
                           rows=settings.micro_batch_size, calls=count)]  # fmt: skip


def _update(settings: PPOSettings, shape: ModelShape, prompts: list[int], mean: float, rank: int | None) -> list[Work]:
    """Return the passes with gradient of policy and critic, over all epochs."""
    per, found = settings.samples_per_prompt, []
    tokens = sum(prompts) + len(prompts) * per * mean
    pairs = per * sum((one + mean) ** 2 for one in prompts)
    critic_rank = settings.lora.rank if settings.critic_is_adapter else None
    trainings = [(rank, len(prompts) * per * mean)]
    if not settings.critic_is_head:
        trainings.append((critic_rank, 0.0))
    each = max(1, round(settings.completions_per_step / settings.minibatches))
    for own, scored in trainings:
        flops = shape.training_flops(tokens, scored=scored, pairs=pairs, rank=own)
        one = Work("update", "train", tokens, flops, settings.steps * settings.minibatches,
                   settings.micro_batch_size, each, shape=shape,
                   trained=shape.weights if own is None else shape.adapter(own))  # fmt: skip
        found.append(one.times(settings.epochs))
    return found
