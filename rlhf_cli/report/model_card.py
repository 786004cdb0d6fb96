"""Model cards: `README.md` in the folders of a run's models, with the metadata that the Hugging Face hub reads."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rlhf_cli.files import MODEL_CARD, write_whole
from rlhf_cli.pipeline.run_directory import RunDirectory
from rlhf_cli.quoting import word
from rlhf_cli.report.gather import RunFiles
from rlhf_cli.report.made import how_it_was_made
from rlhf_cli.report.verdict import Verdict, first_pair, verdict

_MODELS = {
    "sft": "a language model, fine-tuned on demonstrations",
    "train-rm": "a reward model, which scores completions of prompts",
    "ppo": "a language model, trained with PPO against a reward",
}
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(@[\w.-]+)?")


def write_cards(run: RunFiles) -> list[Path]:
    """Write a card into the folder of every model of a run; return their paths.

    The manifest does not list a card, and no hash includes it: it is written again when an evaluation is added.
    """
    found = verdict(run)
    written = []
    for stage in _MODELS:
        if stage in run.manifests:
            path = RunDirectory(run.folder).artifact(stage) / MODEL_CARD
            write_whole(path, card(run, stage, found))
            written.append(path)
    return written


def card(run: RunFiles, stage: str, found: Verdict) -> str:
    """Return the card of a stage's model.

    Args:
        run: with the stage finished.
        stage: `sft`, `train-rm` or `ppo`.
        found: verdict on the run.
    """
    manifest = run.manifests[stage]
    lines = [
        f"---\n{_metadata(run, stage)}\n---",
        f"# {run.name}/{stage}",
        f"This is {_MODELS[stage]}. It was made with `rlhf`.",
    ]
    lines += [made] if (made := how_it_was_made(run)) else []
    if stage == "ppo":
        lines += ["## Did it work?", f"{found.headline}. {found.reason}"]
    if manifest.summary:
        lines.append(
            "\n".join(
                ["| figure | value |", "|---|---|", *(f"| {_cell(a)} | {_cell(b)} |" for a, b in manifest.summary)]
            )
        )
    lines += ["## Limits", "\n".join(f"- {doubt}" for doubt in found.doubts)]
    lines += ["## Data and settings", "\n".join(_data(run, stage))]
    lines += ["## How to repeat it", f"```\nrlhf reproduce {word(run.name)}\n```"]
    return "\n\n".join(lines) + "\n"


def _metadata(run: RunFiles, stage: str) -> str:
    from huggingface_hub import EvalResult, ModelCardData

    is_adapter = (RunDirectory(run.folder).artifact(stage) / "adapter_config.json").is_file()
    base = run.manifests[stage].settings["model"].get("path")
    results = [
        EvalResult(
            task_type="text-generation" if stage == "ppo" else "text-classification",
            dataset_type="private",
            dataset_name="held-out prompts",
            metric_type=kind,
            metric_name=name,
            metric_value=value,
        )
        for kind, name, value in _results(run, stage)
    ]
    data = ModelCardData(
        model_name=f"{run.name}/{stage}",
        library_name="peft" if is_adapter else "transformers",
        pipeline_tag="text-classification" if stage == "train-rm" else "text-generation",
        tags=["rlhf", stage],
        base_model=base.partition("@")[0] if base is not None and _is_hub_id(base) else None,
        eval_results=results or None,
    )
    return data.to_yaml().strip()


def _is_hub_id(name: str) -> bool:
    return bool(_HUB_ID.fullmatch(name)) and not Path(name).exists()


def _results(run: RunFiles, stage: str) -> Iterator[tuple[str, str, float]]:
    """Yield (type, name, value) of the figures that the hub shows."""
    metrics = run.manifests[stage].metrics
    if stage == "train-rm" and (accuracy := metrics.get("rm/accuracy")) is not None:
        yield "accuracy", "accuracy on held-out rankings", round(accuracy, 4)
    pair = first_pair(run)
    if stage == "ppo" and pair is not None:
        yield "win_rate", f"win rate against {pair['baseline']}", round(pair["win_rate"]["value"], 4)
        if (kl := pair.get("kl_nats", {}).get("k1", {}).get("value")) is not None:
            yield "kl", f"KL to {pair['baseline']}, nats per completion", round(kl, 3)


def _data(run: RunFiles, stage: str) -> Iterator[str]:
    """Yield a line per input and per value that the result depends on."""
    manifest = run.manifests[stage]
    for name, digest in manifest.identity["inputs"].items():
        yield f"- {name}: sha256 `{digest}`"
    for name, value in manifest.identity["settings"].items():
        own = name.partition(".")[0] == stage.replace("-", "_") or name == "seed"
        if own and value is not None:
            yield f"- `{name}: {_plain(value)}`"
    yield f"- versions: {', '.join(f'{name} {version}' for name, version in manifest.versions.items())}"
    yield f"- content: sha256 `{manifest.content_digest}`"


def _plain(value: Any) -> str:
    return str(value).replace("\n", " ").replace("`", "'")


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
