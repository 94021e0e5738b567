"""The Diffusers layout, a folder for each part."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from wanx.checkpoints import checkpoint_config as sizes
from wanx.checkpoints import image_encoder_checkpoint as image_encoder
from wanx.checkpoints import key_maps
from wanx.checkpoints.component import open_component
from wanx.checkpoints.config_file import ConfigFile
from wanx.checkpoints.layouts.base import Layout, require_files
from wanx.checkpoints.part import Part, make_part
from wanx.checkpoints.tokenizer_source import (
    TOKENIZER_FILES,
    TokenizerSource,
    find_tokenizer,
)
from wanx.checkpoints.weights import weight_files

DIFFUSERS_PARTS = ("WanTransformer3DModel", "WanVACETransformer3DModel", "AutoencoderKLWan")
_INDEX = "model_index.json"
_STEM = "diffusion_pytorch_model"
# Folder and stem of each part.
_PLACES = {
    "dit": ("transformer", _STEM),
    "text_encoder": ("text_encoder", "model"),
    "vae": ("vae", _STEM),
    "image_encoder": ("image_encoder", "model"),
}


class DiffusersLayout(Layout):
    """A folder with ``model_index.json``."""

    name = "diffusers"

    @staticmethod
    def files(names: Sequence[str], *, full_precision: bool) -> dict[str, list[str]]:
        """Files of each part among the names of a folder; none where it is of another layout."""
        if _INDEX not in names:
            return {}
        found = {}
        for component, (folder, stem) in _PLACES.items():
            inside = [n.removeprefix(f"{folder}/") for n in names if n.startswith(f"{folder}/")]
            weights = weight_files(inside, stem, full_precision=full_precision)
            config = [name for name in inside if name == "config.json"]
            found[component] = [f"{folder}/{name}" for name in (*config, *weights)]
        if not any(len(files) > 1 for files in found.values()):
            return {}
        tokenizers = (f"tokenizer/{name}" for name in TOKENIZER_FILES)
        found["tokenizer"] = [name for name in tokenizers if name in names][:1]
        found["index"] = [_INDEX]
        return found

    @staticmethod
    def matches(source: Path) -> bool:
        """True if the folder is of this layout, or was."""
        return (source / _INDEX).exists() or (source / "transformer").is_dir()

    def require(self, components: tuple[str, ...], *, tokenizer: bool) -> None:
        """Look for the files of parts; see :meth:`Layout.require`."""
        needed = [f"{_PLACES[name][0]}/config.json" for name in components]
        if tokenizer:
            needed.append("tokenizer/tokenizer.json or tokenizer/spiece.model")
        require_files(self.source, _INDEX, *needed)
        # Wan2.2 splits the steps between two transformers, or gives each token its own timestep.
        index = ConfigFile(self.source / _INDEX)
        index.require("transformer_2", None, [None, None])
        index.require("expand_timesteps", None, False)

    def part(self, component: str) -> Part:
        """Open a part; see :meth:`Layout.part`."""
        name, stem = _PLACES[component]
        return open_diffusers_part(
            component, self.source / name, stem, full_precision=self.full_precision
        )

    def tokenizer(self) -> TokenizerSource:
        """Find the tokenizer; see :meth:`Layout.tokenizer`."""
        return find_tokenizer(self.source / "tokenizer")


def open_diffusers_part(
    component: str, folder: Path, stem: str, *, full_precision: bool = False
) -> Part:
    """Open the folder of a part, with its config.json; see :meth:`Layout.part`."""
    config = ConfigFile(folder / "config.json")
    told: dict[str, Any]
    if component == "dit":
        told, key_map = sizes.diffusers_dit_fields(config), key_maps.DIT
    elif component == "text_encoder":
        told, key_map = sizes.diffusers_text_encoder_fields(config), key_maps.TEXT_ENCODER
    elif component == "image_encoder":
        told, key_map = image_encoder.diffusers_image_encoder_fields(config), key_maps.IMAGE_ENCODER
    else:
        told = sizes.diffusers_vae_fields(config)
        key_map = key_maps.vae_key_map(len(told["multipliers"]), told["num_res_blocks"])
    weights = open_component(component, folder, stem, key_map, full_precision=full_precision)
    return make_part(weights, told, config.path)
