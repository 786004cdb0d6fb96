"""How the models of a run were made, in one sentence: base model, data, where its labels came from, steps."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from rlhf_cli.report.gather import RunFiles

_RANKED = {"human": "people", "judge": "language models"}
_BUILT = "a model with random weights"


def how_it_was_made(run: RunFiles) -> str:
    """Return one sentence about the finished stages that made the models of a run; "" if none did."""
    found = "; ".join(_parts(run))
    return f"{found[0].upper()}{found[1:]}." if found else ""


def _parts(run: RunFiles) -> Iterator[str]:
    if "sft" in run.manifests:
        metrics = run.manifests["sft"].metrics
        yield (
            f"{_base(run, 'sft')} was fine-tuned on {_count(metrics.get('records'), 'demonstration')} "
            f"({_count(metrics.get('steps'), 'step')})"
        )
    if "train-rm" in run.manifests:
        yield f"a reward model was trained and measured on {_rankings(run)}"
    elif "label" in run.manifests:
        yield f"its labels are {_rankings(run)}"
    if "ppo" in run.manifests:
        yield _ppo(run)


def _base(run: RunFiles, stage: str) -> str:
    """Return the model that a stage started from, where that is none of an earlier stage."""
    settings = run.manifests[stage].settings
    path = settings.get(stage, {}).get("model") or settings["model"].get("path")
    return _BUILT if path is None else f"`{_short(path)}`"


def _rankings(run: RunFiles) -> str:
    """Return how many completions were ranked, and by whom."""
    label = run.manifests.get("label")
    own: Mapping[str, Any] = (
        run.manifests["train-rm"].settings.get("train_rm", {}) if "train-rm" in run.manifests else {}
    )
    if label is None or own.get("data"):
        return f"the rankings in `{_short(own['data'])}`" if own.get("data") else "rankings"
    size = (
        f"{_count(label.metrics.get('completions'), 'completion')} of {_count(label.metrics.get('prompts'), 'prompt')}"
    )
    settings: Mapping[str, Any] = label.settings.get("label", {})
    by = settings.get("by")
    if by == "import":
        return f"{size}, with rankings from `{_short(settings['data'])}`"
    if by in _RANKED:
        return f"{size}, ranked by {_RANKED[by]}"
    kind = "function" if by == "function" else "reward model"
    return f"{size}, ranked by the {kind} `{_short(settings[kind.replace(' ', '_')])}`"


def _ppo(run: RunFiles) -> str:
    manifest = run.manifests["ppo"]
    settings: Mapping[str, Any] = manifest.settings.get("ppo", {})
    rows = run.metrics.get("ppo", ())
    steps = rows[-1]["step"] if rows else settings.get("steps", 0)
    what = "the fine-tuned model" if "sft" in run.manifests and not settings.get("model") else _base(run, "ppo")
    drawn = manifest.metrics.get("episode")
    completions = "" if drawn is None else f" ({_count(drawn, 'completion')})"
    return f"PPO trained {what} for {_count(steps, 'step')}{completions} to raise {_rewards(run, settings)}"


def _rewards(run: RunFiles, settings: Mapping[str, Any]) -> str:
    found = []
    if settings.get("reward_model"):
        found.append(f"the reward of `{_short(settings['reward_model'])}`")
    elif "reward_model" in run.manifests["ppo"].identity["inputs"]:
        found.append(
            "the reward of the reward model" if "train-rm" in run.manifests else "the reward of a reward model"
        )
    for entry in settings.get("rewards", ()):
        source = entry.get("function") or entry.get("model") or entry.get("url")
        if source and entry.get("weight"):
            found.append(f"that of `{_short(source)}`" if found else f"the reward of `{_short(source)}`")
    return " and ".join(found) or "its reward"


def _count(value: float | None, name: str) -> str:
    """Return a number of things; only their name where it was not counted."""
    if value is None:
        return f"{name}s"
    return f"{value:,.0f} {name}{'' if value == 1 else 's'}"


def _short(source: str) -> str:
    """Return a file or folder without its path; a hub id and an address as they are."""
    if "://" in source:
        return source
    path, colon, function = source.partition(":")
    is_path = bool(colon) or Path(path).is_absolute() or path.startswith(".") or path.count("/") != 1
    return f"{Path(path).name if is_path else path}{colon}{function}"
