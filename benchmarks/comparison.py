"""What the benchmarks against TRL share: models with random weights, measured processes, alternating rounds, tables.

    python benchmarks/comparison.py model FOLDER --shape 1b                     a Llama with random weights
    python benchmarks/comparison.py stage RESULT.json ppo RECIPE --run-dir RUN  one stage of `rlhf`, measured

Each side of a comparison is a process of its own. Measured are the seconds of the training itself, without loading and
without checkpoints, which the other side does not write, and the peak memory of the whole process. Only the standard
library is imported at the top, because the other side may run in an environment without `rlhf_cli`.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import random
import resource
import shlex
import shutil
import statistics
import string
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PEER_ENVIRONMENT = Path.home() / ".cache" / "rlhf-bench" / "peer"
PEER_TORCH = "torch==2.13.0"
PEER_PACKAGES = ("trl==1.12.0", "transformers==5.18.0", "peft", "datasets")
"""TRL 1.12.0 is the last release with a PPO trainer."""

EOS, PAD = "<|end|>", "<|pad|>"

Row = dict[str, Any]


@dataclass(frozen=True)
class Shape:
    """Sizes of a Llama."""

    hidden: int
    layers: int
    heads: int
    key_heads: int
    feed_forward: int
    vocabulary: int
    tied: bool = False
    context: int = 8192


SHAPES = {
    "tiny": Shape(32, 2, 4, 2, 64, 1024, context=512),
    "1b": Shape(2048, 16, 32, 8, 8192, 128_256, tied=True),
    "8b": Shape(4096, 32, 32, 8, 14_336, 128_256),
}
"""`1b` and `8b` have the sizes of Llama 3.2 1B and Llama 3.1 8B."""


def random_llama(folder: Path, shape: Shape, *, dtype: str = "float32") -> Path:
    """Write a Llama with random weights and a tokenizer of the whole vocabulary; nothing is downloaded."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = word_tokenizer(shape.vocabulary)
    config = LlamaConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.feed_forward,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.key_heads,
        max_position_embeddings=shape.context,
        tie_word_embeddings=shape.tied,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    torch.manual_seed(0)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = LlamaForCausalLM._from_config(config, dtype=getattr(torch, dtype))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def word_tokenizer(size: int):
    """Return a byte-level BPE tokenizer of `size` tokens: bytes, words of up to four letters, an end and a pad token.

    Every word begins with a space and is one token, so that the text of sampled tokens has as many tokens again.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {byte: number for number, byte in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    merges: list[tuple[str, str]] = []
    for length in range(1, 5):
        for letters in itertools.product(string.ascii_lowercase, repeat=length):
            if len(vocabulary) == size - 2:
                break
            word = "\u0120" + "".join(letters)  # the byte-level form of a space
            vocabulary[word] = len(vocabulary)
            merges.append((word[:-1], word[-1]))
    core = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens([EOS, PAD])
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token=EOS, pad_token=PAD)


def random_texts(count: int, tokens: int, *, vocabulary: int, seed: int = 0) -> list[str]:
    """Return texts of `tokens` tokens each of the tokenizer above, with that number of tokens."""
    words = ["".join(letters) for n in (1, 2) for letters in itertools.product(string.ascii_lowercase, repeat=n)]
    words = words[: max(1, vocabulary - 300)]
    draw = random.Random(seed)
    return ["".join(f" {draw.choice(words)}" for _ in range(tokens)) for _ in range(count)]


def write_classifier(model: str, folder: Path, *, pad_token_id: int) -> Path:
    """Write the reward model of both sides: the model with a random head, seed 0."""
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    if not (folder / "config.json").is_file():
        torch.manual_seed(0)
        classifier = AutoModelForSequenceClassification.from_pretrained(model, num_labels=1, dtype="auto")
        classifier.config.pad_token_id = pad_token_id
        classifier.save_pretrained(folder)
        AutoTokenizer.from_pretrained(model).save_pretrained(folder)
    return folder


def padding_token(tokenizer: Any, texts_ids: Sequence[Sequence[int]]) -> str:
    """Return a special token that is neither the end token nor in any text: the other side pads by its id."""
    used = {token for ids in texts_ids for token in ids} | {tokenizer.eos_token_id}
    candidates = [tokenizer.pad_token, *tokenizer.all_special_tokens]
    return next(token for token in candidates if token and tokenizer.convert_tokens_to_ids(token) not in used)


def language_model(folder: str) -> tuple[Any, str | None]:
    """Return the source of a model, and its template for plain-text prompts as a stage chooses it."""
    from rlhf_cli.models.loading import ModelSource, load_tokenizer

    source = ModelSource(folder)
    return source, "chat" if load_tokenizer(source).chat_template else None


def spare_id(source: Any) -> int:
    """Return the id of a token to pad with that does not end a text."""
    from rlhf_cli.models.loading import load_tokenizer

    tokenizer = load_tokenizer(source)
    return tokenizer.convert_tokens_to_ids(padding_token(tokenizer, []))


def write_adapter(model: Any, file: Path) -> str:
    """Write the weights of our new adapter, with which the other side starts too."""
    from safetensors.torch import save_file

    save_file({name: weight.detach().clone() for name, weight in model.named_parameters() if "lora_" in name}, file)
    return str(file)


def adapted(model: Any, file: str, **more: Any) -> Any:
    """Return the model with an adapter of PEFT's own, whose initial weights are those of our side."""
    import torch
    from peft import LoraConfig, get_peft_model
    from safetensors.torch import load_file

    found = get_peft_model(model, LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", **more))
    start = load_file(file)
    with torch.no_grad():
        for name, weight in found.named_parameters():
            if "lora_" in name:
                weight.copy_(start.pop(name.removeprefix("base_model.model.")))
    if start:
        sys.exit(f"PEFT adapts other layers: {', '.join(sorted(start)[:5])}")
    return found


def shared_data(name: str) -> Path | None:
    """Return a file of real data in the folder that RLHF_SHARED names, or None."""
    path = Path(os.environ.get("RLHF_SHARED", "")) / "data" / name
    return path if "RLHF_SHARED" in os.environ and path.is_file() else None


def changes(texts: Sequence[str]) -> dict[str, str]:
    """Return the settings `A=B` as a mapping."""
    return dict(text.split("=", 1) for text in texts)


def trainer_settings(task: Row, *, rows_per_record: int = 1) -> Row:
    """Return the settings of TRL's trainers that make its optimizer steps ours.

    Args:
        task: what `prepare` returned, with `precision`.
        rows_per_record: rows of TRL's data per record of ours.
    """
    import torch

    return {
        "output_dir": task["output"],
        "per_device_train_batch_size": task["micro_batch"] * rows_per_record,
        "gradient_accumulation_steps": task["batch"] // task["micro_batch"],
        "num_train_epochs": 1,
        "train_sampling_strategy": "sequential",
        "learning_rate": task["learning_rate"],
        "lr_scheduler_type": "constant",
        "max_grad_norm": 1.0,
        "max_length": None,
        "bf16": task["precision"] == "bfloat16",
        "gradient_checkpointing": False,
        "use_cpu": not torch.cuda.is_available(),
        "logging_steps": 1,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "seed": 0,
    }


def peer_dtype(task: Row) -> Any:
    """Return the data type in which TRL loads a model: float32 to train it, else that of the computation, as ours."""
    import torch

    return torch.bfloat16 if task["adapter"] and task["precision"] == "bfloat16" else torch.float32


def train_peer(trainer: Any, result: Path) -> None:
    """Train with a trainer of TRL, measured, and write the result with the loss of every step."""
    clock = Clock()
    with clock.running():
        trainer.train()
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    result.write_text(json.dumps(measured(clock) | {"losses": losses}), encoding="utf-8")


# Measured processes


def peak_resident_gb() -> float:
    """Return the peak resident memory of this process in GB (10^9 bytes).

    `ru_maxrss` also counts the memory of the process that started this one, so /proc is read where it exists.
    """
    try:
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
        return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) * 1024 / 1e9
    except (OSError, StopIteration):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


@dataclass
class Clock:
    """Adds up the wall and CPU seconds of the blocks it is around; waits for the GPU at both ends."""

    wall: float = 0.0
    cpu: float = 0.0

    @contextmanager
    def running(self) -> Iterator[None]:
        """Measure a block."""
        start = self._now()
        try:
            yield
        finally:
            end = self._now()
            self.wall, self.cpu = self.wall + end[0] - start[0], self.cpu + end[1] - start[1]

    def around(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return a function that is measured."""

        def call(*arguments: Any, **named: Any) -> Any:
            with self.running():
                return function(*arguments, **named)

        return call

    @staticmethod
    def _now() -> tuple[float, float]:
        import torch

        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter(), time.process_time()


def measured(clock: Clock, without: Clock | None = None) -> Row:
    """Return what a side reports at its end: seconds, CPU seconds, and the peak memory of the process in GB."""
    import torch

    other = without or Clock()
    on_gpu = torch.cuda.max_memory_allocated() / 1e9 if torch.cuda.is_available() else None
    return {
        "seconds": clock.wall - other.wall,
        "cpu_seconds": clock.cpu - other.cpu,
        "checkpoint_seconds": other.wall,
        "process_gb": peak_resident_gb(),
        "gpu_gb": on_gpu,
        "versions": versions(),
    }


def versions() -> str:
    """Return the versions that a side depends on."""
    from importlib import metadata

    return ", ".join(f"{name} {metadata.version(name)}" for name in ("torch", "transformers", "trl", "peft"))


def measure_stage(result: Path, arguments: list[str], *, is_train_only: bool) -> int:
    """Run one stage of `rlhf` in this process and write its measures; returns its exit code.

    Args:
        result: file for the measures.
        arguments: of the command.
        is_train_only: end the process when training has ended, before the stage saves or evaluates anything.
    """
    from rlhf_cli.cli import main as rlhf
    from rlhf_cli.training import loop

    training, saving = Clock(), Clock()
    run = training.around(loop.TrainingLoop.run)

    def run_and_end(own: loop.TrainingLoop) -> loop.LoopState:
        state = run(own)
        if is_train_only:
            result.write_text(json.dumps(measured(training, saving)), encoding="utf-8")
            os._exit(0)
        return state

    loop.TrainingLoop.run = run_and_end
    loop.save_checkpoint = saving.around(loop.save_checkpoint)
    sys.argv = ["rlhf", *arguments]
    if code := rlhf():
        return code
    result.write_text(json.dumps(measured(training, saving)), encoding="utf-8")
    return 0


@dataclass
class Runner:
    """Starts the processes of both sides.

    Attributes:
        work: folder for what they write.
        threads: CPU threads of each side.
        is_train_only: our side ends when training has ended.
    """

    work: Path
    threads: int
    is_train_only: bool = False
    _count: int = field(default=0, init=False)

    def call(self, command: Sequence[Any]) -> Row:
        """Run a command, which gets the path of its result as the last argument; returns the result.

        Raises:
            SystemExit: the command failed; its output is printed.
        """
        self._count += 1
        result = self.work / f"result-{self._count}.json"
        changes = {"OMP_NUM_THREADS": str(self.threads), "CI": "1", "TOKENIZERS_PARALLELISM": "false"}
        changes |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TRL_EXPERIMENTAL_SILENCE": "1"}
        full = [str(part) if part is not RESULT else str(result) for part in command]
        done = subprocess.run(full, env=os.environ | changes, capture_output=True, text=True, check=False)
        if done.returncode:
            sys.exit(f"{shlex.join(full)}\nended with {done.returncode}\n{(done.stdout + done.stderr)[-4000:]}")
        return json.loads(result.read_text(encoding="utf-8"))

    def peer(self, script: str, task: Row) -> Row:
        """Run a script as the other side in this environment."""
        file = self.work / "task.json"
        file.write_text(json.dumps(task), encoding="utf-8")
        return self.call([sys.executable, script, "--as-peer", file, RESULT])

    def stage(self, name: str, recipe: Mapping[str, Any]) -> Row:
        """Run a stage of `rlhf`; returns its measures and the rows of its metrics."""
        folder = self.work / f"run-{self._count + 1}"
        folder.mkdir()
        file = folder / "recipe.yaml"
        file.write_text(json.dumps(recipe), encoding="utf-8")  # JSON is YAML
        how = ["--train-only"] if self.is_train_only else []
        found = self.call([sys.executable, __file__, "stage", RESULT, *how, name, file, "--run-dir", folder / "run"])
        output = next((folder / "run").rglob("metrics.jsonl")).parent  # the work folder, if nothing was saved
        lines = (output / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        found["rows"] = [row for row in map(json.loads, lines) if row["step"] > 0]
        found["phases"] = phases(output)
        shutil.rmtree(folder)
        return found


RESULT = object()
"""Stands for the path of the result in a command of `Runner.call`."""


def phases(output: Path) -> dict[str, float]:
    """Return what the logs of a stage say of its time: sums of `time/`, in seconds, and the last `throughput/`."""
    found: dict[str, float] = {}
    for path in sorted(output.glob("*.jsonl")):
        for line in path.read_text(encoding="utf-8").splitlines():
            for name, value in json.loads(line).items():
                if name.startswith("time/"):
                    found[name] = found.get(name, 0.0) + value
                elif name.startswith("throughput/"):
                    found[name] = value
    return found


def parser(description: str | None, *, adapter: str) -> argparse.ArgumentParser:
    """Return a parser with the options of all comparisons."""
    found = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("--model", help="folder of a language model; default: a tiny one with random weights")
    found.add_argument("--adapter", choices=("lora", "none"), default=adapter)
    found.add_argument(
        "--precision", nargs="+", default=["float32"], help="of our side, one or more: float32, bfloat16"
    )
    found.add_argument("--pairs", type=int, default=5, help="rounds: each side runs once in each")
    found.add_argument("--threads", type=int, default=2, help="CPU threads of each side")
    found.add_argument("--set", nargs="*", default=[], metavar="A=B", help="further settings of our stage's section")
    found.add_argument("--train-only", action="store_true", help="measure no saving: our process ends after training")
    found.add_argument("--name", help="name of the model in the title")
    found.add_argument("--scratch", type=Path, help="folder for temporary files")
    found.add_argument("--json", type=Path, help="file for the results")
    return found


def model_section(model: str | Path, precision: str, threads: int) -> Row:
    """Return the section `model` of a recipe."""
    return {"path": str(model), "precision": precision, "threads": threads}


def peer_python(folder: Path) -> Path:
    """Return the Python of the peer's environment, which is created first if it is absent.

    torch comes first and alone, so that no other package chooses its version.
    """
    python, mark = folder / "bin" / "python", folder / "installed"
    if not mark.is_file():
        print(f"installing {' '.join(PEER_PACKAGES)} into {folder}: a few minutes", file=sys.stderr)
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        for packages in ((PEER_TORCH,), PEER_PACKAGES):
            subprocess.run([python, "-m", "pip", "install", "--quiet", *packages], check=True)
        mark.touch()
    return python


# Rounds and tables


def alternate(sides: Mapping[str, Callable[[], Row]], rounds: int) -> dict[str, list[Row]]:
    """Run every side once per round, in turn forwards and backwards, so that a change of the machine affects all."""
    found: dict[str, list[Row]] = {name: [] for name in sides}
    for number in range(rounds):
        for name in list(sides) if number % 2 == 0 else reversed(sides):
            start = time.perf_counter()
            found[name].append(sides[name]())
            took, own = time.perf_counter() - start, found[name][-1]
            print(
                f"round {number + 1} of {rounds}: {name}: {own['seconds']:.1f} s ({own['cpu_seconds']:.1f} s of CPU), "
                f"{memory(own):.2f} GB; {took:.0f} s with loading",
                file=sys.stderr,
                flush=True,
            )
    return found


def memory(row: Row) -> float:
    """Return the peak memory of a side in GB: on a GPU what its allocator held, else of the process."""
    return row["process_gb"] if row["gpu_gb"] is None else row["gpu_gb"]


@dataclass(frozen=True)
class Ratio:
    """A quantity of our side divided by the other's.

    Attributes:
        ours, theirs: names of the two sides.
        values: one ratio per round.
    """

    ours: str
    theirs: str
    values: tuple[float, ...]

    def __str__(self) -> str:
        return spread(self.values, "x", 2)


def ratios(results: Mapping[str, list[Row]], ours: str, theirs: str, quantity: Callable[[Row], float]) -> Ratio:
    """Divide our side by the other, round by round."""
    pairs = zip(results[ours], results[theirs], strict=True)
    return Ratio(ours, theirs, tuple(quantity(mine) / quantity(other) for mine, other in pairs))


def spread(values: Sequence[float], unit: str = "", digits: int = 3) -> str:
    """Format the median, and the range of more than one value."""
    middle = f"{statistics.median(values):.{digits}f}{unit}"
    return middle if len(values) == 1 else f"{middle} ({min(values):.{digits}f}-{max(values):.{digits}f})"


def markdown(
    results: Mapping[str, list[Row]],
    *,
    unit: str,
    count: int,
    is_ours: Callable[[str], bool],
    extra: Mapping[str, Callable[[Row], str]] | None = None,
) -> str:
    """Return two tables: what each side did, and ours relative to each of the others.

    Args:
        results: name of a side -> its rounds.
        unit: what is counted per second, in the plural.
        count: number of these in a round.
        is_ours: tells our sides from the others by their names.
        extra: further columns, from the first round of a side.
    """
    extra = extra or {}
    heads = ["", f"{unit} per second", "CPU seconds", "peak memory, GB", *extra]
    lines = [row_of(heads), row_of(["---"] * len(heads))]
    for name, rows in results.items():
        speed = spread([count / row["seconds"] for row in rows])
        cpu, peak = spread([row["cpu_seconds"] for row in rows], digits=1), spread([memory(row) for row in rows], "", 2)
        lines.append(row_of([name, speed, cpu, peak, *(tell(rows[0]) for tell in extra.values())]))
    pairs = [(mine, other) for mine in filter(is_ours, results) for other in results if not is_ours(other)]
    if pairs:
        heads = ["ratio", f"{unit} per second", "CPU time", "peak memory"]
        lines += ["", row_of(heads), row_of(["---"] * len(heads))]
    for mine, other in pairs:
        faster = ratios(results, other, mine, lambda row: row["seconds"])
        less = ratios(results, other, mine, lambda row: row["cpu_seconds"])
        peak = ratios(results, mine, other, memory)
        lines.append(row_of([f"{mine} to {other}", str(faster), str(less), str(peak)]))
    timed = {name: rows[-1]["phases"] for name, rows in results.items() if rows[-1].get("phases")}
    for name, times in timed.items():
        lines += ["", f"{name}: " + ", ".join(f"`{key}` {value:.4g}" for key, value in times.items())]
    return "\n".join(lines) + "\n"


def losses_parser(
    description: str | None, *, file: str, unit: str, batch: int, micro_batch: int, learning_rate: float
) -> argparse.ArgumentParser:
    """Return a parser for a comparison of loss curves.

    Args:
        description: of the script.
        file: its data, by name in the shared folder.
        unit: what a line of them is called.
        batch, micro_batch, learning_rate: defaults.
    """
    found = parser(description, adapter="none")
    found.add_argument("--data", type=Path, default=shared_data(file), help=f"{unit}; without them random words")
    found.add_argument("--random", action="store_true", help="random words in place of `--data`")
    found.add_argument("--steps", type=int, default=4, help="optimizer steps")
    found.add_argument("--batch", type=int, default=batch, help=f"{unit} per optimizer step")
    found.add_argument("--micro-batch", type=int, default=micro_batch, help=f"{unit} per forward and backward pass")
    found.add_argument("--max-length", type=int, default=512, help="tokens; what is longer is skipped")
    found.add_argument("--tokens", type=int, nargs=2, default=[32, 32], help="of random prompts and completions")
    found.add_argument("--learning-rate", type=float, default=learning_rate)
    return found


def stage_settings(task: Row) -> Row:
    """Return settings of our stage in a comparison of loss curves."""
    return {
        "data": task["data"],
        "batch_size": task["batch"],
        "micro_batch_size": task["micro_batch"],
        "max_length": task["max_length"],
        "learning_rate": task["learning_rate"],
        "schedule": "constant",
        "warmup_share": 0.0,
        "adapter": "none" if task["adapter"] is None else "lora",
    }


def train_as_peer(peer: Callable[[Row, Path], None]) -> bool:
    """Train once as the other side's process, where this process was started as that; see `Runner.peer`."""
    if sys.argv[1:2] != ["--as-peer"]:
        return False
    peer(json.loads(Path(sys.argv[2]).read_text(encoding="utf-8")), Path(sys.argv[3]))
    return True


def compare_losses(
    options: argparse.Namespace,
    prepare: Callable[[argparse.Namespace, Path], Row],
    ours: Callable[[Runner, Row, str], Row],
    *,
    script: str,
    title: str,
    unit: str,
) -> None:
    """Run our side and TRL's in rounds, at each precision, and print the tables and loss curves.

    Args:
        options: of `losses_parser`.
        prepare: writes the inputs of both sides into a folder; returns their work.
        ours: runs our side once.
        script: that trains as the other side, in this environment: it has the pinned version of TRL.
        title: what is trained.
        unit: what a batch counts.
    """
    options.data = None if options.random else options.data
    with tempfile.TemporaryDirectory(dir=options.scratch) as folder:
        runner = Runner(Path(folder), options.threads, options.train_only)
        task = prepare(options, runner.work)
        sides = {f"rlhf {one}": partial(ours, runner, task, one) for one in options.precision}
        sides |= {f"TRL {one}": partial(runner.peer, script, task | {"precision": one}) for one in options.precision}
        results = alternate(sides, options.pairs)
    heading = (
        f"{title}, {options.name or task['name']}, adapter: {options.adapter}, {task['steps']} steps of "
        f"{options.batch} {unit}, {options.micro_batch} per micro-batch, {task['tokens']:.0f} tokens per sequence"
    )
    count = task["steps"] * options.batch
    publish(report(heading, results, unit=unit, count=count, threads=options.threads), results, options.json)


def report(title: str, results: Mapping[str, list[Row]], *, unit: str, count: int, threads: int) -> str:
    """Return heading and tables of a comparison of loss curves; sides of one precision are compared."""
    lines = [heading(title, results, threads)]
    for precision in dict.fromkeys(name.partition(" ")[2] for name in results):
        both = {name: rows for name, rows in results.items() if name.endswith(f" {precision}")}
        lines.append(markdown(both, unit=unit, count=count, is_ours=lambda name: name.startswith("rlhf")))
        mine, other = (both[f"{side} {precision}"][0]["losses"] for side in ("rlhf", "TRL"))
        curves = " | ".join(f"{first:.4f} {second:.4f}" for first, second in zip(mine, other, strict=True))
        lines.append(
            f"Loss per step, ours and TRL's: {curves}; largest difference {curve_difference(mine, other):.1e}.\n"
        )
    return "\n".join(lines)


def curve_difference(mine: Sequence[float], other: Sequence[float]) -> float:
    """Return the largest difference of two loss curves of the same length."""
    return max(abs(first - second) for first, second in zip(mine, other, strict=True))


def row_of(cells: Sequence[str]) -> str:
    """Format a row of a Markdown table."""
    return f"| {' | '.join(cells)} |"


def heading(title: str, results: Mapping[str, list[Row]], threads: int) -> str:
    """Return the lines over a table: what, command, machine, versions, date, load."""
    import torch

    device = f"{processor()}, {threads} threads"
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else device
    of_sides: dict[str, list[str]] = {}
    for name, rows in results.items():
        of_sides.setdefault(rows[0]["versions"], []).append(name)
    software = "; ".join(f"{' and '.join(names)}: {text}" for text, names in of_sides.items())
    rounds = len(next(iter(results.values())))
    load = ", ".join(f"{value:.1f}" for value in os.getloadavg())
    return (
        f"### {title}\n\n"
        f"{time.strftime('%Y-%m-%d')}, {device}; Python {platform.python_version()}; {software}. "
        f"Alternating rounds: {rounds}; medians (range). Load averages at the end: {load}.\n\n"
        f"    python {shlex.join([str(Path(sys.argv[0])), *sys.argv[1:]])}\n"
    )


def processor() -> str:
    """Return the name and number of processors."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        name = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        name = platform.processor() or "CPU"
    return f"{name}, {os.cpu_count()} cores"


def publish(report: str, results: Mapping[str, list[Row]], file: Path | None) -> None:
    """Print the tables, and write them beside the results as JSON."""
    print(report)
    if file is not None:
        file.write_text(json.dumps({"report": report, "results": results}, indent=1) + "\n", encoding="utf-8")


def main() -> int:
    """Make a model, or measure a stage."""
    if sys.argv[1:2] == ["stage"]:
        is_train_only = sys.argv[3] == "--train-only"
        return measure_stage(Path(sys.argv[2]), sys.argv[3 + is_train_only :], is_train_only=is_train_only)
    found = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("what", choices=("model",))
    found.add_argument("folder", type=Path)
    found.add_argument("--shape", choices=tuple(SHAPES), default="tiny")
    found.add_argument("--dtype", default="bfloat16")
    found.add_argument("--classifier", action="store_true", help="also a reward model, to FOLDER-classifier")
    options = found.parse_args()
    random_llama(options.folder, SHAPES[options.shape], dtype=options.dtype)
    if options.classifier:
        source = language_model(str(options.folder))[0]
        target = options.folder.with_name(f"{options.folder.name}-classifier")
        write_classifier(str(options.folder), target, pad_token_id=spare_id(source))
    return 0


if __name__ == "__main__":
    sys.exit(main())
