"""Bundles with engines: the same files on ONNX Runtime, and answers of their other networks."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import numpy as np

from wanx.bundle.engine_schedule import read_schedule
from wanx.bundle.publish import record_files, write_manifest
from wanx.bundle.reader import Bundle, open_bundle
from wanx.bundle.trust import mark_trusted
from wanx.runtime.sessions import open_session
from wanx.runtime.sessions.base import State


def on_cpu(bundle: Bundle) -> Bundle:
    """The same files, run by ONNX Runtime."""
    return dataclasses.replace(
        bundle, manifest=bundle.manifest.model_copy(update={"target": "cpu"})
    )


def relative(found: np.ndarray, wanted: np.ndarray) -> float:
    return float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))


def rescheduled(bundle: Bundle, folder: Path, **update: object) -> Bundle:
    """A copy whose schedule of the denoiser says something else, signed anew and built here."""
    shutil.copytree(bundle.root, folder)
    engine = bundle.manifest.components["dit"].engines[bundle.manifest.target]
    schedule = read_schedule(folder / engine).model_copy(update=update)
    (folder / engine).write_text(schedule.to_json())
    manifest = bundle.manifest.model_copy(update={"files": record_files(folder)})
    write_manifest(folder, manifest)
    mark_trusted(engine, manifest.files)
    return open_bundle(folder)


def text_and_frames(bundle: Bundle) -> list[np.ndarray]:
    """Features of a text, then frames of three latents, with state from each to the next."""
    vae = bundle.manifest.config.vae
    channels = vae.base_dim * vae.multipliers[-1]
    features = np.random.default_rng(0).standard_normal((1, channels, 1, 8, 8), dtype=np.float32)
    with open_session(bundle, "text_encoder") as session:
        made = [session.run({"ids": np.array([[7, 3, 9, 1]])})["features"]]
    state: State = {}
    with open_session(bundle, "vae_decoder_up_first") as session:
        made.append(session.run({"features": features}, state)["video"])
    with open_session(bundle, "vae_decoder_up_rest") as session:
        for scale in (0.5, -1):
            made.append(session.run({"features": features * np.float32(scale)}, state)["video"])
    return made
