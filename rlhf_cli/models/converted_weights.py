"""Stored weights under the names of a model, read one at a time: also those that it fuses, such as the experts of a
layer."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

from rlhf_cli.errors import ModelError
from rlhf_cli.models.checkpoint import Checkpoint, LazyWeight


@dataclass(frozen=True)
class FusedWeight:
    """A weight that transformers makes of several stored ones; they are read when it is indexed.

    Attributes:
        name: in the model.
        model: on the meta device; says sizes to the conversion.
        converter: transformers' own conversion.
        sources: pattern of the converter, stored name and stored weight, in the order in which they are fused.
    """

    name: str
    model: PreTrainedModel
    converter: WeightConverter
    sources: list[tuple[str, str, LazyWeight]] = field(default_factory=list)

    def __getitem__(self, index: Any) -> Tensor:
        """Return the weight, or a part of it."""
        converter = copy.deepcopy(self.converter)
        for pattern, name, weight in self.sources:
            converter.add_tensor(self.name, name, pattern, lambda weight=weight: weight[...])  # pyright: ignore[reportArgumentType]
        value = converter.convert(self.name, model=self.model, config=self.model.config)[self.name]
        return (value[0] if isinstance(value, list) else value)[index]


AnyWeight = LazyWeight | FusedWeight


class NotShardedError(ModelError):
    """A model that cannot be sharded."""


def weights_by_name(model: PreTrainedModel, checkpoint: Checkpoint, path: str, *, hint: str) -> dict[str, AnyWeight]:
    """Return stored weights by their names in a model; tied ones have both names.

    Args:
        model: on the meta device.
        checkpoint: holds the model's weights, as `weight_report.compare` found.
        path: for messages.
        hint: for messages.

    Raises:
        NotShardedError: the model splits a stored weight into several.
    """
    conversions = get_model_conversion_mapping(model)
    renamings = [one for one in conversions if isinstance(one, WeightRenaming)]
    converters = [one for one in conversions if isinstance(one, WeightConverter)]
    by_pattern = {pattern: one for one in converters for pattern in one.source_patterns}
    expected = model.state_dict()
    found: dict[str, AnyWeight] = {}
    for name, weight in sorted(checkpoint.lazy().items(), key=lambda item: dot_natural_key(item[0])):
        target, pattern = rename_source_key(name, renamings, converters, model.base_model_prefix, expected)
        if target not in expected and name in expected:
            target, pattern = name, None
        if pattern is not None and len(by_pattern[pattern].target_patterns) > 1:
            raise NotShardedError(
                f"`model.sharding: fsdp`: a {model.config.model_type} model splits `{name}`, as `{path}` stores it, "
                "into several weights",
                hint=hint,
            )
        if target not in expected:
            continue
        if pattern is None:
            found[target] = weight
            continue
        fused = found.setdefault(target, FusedWeight(target, model, by_pattern[pattern]))
        assert isinstance(fused, FusedWeight)
        fused.sources.append((pattern, name, weight))
    for name, other in model.all_tied_weights_keys.items():
        for one, same in ((name, other), (other, name)):
            if one not in found and same in found:
                found[one] = found[same]
    return found
