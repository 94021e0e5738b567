"""Sources of an export: a checkpoint, a bundle, or the built-in model."""

from __future__ import annotations

from pathlib import Path

from wanx.builtin import find_bundle, open_named
from wanx.bundle.manifest import MANIFEST
from wanx.checkpoints.checkpoint import Checkpoint, open_checkpoint
from wanx.checkpoints.tensor_source import SafetensorsTensor
from wanx.checkpoints.weights import ComponentWeights
from wanx.config.models import Task
from wanx.errors import CorruptInputError, UsageError
from wanx.exporter.component_groups import weight_groups
from wanx.files.safetensors import read_header


def open_source(source: str | Path, task: Task | None = None) -> Checkpoint:
    """Open a checkpoint folder, a bundle folder, or a built-in bundle by its name.

    Raises:
        WanxError: as :func:`wanx.checkpoints.checkpoint.open_checkpoint` and
            :func:`wanx.bundle.reader.open_bundle`.
    """
    path = find_bundle(source)
    if (path / MANIFEST).exists():
        return _open_bundle(path, task)
    return open_checkpoint(path, task=task)


def _open_bundle(path: Path, task: Task | None) -> Checkpoint:
    bundle = open_named(path)
    manifest = bundle.manifest
    if task is not None and task != manifest.task:
        raise UsageError(f"{path} is a bundle for {manifest.task}, not {task}; leave the task out")
    if manifest.precision not in ("fp32", "bf16", "fp16"):
        raise UsageError(
            f"{path} is quantised to {manifest.precision}; export from the original checkpoint"
        )
    components = {}
    for group, component in weight_groups(manifest.config).items():
        if component not in manifest.components:
            raise CorruptInputError(f"{path} has no {component}; export it again")
        files = tuple(bundle.root / name for name in manifest.components[component].weights)
        refs = [ref for file in files for ref in read_header(file).entries.values()]
        components[group] = ComponentWeights(
            component=group,
            tensors={ref.name: SafetensorsTensor.from_ref(ref) for ref in refs},
            files=files,
        )
    return Checkpoint(
        source=bundle.root,
        layout="bundle",
        config=manifest.config,
        components=components,
        tokenizer=bundle.tokenizer_path,
    )
