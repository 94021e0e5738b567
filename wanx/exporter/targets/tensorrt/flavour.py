"""What was asked of TensorRT: which of the two, for which GPUs, types, plug-ins."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from wanx.bundle.manifest import Component
from wanx.config.number_formats import FP8
from wanx.errors import UsageError
from wanx.exporter.targets.tensorrt.ops import OPS
from wanx.runtime.sessions.tensorrt.library import MODULES, RTX_SMS, import_tensorrt

FP8_SM, BF16_SM = FP8.oldest_sm, 80
NEWER = "sm80+"  # what full TensorRT calls its hardware compatibility level AMPERE_PLUS


@dataclass(frozen=True, kw_only=True)
class Flavour:
    """One of the two TensorRTs, and the GPUs to build for.

    Attributes:
        target: ``rtx`` or ``tensorrt``.
        sms: GPUs such as 89; none stands for that of this machine.
        newer: whether for all newer GPUs too.
    """

    target: str
    sms: tuple[int, ...] = ()
    newer: bool = False

    def module(self) -> Any:
        """Import it.

        Raises:
            EnvironmentMismatchError: it is not installed.
        """
        return import_tensorrt(MODULES[self.target])

    @property
    def device(self) -> str:
        """The GPUs as a plan names them."""
        return "+".join(f"sm{sm}" for sm in self.sms) + ("+" if self.newer else "")

    def compiler(self) -> str:
        """What builds, and its version.

        Raises:
            EnvironmentMismatchError: as :meth:`module`.
        """
        return f"{MODULES[self.target]} {self.module().__version__}"


def parse_target(target: str) -> Flavour | None:
    """Read ``rtx``, ``rtx:sm89,sm120``, ``tensorrt`` or ``tensorrt:sm80+``; None for others.

    Raises:
        UsageError: a GPU that the flavour does not build for.
    """
    name, _, asked = target.partition(":")
    if name not in MODULES:
        return None
    if name == "tensorrt" and asked == NEWER:
        return Flavour(target=name, sms=(BF16_SM,), newer=True)
    if name == "tensorrt" and asked:
        raise UsageError(
            f"--target {target}: TensorRT builds for this machine's GPU; leave out what follows, "
            f"or write tensorrt:{NEWER} for engines that all newer ones run too"
        )
    wanted = asked.split(",") if asked else []
    for word in wanted:
        if word not in RTX_SMS:
            raise UsageError(
                f"--target {target}: TensorRT-RTX does not build for {word or 'nothing'}; choose "
                f"from {', '.join(RTX_SMS)}"
            )
    return Flavour(target=name, sms=tuple(sorted({int(word[2:]) for word in wanted})))


def parse_plugins(asked: str) -> tuple[str, ...]:
    """Read ``none``, ``auto``, or functions such as ``RMSNormRope,GeluQuantize``.

    ``auto`` is those that were measured to be faster than what TensorRT fuses by itself: so far
    none.

    Raises:
        UsageError: there is no such plug-in.
    """
    if asked in ("none", "auto"):
        return ()
    names = tuple(dict.fromkeys(asked.split(",")))
    if unknown := [name for name in names if name not in OPS]:
        raise UsageError(
            f"--plugins {asked}: there is no plug-in {unknown[0] or 'without a name'}; choose "
            f"auto, none, or from {', '.join(OPS)}"
        )
    return names


def for_this_machine(flavour: Flavour) -> Flavour:
    """Name the GPU of this machine where none was asked for.

    Raises:
        UsageError: there is none to name, or it is older than those to build for.
    """
    if flavour.target == "rtx" and flavour.sms:
        return flavour
    if not torch.cuda.is_available():
        hint = "; name one, as in rtx:sm89" if flavour.target == "rtx" else ""
        raise UsageError(
            f"--target {flavour.target} builds for this machine's GPU, and PyTorch finds none{hint}"
        )
    major, minor = torch.cuda.get_device_capability()
    found = 10 * major + minor
    if not flavour.newer:
        return replace(flavour, sms=(found,))
    if found < BF16_SM:
        raise UsageError(f"a GPU of {NEWER} has to build for it, and this one is sm{found}")
    return flavour


def require_plugins(flavour: Flavour, plugins: Sequence[str]) -> None:
    """Refuse kernels of ours for GPUs that are not named.

    Raises:
        UsageError: they were asked for.
    """
    if flavour.newer and plugins:
        raise UsageError(f"plug-ins hold kernels for GPUs by name; leave --plugins out, or {NEWER}")


def compute_type(group: str, component: Component) -> torch.dtype:
    """The type that a component computes in around its 8-bit layers."""
    return torch.bfloat16


def require_precision(flavour: Flavour, precision: str) -> None:
    """Refuse what a GPU cannot compute.

    Raises:
        UsageError: says which precision or GPU would work.
    """
    for sm in flavour.sms:
        if precision == "fp8" and sm < FP8_SM:
            raise UsageError(f"sm{sm} has no FP8; choose --precision int8, or sm{FP8_SM} or newer")
        if sm < BF16_SM:
            raise UsageError(
                f"sm{sm} has no bf16, which engines compute in; choose sm{BF16_SM} or newer"
            )
