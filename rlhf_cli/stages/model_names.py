"""What people call models: by run and stage, by folder, or by hub id."""

from __future__ import annotations

from pathlib import Path

_STEPS = "steps"


def model_names(*sources: str) -> tuple[str, ...]:
    """Return what people call models: `RUN/STAGE` for an artifact, else the folder's name or the hub id.

    A model in an artifact is called `RUN/ppo/steps/20`, and a folder that is only a number has its parent's name too.
    Different models that would be called the same are called by their whole paths.
    """
    short = [_model_name(source) for source in sources]
    alike = {
        name for name in short if len({source for source, own in zip(sources, short, strict=True) if own == name}) > 1
    }
    return tuple(source if name in alike else name for source, name in zip(sources, short, strict=True))


def _model_name(source: str) -> str:
    folder = Path(source)
    if not folder.is_dir():
        return source
    folder = folder.resolve()
    parts = [folder.name]
    if folder.parent.name == _STEPS:  # a policy of `ppo.save_steps`
        folder = folder.parents[1]
        parts = [folder.name, _STEPS, *parts]
    is_artifact, is_number = (folder / "manifest.json").is_file(), folder.name.isdigit()
    return "/".join([folder.parent.name, *parts] if is_artifact or is_number else parts)
