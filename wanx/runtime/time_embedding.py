"""Embedding of timesteps by the weights of a bundle, without its graph."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from wanx.bundle.reader import Bundle
from wanx.errors import CorruptInputError
from wanx.files.floats import NUMPY, convert
from wanx.files.safetensors import TensorRef, read_header

Float32 = NDArray[np.float32]


def embed_timesteps(bundle: Bundle, timesteps: Sequence[float]) -> Float32:
    """Time embedding ``[steps, dim]`` in fp32: sinusoids, linear, SiLU, linear.

    As :class:`wanx.models.dit.embeddings.TimeEmbedding`, to the rounding of fp32.

    Raises:
        CorruptInputError: the weights of the denoiser lack it.
    """
    half = bundle.manifest.config.dit.freq_dim // 2
    frequencies = np.power(10000.0, -np.arange(half) / half)
    angles = np.array(timesteps, np.float64)[:, None] * frequencies
    x = np.concatenate([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)
    weights = _weights(bundle)
    hidden = x @ weights["0.weight"].T + weights["0.bias"]
    hidden = hidden / (1 + np.exp(-hidden))
    return np.asarray(hidden @ weights["2.weight"].T + weights["2.bias"], np.float32)


def _weights(bundle: Bundle) -> dict[str, Float32]:
    prefix, found = "time_embedding.", {}
    for path in bundle.manifest.components["dit"].weights:
        for name, tensor in read_header(bundle.held(path)).entries.items():
            if name.startswith(prefix):
                found[name.removeprefix(prefix)] = _read(tensor)
    names = {f"{layer}.{kind}" for layer in "02" for kind in ("weight", "bias")}
    if missing := names - found.keys():
        raise CorruptInputError(
            f"the weights of {bundle.root} lack {prefix}{min(missing)}; export it again"
        )
    return found


def _read(tensor: TensorRef) -> Float32:
    with tensor.file.open("rb") as file:
        file.seek(tensor.offset)
        stored = np.frombuffer(file.read(tensor.nbytes), NUMPY[tensor.dtype])
    return np.array(convert(stored, tensor.dtype, "F32"), np.float32).reshape(tensor.shape)
