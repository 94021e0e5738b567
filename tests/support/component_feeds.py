"""Random inputs of any component, caches included."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from wanx.config.models import ModelConfig
from wanx.exporter.trace_component import component_spec

AXES = {"n": 13, "L": 24, "h": 6, "w": 4}


def component_feeds(
    component: str, config: ModelConfig, seed: int = 0, axes: Mapping[str, int] = AXES
) -> dict[str, NDArray[Any]]:
    """Name the inputs of a component; token ids are small, and rotations have length 1."""
    generator = np.random.default_rng(seed)
    spec = component_spec(component, config)
    feeds: dict[str, NDArray[Any]] = {}
    for item in (*spec.inputs, *spec.caches):
        shape = tuple(item.example(dict.fromkeys(spec.axes, 0) | dict(axes)).shape)
        if item.dtype == torch.int64:
            feeds[item.name] = generator.integers(3, 40, shape)
        else:
            feeds[item.name] = generator.standard_normal(shape, dtype=np.float32)
    if "rope_cos" in feeds:
        angles = feeds["rope_cos"].copy()
        feeds |= {"rope_cos": np.cos(angles), "rope_sin": np.sin(angles)}
    if "timestep" in feeds:
        feeds["timestep"] = np.array([500], np.float32)
    return feeds
