"""PyTorch's .pth files, read without running what they may carry and without loading them."""

from __future__ import annotations

import re
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from wanx.checkpoints.tensor_source import CHUNK_BYTES, TensorSource
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
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # a hostile or damaged pickle can raise anything
        if match := re.search(r"(?:GLOBAL|global|class|function) ([\w.]+)", str(error)):
            raise CorruptInputError(
                f"{path} would run {match[1]!r} when loaded, so it was refused; {_WAY_OUT}"
            ) from None
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
    """Refuse what cannot be mapped: compressed entries could also expand without bound."""
    with open_input(path) as file:
        try:
            with zipfile.ZipFile(file) as archive:
                stored = all(e.compress_type == zipfile.ZIP_STORED for e in archive.infolist())
        except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError):
            raise CorruptInputError(
                f"{path} is not a whole PyTorch archive (truncated, or from before PyTorch 1.6); "
                f"download it again, or {_WAY_OUT}"
            ) from None
    if not stored:
        raise CorruptInputError(f"{path} holds compressed entries, unlike torch.save; {_WAY_OUT}")


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
