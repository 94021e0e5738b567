"""Cache of traced graphs and of the tensors that networks have.

Both depend on the configuration of a network, the layout of its recipe, and the code that traces,
not on weights. Those of the presets are shipped with wanx (``shipped.zip``, written by
``tools/shipped_graphs.py``); others are kept in the user's cache folder, where the versions of the
tracing packages count too. An entry that is damaged, or of other code, is traced anew.
"""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import os
import threading
import zipfile
import zlib
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from wanx.config.models import ModelConfig
from wanx.config.number_formats import FP32
from wanx.exporter.graph.stored_graph import graph_from_bytes, graph_to_bytes
from wanx.files.atomic import replacing
from wanx.files.cache import cache_path
from wanx.version import __version__

if TYPE_CHECKING:
    import onnx_ir as ir

    from wanx.exporter.quantization.recipe import Recipe

SHIPPED = Path(__file__).parent / "shipped.zip"
MAX_BYTES = 256 << 20  # of the user's cache; a 14B takes 40 kB
TRACERS = ("torch", "onnx", "onnx-ir", "onnxscript")
# Files below wanx/ that decide what a trace is.
_SOURCES = (
    *("models/**/*.py", "kernels/**/*.py", "config/models.py", "config/number_formats.py"),
    *("exporter/graph/trace.py", "exporter/graph/repeat.py", "exporter/components.py"),
    *(
        "exporter/graph/stored_graph.py",
        "exporter/graph/liveness.py",
        "exporter/graph/value_shapes.py",
    ),
    "exporter/trace_component.py",
    *(f"exporter/quantization/{name}.py" for name in ("quantized_spec", "recipe", "scheme")),
)

# What reading an archive raises that is missing or damaged.
_UNREADABLE = (
    OSError, KeyError, EOFError, RuntimeError, ValueError, zlib.error, zipfile.BadZipFile
)  # fmt: skip
_reading = threading.Lock()  # an archive has one place in its file for all threads

T = TypeVar("T")
Tensors = Mapping[str, tuple[int, ...]]
_log = logging.getLogger("wanx.exporter")


class GraphCache:
    """Graphs and tensors by what they depend on; see the module.

    Args:
        use: False traces everything, and keeps nothing.
    """

    def __init__(self, *, use: bool = True) -> None:
        self._use = use
        self._folder = cache_path("graphs") if use else None

    def graph(
        self,
        component: str,
        config: ModelConfig,
        recipe: Recipe | None,
        trace: Callable[[], ir.Model],
        computes: str = FP32.name,
    ) -> ir.Model:
        """Graph of a component without its weights, from the cache or by ``trace``."""
        key = graph_key(component, config, recipe, computes)
        return self._find(key, graph_from_bytes, trace, graph_to_bytes)

    def has_graph(
        self,
        component: str,
        config: ModelConfig,
        recipe: Recipe | None,
        computes: str = FP32.name,
    ) -> bool:
        """True if :meth:`graph` traces nothing, unless the entry is damaged."""
        if not self._use:
            return False
        key = graph_key(component, config, recipe, computes)
        path = self._path(key)
        return _shipped(key) is not None or (path is not None and path.is_file())

    def tensors(self, group: str, config: ModelConfig, build: Callable[[], Tensors]) -> Tensors:
        """Names and shapes of the tensors of a group of weights."""
        return self._find(tensors_key(group, config), _tensors_from_bytes, build, tensors_to_bytes)

    def _find(
        self,
        key: str,
        decode: Callable[[bytes], T],
        make: Callable[[], T],
        encode: Callable[[T], bytes],
    ) -> T:
        if not self._use:
            return make()
        if (data := _shipped(key)) is not None:
            return decode(data)
        path = self._path(key)
        if path is not None and (data := _read(path)) is not None:
            return decode(data)
        data = encode(make())
        if path is not None:
            _write(path, data)
        return decode(data)  # what the next one gets too

    def _path(self, key: str) -> Path | None:
        return None if self._folder is None else self._folder / f"{_with_tracers(key)}.zlib"


def graph_key(
    component: str, config: ModelConfig, recipe: Recipe | None, computes: str = FP32.name
) -> str:
    """Key of a component's graph: its network's configuration, its recipe's layout, its type."""
    group = "vae" if component.startswith("vae_") else component
    layout = None if recipe is None else recipe.layout()
    facts = ["graph", component, _config_of(group, config), layout]
    return _digest(facts if computes == FP32.name else [*facts, computes])


def tensors_key(group: str, config: ModelConfig) -> str:
    """Key of the tensors of a group of weights."""
    return _digest(["tensors", group, _config_of(group, config)])


def _config_of(group: str, config: ModelConfig) -> object:
    part = getattr(config, group)
    return None if part is None else asdict(part)


def _digest(facts: object) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:32]


@functools.cache
def sources_digest() -> str:
    """Digest of the code that decides what a trace is."""
    package = Path(__file__).parents[2]
    digest = hashlib.sha256()
    for path in sorted({path for pattern in _SOURCES for path in package.glob(pattern)}):
        text = path.read_bytes().replace(b"\r\n", b"\n")
        digest.update(f"{path.relative_to(package).as_posix()} {len(text)}\n".encode() + text)
    return digest.hexdigest()


def _with_tracers(key: str) -> str:
    return _digest([key, __version__, sources_digest(), [_version(name) for name in TRACERS]])


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


@functools.cache
def _archive() -> zipfile.ZipFile | None:
    """The shipped entries; None where there are none, or they were made by other code."""
    with suppress(*_UNREADABLE):
        archive = zipfile.ZipFile(SHIPPED)
        if archive.read("sources").decode() == sources_digest():
            return archive
    return None


def _shipped(key: str) -> bytes | None:
    archive = _archive()
    if archive is None or key not in archive.NameToInfo:
        return None
    with suppress(*_UNREADABLE), _reading:
        return archive.read(key)
    return None


def tensors_to_bytes(tensors: Tensors) -> bytes:
    """Serialise names and shapes."""
    return json.dumps({name: list(shape) for name, shape in tensors.items()}).encode()


def _tensors_from_bytes(data: bytes) -> Tensors:
    return {name: tuple(shape) for name, shape in json.loads(data).items()}


def _read(path: Path) -> bytes | None:
    """Data that :func:`_write` wrote; None where there is nothing, or other bytes."""
    try:
        digest, packed = (data := path.read_bytes())[:32], data[32:]
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        _log.warning("the graph cache cannot be read (%s: %s); tracing", path, error.strerror)
        return None
    if hashlib.sha256(packed).digest() != digest:
        _log.warning("%s is damaged; tracing its graph again", path)
        return None
    with suppress(OSError):
        os.utime(path)  # used last, and so removed last
    return zlib.decompress(packed)


def _write(path: Path, data: bytes) -> None:
    packed = zlib.compress(data)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as temporary:
            temporary.write_bytes(hashlib.sha256(packed).digest() + packed)
        _shrink(path.parent)
    except OSError as error:
        _log_unwritable(str(path.parent), error.strerror or "")


@functools.cache
def _log_unwritable(folder: str, reason: str) -> None:
    """Say it once, not for each graph."""
    _log.warning("the graph cache %s cannot be written (%s); it is not kept", folder, reason)


def _shrink(folder: Path) -> None:
    """Remove the entries that were used longest ago, until the rest fits."""
    entries = []
    for entry in folder.iterdir():
        with suppress(FileNotFoundError):  # another process shrinks it too
            entries.append((entry.stat().st_mtime, entry.stat().st_size, entry))
    total = 0
    for _, size, entry in sorted(entries, reverse=True):
        total += size
        if total > MAX_BYTES:
            entry.unlink(missing_ok=True)
