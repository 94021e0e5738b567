"""PyTorch's .pth files, read without running what they may carry and without loading them."""

from __future__ import annotations

import re
import warnings
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from wanx.checkpoints.tensors.pickle_scan import MAX_PICKLE_BYTES, PickleError, scan_pickle
from wanx.checkpoints.tensors.source import CHUNK_BYTES, TensorSource
from wanx.config.number_formats import FLOATS
from wanx.errors import CorruptInputError
from wanx.files.input_file import open_input

if TYPE_CHECKING:
    import torch

_WAY_OUT = (
    "get it as .safetensors, or load it on an isolated machine and save its tensors with "
    "safetensors.torch.save_file"
)


@dataclass(frozen=True, kw_only=True)
class PickledTensor(TensorSource):
    """A tensor of a .pth file, mapped into memory: its pages come from the file when read."""

    tensor: torch.Tensor

    def iter_bytes(self, chunk: int = CHUNK_BYTES) -> Iterator[memoryview]:
        """Yield the bytes; a tensor that is not contiguous is copied whole first."""
        import torch

        data = self.tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data
        for begin in range(0, self.nbytes, chunk):
            yield data[begin : begin + chunk]


def read_pickle(path: Path) -> dict[str, TensorSource]:
    """Map the tensors of a .pth file that holds a plain dictionary of them.

    Raises:
        CorruptInputError: the file is damaged, or holds anything besides tensors.
    """
    import torch

    _check_archive(path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of unusual versions of the format, say
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # a hostile or damaged pickle can raise anything
        if match := re.search(r"(?:GLOBAL|global|class|function) ([\w.]+)", str(error)):
            raise _would_run(path, match[1]) from None
        raise CorruptInputError(
            f"{path} cannot be read as tensors ({type(error).__name__}); download it again, or "
            f"{_WAY_OUT}"
        ) from None
    if not isinstance(state, dict) or not state:
        raise CorruptInputError(
            f"{path} holds a {type(state).__name__} and no dictionary of tensors; {_WAY_OUT}"
        )
    size = path.stat().st_size
    return {name: _source(path, name, value, size) for name, value in state.items()}


def _check_archive(path: Path) -> None:
    """Refuse what cannot be mapped, and a pickle that builds more than a dictionary of tensors."""
    with open_input(path) as file:
        try:
            with zipfile.ZipFile(file) as archive:
                entries = archive.infolist()
                stored = all(entry.compress_type == zipfile.ZIP_STORED for entry in entries)
                # PyTorch finds entries without regard to case; there must be no other to find.
                names = {entry.filename.lower() for entry in entries}
                pickles = [e for e in entries if e.filename.lower().endswith("/data.pkl")]
                sound = len(names) == len(entries) and len(pickles) == 1
                size = MAX_PICKLE_BYTES + 1
                data = archive.open(pickles[0]).read(size) if stored and sound else b""
        except Exception:  # a damaged archive makes zipfile raise many kinds
            sound = False
    if not sound:
        raise CorruptInputError(
            f"{path} is not a whole PyTorch archive (truncated, or from before PyTorch 1.6); "
            f"download it again, or {_WAY_OUT}"
        )
    if not stored:  # they could expand without bound
        raise CorruptInputError(f"{path} holds compressed entries, unlike torch.save; {_WAY_OUT}")
    try:
        scan_pickle(data)
    except PickleError as error:
        if error.function:
            raise _would_run(path, error.function) from None
        raise CorruptInputError(
            f"{path} cannot be read as tensors ({error}); download it again, or {_WAY_OUT}"
        ) from None


def _would_run(path: Path, function: str) -> CorruptInputError:
    if function.startswith("torch."):
        return CorruptInputError(
            f"{path} holds more than dense tensors: it needs {function!r:.80}; {_WAY_OUT}"
        )
    return CorruptInputError(
        f"{path} would run {function!r:.80} when loaded, so it was refused; {_WAY_OUT}"
    )


def _source(path: Path, name: object, value: object, file_size: int) -> PickledTensor:
    import torch

    dtypes = {getattr(torch, row.torch): row.safetensors for row in FLOATS}
    if not isinstance(name, str) or not isinstance(value, torch.Tensor):
        raise CorruptInputError(
            f"{path} holds {str(name)[:80]!r}, a {type(value).__name__}, among its tensors; "
            f"{_WAY_OUT}"
        )
    dense = value.layout == torch.strided and value.device.type == "cpu"
    nbytes = value.numel() * value.element_size()
    # a stride of 0 lets a small file claim a tensor of any size
    if not dense or value.dtype not in dtypes or nbytes > file_size:
        raise CorruptInputError(
            f"{path}: tensor {name[:80]!r} is {value.dtype}, {value.layout}, {nbytes} bytes; "
            "expected a dense float32, float16 or bfloat16 tensor no larger than its file"
        )
    return PickledTensor(
        name=name,
        dtype=dtypes[value.dtype],
        shape=tuple(value.shape),
        nbytes=nbytes,
        file=path,
        tensor=value,
    )
