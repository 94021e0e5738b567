"""The weights of one component, whatever layout they come in, under their original names."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from wanx.checkpoints import key_maps
from wanx.checkpoints.tensors.source import JoinedTensor, TensorSource
from wanx.checkpoints.weights import ComponentWeights, open_weights
from wanx.errors import CorruptInputError, abbreviate

Tensors = dict[str, TensorSource]


def open_component(
    component: str,
    folder: Path,
    stem: str,
    key_map: key_maps.KeyMap | None = None,
    *,
    full_precision: bool = False,
) -> ComponentWeights:
    """Open the weights ``stem`` in ``folder``; see :func:`component_weights`.

    Args:
        component: such as ``dit``.
        folder: where the files are.
        stem: their names without shard numbers and suffixes.
        key_map: from the original names to those of the files.
        full_precision: as for :func:`wanx.checkpoints.weights.open_weights`.

    Raises:
        CorruptInputError: files or parts of a tensor are missing, damaged, unsafe, or hold one
            tensor under two names.
    """
    stored, files = open_weights(folder, stem, full_precision=full_precision)
    return component_weights(component, stored, files, key_map)


def component_weights(
    component: str,
    stored: Mapping[str, TensorSource],
    files: tuple[Path, ...],
    key_map: key_maps.KeyMap | None = None,
) -> ComponentWeights:
    """Give tensors their original names and shapes; see :mod:`wanx.checkpoints.key_maps`.

    Args:
        component: such as ``dit``.
        stored: tensors by stored name.
        files: that they are in.
        key_map: from the original names to those of the files.

    Raises:
        CorruptInputError: parts of a tensor are missing, or one tensor has two names.
    """
    stored = dict(stored)
    for duplicate, primary in key_maps.TIED.get(component, {}).items():
        if duplicate in stored and (
            primary not in stored or stored[duplicate].shape == stored[primary].shape
        ):
            stored.setdefault(primary, stored[duplicate])
            del stored[duplicate]
    ignored = key_maps.IGNORED.get(component, ())
    prefixes = key_maps.PREFIXES.get(component, ())
    prefix = next((p for p in prefixes if any(name.startswith(p) for name in stored)), "")
    tensors: Tensors = {}
    for name, tensor in stored.items():
        if any(re.fullmatch(pattern, name) for pattern, _ in ignored):
            continue
        without_prefix = name.removeprefix(prefix)
        original = (key_map and key_map.to_original(without_prefix)) or without_prefix
        if original in tensors:
            raise CorruptInputError(
                f"{tensor.file} holds {original!r} twice, as {tensors[original].name!r} and as "
                f"{name!r}; use a checkpoint of one layout"
            )
        tensors[original] = tensor

    def stored_name(original: str) -> str:
        return prefix + ((key_map and key_map.to_diffusers(original)) or original)

    weights = ComponentWeights(
        component=component, tensors=tensors, files=files, stored_name=stored_name
    )
    return weights if key_map is None else _as_original(weights)


def _as_original(weights: ComponentWeights) -> ComponentWeights:
    """Reshape and concatenate tensors of the Diffusers layout to those of the original."""
    tensors = dict(weights.tensors)
    for name, axes in key_maps.LEADING_AXES.get(weights.component, {}).items():
        if name in tensors:
            tensors[name] = replace(tensors[name], shape=(*(1,) * axes, *tensors[name].shape))
    missing: list[str] = []
    for whole, parts in key_maps.CONCATENATED.get(weights.component, {}).items():
        pattern = re.compile(rf"(.*\.)(?:{'|'.join(parts)})(\..*)")
        matches = [match for name in tensors if (match := pattern.fullmatch(name))]
        for before, after in dict.fromkeys(match.groups() for match in matches):
            names = [f"{before}{part}{after}" for part in parts]
            missing += (weights.stored_name(name) for name in names if name not in tensors)
            if all(name in tensors for name in names):
                joined = JoinedTensor.of(*(tensors.pop(name) for name in names))
                tensors[f"{before}{whole}{after}"] = joined
    if missing:
        raise CorruptInputError(
            f"the {weights.component} weights in {weights.files[0].parent} lack "
            f"{abbreviate(missing)}; use a complete Wan2.1 checkpoint"
        )
    return replace(weights, tensors=tensors)
