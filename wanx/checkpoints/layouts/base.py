"""Interface of layouts."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from pathlib import Path

from wanx.checkpoints.part import Part
from wanx.checkpoints.renamings import file_renaming
from wanx.checkpoints.tokenizer_source import TokenizerSource
from wanx.errors import CorruptInputError


class Layout(ABC):
    """A place that has some parts of a checkpoint, or all of them.

    Attributes:
        name: such as ``original``.
        source: its folder or file.
        full_precision: whether copies of weights in fewer bits, beside others, are left alone.
    """

    name: str

    def __init__(self, source: Path, *, full_precision: bool = False) -> None:
        """Look at ``source``, which is there; no part is opened yet."""
        self.source, self.full_precision = source, full_precision

    @abstractmethod
    def part(self, component: str) -> Part:
        """Open a part.

        Raises:
            CorruptInputError: its files are missing, damaged, unsafe or contradict each other.
            UsageError: it is not one of Wan2.1's.
        """

    @abstractmethod
    def tokenizer(self) -> TokenizerSource | None:
        """Find the tokenizer; None where it comes with the text encoder, if at all.

        Raises:
            CorruptInputError: it is missing.
        """

    def require(self, components: tuple[str, ...], *, tokenizer: bool) -> None:
        """Look for the files of several parts at once, so that one message names all.

        Raises:
            CorruptInputError: files are missing.
        """
        return  # a layout without files of fixed names has nothing to look for


def require_files(source: Path, *needed: str) -> None:
    """Look for files.

    Args:
        source: the folder.
        needed: paths in it, or several with `` or `` between them.

    Raises:
        CorruptInputError: lists those that are missing.
    """
    missing = [
        names
        for names in needed
        if not any((source / name).exists() for name in names.split(" or "))
    ]
    if missing:
        # Of "a.pth or a.safetensors" the stem is a, whatever the suffix of what is there.
        stems = [re.sub(r"\.(pth|safetensors) or .*", "", names) for names in missing]
        renamings = [file_renaming(source, stem) for stem in stems]
        if all(renamings):
            remedy = ", and ".join(filter(None, renamings))
        else:
            remedy = "download it completely"
        raise CorruptInputError(f"{source} lacks {', '.join(missing)}; {remedy}")
