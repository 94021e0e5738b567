from __future__ import annotations

import copy
import dataclasses
import json
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from wanx.bundle.manifest import Component, FileRecord, Manifest, Provenance, parse_manifest
from wanx.config.models import PRESETS
from wanx.errors import CorruptInputError, EnvironmentMismatchError

PATH = Path("b/manifest.json")
RECORD = FileRecord(sha256="0" * 64, size=1)


def manifest(preset: str = "tiny", **changes: Any) -> Manifest:
    fields: dict[str, Any] = {
        "wanx_version": "0.1.0",
        "config": PRESETS[preset],
        "precision": "bf16",
        "target": "rtx:sm89",
        "components": {
            "dit": Component(
                graph="graphs/dit.onnx",
                weights=("weights/dit.safetensors",),
                storage={"BF16": 3},
                nodes=5,
                inputs=("tokens",),
                outputs=("velocity",),
            )
        },
        "provenance": Provenance(
            source="Wan-AI/Wan2.1-T2V-1.3B",
            source_layout="original",
            source_sha256="a" * 64,
            tools={"torch": "2.13.0"},
            created=datetime(2025, 1, 2, tzinfo=UTC),
        ),
        "files": {"graphs/dit.onnx": RECORD, "weights/dit.safetensors": RECORD},
    }
    return Manifest(**fields | changes)


@pytest.mark.parametrize("preset", PRESETS)
def test_survives_its_own_json(preset: str) -> None:
    written = manifest(preset)
    read = parse_manifest(written.to_json(), PATH)
    assert read == written
    assert read.config == PRESETS[preset]
    assert (read.name, read.task) == (preset, PRESETS[preset].task)
    assert read.defaults == PRESETS[preset].defaults
    assert read.to_json() == written.to_json()


def test_json_is_plain() -> None:
    document = json.loads(manifest().to_json())
    assert document["schema_version"] == 1
    assert document["config"]["dit"]["patch_size"] == [1, 2, 2]
    assert document["provenance"]["created"] == "2025-01-02T00:00:00Z"


def test_is_frozen() -> None:
    with pytest.raises(ValidationError):
        manifest().target = "cpu"


@pytest.mark.fault("manifest of a newer wanx")
def test_newer_schema_asks_for_an_upgrade_even_if_nothing_else_is_known() -> None:
    with pytest.raises(EnvironmentMismatchError) as caught:
        parse_manifest(b'{"schema_version": 3, "layers_of_the_future": []}', PATH)
    assert str(caught.value) == (
        "b/manifest.json: written by a newer wanx (schema 3, this one reads 1): upgrade wanx"
    )


def set_to(*keys: str, value: object) -> Callable[[dict[str, Any]], None]:
    def change(document: dict[str, Any]) -> None:
        for key in keys[:-1]:
            document = document[key]
        document[keys[-1]] = value

    return change


def without(*keys: str) -> Callable[[dict[str, Any]], None]:
    def change(document: dict[str, Any]) -> None:
        for key in keys[:-1]:
            document = document[key]
        del document[keys[-1]]

    return change


DIT = ("config", "dit")
HOSTILE_PATHS = [
    "../dit.onnx", "graphs/../../x", "graphs/..", "/etc/passwd", "C:/x", "graphs\\dit.onnx",
    "graphs/a\\..\\b", "graphs/a\0b", "graphs/", "graphs", "graphs//x", "graphs/./x", "", ".",
    "manifest.json", "graphs/.hidden", "graphs/x:stream", "graphs/a\n", "weigths/x", "~/x",
    "graphs/" + "a" * 200, "graphs/" + "a/" * 50 + "x", "file:///etc/passwd", "graphs/\u202ex",
    "*/_ORT_MEM_ADDR_/*",
]  # fmt: skip


@pytest.mark.parametrize("path", HOSTILE_PATHS)
@pytest.mark.parametrize("place", ["files", "graph", "weights"])
@pytest.mark.fault("weights outside the bundle")
def test_refuses_paths_that_could_leave_the_bundle(path: str, place: str) -> None:
    document = json.loads(manifest().to_json())
    if place == "files":
        document["files"][path] = {"sha256": "0" * 64, "size": 1}
    else:
        document["components"]["dit"][place] = path if place == "graph" else [path]
    refused(document)


@pytest.mark.parametrize(
    ("change", "found"),
    [
        (set_to("schema_version", value=0), "schema_version"),
        (set_to("schema_version", value=-1), "schema_version"),
        (set_to("schema_version", value=True), "schema_version"),
        (set_to("schema_version", value="1"), "schema_version"),
        (set_to("schema_version", value=1.0), "schema_version"),
        (set_to("extra", value=1), "extra"),
        (set_to(*DIT, "extra", value=1), "config.dit.extra"),
        (set_to("components", "dit", "extra", value=1), "components.dit.extra"),
        (without("files"), "files: Field required"),
        (without("config", "dit"), "config.dit: Field required"),
        (without("files", "weights/dit.safetensors"), "is not listed in files"),
        (set_to("precision", value="int4"), "precision"),
        (set_to("target", value="cpu\x1b[2J"), "target"),
        (set_to("config", "name", value="a\x1b[2J"), "config.name"),
        (set_to("config", "name", value=""), "config.name"),
        (set_to("config", "task", value="t2x"), "config.task"),
        (set_to(*DIT, "dim", value=-1536), "config.dit.dim is -1536"),
        (set_to(*DIT, "dim", value=0), "config.dit.dim is 0"),
        (set_to(*DIT, "dim", value="128"), "config.dit.dim"),
        (set_to(*DIT, "dim", value=128.0), "config.dit.dim"),
        (set_to(*DIT, "dim", value=True), "config.dit.dim"),
        (set_to(*DIT, "dim", value=10**15), "config.dit.dim"),
        (set_to(*DIT, "dim", value=130), "multiple of 2 * dit.num_heads"),
        (set_to(*DIT, "num_layers", value=10**6), "config.dit.num_layers is 1000000"),
        (set_to(*DIT, "patch_size", value=[1, 2]), "config.dit.patch_size"),
        (set_to(*DIT, "patch_size", value=[1, 2, 1 << 12]), "patch_size is 4096"),
        (set_to(*DIT, "eps", value=0), "eps must be positive"),
        (set_to(*DIT, "eps", value=1e300), "config.dit.eps is 1e+300"),
        (set_to(*DIT, "vace_layers", value=[6]), "vace_layers must ascend"),
        (set_to(*DIT, "vace_layers", value=[2, 1]), "vace_layers must ascend"),
        (set_to(*DIT, "vace_layers", value=[-1]), "vace_layers is -1"),
        (set_to("config", "text_encoder", "vocab_size", value=1 << 40), "vocab_size"),
        (set_to("config", "vae", "latent_std", value=[0.0] * 16), "latent_mean and latent_std"),
        (set_to("config", "vae", "latent_mean", value=[0.0]), "latent_mean and latent_std"),
        (set_to("config", "vae", "latent_mean", value=[]), "latent_mean and latent_std"),
        (set_to("config", "vae", "multipliers", value=[1] * 40), "1 to 8 multipliers"),
        (set_to("config", "vae", "multipliers", value=[]), "1 to 8 multipliers"),
        (set_to("config", "vae", "temporal_downsample", value=[1, 1, 1]), "temporal_downsample"),
        (set_to("config", "defaults", "width", value=1 << 30), "config.defaults.width"),
        (set_to("config", "defaults", "steps", value=1 << 15), "config.defaults.steps"),
        (set_to("config", "defaults", "shift", value=0), "shift must be positive"),
        (set_to("config", "defaults", "guide_scale", value=1e9), "guide_scale is 1"),
        (set_to("config", "defaults", "prompt", value="x" * 30_000), "config.defaults.prompt"),
        (
            set_to("config", "defaults", value={"width": 65536, "height": 65536, "frames": 65533}),
            "latent values",
        ),
        (set_to("components", "Dit Evil", value={}), "components"),
        (set_to("components", "dit", "nodes", value=-1), "components.dit.nodes"),
        (set_to("components", "dit", "graph", value="weights/dit.safetensors"), "in graphs/"),
        (set_to("components", "dit", "weights", value=["graphs/dit.onnx"]), "in weights/"),
        (set_to("components", "dit", "engines", value={"cpu": "engines/k/x"}), "not listed"),
        (set_to("components", "dit", "engines", value={"cpu": "graphs/dit.onnx"}), "in engines/"),
        (set_to("files", "graphs/dit.onnx", "size", value=-1), "size"),
        (set_to("files", "graphs/dit.onnx", "size", value=1 << 60), "size"),
        (set_to("files", "graphs/dit.onnx", "sha256", value="0" * 63), "sha256"),
        (set_to("files", "graphs/dit.onnx", "sha256", value="G" * 64), "sha256"),
        (set_to("files", "graphs/dit.onnx", "sha256", value="0" * 64 + "\n"), "sha256"),
        (set_to("provenance", "created", value="yesterday"), "provenance.created"),
        (set_to("provenance", "source", value="x" * 5000), "provenance.source"),
        (set_to("provenance", "tools", value={"torch": 2}), "provenance.tools.torch"),
    ],
)
@pytest.mark.fault("hostile manifest")
def test_refuses_hostile_values(change: Callable[[dict[str, Any]], None], found: str) -> None:
    document = json.loads(manifest().to_json())
    change(document)
    assert found in refused(document)


@pytest.mark.parametrize(
    ("change", "found"),
    [
        (set_to("config", "image_encoder", value=None), "image_encoder must be there"),
        (set_to("config", "dit", "image_dim", value=None), "image_encoder must be there"),
        (set_to("config", "dit", "image_dim", value=1024), "must be the image_encoder's"),
        (set_to("config", "dit", "image_tokens", value=256), "must be the image_encoder's"),
        (set_to("config", "image_encoder", "num_heads", value=7), "multiple of num_heads"),
        (set_to("config", "image_encoder", "num_layers", value=1), "2 layers"),
        (set_to("config", "image_encoder", "eps", value=-1.0), "positive eps"),
        (set_to("config", "image_encoder", "image_size", value=225), "multiple of patch_size"),
        (set_to("config", "image_encoder", "image_size", value=1 << 15), "image_size is 32768"),
        (set_to("config", "image_encoder", "patch_size", value=0), "patch_size is 0"),
        (set_to("config", "image_encoder", "surprise", value=0), "surprise"),
    ],
)
def test_refuses_image_encoders_that_do_not_fit(
    change: Callable[[dict[str, Any]], None], found: str
) -> None:
    document = json.loads(manifest("i2v-14B").to_json())
    change(document)
    assert found in refused(document)


def refused(document: dict[str, Any]) -> str:
    with pytest.raises(CorruptInputError) as caught:
        parse_manifest(json.dumps(document).encode(), PATH)
    message = str(caught.value)
    assert message.startswith("b/manifest.json: ")
    assert message.isprintable()
    assert len(message) < 700
    return message


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\0" * 100,
        b"[]",
        b"null",
        b'"text"',
        b"{",
        b"\xff\xfe{}",
        b"[" * 100_000,
        b'{"a":' * 100_000,
        b'{"schema_version": NaN}',
        b'{"schema_version": 1, "schema_version": 1}',
        b'{"schema_version": ' + b"9" * 5000 + b"}",
        '{"schema_version": 1}'.encode("utf-16"),
        b'{"wanx_version": "\\ud800"}',
        b"{}",
    ],
)
def test_refuses_what_is_no_manifest(data: bytes) -> None:
    with pytest.raises(CorruptInputError) as caught:
        parse_manifest(data, PATH)
    assert str(caught.value).isprintable()


def test_refuses_a_duplicate_key_that_would_hide_a_file() -> None:
    text = manifest().to_json().decode()
    record = '"graphs/dit.onnx": {\n   "sha256"'
    assert record in text
    doubled = text.replace(record, '"graphs/dit.onnx": {},\n  ' + record)
    with pytest.raises(CorruptInputError, match="twice"):
        parse_manifest(doubled.encode(), PATH)


def test_numbers_beyond_float_are_refused() -> None:
    data = manifest().to_json().replace(b'"guide_scale": 2.5', b'"guide_scale": 1e999')
    assert b"1e999" in data
    with pytest.raises(CorruptInputError, match="guide_scale"):
        parse_manifest(data, PATH)


def test_control_codes_in_provenance_become_visible() -> None:
    """An exporter's path may hold anything; the manifest must be writable and safe to print."""
    provenance = manifest().provenance.model_dump() | {"source": "a\x1b[2J\udcff\nb"}
    written = manifest(provenance=Provenance(**provenance))
    assert written.provenance.source == "a\ufffd[2J\ufffd\ufffdb"
    assert parse_manifest(written.to_json(), PATH) == written


def test_exporters_cannot_write_what_readers_refuse() -> None:
    config = PRESETS["tiny"]
    wide = dataclasses.replace(config, dit=dataclasses.replace(config.dit, dim=1 << 20))
    with pytest.raises(ValidationError, match=r"config\.dit\.dim is 1048576"):
        manifest(config=wide)
    files = copy.copy(manifest().files)
    del files["graphs/dit.onnx"]
    with pytest.raises(ValidationError, match="not listed"):
        manifest(files=files)
