"""Cache files of tensors and facts, checked by SHA-256 when they are read."""

from __future__ import annotations

import hashlib
import json
from contextlib import suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from wanx.files.atomic import replacing


def save_tensors(tensors: dict[str, Tensor], facts: object, path: Path) -> None:
    """Write tensors and JSON facts in one step, so that a kill leaves the file whole or absent.

    Where the folder cannot be written, nothing is kept and nothing fails.
    """
    text = json.dumps(facts)
    with suppress(OSError, SafetensorError):
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as temporary:
            digest = _digest(tensors, text)
            save_file(tensors, temporary, metadata={"facts": text, "sha256": digest})


def load_tensors(path: Path) -> tuple[dict[str, Tensor], Any]:
    """Read what :func:`save_tensors` wrote.

    Raises:
        OSError: the file cannot be read.
        SafetensorError: it is truncated.
        KeyError: it is another file.
        ValueError: its bytes are not those that were written.
    """
    with safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        metadata = file.metadata() or {}
    # After a power failure, a file of the right size can hold zeros.
    if metadata["sha256"] != _digest(tensors, metadata["facts"]):
        raise ValueError(f"{path} is damaged")
    return tensors, json.loads(metadata["facts"])


def _digest(tensors: dict[str, Tensor], facts: str) -> str:
    digest = hashlib.sha256(facts.encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.numpy().tobytes())
    return digest.hexdigest()
