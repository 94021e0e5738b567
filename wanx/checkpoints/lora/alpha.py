"""Alpha of a whole LoRA file: in its header, as Diffusers writes it, or beside it, as PEFT does."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from wanx.errors import CorruptInputError, UsageError
from wanx.files.input_file import parse_json_object, read_json_object

_METADATA = "lora_adapter_metadata"  # of Diffusers, in the header
CONFIG = "adapter_config.json"  # of PEFT, beside the weights
PREFIX = "transformer."


@dataclass(frozen=True, kw_only=True)
class Alpha:
    """Numerator of the factor of layers that have none of their own.

    Attributes:
        value: alpha; None stands for the rank, a factor of 1.
        rank_stabilised: it is divided by the square root of the rank, not by the rank.
    """

    value: float | None = None
    rank_stabilised: bool = False

    def factor(self, value: float | None, rank: int) -> float:
        """Factor of a layer's product; ``value`` is the layer's own alpha."""
        alpha = self.value if value is None else value
        if alpha is None:
            return 1.0
        return alpha / (rank**0.5 if self.rank_stabilised else rank)


def alpha_of(path: Path, metadata: Mapping[str, str]) -> Alpha:
    """Find what is said about a file.

    Args:
        path: of the file.
        metadata: of its header.

    Raises:
        CorruptInputError: what is there is not what Diffusers and PEFT write.
        UsageError: layers have alphas of their own there.
    """
    if _METADATA in metadata:
        facts = parse_json_object(metadata[_METADATA].encode(), path)
        own = {k.removeprefix(PREFIX): v for k, v in facts.items() if k.startswith(PREFIX)}
        return _parsed(f"{_METADATA} in the header of {path}", own or facts)
    beside = path.with_name(CONFIG)
    if beside.exists():
        return _parsed(str(beside), read_json_object(beside))
    return Alpha()


def _parsed(where: str, facts: Mapping[str, Any]) -> Alpha:
    match facts.get("lora_alpha"):
        case None:
            value = None
        case bool():
            raise _damaged(where, "lora_alpha")
        case int() | float() as number if abs(number) < 1e6 and math.isfinite(number):
            value = float(number)
        case _:
            raise _damaged(where, "lora_alpha")
    patterns = facts.get("alpha_pattern")
    if patterns:
        raise UsageError(
            f"{where} gives layers alphas of their own (alpha_pattern), which wanx does not fuse; "
            "save the LoRA with one alpha"
        )
    if facts.get("use_dora"):
        raise UsageError(f"{where} says that it is a DoRA, which wanx does not fuse; use a LoRA")
    return Alpha(value=value, rank_stabilised=facts.get("use_rslora") is True)


def _damaged(where: str, key: str) -> CorruptInputError:
    return CorruptInputError(f"{where} has no number for {key}; download the LoRA again")
