"""Where an export's weights come from: a checkpoint, a bundle, or the built-in model."""

from __future__ import annotations

from pathlib import Path

from wanx.builtin import builtin_bundle
from wanx.bundle import open_bundle
from wanx.config import Task
from wanx.errors import UsageError
from wanx.manifest import MANIFEST
from wanx.models.checkpoint import Checkpoint, open_checkpoint
from wanx.models.tensor_source import SafetensorsTensor
from wanx.models.weights import ComponentWeights
from wanx.safetensors_file import read_header

# The weight groups of a bundle and the component whose weight files hold each.
GROUPS = {"dit": "dit", "text_encoder": "text_encoder", "vae": "vae_decoder_rest"}


def open_source(source: str | Path, task: Task | None = None) -> Checkpoint:
    """Open a checkpoint folder, a bundle folder, or ``tiny``.

    Raises:
        WanxError: as :func:`wanx.models.checkpoint.open_checkpoint` and
            :func:`wanx.bundle.open_bundle`.
    """
    if str(source) == "tiny":
        return _open_bundle(builtin_bundle(), task, builtin=True)
    path = Path(source)
    if (path / MANIFEST).exists():
        return _open_bundle(path, task, builtin=False)
    return open_checkpoint(path, task=task)


def _open_bundle(path: Path, task: Task | None, *, builtin: bool) -> Checkpoint:
    bundle = open_bundle(path, allow_hard_links=builtin)
    manifest = bundle.manifest
    if task is not None and task != manifest.task:
        raise UsageError(f"{path} is a bundle for {manifest.task}, not {task}; leave the task out")
    if manifest.precision not in ("fp32", "bf16", "fp16"):
        raise UsageError(
            f"{path} is quantised to {manifest.precision}; export from the original checkpoint"
        )
    components = {}
    for group, component in GROUPS.items():
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
