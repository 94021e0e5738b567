"""Bundles with golden steps for every task, without a trace of the built-in models."""

from __future__ import annotations

import shutil
from dataclasses import dataclass, replace
from pathlib import Path

from tests.support.eightbit import trace_once
from tests.support.small_models import small_model
from wanx.builtin import builtin_bundle
from wanx.bundle.golden_steps import GOLDEN, Golden, read_golden, write_golden
from wanx.bundle.publish import record_files, write_manifest
from wanx.bundle.reader import Bundle, open_bundle, read_bundle
from wanx.checkpoints.checkpoint import Checkpoint
from wanx.exporter.calibration.calibrate import record_golden
from wanx.exporter.calibration.options import CalibrationOptions
from wanx.exporter.component_writer import save_graph
from wanx.exporter.components import dit_spec
from wanx.exporter.graph.attach import attach_weights
from wanx.exporter.source import open_source
from wanx.files.safetensors import read_header

TASKS = ("t2v", "i2v", "vace")
_BUILTIN = {"t2v": "tiny", "i2v": "tiny-i2v"}  # VACE has no built-in model


def update_hashes(folder: Path) -> Bundle:
    """Make a bundle whole whose files were changed."""
    manifest = read_bundle(folder).manifest
    write_manifest(folder, manifest.model_copy(update={"files": record_files(folder)}))
    return open_bundle(folder)


def with_golden_steps(bundle: Bundle, golden: Golden | None) -> Bundle:
    """Put golden steps into a bundle, or take them out of it."""
    (bundle.root / GOLDEN).parent.mkdir(exist_ok=True)
    (bundle.root / GOLDEN).unlink(missing_ok=True)
    if golden is not None:
        write_golden(golden, bundle.root / GOLDEN)
    return update_hashes(bundle.root)


@dataclass(frozen=True, kw_only=True)
class Case:
    """A bundle with golden steps, and where its weights come from."""

    bundle: Bundle
    checkpoint: Checkpoint

    @property
    def golden(self) -> Golden:
        return read_golden(self.bundle.root / GOLDEN)


def golden_case(folder: Path, task: str) -> Case:
    """Make a bundle for a task with two golden steps of its own weights.

    The denoiser for VACE is small and random, the others are the built-in ones.
    """
    if task in _BUILTIN:
        checkpoint = open_source(_BUILTIN[task])
        shutil.copytree(builtin_bundle(_BUILTIN[task]), folder)
    else:
        checkpoint, _ = small_model(folder.with_name(f"{folder.name}-source"), "vace")
        _write_vace(checkpoint, folder)
    bundle = with_golden_steps(update_hashes(folder), None)
    options = CalibrationOptions(golden_steps=2, frames=5)
    return Case(
        bundle=with_golden_steps(bundle, record_golden(checkpoint, bundle, options)),
        checkpoint=checkpoint,
    )


def _write_vace(checkpoint: Checkpoint, folder: Path) -> None:
    """The built-in image-to-video bundle with a denoiser for VACE, which has none of its own."""
    shutil.copytree(builtin_bundle("tiny-i2v"), folder)
    manifest = read_bundle(folder).manifest
    config = replace(checkpoint.config, image_encoder=None)
    weights = folder / "weights" / "dit.safetensors"
    (folder / manifest.components["dit"].engines["cpu"]).unlink()
    (folder / "weights" / "image_encoder.safetensors").unlink()
    shutil.copy(checkpoint.source / "dit.safetensors", weights)
    spec = dit_spec(config.dit)
    graph = trace_once(spec)
    storage = attach_weights(graph, read_header(weights).entries, folder)
    save_graph(graph, folder / "graphs" / "dit.onnx")
    names = tuple(item.name for item in spec.inputs)
    changes = {"engines": {}, "storage": storage, "inputs": names}
    parts = dict(manifest.components)
    del parts["image_encoder"]
    parts["dit"] = parts["dit"].model_copy(update=changes)
    changes = {"config": config, "components": parts, "files": record_files(folder)}
    write_manifest(folder, manifest.model_copy(update=changes))
