"""Profile of a graph on ONNX Runtime: which operators ran as products."""

from __future__ import annotations

import json
import tempfile
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from wanx.exporter.components import ComponentSpec

# Products, by what multiplies: whatever else a forward runs says nothing about its precision.
PRODUCTS = (
    *("MatMul", "FusedMatMul", "Gemm", "FusedGemm", "MultiHeadAttention", "Attention"),
    *("MatMulInteger", "MatMulIntegerToFloat", "DynamicQuantizeMatMul", "QLinearMatMul", "QGemm"),
    "MatMulNBits",
)


def profile_products(spec: ComponentSpec, graph: Path, root: Path) -> dict[str, int]:
    """Run a graph once on zeros, and count the products that it ran by operator.

    Weights stay mapped files: nothing is packed or folded, so that a 14B needs no memory of its
    own.

    Args:
        spec: names inputs and sizes; the smallest sizes are used.
        graph: the ONNX file.
        root: the folder that its locations of weights are relative to.
    """
    import onnxruntime

    from wanx.runtime.sessions.onnxruntime.loading import session_options

    axes = dict.fromkeys(spec.axes, 16)
    feeds = {item.name: item.example(axes).numpy() for item in (*spec.inputs, *spec.caches)}
    with tempfile.TemporaryDirectory() as folder:
        options = session_options(root)
        options.enable_profiling = True
        options.profile_file_prefix = str(Path(folder) / "profile")
        options.add_session_config_entry("session.disable_prepacking", "1")
        session = onnxruntime.InferenceSession(
            graph.read_bytes(),
            options,
            providers=["CPUExecutionProvider"],
            disabled_optimizers=["ConstantFolding"],
        )
        session.run(None, feeds)
        return _products(json.loads(Path(session.end_profiling()).read_bytes()))


def _products(events: list[Mapping[str, Any]]) -> dict[str, int]:
    names = (
        event["args"]["op_name"]
        for event in events
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time")
    )
    return dict(sorted(Counter(name for name in names if name in PRODUCTS).items()))
