"""TensorRT plug-in that holds and launches our Triton kernels: one class for all of them.

Its two fields, which plans keep, say what it computes: a description and the compiled code, as in
:mod:`wanx.bundle.plugin_kernel`. The classes are made for a module, ``tensorrt`` or
``tensorrt_rtx``, whose interfaces are the same.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cache
from typing import Any

import numpy as np

from wanx.bundle.plugin_kernel import PluginKernel, read_plugin_kernel
from wanx.config.number_formats import KERNEL_TENSORS
from wanx.errors import CorruptInputError, WanxError
from wanx.runtime.sessions.tensorrt.launch import Launcher

PLUGIN, VERSION, NAMESPACE = "WanxTriton", "1", ""
DESCRIPTION, CODE = "description", "code"


@cache
def register(trt: Any) -> Any:
    """Register the plug-in with ``trt``; do so before parsing or loading anything that has it.

    Returns:
        The creator. Its ``problem`` says in one line why a plug-in could not be made or run, where
        TensorRT itself only says that one failed; set it to None before what may fail.

    Raises:
        WanxError: TensorRT refuses it.
    """
    creator = _creator(trt)
    if not trt.get_plugin_registry().register_creator(creator, NAMESPACE):
        raise WanxError(f"TensorRT {trt.__version__} does not register the plug-in {PLUGIN}")
    return creator


def _creator(trt: Any) -> Any:
    plugin = _plugin_class(trt)

    class Creator(trt.IPluginCreatorV3One):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.IPluginCreatorV3One.__init__(self)
            self.name, self.plugin_version, self.plugin_namespace = PLUGIN, VERSION, NAMESPACE
            empty = np.array([])
            self.field_names = trt.PluginFieldCollection(
                [
                    trt.PluginField(DESCRIPTION, empty, trt.PluginFieldType.CHAR),
                    trt.PluginField(CODE, empty, trt.PluginFieldType.INT8),
                ]
            )
            self.problem: str | None = None

        def create_plugin(self, name: str, fields: Any, phase: Any) -> Any:
            """Make a plug-in from a graph or a plan."""
            with suppress(WanxError), self.noted():
                return plugin(_read(fields), self)
            return None  # which TensorRT reports as a failure

        @contextmanager
        def noted(self) -> Iterator[None]:
            """Keep what is raised: TensorRT tells nobody."""
            try:
                yield
            except WanxError as error:
                self.problem = str(error)
                raise

    return Creator()


def _read(fields: Any) -> PluginKernel:
    content = {field.name: bytes(np.asarray(field.data).data) for field in fields}
    missing = {DESCRIPTION, CODE} - content.keys()
    if missing:
        raise CorruptInputError(
            f"a plug-in {PLUGIN} has no {min(missing)}: it is not made by wanx; build the engine "
            "again"
        )
    return read_plugin_kernel(content[DESCRIPTION].rstrip(b"\0"), content[CODE])


def _plugin_class(trt: Any) -> Any:
    types = {row.name: getattr(trt.DataType, row.tensorrt) for row in KERNEL_TENSORS}

    bases = (trt.IPluginV3, trt.IPluginV3OneCore, trt.IPluginV3OneBuild, trt.IPluginV3OneRuntime)

    class Plugin(*bases):  # type: ignore[misc]
        def __init__(self, kernel: PluginKernel, creator: Any) -> None:
            for base in bases:
                base.__init__(self)
            self.plugin_name, self.plugin_version = PLUGIN, VERSION
            self.plugin_namespace = NAMESPACE
            self.num_outputs = len(kernel.description.outputs)
            self._kernel, self._creator = kernel, creator
            self._launcher = Launcher(kernel)
            # TensorRT reads the fields after they were asked for.
            self._fields = [np.frombuffer(part, np.int8) for part in kernel.fields()]

        def get_capability_interface(self, kind: Any) -> Any:
            return self

        def clone(self) -> Any:
            return Plugin(self._kernel, self._creator)

        def get_fields_to_serialize(self) -> Any:
            description, code = self._fields
            return trt.PluginFieldCollection(
                [
                    trt.PluginField(DESCRIPTION, description, trt.PluginFieldType.CHAR),
                    trt.PluginField(CODE, code, trt.PluginFieldType.INT8),
                ]
            )

        def get_output_data_types(self, inputs: Sequence[Any]) -> list[Any]:
            return [types[value.dtype] for value in self._kernel.description.outputs]

        def get_output_shapes(
            self, inputs: Sequence[Any], shape_inputs: Sequence[Any], builder: Any
        ) -> list[Any]:
            description = self._kernel.description
            shapes = []
            for value in description.outputs:
                shape = trt.DimsExprs(len(value.shape))
                for axis_index, size in enumerate(value.shape):
                    if isinstance(size, int):
                        shape[axis_index] = builder.constant(size)
                    else:
                        index, axis = description.axes[size]
                        shape[axis_index] = inputs[index][axis]
                shapes.append(shape)
            return shapes

        def supports_format_combination(
            self, position: int, tensors: Sequence[Any], num_inputs: int
        ) -> bool:
            description = self._kernel.description
            expected = (*description.inputs, *description.outputs)
            actual = tensors[position].desc
            return (
                len(tensors) == len(expected)
                and actual.type == types[expected[position].dtype]
                and actual.format == trt.TensorFormat.LINEAR
            )

        def configure_plugin(self, inputs: Sequence[Any], outputs: Sequence[Any]) -> None:
            pass

        def set_tactic(self, tactic: int) -> None:
            pass

        def attach_to_context(self, context: Any) -> Any:
            attached = self.clone()
            with self._creator.noted():
                attached._launcher.load()
            return attached

        def on_shape_change(self, inputs: Sequence[Any], outputs: Sequence[Any]) -> None:
            with self._creator.noted():
                self._launcher.set_shapes([tuple(value.dims) for value in inputs])

        def enqueue(
            self,
            input_desc: Sequence[Any],
            output_desc: Sequence[Any],
            inputs: Sequence[int],
            outputs: Sequence[int],
            workspace: int,
            stream: int,
        ) -> None:
            with self._creator.noted():
                self._launcher.launch((*inputs, *outputs), stream)

    return Plugin
