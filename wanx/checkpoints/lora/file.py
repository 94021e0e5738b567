"""LoRA files: tensors by layer and role, whatever trained them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from wanx.checkpoints.lora.names import DOWN, UNSUPPORTED, parse_name
from wanx.checkpoints.tensors.source import TensorSource
from wanx.checkpoints.weights import PICKLES, abbreviate, open_files
from wanx.errors import CorruptInputError, UsageError
from wanx.files.safetensors import read_header

_METADATA = "lora_adapter_metadata"  # of Diffusers, in the header


@dataclass(frozen=True, kw_only=True)
class LoraFile:
    """What a LoRA file holds.

    Attributes:
        path: of the file.
        layers: by what the trainer calls a layer, its tensors by role.
        unknown: names that say nothing.
        alpha: that the header gives for layers without one of their own, by their rank; None means
            a factor of 1.
        rank_stabilised: alpha is divided by the square root of the rank.
    """

    path: Path
    layers: Mapping[str, Mapping[str, TensorSource]]
    unknown: tuple[str, ...]
    alpha: float | None = None
    rank_stabilised: bool = False

    def factor(self, tensors: Mapping[str, TensorSource]) -> float:
        """Factor of a layer's product: alpha over the rank.

        Raises:
            CorruptInputError: alpha is not one finite number.
        """
        alpha = self.alpha
        if "alpha" in tensors:
            numbers = [
                number
                for piece in tensors["alpha"].iter_converted("F32")
                for number in np.frombuffer(piece, "<f4")
            ]
            if len(numbers) != 1:
                raise CorruptInputError(
                    f"{self.path}: {tensors['alpha'].name!r} has {len(numbers)} numbers instead of "
                    "one; download the file again"
                )
            alpha = float(numbers[0])
        if alpha is None:
            return 1.0
        rank = tensors[DOWN].shape[0]
        return alpha / (rank**0.5 if self.rank_stabilised else rank)


def read_lora(path: Path) -> LoraFile:
    """Read the names of a LoRA file; numbers are not touched.

    Raises:
        CorruptInputError: the file is missing, damaged or unsafe, or holds a layer twice.
        UsageError: it holds adapters of a kind that is not fused.
    """
    metadata: Mapping[str, str] = {}
    if path.suffix not in PICKLES:
        metadata = read_header(path).metadata
    tensors, _ = open_files([path])
    layers: dict[str, dict[str, TensorSource]] = {}
    unknown = []
    for name, source in tensors.items():
        parsed = parse_name(name)
        if parsed is None:
            unknown.append(name)
            continue
        if parsed.role in UNSUPPORTED:
            raise UsageError(
                f"{path} is an adapter of the kind {parsed.role} ({name[:120]!r}), which wanx does "
                "not fuse; use a LoRA, or fuse it with the tool that trained it"
            )
        roles = layers.setdefault(parsed.layer, {})
        if parsed.role in roles:
            raise CorruptInputError(
                f"{path} holds the {parsed.role} tensor of {parsed.layer!r} twice, as "
                f"{abbreviate([roles[parsed.role].name, name])}; use a file of one layout"
            )
        roles[parsed.role] = source
    if not layers:
        raise UsageError(
            f"{path} is no LoRA: it holds {abbreviate(unknown) or 'nothing'}; give the weights of "
            "a model with --dit"
        )
    alpha, rank_stabilised = _alpha_of(path, metadata)
    return LoraFile(
        path=path, layers=layers, unknown=tuple(unknown), alpha=alpha,
        rank_stabilised=rank_stabilised,
    )  # fmt: skip


def _alpha_of(path: Path, metadata: Mapping[str, str]) -> tuple[float | None, bool]:
    """Alpha that Diffusers writes into the header, and whether it is rank-stabilised."""
    text = metadata.get(_METADATA)
    if text is None:
        return None, False
    try:
        facts: dict[str, Any] = json.loads(text)
        settings = {key.removeprefix("transformer."): value for key, value in facts.items()}
        alpha = settings.get("lora_alpha")
        alpha = None if alpha is None else float(alpha)
        stabilised, patterns = bool(settings.get("use_rslora")), settings.get("alpha_pattern")
    except (ValueError, TypeError, AttributeError):
        raise CorruptInputError(
            f"{path}: {_METADATA} in its header is not what Diffusers writes; download the file "
            "again"
        ) from None
    if patterns:
        raise UsageError(
            f"{path} has an alpha of its own for {len(patterns)} layers (alpha_pattern), which "
            "wanx does not fuse; save it with one alpha"
        )
    return alpha, stabilised
