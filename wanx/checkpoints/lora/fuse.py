"""LoRAs put into the weights of a transformer, while those are streamed and before anything else.

W' = W + sum of strength * (alpha / r) * up @ down + sum of strength * diff, with r the rank;
without an alpha its factor is 1 (ComfyUI, ``comfy/weight_adapter/lora.py``).
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from wanx.checkpoints.lora.file import LoraFile, read_lora
from wanx.checkpoints.lora.names import (
    ALPHA,
    DIFF,
    DIFF_BIAS,
    DOWN,
    SET,
    UP,
    UP_BIAS,
    layer_names,
)
from wanx.checkpoints.lora.patches import Difference, FusedTensor, LowRank, Patch
from wanx.checkpoints.tensors.source import TensorSource
from wanx.checkpoints.weights import ComponentWeights, abbreviate
from wanx.errors import CorruptInputError, UsageError
from wanx.files.checksum import sha256_file

_log = logging.getLogger("wanx.exporter")
_MAX_STRENGTH = 100.0


@dataclass(frozen=True, kw_only=True)
class Lora:
    """A LoRA that was asked for.

    Attributes:
        path: of the file.
        strength: that it is multiplied by.
    """

    path: Path
    strength: float = 1.0

    @classmethod
    def parse(cls, text: str) -> Lora:
        """Parse ``FILE`` or ``FILE:STRENGTH``.

        Raises:
            UsageError: the strength is no number.
        """
        match = re.fullmatch(r"(.+):([-+]?(?:\d+\.?\d*|\.\d+)(?:e[-+]?\d+)?)", text, re.I | re.S)
        path, strength = (match[1], float(match[2])) if match else (text, 1.0)
        if not math.isfinite(strength) or abs(strength) > _MAX_STRENGTH:
            raise UsageError(
                f"--lora {text}: the strength {strength:g} is not between -{_MAX_STRENGTH:g} and "
                f"{_MAX_STRENGTH:g}"
            )
        if not match and ":" in text and not Path(text).exists():
            raise UsageError(
                f"--lora {text}: {text.rpartition(':')[2]!r} is no strength; give a number such as "
                "0.8 behind the colon"
            )
        return cls(path=Path(path), strength=strength)


def parse_loras(loras: Iterable[Lora | str]) -> list[Lora]:
    """Parse those that are texts; see :meth:`Lora.parse`."""
    return [Lora.parse(lora) if isinstance(lora, str) else lora for lora in loras]


@dataclass(frozen=True, kw_only=True)
class FusedLora:
    """A LoRA that is in the weights.

    Attributes:
        lora: what was asked for.
        sha256: of the file.
        matched: number of its tensors that are in.
        unmatched: names of those that fit no tensor of the model.
    """

    lora: Lora
    sha256: str
    matched: int
    unmatched: tuple[str, ...]


def fuse(
    weights: ComponentWeights, loras: Sequence[Lora]
) -> tuple[ComponentWeights, list[FusedLora]]:
    """Put LoRAs into the weights of a transformer; nothing is computed before they are read.

    Args:
        weights: under their original names.
        loras: in order, which matters where one sets a tensor.

    Raises:
        CorruptInputError: a file is damaged, or half of a pair is missing.
        UsageError: a file fits nothing, or is of a model of other sizes.
    """
    names = layer_names(weights.tensors)
    patches: dict[str, list[Patch]] = {}
    bases = dict(weights.tensors)
    fused = []
    for lora in loras:
        file = read_lora(lora.path)
        one = _Matching(file, lora.strength, bases)
        for layer, tensors in file.layers.items():
            one.match(names.get(layer), layer, tensors)
        one.require_fit()
        for name, found in one.patches.items():
            patches.setdefault(name, []).extend(found)
        for name, source in one.set.items():
            bases[name] = replace_base(bases[name], source)
            patches.pop(name, None)
        matched = sum(len(tensors) for tensors in file.layers.values()) - len(one.unmatched)
        unmatched = (*one.unmatched, *file.unknown)
        if unmatched:
            _log.warning(
                "%s: %d of %d tensors fit nothing in this model and are left out: %s",
                lora.path, len(unmatched), matched + len(unmatched), abbreviate(list(unmatched)),
            )  # fmt: skip
        fused.append(
            FusedLora(
                lora=lora, sha256=sha256_file(lora.path), matched=matched, unmatched=unmatched
            )
        )
    tensors = bases | {
        name: FusedTensor.of(bases[name], tuple(found)) for name, found in patches.items()
    }
    files = (*weights.files, *(lora.path for lora in loras))
    return replace(weights, tensors=tensors, files=files), fused


def replace_base(base: TensorSource, source: TensorSource) -> TensorSource:
    """A tensor of a file in the place of the model's, in its shape and type."""
    return replace(FusedTensor.of(source, ()), shape=base.shape, kept=base.storage)


class _Matching:
    """One file, layer by layer."""

    def __init__(
        self, file: LoraFile, strength: float, tensors: Mapping[str, TensorSource]
    ) -> None:
        self._file, self._strength, self._tensors = file, strength, tensors
        self.patches: dict[str, list[Patch]] = {}
        self.set: dict[str, TensorSource] = {}
        self.unmatched: list[str] = []
        self._misfits: list[str] = []

    def match(self, target: str | None, layer: str, tensors: Mapping[str, TensorSource]) -> None:
        """Find what a layer's tensors change."""
        names = [source.name for source in tensors.values()]
        if target is None:
            self.unmatched += names
            return
        weight = f"{target}.weight" if f"{target}.weight" in self._tensors else target
        bias = f"{target}.bias"
        if (UP in tensors) != (DOWN in tensors):
            raise CorruptInputError(
                f"{self._file.path} holds {abbreviate(names)} without its other half; download "
                "the file again"
            )
        factor = self._strength
        if UP in tensors:
            factor *= self._file.factor(tensors)
            self._low_rank(weight, tensors[UP], tensors[DOWN], factor)
        for role, name, size in (
            (UP_BIAS, bias, factor),
            (DIFF_BIAS, bias, self._strength),
            (DIFF, weight, self._strength),
            (SET, weight, None),
        ):
            if role not in tensors:
                continue
            source = tensors[role]
            if name not in self._tensors:
                self.unmatched.append(source.name)
            elif not _same_count(source, self._tensors[name]):
                self._misfit(source, self._tensors[name])
            elif size is None:
                self.set[name] = source
            else:
                self.patches.setdefault(name, []).append(Difference(factor=size, source=source))
        if ALPHA in tensors and UP not in tensors:
            self.unmatched.append(tensors[ALPHA].name)

    def _low_rank(self, name: str, up: TensorSource, down: TensorSource, factor: float) -> None:
        if name not in self._tensors:
            self.unmatched += [up.name, down.name]
            return
        target, rank = self._tensors[name], down.shape[0] if down.shape else 0
        rows = target.shape[0] if target.shape else 1
        columns = math.prod(target.shape[1:])
        if (
            not rank
            or math.prod(down.shape) != rank * columns
            or up.shape[:1] != (rows,)
            or math.prod(up.shape) != rows * rank
        ):
            self._misfit(down, target, up)
            return
        self.patches.setdefault(name, []).append(LowRank(factor=factor, up=up, down=down))

    def _misfit(self, source: TensorSource, target: TensorSource, *others: TensorSource) -> None:
        shapes = " and ".join(f"{s.name} {list(s.shape)}" for s in (*others, source))
        self._misfits.append(f"{shapes} for {list(target.shape)}")

    def require_fit(self) -> None:
        """Refuse a file that is of another model.

        Raises:
            UsageError: sizes do not fit, or nothing does.
        """
        path = self._file.path
        if self._misfits:
            first = "; ".join(self._misfits[:3])
            more = f"; and {len(self._misfits) - 3} more" if len(self._misfits) > 3 else ""
            raise UsageError(
                f"{path} is of a model of other sizes ({len(self._misfits)} in all): "
                f"{first}{more}; use the LoRA of this model"
            )
        if not self.patches and not self.set:
            raise UsageError(
                f"nothing in {path} fits this model: it holds {abbreviate(self.unmatched)}; use a "
                "LoRA of Wan2.1's transformer"
            )


def _same_count(source: TensorSource, target: TensorSource) -> bool:
    return math.prod(source.shape) == math.prod(target.shape)
