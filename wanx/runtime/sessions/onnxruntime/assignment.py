"""Assignment of a session's nodes to providers."""

from __future__ import annotations

import logging
import os
from collections import Counter
from typing import TYPE_CHECKING

from wanx.errors import WanxError

if TYPE_CHECKING:
    import onnxruntime

RECORD = "session.record_ep_graph_assignment_info"
_CPU = "CPUExecutionProvider"

_log = logging.getLogger("wanx.runtime")


def nodes_left(session: onnxruntime.InferenceSession) -> tuple[Counter[str], int]:
    """Count the nodes that a session runs on the processor's own provider, by operator.

    Args:
        session: made with the option ``RECORD``.

    Returns:
        The counts, and the number of all nodes.
    """
    left: Counter[str] = Counter()
    total = 0
    for subgraph in session.get_provider_graph_assignment_info():
        nodes = [node.op_type for node in subgraph.get_nodes()]
        total += len(nodes)
        if subgraph.ep_name == _CPU:
            left.update(nodes)
    return left, total


def report_nodes_left(
    session: onnxruntime.InferenceSession, component: str, provider: str, advice: str
) -> None:
    """Say which nodes a provider left on the processor.

    Args:
        session: made with the option ``RECORD``.
        component: that it runs.
        provider: that it was made for.
        advice: what to do about it; may be empty.

    Raises:
        WanxError: there are any, and ``WANX_STRICT=1``.
    """
    left, total = nodes_left(session)
    if not left:
        return
    kinds = ", ".join(f"{count} {name}" for name, count in left.most_common(6))
    more = f" and {len(left) - 6} more" if len(left) > 6 else ""
    line = (
        f"{provider} leaves {left.total()} of {total} nodes of {component} on the processor: "
        f"{kinds}{more}"
    )
    if os.environ.get("WANX_STRICT") == "1":
        raise WanxError(f"{line}; {advice or 'leave WANX_STRICT=1 out to allow it'}")
    _log.info("%s%s", line, f"; {advice}" if advice else "")
