"""Damaged model files: is every one refused with an error of ours, or is what it trains right?

    python benchmarks/fuzz_models.py [--cases 300] [--seed 0] [--show]

Each case copies a tiny model (a Llama, a GPT-2, a PEFT adapter on the Llama, a reward model, and one that is an
adapter) and changes one or two values of one of its JSON files: a key is dropped, swapped with another, or gets a value
of another type, a huge, a negative or an empty one. The model is given to the checks before a run and, where these
pass, to a stage: a language model is fine-tuned for one step, and a reward model scores two completions.

Outcomes: "refused before the run" and "refused by the stage" are errors with a message; "right" is an artifact that
plain transformers reads with the same log-probabilities as we do, or finite rewards. "traceback", "wrong" and "hangs"
are faults, and the script then exits with 1.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import random
import shutil
import signal
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

FAULTS = ("traceback", "wrong", "hangs")
SECONDS = 120
"""After which a case hangs."""
_VALUES: tuple[Any, ...] = (
    None,
    True,
    -1,
    0,
    3,
    2.5,
    10**12,
    -(10**12),
    "",
    "x",
    [],
    [1, "a"],
    {},
    {"a": 1},
    float("nan"),
)
_POLICIES = ("llama", "gpt2", "peft")
_POLICY_FILES = ("config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json", "contract.json")
_FILES = {
    "llama": (*_POLICY_FILES, "special_tokens_map.json"),
    "gpt2": _POLICY_FILES,
    "reward": ("config.json", "tokenizer.json", "tokenizer_config.json", "reward.json", "contract.json"),
    "adapter": ("reward.json", "adapter/adapter_config.json", "tokenizer_config.json"),
    "peft": ("adapter_config.json", "tokenizer_config.json"),
}


@dataclass(frozen=True)
class Case:
    """One damaged model.

    Attributes:
        number: of the case.
        family: key of `_FILES`.
        file: that is changed.
        change: what was changed, for people.
        folder: the damaged model.
    """

    number: int
    family: str
    file: str
    change: str
    folder: Path


def make_models(root: Path) -> None:
    """Write the four models that cases are copies of, and the data of the stages."""
    from peft import LoraConfig, get_peft_model
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

    from rlhf_cli.data.splits import Split
    from rlhf_cli.generation.contract import Contract
    from rlhf_cli.models.loading import ModelSource
    from rlhf_cli.models.reward_model.files import save_reward_model
    from rlhf_cli.models.reward_model.loading import new_reward_model
    from rlhf_cli.settings.shared import LoraSettings, SamplingSettings
    from tests.conftest import byte_level_tokenizer

    tokenizer = byte_level_tokenizer(pad=True, chat=True)
    end, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
    ids = {"vocab_size": len(tokenizer), "bos_token_id": None, "eos_token_id": end, "pad_token_id": pad}
    config = LlamaConfig(
        **ids,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
    )
    torch.manual_seed(0)
    llama = LlamaForCausalLM(config)
    gpt2 = GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=256, **ids))
    for name, model in (("llama", llama), ("gpt2", gpt2)):
        model.save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)
    roles = {name: getattr(tokenizer, name) for name in ("eos_token", "pad_token")}
    (root / "llama" / "special_tokens_map.json").write_text(json.dumps(roles))
    for name, lora in (("reward", None), ("adapter", LoraSettings(rank=2))):
        (root / name).mkdir()
        reward = new_reward_model(ModelSource(str(root / "llama")), template="chat", lora=lora)
        reward.mean, reward.std = 0.5, 2.0
        save_reward_model(reward, root / name)
    for name in ("llama", "gpt2", "reward"):
        Contract("chat", {}, SamplingSettings(), Split(0.1, 0), False, frozenset()).write(root / name)
    adapted = get_peft_model(llama, LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False))
    adapted.peft_config["default"].base_model_name_or_path = str(root / "llama")
    adapted.save_pretrained(root / "peft")
    tokenizer.save_pretrained(root / "peft")
    rows = [{"prompt": f"What is {n}?", "completion": f"It is {n}."} for n in range(4)]
    (root / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    items = [{"prompt": "Why?", "completions": ["Because.", "So it is."]}]
    (root / "items.jsonl").write_text("".join(json.dumps(row) + "\n" for row in items))


def make_case(root: Path, number: int, seed: int) -> Case:
    """Copy a model and damage one of its files; equal arguments make equal cases."""
    draw = random.Random(f"{seed} {number}")
    family = list(_FILES)[number % len(_FILES)]
    file = draw.choice(_FILES[family])
    folder = root / f"case-{number}"
    shutil.copytree(root / family, folder)
    content = json.loads((folder / file).read_text())
    changes = [_damage(content, draw) for _ in range(draw.choice((1, 1, 2)))]
    (folder / file).write_text(json.dumps(content))
    return Case(number, family, file, "; ".join(changes), folder)


def _damage(content: dict[str, Any], draw: random.Random) -> str:
    """Change one value at any depth, in place; say what."""
    places = list(_places(content, ()))
    path, parent, key = draw.choice(places)
    name = ".".join(map(str, path))
    action = draw.choice(("drop", "swap", "value", "value", "value"))
    if action == "drop" and isinstance(parent, dict):
        del parent[key]
        return f"{name} dropped"
    if action == "swap":
        other_path, other, other_key = draw.choice(places)
        if path[: len(other_path)] != other_path and other_path[: len(path)] != path:
            parent[key], other[other_key] = other[other_key], parent[key]
            return f"{name} swapped with {'.'.join(map(str, other_path))}"
    parent[key] = draw.choice(_VALUES)
    return f"{name} = {parent[key]!r}"


def _places(value: Any, path: tuple) -> Iterator[tuple[tuple, Any, Any]]:
    """Yield (path, container, key) of every value; of a long container only the first entries."""
    keys = list(value) if isinstance(value, dict) else list(range(len(value))) if isinstance(value, list) else []
    for key in keys if len(keys) < 60 else keys[:3]:
        yield (*path, key), value, key
        yield from _places(value[key], (*path, key))


def outcome_of(case: Case, root: Path) -> tuple[str, str]:
    """Give a damaged model to the checks and to a stage; return the outcome and what was said."""
    from rlhf_cli.errors import RLHFError

    run_dir = root / f"run-{case.number}"
    said = io.StringIO()

    def too_long(*_: object) -> None:
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, too_long)
    signal.alarm(SECONDS)
    try:
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
            try:
                _run(case, root, run_dir, dry=True)
            except RLHFError as error:
                return "refused before the run", error.message
            try:
                _run(case, root, run_dir, dry=False)
            except RLHFError as error:
                return "refused by the stage", error.message
            problem = _check_artifact(case, run_dir)
        return ("wrong", problem) if problem else ("right", "")
    except TimeoutError:
        return "hangs", traceback.format_exc()
    except Exception:
        return "traceback", traceback.format_exc()
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
        shutil.rmtree(run_dir, ignore_errors=True)


def _run(case: Case, root: Path, run_dir: Path, *, dry: bool) -> None:
    from rlhf_cli.pipeline import runner
    from rlhf_cli.pipeline.selection import Selection
    from rlhf_cli.recipe.loader import load_recipe

    settings = ["model.precision=float32", "model.attention=sdpa"]
    if case.family in _POLICIES:
        stage = "sft"
        settings += [f"model.path={case.folder}", f"sft.data={root / 'data.jsonl'}", "sft.adapter=none"]
        settings += ["sft.batch_size=4", "sft.epochs=1", "data.holdout=0", "sft.learning_rate=1e-3"]
    else:
        stage = "label"
        settings += [
            "label.by=reward-model",
            f"label.reward_model={case.folder}",
            f"label.items={root / 'items.jsonl'}",
        ]
    loaded = load_recipe(None, settings, [], section=stage)
    selection = Selection(stage, stage, frozenset(), names_stages=False)
    (runner.dry_run if dry else runner.run)(loaded, run_dir, selection)


def _check_artifact(case: Case, run_dir: Path) -> str:
    """Return what is wrong with what the stage wrote; an empty text if nothing is."""
    if case.family not in _POLICIES:
        rows = [json.loads(line) for line in (run_dir / "label" / "rankings.jsonl").read_text().splitlines()]
        return _check_rewards(case) if len(rows) == 1 else f"{len(rows)} rankings of 1 prompt"
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from rlhf_cli.models.loading import ModelSource, load_policy

    folder = run_dir / "sft"
    ids = torch.arange(3, 19).unsqueeze(0)
    ours = load_policy(ModelSource(str(folder)))
    theirs, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, dtype=torch.float32)
    if any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")):
        return f"plain transformers misses weights: {report}"
    AutoTokenizer.from_pretrained(folder)
    with torch.no_grad():
        one, other = (model.eval()(input_ids=ids).logits.log_softmax(-1) for model in (ours, theirs))
    difference = float((one - other).abs().max())
    return "" if difference < 1e-4 else f"log-probabilities differ by {difference:g}"


@torch.no_grad()
def _check_rewards(case: Case) -> str:
    """Compare raw rewards with those of transformers, or of PEFT on the base, for the same ids."""
    from peft import PeftModel
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    from rlhf_cli.models.loading import ModelSource
    from rlhf_cli.models.reward_model.loading import load_reward_model

    ours = load_reward_model(ModelSource(str(case.folder), attention="sdpa"), template=None)
    sequence = ours.encode("Why?", "Because.")
    ids = torch.tensor([sequence.ids])
    if case.family == "reward":
        plain = AutoModelForSequenceClassification.from_pretrained(case.folder, dtype=torch.float32)
        plain.config.pad_token_id = None  # the last token is the last one, whatever it is
        theirs = plain.eval()(input_ids=ids).logits[0, 0]
    else:
        base = AutoModelForCausalLM.from_pretrained(case.folder.parent / "llama", dtype=torch.float32)
        adapted = PeftModel.from_pretrained(base, case.folder / "adapter").eval().get_base_model()
        hidden = adapted.model(input_ids=ids).last_hidden_state[0, -1]
        head = load_file(case.folder / "head.safetensors")
        theirs = hidden @ head["weight"][0] + head["bias"][0]
    difference = abs(float(ours(ours.batch([sequence]))[0] - theirs))
    return "" if difference < 1e-4 else f"rewards differ by {difference:g}"


def main() -> int:
    """Run the cases and print the counts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=300)
    parser.add_argument("--first", type=int, default=0, help="number of the first case")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--show", action="store_true", help="print every case")
    given = parser.parse_args()
    torch.set_num_threads(1)
    counts: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        make_models(root)
        for number in range(given.first, given.first + given.cases):
            case = make_case(root, number, given.seed)
            outcome, said = outcome_of(case, root)
            counts[outcome] += 1
            if given.show or outcome in FAULTS:
                print(f"{number} {case.family} {case.file}: {case.change}\n   {outcome}: {said}".rstrip(), flush=True)
            shutil.rmtree(case.folder)
    for outcome, count in counts.most_common():
        print(f"{count:5} {outcome}")
    return int(any(counts[fault] for fault in FAULTS))


if __name__ == "__main__":
    sys.exit(main())
