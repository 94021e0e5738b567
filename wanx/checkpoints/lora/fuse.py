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

from wanx.bundle.manifest import LoraRecord
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
from wanx.checkpoints.weights import ComponentWeights
from wanx.errors import CorruptInputError, UsageError, abbreviate
from wanx.files.checksum import sha256_file
from wanx.hub.reference import HubReference, hub_reference, is_uri

_log = logging.getLogger("wanx.checkpoints")
_MAX_STRENGTH = 100.0
_MAX_NAMES, _MAX_NAME = 100, 256  # of what fits nothing, in a manifest
# Layers whose number of input channels differs from task to task.
_BY_TASK = ("patch_embedding", "vace_patch_embedding")


@dataclass(frozen=True, kw_only=True)
class Lora:
    """A LoRA that was asked for.

    Attributes:
        path: of the file, here or on the hub.
        strength: that it is multiplied by.
    """

    path: Path | HubReference
    strength: float = 1.0

    @classmethod
    def parse(cls, text: str) -> Lora:
        """Parse ``FILE`` or ``FILE:STRENGTH``; a file on the hub is ``hf://owner/name/file``.

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
        if reference := hub_reference(path) if is_uri(path) else None:
            return cls(path=reference, strength=strength)
        if not match and ":" in text and not Path(text).exists():
            raise UsageError(
                f"--lora {text}: {text.rpartition(':')[2]!r} is no strength; give a number such as "
                "0.8 behind the colon"
            )
        return cls(path=Path(path), strength=strength)


def parse_loras(loras: Iterable[Lora | str | Path]) -> tuple[Lora, ...]:
    """Parse those that are texts; see :meth:`Lora.parse`.

    Raises:
        UsageError: a strength is no number, or there is one text in the place of several.
    """
    if isinstance(loras, str | Path):
        raise UsageError(f"loras is {str(loras)!r}; give a list of them")
    found = []
    for lora in loras:
        if isinstance(lora, Path):
            found.append(Lora(path=lora))
        else:
            found.append(Lora.parse(lora) if isinstance(lora, str) else lora)
    return tuple(found)


def fuse(
    weights: ComponentWeights, loras: Sequence[Lora]
) -> tuple[ComponentWeights, list[LoraRecord]]:
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
    fused, paths = [], []
    for lora in loras:
        assert isinstance(lora.path, Path), "it is fetched before"
        file = read_lora(lora.path)
        paths.append(file.path)
        one = _Matching(file, lora.strength, bases)
        for layer, tensors in file.layers.items():
            one.match(names.get(layer), tensors)
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
            LoraRecord(
                file=lora.path.name[:_MAX_NAME],
                sha256=sha256_file(file.path),
                strength=lora.strength,
                matched=matched,
                unmatched=tuple(name[:_MAX_NAME] for name in unmatched[:_MAX_NAMES]),
            )
        )
    tensors = bases | {
        name: FusedTensor.of(bases[name], tuple(found)) for name, found in patches.items()
    }
    files = (*weights.files, *paths)
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
        self._seen: dict[tuple[str, str], str] = {}

    def match(self, target: str | None, tensors: Mapping[str, TensorSource]) -> None:
        """Find what a layer's tensors change.

        Raises:
            CorruptInputError: half of a pair is missing, or another layer is the same one.
        """
        names = [source.name for source in tensors.values()]
        if target is None:
            self.unmatched += names
            return
        for role, source in tensors.items():
            if other := self._seen.get((target, role)):
                raise CorruptInputError(
                    f"{self._file.path} holds the {role} tensor of {target!r} twice, as "
                    f"{abbreviate([other, source.name])}; use a file of one layout"
                )
            self._seen[target, role] = source.name
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
            elif not _same_shape(source, self._tensors[name]):
                self._misfit(name, source)
            elif size is None:
                if self._strength:
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
            self._misfit(name, up, down)
            return
        self.patches.setdefault(name, []).append(LowRank(factor=factor, up=up, down=down))

    def _misfit(self, name: str, *sources: TensorSource) -> None:
        if name.partition(".")[0] in _BY_TASK:  # of another task, and the rest may fit all the same
            self.unmatched += [source.name for source in sources]
            return
        shapes = " and ".join(f"{source.name} {list(source.shape)}" for source in sources)
        self._misfits.append(f"{shapes} for {list(self._tensors[name].shape)}")

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
        if not self.patches and not self.set and self._strength:
            raise UsageError(
                f"nothing in {path} fits this model: it holds {abbreviate(self.unmatched)}; use a "
                "LoRA of Wan2.1's transformer"
            )


def _same_shape(source: TensorSource, target: TensorSource) -> bool:
    """True for the same sides but for those of 1, and for a convolution's in one."""
    ours, theirs = ([side for side in tensor.shape if side != 1] for tensor in (source, target))
    flat = [ours[0], math.prod(ours[1:])] if len(ours) > 1 else ours
    return ours == theirs or flat == [theirs[0], math.prod(theirs[1:])] if theirs else not ours
