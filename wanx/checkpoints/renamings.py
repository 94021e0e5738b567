"""Systematic changes of names that would make a refused checkpoint fit: those of tensors, of files.

Training tools, compilers and hubs keep the network and rename all of it. A message that says
"incomplete" then sends the user to download what is there already.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from pathlib import Path

from wanx.checkpoints import key_maps

# Modules that hold a network and add nothing: of trainers, torch.compile, DDP, FSDP, ComfyUI.
_WRAPPERS = frozenset(
    {"model", "diffusion_model", "module", "_orig_mod", "_fsdp_wrapped_module", "transformer",
     "state_dict", "net", "ema", "generator"}
)  # fmt: skip
_INNER_WRAPPERS = frozenset({"_orig_mod", "module", "_fsdp_wrapped_module"})
_DIFFUSERS = {
    "dit": key_maps.DIT,
    "text_encoder": key_maps.TEXT_ENCODER,
    "image_encoder": key_maps.IMAGE_ENCODER,
}


def tensor_renaming(component: str, missing: Iterable[str], stored: Collection[str]) -> str | None:
    """Say which change of all names turns one that is stored into one that is missing.

    Args:
        component: such as ``dit``.
        missing: names that the files should use, and do not.
        stored: names that the files use.

    Returns:
        What to do, or None if there is no such change.
    """
    for name in missing:
        for other in stored:
            if other.endswith(f".{name}"):
                prefix = other.removesuffix(name)
                wrapped = set(prefix[:-1].split(".")) <= _WRAPPERS
                if wrapped or all(one.startswith(prefix) for one in stored):
                    return f"save it with {prefix[:80]!a} removed from the start of its names"
            parts = other.split(".")
            inner = sorted(_INNER_WRAPPERS.intersection(parts))
            if inner and ".".join(part for part in parts if part not in inner) == name:
                listed = ", ".join(f"'{part}.'" for part in inner)
                return f"save it with {listed} removed from its names"
            key_map = _DIFFUSERS.get(component)
            if key_map is not None and key_map.to_original(other) == name:
                return "its names are those of Diffusers, so put it into a Diffusers checkpoint"
    return None


def file_renaming(folder: Path, stem: str) -> str | None:
    """Say which weights under another name are there instead of those called ``stem``.

    Returns:
        What to do, or None if there are none.
    """
    exact, shard = re.escape(stem), r"-\d{5}-of-\d{5}"
    pickled = rf"(?:{exact}|pytorch_model)(?:\.\w+)?"
    patterns = (
        (rf"{exact}\.(?:safetensors\.index\.\w+|\w+\.safetensors\.index)\.json",
         f"rename {{name}} to {stem}.safetensors.index.json"),
        (rf"{exact}\.\w+\.safetensors", f"rename {{name}} to {stem}.safetensors"),
        (rf"{exact}\.(\w+){shard}\.safetensors",
         "rename {name} and the other shards, without '.{variant}'"),
        (rf"{exact}\.\w+\.pth|{pickled}\.bin", f"rename {{name}} to {stem}.pth"),
        (rf"{pickled}{shard}\.(?:bin|pth)",
         f"save the tensors of {{name}} and the other shards as {stem}.safetensors"),
    )  # fmt: skip
    names = sorted(entry.name for entry in folder.iterdir()) if folder.is_dir() else []
    for pattern, remedy in patterns:
        for name in names:
            if match := re.fullmatch(pattern, name, re.ASCII):
                variant = match[1] if match.re.groups else ""
                return remedy.format(name=name, variant=variant)
    return None
