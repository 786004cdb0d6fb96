"""Minibatches and micro-batches that an engine accepts, computed from the number of GPUs by the script that starts it.

verl 0.9.1 divides a minibatch of completions among all GPUs, without a remainder, and each part into micro-batches,
also without one. OpenRLHF 0.11.2 passes both sizes to DeepSpeed, which requires `minibatch = micro-batch x accumulation
x GPUs`.
Both have equal vLLM engines on all GPUs, each within a node.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class BatchSizes:
    """Sizes of the recipe, which the script changes as little as it can.

    Attributes:
        step: prompts or completions of a step.
        minibatch: wanted size, in the unit of `step`.
        unit: completions per unit of `step`: those of a prompt, or 1.
        micro_batch: wanted completions per pass and GPU.
        engine_gpus: GPUs among which a vLLM engine divides the policy.
    """

    step: int
    minibatch: int
    unit: int
    micro_batch: int
    engine_gpus: int = 1

    def fitted(self, gpus: int) -> tuple[int, int] | None:
        """Return the minibatch and micro-batch for a number of GPUs; None if no minibatch can be divided among them."""
        for size in range(self.minibatch, self.step + 1):
            if self.step % size == 0 and size * self.unit % gpus == 0:
                share = size * self.unit // gpus
                return size, next(micro for micro in range(self.micro_batch, 0, -1) if share % micro == 0)
        return None

    @property
    def default_gpus(self) -> int:
        """Largest of 8, 4, 2 and 1 GPUs with which the minibatch is closest to the recipe's.

        Only multiples of the GPUs of an engine count. If no minibatch can be divided, it is one engine.
        """
        numbers = [gpus for gpus in (8, 4, 2, 1) if gpus % self.engine_gpus == 0] or [self.engine_gpus]
        fitted = {gpus: found[0] for gpus in numbers if (found := self.fitted(gpus))}
        least = min(fitted.values(), default=None)
        return next((gpus for gpus, size in fitted.items() if size == least), self.engine_gpus)

    def report(self) -> str:
        """Return what the script does with its default number of GPUs; empty if the sizes are those of the recipe."""
        found = self.fitted(self.default_gpus)
        if found is None:
            return (
                f"train.sh: {self.step * self.unit} completions per step cannot be divided among engines of "
                f"{self.engine_gpus} GPUs: change `ppo.prompts_per_step` or `generation.tensor_parallel_size`"
            )
        sizes = (("minibatch", self.minibatch, found[0]), ("micro-batch", self.micro_batch, found[1]))
        changed = [f"{name} {used} instead of {given}" for name, given, used in sizes if used != given]
        if not changed:
            return ""
        why = "evenly" if self.default_gpus == 1 else f"evenly among {self.default_gpus} GPUs"
        return f"train.sh: {' and '.join(changed)}, because sizes must divide {why}"

    def lines(self) -> list[str]:
        """Return lines of bash that set MINIBATCH and MICRO_BATCH from GPUS and NODES, or end with status 2."""
        completions = self.step * self.unit
        return [
            f"GPUS=${{GPUS:-{self.default_gpus}}}    # of each node",
            "NODES=${NODES:-1}",
            "if ! [[ $GPUS =~ ^[1-9][0-9]*$ && $NODES =~ ^[1-9][0-9]*$ ]]; then",
            '    echo "train.sh: GPUS and NODES must be whole numbers from 1, got $GPUS and $NODES" >&2',
            "    exit 2",
            "fi",
            *self._engine_lines(),
            "TOTAL=$((NODES * GPUS))",
            "# The minibatch must divide the step and be divisible among all GPUs; a micro-batch must divide the",
            "# share of a GPU. The minibatch is the recipe's or the next larger one that fits, the micro-batch the",
            "# recipe's or the next smaller one.",
            f"MINIBATCH={self.minibatch}",
            f"while ((MINIBATCH <= {self.step} && ({self.step} % MINIBATCH || MINIBATCH * {self.unit} % TOTAL)))",
            "do MINIBATCH=$((MINIBATCH + 1)); done",
            f"if ((MINIBATCH > {self.step})); then",
            f'    echo "train.sh: {completions} completions per step cannot be divided among $TOTAL GPUs:'
            f' set GPUS and NODES so that GPUS x NODES divides {completions}" >&2',
            "    exit 2",
            "fi",
            f"MICRO_BATCH={self.micro_batch}",
            f"while ((MINIBATCH * {self.unit} / TOTAL % MICRO_BATCH)); do MICRO_BATCH=$((MICRO_BATCH - 1)); done",
            f"if ((MINIBATCH != {self.minibatch} || MICRO_BATCH != {self.micro_batch})); then",
            '    echo "train.sh: minibatch $MINIBATCH, micro-batch $MICRO_BATCH;'
            f" the recipe's {self.minibatch} and {self.micro_batch} do not divide evenly among $TOTAL GPUs\" >&2",
            "fi",
        ]

    def _engine_lines(self) -> list[str]:
        size = self.engine_gpus
        if size == 1:
            return []
        return [
            f"if ((GPUS % {size})); then",
            f'    echo "train.sh: a vLLM engine has {size} GPUs of a node, which must divide GPUS=$GPUS" >&2',
            "    exit 2",
            "fi",
        ]
