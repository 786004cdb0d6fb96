"""The weights of a model folder, under plain names and without quantization."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from rlhf_cli.errors import ModelError
from rlhf_cli.models.prequantized import Quantization
from rlhf_cli.models.stored_weights import StoredWeight, plain_names, read_header, weight_files

Shape = tuple[int, ...]


@dataclass(frozen=True)
class LazyWeight:
    """A weight that is read when it is indexed, as transformers does with each weight that it loads.

    Attributes:
        stored: where it is.
        name: under which it is stored.
        opened: files that are open, each once.
        scale: scale of a quantized weight and the name under which it is stored; None if the weight is not quantized.
        quantization: how it is quantized.
        closes: open the file anew for each reading. Otherwise all pages that were read stay in memory while it is open.
    """

    stored: StoredWeight
    name: str
    opened: dict[Path, Any]
    scale: tuple[StoredWeight, str] | None = None
    quantization: Quantization | None = None
    closes: bool = False

    def __getitem__(self, index: Any) -> Tensor:
        """Return the weight, or a part of it; raises `ModelError` if its file cannot be read any more."""
        weight = self._read(self.stored, self.name)
        if self.scale is not None and self.quantization is not None:
            weight = self.quantization.dequantize(weight, self._read(*self.scale))
        return weight[index]

    def _read(self, stored: StoredWeight, name: str) -> Tensor:
        try:
            if self.closes:
                with safe_open(stored.file, framework="pt") as file:
                    return file.get_tensor(name)
            if stored.file not in self.opened:
                self.opened[stored.file] = safe_open(stored.file, framework="pt")
            return self.opened[stored.file].get_tensor(name)
        except (OSError, SafetensorError) as error:
            raise ModelError(
                f"cannot read the weight `{name}` from {stored.file}: {error}",
                hint="check that this file is whole and does not change, on every machine of the run",
            ) from error


@dataclass(frozen=True)
class Checkpoint:
    """Stored weights.

    Attributes:
        path: folder or hub id, for messages.
        weights: by the names that a model expects, without wrappers.
        stored_names: the name under which each is stored.
        scales: name of the scale of each weight that is stored quantized.
        quantization: how they are quantized; None if they are not.
        is_whole: whether these are all the weights of the files.
        closes: see `LazyWeight`.
    """

    path: str
    weights: Mapping[str, StoredWeight]
    stored_names: Mapping[str, str]
    scales: Mapping[str, str]
    quantization: Quantization | None = None
    is_whole: bool = True
    closes: bool = False

    @property
    def shapes(self) -> dict[str, Shape]:
        """Shape of each weight that a model loads."""
        scales = set(self.scales.values())
        return {name: self._shape(name) for name in self.weights if name not in scales}

    def _shape(self, name: str) -> Shape:
        stored = self.weights[name].shape
        if self.quantization is None or name not in self.scales:
            return stored
        return self.quantization.shape(stored)

    @property
    def is_plain(self) -> bool:
        """Whether transformers can load the files as they are."""
        return self.is_whole and not self.scales and all(name == stored for name, stored in self.stored_names.items())

    def renamed(self, names: Mapping[str, str]) -> Checkpoint:
        """Return this checkpoint with other names for some of its weights."""
        return replace(
            self,
            weights={names.get(name, name): weight for name, weight in self.weights.items()},
            stored_names={names.get(name, name): stored for name, stored in self.stored_names.items()},
        )

    def without(self, *names: str) -> Checkpoint:
        """Return this checkpoint without some of its weights."""
        dropped = set(names)
        return replace(
            self,
            weights={key: weight for key, weight in self.weights.items() if key not in dropped},
            stored_names={key: stored for key, stored in self.stored_names.items() if key not in dropped},
            is_whole=False,
        )

    def lazy(self) -> dict[str, LazyWeight]:
        """Return all weights by name, to be read when they are indexed."""
        found: dict[str, LazyWeight] = {}
        opened: dict[Path, Any] = {}
        for name in self.shapes:
            scale = self.scales.get(name)
            where = None if scale is None else (self.weights[scale], self.stored_names[scale])
            found[name] = LazyWeight(
                self.weights[name], self.stored_names[name], opened, where, self.quantization, self.closes
            )
        return found

    def read(self, name: str) -> Tensor:
        """Read one weight in float32."""
        return self.lazy()[name][...].to(torch.float32)


def open_checkpoint(path: str, *, folder: Path | None = None, quantization: Quantization | None = None) -> Checkpoint:
    """Read the headers of a model's weight files.

    Args:
        path: folder or hub id, for messages.
        folder: with the files; None is `path`.
        quantization: how its configuration says that weights are quantized.

    Raises:
        ModelError: there are no weights in safetensors, or a file is missing, truncated or damaged.
    """
    files = weight_files(Path(path) if folder is None else folder)
    stored = {name: weight for file in files for name, weight in read_header(file).items()}
    plain = plain_names(stored)
    if len(set(plain.values())) < len(plain):
        twice = next(name for name in plain.values() if list(plain.values()).count(name) > 1)
        raise ModelError(
            f"`{path}`: two stored weights are both `{twice}`: " + ", ".join(k for k, v in plain.items() if v == twice),
            hint="write the model again from inside its wrapper: `model.module.save_pretrained(FOLDER)`",
        )
    weights = {plain[name]: weight for name, weight in stored.items()}
    found = Checkpoint(path, weights, {plain[name]: name for name in stored}, {}, quantization)
    if quantization is None:
        return found
    found = found.renamed(quantization.plain_names(weights))
    found = found.without(*quantization.activation_scales(found.weights))
    return replace(found, scales=quantization.scales(path, found.weights))
