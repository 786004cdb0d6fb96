"""Step checkpoints of a stage: atomic, checked by SHA-256, and skipped with a warning when damaged.

    step-00000010/    the newest few, to resume from
    best-00000008/    never rotated away: what a stage writes if later steps were worse

With several processes, process 0 writes, and decides which checkpoint all of them read. A `BackgroundWriter` writes a
copy of the tensors while training goes on, with the same bytes.
"""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from rlhf_cli.distributed.agreement import agreed
from rlhf_cli.errors import UsageError
from rlhf_cli.files import rename
from rlhf_cli.models.gathering import Gathering
from rlhf_cli.models.safetensors_format import order_of
from rlhf_cli.models.saving import require_finite
from rlhf_cli.models.sharding import divided, is_divided, local
from rlhf_cli.progress import warn
from rlhf_cli.training.checkpoint.files import (
    DamagedCheckpoint,
    Take,
    is_of_another_format,
    partial_folder,
    read_folder,
    replaced_folder,
    write_folder,
)
from rlhf_cli.training.checkpoint.names import BEST, STEP, checkpoint_folder, checkpoint_folders, step_of

if TYPE_CHECKING:
    from rlhf_cli.distributed.process_group import ProcessGroup
    from rlhf_cli.training.checkpoint.background import BackgroundWriter


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose checksums are right.

    Attributes:
        step: steps done when it was written.
        tensors: name -> tensor on the CPU, read when it is used.
        state: anything JSON can express.
    """

    step: int
    tensors: Mapping[str, Tensor]
    state: dict[str, Any]


def save_checkpoint(
    folder: Path,
    step: int,
    tensors: dict[str, Tensor],
    state: dict[str, Any],
    *,
    keep: int = 2,
    protected: Collection[int] = (),
    processes: ProcessGroup | None = None,
    writer: BackgroundWriter | None = None,
) -> None:
    """Write the checkpoint of `step` and remove all but the newest `keep`.

    Args:
        folder: folder of the stage's checkpoints.
        step: steps done.
        tensors: name -> tensor on any device; those on the CPU are not copied.
        state: anything JSON can express.
        keep: number of checkpoints that stay.
        protected: steps whose checkpoints stay too, however old.
        processes: the processes of the run, all of which call this; process 0's tensors and state are written.
        writer: writes a copy of tensors and state while training goes on; None writes them before this returns.

    Raises:
        DiskError: there is not enough space, or the disk cannot be written; the previous checkpoint is intact. A writer
            raises it later.
        DivergedError: a value is NaN or infinite; nothing is written.
    """
    if writer is not None:
        state, protected = copy.deepcopy(state), frozenset(protected)

    def write(take: Take) -> None:
        _save(checkpoint_folder(folder, STEP, step), step, tensors, state, take)
        _rotate(folder, step, keep, protected)

    _by_main(write, step, tensors, processes, writer)


def save_best(
    folder: Path,
    step: int,
    tensors: dict[str, Tensor],
    state: dict[str, Any],
    *,
    processes: ProcessGroup | None = None,
    writer: BackgroundWriter | None = None,
) -> None:
    """Write the best checkpoint so far, in place of the previous best one; see `save_checkpoint`.

    A run that is killed and resumes from before `step` finds it again: `Checkpoint.state` says how good it was.
    """

    def write(take: Take) -> None:
        _save(checkpoint_folder(folder, BEST, step), step, tensors, state, take)
        for old in checkpoint_folders(folder, BEST):
            if step_of(old) != step:
                _remove(old)

    _by_main(write, step, tensors, processes, writer)


def remove_all_but_newest(folder: Path) -> None:
    """Remove the step checkpoints of a finished training that nothing resumes from or rolls back to any more."""
    for path in checkpoint_folders(folder, STEP)[1:]:
        _remove(path)


def latest_checkpoint(
    folder: Path, *, up_to: int | None = None, processes: ProcessGroup | None = None
) -> Checkpoint | None:
    """Return the newest whole checkpoint, or None; damaged ones are skipped with a warning.

    Args:
        folder: folder of the stage's checkpoints.
        up_to: largest step to consider; None considers all.
        processes: the processes of the run, all of which call this and get the same checkpoint.

    Raises:
        UsageError: a process cannot read what process 0 can.
    """
    return _newest(folder, STEP, processes, up_to)


def best_checkpoint(folder: Path, *, processes: ProcessGroup | None = None) -> Checkpoint | None:
    """Return what `save_best` wrote, or None; see `latest_checkpoint`."""
    return _newest(folder, BEST, processes)


def _save(target: Path, step: int, tensors: dict[str, Tensor], state: dict[str, Any], take: Take) -> None:
    _tidy(target.parent)
    write_folder(target, step, tensors, state, take)


def _check_finite(step: int, tensors: dict[str, Tensor]) -> None:
    """Check the values that this process holds."""
    for name, tensor in tensors.items():
        # A sum is finite only if every value is, and takes no memory; where it overflows, every value is checked.
        values = local(tensor.detach())
        if values.is_floating_point() and not torch.isfinite(values.sum()):
            require_finite({name: values}, what=f"the checkpoint of step {step}")


def _newest(folder: Path, kind: str, processes: ProcessGroup | None, up_to: int | None = None) -> Checkpoint | None:
    found = None
    if processes is None or processes.is_main:
        _tidy(folder)
        found = _newest_whole(folder, kind, up_to)
    if processes is None or processes.count == 1:
        return found
    step = processes.all_gather_object(None if found is None else found.step)[0]
    problem = None
    if step is not None and not processes.is_main:
        try:
            found = Checkpoint(*read_folder(checkpoint_folder(folder, kind, step)))
        except DamagedCheckpoint as damage:
            problem = str(damage)
    for number, told in enumerate(processes.all_gather_object(problem)):
        if told is not None:
            raise UsageError(
                f"process {number} cannot read the checkpoint of step {step} in {folder}, which process 0 can: {told}",
                hint="put the run directory on a file system that all machines of the run share",
            )
    return found


def _newest_whole(folder: Path, kind: str, up_to: int | None) -> Checkpoint | None:
    folders = [path for path in checkpoint_folders(folder, kind) if up_to is None or step_of(path) <= up_to]
    for path in folders:
        try:
            return Checkpoint(*read_folder(path))
        except DamagedCheckpoint as damage:
            warn(f"skipping the damaged checkpoint {path}: {damage}")
    if folders and kind == STEP:
        warn(f"no checkpoint in {folder} is intact: starting from the beginning")
    return None


def _by_main(
    write: Callable[[Take], None],
    step: int,
    tensors: dict[str, Tensor],
    processes: ProcessGroup | None,
    writer: BackgroundWriter | None,
) -> None:
    """Let process 0 write; an error is raised in all processes, so that none waits for one that has ended."""
    is_main = processes is None or processes.is_main
    if writer is not None:
        writer.wait()  # what it writes is older, and has the same names for what is not complete
        checked = {name: one for name, one in tensors.items() if is_main or is_divided(one)}
        agreed(lambda: _check_finite(step, checked), processes)
        writer.begin(tensors, order_of(tensors), write)
        return
    gathering = Gathering(tensors, order_of(tensors))
    is_shared = any(map(is_divided, tensors.values()))
    if is_shared:  # each process checks its part before any is gathered
        agreed(lambda: _check_finite(step, tensors), processes)

    def written() -> None:
        try:
            if is_main:
                if not is_shared:
                    _check_finite(step, tensors)
                write(gathering.take)
        finally:
            gathering.finish()

    agreed(written, processes)


def _rotate(folder: Path, step: int, keep: int, protected: Collection[int]) -> None:
    """Remove all but the newest `keep`, and those newer than `step`, which were damaged and skipped."""
    folders = checkpoint_folders(folder, STEP)
    for path in [path for path in folders if step_of(path) > step]:
        if not is_of_another_format(path):
            _remove(path)
    for path in [path for path in folders if step_of(path) <= step][keep:]:
        if step_of(path) not in protected:
            _remove(path)


def _remove(path: Path) -> None:
    try:
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    except OSError as error:
        warn(f"cannot remove the old checkpoint {path}: {(error.strerror or str(error)).lower()}")


def _tidy(folder: Path) -> None:
    """Finish or undo what a killed process left: a partial checkpoint, or a replaced one without its successor."""
    for path in [path for kind in (STEP, BEST) for path in folder.glob(f".{kind}-*")]:
        target = path.with_name(path.stem.removeprefix("."))
        if path == replaced_folder(target) and not target.exists():
            rename(path, target)
        elif path in (replaced_folder(target), partial_folder(target)):
            shutil.rmtree(path, ignore_errors=True)


def optimizer_tensors(optimizer: torch.optim.Optimizer, prefix: str) -> dict[str, Tensor]:
    """Return the per-parameter state of an optimizer (AdamW's moments and step counts), by parameter number."""
    return {
        f"{prefix}/{number}/{name}": value
        for number, entries in optimizer.state_dict()["state"].items()
        for name, value in entries.items()
    }


def restore_optimizer(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor], prefix: str) -> None:
    """Restore what `optimizer_tensors` returned; the parameter groups keep the settings the optimizer was made with.

    Of the moments of sharded weights each process reads its part.
    """
    state: dict[int, dict[str, Tensor]] = {}
    weights = [weight for group in optimizer.param_groups for weight in group["params"]]
    for key in tensors:
        if key.startswith(prefix + "/"):
            value = tensors[key]
            number, name = key.removeprefix(prefix + "/").split("/")
            # A copy, since the tensors of a file just read are memory-mapped, and rotation will remove that file.
            is_like_weight = value.shape == weights[int(number)].shape
            own = divided(value, weights[int(number)]) if is_like_weight else value
            state.setdefault(int(number), {})[name] = own.clone()
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
