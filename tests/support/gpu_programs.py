"""Traces one block of a denoiser for GPUs that are not there, and prints what its programs run.

A process of its own, because that of the tests interprets its Triton kernels. Under ``WANX_STRICT``
no op may fall back to its reference.
"""

from __future__ import annotations

import json
import logging
import os
import warnings
from collections import Counter
from dataclasses import replace

import torch
from torch._higher_order_ops.triton_kernel_wrap import kernel_side_table

from wanx.config.models import PRESETS
from wanx.exporter.components import ComponentSpec, dit_spec
from wanx.exporter.partition.partition import partition
from wanx.exporter.partition.stateless import export_segment
from wanx.exporter.quantization.quantized_spec import quantized_spec
from wanx.exporter.quantization.recipe import Recipe, dit_candidates
from wanx.exporter.quantization.scheme import SCHEMES, QuantizeOptions

SMS = (80, 90, 120)
CONFIG = replace(PRESETS["t2v-1.3B"].dit, num_layers=1)
IMAGES = replace(PRESETS["i2v-14B"].dit, num_layers=1)


def quantised(scheme: str, **asked: str) -> ComponentSpec:
    options = QuantizeOptions(**asked)  # type: ignore[arg-type]
    names, _ = dit_candidates(CONFIG, options)
    static = options.activation_scale == "static"
    attention = {}
    if options.attention == "fp8":
        attention = {"blocks.0.self_attn.attend": (1.0, 1.0, 1.0)}
    recipe = Recipe(
        scheme=SCHEMES[scheme], options=options, attention=attention,
        layers=dict.fromkeys(names, 0.1 if static else None),
    )  # fmt: skip
    return quantized_spec(dit_spec(CONFIG), recipe)


CASES: dict[str, ComponentSpec] = {
    "bf16": dit_spec(CONFIG),
    "int8": quantised("int8"),
    "fp8": quantised("fp8", attention="fp8"),
    "rows": quantised("fp8", activation_scale="dynamic"),
    "images": dit_spec(IMAGES),
}


def ran(spec: ComponentSpec, sm: int) -> Counter[str]:
    """Kernels and products of one block."""
    parts = partition(spec, torch.bfloat16)
    program = export_segment(parts.segments["block"], parts.axes, torch.device("cuda"))
    lowered = program.run_decompositions({}, decompose_custom_triton_ops=True)
    # Batch and length stay free whatever the kernels looked at.
    free = [axis for axis in lowered.range_constraints.values() if axis.lower <= 2 < axis.upper]
    names = Counter(free_axes=len(free))
    for node in lowered.graph.nodes:
        if "triton" in str(node.target):
            kernel = kernel_side_table.get_kernel(node.kwargs["kernel_idx"])
            names[kernel.fn.__name__] += 1
        elif node.op == "call_function":
            names[str(node.target).removeprefix("aten.").removesuffix(".default")] += 1
    return names


def main() -> None:
    os.environ["WANX_STRICT"] = "1"
    warnings.simplefilter("ignore")
    # Without a driver Triton cannot say which arguments a kernel writes: PyTorch takes all.
    logging.disable(logging.WARNING)
    found: dict[str, dict[str, int] | str] = {}
    for sm in SMS:
        torch.cuda.get_device_capability = lambda *_, sm=sm: divmod(sm, 10)  # type: ignore[assignment]
        for name, spec in CASES.items():
            try:
                found[f"{name} {sm}"] = ran(spec, sm)
            except Exception as error:
                found[f"{name} {sm}"] = " ".join(str(error).split())
    print(json.dumps(found))


if __name__ == "__main__":
    main()
