"""Single files, as ComfyUI and others have them: parts are recognised by the names of tensors."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from wanx.checkpoints import checkpoint_config as sizes
from wanx.checkpoints import key_maps
from wanx.checkpoints.component import component_weights
from wanx.checkpoints.config_file import ConfigFile
from wanx.checkpoints.layouts.base import Layout
from wanx.checkpoints.layouts.diffusers import DIFFUSERS_PARTS, open_diffusers_part
from wanx.checkpoints.part import COMPONENTS, Part, make_part
from wanx.checkpoints.tensors.gguf_file import is_gguf, read_gguf
from wanx.checkpoints.tensors.source import TensorSource
from wanx.checkpoints.tokenizer_source import (
    GGUFTokenizer,
    TensorTokenizer,
    TokenizerSource,
)
from wanx.checkpoints.weights import PICKLES, open_files, open_index
from wanx.errors import CorruptInputError, UsageError, abbreviate

# Makes the map from original names, of all names of a network without their prefix.
Names = Callable[[Iterable[str]], key_maps.KeyMap | None]


@dataclass(frozen=True, kw_only=True)
class Naming:
    """A way in which the tensors of a network are called.

    Attributes:
        component: the network.
        tells: names that only this network has, and all versions of it.
        key_map: makes the map from the original names, of all names without their prefix.
    """

    component: str
    tells: tuple[str, ...]
    key_map: Names = lambda names: None


def _vae_map(names: Iterable[str]) -> key_maps.KeyMap:
    """Map of a VAE with Diffusers' names, which tell its sizes."""
    blocks = [
        m for n in names if (m := re.match(r"decoder\.up_blocks\.(\d+)\.resnets\.(\d+)\.", n))
    ]
    stages = {int(match[1]) for match in blocks}
    resnets = {int(match[2]) for match in blocks}
    return key_maps.vae_key_map(max(stages, default=0) + 1, max(resnets, default=1))


NAMINGS = (
    Naming(component="dit", tells=("patch_embedding.weight", "head.modulation")),
    Naming(
        component="dit",
        tells=("patch_embedding.weight", "condition_embedder.time_proj.weight"),
        key_map=lambda names: key_maps.DIT,
    ),
    Naming(
        component="text_encoder", tells=("token_embedding.weight", "blocks.0.ffn.gate.0.weight")
    ),
    Naming(
        component="text_encoder",
        tells=("encoder.block.0.layer.1.DenseReluDense.wi_0.weight",),
        key_map=lambda names: key_maps.TEXT_ENCODER,
    ),
    Naming(
        component="text_encoder",
        tells=("token_embd.weight", "enc.blk.0.ffn_gate.weight"),
        key_map=lambda names: key_maps.TEXT_ENCODER_GGUF,
    ),
    Naming(component="vae", tells=("decoder.middle.0.residual.0.gamma", "conv2.weight")),
    Naming(
        component="vae",
        tells=("decoder.mid_block.resnets.0.norm1.gamma", "post_quant_conv.weight"),
        key_map=_vae_map,
    ),
    Naming(component="image_encoder", tells=("visual.cls_embedding",)),
    Naming(
        component="image_encoder",
        tells=("vision_model.embeddings.class_embedding",),
        key_map=lambda names: key_maps.IMAGE_ENCODER,
    ),
)
# In front of the names of a network in files of several, or of one.
PREFIXES = (
    *("", "model.diffusion_model.", "diffusion_model.", "net."),
    *("text_encoders.umt5xxl.transformer.", "vae.", "first_stage_model."),
)
_SPIECE = "spiece_model"
WEIGHT_FILES = (".safetensors", ".sft", ".gguf", *PICKLES)


def open_parts(path: Path) -> dict[str, Part]:
    """Open a file of weights; its parts by component.

    Raises:
        CorruptInputError: it is missing, damaged or unsafe, or lacks tensors that tell sizes.
        EnvironmentMismatchError: a package that reads it is missing.
        UsageError: it is a network of another model.
    """
    stored, files = open_files([path])
    return _parts(stored, files)


def recognise(stored: Iterable[str]) -> dict[str, tuple[Naming, str]]:
    """Find the networks of a file, by component: how they are named, and their prefix."""
    names = set(stored)
    found: dict[str, tuple[Naming, str]] = {}
    for prefix in PREFIXES:
        for naming in NAMINGS:
            if all(prefix + name in names for name in naming.tells):
                found.setdefault(naming.component, (naming, prefix))
    return found


def _parts(stored: Mapping[str, TensorSource], files: tuple[Path, ...]) -> dict[str, Part]:
    found = recognise(stored)
    if not found:
        raise UsageError(
            f"{files[0]} holds no network of Wan2.1: its tensors are called "
            f"{abbreviate(list(stored)[:3])}; give one of its transformer, text encoder, VAE or "
            "image encoder (a LoRA goes with --lora)"
        )
    prefixes = sorted({prefix for _, prefix in found.values()}, key=len, reverse=True)
    parts = {}
    for component, (naming, prefix) in found.items():
        # A name belongs to the longest prefix of a network that it has.
        own = {
            name.removeprefix(prefix): source
            for name, source in stored.items()
            if next((p for p in prefixes if name.startswith(p)), None) == prefix
        }
        key_map = naming.key_map(own)
        weights = component_weights(component, own, files, key_map)
        tokenizer = _tokenizer(stored, files[0]) if component == "text_encoder" else None
        told, source = _told_beside(files[0]) if component == "dit" else (None, files[0])
        parts[component] = make_part(weights, told, source, tokenizer)
    return parts


def _told_beside(file: Path) -> tuple[dict[str, Any] | None, Path]:
    """Sizes of a transformer that a config.json beside it tells, if it is one of a transformer."""
    path = file.with_name("config.json")
    if not path.exists():
        return None, file
    config = ConfigFile(path)
    kind = config.values.get("_class_name")
    if kind in ("WanModel", "VaceWanModel"):
        return sizes.original_dit_fields(config), path
    if kind in DIFFUSERS_PARTS[:2]:
        return sizes.diffusers_dit_fields(config), path
    return None, file


def _tokenizer(stored: Mapping[str, TensorSource], path: Path) -> TokenizerSource | None:
    for name, source in stored.items():
        if name.rpartition(".")[2] == _SPIECE:
            return TensorTokenizer(path=path, tensor=source)
    if path.suffix not in PICKLES and is_gguf(path):
        file = read_gguf(path)
        if "tokenizer.ggml.tokens" in file.fields:
            return GGUFTokenizer(path=path, file=file)
    return None


def open_part(component: str, path: Path) -> Part:
    """Open one part, given by its file or by its folder of shards.

    Raises:
        CorruptInputError: it is missing, damaged or unsafe.
        UsageError: it is another part, or none.
    """
    if path.is_dir():
        return _open_folder(component, path)
    parts = open_parts(path)
    if component not in parts:
        raise UsageError(
            f"{path} holds a {_title(next(iter(parts)))}, not a {_title(component)}; give it with "
            f"--{next(iter(parts)).replace('_', '-')}"
        )
    return parts[component]


def _title(component: str) -> str:
    return {"dit": "transformer", "vae": "VAE"}.get(component, component.replace("_", " "))


def _open_folder(component: str, folder: Path) -> Part:
    """A part of the Diffusers layout, or shards beside each other."""
    indices = sorted(folder.glob("*.safetensors.index.json"))
    files = sorted(path for path in folder.iterdir() if path.suffix in WEIGHT_FILES)
    config = folder / "config.json"
    if config.exists() and (indices or files):
        stem = (indices or files)[0].name.partition(".")[0]
        stem = re.sub(r"-\d{5}-of-\d{5}$", "", stem)
        names = ConfigFile(config).values
        original = names.get("_class_name") in ("WanModel", "VaceWanModel")
        if not original and {"_class_name", "model_type"} & names.keys():
            return open_diffusers_part(component, folder, stem)
    if len(indices) == 1:
        parts = _parts(*open_index(indices[0]))
    elif len(files) == 1:
        parts = open_parts(files[0])
    else:
        raise UsageError(
            f"{folder} holds {len(files)} files of weights; give the one that is meant"
        )
    if component not in parts:
        raise UsageError(f"{folder} holds no {_title(component)}; it holds {', '.join(parts)}")
    return parts[component]


class FilesLayout(Layout):
    """One file of weights, with one part or several."""

    name = "single file"

    def __init__(self, source: Path, *, full_precision: bool = False) -> None:
        """Open the file."""
        super().__init__(source, full_precision=full_precision)
        self._parts = open_parts(source)

    def part(self, component: str) -> Part:
        """Take a part; see :meth:`Layout.part`."""
        if component not in self._parts:
            raise missing_part(str(self.source), component)
        return self._parts[component]

    def tokenizer(self) -> TokenizerSource | None:
        """There is none but that of the text encoder."""
        return None


class NoLayout(Layout):
    """Nothing: every part is given by itself."""

    name = "single files"

    def part(self, component: str) -> Part:
        """Refuse it, since an option is missing, not a file; see :meth:`Layout.part`."""
        raise UsageError(str(missing_part("what was given", component)))

    def tokenizer(self) -> TokenizerSource | None:
        """There is none but that of the text encoder."""
        return None


# Where people get a part.
_REPACKAGED = "hf://Comfy-Org/Wan_2.1_ComfyUI_repackaged/split_files"
_FOUND_AT = {
    "dit": f"{_REPACKAGED}/diffusion_models/wan2.1_t2v_1.3B_bf16.safetensors",
    "text_encoder": f"{_REPACKAGED}/text_encoders/umt5_xxl_fp16.safetensors",
    "vae": f"{_REPACKAGED}/vae/wan_2.1_vae.safetensors",
    "image_encoder": f"{_REPACKAGED}/clip_vision/clip_vision_h.safetensors",
}
assert _FOUND_AT.keys() == set(COMPONENTS)


def missing_part(where: str, component: str) -> CorruptInputError:
    """Error for a part that is nowhere."""
    return CorruptInputError(
        f"{where} has no {_title(component)}; give one with --{component.replace('_', '-')}, such "
        f"as {_FOUND_AT[component]}"
    )
