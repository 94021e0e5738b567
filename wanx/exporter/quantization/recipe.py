"""Recipe of a component: its 8-bit layers, their number format and scales, as data.

Linears outside the block stack stay as they are, and so do modulation, norms and biases. Inside,
``--skip-layers`` and the sensitivity of a layer decide.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn

from wanx.bundle.manifest import Quantization, QuantizedLayer
from wanx.config.models import DiTConfig, TextEncoderConfig
from wanx.errors import UsageError
from wanx.exporter.quantization.scheme import SCHEMES, WEIGHT_ONLY, QuantizeOptions, Scheme
from wanx.models.dit.model import WanDiT
from wanx.models.text_encoder import UMT5Encoder

NARROW_FEATURES = 512  # features; narrower layers gain nothing and lose most

# Layers of a block that read the same input, and so share its scale: their GEMMs can be one.
SHARED_INPUTS = (
    ("self_attn.q", "self_attn.k", "self_attn.v"),
    ("cross_attn.k", "cross_attn.v"),
    ("cross_attn.k_img", "cross_attn.v_img"),
)
# The two AdaLN outputs of a block: its vector of smoothing, and the layers that read it.
SMOOTHED = {"attn_smooth": SHARED_INPUTS[0], "ffn_smooth": ("ffn.0",)}
_HIGH_IN_BLOCK = ("before_proj", "after_proj")  # they tie the control branch to the residual stream


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Everything that quantising a component needs, decided.

    Attributes:
        scheme: the number format.
        options: as the user gave them.
        layers: the 8-bit layers, each with the scale of its input (None: dynamic, or not
            quantised).
        embeddings: 8-bit embedding tables.
        unquantized_layers: layers that could have been 8-bit, each with the reason.
        sqnr_db: signal-to-noise ratio of every layer that was measured.
        smooth: by ``blocks.0.attn_smooth``, the vector ``[D]`` that its inputs are divided by.
        attention: by attention (``blocks.0.self_attn.attend``), the scales of q, k and v.
    """

    scheme: Scheme
    options: QuantizeOptions = field(default_factory=QuantizeOptions)
    layers: Mapping[str, float | None]
    embeddings: tuple[str, ...] = ()
    unquantized_layers: Mapping[str, str] = field(default_factory=dict)
    sqnr_db: Mapping[str, float] = field(default_factory=dict)
    smooth: Mapping[str, Tensor] = field(default_factory=dict)
    attention: Mapping[str, tuple[float, float, float]] = field(default_factory=dict)

    @property
    def weights(self) -> frozenset[str]:
        """Names of the tensors that are stored in 8 bits."""
        return frozenset(f"{layer}.weight" for layer in (*self.layers, *self.embeddings))

    def layout(self) -> dict[str, object]:
        """All that the structure of a graph depends on: no scales and no measurements."""
        return {
            "scheme": self.scheme.name,
            "per_tensor": self.options.weight_scale == "tensor",
            "layers": {name: scale is not None for name, scale in sorted(self.layers.items())},
            "embeddings": sorted(self.embeddings),
            "smooth": {name: list(vector.shape) for name, vector in sorted(self.smooth.items())},
            "attention": sorted(self.attention),
        }

    def is_repeated(self, stack: str, count: int) -> bool:
        """True if the recipe treats ``count`` blocks of a stack alike."""
        kinds: list[set[str]] = [set() for _ in range(count)]
        for name in (*self.layers, *self.attention, *self.smooth):
            block, _, layer = name.removeprefix(f"{stack}.").partition(".")
            if name.startswith(f"{stack}."):
                kinds[int(block)].add(layer)
        return all(kind == kinds[0] for kind in kinds)

    def without(self, reasons: Mapping[str, str]) -> Recipe:
        """The recipe with more layers kept high, each for a reason."""
        layers = {name: scale for name, scale in self.layers.items() if name not in reasons}
        return replace(
            self, layers=layers, unquantized_layers={**self.unquantized_layers, **reasons}
        )

    def record(
        self, verified_counts: Mapping[str, int], kernels: Mapping[str, int], kept_weights: int = 0
    ) -> Quantization:
        """Describe it for the manifest, with what the built graph and the weights hold."""
        static = self.options.activation_scale if self.scheme.name != WEIGHT_ONLY else "none"
        return Quantization(
            scheme=self.scheme.name,
            weight_scale=self.options.weight_scale,
            activation_scale=static,
            smooth=self.options.smooth if self.smooth else 0.0,
            attention="fp8" if self.attention and self.options.attention == "fp8" else "high",
            layers={
                name: QuantizedLayer(input_scale=scale, sqnr_db=self.sqnr_db.get(name))
                for name, scale in (
                    *self.layers.items(), *((name, None) for name in self.embeddings)
                )
            },
            unquantized_layers=dict(self.unquantized_layers),
            kept_weights=kept_weights,
            verified_counts=dict(verified_counts),
            kernels=dict(kernels),
        )  # fmt: skip


def recipe_from_manifest(record: Quantization, stored: Mapping[str, tuple[int, ...]]) -> Recipe:
    """The recipe behind a manifest's record, as far as a network's structure depends on it.

    Args:
        record: of the component.
        stored: name and shape of every tensor of its weight files. Vectors of smoothing come back
            without their numbers, scales of attention as 1.
    """
    tables = {name for name in record.layers if name.endswith("embedding")}
    options = QuantizeOptions(
        weight_scale=record.weight_scale,
        activation_scale="dynamic" if record.activation_scale == "dynamic" else "static",
        attention="fp8" if record.attention == "fp8" else "none",
    )
    return Recipe(
        scheme=SCHEMES[record.scheme],
        options=options,
        layers={n: layer.input_scale for n, layer in record.layers.items() if n not in tables},
        embeddings=tuple(sorted(tables)),
        smooth={n: torch.empty(s, device="meta") for n, s in stored.items() if _is_smoothing(n)},
        attention={
            name.removesuffix(".q_scale"): (1.0, 1.0, 1.0)
            for name in stored
            if name.endswith(".attend.q_scale")
        },
    )


def _is_smoothing(tensor: str) -> bool:
    return tensor.rpartition(".")[2] in SMOOTHED


def shared_input(layer: str) -> str:
    """Name of the layer that stands for all that read the same input as ``layer``."""
    for group in SHARED_INPUTS:
        for member in group:
            if layer.endswith(f".{member}"):
                return layer.removesuffix(member) + group[0]
    return layer


def smoothing_of(layer: str) -> str | None:
    """Name of the vector that the input of ``layer`` is divided by, if it can be smoothed."""
    for vector, members in SMOOTHED.items():
        for member in members:
            if layer.endswith(f".{member}"):
                return layer.removesuffix(member) + vector
    return None


def dit_candidates(config: DiTConfig, options: QuantizeOptions) -> tuple[list[str], dict[str, str]]:
    """List the linears of a denoiser that are to be 8-bit, and those kept high with the reason.

    Layers with ``NARROW_FEATURES`` or fewer are kept, unless the model itself is that narrow.

    Raises:
        UsageError: a pattern matches no layer, or none is left.
    """
    with torch.device("meta"):
        model = WanDiT(config)
    narrow = min(NARROW_FEATURES, config.dim - 1)
    return _candidates(_linears(model, ("blocks", "vace_blocks")), narrow, options.skip_layers)


def text_recipe(config: TextEncoderConfig) -> Recipe:
    """The recipe of a text encoder: 8-bit weights, and an 8-bit table of embeddings."""
    with torch.device("meta"):
        model = UMT5Encoder(config)
    return Recipe(
        scheme=SCHEMES[WEIGHT_ONLY],
        layers=dict.fromkeys(name for name, _ in _linears(model, ("blocks",))),
        embeddings=("token_embedding",),
    )


def _linears(model: nn.Module, stacks: tuple[str, ...]) -> list[tuple[str, nn.Linear]]:
    return [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name.split(".")[0] in stacks
        and not name.endswith(_HIGH_IN_BLOCK)
    ]  # fmt: skip


def _candidates(
    linears: list[tuple[str, nn.Linear]], narrow: int, skip_layers: Iterable[str]
) -> tuple[list[str], dict[str, str]]:
    unquantized = {
        name: f"{min(linear.in_features, linear.out_features)} features"
        for name, linear in linears
        if min(linear.in_features, linear.out_features) <= narrow
    }
    unquantized |= {name: "--skip-layers" for name, _ in linears if _matches(name, skip_layers)}
    candidates = [name for name, _ in linears if name not in unquantized]
    if not candidates:
        raise UsageError(
            f"all {len(unquantized)} layers are kept high, so nothing would be 8-bit; "
            "narrow --skip-layers or choose another --precision"
        )
    return candidates, unquantized


def require_matches(patterns: Iterable[str], layers: Iterable[str]) -> None:
    """Refuse a pattern that matches none of ``layers``.

    Raises:
        UsageError: names it, and a layer for comparison.
    """
    names = list(layers)
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise UsageError(
                f"--skip-layers {pattern!r} matches no layer; layers are called like {names[0]}, "
                "and * stands for any text"
            )


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)
