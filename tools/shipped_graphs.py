"""Write the graphs that wanx ships, so that an export of a known network traces nothing.

    python tools/shipped_graphs.py

Traces every component of every preset, as it is and with the layouts that ``--precision int8`` and
``fp8`` have where no layer is kept high, or for the built-in models as calibration leaves them; and
lists the tensors of their checkpoints. Takes a few minutes, or less where only entries are missing.
To be run after each change of what decides a trace; a test says when.
"""

from __future__ import annotations

import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import suppress

from wanx.config.models import PRESETS, ModelConfig
from wanx.exporter.components import component_specs, expected_tensors
from wanx.exporter.graph.cache import (
    SHIPPED,
    graph_key,
    sources_digest,
    tensors_key,
    tensors_to_bytes,
)
from wanx.exporter.graph.stored_graph import graph_to_bytes
from wanx.exporter.quantization.recipe import Recipe, dit_candidates, text_recipe
from wanx.exporter.quantization.scheme import SCHEMES, QuantizeOptions
from wanx.exporter.trace_component import trace_component

# Layers of the built-in models that calibration keeps high.
_CROSS_V = tuple(f"blocks.{block}.cross_attn.v" for block in range(6))
KEPT_HIGH = {
    ("tiny", "int8"): (
        *_CROSS_V, "blocks.3.cross_attn.o", "blocks.4.cross_attn.k", "blocks.5.cross_attn.k"
    ),
    ("tiny", "fp8"): tuple(f"blocks.{block}.self_attn.v" for block in range(2, 6)),
    ("tiny-i2v", "int8"): (*_CROSS_V, "blocks.4.cross_attn.k", "blocks.5.cross_attn.k"),
    ("tiny-i2v", "fp8"): (
        *(f"blocks.{block}.self_attn.v" for block in range(1, 6)),
        *("blocks.5.cross_attn.v", "blocks.5.cross_attn.v_img"),
    ),
}  # fmt: skip
EPOCH = (1980, 1, 1, 0, 0, 0)  # of every entry, so that the same entries give the same bytes


def recipes(component: str, config: ModelConfig) -> list[Recipe | None]:
    """Recipes whose graphs are shipped for a component; None is the network as it is."""
    if component == "text_encoder":
        return [None, text_recipe(config.text_encoder)]
    # Blocks with hints are traced one by one, which takes minutes.
    if component != "dit" or config.dit.vace_layers:
        return [None]
    layers, _ = dit_candidates(config.dit, QuantizeOptions())
    quantized = []
    for name in ("int8", "fp8"):
        kept = KEPT_HIGH.get((config.name, name), ())
        lower = dict.fromkeys((layer for layer in layers if layer not in kept), 1.0)
        quantized.append(Recipe(scheme=SCHEMES[name], layers=lower))
    return [None, *quantized]


def entries() -> Iterator[tuple[str, Callable[[], bytes]]]:
    """Yield the key of every entry, and what makes it."""
    for config in PRESETS.values():
        for group, tensors in expected_tensors(config).items():
            yield tensors_key(group, config), lambda tensors=tensors: tensors_to_bytes(tensors)
        for spec in component_specs(config):
            for recipe in recipes(spec.name, config):
                yield (
                    graph_key(spec.name, config, recipe),
                    lambda name=spec.name, config=config, recipe=recipe: graph_to_bytes(
                        trace_component(name, config, recipe)
                    ),
                )


def _still_right() -> dict[str, bytes]:
    """Entries of the archive that the code as it is would make again."""
    with suppress(OSError), zipfile.ZipFile(SHIPPED) as archive:
        if archive.read("sources").decode() == sources_digest():
            wanted = {key for key, _ in entries()}
            return {key: archive.read(key) for key in archive.namelist() if key in wanted}
    return {}


def main() -> None:
    """Write the archive."""
    made = _still_right()
    made["sources"] = sources_digest().encode()
    for key, make in entries():
        if key not in made:
            start = time.monotonic()
            made[key] = make()
            print(f"{key} {time.monotonic() - start:.1f} s", flush=True)
    with zipfile.ZipFile(SHIPPED, "w", zipfile.ZIP_DEFLATED) as archive:
        for key, data in sorted(made.items()):
            archive.writestr(zipfile.ZipInfo(key, EPOCH), data, zipfile.ZIP_DEFLATED)
    print(f"{SHIPPED}: {len(made)} entries, {SHIPPED.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
