"""A network traced from two of its blocks has the graph of the whole network."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import onnx_ir as ir
import pytest

from wanx.config.models import PRESETS, ImageEncoderConfig
from wanx.exporter.components import ComponentSpec, dit_spec, image_encoder_spec, text_encoder_spec
from wanx.exporter.graph import trace as module
from wanx.exporter.graph.trace import trace

TINY = PRESETS["tiny"]
SPECS: dict[str, Callable[[int], ComponentSpec]] = {
    "dit": lambda blocks: dit_spec(replace(TINY.dit, num_layers=blocks)),
    "text_encoder": lambda n: text_encoder_spec(replace(TINY.text_encoder, num_layers=n)),
    # Its last block ends in the graph's output.
    "image_encoder": lambda blocks: image_encoder_spec(
        ImageEncoderConfig(dim=24, ffn_dim=40, num_heads=3, num_layers=blocks + 1, image_size=28)
    ),
}


def structure(model: ir.Model) -> list[Any]:
    """Every node in order, with values numbered as they appear and weights by their names."""
    numbers: dict[str, int] = {}

    def seen(value: ir.Value | None) -> object:
        if value is None:
            return None
        assert value.name
        if value.is_initializer():
            return value.name
        return numbers.setdefault(value.name, len(numbers))

    return [
        [seen(value) for value in model.graph.inputs],
        *(
            (
                node.domain,
                node.op_type,
                [seen(value) for value in node.inputs],
                [seen(value) for value in node.outputs],
                sorted(str(attribute) for attribute in node.attributes.values()),
            )
            for node in model.graph
        ),
        [seen(value) for value in model.graph.outputs],
    ]


def weights(model: ir.Model) -> dict[str, Any]:
    return {
        name: (
            value.dtype,
            tuple(value.shape or ()),
            None if value.const_value is None else value.const_value.tobytes(),
        )
        for name, value in model.graph.initializers.items()
    }


@pytest.mark.parametrize("blocks", [1, 3, 5])
@pytest.mark.parametrize("name", SPECS)
def test_the_graph_is_that_of_the_whole_network(
    name: str, blocks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    repeated = trace(SPECS[name](blocks))
    monkeypatch.setattr(module, "TRACED_BLOCKS", blocks)
    whole = trace(SPECS[name](blocks))
    assert structure(repeated) == structure(whole)
    assert weights(repeated) == weights(whole)
    last = f"{SPECS[name](blocks).stack}.{blocks - 1}."
    assert sum(last in weight for weight in weights(whole)) > 5
    outputs = [[value.name for value in model.graph.outputs] for model in (repeated, whole)]
    assert outputs[0] == outputs[1] == list(SPECS[name](blocks).outputs)


def test_the_graph_of_a_transformer_with_images(monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = 4
    config = replace(TINY.dit, num_layers=blocks, in_dim=36, image_dim=24, image_tokens=5)
    repeated = trace(dit_spec(config))
    monkeypatch.setattr(module, "TRACED_BLOCKS", blocks)
    whole = trace(dit_spec(config))
    assert structure(repeated) == structure(whole)
    assert weights(repeated) == weights(whole)
