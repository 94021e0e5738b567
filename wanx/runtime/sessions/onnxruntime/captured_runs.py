"""Runs of a repeated shape as CUDA graphs, which replay in buffers that stay where they are."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Mapping
from typing import TYPE_CHECKING

from wanx.runtime.sessions.base import Array
from wanx.runtime.sessions.engine_session import MAX_CACHED_SHAPES, RUNS_BEFORE_CAPTURE

if TYPE_CHECKING:
    import onnxruntime

CAPTURE_ID = "gpu_graph_id"  # of ONNX Runtime's run options
NO_CAPTURE = "-1"
REFUSED_CAPTURE = "cannot use the graph capture feature"  # what ONNX Runtime raises on loading
Shapes = tuple[tuple[str, tuple[int, ...], str], ...]


class CapturedRuns:
    """CUDA graphs of a session's runs, by the shapes of what is fed; the oldest make room."""

    def __init__(self, session: onnxruntime.InferenceSession, device: str) -> None:
        """Capture runs of ``session`` on ``device``, as IO binding calls it."""
        self._session, self._device = session, device
        self._seen: Counter[Shapes] = Counter()
        self._buffers: dict[Shapes, FixedBuffers] = {}
        self._ids = itertools.count(1)

    @property
    def ids(self) -> list[int]:
        """Numbers of the graphs that are there."""
        return [buffers.capture_id for buffers in self._buffers.values()]

    def replay(self, feeds: Mapping[str, Array]) -> dict[str, Array] | None:
        """Run as a graph; None where these shapes have none yet."""
        buffers = self._buffers.get(_shapes(feeds))
        return None if buffers is None else buffers.run(feeds)

    def note(
        self,
        feeds: Mapping[str, Array],
        outputs: Mapping[str, Array],
        bound: Mapping[str, onnxruntime.OrtValue],
    ) -> None:
        """Count a run; what repeats gets buffers, and its next run becomes a graph.

        Args:
            feeds: of the run.
            outputs: of the run.
            bound: inputs that stay, where they lie.
        """
        shapes = _shapes(feeds)
        self._seen[shapes] += 1
        if self._seen[shapes] < RUNS_BEFORE_CAPTURE:
            return
        if len(self._buffers) == MAX_CACHED_SHAPES:
            self._release(next(iter(self._buffers)))
        self._buffers[shapes] = FixedBuffers(
            self._session, self._device, bound, feeds, outputs, next(self._ids)
        )

    def forget(self) -> None:
        """Free all graphs, as where what they read lies elsewhere now."""
        for shapes in list(self._buffers):
            self._release(shapes)

    def _release(self, shapes: Shapes) -> None:
        capture_id = self._buffers.pop(shapes).capture_id
        del self._seen[shapes]
        # Older versions keep the graph as long as the session.
        if hasattr(self._session, "release_captured_graph"):
            self._session.release_captured_graph(capture_id)


def _shapes(feeds: Mapping[str, Array]) -> Shapes:
    return tuple((name, array.shape, array.dtype.str) for name, array in feeds.items())


class FixedBuffers:
    """Inputs and outputs of the runs of one shape, on the device.

    ONNX Runtime captures the first run with a ``capture_id`` and replays it in the later ones.
    """

    def __init__(
        self,
        session: onnxruntime.InferenceSession,
        device: str,
        bound: Mapping[str, onnxruntime.OrtValue],
        feeds: Mapping[str, Array],
        outputs: Mapping[str, Array],
        capture_id: int,
    ) -> None:
        """Allocate the buffers.

        Args:
            session: that runs.
            device: as IO binding calls it.
            bound: inputs that stay, where they lie.
            feeds: an input of this shape for each of the others.
            outputs: of an earlier run of this shape.
            capture_id: of the captured graph, which no other shape of the session has.
        """
        import onnxruntime

        self._session, self.capture_id = session, capture_id
        self._inputs = {
            name: onnxruntime.OrtValue.ortvalue_from_numpy(array.copy(), device, 0)
            for name, array in feeds.items()
        }
        self._outputs = {
            name: onnxruntime.OrtValue.ortvalue_from_shape_and_type(
                array.shape, array.dtype, device, 0
            )
            for name, array in outputs.items()
        }
        self._binding = session.io_binding()
        for name, value in (dict(bound) | self._inputs).items():
            self._binding.bind_ortvalue_input(name, value)
        for name, value in self._outputs.items():
            self._binding.bind_ortvalue_output(name, value)
        self._options = run_options(capture_id)

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """Run on feeds of this shape."""
        for name, value in self._inputs.items():
            value.update_inplace(feeds[name])
        self._session.run_with_iobinding(self._binding, self._options)
        # On the processor ``numpy`` is a view of the buffer, which the next run overwrites.
        return {name: value.numpy().copy() for name, value in self._outputs.items()}


def run_options(capture_id: int | None) -> onnxruntime.RunOptions:
    """Options of a run that is captured under an id, or not at all."""
    import onnxruntime

    options = onnxruntime.RunOptions()
    options.add_run_config_entry(CAPTURE_ID, NO_CAPTURE if capture_id is None else str(capture_id))
    return options
