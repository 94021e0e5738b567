"""Ways to plant a fault into an export of the built-in model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import onnx_ir as ir
import pytest
import torch
from torch import Tensor

from wanx.export import exporter, quantize, quantized_spec, weights
from wanx.export.components import ComponentSpec
from wanx.export.quantize import QuantizedTensor
from wanx.export.recipe import Recipe
from wanx.export.scheme import SCHEMES
from wanx.export.targets import onnxruntime as target
from wanx.models.quantized import WeightOnlyLinear

Fault = Callable[[pytest.MonkeyPatch], None]
Change = Callable[[ir.Model], None]
Scales = dict[str, Tensor]
BLOCKS = 6


def every(layer: str) -> list[str]:
    """A layer's names in all blocks."""
    return [f"blocks.{block}.{layer}" for block in range(BLOCKS)]


def edit_graph(change: Change, component: str = "dit", *, engine: bool = False) -> Fault:
    """Alter a component's graph after it was traced, or its engine's after it was specialised."""

    def plant(patch: pytest.MonkeyPatch) -> None:
        trace, specialise = exporter.trace, target.specialise

        def traced(spec: ComponentSpec) -> ir.Model:
            model = trace(spec)
            if spec.name == component:
                change(model)
            return model

        def specialised(model: ir.Model) -> bool:
            found = specialise(model)
            if model.graph.name == component:
                change(model)
            return found

        if engine:
            patch.setattr(target, "specialise", specialised)
        else:
            patch.setattr(exporter, "trace", traced)

    return plant


def edit_scales(change: Callable[[Scales], None]) -> Fault:
    """Alter the scales before they are written."""

    def plant(patch: pytest.MonkeyPatch) -> None:
        scale_tensors = weights.scale_tensors

        def altered(*args: Any) -> dict[str, Tensor]:
            found = scale_tensors(*args)
            if "blocks.0.self_attn.q.weight_scale" in found:
                change(found)
            return found

        patch.setattr(weights, "scale_tensors", altered)

    return plant


def another_recipe(
    change: Callable[[Recipe], Recipe], *, graph: bool = True, files: bool = True
) -> Fault:
    """Trace the denoiser, or write its weights, by another recipe than the one that was decided."""

    def plant(patch: pytest.MonkeyPatch) -> None:
        traced, written = exporter.quantized_spec, exporter.write_weights

        def by_another(recipe: Recipe | None) -> Recipe | None:
            is_dit = recipe is not None and "blocks.0.ffn.2" in recipe.layers
            return change(recipe) if is_dit else recipe

        if graph:
            patch.setattr(
                exporter, "quantized_spec", lambda spec, recipe: traced(spec, by_another(recipe))
            )
        if files:
            patch.setattr(
                exporter, "write_weights", lambda *args: written(*args[:-1], by_another(args[-1]))
            )

    return plant


def edit_numbers(change: Callable[[QuantizedTensor, Tensor, Tensor], Tensor]) -> Fault:
    """Replace the rounding of the denoiser's weights: ``change`` gets weight, units and scale, and returns the numbers."""

    def plant(patch: pytest.MonkeyPatch) -> None:
        def iter_bytes(self: QuantizedTensor, chunk: int = 1 << 20) -> Iterator[memoryview]:
            self.scales.clear()
            whole = None
            if self.per_tensor:
                whole = torch.stack([amax.amax() for _, amax in self._rows(chunk)]).amax()[None]
            for rows, amax in self._rows(chunk):
                scale = (amax if whole is None else whole) / self.scheme.limit
                units = rows.float() / scale[:, None]
                if self.file.name == "dit.safetensors":
                    numbers = change(self, units, scale)  # which may alter the scale in place
                else:
                    numbers = rounded(self, units, scale)
                if whole is None or not self.scales:
                    self.scales.append(scale)
                yield numbers.to(self.scheme.dtype).view(torch.uint8).numpy().data.cast("B")

        patch.setattr(QuantizedTensor, "iter_bytes", iter_bytes)

    return plant


def rounded(tensor: QuantizedTensor, units: Tensor, _: Tensor) -> Tensor:
    return units.round() if tensor.scheme.dtype == torch.int8 else units


def toward_zero(tensor: QuantizedTensor, units: Tensor, scale: Tensor) -> Tensor:
    if tensor.scheme.dtype == torch.int8:
        return units.trunc()
    nearest = units.to(torch.float8_e4m3fn)
    beyond = nearest.float().abs() > units.abs() * (1 + 1e-6)
    return (nearest.view(torch.uint8) - beyond.to(torch.uint8)).view(torch.float8_e4m3fn)


def floored(tensor: QuantizedTensor, units: Tensor, scale: Tensor) -> Tensor:
    return (units + 1e-5).floor()


def zeros(tensor: QuantizedTensor, units: Tensor, scale: Tensor) -> Tensor:
    return torch.zeros_like(units)


def zeros_of_a_huge_scale(tensor: QuantizedTensor, units: Tensor, scale: Tensor) -> Tensor:
    scale *= 1e20
    return torch.zeros_like(units)


def half_the_range(tensor: QuantizedTensor, units: Tensor, scale: Tensor) -> Tensor:
    scale *= 2
    return rounded(tensor, units / 2, scale)


def one_wrong_number(tensor: QuantizedTensor, units: Tensor, scale: Tensor) -> Tensor:
    numbers = rounded(tensor, units, scale)
    if tensor.name == "blocks.4.ffn.0.weight":
        place = units[-1].abs().argmin()
        numbers[-1, place] += 2
    return numbers


def one_nan(tensor: QuantizedTensor, units: Tensor, scale: Tensor) -> Tensor:
    if tensor.name == "blocks.4.ffn.0.weight":
        units[-1, -1] = torch.nan
    return units


def initializer(model: ir.Model, name: str) -> ir.Value:
    return model.graph.initializers[name]


def reader(model: ir.Model, name: str) -> ir.Node:
    """The one node that reads an initialiser."""
    ((node, _),) = initializer(model, name).uses()
    return node


def leave_high(layer: str, place: int = 2) -> Change:
    """Multiply one layer as an ordinary one, by its 8-bit numbers as if they were its weight."""

    def change(model: ir.Model) -> None:
        node = reader(model, f"{layer}.weight")
        x, weight = node.inputs[0], node.inputs[place]
        assert weight is not None
        weight.type = ir.TensorType(ir.DataType.FLOAT)
        if node.op_type == "QuantLinear":
            x = x.producer().inputs[0]
        turned = ir.node("Transpose", [weight], {"perm": [1, 0]})
        product = ir.node("MatMul", [x, turned.outputs[0]])
        nodes = [turned, product]
        if node.op_type == "QuantLinear":
            nodes.append(ir.node("Add", [product.outputs[0], node.inputs[4]]))
        put_instead(model, node, nodes)

    return change


def put_instead(model: ir.Model, node: ir.Node, nodes: list[ir.Node]) -> None:
    for number, new in enumerate(nodes):
        new.outputs[0].name = f"planted_{number}"
    model.graph.insert_before(node, nodes)
    node.outputs[0].replace_all_uses_with(nodes[-1].outputs[0])
    model.graph.remove(node, safe=True)
    for name in [n for n, value in model.graph.initializers.items() if not value.uses()]:
        del model.graph.initializers[name]


def swap_readers(first: str, second: str) -> Change:
    """Let whatever reads one initialiser read the other."""

    def change(model: ir.Model) -> None:
        values = initializer(model, first), initializer(model, second)
        uses = [list(value.uses()) for value in values]
        for value, others in zip(values, reversed(uses), strict=True):
            for node, index in others:
                node.replace_input_with(index, value)

    return change


def quantise_by_another_scale(model: ir.Model) -> None:
    """Round the input of one layer by the scale of another, but multiply by its own."""
    scale = initializer(model, "blocks.2.ffn.2.input_scale")
    (node,) = {node for node, _ in scale.uses() if node.op_type == "QuantizeLinear"}
    node.replace_input_with(1, initializer(model, "blocks.1.ffn.2.input_scale"))


def ignore_rows(model: ir.Model) -> None:
    """Look up the numbers of a table without their scales."""
    gather = reader(model, "token_embedding.weight")
    cast = gather.outputs[0].uses()[0].node
    mul = cast.outputs[0].uses()[0].node
    assert mul.op_type == "Mul"
    mul.outputs[0].replace_all_uses_with(cast.outputs[0])
    model.graph.remove(mul, safe=True)


def drop_gelu(model: ir.Model) -> None:
    for node in [node for node in model.graph if node.op_type == "Gelu"]:
        node.outputs[0].replace_all_uses_with(node.inputs[0])
        model.graph.remove(node, safe=True)


def another_bias(model: ir.Model) -> None:
    """Let all layers add the bias of one."""
    bias = initializer(model, "blocks.0.self_attn.k.bias")
    for node in model.graph:
        if node.op_type == "QuantLinear" and node.inputs[4].shape == bias.shape:
            node.replace_input_with(4, bias)


def ignore_smoothing(model: ir.Model) -> None:
    """Hand the layers their inputs undivided."""
    for name, value in model.graph.initializers.items():
        if name.endswith("_smooth"):
            for node, index in list(value.uses()):
                assert (node.op_type, index) == ("Div", 1)
                node.outputs[0].replace_all_uses_with(node.inputs[0])
                model.graph.remove(node, safe=True)


def swap_modulation(model: ir.Model) -> None:
    """Take the shift of every AdaLN for its scale."""
    for node in model.graph:
        if node.op_type == "AdaLN":
            first, second = node.inputs[1:3]
            node.replace_input_with(1, second)
            node.replace_input_with(2, first)


def change_every(suffix: str, change: Callable[[Tensor], Tensor]) -> Callable[[Scales], None]:
    def act(scales: Scales) -> None:
        for name in scales:
            if name.endswith(suffix) and name.startswith("blocks."):
                scales[name] = change(scales[name])

    return act


def swap(first: str, second: str) -> Callable[[Scales], None]:
    def act(scales: Scales) -> None:
        assert not torch.equal(scales[first], scales[second])
        scales[first], scales[second] = scales[second], scales[first]

    return act


def only(name: str, change: Callable[[Tensor], Tensor]) -> Callable[[Scales], None]:
    return lambda scales: scales.update({name: change(scales[name])})


def weight_only(patch: pytest.MonkeyPatch) -> None:
    def build(k: int, n: int, *, same_input: object, **options: Any) -> WeightOnlyLinear:
        return WeightOnlyLinear(k, n, **options)

    patch.setattr(quantized_spec, "QuantLinear", build)


def as_int8(recipe: Recipe) -> Recipe:
    return replace(recipe, scheme=SCHEMES["int8"])


def without(layer: str) -> Callable[[Recipe], Recipe]:
    return lambda recipe: recipe.without(dict.fromkeys(every(layer), "planted"))


def with_more(layer: str) -> Callable[[Recipe], Recipe]:
    def change(recipe: Recipe) -> Recipe:
        return replace(recipe, layers={**recipe.layers, **dict.fromkeys(every(layer), 0.01)})

    return change


def dynamic(recipe: Recipe) -> Recipe:
    return replace(recipe, layers=dict.fromkeys(recipe.layers))


def high_attention(recipe: Recipe) -> Recipe:
    return replace(recipe, attention={})


def unsmoothed_weights(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(quantize, "smoothing_of", lambda layer: None)


def signed_activations(patch: pytest.MonkeyPatch) -> None:
    """Leave the engine to what ONNX Runtime finds by itself."""
    patch.setattr(target, "_unsigned", lambda *_: False)
