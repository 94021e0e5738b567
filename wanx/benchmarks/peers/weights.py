"""The weights of a bundle as plain floats."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack

import torch
from safetensors import safe_open
from torch import Tensor

from wanx.bundle.reader import Bundle
from wanx.config.number_formats import QUANTIZED
from wanx.exporter.quantization.recipe import smoothing_of

_EIGHT_BIT = tuple(getattr(torch, row.torch) for row in QUANTIZED)


def plain_weights(bundle: Bundle, component: str) -> Iterator[tuple[str, Tensor]]:
    """Read the weights of a component, one at a time.

    Eight-bit weights are multiplied by their scales, and divided by what their inputs would have
    been divided by, so that a plain linear layer computes what the quantised one approximates.

    Args:
        bundle: an opened bundle.
        component: such as ``dit``.

    Yields:
        Original name and float32 tensor of each parameter.
    """
    files = [bundle.held(name) for name in bundle.manifest.components[component].weights]
    with ExitStack() as stack:
        opened = [stack.enter_context(safe_open(file, "pt")) for file in files]
        holder = {name: file for file in opened for name in file.keys()}  # noqa: SIM118 - no mapping
        for name, file in holder.items():
            layer, _, leaf = name.rpartition(".")
            if leaf in ("weight_scale", "input_scale", "q_scale", "k_scale", "v_scale"):
                continue
            if smoothing_of(layer) is None and leaf.endswith("_smooth"):
                continue
            tensor = file.get_tensor(name)
            if tensor.dtype in _EIGHT_BIT:
                scale = holder[f"{layer}.weight_scale"].get_tensor(f"{layer}.weight_scale")
                tensor = tensor.float() * scale.float().reshape(-1, 1)
                vector = smoothing_of(layer)
                if vector is not None and vector in holder:
                    tensor = tensor / holder[vector].get_tensor(vector).float()
            yield name, tensor.float()
