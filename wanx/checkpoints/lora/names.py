"""Names in LoRA files: what a tensor is for, and which tensor of the transformer it changes.

A name is a prefix of the trainer, the name of a layer, and a suffix that says what the tensor is.
Layers are called as in the original or as in Diffusers, with dots or with underscores.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from wanx.checkpoints import key_maps

UP, DOWN, ALPHA, UP_BIAS = "up", "down", "alpha", "up_bias"
DIFF, DIFF_BIAS, SET = "diff", "diff_bias", "set"
DORA, MID, LOKR, LOHA, RESHAPE = "DoRA", "LoCon with a middle", "LoKr", "LoHa", "reshaped weights"
UNSUPPORTED = (DORA, MID, LOKR, LOHA, RESHAPE)

# What trainers put in front of a layer's name; several may stand behind each other.
PREFIXES = (
    *("base_model.model.", "model.diffusion_model.", "diffusion_model.", "transformer."),
    *("pipe.dit.", "lora_unet__", "lora_unet_", "lycoris_"),
)

# The longest that fits counts.
SUFFIXES = {
    ".lora_up.weight": UP,
    ".lora_down.weight": DOWN,
    ".lora_B.weight": UP,
    ".lora_A.weight": DOWN,
    ".lora_B.default.weight": UP,
    ".lora_A.default.weight": DOWN,
    ".lora_B": UP,
    ".lora_A": DOWN,
    "_lora.up.weight": UP,
    "_lora.down.weight": DOWN,
    ".lora.up.weight": UP,
    ".lora.down.weight": DOWN,
    ".lora_linear_layer.up.weight": UP,
    ".lora_linear_layer.down.weight": DOWN,
    ".lora_B.bias": UP_BIAS,
    ".lora_B.default.bias": UP_BIAS,
    ".alpha": ALPHA,
    ".diff": DIFF,
    ".w_norm": DIFF,
    ".diff_b": DIFF_BIAS,
    ".b_norm": DIFF_BIAS,
    ".diff_m": DIFF,  # of the layer's modulation
    ".set_weight": SET,
    ".dora_scale": DORA,
    ".lora_magnitude_vector": DORA,
    ".lora_magnitude_vector.weight": DORA,
    ".lora_mid.weight": MID,
    **{f".lokr_{part}": LOKR for part in ("w1", "w2", "w1_a", "w1_b", "w2_a", "w2_b", "t2")},
    **{f".hada_{part}": LOHA for part in ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2")},
    ".reshape_weight": RESHAPE,
}
_OF_MODULATION = ".diff_m"
_LEAVES = (".weight", ".bias", ".gamma")


@dataclass(frozen=True, kw_only=True)
class LoraName:
    """A name of a LoRA file, taken apart.

    Attributes:
        layer: what the trainer calls the layer, without prefixes.
        role: what the tensor is for, such as ``up``.
    """

    layer: str
    role: str


def parse_name(name: str) -> LoraName | None:
    """Take a name apart; None where its suffix says nothing."""
    suffix = max((s for s in SUFFIXES if name.endswith(s)), key=len, default=None)
    if suffix is None:
        return None
    layer = name.removesuffix(suffix)
    while prefix := next((p for p in PREFIXES if layer.startswith(p)), None):
        layer = layer.removeprefix(prefix)
    if suffix == _OF_MODULATION:
        layer += ".modulation"
    return LoraName(layer=layer, role=SUFFIXES[suffix])


def layer_names(tensors: Iterable[str]) -> dict[str, str]:
    """Original name of a layer, or of a parameter without one, by everything it may be called.

    Args:
        tensors: original names of all tensors of a transformer.
    """
    names: dict[str, str] = {}
    for original in tensors:
        layer = _layer(original)
        diffusers = _layer(key_maps.DIT.to_diffusers(original) or original)
        for name in (layer, diffusers):
            names[name] = names[name.replace(".", "_")] = layer
    return names


def _layer(tensor: str) -> str:
    return next((tensor.removesuffix(leaf) for leaf in _LEAVES if tensor.endswith(leaf)), tensor)
