"""Copies of the built-in bundles with other weights: whole, and signed anew."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from wanx.builtin import builtin_bundle
from wanx.bundle.publish import record_files, write_manifest
from wanx.bundle.reader import Bundle, open_bundle, read_bundle

Change = Callable[[NDArray[np.float32]], NDArray[np.float32]]


def altered_bundle(
    folder: Path, weights: str, change: Change, *, prefix: str = "", model: str = "tiny"
) -> Bundle:
    """Copy a built-in bundle and change some of its float32 or bfloat16 tensors.

    Args:
        folder: of the copy.
        weights: such as ``dit``.
        change: from the values of a tensor, flat, to as many new ones.
        prefix: of the names of the tensors to change.
        model: the built-in bundle.
    """
    shutil.copytree(builtin_bundle(model), folder)
    path = folder / "weights" / f"{weights}.safetensors"
    data = bytearray(path.read_bytes())
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:start])
    changed = 0
    for name, tensor in header.items():
        if name == "__metadata__" or not name.startswith(prefix):
            continue
        begin, end = (start + offset for offset in tensor["data_offsets"])
        if tensor["dtype"] == "F32":
            values = np.frombuffer(bytes(data[begin:end]), np.float32)
            data[begin:end] = change(values).astype(np.float32).tobytes()
        else:
            assert tensor["dtype"] == "BF16"
            halves = np.frombuffer(bytes(data[begin:end]), np.uint16)
            values = (halves.astype(np.uint32) << 16).view(np.float32)
            bits = change(values).astype(np.float32).view(np.uint32)
            data[begin:end] = (bits >> 16).astype(np.uint16).tobytes()
        changed += 1
    assert changed
    path.write_bytes(data)
    manifest = read_bundle(folder).manifest
    write_manifest(folder, manifest.model_copy(update={"files": record_files(folder)}))
    return open_bundle(folder)


def noise(strength: float) -> Change:
    """Add Gaussian noise of a strength relative to each tensor's own."""
    generator = np.random.default_rng(0)

    def change(values: NDArray[np.float32]) -> NDArray[np.float32]:
        spread = np.sqrt(np.mean(values**2))
        return (values + strength * spread * generator.standard_normal(values.size)).astype(
            np.float32
        )

    return change
