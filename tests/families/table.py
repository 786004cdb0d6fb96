"""Write the table of model families, docs/families.md: `python -m tests.families.table > docs/families.md`.

Every family goes through the real commands (`tests.families.cells`), in as many processes as the machine has cores.
`python -m tests.families.table NAME ...` prints the cells of some families only.
"""

from __future__ import annotations

import contextlib
import io
import multiprocessing
import re
import sys
import tempfile
import textwrap
from collections.abc import Iterable, Mapping
from pathlib import Path

from tests.conftest import byte_level_tokenizer  # sets the hub offline before transformers is imported

PAGE = Path(__file__).parents[2] / "docs" / "families.md"
_WIDTH = 120
STAGES = ("sft", "train-rm", "ppo", "evaluate")
_HEAD = """\
# Model families

Each row is a tiny model of one family with random weights, named by its `model_type` in transformers {version}. It goes
through the real commands: `sft` with an adapter, `train-rm` with an adapter, two steps of `ppo` that train all
weights, and `evaluate`. `yes` also means that plain transformers computes the same log-probabilities from the folders
that `sft` and `ppo` wrote. A refusal that follows from the architecture or its files comes before the first stage of a
run, and in `--dry-run`. Any other refusal comes when a stage loads the model, before that stage trains. Tests compare
this page with the code; `python -m tests.families.table > docs/families.md` writes it.

"""
_TAIL = """
## Notes on some families

- **Recurrent layers** (state-space models, linear attention, short convolutions: Mamba, Jamba, Falcon-H1, LFM2, Qwen
  3.5) read padding and the neighbors in a packed row as text. Prompts of one sampling batch therefore have equal
  lengths, batches for training are padded on the right, and `sft.packing` is refused. Layers whose weights a kernel
  reads directly (`out_proj` of Mamba) get no adapter; a message says which share of the weights an adapter reaches.
- **Mixture of experts**: `lora.target_modules: all-linear` reaches fused experts too, with A and B per expert, unless
  `lora.dropout` is set. PEFT 0.21 itself cannot load such an adapter for families whose shared experts and other
  experts have the same names (DeepSeek, GLM-4 MoE, ERNIE 4.5 MoE, HunYuan MoE, Qwen3-Next): use the merged weights that
  are written beside it. With frozen weights in bfloat16 the sum W + B A of an expert is rounded in every forward pass;
  `model.dtype: float32` avoids that. A training step computes that sum for all experts and keeps it for the backward
  pass; sampling computes it once for a set of completions, if memory allows the copy. A message warns of this memory
  and names the layers to list in `lora.target_modules` to leave the experts out. `model.quantize` quantizes linear
  layers: fused experts keep `model.dtype`.
- **Router loss**: `sft` adds the load-balancing loss of families that have one, with the weight of the model's
  configuration (`sft.router_aux_coef`); `train-rm` and `ppo` do not.
- **Rotary frequencies that depend on the length** (rope types `dynamic` and `longrope`): transformers chooses them by
  the longest text of a batch. Here the frequencies are always those of texts up to the original length, which is then
  the context length.
- **Multimodal models** are loaded whole and trained on text; adapters are on the language model.
"""


def cells_in(family: str) -> dict[str, str]:
    """Run the stages of a family in a folder of its own; see `cells_of`."""
    import torch

    from tests.families.cells import cells_of

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stderr(io.StringIO()):
        return cells_of(family, byte_level_tokenizer(pad=True), Path(folder))


def table(rows: Mapping[str, Mapping[str, str]]) -> str:
    """Return the rows as a table, with the reasons of refusals below it."""
    reasons = list(dict.fromkeys(cell for cells in rows.values() for cell in cells.values() if " " in cell))
    lines = [
        f"| family | {' | '.join(f'`{stage}`' for stage in STAGES)} |",
        "|" + "---|" * (1 + len(STAGES)),
    ]
    for family, cells in rows.items():
        found = [
            f"refused [{reasons.index(cells[stage]) + 1}]" if cells[stage] in reasons else cells[stage]
            for stage in STAGES
        ]
        lines.append(f"| `{family}` | {' | '.join(found)} |")
    notes = [
        textwrap.fill(
            reason.removeprefix("refused: "),
            _WIDTH,
            initial_indent=f"{number}. ",
            subsequent_indent=" " * len(f"{number}. "),
            break_long_words=False,
            break_on_hyphens=False,
        )
        for number, reason in enumerate(reasons, 1)
    ]
    return "\n".join([*lines, "", "Reasons of refusals:", "", *notes]) + "\n"


def documented(page: str) -> dict[str, dict[str, str]]:
    """Read the rows of the table back: family -> stage -> cell, refusals with their reasons."""
    lines = re.sub(r"\n {2,}", " ", page).splitlines()  # reasons may have several lines
    notes = dict(line.split(". ", 1) for line in lines if line[:1].isdigit() and ". " in line)
    rows: dict[str, dict[str, str]] = {}
    for line in lines:
        if line.startswith("| `"):
            family, *found = [cell.strip().strip("`") for cell in line.strip("|").split("|")]
            if found[0].startswith("sft"):
                continue
            found = [
                "refused: " + notes[cell.removeprefix("refused [").rstrip("]")] if cell.startswith("refused") else cell
                for cell in found
            ]
            rows[family] = dict(zip(STAGES, found, strict=True))
    return rows


def main(families: Iterable[str]) -> None:
    """Print the page, or the rows of some families."""
    import transformers

    from tests.families.zoo import FAMILIES

    chosen = list(families)
    names = chosen or sorted(FAMILIES)
    with multiprocessing.get_context("spawn").Pool() as pool:
        rows = dict(zip(names, pool.map(cells_in, names, chunksize=1), strict=True))
    text = table(rows)
    version = ".".join(transformers.__version__.split(".")[:2])
    sys.stdout.write(text if chosen else _HEAD.format(version=version) + text + _TAIL)


if __name__ == "__main__":
    main(sys.argv[1:])
