"""The weights of one component: which files hold them, and whether they are the ones expected."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from wanx.checkpoints.renamings import file_renaming, tensor_renaming
from wanx.checkpoints.tensors.float8 import decoded, formats_in
from wanx.checkpoints.tensors.gguf_file import is_gguf, read_gguf
from wanx.checkpoints.tensors.pickle_file import read_pickle
from wanx.checkpoints.tensors.source import SafetensorsTensor, TensorSource
from wanx.errors import CorruptInputError, UsageError, abbreviate, printable_name
from wanx.files.floats import FLOATS
from wanx.files.hub_cache import cached_blob, hub_name
from wanx.files.input_file import read_json_object
from wanx.files.safetensors import read_header

PICKLES = (".pth", ".pt", ".bin", ".ckpt")  # files of PyTorch
_MAX_LISTED = 10  # problems spelled out in one message
_SHARD = re.compile(r"-(\d{5})-of-(\d{5})(?:\.\w+)?\.safetensors$")
VARIANTS = ("bf16", "fp16")  # of Diffusers, the better one first
# The patch embedding is a Linear over the bytes of a Conv3d: [D, C, 1, 2, 2] is read as [D, 4C].
_FLATTENED = frozenset({"patch_embedding.weight", "vace_patch_embedding.weight"})


@dataclass(frozen=True, kw_only=True)
class ComponentWeights:
    """Weights of one network.

    Attributes:
        component: ``dit``, ``text_encoder``, ``image_encoder`` or ``vae``.
        tensors: sources by original tensor name; a name that no map knows stays as it is.
        files: the files they lie in.
        stored_name: turns an original name into the one that the files use, for messages.
    """

    component: str
    tensors: dict[str, TensorSource]
    files: tuple[Path, ...]
    stored_name: Callable[[str], str] = str

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors as stored."""
        return sum(source.stored_bytes for source in self.tensors.values())

    def check(self, expected: Mapping[str, tuple[int, ...]]) -> None:
        """Compare with what the network needs; see :func:`check_tensors`."""
        check_tensors(self.component, expected, self.tensors, self.stored_name)


def check_tensors(
    component: str,
    expected: Mapping[str, tuple[int, ...]],
    tensors: Mapping[str, TensorSource],
    stored_name: Callable[[str], str] = str,
) -> None:
    """Require exactly the expected tensors, as floats of the expected shapes.

    Args:
        component: named in the message.
        expected: shapes by original name.
        tensors: sources by original name.
        stored_name: turns an original name into the one that the files use.

    Raises:
        CorruptInputError: lists every missing, unexpected, misshaped or wrongly typed tensor.
    """
    # First, because the other formats bring tensors of their own, which would crowd these out.
    unread = {
        name: src for name, src in tensors.items() if name in expected and src.dtype not in FLOATS
    }
    problems = [
        f"{printable_name(src.name)} is {src.dtype} instead of F32, F16 or BF16"
        for src in unread.values()
    ]
    missing = [stored_name(name) for name in expected if name not in tensors]
    problems += [f"missing {name}" for name in missing]
    problems += [
        f"unexpected {printable_name(src.name)}"
        for name, src in tensors.items()
        if name not in expected
    ]
    for name, source in tensors.items():
        if name not in expected:
            continue
        shape, expected_shape = source.shape, tuple(expected[name])
        if name in _FLATTENED and len(expected_shape) == 2 and len(shape) > 2:
            shape = (shape[0], math.prod(shape[1:]))
        if shape != expected_shape:
            problems.append(
                f"{source.name} has shape {list(shape)} instead of {list(expected_shape)}"
            )
    if problems:
        stored = [source.name for source in tensors.values()]
        renaming = tensor_renaming(component, missing[:_MAX_LISTED], stored)
        remedy = renaming or "use a complete Wan2.1 checkpoint"
        if unread:
            types = ", ".join(sorted({source.dtype for source in unread.values()}))
            remedy = f"wanx reads no weights in {types}, so use the checkpoint in F32, F16 or BF16"
        listed = "; ".join(problems[:_MAX_LISTED])
        more = f"; and {len(problems) - _MAX_LISTED} more" if len(problems) > _MAX_LISTED else ""
        raise CorruptInputError(
            f"the {component} weights do not fit their network ({len(problems)} in all): {listed}"
            f"{more}; {remedy}"
        )


def open_weights(
    folder: Path, stem: str, *, full_precision: bool = False
) -> tuple[dict[str, TensorSource], tuple[Path, ...]]:
    """Open ``stem.safetensors``, its shards, or ``stem.pth`` in ``folder``.

    Args:
        folder: of the files.
        stem: their names without variants, shard numbers and suffixes.
        full_precision: take the copy without a variant where there are several.

    Returns:
        Sources by stored name, and the files they lie in.

    Raises:
        CorruptInputError: no such weights, shards missing, or a file is damaged or unsafe.
        UsageError: the folder holds them both in one file and as shards.
    """
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    found = weight_files(names, stem, full_precision=full_precision)
    indices = [name for name in found if name.endswith(".json")]
    shards = [name for name in found if _SHARD.search(name)]
    if indices:
        both = indices[0].partition(".index")[0]
        if both in names and hub_name(folder) is None:  # there nobody can remove one
            raise UsageError(
                f"{folder} holds both {both} and {indices[0]}; remove the one that is not meant"
            )
        return open_index(folder / indices[0])
    whole = [name for name in found if name not in shards]
    if whole:
        return open_files([folder / whole[0]])
    if not shards:
        raise CorruptInputError(
            f"{folder} holds neither {stem}.safetensors, its shards, nor {stem}.pth; "
            f"{file_renaming(folder, stem) or 'download it completely'}"
        )
    return open_files(_whole_set(folder, stem, shards))


def weight_files(names: Iterable[str], stem: str, *, full_precision: bool = False) -> list[str]:
    """Choose the files of one copy of weights among the names of a folder, sorted.

    Diffusers calls copies in fewer bits variants, and writes theirs in front of the suffix or of
    the shard's number (``diffusers/utils/hub_utils.py``).

    Args:
        names: of the files.
        stem: as for :func:`open_weights`.
        full_precision: likewise.

    Returns:
        Shards with their index, as Diffusers prefers them, or else a file of safetensors, or else
        one of PyTorch; none where there are none.
    """
    variant = rf"(?:\.({'|'.join(VARIANTS)}))?"
    pattern = re.compile(
        rf"{re.escape(stem)}{variant}(?:(?:-\d{{5}}-of-\d{{5}})?{variant}\.safetensors|"
        rf"\.safetensors{variant}\.index{variant}\.json)"
    )
    copies: dict[str, list[str]] = {}
    for name in sorted(names):
        if match := pattern.fullmatch(name):
            copies.setdefault("".join(filter(None, match.groups())), []).append(name)
        elif name == f"{stem}.pth":
            copies["pickle"] = [name]
    order = ("", *VARIANTS, "pickle") if full_precision else (*VARIANTS, "", "pickle")
    copy = next((copies[copy] for copy in order if copy in copies), [])
    sharded = [name for name in copy if name.endswith(".json") or _SHARD.search(name)]
    return sharded if any(name.endswith(".json") for name in sharded) else copy


def _whole_set(folder: Path, stem: str, shards: list[str]) -> list[Path]:
    """Check that shards are all there are, where no index says so."""
    match = _SHARD.search(shards[0])
    assert match is not None
    count, start, end = int(match[2]), match.start(1), match.end(1)
    first = shards[0]
    expected = [f"{first[:start]}{i:05d}{first[end:]}" for i in range(1, count + 1)]
    if missing := [name for name in expected if name not in shards]:
        raise CorruptInputError(
            f"{folder} holds {count - len(missing)} of {count} shards of {stem}, "
            f"missing {abbreviate(missing)}; download them"
        )
    if len(shards) != count:
        raise CorruptInputError(
            f"{folder} holds {len(shards)} shards of {stem}, of which {count} belong together; "
            "remove the others"
        )
    return [folder / shard for shard in shards]


def open_index(index: Path) -> tuple[dict[str, TensorSource], tuple[Path, ...]]:
    """Open the shards that an index names; see :func:`open_weights`."""
    weight_map = read_json_object(index).get("weight_map")
    if not (isinstance(weight_map, dict) and weight_map) or not all(
        isinstance(shard, str) for shard in weight_map.values()
    ):
        raise CorruptInputError(f"{index} has no weight_map of file names; download it again")
    shards = {name: _shard_path(index, name) for name in dict.fromkeys(weight_map.values())}
    if missing := [name for name, path in shards.items() if not path.exists()]:
        raise CorruptInputError(
            f"{index.parent} lacks {len(missing)} of {len(shards)} shards: {abbreviate(missing)}; "
            "download them"
        )
    files = tuple(shards.values())
    tensors, formats = _stored_in(files)
    misplaced = [
        f"{name} in {shard}"
        for name, shard in weight_map.items()
        if name not in tensors or tensors[name].file != shards[shard]
    ]
    if misplaced:
        raise CorruptInputError(
            f"{index}: {len(misplaced)} of {len(weight_map)} tensors are not where it says: "
            f"{abbreviate(misplaced)}; download the index and its shards again"
        )
    return decoded(tensors, formats), files


def _shard_path(index: Path, name: str) -> Path:
    """Path of a shard, which must lie in the index's folder.

    A link may lead to the blobs of the Hugging Face cache that the folder is part of.
    """
    folder = Path(os.path.realpath(index.parent))
    if re.fullmatch(r"[\w.+-]+(/[\w.+-]+)*\.safetensors", name) and ".." not in name.split("/"):
        target = Path(os.path.realpath(folder / name))
        if target.is_relative_to(folder) or cached_blob(folder / name):
            return index.parent / name
    raise CorruptInputError(
        f"{index} names the shard {name[:80]!r}, which is not a file of its folder; "
        "put the shards themselves beside the index"
    )


def open_files(paths: Iterable[Path]) -> tuple[dict[str, TensorSource], tuple[Path, ...]]:
    """Open files that belong together: safetensors, GGUF, or PyTorch's, whatever they are called.

    Tensors of 8 bits are joined with their scales; see :func:`decoded`.

    Raises:
        CorruptInputError: a file is damaged or unsafe, or two hold the same tensor.
        EnvironmentMismatchError: a package that reads one is missing.
        UsageError: numbers are in a format that is not read.
    """
    files = tuple(paths)
    tensors, formats = _stored_in(files)
    return decoded(tensors, formats), files


def _stored_in(files: Iterable[Path]) -> tuple[dict[str, TensorSource], dict[str, str]]:
    """Tensors as files hold them, and the formats of layers that headers name."""
    tensors: dict[str, TensorSource] = {}
    formats: dict[str, str] = {}
    for path in files:
        found: Mapping[str, TensorSource]
        if path.suffix in PICKLES:
            found = read_pickle(path)
        elif is_gguf(path):
            found = read_gguf(path).tensors
        else:
            header = read_header(path)
            formats |= formats_in(path, header.metadata)
            found = {name: SafetensorsTensor.from_ref(ref) for name, ref in header.entries.items()}
        for name, source in found.items():
            if name in tensors:
                raise CorruptInputError(
                    f"{path} holds {name[:80]!r}, as {tensors[name].file.name} already does; "
                    "download the shards again"
                )
            tensors[name] = source
    return tensors, formats
