"""Buffers at fixed addresses for the runs of one shape, which a CUDA graph of them needs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from wanx.runtime.sessions.base import Array

if TYPE_CHECKING:
    import onnxruntime

CAPTURE_ID = "gpu_graph_id"  # of ONNX Runtime's run options
NO_CAPTURE = "-1"
REFUSED_CAPTURE = "cannot use the graph capture feature"  # what ONNX Runtime raises on loading


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

        self._session = session
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
