"""Options of builds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from wanx.config.bounds import MAX_WORKSPACE, require_between
from wanx.errors import UsageError
from wanx.memory_size import parse_memory

_LEVELS = range(6)


@dataclass(frozen=True, kw_only=True)
class BuilderOptions:
    """Options of a build; ``wanx.build`` takes them as keywords.

    Attributes:
        plugins: ``auto``, ``none``, or kernels of ours with commas between them; see
            :func:`wanx.exporter.targets.tensorrt.gpus.parse_plugins`.
        sizes: width and height in pixels of the videos that engines cover, the usual one first;
            without any, all of Wan2.1.
        frames: most frames that they cover; None is the model's own number.
        workspace: most bytes that a kernel may work in; None leaves it to TensorRT.
        opt_level: 0 to 5; higher levels try more kernels and take longer. None leaves it to
            TensorRT.
        graph_cache: take graphs that were traced before, and keep new ones.

    Raises:
        UsageError: the workspace or the level is out of range.
    """

    plugins: str = "auto"
    sizes: Sequence[tuple[int, int]] = ()
    frames: int | None = None
    workspace: int | None = None
    opt_level: int | None = None
    graph_cache: bool = True

    def __post_init__(self) -> None:
        require_between("--workspace in bytes", self.workspace, 1, MAX_WORKSPACE)
        if self.opt_level is not None and self.opt_level not in _LEVELS:
            raise UsageError(
                f"--opt-level {self.opt_level} is not a level; choose 0 to {_LEVELS[-1]}"
            )

    @property
    def builder_key(self) -> str:
        """Workspace and level as words, for the name of engines; empty by default."""
        words = [f"workspace {self.workspace}"] if self.workspace is not None else []
        return " ".join(words + ([f"level {self.opt_level}"] if self.opt_level is not None else []))


DEFAULT_OPTIONS = BuilderOptions()


def parse_workspace(text: str | None) -> int | None:
    """Parse a size such as ``4G``, ``512M`` or ``2048`` (MiB, as in trtexec) to bytes.

    Raises:
        UsageError: it is no size.
    """
    if text is None:
        return None
    size = parse_memory(text, default_unit="M")
    if not size:
        raise UsageError(f"--workspace {text} is not a size; give one such as 4G or 512M")
    return size
