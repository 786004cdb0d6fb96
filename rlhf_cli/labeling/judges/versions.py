"""Which commit a hub id stands for: verdicts are kept for one, and the judge that is loaded is that one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from rlhf_cli.distributed.process_group import ProcessGroup
from rlhf_cli.models.loading import ModelSource, load_config
from rlhf_cli.progress import warn

_CONFIG = "config.json"


def at_one_commit(source: ModelSource, processes: ProcessGroup) -> ModelSource:
    """The same model with a commit for its revision, in place of a branch or tag that may move.

    What is in the local cache of the hub stands, so that a rerun asks the judge that was asked before; without it, the
    configuration is fetched, which says what the revision is now. The first process decides for all. Where the cache
    does not say even then, a warning does, and the source stays as it is.

    Args:
        source: a hub id.
        processes: those of the run.

    Raises:
        ModelError: it is neither in the cache nor can it be fetched.
    """
    commit: str | None = None
    if processes.is_main:
        commit = _cached_commit(source)
        if commit is None:
            load_config(source)
            commit = _cached_commit(source)
        if commit is None:
            warn(
                f"judge {source.path}: the commit of `{source.revision or 'main'}` is unknown, so verdicts are kept "
                "for that name: should it move, those of the old weights are taken for those of the new"
            )
    commit = processes.all_gather_object(commit)[0]
    return source if commit is None else replace(source, revision=commit)


def _cached_commit(source: ModelSource) -> str | None:
    """Name of the snapshot that the revision leads to in the local cache."""
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(source.path, _CONFIG, revision=source.revision)
    return Path(found).parent.name if isinstance(found, str) else None
