"""Compare the first PPO update, epoch by epoch, with the published values of reference implementations.

    python benchmarks/ppo_trace.py MODEL PROMPTS.jsonl
    python benchmarks/ppo_trace.py MODEL PROMPTS.jsonl --answers 64 --precision bfloat16

Published, for Pythia-160M on TL;DR at a learning rate of 1e-5 (Huang et al. 2024, "The N+ Implementation Details of
RLHF with PPO"): running means over epochs 0 to 3 of approxkl 0, .0029, .0056, .0081; of the clip fraction 0, .025,
.051, .073; of the ratio 1.0, 1.0001, 1.0011, 1.0022. Before the first optimizer step the ratio should be 1 and approxkl
0; a deviation shows how far the log-probabilities of the update are from the "old" ones.

All weights of MODEL are trained, with one minibatch per epoch and a constant learning rate. The reward model is MODEL
with a random head initialized as in reward models, N(0, 1/(d + 1)); the critic starts from it, as in the published
setting. Advantages are whitened, so a random reward gives an update of the usual size.
"""

from __future__ import annotations

import argparse
import itertools
import json
import resource
import statistics
import tempfile
import time
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

import torch
from transformers import PreTrainedModel

from rlhf_cli.data.chat_format import PromptFormat
from rlhf_cli.data.records import Prompt
from rlhf_cli.data.sources import read_records
from rlhf_cli.generation.policy import Policy
from rlhf_cli.generation.prompts import PromptStyle, TokenizedPrompts
from rlhf_cli.generation.sampling import Sampling
from rlhf_cli.models.loading import ModelSource, load_policy, load_tokenizer
from rlhf_cli.precision import autocast
from rlhf_cli.rewards.base import NO_COLUMNS, Columns, Scores
from rlhf_cli.stages.ppo.data import PPOData
from rlhf_cli.stages.ppo.forward_passes import ForwardPasses
from rlhf_cli.stages.ppo.models import SeparateModels
from rlhf_cli.stages.ppo.rollout import own_sampling
from rlhf_cli.stages.ppo.settings import PPOSettings
from rlhf_cli.stages.ppo.trainer import PPOTrainer
from rlhf_cli.stages.ppo.update import Experience, Updater, UpdateStatistics

PUBLISHED = {
    "approxkl": (0.0, 0.0029, 0.0056, 0.0081),
    "clipfrac": (0.0, 0.025, 0.051, 0.073),
    "ratio": (1.0, 1.0001, 1.0011, 1.0022),
}


class RecordingUpdater(Updater):
    """Stores the statistics of its update."""

    found: UpdateStatistics

    def update(self, step: int, experience: Experience, *, kl_coef: float) -> UpdateStatistics:
        """See `Updater.update`."""
        self.found = super().update(step, experience, kl_coef=kl_coef)
        return self.found


class NoStop:
    """A stop request that is never made."""

    requested = False

    def check(self) -> None:
        """Do nothing."""


def main() -> None:
    """Run the update and print a table or one JSON object."""
    options = _options()
    torch.set_num_threads(options.threads)
    start = time.time()
    statistics_, metrics = first_update(options)
    running = running_means(statistics_.epochs)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    if options.json:
        print(json.dumps({"epochs": statistics_.epochs, "running": running, "metrics": metrics, "peak_gb": peak}))
        return
    print(f"{options.model.name}, learning rate {options.learning_rate:g}, {options.precision}")
    print(f"{options.answers} completions, {metrics['length/mean']:.1f} tokens on average")
    print(f"{time.time() - start:.0f} s, peak {peak:.1f} GB\n")
    print(f"{'running means':>14}" + "".join(f"{f'epoch {epoch}':>12}" for epoch in range(options.epochs)))
    for name, published in PUBLISHED.items():
        print(f"{name:>14}" + "".join(f"{value:>12.7f}" for value in running[name]))
        print(f"{'published':>14}" + "".join(f"{value:>12g}" for value in published[: options.epochs]))
    print(f"largest |log ratio| {metrics['val/largest_log_ratio']:.3g}; first KL {metrics['objective/kl']:.2g} nats")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("prompts", type=Path, help="prompt records, JSONL")
    parser.add_argument("--answers", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=53, help="maximum length of a completion")
    parser.add_argument("--prompt-tokens", type=int, default=80, help="maximum length of a prompt")
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--learning-rate", type=float, default=1e-5)
    parser.add_argument("--micro-batch", type=int, default=4)
    parser.add_argument("--precision", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", action="store_true")
    return parser.parse_args()


def first_update(options: argparse.Namespace) -> tuple[UpdateStatistics, dict[str, float]]:
    """Run one step of the trainer. Returns the statistics of its update, per epoch, and its metrics."""
    settings = PPOSettings(
        steps=1000,
        prompts_per_step=options.answers,
        epochs=options.epochs,
        minibatches=1,
        micro_batch_size=options.micro_batch,
        rollout_batch_size=16,
        temperature=0.7,
        max_new_tokens=options.tokens,
        learning_rate=options.learning_rate,
        schedule="constant",
        adapter="none",
    )
    source = ModelSource(str(options.model), precision=getattr(torch, options.precision))
    trained, reference, critic = (load_policy(source, dtype=torch.float32) for _ in range(3))
    style = PromptStyle("chat" if load_tokenizer(source).chat_template else None)
    sampling = Sampling.resolve(own_sampling(settings))
    policy = Policy.load(source, sampling, style=style, weights=lambda: nullcontext(trained))
    reward = RandomReward(reference, policy.format, seed=options.seed)
    roles = SeparateModels(trained, reference, critic, value_head=reward.head)
    engine = ForwardPasses(
        roles,
        autocast=lambda: autocast("cpu", source.precision),
        micro_batch_size=settings.micro_batch_size,
        temperature=sampling.temperature,
    )
    with tempfile.TemporaryDirectory() as work:
        trainer = PPOTrainer(
            roles,
            engine,
            PPOData(_prompts(options, policy)),
            reward.score,
            settings,
            policy=policy,
            seed=options.seed,
            work=Path(work),
            stop=NoStop(),
        )
        updater = RecordingUpdater(roles, engine, trainer.settings, seed=options.seed)
        trainer.updater = updater
        report = trainer.step(0)
    return updater.found, report.metrics


def _prompts(options: argparse.Namespace, policy: Policy) -> TokenizedPrompts:
    """The first prompts that are short enough, one per completion."""
    records = read_records(str(options.prompts), "prompt").records
    pairs = ((record.prompt, policy.prompt_ids(record.prompt)) for record in records)
    chosen = list(itertools.islice((pair for pair in pairs if len(pair[1]) <= options.prompt_tokens), options.answers))
    prompts, ids = zip(*chosen, strict=True)
    return TokenizedPrompts(prompts, ids)


class RandomReward:
    """An untrained reward model: a random head on the last hidden state of the last token of a completion.

    Args:
        model: the language model.
        form: its prompt format.
        seed: random seed of the head.
    """

    def __init__(self, model: PreTrainedModel, form: PromptFormat, *, seed: int) -> None:
        width = model.config.get_text_config().hidden_size
        draw = torch.Generator().manual_seed(seed)
        self.head = torch.randn(1, width, generator=draw) * (width + 1) ** -0.5, torch.zeros(1)
        self._model, self._form = model, form

    @torch.no_grad()
    def score(self, prompts: Sequence[Prompt], completions: Sequence[str], columns: Columns = NO_COLUMNS) -> Scores:
        """Return the reward of each completion."""
        pairs = [self._form.pair_ids(*pair) for pair in zip(prompts, completions, strict=True)]
        hidden = (self._model.get_decoder()(torch.tensor([ids]), use_cache=False).last_hidden_state for ids in pairs)
        scores = [float(states[0, -1] @ self.head[0][0]) for states in hidden]
        return Scores(scores, {"random": scores})


def running_means(epochs: Sequence[tuple[float, float, float]]) -> dict[str, list[float]]:
    """Means over epochs 0 to k, for each k, as the published trace gives them."""
    return {
        name: [statistics.fmean(epoch[place] for epoch in epochs[: last + 1]) for last in range(len(epochs))]
        for place, name in enumerate(PUBLISHED)
    }


if __name__ == "__main__":
    main()
