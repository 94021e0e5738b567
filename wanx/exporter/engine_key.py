"""What engines depend on, as a name."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping

import torch

from wanx.exporter.components import ComponentSpec
from wanx.exporter.partition.partition import partition
from wanx.kernels.launch_config import TABLE


def engine_key(
    specs: Mapping[str, tuple[ComponentSpec, torch.dtype]],
    kind: str,
    device: str,
    version: str,
    compiler: str,
) -> str:
    """A name for the engines of some components.

    Another compiler, device, network or choice of kernels has another name. Weights are not part of
    it, since engines hold none.

    Args:
        specs: by name, each with the type that it computes in.
        kind: of the target.
        device: that they are for.
        version: of wanx.
        compiler: and its version.
    """
    facts = {
        name: [
            [repr(step) for step in parts.steps],
            [repr(segment.structure) for segment in parts.segments.values()],
        ]
        for name, (spec, dtype) in specs.items()
        for parts in [partition(spec, dtype)]
    }
    tuned = TABLE.read_text(encoding="utf-8")
    text = json.dumps([version, compiler, tuned, facts], sort_keys=True)
    return f"{kind}-{device}-{hashlib.sha256(text.encode()).hexdigest()[:12]}"
