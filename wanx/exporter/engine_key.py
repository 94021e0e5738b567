"""Cache key of engines: network structure, compiler, device, tuning table."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping

from wanx.exporter.partition.segments import Partition
from wanx.kernels.launch_config import TABLE


def engine_key(
    partitions: Mapping[str, Partition],
    target: str,
    device: str,
    version: str,
    compiler: str,
) -> str:
    """Name the engines of some components.

    Another compiler, device, network or choice of kernels has another name. Weights are not part of
    it, since engines hold none.

    Args:
        partitions: segments of each component.
        target: without GPUs.
        device: that they are for.
        version: of wanx.
        compiler: its name, version and options.
    """
    facts = {
        name: [
            [repr(step) for step in parts.steps],
            [repr(segment.structure) for segment in parts.segments.values()],
        ]
        for name, parts in partitions.items()
    }
    tuned = TABLE.read_text(encoding="utf-8")
    text = json.dumps([version, compiler, tuned, facts], sort_keys=True)
    return f"{target}-{device}-{hashlib.sha256(text.encode()).hexdigest()[:12]}"
