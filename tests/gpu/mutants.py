"""Faults that a GPU would show: each is one changed place in a copy of rlhf_cli."""

from __future__ import annotations

import re
import shutil
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Mutant:
    """A fault.

    Attributes:
        files: where the place may be, as a glob pattern below rlhf_cli.
        pattern: of the place; the first match is replaced.
        replacement: of the match, in the syntax of `re.sub`.
    """

    files: str
    pattern: str
    replacement: str

    def apply(self, folder: Path) -> Path:
        """Write a copy of rlhf_cli with the fault into a folder, which can be imported from then on.

        Raises:
            AssertionError: no file holds the pattern.
        """
        package = folder / "rlhf_cli"
        # With what is compiled already, but for files that another process is about to write and to rename.
        shutil.copytree(ROOT / "rlhf_cli", package, ignore=shutil.ignore_patterns("*.pyc.*"))
        for file in sorted(package.glob(self.files)):
            before = file.read_text(encoding="utf-8")
            after = re.sub(self.pattern, self.replacement, before, count=1, flags=re.MULTILINE)
            if after != before:
                file.write_text(after, encoding="utf-8")
                return folder
        raise AssertionError(
            f"no file rlhf_cli/{self.files} matches {self.pattern!r}: the code has changed, so choose another place "
            "for the fault"
        )


REFUSED = {
    "sampling": Mutant("generation/*.py", r"(uniforms(?:\(.*\))?)\.to\((?:model\.)?device\)", r"\1"),
    "sequence batches": Mutant("generation/sequence_batch.py", r"\binput_ids\.to\([^()]*\)", "input_ids"),
    "reward scoring": Mutant("stages/ppo/*.py", r"(self\.rewards\(completions\))\.to\([^()]*\)", r"\1"),
    "value pass": Mutant("generation/sequence_batch.py", r"\bis_completion\.to\([^()]*\)", "is_completion"),
    "sft loss": Mutant("stages/sft/*.py", r"\bvalue\.to\(device\)", "value"),
    "label scoring": Mutant("models/reward_model/batch.py", r"\bplan\.input_ids\.to\(device\)", "plan.input_ids"),
}
"""A missing `.to(device)`, by where it is missing: the device refuses the next operation."""

WAITS = Mutant(
    "generation/*.py",
    r"^( +)(probabilities = torch\.softmax\(.*)$",
    r"\1logits.sum().item()\n\1\2",
)
"""The loop over decoded tokens reads a number of the device: over the budget of synchronizations."""

KEEPS = Mutant(
    "generation/logprobs.py",
    r"^( +)(return hidden\[batch\.predicting\])$",
    r"\1globals().setdefault('_KEPT', []).append(hidden.repeat(256, 1))\n\1\2",
)
"""The hidden states of every pass are kept: memory grows from step to step."""

WHOLE = Mutant(
    "models/sharding.py",
    r"^( +)(before\(block, .*\))$",
    r"\1\2\n\1globals().setdefault('_KEPT', []).extend(one.detach().to(device) + 0 for one in block.parameters())",
)
"""Every rank keeps a copy of all blocks on its device."""

STALE = Mutant("models/sharding.py", r"(fully_shard\(block, mesh=mesh,)", r"\1 reshard_after_forward=False,")
"""Blocks stay whole after a pass until a backward pass drops them: what was taken for a weight is then freed memory."""
