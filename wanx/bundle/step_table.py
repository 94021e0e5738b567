"""File of a bundle that says what skipping steps costs; see ``wanx build --calibrate-cache``."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from wanx.bundle.manifest import Manifest
from wanx.bundle.record import printable
from wanx.errors import CorruptInputError

STEP_TABLE = "golden/step_table.safetensors"
_MOST_STEPS = 1000
_RANKS = {"sigmas": 1, "noise": 3, "velocity": 2, "growth": 1}

Arrays = dict[str, NDArray[np.float64]]


def weights_digest(manifest: Manifest) -> str:
    """SHA-256 that names the weights of the denoiser, in hex."""
    paths = sorted(manifest.components["dit"].weights)
    text = "".join(f"{path} {manifest.files[path].sha256}\n" for path in paths)
    return hashlib.sha256(text.encode()).hexdigest()


def write_step_table(path: Path, arrays: Arrays, samples: int, digest: str) -> None:
    """Write a table: the float64 arrays ``sigmas``, ``noise``, ``velocity``, ``growth``.

    Args:
        path: of the file; its folder is made.
        arrays: of :class:`wanx.runtime.sampling.cache.table.StepTable`.
        samples: trajectories that were measured.
        digest: of the weights that were measured.
    """
    path.parent.mkdir(exist_ok=True)
    metadata = {"samples": str(samples), "weights": digest}
    data = save({name: np.ascontiguousarray(a) for name, a in arrays.items()}, metadata)
    temporary = path.with_name(f".{path.name}.partial")
    temporary.write_bytes(data)
    os.replace(temporary, path)  # a run may be reading the one before


def read_step_table(path: Path, digest: str) -> tuple[Arrays, int]:
    """Read the arrays of a table and its number of samples.

    Args:
        path: of the file.
        digest: of the weights that it must be of.

    Raises:
        CorruptInputError: the file is not such a table, or of other weights.
    """
    try:
        with safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
            arrays = {name: _read(file, name, rank) for name, rank in _RANKS.items()}
        samples = int(metadata["samples"])
        count = len(arrays["sigmas"])
        shapes = {"noise": (3, count, count), "velocity": (3, count), "growth": (count,)}
        fits = all(arrays[name].shape == shape for name, shape in shapes.items())
        if not (
            fits
            and np.all(arrays["growth"] > 0)
            and 2 <= count <= _MOST_STEPS
            and np.all(np.diff(arrays["sigmas"]) < 0)
        ):
            raise ValueError("its arrays do not fit together")
        if not 0 < arrays["sigmas"][-1] < arrays["sigmas"][0] <= 1:
            raise ValueError("its noise levels are not between 0 and 1")
    except (SafetensorError, KeyError, ValueError, OSError) as error:
        raise CorruptInputError(
            f"{path} is no table of a step cache ({printable(error)[:240]}); measure it again with "
            "`wanx build --calibrate-cache`"
        ) from None
    if metadata.get("weights") != digest:
        raise CorruptInputError(
            f"{path} was measured on the weights of another bundle; measure these with "
            "`wanx build --calibrate-cache`"
        )
    return arrays, samples


def _read(file: Any, name: str, rank: int) -> NDArray[np.float64]:
    stored = file.get_slice(name)
    shape = stored.get_shape()
    if stored.get_dtype() != "F64" or len(shape) != rank or max(shape) > _MOST_STEPS:
        raise ValueError(f"{name} is {stored.get_dtype()} {shape}")
    array: NDArray[np.float64] = file.get_tensor(name)
    if not np.isfinite(array).all():
        raise ValueError(f"{name} has a number that is not finite")
    return array
