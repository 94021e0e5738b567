"""Choice of a repository's files that make up a checkpoint."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from wanx.checkpoints.layouts.diffusers import DiffusersLayout
from wanx.checkpoints.layouts.files import WEIGHT_FILES
from wanx.checkpoints.layouts.original import DIT_STEM, OriginalLayout
from wanx.errors import UsageError, abbreviate


def checkpoint_files(
    where: str, names: Sequence[str], *, without: Collection[str] = (), full_precision: bool = False
) -> list[str]:
    """Choose the files that an export reads.

    Args:
        where: the repository, for errors.
        names: of all its files.
        without: parts that come from elsewhere, such as ``dit`` or ``tokenizer``.
        full_precision: take weights in fp32 where a copy in fewer bits lies beside them.

    Returns:
        Weights in one format and one copy, configs and the tokenizer; parts that are missing are
        for the layout to name.

    Raises:
        UsageError: the repository is of no layout.
    """
    for layout in (DiffusersLayout, OriginalLayout):
        if found := layout.files(names, full_precision=full_precision):
            # The text encoder's config tells nothing about a tokenizer beside it.
            return [name for part, files in found.items() if part not in without for name in files]
    pickles = [name for name in names if name.endswith((".bin", ".bin.index.json"))]
    weights = [n for n in names if n.endswith(WEIGHT_FILES) and n not in pickles]
    if pickles and any(name.rpartition("/")[2].startswith(DIT_STEM) for name in pickles):
        raise UsageError(
            f"{where} has its transformer in {abbreviate(pickles, 3)} alone; use a repository that "
            "has it in safetensors"
        )
    if weights:
        folders = {name.rpartition("/")[0] for name in weights if "-of-" in name}
        first = min(folders) if folders else weights[0]
        raise UsageError(
            f"{where} is a collection of {len(weights)} files of weights, {abbreviate(weights)}; "
            f"give the one that is meant: --dit hf://{where}/{first}"
        )
    raise UsageError(
        f"{where} holds no checkpoint of Wan2.1: {abbreviate(sorted(names)) or 'nothing'}"
    )
