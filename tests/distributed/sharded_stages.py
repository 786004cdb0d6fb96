"""`label`, `best-of-n` and `evaluate` with divided models; run as a script by several processes.

`sharded_stages.py FOLDER CASE...` runs each case in `FOLDER/two`; `run_case` runs it with whole models in one process.
"""

from __future__ import annotations

import importlib
import json
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from rlhf_cli.distributed.process_group import ProcessGroup, leave
from rlhf_cli.generation import policy as policies
from rlhf_cli.generation import server_obstacle, vllm_generator
from rlhf_cli.models.loading import ModelSource, load_policy, load_tokenizer
from rlhf_cli.models.reward_model.files import save_reward_model
from rlhf_cli.models.reward_model.loading import new_reward_model
from rlhf_cli.recipe.schema import Recipe
from rlhf_cli.settings.shared import LoraSettings
from tests.distributed.sharded_models import make_model
from tests.generation import server_stand_in, vllm_stand_in
from tests.stages.context import stage_context

QUESTIONS = ["The cat sat", "Why is the sky blue?", "so", "Bread is baked how", "Who knows what"]
"""An odd number, of different lengths."""
SECTIONS: dict[str, dict[str, Any]] = {
    "label": {"by": "function", "function": "f", "completions_per_prompt": 3},
    "best-of-n": {"samples_per_prompt": 4, "gold_model": "g", "prompts": "p"},
    "evaluate": {"prompts": "p", "samples_per_prompt": 1, "shown_samples": 3},
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
        {"active_learning": {"by": "disagreement", "prompts": 3, "reward_models": ["a", "b"]}},
        {"function": "rate.py:vowels", "active_learning": ("adapter", "classifier")},
    ),
    "best-of-n": ("best-of-n", {}, {"reward_model": "adapter", "gold_model": "classifier", "prompts": "one.jsonl"}),
    "evaluate": (
        "evaluate",
        {"policies": [{"model": "m", "name": "best", "best_of": 3}]},
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
        {"judge_function": "f"},
        {"policy": "built", "baseline": "t5", "base": "build", "judge_function": "rate.py:vowels"},
    ),
    "label, server": ("label", {}, {"function": "rate.py:vowels"}),
    "label, engine": ("label", {}, {"function": "rate.py:vowels"}),
    "evaluate, server": ("evaluate", {}, {"policy": "policy", "baseline": "llama", "reward_model": "adapter"}),
    "evaluate, engine": ("evaluate", {}, {"policy": "policy", "baseline": "llama", "reward_model": "adapter"}),
    "evaluate, shared engine": ("evaluate", {}, {"policy": "policy", "baseline": "llama", "base": "other",
                                                 "reward_model": "adapter"}),
}  # fmt: skip
"""Case -> stage, settings, and inputs as paths in the folder."""


def write_inputs(folder: Path) -> None:
    """Write what the cases read: models, reward models, prompts, completions, demonstrations, a function."""
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
    for name, lora in (("adapter", LoraSettings(rank=2)), ("classifier", None)):
        scorer = new_reward_model(source, template=None, lora=lora, seed=4)
        scorer.mean, scorer.std = 0.2, 1.5
        (folder / name).mkdir()
        save_reward_model(scorer, folder / name)
    # 65 items for process 0 and 64 for process 1, of which 64 are scored at a time.
    items = [{"prompt": f"Item {n}?", "completions": ["so " * (n % 4) + "it is", f"no {n}"]} for n in range(129)]
    demonstrations = [{"prompt": f"Say {n}", "completion": " yes" * (n + 1)} for n in range(3)]
    rows = {
        "prompts": [{"prompt": one} for one in QUESTIONS],
        "one": [{"prompt": QUESTIONS[1]}],
        "items": items,
        "demonstrations": demonstrations,
    }
    for name, lines in rows.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    code = (
        "def vowels(prompts, completions):\n    return [float(sum(map(text.count, 'aeiou'))) for text in completions]\n"
    )
    (folder / "rate.py").write_text(code)


def run_case(folder: Path, case: str, place: Path, generation: dict[str, Any], *, is_sharded: bool) -> None:
    """Run a stage; its artifact is `place/output`, its work folder `place/work`."""
    stage, more, inputs = CASES[case]
    section = SECTIONS[stage] | more
    if section.get("by") == "reward-model":
        del section["function"]
    if "items" in section:
        del section["completions_per_prompt"]
    else:
        section["sampling"] = {"max_new_tokens": 6, "batch_size": 3}
    data = {"prompt_template": None, "holdout": 0.4, "max_prompt_tokens": 32}
    model = {"precision": "float32", "device": "cpu"} | ({"sharding": "fsdp"} if is_sharded else {})
    recipe = Recipe.model_validate({
        "seed": 3, "model": model, "data": data, "generation": generation,
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
    """Replace vLLM by a stand-in for cases that draw with it; yields the section `generation`."""
    kind = case.partition(", ")[2]
    if not kind:
        yield {}
        return
    patch = pytest.MonkeyPatch()
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


def both(folder: Path, case: str, run: Callable[[Path], None], processes: ProcessGroup) -> None:
    """Run a case, and again after a part of its work was lost, as where one process was killed before the others."""
    place = folder / "two" / case
    run(place)
    processes.barrier()
    if processes.is_main:
        shutil.copytree(place / "work", folder / "again" / case / "work")
        assert lose_some(folder / "again" / case / "work") or "items" in case
    processes.barrier()
    run(folder / "again" / case)


def main() -> None:
    folder, processes = Path(sys.argv[1]), ProcessGroup(torch.device("cpu"))
    torch.set_num_threads(1)
    for case in sys.argv[2:]:
        with stand_ins(case, folder, processes) as generation:

            def run(place: Path, case: str = case, generation: dict[str, Any] = generation) -> None:
                run_case(folder, case, place, generation, is_sharded=True)

            both(folder, case, run, processes)
    processes.barrier()
    leave()


if __name__ == "__main__":
    main()
