"""Run as a script by each of several processes: stages with sharded models, and the same in process 0 alone.

`sharded.py FOLDER CASE...` writes `FOLDER/CASE.json` with the largest difference of a trained weight. A case is
STAGE-FAMILY-ADAPTER or STAGE-FAMILY-ADAPTER-VARIANT: `clipped` limits the norm of some gradients, `bfloat16` is the
precision of products, `shared` has a reward model that is an adapter on the policy's backbone. With `adapter` and
`classifier`, a critic of its own starts from such a reward model; with `criticadapter` and `criticfull`, from such a
saved critic.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch.distributed.fsdp import fully_shard

from rlhf_cli.data.examples import Example
from rlhf_cli.distributed.process_group import ProcessGroup, leave
from rlhf_cli.errors import Interrupted
from rlhf_cli.models import sharding
from rlhf_cli.models.loading import ModelSource, load_policy
from rlhf_cli.models.sharded_loading import open_policy
from rlhf_cli.models.sharding import is_divided, local
from rlhf_cli.stages.sft.settings import SFTSettings
from rlhf_cli.stages.sft.training import make_trainable, train_sft
from tests.distributed.sharded_helpers import copies, difference, figures, furthest, is_main, one_process, trained
from tests.distributed.sharded_rl import ppo, reward_model
from tests.stops import NeverStop, StopAtCheck


def examples() -> list[Example]:
    """Texts of different lengths; with batches of 3, one process has one micro-batch more."""
    return [Example(list(range(3, 6 + n)), list(range(9 + n, 11 + 2 * n))) for n in range(8)]


def settings(adapter: str, variant: str = "", family: str = "") -> SFTSettings:
    return SFTSettings(
        data="", adapter=adapter, batch_size=3, micro_batch_size=1, epochs=2.0, learning_rate=RATES.get(family, 1e-2),
        lora={"rank": 3}, checkpoint_steps=2, gradient_checkpointing=adapter == "none",
        max_grad_norm=CLIPPED if variant == "clipped" else 1e3,
    )  # fmt: skip


RATES = {"t5": 1e-3, "built": 1e-3}
"""Families whose loss does not fall with 1e-2, so that rounding grows from step to step."""
CLIPPED = 2.85
"""Limit that some steps of `sft-llama-none` exceed and others do not, so that AdamW sees the scale of gradients."""


def load(model: Path, adapter: str, variant: str = "", *, is_sharded: bool) -> torch.nn.Module:
    source, dtype = ModelSource(str(model)), torch.float32 if adapter == "none" else None
    if variant == "bfloat16":
        source = replace(source, dtype=torch.bfloat16, precision=torch.bfloat16)
    if is_sharded:
        unread = open_policy(source, dtype=dtype)
        make_trainable(unread.model, settings(adapter), 3)
        return unread.read(rounds=adapter == "none")
    return load_policy(source, dtype=dtype)


def peak_of_loading(model: Path) -> tuple[float, float]:
    """Most weights that were in memory before a part was divided, and those of the largest part, as shares of all."""
    unread = open_policy(ModelSource(str(model)))
    total = sum(weight.numel() for weight in unread.model.parameters())
    held, sizes = [], []

    def watched(part: torch.nn.Module, **options: object) -> object:
        own = [weight for weight in part.parameters() if not is_divided(weight)]
        sizes.append(sum(weight.numel() for weight in own) / total)
        in_memory = (local(weight).numel() for weight in unread.model.parameters() if any(weight.stride()))
        held.append(sum(in_memory) / total)
        return fully_shard(part, **options)  # type: ignore[call-overload]

    sharding.fully_shard = watched  # type: ignore[assignment]
    try:
        unread.read()
    finally:
        sharding.fully_shard = fully_shard
    return max(held), max(sizes)


def fine_tune(
    model: torch.nn.Module,
    adapter: str,
    work: Path,
    processes: ProcessGroup,
    stop: object = None,
    variant: str = "",
    family: str = "",
) -> object:
    """Five steps: two epochs of seven texts, three at a time."""
    work.mkdir(parents=True, exist_ok=True)
    texts, held_out = examples()[:7], examples()[7:]
    return train_sft(
        model, texts, held_out, settings(adapter, variant, family), seed=3, work=work, stop=stop or NeverStop(),
        processes=processes, **({"precision": torch.bfloat16} if variant == "bfloat16" else {}),
    )  # type: ignore[arg-type]  # fmt: skip


def sft(model: Path, adapter: str, variant: str, folder: Path) -> dict[str, object]:
    sharded = load(model, adapter, variant, is_sharded=True)
    before = copies(trained(sharded))
    held = sum(local(weight).numel() for weight in sharded.parameters())
    total = sum(weight.numel() for weight in sharded.parameters())
    result = fine_tune(sharded, adapter, folder / "sharded", ProcessGroup(), variant=variant, family=model.name)
    divided = all(map(is_divided, sharded.parameters()))
    weights, peak = copies(trained(sharded)), peak_of_loading(model)
    if not is_main():
        return {}
    single = load(model, adapter, variant, is_sharded=False)
    alone = fine_tune(single, adapter, folder / "one", one_process(), variant=variant, family=model.name)
    return {
        "difference": difference(trained(single), weights) if variant != "bfloat16" else None,
        "moved": difference(before, weights),
        "held": held / total,
        "divided": divided,
        "peak": peak,
        "losses": [abs(getattr(result, name) - getattr(alone, name)) for name in ("eval_loss_before", "eval_loss")],
        "learned": alone.eval_loss_before - alone.eval_loss,
        "norms": [line["grad_norm"] for line in figures(folder / "sharded")],
        "figures": furthest(folder / "one", folder / "sharded"),
    }


def two_steps(model: Path, adapter: str, variant: str, folder: Path) -> dict[str, object]:
    """Start, train two steps and end; what `benchmarks/sharding.py` does many times."""
    folder.mkdir(exist_ok=True)
    two = settings(adapter).model_copy(update={"epochs": 1.0, "gradient_checkpointing": False})
    train_sft(
        load(model, adapter, is_sharded=True), examples()[:6], examples()[7:], two, seed=3, work=folder,
        stop=NeverStop(), processes=ProcessGroup(),
    )  # type: ignore[arg-type]  # fmt: skip
    return {}


def resume(model: Path, adapter: str, variant: str, folder: Path) -> dict[str, object]:
    """Stop a sharded run, resume it sharded and in one process, and compare with one that was not stopped."""
    whole_run = load(model, adapter, is_sharded=True)
    fine_tune(whole_run, adapter, folder / "whole", ProcessGroup())
    try:
        fine_tune(load(model, adapter, is_sharded=True), adapter, folder / "sharded", ProcessGroup(), StopAtCheck(5))
        raise AssertionError("it was not stopped")
    except Interrupted:
        pass
    if is_main():
        shutil.copytree(folder / "sharded", folder / "one")
    ProcessGroup().barrier()
    assert not (folder / "sharded" / "step-00000005").exists()
    fine_tune(load(model, adapter, is_sharded=True), adapter, folder / "sharded", ProcessGroup())
    weights = trained(whole_run)
    if not is_main():
        return {}
    single = load(model, adapter, is_sharded=False)
    fine_tune(single, adapter, folder / "one", one_process())
    files = ("metrics.jsonl", "state.json", "tensors.safetensors")
    places = {name: "" if name == "metrics.jsonl" else "step-00000005" for name in files}
    same = [name for name, place in places.items() if _bytes(folder / "whole" / place / name) == _bytes(
        folder / "sharded" / place / name)]  # fmt: skip
    return {"same": same, "unsharded": difference(trained(single), weights)}


def _bytes(path: Path) -> bytes:
    return path.read_bytes()


CASES: dict[str, Callable[[Path, str, str, Path], dict[str, object]]] = {
    "sft": sft,
    "resume": resume,
    "launch": two_steps,
    "reward": reward_model,
    "ppo": ppo,
}


def main() -> None:
    folder = Path(sys.argv[1])
    torch.set_num_threads(1)
    for case in sys.argv[2:]:
        stage, family, adapter, *variant = case.split("-")
        found = CASES[stage](folder / family, adapter, "".join(variant), folder / case)
        if is_main():
            (folder / f"{case}.json").write_text(json.dumps(found))
            print(case, found, flush=True)
    ProcessGroup().barrier()  # process 0 may still work alone, and would end if the others were gone
    leave()


if __name__ == "__main__":
    main()
