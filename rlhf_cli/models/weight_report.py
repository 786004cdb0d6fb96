"""Compare the weights that a model needs with those that a checkpoint holds, by name and shape."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from types import SimpleNamespace

from torch import nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    MergeModulelist,
    WeightConverter,
    WeightRenaming,
    apply_renamings,
    rename_source_key,
)

from rlhf_cli.errors import ModelError

Shape = tuple[int, ...]


@dataclass(frozen=True)
class WeightReport:
    """How a checkpoint differs from a model.

    Attributes:
        missing: weights of the model that the checkpoint lacks.
        unexpected: stored weights of modules that the model has, or has in other numbers, and that it would not use.
        mismatched: name, stored shape and shape in the model.
        unused: number of stored weights of each part that the model does not have, such as the vocabulary projection of
            a classifier or the vision tower of a text model.
    """

    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    mismatched: tuple[tuple[str, Shape, Shape], ...] = ()
    unused: Mapping[str, int] = field(default_factory=dict)

    def check(self, path: str, kind: str) -> None:
        """Refuse a checkpoint that is not the model's.

        Args:
            path: of the checkpoint, for the message.
            kind: of the model, such as "llama".

        Raises:
            ModelError: a weight is missing, unexpected or of another shape.
        """
        if self.missing:
            raise ModelError(
                f"`{path}`: {_count(self.missing, f' of a {kind} model')} missing, such as `{self.missing[0]}`",
                hint=_hint(self),
            )
        if self.mismatched:
            name, stored, expected = self.mismatched[0]
            raise ModelError(
                f"`{path}`: {_count(self.mismatched)} of another shape than its config.json says, such as `{name}`: "
                f"stored {stored}, expected {expected}",
                hint="give the config.json that belongs to the weights",
            )
        if self.unexpected:
            raise ModelError(
                f"`{path}`: {_count(self.unexpected)} stored that a {kind} model of its config.json would not use, "
                f"such as `{self.unexpected[0]}`",
                hint="give the config.json that belongs to the weights: with these sizes, biases and layers",
            )

    def allowing(self, names: Collection[str]) -> WeightReport:
        """Return this report without missing weights of these names."""
        return replace(self, missing=tuple(name for name in self.missing if name not in names))

    def describe_unused(self, path: str, *, but: Collection[str] = ()) -> str | None:
        """Return a line that says which stored weights, other than those of parts in `but`, are not used, or None."""
        unused = {part: count for part, count in self.unused.items() if part not in but}
        if not unused:
            return None
        parts = ", ".join(f"{count:,} of `{part}`" for part, count in sorted(unused.items()))
        return f"{path}: stored weights that this model does not have are not used: {parts}"


def _count(found: Collection[object], of: str = "") -> str:
    return f"{len(found):,} weight{of} is" if len(found) == 1 else f"{len(found):,} weights{of} are"


def _hint(report: WeightReport) -> str:
    stored = [*report.unexpected, *report.unused]
    if any(".lora_" in name or ".base_layer." in name for name in stored):
        return "these are the weights of a model with its adapter: merge it, or give the folder that PEFT wrote"
    unknown = next(iter(stored), None)
    also = "" if unknown is None else f"; it holds others that the model does not know, such as `{unknown}`"
    return f"give the folder of the complete model{also}"


def compare(model: PreTrainedModel, stored: Mapping[str, Shape]) -> WeightReport:
    """Compare a model with stored weights without reading them.

    Names are converted as transformers does at loading. Shapes are compared where a weight is stored as the model holds
    it, or as one weight per expert; those that transformers splits or transposes are compared at loading.

    Args:
        model: on the meta device or with weights.
        stored: shapes by names without wrappers (`stored_weights.plain_names`).
    """
    expected = model.state_dict()
    conversions = get_model_conversion_mapping(model)
    renamings = [one for one in conversions if isinstance(one, WeightRenaming)]
    converters = [one for one in conversions if isinstance(one, WeightConverter)]
    by_pattern = {pattern: one for one in converters for pattern in one.source_patterns}
    fused: dict[str, _Fused] = {}
    found: set[str] = set()
    unexpected: set[str] = set()
    mismatched = []
    for name, shape in stored.items():
        target, pattern = rename_source_key(name, renamings, converters, model.base_model_prefix, expected)
        if target not in expected and name in expected:
            target, pattern = name, None
        if target not in expected:
            unexpected.add(target)
        elif pattern is not None:
            first, *others = by_pattern[pattern].target_patterns
            found |= {target, *(target.replace(first, other) for other in others)}
            into = fused.setdefault(target, _Fused(target, by_pattern[pattern]))
            into.add(pattern, apply_renamings(name, renamings), shape)
        else:
            found.add(target)
            if tuple(expected[target].shape) != shape:
                mismatched.append((target, shape, tuple(expected[target].shape)))
    missing = expected.keys() - found
    for target, source in model.all_tied_weights_keys.items():
        if target in found or source in found:
            missing -= {target, source}
    keys = SimpleNamespace(missing_keys=missing, unexpected_keys=unexpected)
    model._adjust_missing_and_unexpected_keys(keys)  # pyright: ignore[reportArgumentType]
    for into in fused.values():
        keys.missing_keys |= into.missing(tuple(expected[into.target].shape))
        mismatched += into.mismatched(tuple(expected[into.target].shape))
    return sort_out(model, keys.missing_keys, keys.unexpected_keys, mismatched)


_MOST_EXPERTS = 10_000
"""Bounds the names of missing experts that are listed for a configuration with a wrong number of them."""


@dataclass
class _Fused:
    """The stored weights that transformers makes into one, such as the matrices of all experts of a layer.

    Attributes:
        target: the model's weight.
        converter: how it is made.
        sources: shapes by pattern of their names, and by the number that stands for the `*` in it: the expert.
    """

    target: str
    converter: WeightConverter
    sources: dict[str, dict[int, Shape]] = field(default_factory=dict)

    def add(self, pattern: str, name: str, shape: Shape) -> None:
        """Add a stored weight whose name, as transformers renames it, matches a pattern."""
        number = re.search(pattern.replace("*", r"(\d+)", 1), name) if "*" in pattern else None
        self.sources.setdefault(pattern, {})[int(number[1]) if number else 0] = shape

    def missing(self, expected: Shape) -> set[str]:
        """Return the names of sources that are not stored: each pattern needs the same numbers, from 0.

        Args:
            expected: shape of the weight in the model.
        """
        stored = {number for numbers in self.sources.values() for number in numbers}
        count = min(expected[0], _MOST_EXPERTS) if self._is_stacked else len(stored)
        return {
            self._name(pattern, number)
            for pattern in self.converter.source_patterns
            for number in range(count if "*" in pattern else 1)
            if number not in self.sources.get(pattern, ())
        }

    def mismatched(self, expected: Shape) -> list[tuple[str, Shape, Shape]]:
        """Return name, stored shape and shape in the model where these differ; experts must all have one shape."""
        for pattern, shapes in self.sources.items():
            first = shapes[min(shapes)]
            for number, shape in sorted(shapes.items()):
                if shape != first:
                    return [(self._name(pattern, number), shape, first)]
        parts = [next(iter(shapes.values())) for shapes in self.sources.values()]
        if not self._is_stacked or len(parts) < len(self.converter.source_patterns):
            return []
        count = max(len(shapes) for shapes in self.sources.values())
        wholes = {(count, sum(other[0] for other in parts), *shape[1:]) for shape in parts}
        return [(self.target, whole, expected) for whole in sorted(wholes) if whole != expected]

    @property
    def _is_stacked(self) -> bool:
        """Whether the weight is (experts, rows, columns), of one or several matrices one below the other."""
        made = [(type(one), getattr(one, "dim", None)) for one in self.converter.operations]
        return made in ([(MergeModulelist, 0)], [(MergeModulelist, 0), (Concatenate, 1)])

    def _name(self, pattern: str, number: int) -> str:
        source = re.sub(r"[\\^$]", "", pattern.replace("*", str(number), 1))
        return self.target.replace(self.converter.target_patterns[0], source)


def sort_out(
    model: PreTrainedModel,
    missing: Iterable[str],
    unexpected: Iterable[str],
    mismatched: Iterable[tuple[str, Shape, Shape]] = (),
) -> WeightReport:
    """Return a report in which stored weights of parts that the model does not have are told from those of its own."""
    dropped, unused = [], Counter[str]()
    modules = dict(model.named_modules())
    for name in unexpected:
        if _COMPUTED.search(name) or _is_mask(modules, name):
            continue
        if (part := _other_part(model, modules, name)) is None:
            dropped.append(name)
        else:
            unused[part] += 1
    return WeightReport(tuple(sorted(missing)), tuple(sorted(dropped)), tuple(sorted(mismatched)), unused)


_COMPUTED = re.compile(r"\.(masked_bias|rotary_emb\.inv_freq|position_ids)$")
"""Buffers of old checkpoints, which models compute: masked logits, rotary frequencies, positions."""


def _is_mask(modules: Mapping[str, nn.Module], name: str) -> bool:
    """Whether a weight is the causal mask that GPT-2 and its descendants stored as `bias` of their attention.

    That module has no parameters of its own, as every module has whose bias is one.
    """
    parent, _, leaf = name.rpartition(".")
    found = modules.get(parent)
    return leaf == "bias" and found is not None and not list(found.parameters(recurse=False))


def _other_part(model: PreTrainedModel, modules: Collection[str], name: str) -> str | None:
    """Return the part that a stored weight belongs to if the model has no such part; None if it has.

    Parts are the modules beside the backbone, and those directly inside it.
    """
    first, _, rest = name.partition(".")
    inner = f"{first}.{rest.partition('.')[0]}"
    if first not in modules and f"{model.base_model_prefix}.{first}" not in modules:
        return first
    is_backbone = first == model.base_model_prefix or isinstance(_submodule(model, first), PreTrainedModel)
    return inner if is_backbone and "." in rest and inner not in modules else None


def _submodule(model: nn.Module, name: str) -> nn.Module | None:
    return dict(model.named_children()).get(name)
