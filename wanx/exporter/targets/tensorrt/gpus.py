"""TensorRT or TensorRT-RTX, and the GPUs, precisions and plug-ins that it can build for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from wanx.config.number_formats import FP8
from wanx.errors import UsageError
from wanx.exporter.targets.tensorrt.ops import OPS
from wanx.runtime.sessions.tensorrt.library import MODULES, RTX_SMS, import_tensorrt

FP8_SM, BF16_SM = FP8.oldest_sm, 80
AMPERE_PLUS = "sm80+"  # full TensorRT's hardware compatibility level of that name


@dataclass(frozen=True, kw_only=True)
class TensorRTTarget:
    """One of the two TensorRTs, and the GPUs to build for.

    Attributes:
        name: ``rtx`` or ``tensorrt``.
        sms: GPUs such as 89; none stands for that of this machine.
        ampere_plus: one engine that all GPUs from SM80 on run.
    """

    name: str
    sms: tuple[int, ...] = ()
    ampere_plus: bool = False

    def module(self) -> Any:
        """Import it.

        Raises:
            EnvironmentMismatchError: it is not installed.
        """
        return import_tensorrt(MODULES[self.name])

    @property
    def device(self) -> str:
        """The GPUs as a schedule names them."""
        return "+".join(f"sm{sm}" for sm in self.sms) + ("+" if self.ampere_plus else "")

    def compiler(self) -> str:
        """Module that builds, and its version.

        Raises:
            EnvironmentMismatchError: as :meth:`module`.
        """
        return f"{MODULES[self.name]} {self.module().__version__}"


def parse_target(text: str) -> TensorRTTarget | None:
    """Parse ``rtx``, ``rtx:sm89,sm120``, ``tensorrt`` or ``tensorrt:sm80+``; None for others.

    Raises:
        UsageError: a GPU that this TensorRT does not build for.
    """
    name, _, gpus = text.partition(":")
    if name not in MODULES:
        return None
    if name == "tensorrt" and gpus == AMPERE_PLUS:
        return TensorRTTarget(name=name, sms=(BF16_SM,), ampere_plus=True)
    if name == "tensorrt" and gpus:
        raise UsageError(
            f"--target {text}: TensorRT builds for this machine's GPU; leave out what follows, "
            f"or write tensorrt:{AMPERE_PLUS} for engines that all newer ones run too"
        )
    sms = gpus.split(",") if gpus else []
    for sm in sms:
        if sm not in RTX_SMS:
            raise UsageError(
                f"--target {text}: TensorRT-RTX does not build for {sm or 'nothing'}; choose "
                f"from {', '.join(RTX_SMS)}"
            )
    return TensorRTTarget(name=name, sms=tuple(sorted({int(sm[2:]) for sm in sms})))


def parse_plugins(text: str) -> tuple[str, ...]:
    """Parse ``none``, ``auto``, or functions such as ``RMSNormRope,GeluQuantize``.

    ``auto`` is those that were measured to be faster than what TensorRT fuses by itself: so far
    none.

    Raises:
        UsageError: there is no such plug-in.
    """
    if text in ("none", "auto"):
        return ()
    names = tuple(dict.fromkeys(text.split(",")))
    if unknown := [name for name in names if name not in OPS]:
        raise UsageError(
            f"--plugins {text}: there is no plug-in {unknown[0] or 'without a name'}; choose "
            f"auto, none, or from {', '.join(OPS)}"
        )
    return names


def for_this_machine(target: TensorRTTarget) -> TensorRTTarget:
    """Name the GPU of this machine where none was asked for.

    Raises:
        UsageError: there is none to name, or it is older than those to build for.
    """
    if target.name == "rtx" and target.sms:
        return target
    if not torch.cuda.is_available():
        hint = "; name one, as in rtx:sm89" if target.name == "rtx" else ""
        raise UsageError(
            f"--target {target.name} builds for this machine's GPU, and PyTorch finds none{hint}"
        )
    major, minor = torch.cuda.get_device_capability()
    here = 10 * major + minor
    if not target.ampere_plus:
        return replace(target, sms=(here,))
    if here < BF16_SM:
        raise UsageError(f"a GPU of {AMPERE_PLUS} has to build for it, and this one is sm{here}")
    return target


def require_plugins(target: TensorRTTarget, plugins: Sequence[str]) -> None:
    """Refuse kernels of ours for GPUs that are not named.

    Raises:
        UsageError: they were asked for.
    """
    if target.ampere_plus and plugins:
        raise UsageError(
            f"plug-ins hold kernels for GPUs by name; leave --plugins out, or {AMPERE_PLUS}"
        )


def require_precision(target: TensorRTTarget, precision: str) -> None:
    """Refuse what a GPU cannot compute.

    Raises:
        UsageError: says which precision or GPU would work.
    """
    for sm in target.sms:
        if precision == "fp8" and sm < FP8_SM:
            raise UsageError(f"sm{sm} has no FP8; choose --precision int8, or sm{FP8_SM} or newer")
        if sm < BF16_SM:
            raise UsageError(
                f"sm{sm} has no bf16, which engines compute in; choose sm{BF16_SM} or newer"
            )
