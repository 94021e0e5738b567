"""Sensitivity of each layer to 8 bits, on recorded activations.

One pass over recorded steps, with one block's weights in memory at a time: the output of each layer
is compared with that of its 8-bit twin on the same input, so that errors of different layers do not
mix.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from wanx.bundle.golden_steps import Golden
from wanx.config.number_formats import FP8
from wanx.errors import WanxError
from wanx.exporter.calibration.blockwise_dit import BlockwiseDiT
from wanx.exporter.calibration.observers import Observer, Observers, input_scale
from wanx.exporter.quantization.kept_weights import KeptWeight
from wanx.exporter.quantization.recipe import SMOOTHED, Recipe, shared_input, smoothing_of
from wanx.exporter.quantization.scheme import QuantizeOptions, Scheme
from wanx.kernels.attention.quant_attention import quant_attention
from wanx.kernels.quant_linear import quant_linear, quant_linear_rows
from wanx.kernels.quantize import quantize, quantize_rows
from wanx.kernels.tensor_metrics import Difference
from wanx.models.quantized import quantize_weight

_ROWS = 128  # of each recorded input that are compared, evenly spread
_LEAST_WEIGHT = 1e-5  # columns below it do not pull a smoothing vector towards infinity


@dataclass
class _Measurement:
    """Measurements so far, block by block; see :func:`select_layers`."""

    scheme: Scheme
    options: QuantizeOptions
    observers: Observers
    candidates: frozenset[str]
    attentions: frozenset[str]
    kept: Mapping[str, KeptWeight]
    layers: dict[str, float | None] = field(default_factory=dict)
    smooth: dict[str, Tensor] = field(default_factory=dict)
    noise: dict[str, Difference] = field(default_factory=dict)
    attention: dict[str, tuple[float, float, float]] = field(default_factory=dict)

    @contextmanager
    def watch(self, block: nn.Module, name: str) -> Iterator[None]:
        """Measure the candidates of one block while its samples run."""
        modules = {f"{name}.{child}": module for child, module in block.named_modules()}
        linears = {
            n: m for n, m in modules.items() if n in self.candidates and isinstance(m, nn.Linear)
        }
        if self.options.smooth:
            self._choose_smoothing(linears, name)
        samples: dict[str, list[tuple[Tensor, Tensor]]] = {layer: [] for layer in linears}
        with ExitStack() as hooks:
            for layer, module in linears.items():
                hook = module.register_forward_hook(_sample_rows(samples[layer]))
                hooks.callback(hook.remove)
            for layer in sorted(self.attentions & modules.keys()):
                hook = modules[layer].register_forward_hook(self._attention(layer, modules[layer]))
                hooks.callback(hook.remove)
            yield
        # One layer at a time, so that a single 8-bit copy is in memory, and made once.
        for layer, module in linears.items():
            x, y = (torch.cat(rows, dim=1) for rows in zip(*samples.pop(layer), strict=True))
            self.noise[layer] = Difference.of(self._quantized_output(layer, module, x), y)

    def _choose_smoothing(self, linears: Mapping[str, nn.Linear], block: str) -> None:
        """Choose the smoothing vectors of a block (Xiao et al. 2022, eq. 4)."""
        alpha = self.options.smooth
        for vector, members in SMOOTHED.items():
            consumers = [linears.get(f"{block}.{member}") for member in members]
            if None in consumers:
                continue  # a layer that stays high would have to be smoothed too
            columns = [
                consumer.weight.abs().amax(0) for consumer in consumers if consumer is not None
            ]
            largest = torch.stack(columns).amax(0).float()
            observer = self.observers[f"{block}.{members[0]}"]
            if not observer.count:
                input_scale(observer, self.scheme.limit)  # says what is wrong
            channel_amax = observer.channel_amax.to(largest.device)
            factor = channel_amax.clamp_min(1e-5) ** alpha / largest.clamp_min(_LEAST_WEIGHT) ** (
                1 - alpha
            )
            self.smooth[f"{block}.{vector}"] = factor.clamp(1e-4, 1e4).cpu()

    def _scale(self, layer: str) -> float | None:
        if self.options.activation_scale == "dynamic":
            return None
        observer = Observer(layer)  # so that an error names this layer, not the one it shares with
        observer.merge(self.observers[shared_input(layer)])
        vector = self.smooth.get(smoothing_of(layer) or "")
        if vector is None:
            return input_scale(observer, self.scheme.limit, self.options.percentile)
        amax = float((observer.channel_amax.cpu() / vector).amax())
        if amax == 0:
            return input_scale(observer, self.scheme.limit)  # says what is wrong
        return float(torch.tensor(amax / self.scheme.limit))

    def _quantized_output(self, layer: str, module: nn.Linear, x: Tensor) -> Tensor:
        """Output of the layer for ``x`` in 8 bits."""
        vector = self.smooth.get(smoothing_of(layer) or "")
        scale = self.layers[layer] = self._scale(layer)
        weight = module.weight.float()
        smooth = None if vector is None else vector.to(weight.device)
        if smooth is not None:
            weight = weight * smooth
        per_tensor = self.options.weight_scale == "tensor"
        kept = self.kept.get(f"{layer}.weight")
        if kept is not None and smooth is None:
            weight8, weight_scale = (t.to(x.device) for t in (kept.numbers(), kept.scale))
        else:
            weight8, weight_scale = quantize_weight(
                weight, self.scheme.dtype, per_tensor=per_tensor
            )
        x = x.float() if smooth is None else x.float() / smooth
        bias = module.bias.float()
        if scale is None:
            rows, row_scale = quantize_rows(x)
            return quant_linear_rows(rows, row_scale, weight8, weight_scale, bias)
        step = torch.tensor(scale, device=x.device)
        x8 = quantize(x, step, self.scheme.dtype)
        return quant_linear(x8, step, weight8, weight_scale, bias)

    def _attention(self, layer: str, module: nn.Module) -> Callable[..., None]:
        """Make a hook that compares an attention with its 8-bit twin, given all of k and v."""
        scales = tuple(
            input_scale(self.observers[f"{layer}.{letter}"], FP8.largest, self.options.percentile)
            for letter in "qkv"
        )
        self.attention[layer] = scales  # type: ignore[assignment]
        heads: int = module.num_heads  # type: ignore[assignment]

        noise = self.noise[layer] = Difference()

        def compare(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            q, k, v = inputs
            steps = [torch.tensor(scale, device=q.device) for scale in scales]
            rows = _rows(output)
            noise.add(quant_attention(q[:, rows], k, v, *steps, num_heads=heads), output[:, rows])

        return compare


def _sample_rows(samples: list[tuple[Tensor, Tensor]]) -> Callable[..., None]:
    """Make a hook that keeps some rows of a layer's input and output."""

    def keep(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        rows = _rows(output)
        samples.append((inputs[0][:, rows], output[:, rows]))

    return keep


def _rows(output: Tensor) -> Tensor:
    length = output.shape[1]
    rows = torch.linspace(0, length - 1, min(length, _ROWS)).round().long()
    return rows.to(output.device)


def select_layers(
    dit: BlockwiseDiT,
    golden: Golden,
    observers: Observers,
    scheme: Scheme,
    options: QuantizeOptions,
    candidates: tuple[list[str], dict[str, str]],
    attentions: frozenset[str] = frozenset(),
    on_block: Callable[[int, int], None] | None = None,
    kept: Mapping[str, KeptWeight] = MappingProxyType({}),
) -> Recipe:
    """Choose scales, measure every layer, and keep high those below the gate.

    Args:
        dit: the source weights.
        golden: recorded steps to measure on.
        observers: what calibration saw at the inputs of the candidates.
        scheme: the number format.
        options: smoothing, clipping, the gate.
        candidates: layers that are to be 8-bit, and those already kept high with the reason.
        attentions: attentions that are to be 8-bit.
        on_block: told how many of how many blocks are done.
        kept: weights that stay the 8-bit numbers of the checkpoint, by name.

    Raises:
        WanxError: an input was never seen, always 0 or not finite, or no layer passes the gate.
    """
    candidate_layers, unquantized = candidates
    measured = _Measurement(
        scheme, options, observers, frozenset(candidate_layers), attentions, kept
    )
    watch: Callable[[nn.Module, str], AbstractContextManager[None]] = measured.watch
    samples: list[Any] = [feeds for _, _, feeds in golden.samples()]
    dit.run(samples, watch=watch, on_block=on_block)
    gate = scheme.layer_gate_db if options.layer_gate_db is None else options.layer_gate_db
    sqnr = {name: noise.sqnr_db for name, noise in measured.noise.items()}
    failed = {
        name: f"SQNR {value:.1f} dB, below {gate:g}" for name, value in sqnr.items() if value < gate
    }
    # What reads a smoothed input is 8-bit altogether or not at all.
    for vector in [v for v in measured.smooth if any(smoothing_of(n) == v for n in failed)]:
        del measured.smooth[vector]
        sharing = [name for name in candidate_layers if smoothing_of(name) == vector]
        failed = dict.fromkeys(sharing, "shares a smoothed input with one that failed") | failed
    recipe = Recipe(
        scheme=scheme,
        options=options,
        layers={name: measured.layers[name] for name in candidate_layers},
        unquantized_layers=unquantized,
        sqnr_db=sqnr,
        smooth=measured.smooth,
        attention={n: s for n, s in measured.attention.items() if n not in failed},
    ).without(failed)
    if not recipe.layers:
        best = max(candidate_layers, key=lambda name: sqnr[name])
        raise WanxError(
            f"no layer can be {scheme.name}: below {gate:g} dB, or sharing a smoothed input with "
            f"one that is (best: {best} with {sqnr[best]:.1f} dB); try another --smooth or "
            "--precision, or a lower --layer-gate"
        )
    return recipe
