"""The manifest of a bundle: what it holds, how it was made, and the SHA-256 of every file.

A bundle may come from anywhere, so everything read here is bounded: no path leaves the bundle, no
number asks for an absurd allocation, no text carries terminal control codes.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    AwareDatetime,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StringConstraints,
    ValidationError,
    model_validator,
)

from wanx.config import ModelConfig, RunDefaults, Task
from wanx.errors import CorruptInputError, EnvironmentMismatchError
from wanx.input_file import parse_json_object

SCHEMA_VERSION = 1
MANIFEST = "manifest.json"
TOKENIZER = "tokenizer/tokenizer.json"
FOLDERS = ("graphs", "weights", "engines", "tokenizer", "golden")

_PATH = re.compile(rf"({'|'.join(FOLDERS)})(/[A-Za-z0-9_][A-Za-z0-9_.+-]{{0,127}}){{1,6}}")

# Integers of wanx.config that need another ceiling than _LARGEST.
_LARGEST = 1 << 16
_CEILINGS = {
    "vocab_size": 1 << 20,
    "num_heads": 1024,
    "num_layers": 1024,
    "num_res_blocks": 64,
    "patch_size": 16,
    "multipliers": 64,
    "image_frames": 64,
    "text_len": 4096,
    "text_dim": 1 << 14,
    "image_tokens": 4096,
    "image_dim": 1 << 14,
    "image_size": 1024,
    "in_dim": 1024,
    "out_dim": 1024,
    "z_dim": 1024,
    "vace_in_dim": 1024,
    "fps": 1000,
    "steps": 10_000,
}
_MAX_TEXT = 20_000
_MAX_LATENT_VALUES = 1 << 27  # 512 MiB of float32; 720p, 81 frames, VACE is 29 M


def printable(text: object) -> str:
    """``text`` as one line that is safe to print: control characters and the like replaced."""
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in str(text))


def _bundle_path(path: str) -> str:
    if not _PATH.fullmatch(path):
        raise ValueError(f"a path must be plain and inside {', '.join(FOLDERS)}")
    return path


def _printable_text(value: object) -> object:
    return printable(value) if isinstance(value, str) else value


BundlePath = Annotated[str, AfterValidator(_bundle_path)]
Sha256 = Annotated[str, StringConstraints(pattern="^[0-9a-f]{64}$")]
Name = Annotated[str, StringConstraints(pattern="^[a-z][a-z0-9_.:-]{0,63}$")]
Text = Annotated[str, BeforeValidator(_printable_text), StringConstraints(max_length=4096)]
Count = Annotated[int, Field(ge=0, le=1 << 31)]


def _leaves(name: str, value: object) -> Iterator[tuple[str, Any]]:
    """Every leaf of a configuration with its dotted name."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        for item in dataclasses.fields(value):
            yield from _leaves(f"{name}.{item.name}", getattr(value, item.name))
    elif isinstance(value, tuple):
        yield f"{name}.length", len(value)
        for element in value:
            yield from _leaves(name, element)
    else:
        yield name, value


def _bounded_config(config: ModelConfig) -> ModelConfig:
    """Refuse sizes that no Wan2.1 has, before anything is allocated from them."""
    for name, value in _leaves("config", config):
        leaf = name.rsplit(".", 1)[-1]
        if isinstance(value, str):
            if len(value) > _MAX_TEXT or (
                leaf == "name" and (not value or not value.isprintable())
            ):
                raise ValueError(f"{name} is not an acceptable text ({len(value)} characters)")
        elif isinstance(value, float):
            if not math.isfinite(value) or abs(value) > 1e6:
                raise ValueError(f"{name} is {value}, which is out of range")
        elif value is not None and not isinstance(value, bool):
            least = 0 if leaf in ("vace_layers", "length") else 1
            most = _CEILINGS.get(leaf, _LARGEST)
            if not least <= value <= most:
                raise ValueError(f"{name} is {value}, outside {least}..{most}")
    dit, vae, run = config.dit, config.vae, config.defaults
    image = config.image_encoder
    requirements = {
        "dit.dim must be a multiple of 2 * dit.num_heads": dit.dim % (2 * dit.num_heads) == 0,
        "dit.vace_layers must ascend and name blocks": (
            list(dit.vace_layers) == sorted(set(dit.vace_layers))
            and all(layer < dit.num_layers for layer in dit.vace_layers)
        ),
        "vae.latent_mean and latent_std must have vae.z_dim values, std > 0": (
            len(vae.latent_mean) == len(vae.latent_std) == vae.z_dim and min(vae.latent_std) > 0
        ),
        "vae needs 1 to 8 multipliers and one temporal_downsample less": (
            1 <= len(vae.multipliers) <= 8
            and len(vae.temporal_downsample) == len(vae.multipliers) - 1
        ),
        "eps must be positive": min(dit.eps, config.text_encoder.eps) > 0,
        "image_encoder must be there where dit.image_dim is": (
            (image is None) == (dit.image_dim is None)
        ),
        "defaults.shift must be positive": run.shift > 0,
    }
    if image is not None:
        requirements |= {
            "image_encoder.dim must be a multiple of num_heads": image.dim % image.num_heads == 0,
            "image_encoder.image_size must be a multiple of patch_size": (
                image.image_size % image.patch_size == 0
            ),
            "image_encoder needs 2 layers or more and a positive eps": (
                image.num_layers >= 2 and image.eps > 0
            ),
            "dit.image_dim and image_tokens must be the image_encoder's": (
                (dit.image_dim, dit.image_tokens) == (image.dim, image.tokens)
            ),
        }
    for requirement, holds in requirements.items():
        if not holds:
            raise ValueError(f"config.{requirement}")
    channels = max(dit.in_dim, dit.out_dim, dit.vace_in_dim, vae.z_dim)
    latent_frames = (run.frames - 1) // vae.temporal_stride + 1
    values = run.width * run.height // vae.spatial_stride**2 * latent_frames * channels
    if values > _MAX_LATENT_VALUES:
        raise ValueError(f"config.defaults ask for {values} latent values ({_MAX_LATENT_VALUES=})")
    return config


class _Record(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)


class FileRecord(_Record):
    """What a file of the bundle must be: its SHA-256 (hex) and its size in bytes."""

    sha256: Sha256
    size: Annotated[int, Field(ge=0, le=1 << 44)]


class Component(_Record):
    """One network: its graph, the weight files that the graph may read, what is inside.

    ``engines`` names, per target, what runs instead of the portable graph.
    ``storage`` counts the stored tensors by dtype, ``nodes`` the nodes of the graph.
    """

    graph: BundlePath
    engines: dict[Name, BundlePath] = {}
    weights: tuple[BundlePath, ...] = ()
    storage: dict[Text, Count]
    nodes: Count
    inputs: tuple[Text, ...]
    outputs: tuple[Text, ...]


class Provenance(_Record):
    """Where the weights came from and which tools made the bundle (name to version)."""

    source: Text
    source_layout: Text
    source_sha256: Sha256
    tools: dict[Text, Text]
    created: AwareDatetime


class Manifest(_Record):
    """The content of ``manifest.json``; ``files`` lists every other file of the bundle."""

    schema_version: Annotated[int, Field(ge=1, le=SCHEMA_VERSION)] = SCHEMA_VERSION
    wanx_version: Text
    config: Annotated[ModelConfig, AfterValidator(_bounded_config)]
    precision: Literal["fp32", "bf16", "fp16", "int8", "fp8"]
    target: Name
    components: dict[Name, Component]
    provenance: Provenance
    files: dict[BundlePath, FileRecord]

    @property
    def name(self) -> str:
        """Preset the model was built from, or the name its exporter gave it."""
        return self.config.name

    @property
    def task(self) -> Task:
        """What the model does: t2v, i2v, flf2v or vace."""
        return self.config.task

    @property
    def defaults(self) -> RunDefaults:
        """Options of a run that the user leaves out."""
        return self.config.defaults

    @model_validator(mode="after")
    def _components_use_listed_files(self) -> Self:
        for name, component in self.components.items():
            if not component.graph.startswith("graphs/"):
                raise ValueError(f"the graph of {name} must be in graphs/: {component.graph}")
            for path in (component.graph, *component.engines.values(), *component.weights):
                if path not in self.files:
                    raise ValueError(f"{path}, used by {name}, is not listed in files")
            for path in component.engines.values():
                if not path.startswith("engines/"):
                    raise ValueError(f"the engines of {name} must be in engines/: {path}")
            for path in component.weights:
                if not path.startswith("weights/"):
                    raise ValueError(f"the weights of {name} must be in weights/: {path}")
        return self

    def to_json(self) -> bytes:
        """The bytes of ``manifest.json``; their SHA-256 identifies the bundle."""
        return self.model_dump_json(indent=1).encode() + b"\n"


def parse_manifest(data: bytes, path: Path) -> Manifest:
    """Read the bytes of the ``manifest.json`` found at ``path``.

    Raises:
        EnvironmentMismatchError: a newer wanx wrote it.
        CorruptInputError: it is not a manifest, or holds values that no exporter writes.
    """
    version = parse_json_object(data, path).get("schema_version")
    if type(version) is int and version > SCHEMA_VERSION:
        raise EnvironmentMismatchError(
            f"{path}: written by a newer wanx (schema {version}, this one reads "
            f"{SCHEMA_VERSION}): upgrade wanx"
        )
    try:
        return Manifest.model_validate_json(data)
    except ValidationError as error:
        raise CorruptInputError(
            f"{path}: not an acceptable manifest: {_first_problem(error)}: "
            "copy or export the bundle again"
        ) from None


def _first_problem(error: ValidationError) -> str:
    first = error.errors(include_url=False, include_context=False)[0]
    where = ".".join(str(part) for part in first["loc"]) or "manifest"
    seen = (
        "" if isinstance(first["input"], dict | ModelConfig) else f" (found {first['input']!r:.60})"
    )
    more = f", and {error.error_count() - 1} more" if error.error_count() > 1 else ""
    return printable(f"{where:.120}: {first['msg'].removeprefix('Value error, '):.240}{seen}{more}")
