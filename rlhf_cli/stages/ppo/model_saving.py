"""Write the models that PPO trained: the policy as an ordinary model folder, and the critic beside it."""

from __future__ import annotations

import copy
import dataclasses
import shutil
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from rlhf_cli.data.examples import Example
from rlhf_cli.distributed.agreement import agreed, by_main
from rlhf_cli.distributed.process_group import ProcessGroup
from rlhf_cli.distributed.ranks import is_main
from rlhf_cli.distributed.watchdog import beat
from rlhf_cli.files import fsync_tree, rename
from rlhf_cli.generation.generator import Generator, Request
from rlhf_cli.generation.policy import Policy
from rlhf_cli.generation.policy_saving import PROBE_SIZE, PROBE_TOKENS, TrainedAdapter, copy_policy, save_policy
from rlhf_cli.generation.prompts import TokenizedPrompts
from rlhf_cli.generation.sampling import Sampling
from rlhf_cli.generation.torch_generator import TorchGenerator
from rlhf_cli.generation.weights_to_draw import weights_to_draw
from rlhf_cli.models.loading import ModelSource, load_tokenizer
from rlhf_cli.models.saving import writing
from rlhf_cli.models.sharding import is_sharded
from rlhf_cli.models.verification import check_tokenizer
from rlhf_cli.stages.ppo.models import POLICY, PPOModels
from rlhf_cli.stages.ppo.settings import PPOSettings

STEPS = "steps"
"""Folder of the policies of `ppo.save_steps`, in the artifact and in the work folder."""
STEP_DEPTH = 3
"""Depth of such a policy below the run directory."""


def save_ppo_models(
    models: PPOModels,
    source: ModelSource,
    settings: PPOSettings,
    folder: Path,
    *,
    probe: Sequence[Example],
    sampling: Sampling,
    stop_ids: Collection[int],
) -> float:
    """Write the policy to `folder` and the critic to `folder/critic`, both with their tokenizer.

    The generation config of the policy lists all tokens that ended its completions, so that every later stage ends
    them there too. The policy in memory is consumed, see `save_policy`. Of sharded models every process calls this.

    Args:
        models: policy and critic.
        source: the SFT model.
        settings: with which the models were loaded.
        folder: created if it does not exist.
        probe: sequences on which the written policy is compared with the trained one.
        sampling: how completions were drawn in training.
        stop_ids: tokens that ended completions in training.

    Returns:
        KL(trained || written) of the policy, in nats per token.

    Raises:
        DivergedError: a weight is not finite.
        DiskError: the disk is full or cannot be written.
        ModelError: the written policy is not the trained one.
    """
    tokenizer = load_tokenizer(source)
    models.save_critic(folder / "critic")

    def write_tokenizer() -> None:
        with writing("the critic's tokenizer", folder):
            tokenizer.save_pretrained(folder / "critic")
        check_tokenizer(tokenizer, folder / "critic", source)

    with models.policy() as model:
        if is_sharded(model):
            by_main(write_tokenizer, ProcessGroup(source.device))
        else:
            write_tokenizer()
    adapter = TrainedAdapter(POLICY, settings.lora) if settings.adapter == "lora" else None
    with models.policy() as model:
        generation = sampling.generation(model, tokenizer, stop_ids)
        return save_policy(model, tokenizer, folder, source=source, probe=probe, adapter=adapter, generation=generation)


@dataclass(frozen=True)
class StepPolicies:
    """Writes the policy of some steps while training goes on, in the main process; of sharded models all call it.

    Attributes:
        models: being trained.
        source: the SFT model.
        settings: with which the models were loaded.
        folder: gets a folder per step.
        sampling: how completions are drawn in training.
        stop_ids: tokens that end completions in training.
        finish: called with each written folder, to add what else an artifact has.
    """

    models: PPOModels
    source: ModelSource
    settings: PPOSettings
    folder: Path
    sampling: Sampling
    stop_ids: Collection[int]
    finish: Callable[[Path], None]

    def save(self, step: int, probe: Sequence[Example]) -> None:
        """Write the policy after `step` steps; a folder that is there has all of it.

        A copy is made on the CPU, and what is read back is compared with that copy. Of sharded models the copy is
        sharded too.

        Raises:
            DivergedError, DiskError, ModelError: see `save_policy`.
        """
        beat()
        tokenizer = load_tokenizer(self.source)
        adapter = TrainedAdapter(POLICY, self.settings.lora) if self.settings.adapter == "lora" else None
        target = self.folder / str(step)
        partial = self.folder / f".{step}"
        if is_main():
            shutil.rmtree(partial, ignore_errors=True)
        with self.models.policy() as model:
            copied = model if is_sharded(model) else copy_policy(model, self.source, adapter)
            generation = self.sampling.generation(model, tokenizer, self.stop_ids)
            beat()
            save_policy(
                copied, tokenizer, partial, source=self.source, probe=probe, adapter=adapter, generation=generation,
                depth=STEP_DEPTH, keeps=True,
            )  # fmt: skip
        if not is_main():
            return
        self.finish(partial)
        beat()
        fsync_tree(partial)
        shutil.rmtree(target, ignore_errors=True)  # of an attempt that is repeated from an earlier checkpoint
        rename(partial, target)


def saved_steps(folder: Path, *, up_to: int) -> list[Path]:
    """Return the folders of the policies of steps up to `up_to`: a roll-back may have left later ones."""
    found = [path for path in folder.glob("*") if path.name.isdecimal() and int(path.name) <= up_to]
    return sorted(found, key=lambda path: int(path.name))


def sample_probe(policy: Policy, prompts: TokenizedPrompts, generator: Generator | None = None) -> list[Example]:
    """Sample short completions of the first prompts, on which `save_ppo_models` compares the policies.

    Of a sharded policy every process calls this. `generator` draws them; None is `TorchGenerator`.
    """
    generator = generator or TorchGenerator()
    short = copy.copy(policy)
    length = min(PROBE_TOKENS, policy.sampling.max_new_tokens)
    short.sampling = dataclasses.replace(policy.sampling, max_new_tokens=length)
    starts = [ids[-PROBE_TOKENS:] for ids in prompts.ids[:PROBE_SIZE]]
    requests = [Request(ids, seed=row) for row, ids in enumerate(starts)]
    with policy.model(), weights_to_draw(policy, generator):
        if not policy.is_sharded:
            drawn = [one.ids for one in generator.generate(short, requests)]
        else:
            drawn = _drawn_by_main(generator, short, requests, ProcessGroup(policy.source.device))
    return [Example(start, ids) for start, ids in zip(starts, drawn, strict=True)]


def _drawn_by_main(
    generator: Generator, policy: Policy, requests: Sequence[Request], processes: ProcessGroup
) -> list[list[int]]:
    """Draw in process 0 and return its tokens to all: a server may draw others for each process."""
    drawn: list[list[int]] = []

    def draw() -> None:
        drawn.extend(one.ids for one in generator.generate(policy, requests if processes.is_main else []))

    agreed(draw, processes)
    return processes.all_gather_object(drawn)[0]
