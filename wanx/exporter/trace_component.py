"""Trace of a component as its recipe has it; what a graph that is not in the cache takes."""

from __future__ import annotations

import onnx
import onnx_ir as ir
import torch

from wanx.config.models import ModelConfig
from wanx.errors import WanxError
from wanx.exporter.components import ComponentSpec, component_specs
from wanx.exporter.graph.liveness import ACTIVATION_BYTES, activation_bytes
from wanx.exporter.graph.stored_graph import graph_to_bytes
from wanx.exporter.graph.trace import trace
from wanx.exporter.quantization.quantized_spec import quantized_spec
from wanx.exporter.quantization.recipe import Recipe


def component_spec(component: str, config: ModelConfig) -> ComponentSpec:
    """Describe one component of a model."""
    return next(spec for spec in component_specs(config) if spec.name == component)


def trace_component(
    component: str,
    config: ModelConfig,
    recipe: Recipe | None,
    dtype: torch.dtype = torch.float32,
) -> ir.Model:
    """Trace a component without its weights.

    Args:
        component: such as ``dit``.
        config: of the model.
        recipe: which layers have 8 bits; None is the network as it is.
        dtype: that the weights have in the graph, and the products around them.

    Raises:
        WanxError: memory ran out, or the exporter failed.
    """
    spec = component_spec(component, config)
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(dtype)
        model = trace(spec if recipe is None else quantized_spec(spec, recipe))
        law = activation_bytes(onnx.ModelProto.FromString(graph_to_bytes(model)), [*spec.axes])
        model.metadata_props[ACTIVATION_BYTES] = law.model_dump_json()
        return model
    except Exception as error:
        if _is_out_of_memory(error):
            raise WanxError(
                f"not enough memory to trace {component}; "
                "`wanx export --dry-run` says how much it takes"
            ) from error
        raise WanxError(
            f"cannot trace {component} ({type(error).__name__}); if there is memory left, report "
            "what WANX_DEBUG=1 shows"
        ) from error
    finally:
        torch.set_default_dtype(before)


def _is_out_of_memory(error: BaseException | None) -> bool:
    """True if memory ran out at the bottom of an error, which the exporter wraps in its own."""
    while error is not None:
        if isinstance(error, MemoryError) or "can't allocate memory" in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False
