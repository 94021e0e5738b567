"""The graphs of a component in the bundle, verified against the recipe."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import onnx_ir as ir

from wanx.bundle.manifest import ActivationBytes, Component
from wanx.errors import WanxError
from wanx.exporter.graph.attach import attach_weights
from wanx.exporter.graph.liveness import ACTIVATION_BYTES
from wanx.exporter.graph.reach import tile_border
from wanx.exporter.targets.onnxruntime.graph import ENGINE, INTEGER_PRODUCT, optimize_for_ort
from wanx.exporter.weights import WrittenWeights

if TYPE_CHECKING:
    from wanx.exporter.components import ComponentSpec
    from wanx.exporter.quantization.recipe import Recipe


def write_graphs(
    name: str, model: ir.Model, weights: WrittenWeights, folder: Path, spatial_stride: int
) -> Component:
    """Write the portable graph of a component and the variants of it that targets run faster.

    Args:
        name: of the component.
        model: its graph; it is changed.
        weights: that the graph reads.
        folder: of the bundle.
        spatial_stride: rows of the video for one of the VAE's latent.
    """
    law = model.metadata_props.pop(ACTIVATION_BYTES)
    storage = attach_weights(model, weights.tensors, folder)
    save_graph(model, folder / "graphs" / f"{name}.onnx")
    nodes, border = len(model.graph), tile_border(name, model, spatial_stride)
    engines = {}
    if optimize_for_ort(model, few_rows=name == "text_encoder"):
        path = folder / "engines" / ENGINE / f"{name}.onnx"
        path.parent.mkdir(parents=True, exist_ok=True)
        save_graph(model, path)
        engines["cpu"] = path.relative_to(folder).as_posix()
    return Component(
        graph=f"graphs/{name}.onnx",
        engines=engines,
        weights=tuple(path.relative_to(folder).as_posix() for path in weights.sha256),
        storage=storage,
        nodes=nodes,
        inputs=tuple(value.name or "" for value in model.graph.inputs),
        outputs=tuple(value.name or "" for value in model.graph.outputs),
        tile_border=border,
        activation_bytes=ActivationBytes.model_validate_json(law),
    )


def verified_component(
    spec: ComponentSpec,
    component: Component,
    recipe: Recipe,
    folder: Path,
    kept_weights: int = 0,
) -> Component:
    """Add the counts of its 8-bit layers, read back from its graphs, to a component.

    Args:
        spec: of the component.
        component: as it was written.
        recipe: what it is quantised by.
        folder: of the bundle.
        kept_weights: how many 8-bit weights are the checkpoint's own.

    Raises:
        WanxError: a graph is not what the recipe says, or does not run as it.
    """
    from wanx.exporter.quantization.readback import require_recipe
    from wanx.exporter.targets.onnxruntime.profile import profile_products

    for graph in component.engines.values():
        require_recipe(spec.name, folder / graph, folder, recipe)
    counts = require_recipe(spec.name, folder / component.graph, folder, recipe)
    kernels = {}
    if recipe.scheme.name == "int8":
        kernels = profile_products(
            spec, folder / component.engines.get("cpu", component.graph), folder
        )
        integer_products = kernels.get(INTEGER_PRODUCT, 0)
        if integer_products != len(recipe.layers):
            raise WanxError(
                f"ONNX Runtime ran {integer_products} of the {len(recipe.layers)} 8-bit layers of "
                f"{spec.name} as integer products; use the versions of constraints.txt, or report "
                "this"
            )
    return component.model_copy(
        update={"quantization": recipe.record(counts, kernels, kept_weights)}
    )


def save_graph(model: ir.Model, path: Path) -> None:
    """Serialise a model whose large tensors are external; the same model gives the same bytes."""
    path.write_bytes(graph_bytes(model))


def graph_bytes(model: ir.Model) -> bytes:
    """Serialise a model whose large tensors are external; the same model gives the same bytes."""
    for node in model.graph:  # named by how many others were made before
        node.name = None
    data: bytes = ir.to_proto(model).SerializeToString(deterministic=True)
    return data
