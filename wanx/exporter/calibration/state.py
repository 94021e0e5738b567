"""State of a calibration, saved after each step so that an interrupted one goes on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from torch import Tensor

from wanx.bundle.golden_steps import Golden, golden_from_tensors, golden_tensors
from wanx.bundle.reader import Bundle
from wanx.checkpoints.checkpoint import Checkpoint
from wanx.errors import WanxError
from wanx.exporter.calibration.observers import Observers
from wanx.exporter.calibration.tensor_cache import load_tensors, save_tensors
from wanx.files.cache import cache_path
from wanx.runtime.inputs.reading import Inputs
from wanx.runtime.options import ResolvedRun
from wanx.version import __version__

Float32 = NDArray[np.float32]


@dataclass
class Calibration:
    """Observations, velocities and recorded steps of the runs so far.

    Attributes:
        observers: the inputs of the linears.
        history: per trajectory and step, the guided velocity ``[C, T, h, w]``.
        golden: recorded steps of the first trajectory.
        path: where it is saved; None where it is not.
    """

    observers: Observers = field(default_factory=Observers)
    history: list[list[Float32]] = field(default_factory=list)
    golden: Golden | None = None
    path: Path | None = None

    def save(self) -> None:
        """Write everything to ``path`` in one step, so that a kill leaves it whole.

        Where the folder cannot be written, nothing is kept and nothing fails.
        """
        if self.path is None:
            return
        tensors = {f"observed.{name}": t for name, t in self.observers.state().items()}
        for trajectory, velocities in enumerate(self.history):
            for step, velocity in enumerate(velocities):
                tensors[f"velocity.{trajectory}.{step}"] = torch.from_numpy(velocity).contiguous()
        run: dict[str, str] = {}
        if self.golden is not None:
            run = self.golden.run
            for name, value in golden_tensors(self.golden).items():
                tensors[f"golden.{name}"] = torch.from_numpy(value)
        save_tensors(tensors, run, self.path)

    @classmethod
    def load(cls, path: Path | None, trajectories: int) -> Calibration:
        """Read a saved state; a damaged or missing one is as good as none."""
        new = cls(history=[[] for _ in range(trajectories)], path=path)
        if path is None:
            return new
        try:
            tensors, run = load_tensors(path)
            observed = _with_prefix(tensors, "observed")
            velocities = _with_prefix(tensors, "velocity")
            golden = {
                name: value.numpy() for name, value in _with_prefix(tensors, "golden").items()
            }
            steps = len(velocities) // trajectories
            return cls(
                observers=Observers.from_state(observed),
                history=[
                    [velocities[f"{i}.{step}"].numpy() for step in range(steps)]
                    for i in range(trajectories)
                ],
                golden=golden_from_tensors(golden, run) if golden else None,
                path=path,
            )
        except (SafetensorError, KeyError, ValueError, OSError, WanxError):
            return new


def _with_prefix(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {
        name.removeprefix(f"{prefix}."): value
        for name, value in tensors.items()
        if name.startswith(f"{prefix}.")
    }


def state_path(
    checkpoint: Checkpoint,
    bundle: Bundle,
    runs: Sequence[tuple[ResolvedRun, Inputs]],
    cache_key_parts: Iterable[object],
) -> Path | None:
    """Path in the user's cache folder for the calibration of these weights on these runs.

    Args:
        checkpoint: its denoiser's files count by name, size and time of change.
        bundle: the weights of its other components count by their hashes.
        runs: what is run; images count by their pixels, videos as files do.
        cache_key_parts: further values that the observations depend on.

    Returns:
        None where there is no cache folder.
    """
    manifest = bundle.manifest
    others = {n: c.weights for n, c in manifest.components.items() if n != "dit"}
    facts = {
        "wanx": __version__,
        "weights": [_identity(file) for file in checkpoint.components["dit"].files],
        "others": {n: [manifest.files[w].sha256 for w in files] for n, files in others.items()},
        "runs": [[asdict(run), *_input_identities(inputs)] for run, inputs in runs],
        "loras": [[lora.sha256, lora.strength] for lora in checkpoint.loras],
        "asked": [str(item) for item in cache_key_parts],
    }
    key = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
    return cache_path("calibration", f"{key[:32]}.safetensors")


def _input_identities(inputs: Inputs) -> Iterator[object]:
    for image in (inputs.image, inputs.last_image, *inputs.references):
        yield None if image is None else [image.shape, hashlib.sha256(image.tobytes()).hexdigest()]
    for video in (inputs.video, inputs.mask):
        yield None if video is None else _identity(video.path)


def _identity(file: Path) -> list[str | int]:
    status = file.stat()
    return [str(file.resolve()), status.st_size, status.st_mtime_ns, status.st_ino]
