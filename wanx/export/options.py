"""What the user asked of an export, and what that means for a given checkpoint."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from wanx.config import Task
from wanx.errors import UsageError
from wanx.models.checkpoint import Checkpoint

Precision = Literal["fp32", "bf16", "fp16"]
STORED_TYPES: dict[str, str] = {"fp32": "F32", "bf16": "BF16", "fp16": "F16"}
WIDTH = {"F32": 4, "BF16": 2, "F16": 2}
TARGETS = ("cpu",)


@dataclass(frozen=True, kw_only=True)
class ExportOptions:
    """Options of an export as the user gave them.

    Attributes:
        source: folder of a checkpoint or a bundle, or ``tiny`` for the built-in model.
        output: folder of the bundle; None names it after the model and the precision.
        precision: type that the DiT and the text encoder are stored in; ``auto`` keeps each as it
            is. The VAE and the image encoder always keep their types: next to the others they are
            small, and the reference runs the VAE in fp32.
        target: what runs the bundle.
        task: what the checkpoint must be for; None takes what it is.
        force: replace a bundle that is already there.
    """

    source: str | Path = "tiny"
    output: Path | None = None
    precision: str = "auto"
    target: str = "cpu"
    task: Task | None = None
    force: bool = False

    def __post_init__(self) -> None:
        """Refuse values that no export has.

        Raises:
            UsageError: an unknown precision or target.
        """
        known = ("auto", *get_args(Precision))
        if self.precision not in known:
            raise UsageError(
                f"--precision {self.precision} is not available; choose {', '.join(known)}"
            )
        if self.target not in TARGETS:
            raise UsageError(
                f"--target {self.target} is not available; choose {', '.join(TARGETS)}"
            )


@dataclass(frozen=True, kw_only=True)
class ResolvedExport:
    """An export of one checkpoint, with nothing left open.

    Attributes:
        checkpoint: where the weights come from.
        output: folder of the bundle.
        precision: the type that the DiT is stored in.
        storage: safetensors type per group of weights; None keeps each tensor's own.
    """

    checkpoint: Checkpoint
    output: Path
    precision: Precision
    storage: dict[str, str | None]

    def stored_type(self, group: str, dtype: str) -> str:
        """Type in which a tensor of type ``dtype`` of a group of weights is written."""
        return self.storage[group] or dtype

    def weight_bytes(self, group: str) -> int:
        """Size of a group of weights in the bundle."""
        return sum(
            tensor.nbytes // WIDTH[tensor.dtype] * WIDTH[self.stored_type(group, tensor.dtype)]
            for tensor in self.checkpoint.components[group].tensors.values()
        )


def resolve(options: ExportOptions, checkpoint: Checkpoint) -> ResolvedExport:
    """Decide what ``auto`` stands for."""
    if options.precision != "auto":
        stored: str | None = STORED_TYPES[options.precision]
        precision = options.precision
    else:
        stored = None
        sizes: dict[str, int] = {}
        for tensor in checkpoint.components["dit"].tensors.values():
            sizes[tensor.dtype] = sizes.get(tensor.dtype, 0) + tensor.nbytes
        most = max(sizes, key=lambda dtype: sizes[dtype])
        precision = next(name for name, dtype in STORED_TYPES.items() if dtype == most)
    return ResolvedExport(
        checkpoint=checkpoint,
        output=options.output or Path(f"{checkpoint.config.name}-{precision}"),
        precision=precision,  # type: ignore[arg-type]
        storage={"dit": stored, "text_encoder": stored, "vae": None, "image_encoder": None},
    )
