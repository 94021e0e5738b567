"""Sources of an export: a checkpoint, a bundle, or the built-in model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from wanx.builtin import find_bundle, open_named
from wanx.bundle.manifest import MANIFEST
from wanx.bundle.recovery import is_wanx_bundle
from wanx.checkpoints.checkpoint import (
    NO_PARTS,
    Checkpoint,
    PartPaths,
    open_checkpoint,
    with_loras,
)
from wanx.checkpoints.lora.fuse import Lora
from wanx.checkpoints.tensors.source import SafetensorsTensor
from wanx.checkpoints.tokenizer_source import TokenizerFile
from wanx.checkpoints.weights import ComponentWeights
from wanx.config.models import Task
from wanx.errors import CorruptInputError, UsageError
from wanx.exporter.component_groups import weight_groups
from wanx.files.safetensors import read_header


def open_source(
    source: str | Path | None,
    task: Task | None = None,
    parts: PartPaths = NO_PARTS,
    loras: Sequence[Lora] = (),
    *,
    full_precision: bool = False,
) -> Checkpoint:
    """Open a checkpoint, a bundle folder, or a built-in bundle by its name.

    Args:
        source: what to open; None is ``tiny``, or where parts are given nothing.
        task: what it has to be for; None takes what it is.
        parts: in the place of the source's.
        loras: put into the weights of the DiT.
        full_precision: take weights in fp32 where a copy in fewer bits lies beside them.

    Raises:
        WanxError: as :func:`wanx.checkpoints.checkpoint.open_checkpoint` and
            :func:`wanx.bundle.reader.open_bundle`.
    """
    if source is None and parts:
        return open_checkpoint(
            None, task=task, parts=parts, loras=loras, full_precision=full_precision
        )
    path = find_bundle(source or "tiny")
    if not _is_bundle(path):
        return open_checkpoint(
            path, task=task, parts=parts, loras=loras, full_precision=full_precision
        )
    if parts:
        raise UsageError(
            f"{path} is a bundle, whose parts stay; replace those of the checkpoint that it was "
            "exported from"
        )
    checkpoint = _open_bundle(path, task)
    return with_loras(checkpoint, loras) if loras else checkpoint


def _is_bundle(path: Path) -> bool:
    """True unless a folder has no manifest, or one of another program beside a checkpoint."""
    checkpoint = any((path / name).exists() for name in ("config.json", "model_index.json"))
    return (path / MANIFEST).exists() and (is_wanx_bundle(path) or not checkpoint)


def _open_bundle(path: Path, task: Task | None) -> Checkpoint:
    bundle = open_named(path)
    manifest = bundle.manifest
    if task is not None and task != manifest.task:
        raise UsageError(f"{path} is a bundle for {manifest.task}, not {task}; leave the task out")
    if manifest.precision not in ("fp32", "bf16", "fp16"):
        raise UsageError(
            f"{path} is quantised to {manifest.precision}; export from the checkpoint that it came "
            f"from, {manifest.provenance.source}: wanx export CHECKPOINT --precision "
            f"{manifest.precision} --lora …"
        )
    components = {}
    for group in weight_groups(manifest.config):
        # By its files alone, as earlier versions cut networks into other graphs.
        records = [r for name, r in manifest.components.items() if name.startswith(group)]
        if not records:
            raise CorruptInputError(f"{path} has no {group}; export it again from the checkpoint")
        files = tuple(bundle.root / name for name in records[0].weights)
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
        tokenizer=TokenizerFile(path=bundle.tokenizer_path),
        earlier_loras=manifest.provenance.loras,
    )
