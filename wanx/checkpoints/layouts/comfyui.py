"""ComfyUI's folder of models, where each part has files of several models beside each other."""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from pathlib import Path

from wanx.checkpoints.layouts.base import Layout
from wanx.checkpoints.layouts.files import WEIGHT_FILES, missing_part, open_part, recognise
from wanx.checkpoints.part import Part
from wanx.checkpoints.tokenizer_source import TokenizerSource
from wanx.checkpoints.weights import open_files
from wanx.errors import CorruptInputError, UsageError, WanxError, abbreviate

# Folders of each part, the present one and the ones before.
_FOLDERS = {
    "dit": ("diffusion_models", "unet"),
    "text_encoder": ("text_encoders", "clip"),
    "vae": ("vae",),
    "image_encoder": ("clip_vision",),
}
# Of several encoders only umT5 has a table of positions in every block.
_WAN22_VAE = "decoder.upsamples.0.upsamples.0.residual.2.weight"  # which Wan2.1's has not
_UMT5 = ("relative_attention_bias", "attn_rel_b", "pos_embedding")


class ComfyUILayout(Layout):
    """A folder with ``diffusion_models``, ``text_encoders``, ``vae`` and ``clip_vision``."""

    name = "ComfyUI"

    @staticmethod
    def matches(source: Path) -> bool:
        """True if the folder is of this layout."""
        return any((source / name).is_dir() for name in _FOLDERS["dit"])

    def dit(self, name: str) -> Path:
        """Find a transformer by its name, with or without folder and suffix.

        Raises:
            UsageError: there is none of that name, or there are several; names the nearest.
        """
        files = self._files("dit")
        found = [path for path in files if name in self._names_of(path)]
        if len(found) == 1:
            return found[0]
        if found:
            listed = abbreviate([str(path) for path in found])
            raise UsageError(f"--dit {name} is {listed}; give the path of one of them")
        near = difflib.get_close_matches(name, [path.name for path in files], 3, 0.3)
        hint = f"did you mean {' or '.join(near)}?" if near else "there is no file of weights"
        raise UsageError(f"{self.source} has no diffusion model called {name}; {hint}")

    def part(self, component: str) -> Part:
        """Open the one file that fits; see :meth:`Layout.part`."""
        fitting, errors = [], []
        for path in self._files(component):
            try:
                if _fits(component, path):
                    fitting.append(path)
            except WanxError as error:  # of a file that may be the one
                errors.append(error)
        if not fitting and errors:
            raise errors[0]
        if not fitting:
            folder = " or ".join(_FOLDERS[component])
            raise missing_part(str(self.source / folder), component)
        if len(fitting) > 1:
            option = f"--{component.replace('_', '-')}"
            raise UsageError(
                f"{self.source} has {len(fitting)} files for {option}: "
                f"{abbreviate([str(path.relative_to(self.source)) for path in fitting])}; choose "
                f"one with {option}"
            )
        return open_part(component, fitting[0])

    def tokenizer(self) -> TokenizerSource | None:
        """There is none but that of the text encoder."""
        return None

    def _files(self, component: str) -> list[Path]:
        folders = [self.source / name for name in _FOLDERS[component]]
        return sorted(
            path
            for folder in folders
            if folder.is_dir()
            for path in folder.rglob("*")
            if path.suffix in WEIGHT_FILES and path.is_file()
        )

    def _names_of(self, path: Path) -> Iterator[str]:
        """Names of a file: its path, whole and below ComfyUI's folder, and the last part of it."""
        inside = next(
            path.relative_to(self.source / name)
            for name in _FOLDERS["dit"]
            if path.is_relative_to(self.source / name)
        )
        for name in (path, inside, Path(path.name)):
            yield from (str(name), str(name.with_suffix("")))


def _fits(component: str, path: Path) -> bool:
    """True if a file has this part of Wan2.1; those of other models lie beside it.

    Raises:
        WanxError: the file cannot be read.
    """
    names, _ = open_files([path])
    if component not in recognise(names) or any(name.endswith(_WAN22_VAE) for name in names):
        return False
    tables = sum(any(word in name for word in _UMT5) for name in names)
    return component != "text_encoder" or tables > 1


def require_comfyui(folder: Path) -> ComfyUILayout:
    """Open ComfyUI's folder, or the one that holds it.

    Raises:
        CorruptInputError: it is none.
        UsageError: it is missing.
    """
    if not folder.is_dir():
        raise UsageError(f"--comfyui {folder} is no folder; give ComfyUI's folder of models")
    for candidate in (folder, folder / "models"):
        if ComfyUILayout.matches(candidate):
            return ComfyUILayout(candidate)
    raise CorruptInputError(
        f"{folder} has no folder diffusion_models; give ComfyUI's folder of models"
    )
