"""LoRA files: tensors by layer and role, whatever trained them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from wanx.checkpoints.lora.alpha import Alpha, alpha_of
from wanx.checkpoints.lora.names import ALPHA, DOWN, UNSUPPORTED, parse_name
from wanx.checkpoints.tensors.source import TensorSource
from wanx.checkpoints.weights import PICKLES, open_files
from wanx.errors import CorruptInputError, UsageError, abbreviate
from wanx.files.floats import FLOATS, NUMPY
from wanx.files.safetensors import read_header


@dataclass(frozen=True, kw_only=True)
class LoraFile:
    """Content of a LoRA file, of which no number is read yet.

    Attributes:
        path: of the file.
        layers: by what the trainer calls a layer, its tensors by role.
        unknown: names that say nothing.
        alpha: of layers without one of their own.
    """

    path: Path
    layers: Mapping[str, Mapping[str, TensorSource]]
    unknown: tuple[str, ...]
    alpha: Alpha

    def factor(self, tensors: Mapping[str, TensorSource]) -> float:
        """Factor of a layer's product: alpha over the rank.

        Raises:
            CorruptInputError: alpha is not one finite number, or the rank is none.
        """
        own, down = tensors.get(ALPHA), tensors[DOWN]
        if not down.shape or not down.shape[0]:
            raise CorruptInputError(
                f"{self.path}: {down.name!r} is {list(down.shape)}, which has no rank; download "
                "the file again"
            )
        return self.alpha.factor(None if own is None else _scalar(own), down.shape[0])


def _scalar(source: TensorSource) -> float:
    """Read a tensor of one number, of any type that trainers store alpha in."""
    if math.prod(source.shape) != 1:
        raise CorruptInputError(
            f"{source.file}: {source.name!r} has {math.prod(source.shape)} numbers instead of one; "
            "download the file again"
        )
    if source.dtype in FLOATS:
        (piece,) = source.iter_converted("F32")
        return float(np.frombuffer(piece, "<f4")[0])
    if source.dtype not in ("I64", "I32", "F64"):
        raise CorruptInputError(
            f"{source.file}: {source.name!r} is {source.dtype}, which is no number for alpha; "
            "download the file again"
        )
    (piece,) = source.iter_bytes()
    value = float(np.frombuffer(piece, NUMPY[source.dtype])[0])
    if not math.isfinite(value):
        raise source.not_finite()
    return value


def read_lora(path: Path) -> LoraFile:
    """Read the names of a LoRA file; numbers are not touched.

    Raises:
        CorruptInputError: the file is missing, damaged or unsafe, or holds a layer twice.
        UsageError: it holds adapters of a kind that is not fused.
    """
    if path.is_dir():
        path = path / "adapter_model.safetensors"  # as PEFT saves it
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
        if parsed.role != ALPHA and source.dtype not in FLOATS:
            raise UsageError(
                f"{path}: {name[:120]!r} is {source.dtype}, and wanx reads LoRAs in F32, F16, BF16 "
                "and 8-bit floats; save it in one of these"
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
    return LoraFile(
        path=path, layers=layers, unknown=tuple(unknown), alpha=alpha_of(path, metadata)
    )  # fmt: skip
