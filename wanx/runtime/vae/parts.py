"""Refusal of bundles whose VAE is not in parts."""

from __future__ import annotations

import shlex
from pathlib import Path

from wanx.bundle.manifest import Manifest
from wanx.config.number_formats import QUANTIZED
from wanx.errors import UsageError


def require_parts(root: Path, manifest: Manifest) -> None:
    """Refuse a bundle whose VAE is not in parts.

    Raises:
        UsageError: an earlier version of wanx exported it; with the command that makes it anew.
    """
    if "vae_decoder_up_rest" in manifest.components:
        return
    precision = manifest.precision
    quantized = precision in {row.name for row in QUANTIZED}
    # What is quantised is no source.
    source = "CHECKPOINT" if quantized else shlex.quote(str(root))
    origin = f" from {manifest.provenance.source}, its checkpoint," if quantized else ""
    raise UsageError(
        f"{root} was exported before the VAE came in parts; make it anew{origin} with "
        f"`wanx export {source} -o NEW --precision {precision}`"
    )
