"""What calibration has seen so far, and where it is kept so that an interrupted one goes on."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import platformdirs
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from wanx.bundle.golden_steps import Golden, golden_from_tensors, golden_tensors
from wanx.bundle.reader import Bundle
from wanx.checkpoints.checkpoint import Checkpoint
from wanx.errors import WanxError
from wanx.exporter.calibration.observers import Observers
from wanx.exporter.quantization.recipe import Recipe
from wanx.exporter.quantization.scheme import QuantizeOptions, Scheme
from wanx.runtime.inputs.reading import Inputs
from wanx.runtime.options import ResolvedRun
from wanx.version import __version__

Float32 = NDArray[np.float32]


@dataclass
class Calibration:
    """What was seen so far.

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
        _save(tensors, run, self.path)

    @classmethod
    def load(cls, path: Path | None, trajectories: int) -> Calibration:
        """Read a saved state; a damaged or missing one is as good as none."""
        new = cls(history=[[] for _ in range(trajectories)], path=path)
        if path is None:
            return new
        try:
            tensors, run = _load(path)
            observed = _part(tensors, "observed")
            velocities = _part(tensors, "velocity")
            golden = {name: value.numpy() for name, value in _part(tensors, "golden").items()}
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


def _save(tensors: dict[str, Tensor], facts: object, path: Path) -> None:
    text = json.dumps(facts)
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    with suppress(OSError, SafetensorError):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            digest = _digest(tensors, text)
            save_file(tensors, partial, metadata={"facts": text, "sha256": digest})
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)


def _load(path: Path) -> tuple[dict[str, Tensor], Any]:
    with safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        metadata = file.metadata() or {}
    # After a power failure, a file of the right size can hold zeros.
    if metadata["sha256"] != _digest(tensors, metadata["facts"]):
        raise ValueError(f"{path} is damaged")
    return tensors, json.loads(metadata["facts"])


def _digest(tensors: dict[str, Tensor], facts: str) -> str:
    digest = hashlib.sha256(facts.encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.numpy().tobytes())
    return digest.hexdigest()


def _part(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {
        name.removeprefix(f"{prefix}."): value
        for name, value in tensors.items()
        if name.startswith(f"{prefix}.")
    }


def state_path(
    checkpoint: Checkpoint,
    bundle: Bundle,
    runs: Sequence[tuple[ResolvedRun, Inputs]],
    asked: Iterable[object],
) -> Path | None:
    """Where the calibration of these weights on these runs is kept, in the user's cache folder.

    Args:
        checkpoint: its denoiser's files count by name, size and time of change.
        bundle: the weights of its other components count by their hashes.
        runs: what is run; images count by their pixels, videos as files do.
        asked: whatever else changes what is seen.

    Returns:
        None where there is no cache folder.
    """
    manifest = bundle.manifest
    others = {n: c.weights for n, c in manifest.components.items() if n != "dit"}
    facts = {
        "wanx": __version__,
        "weights": [_identity(file) for file in checkpoint.components["dit"].files],
        "others": {n: [manifest.files[w].sha256 for w in files] for n, files in others.items()},
        "runs": [[asdict(run), *_pictures(inputs)] for run, inputs in runs],
        "asked": [str(item) for item in asked],
    }
    key = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
    cache = platformdirs.user_cache_path("wanx", appauthor=False)
    # Without a home folder the path stays relative, "~/.cache": it would land in the cwd.
    return cache / "calibration" / f"{key[:32]}.safetensors" if cache.is_absolute() else None


def _pictures(inputs: Inputs) -> Iterator[object]:
    for image in (inputs.image, inputs.last_image, *inputs.references):
        yield None if image is None else [image.shape, hashlib.sha256(image.tobytes()).hexdigest()]
    for video in (inputs.video, inputs.mask):
        yield None if video is None else _identity(video.path)


def _identity(file: Path) -> list[str | int]:
    found = file.stat()
    return [str(file.resolve()), found.st_size, found.st_mtime_ns, found.st_ino]


def save_recipe(recipe: Recipe, path: Path) -> None:
    """Keep what measuring the layers has decided, beside the calibration that it came from."""
    facts = {
        "layers": dict(recipe.layers),
        "kept": dict(recipe.kept),
        "sqnr_db": dict(recipe.sqnr_db),
        "attention": dict(recipe.attention),
    }
    _save(dict(recipe.smooth) or {"empty": torch.zeros(1)}, facts, path)


def load_recipe(path: Path, scheme: Scheme, options: QuantizeOptions) -> Recipe | None:
    """Read what :func:`save_recipe` kept; None if it is missing or damaged."""
    try:
        smooth, facts = _load(path)
        return Recipe(
            scheme=scheme,
            options=options,
            layers=facts["layers"],
            kept=facts["kept"],
            sqnr_db=facts["sqnr_db"],
            smooth={name: value for name, value in smooth.items() if name != "empty"},
            attention={name: (q, k, v) for name, (q, k, v) in facts["attention"].items()},
        )
    except (SafetensorError, KeyError, ValueError, TypeError, AttributeError, OSError):
        return None
