"""A pipeline of diffusers with random weights, its checkpoint, and the bundles made of it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

# The heavy packages are imported where they are used: most tests need none of them.
if TYPE_CHECKING:
    import onnx_ir as ir
    from diffusers import WanPipeline

    from wanx.bundle import Bundle
    from wanx.config import ModelConfig
    from wanx.export.components import ComponentSpec
    from wanx.progress import Progress

Export = Callable[..., "Bundle"]


@pytest.fixture(scope="session")
def peer() -> WanPipeline:
    """The oracle, in fp32; tests must not change it."""
    from peers import random_pipeline

    return random_pipeline()


@pytest.fixture(scope="session")
def checkpoint(peer: WanPipeline, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The oracle as the Diffusers layout that it saves itself; tests must not change it."""
    folder = tmp_path_factory.mktemp("checkpoint") / "random"
    peer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def export_quickly() -> Export:
    """Export as :func:`wanx.export.exporter.export` does, tracing each network only once.

    Tracing takes nearly all the time and depends on the configuration alone;
    ``test_exporting_a_bundle_again`` shows that a second trace gives the same graph.
    """
    import onnx_ir as ir

    import wanx.export.exporter as exporter
    from wanx.export.options import ExportOptions
    from wanx.export.source import open_source
    from wanx.progress import silent

    traced: list[tuple[str, ModelConfig, ir.Model]] = []
    trace = exporter.trace

    def export(
        source: Path, output: Path, *, progress: Progress = silent, **options: Any
    ) -> Bundle:
        def trace_once(spec: ComponentSpec) -> ir.Model:
            config = open_source(source).config
            found = [model for name, known, model in traced if (name, known) == (spec.name, config)]
            if not found:
                found = [trace(spec)]
                traced.append((spec.name, config, *found))
            model = found[0].clone()
            # A clone shares the types of its values and gives names to its nodes.
            for value in model.graph.initializers.values():
                assert value.dtype is not None
                value.type = ir.TensorType(value.dtype)
            for node in model.graph:
                node.name = None
            return model

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(exporter, "trace", trace_once)
            return exporter.export(ExportOptions(source=source, output=output, **options), progress)

    return export


@pytest.fixture(scope="session")
def bundles(
    checkpoint: Path, export_quickly: Export, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Bundle]:
    """The checkpoint as a bundle of a given precision; tests must not change it."""
    folder = tmp_path_factory.mktemp("bundles")
    made: dict[str, Bundle] = {}

    def bundle(precision: str) -> Bundle:
        if precision not in made:
            made[precision] = export_quickly(checkpoint, folder / precision, precision=precision)
        return made[precision]

    return bundle


@pytest.fixture(scope="session")
def bundle_fp32(bundles: Callable[[str], Bundle]) -> Bundle:
    return bundles("fp32")
