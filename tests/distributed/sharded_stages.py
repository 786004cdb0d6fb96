"""`label`, `best-of-n`, `evaluate` and `train-rm` with divided models; run as a script by several processes.

`sharded_stages.py FOLDER CASE...` runs each case in `FOLDER/two`, and at last one that fails in process 1 alone.
`run_case` runs a case with whole models in one process.
"""

from __future__ import annotations

import importlib
import json
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch

from rlhf_cli.distributed.process_group import ProcessGroup, exit_without_teardown, is_lost_peer
from rlhf_cli.errors import DivergedError
from rlhf_cli.generation import policy as policies
from rlhf_cli.generation import server_obstacle, vllm_generator
from rlhf_cli.generation.torch_generator import TorchGenerator
from rlhf_cli.models.loading import ModelSource, load_policy, load_tokenizer
from rlhf_cli.models.reward_model.files import save_reward_model
from rlhf_cli.models.reward_model.loading import new_reward_model
from rlhf_cli.models.sharded_loading import UnreadModel
from rlhf_cli.recipe.schema import Recipe
from rlhf_cli.settings.shared import LoraSettings
from tests.distributed import harness_stand_in
from tests.distributed.sharded_models import make_model
from tests.generation import server_stand_in, vllm_stand_in
from tests.stages.context import stage_context

QUESTIONS = ["The cat sat", "Why is the sky blue?", "so", "Bread is baked how", "Who knows what"]
"""An odd number, of different lengths."""
SECTIONS: dict[str, dict[str, Any]] = {
    "label": {"by": "function", "function": "f", "completions_per_prompt": 3},
    "best-of-n": {"samples_per_prompt": 4, "gold_model": "g", "prompts": "p"},
    "evaluate": {"prompts": "p", "samples_per_prompt": 1, "shown_samples": 3},
    "train-rm": {"data": "r", "batch_size": 4, "max_length": 64, "learning_rate": 1e-3},
}
CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "label by a reward model": ("label", {"by": "reward-model", "reward_model": "rm"}, {"reward_model": "adapter"}),
    "label given items": (
        "label",
        {"by": "reward-model", "reward_model": "rm", "items": "i"},
        {"reward_model": "classifier", "items": "items.jsonl", "prompts": None},
    ),
    "label by active learning": (
        "label",
        {"active_learning": {"by": "disagreement", "prompts": 3, "reward_models": ["a", "b", "c"]}},
        {"function": "rate.py:vowels", "active_learning": ("adapter", "classifier", "encoder")},
    ),
    "best-of-n": ("best-of-n", {}, {"reward_model": "adapter", "gold_model": "classifier", "prompts": "one.jsonl"}),
    "evaluate": (
        "evaluate",
        {"policies": [{"model": "m", "name": "best", "best_of": 3}], "tasks": ["t"]},
        {
            "policy": "policy", "baseline": "llama", "base": "other", "policies": ("llama",),
            "reward_model": "adapter", "demonstrations": "demonstrations.jsonl",
        },
    ),
    "evaluate one prompt": (
        "evaluate",
        {"judge_function": "f"},
        {"policy": "policy", "baseline": "llama", "judge_function": "rate.py:vowels", "prompts": "one.jsonl"},
    ),
    "evaluate encoder-decoders": (
        "evaluate",
        {"judge_function": "f", "tasks": ["t"]},
        {"policy": "t5", "baseline": "built", "base": "build", "judge_function": "rate.py:vowels"},
    ),
    "train-rm": ("train-rm", {}, {"rankings": "rankings.jsonl", "prompts": None}),
    "label, server": ("label", {}, {"function": "rate.py:vowels"}),
    "label, engine": ("label", {}, {"function": "rate.py:vowels"}),
    "evaluate, server": ("evaluate", {}, {"policy": "policy", "baseline": "llama", "reward_model": "adapter"}),
    "evaluate, engine": ("evaluate", {}, {"policy": "policy", "baseline": "llama", "reward_model": "adapter"}),
    "evaluate, shared engine": ("evaluate", {}, {"policy": "policy", "baseline": "llama", "base": "other",
                                                 "reward_model": "adapter"}),
}  # fmt: skip
"""Case -> stage, settings, and inputs as paths in the folder."""


def write_inputs(folder: Path, encoder: Path) -> None:
    """Write what the cases read: models, reward models, prompts, completions, demonstrations, a function.

    Args:
        folder: of all of them.
        encoder: of which a reward model is made.
    """
    for family in ("llama", "t5", "built"):
        make_model(family, folder / family)
    source = ModelSource(str(folder / "llama"))
    for seed, name in enumerate(("policy", "other")):
        model = load_policy(source)
        torch.manual_seed(seed)
        with torch.no_grad():
            for weight in model.parameters():
                weight.add_(0.02 * torch.randn_like(weight))
        model.save_pretrained(folder / name)
        load_tokenizer(source).save_pretrained(folder / name)
    for name, start, lora in (
        ("adapter", source, LoraSettings(rank=2)),
        ("classifier", source, None),
        ("encoder", ModelSource(str(encoder)), None),
    ):
        scorer = new_reward_model(start, template=None, lora=lora, seed=4)
        scorer.mean, scorer.std = 0.2, 1.5
        (folder / name).mkdir()
        save_reward_model(scorer, folder / name)
    # 65 items for process 0 and 64 for process 1, of which 64 are scored at a time.
    items = [{"prompt": f"Item {n}?", "completions": ["so " * (n % 4) + "it is", f"no {n}"]} for n in range(129)]
    demonstrations = [{"prompt": f"Say {n}", "completion": " yes" * (n + 1)} for n in range(3)]
    texts = [(f"What is {n}?", "It is.", "no " * (n + 1)) for n in range(9)]
    rankings = [{"prompt": prompt, "completions": own, "ranking": [[0], [1]]} for prompt, *own in texts]
    rows = {
        "prompts": [{"prompt": one} for one in QUESTIONS],
        "one": [{"prompt": QUESTIONS[1]}],
        "items": items,
        "demonstrations": demonstrations,
        "rankings": rankings,
    }
    for name, lines in rows.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    code = (
        "def vowels(prompts, completions):\n    return [float(sum(map(text.count, 'aeiou'))) for text in completions]\n"
    )
    (folder / "rate.py").write_text(code)


def run_case(
    folder: Path, case: str, place: Path, generation: dict[str, Any], *, is_sharded: bool, size: int | None = None
) -> None:
    """Run a stage; its artifact is `place/output`, its work folder `place/work`."""
    stage, more, inputs = CASES[case]
    section = SECTIONS[stage] | more
    if section.get("by") == "reward-model":
        del section["function"]
    if "items" in section:
        del section["completions_per_prompt"]
    elif stage != "train-rm":
        section["sampling"] = {"batch_size": 3}
    data = {"prompt_template": None, "holdout": 0.4, "max_prompt_tokens": 32}
    model = {"precision": "float32", "device": "cpu"} | (
        {"sharding": "fsdp", "sharding_size": size} if is_sharded else {}
    )
    recipe = Recipe.model_validate({
        "seed": 3, "model": model, "data": data, "generation": generation, "sampling": {"max_new_tokens": 6},
        stage.replace("-", "_"): section,
    })  # fmt: skip
    given: dict[str, Any] = {"prompts": "prompts.jsonl"} | ({} if stage == "evaluate" else {"policy": "llama"}) | inputs
    if "items" in section:
        del given["policy"]
    paths = {name: _at(folder, value) for name, value in given.items() if value is not None}
    for name in ("output", "work"):
        (place / name).mkdir(parents=True, exist_ok=True)
    context = stage_context(stage, recipe, output=place / "output", work=place / "work", **paths)
    importlib.import_module(context.stage.module).run(context)


def _at(folder: Path, value: Any) -> Any:
    if isinstance(value, tuple):
        return tuple(_at(folder, one) for one in value)
    return value if value == "build" else str(folder / value)


@contextmanager
def stand_ins(case: str, folder: Path, processes: ProcessGroup) -> Iterator[dict[str, Any]]:
    """Replace lm-eval by a stand-in, and vLLM for cases that draw with it; yields the section `generation`."""
    kind, patch = case.partition(", ")[2], pytest.MonkeyPatch()
    harness_stand_in.install(patch)
    if not kind:
        yield {}
        patch.undo()
        return
    vllm_stand_in.install(patch)
    server_stand_in.install_client(patch)
    vllm_generator.engines.clear()
    for module in (server_obstacle, vllm_generator):
        patch.setattr(module, "obstacle", lambda policies: None)  # the device is a CPU

    def refused(model: object) -> None:
        raise AssertionError("a process gathered the whole policy")

    patch.setattr(policies, "gathered", refused)
    found: dict[str, Any] = {"engine": "vllm"}
    if kind == "server":
        server = server_stand_in.StandIn(folder / "llama") if processes.is_main else None
        found = {"vllm_server": processes.all_gather_object(None if server is None else server.url)[0]}
    elif kind == "shared engine":
        found["tensor_parallel_size"] = processes.count
        patch.setenv("LOCAL_WORLD_SIZE", str(processes.count))
    try:
        yield found
    finally:
        patch.undo()


def lose_some(work: Path) -> list[str]:
    """Remove the completions of process 1, the last scores that are on disk, and those of the demonstrations."""
    lost = [*work.glob("*-1.jsonl"), *work.glob("*_demonstrations_scores.jsonl")]
    for file in lost:
        file.unlink()
    for file in set(work.glob("*_scores.jsonl")) | set(work.glob("*rewards.jsonl")):
        file.write_bytes(file.read_bytes()[:-5])
    return [file.name for file in lost]


@contextmanager
def divided_models() -> Iterator[set[str]]:
    """Yields the models that this process divides with the others meanwhile: folder, kind, and size of the groups."""
    found: set[str] = set()
    read = UnreadModel.read

    def recorded(unread: UnreadModel, **options: Any) -> Any:
        kind = "policy" if unread.model.can_generate() else "reward model"
        is_drawn = any(isinstance(weight, torch.Tensor) for weight in unread.stored.values())
        size = unread.source.sharding_size
        found.add(
            f"{Path(unread.source.path).name}, {'untrained ' if is_drawn else ''}{kind}"
            + ("" if size is None else f", groups of {size}")
        )
        return read(unread, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(UnreadModel, "read", recorded)
        yield found


def both(folder: Path, case: str, run: Callable[[Path], None], processes: ProcessGroup) -> None:
    """Run a case, and again after a part of its work was lost, as where one process was killed before the others."""
    place = folder / "two" / case
    with divided_models() as divided:
        run(place)
    processes.barrier()
    if processes.is_main:
        (place / "divided.json").write_text(json.dumps(sorted(divided)))
        shutil.copytree(place / "work", folder / "again" / case / "work")
        assert lose_some(folder / "again" / case / "work") or case in ("label given items", "train-rm")
    processes.barrier()
    run(folder / "again" / case)


def fail_alone(folder: Path, processes: ProcessGroup) -> NoReturn:
    """Let process 1 fail in its second batch of completions; each process writes how its stage ends, and ends."""
    generate, calls = TorchGenerator.generate, list[object]()

    def failing(*given: Any, **more: Any) -> Any:
        calls.append(given)
        if len(calls) == 2:
            raise DivergedError("the logits of process 1 are not finite")
        return generate(*given, **more)

    if processes.index == 1:
        TorchGenerator.generate = failing  # type: ignore[method-assign]
    try:
        run_case(folder, "label by a reward model", folder / "failed", {}, is_sharded=True)
    except Exception as error:
        end = "lost another process" if is_lost_peer(error) else str(error)
        (folder / f"failed-{processes.index}.txt").write_text(end)
    exit_without_teardown(0)  # as the command does, with another code


def main() -> None:
    folder, processes = Path(sys.argv[1]), ProcessGroup(torch.device("cpu"))
    torch.set_num_threads(1)
    for case in sys.argv[2:]:
        with stand_ins(case, folder, processes) as generation:

            def run(place: Path, case: str = case, generation: dict[str, Any] = generation) -> None:
                run_case(folder, case, place, generation, is_sharded=True)

            both(folder, case, run, processes)
    fail_alone(folder, processes)


if __name__ == "__main__":
    main()
