"""Sizes of networks, inferred from the shapes of a checkpoint's tensors."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from wanx.checkpoints.renamings import tensor_renaming
from wanx.checkpoints.weights import ComponentWeights
from wanx.errors import CorruptInputError


def shape_of(weights: ComponentWeights, name: str, rank: int) -> tuple[int, ...]:
    """Shape of a tensor that tells sizes.

    Raises:
        CorruptInputError: it is missing, or has not ``rank`` positive sides.
    """
    tensor = weights.tensors.get(name)
    if tensor is None:
        stored_name = weights.stored_name(name)
        names = [source.name for source in weights.tensors.values()]
        remedy = tensor_renaming(weights.component, [stored_name], names)
        raise CorruptInputError(
            f"the {weights.component} weights in {weights.files[0].parent} lack {stored_name}; "
            f"{remedy or 'use a complete Wan2.1 checkpoint'}"
        )
    if len(tensor.shape) != rank or 0 in tensor.shape:
        raise CorruptInputError(
            f"{tensor.file}: tensor {tensor.name} has shape {list(tensor.shape)}, expected {rank} "
            "positive sides; use a Wan2.1 checkpoint"
        )
    return tensor.shape


def count_blocks(weights: ComponentWeights, stack: str) -> int:
    """Number of members of a stack: distinct indices, so that a stray large one counts once."""
    prefix = f"{stack}."
    return len({n[len(prefix) :].split(".")[0] for n in weights.tensors if n.startswith(prefix)})


def require_agreement(fields: Mapping[str, Any], inferred: Mapping[str, Any], source: Path) -> None:
    """Compare what a config file says with what the tensors tell.

    Raises:
        CorruptInputError: they are of different models.
    """
    wrong = [key for key, value in inferred.items() if fields.get(key, value) != value]
    if wrong:
        in_config = ", ".join(f"{key} {fields[key]}" for key in wrong)
        in_tensors = ", ".join(f"{key} {inferred[key]}" for key in wrong)
        raise CorruptInputError(
            f"{source} says {in_config} but the tensors have {in_tensors}; the config and the "
            "weights are of different models"
        )
