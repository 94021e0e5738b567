"""The manifest of a bundle: what it holds, how it was made, and the SHA-256 of every file.

A bundle may come from anywhere, so everything read here is bounded: no path leaves the bundle, no
number asks for an absurd allocation, no text carries terminal control codes.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import (
    AfterValidator,
    AwareDatetime,
    BeforeValidator,
    Field,
    StringConstraints,
    ValidationError,
    model_validator,
)

from wanx.bundle.record import Record, first_problem, printable
from wanx.config.limits import bounded_config
from wanx.config.models import ModelConfig, RunDefaults, Task
from wanx.config.number_formats import PRECISIONS, QUANTIZED, one_of
from wanx.errors import CorruptInputError, EnvironmentMismatchError
from wanx.files.input_file import parse_json_object

SCHEMA_VERSION = 1
MANIFEST = "manifest.json"
TOKENIZER = "tokenizer/tokenizer.json"
FOLDERS = ("graphs", "weights", "engines", "tokenizer", "golden")

_PATH = re.compile(rf"({'|'.join(FOLDERS)})(/[A-Za-z0-9_][A-Za-z0-9_.+-]{{0,127}}){{1,6}}")


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
Scale = Annotated[float, Field(gt=0, le=1e30)]
Precision = Annotated[str, StringConstraints(pattern=one_of(row.name for row in PRECISIONS))]
Scheme = Annotated[
    str, StringConstraints(pattern=one_of([*(row.name for row in QUANTIZED), "int8-weight"]))
]
Decibel = Annotated[float, Field(ge=-1000, le=1000)]


class FileRecord(Record):
    """Identity of a file of the bundle: its SHA-256 (hex) and its size in bytes."""

    sha256: Sha256
    size: Annotated[int, Field(ge=0, le=1 << 44)]


class QuantizedLayer(Record):
    """One 8-bit layer of a recipe.

    ``input_scale`` is the step between two neighbouring 8-bit inputs (None: found while running, or
    inputs stay high), ``sqnr_db`` the signal-to-noise ratio of its output on recorded inputs.
    """

    input_scale: Scale | None = None
    sqnr_db: Decibel | None = None


class Quantization(Record):
    """The recipe of a component, and what its built graph holds.

    ``unquantized_layers`` gives, for each layer that could be 8-bit and is not, the reason.
    ``kept_weights`` counts the layers whose 8-bit numbers and scales are those of the checkpoint.
    ``verified_counts`` counts the 8-bit layers by kind, read back from the graph; ``kernels`` what
    the target ran for one forward, by operator.
    """

    scheme: Scheme
    weight_scale: Literal["channel", "tensor"]
    activation_scale: Literal["static", "dynamic", "none"]
    smooth: Annotated[float, Field(ge=0, le=1)] = 0.0
    # Written as "high", which every version reads; the option is called none.
    attention: Literal["high", "none", "fp8"] = "high"
    layers: dict[Text, QuantizedLayer]
    unquantized_layers: Annotated[dict[Text, Text], Field(alias="kept")]
    kept_weights: Count = 0
    verified_counts: Annotated[dict[Text, Count], Field(alias="found")]
    kernels: dict[Text, Count] = Field(default_factory=dict)


class ActivationBytes(Record):
    """Most memory that the values of a graph take at a time: ``fixed + each · size`` bytes.

    ``size`` is that of its dynamic axes, multiplied: tokens, or the places of a latent frame.
    Inputs, outputs and state are among them; weights are not.
    """

    fixed: Annotated[int, Field(ge=-(1 << 44), le=1 << 44)]
    each: Annotated[int, Field(ge=0, le=1 << 40)]


class Component(Record):
    """One network: its graph, the weight files that the graph may read, what is inside.

    ``engines`` names, per target, what runs instead of the portable graph.
    ``storage`` counts the stored tensors by dtype, ``nodes`` the nodes of the graph.
    ``tile_border`` is how many latent rows and columns around a tile its inner part depends on;
    None where the graph needs whole frames. ``activation_bytes`` is None in bundles of earlier
    versions.
    """

    graph: BundlePath
    engines: dict[Name, BundlePath] = Field(default_factory=dict)
    weights: tuple[BundlePath, ...] = ()
    storage: dict[Text, Count]
    nodes: Count
    inputs: tuple[Text, ...]
    outputs: tuple[Text, ...]
    quantization: Quantization | None = None
    tile_border: Annotated[int, Field(ge=0, le=256)] | None = None
    activation_bytes: ActivationBytes | None = None


class LoraRecord(Record):
    """A LoRA in the weights of the DiT.

    ``matched`` counts the tensors of the file that are in, ``unmatched`` names those that fit none
    of the model's.
    """

    file: Text
    sha256: Sha256
    strength: Annotated[float, Field(ge=-1e6, le=1e6)]
    matched: Count
    unmatched: tuple[Text, ...] = ()


class Provenance(Record):
    """Origin of the weights, and the tools that wrote the bundle (name to version)."""

    source: Text
    source_layout: Text
    source_sha256: Sha256
    tools: dict[Text, Text]
    created: AwareDatetime
    loras: tuple[LoraRecord, ...] = ()


class Manifest(Record):
    """The content of ``manifest.json``; ``files`` lists every other file of the bundle."""

    schema_version: Annotated[int, Field(ge=1, le=SCHEMA_VERSION)] = SCHEMA_VERSION
    wanx_version: Text
    config: Annotated[ModelConfig, AfterValidator(bounded_config)]
    precision: Precision
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
        """Task of the model: t2v, i2v, flf2v or vace."""
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
        return self.model_dump_json(indent=1, by_alias=True).encode() + b"\n"


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
            f"{path}: not an acceptable manifest: {first_problem(error, 'manifest')}: "
            "copy or export the bundle again"
        ) from None
