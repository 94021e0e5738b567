"""The original layout, of Wan-AI/Wan2.1-*."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from wanx.checkpoints import checkpoint_config as sizes
from wanx.checkpoints import image_encoder_checkpoint as image_encoder
from wanx.checkpoints.component import open_component
from wanx.checkpoints.config_file import ConfigFile
from wanx.checkpoints.layouts.base import Layout, require_files
from wanx.checkpoints.layouts.diffusers import DIFFUSERS_PARTS
from wanx.checkpoints.part import Part, make_part
from wanx.checkpoints.tokenizer_source import (
    TOKENIZER_FILES,
    TokenizerSource,
    find_tokenizer,
)
from wanx.checkpoints.weights import ComponentWeights, weight_files
from wanx.errors import UsageError

DIT_STEM = "diffusion_pytorch_model"
_TOKENIZER = "google/umt5-xxl"
_STEMS = {
    "text_encoder": "models_t5_umt5-xxl-enc-bf16",
    "vae": "Wan2.1_VAE",
    "image_encoder": image_encoder.STEM,
}


class OriginalLayout(Layout):
    """A folder with ``config.json`` and files of fixed names."""

    name = "original"

    @staticmethod
    def files(names: Sequence[str], *, full_precision: bool) -> dict[str, list[str]]:
        """Files of each part among the names of a folder; none where it is of another layout."""
        found = {
            component: weight_files(names, stem, full_precision=full_precision)
            for component, stem in {"dit": DIT_STEM, **_STEMS}.items()
        }
        if not found["dit"]:
            return {}
        found["dit"] += [name for name in names if name == "config.json"]
        tokenizers = (f"{_TOKENIZER}/{name}" for name in TOKENIZER_FILES)
        found["tokenizer"] = [name for name in tokenizers if name in names][:1]
        return found

    @staticmethod
    def matches(source: Path) -> bool:
        """True if the folder has a DiT of this layout."""
        # A .bin is refused, with the name that it should have.
        ends = (".safetensors*", ".pth", ".bin")
        return any(any(source.glob(f"{DIT_STEM}*{end}")) for end in ends)

    def require(self, components: tuple[str, ...], *, tokenizer: bool) -> None:
        """Look for the files of parts; see :meth:`Layout.require`."""
        if "dit" in components:
            self._config()
        needed = [
            f"{_STEMS[name]}.pth or {_STEMS[name]}.safetensors"
            for name in components
            if name in _STEMS
        ]
        if tokenizer:
            needed.append(f"{_TOKENIZER}/tokenizer.json or {_TOKENIZER}/spiece.model")
        require_files(self.source, *needed)

    def part(self, component: str) -> Part:
        """Open a part; see :meth:`Layout.part`."""
        if component != "dit":
            return make_part(self._weights(component, _STEMS[component]))
        config = self._config()
        weights = self._weights("dit", DIT_STEM)
        return make_part(weights, sizes.original_dit_fields(config), config.path)

    def _weights(self, component: str, stem: str) -> ComponentWeights:
        return open_component(component, self.source, stem, full_precision=self.full_precision)

    def tokenizer(self) -> TokenizerSource:
        """Find the tokenizer; see :meth:`Layout.tokenizer`."""
        return find_tokenizer(self.source / _TOKENIZER)

    def _config(self) -> ConfigFile:
        config = ConfigFile(self.source / "config.json")
        if config.values.get("_class_name") in DIFFUSERS_PARTS:
            raise UsageError(
                f"{self.source} is one part of a Diffusers checkpoint; give the folder that it is "
                "in"
            )
        return config
