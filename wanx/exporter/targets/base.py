"""Interface of targets and of the builders of their engines."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from wanx.bundle.engine_schedule import EngineSchedule
from wanx.bundle.manifest import Component, Manifest
from wanx.exporter.graph.cache import GraphCache
from wanx.exporter.targets.options import BuilderOptions

if TYPE_CHECKING:
    import onnx_ir as ir
    import torch

    from wanx.exporter.partition.segments import Partition

OnFraction = Callable[[float], None]  # told how much is done, from 0 to 1


# Of a bundle, its manifest, a component, and the graphs that were traced before.
OwnGraph = Callable[[Path, Manifest, str, GraphCache], "ir.Model"]


def no_fraction(done: float) -> None:
    """Report to nobody."""


class Builder(ABC):
    """Builder of engines for one device, ready to build the components of one bundle."""

    @property
    @abstractmethod
    def device(self) -> str:
        """Device of the engines as schedules name it, such as ``cpu`` or ``sm89+sm120``."""

    @property
    @abstractmethod
    def fingerprint(self) -> str:
        """Compiler, its version, and the options that make other engines; part of their name."""

    @abstractmethod
    def compute_dtype(self, group: str, component: Component) -> torch.dtype:
        """Return the type that a component computes in.

        Args:
            group: of weights, such as ``vae``.
            component: as the bundle stores it.
        """

    @abstractmethod
    def build(
        self, component: str, parts: Partition, folder: Path, on_fraction: OnFraction = no_fraction
    ) -> EngineSchedule:
        """Build the engines of a component, and write them and their schedule.

        Args:
            component: its name.
            parts: its segments.
            folder: a new one.
            on_fraction: told how much is done.

        Raises:
            WanxError: an engine does not build, or is not what was asked for.
        """

    def notes(self) -> list[str]:
        """Return lines for the user about options that engines built so far could not follow."""
        return []


@dataclass(frozen=True, kw_only=True)
class Target:
    """Target of a build.

    Attributes:
        name: as manifests have it, without GPUs.
        prepare: makes the builder for a bundle; None where the portable graphs need none. It raises
            ``UsageError`` where the target's GPU lacks the bundle's precision, and
            ``EnvironmentMismatchError`` where the compiler is missing.
        may_be_elsewhere: engines may be for a GPU that this machine lacks.
        graph: makes the target's own graph of a component, of a bundle's folder, its manifest, the
            component's name and a cache; None where the portable ones are run.
        missing_kernels: names the nodes of such a graph's file that the target has no kernel for,
            found without its device.
    """

    name: str
    prepare: Callable[[Manifest, BuilderOptions], Builder | None]
    may_be_elsewhere: bool = False
    graph: OwnGraph | None = None
    missing_kernels: Callable[[Path], Sequence[object]] = lambda graph: ()
