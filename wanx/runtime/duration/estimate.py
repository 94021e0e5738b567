"""Time of each stage of a run on the processor: its operations by the measured rate of a product.

The shares of that rate were measured (docs/performance.md); a prediction is good to a factor of
two. Nothing is said of GPUs.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence

import numpy as np

from wanx.bundle.manifest import Manifest
from wanx.runtime.duration import operations
from wanx.runtime.duration.operations import MultiplyAdds
from wanx.runtime.options import ResolvedRun
from wanx.runtime.sessions.onnxruntime.providers import CPU
from wanx.runtime.sessions.registry import provider_of
from wanx.runtime.sizes import latent_shape
from wanx.runtime.vae.memory import VaePlan

# Shares of the rate of a large product in fp32.
_INT8_LINEARS = 2.5
_LINEARS = 0.8
_ATTENTION = 0.6
_CONVOLUTIONS = {CPU: 0.7, "openvino": 1.1}
_NARROW = 0.25  # of convolutions of fewer channels than fill the processor's registers
_WIDE = 48
_WIDENED = 3e9  # bytes of weights per second
_LOADED = 1e9  # likewise, of weights per second, from a disk or what the system keeps of it
_SHAPE = (512, 1536, 1536)


class Durations:
    """Seconds of what a run does on the processor; None where another machine does it."""

    def __init__(self, manifest: Manifest, provider: str, rate: float | None = None) -> None:
        """Measure the processor.

        Args:
            manifest: of the bundle.
            provider: that was asked for.
            rate: multiply-adds per second of a large product; None measures it.
        """
        self._manifest = manifest
        self._provider = provider
        self._rate = product_rate() if rate is None else rate

    def network(self, component: str, work: MultiplyAdds, calls: int) -> float | None:
        """Loading a network, and all its calls."""
        if provider_of(self._manifest, component, self._provider) != CPU:
            return None
        record = self._manifest.components[component]
        quantized = record.quantization is not None and self._manifest.precision == "int8"
        linears = work.linears / (_INT8_LINEARS if quantized else _LINEARS)
        weights = sum(self._manifest.files[name].size for name in record.weights)
        products = linears + work.others / _ATTENTION
        return products / self._rate + weights / _LOADED + calls * self._widening(component)

    def _widening(self, component: str) -> float:
        """Seconds of a call in which ONNX Runtime widens weights of 16 bits."""
        record = self._manifest.components[component]
        if record.quantization is not None or self._manifest.precision == "fp32":
            return 0.0
        return sum(self._manifest.files[name].size for name in record.weights) / _WIDENED

    def vae(self, part: str, work: MultiplyAdds, plan: VaePlan | None) -> float | None:
        """Calls of the VAE, of which tiles compute some work again."""
        provider = provider_of(self._manifest, part, self._provider)
        overhead = 1.0
        if plan is not None:
            provider, overhead = plan.provider, plan.tiling.overhead
        if provider not in _CONVOLUTIONS:
            return None
        narrow = self._manifest.config.vae.base_dim < _WIDE
        share = _NARROW if narrow else _CONVOLUTIONS[provider]
        return overhead * work.others / share / self._rate


def stage_seconds(
    manifest: Manifest,
    run: ResolvedRun,
    prompt_tokens: Sequence[int],
    durations: Durations,
    plans: dict[str, VaePlan],
    forwards: int | None = None,
) -> dict[str, float]:
    """Seconds of the stages of a run, by name, of those that the processor computes.

    Args:
        manifest: of the bundle.
        run: of which size, steps and guidance scale count.
        prompt_tokens: of each prompt that is encoded.
        durations: of this machine.
        plans: of the VAE, by stage.
        forwards: of the denoiser, where a step cache leaves some out.
    """
    forwards = run.forwards if forwards is None else forwards
    seconds: dict[str, float | None] = {}
    for name, taken in _parts(manifest, run, prompt_tokens, durations, plans, forwards):
        before = seconds.get(name, 0.0)
        seconds[name] = None if before is None or taken is None else before + taken
    return {name: taken for name, taken in seconds.items() if taken is not None}


def _parts(
    manifest: Manifest,
    run: ResolvedRun,
    prompt_tokens: Sequence[int],
    durations: Durations,
    plans: dict[str, VaePlan],
    forwards: int,
) -> Iterator[tuple[str, float | None]]:
    """Stages by name, some of them in several parts."""
    config = manifest.config
    _, times, height, width = latent_shape(run.width, run.height, run.frames, config.vae)
    prompts = [operations.text_encoder(config.text_encoder, count) for count in prompt_tokens]
    yield "text", durations.network("text_encoder", sum(prompts, MultiplyAdds(0)), len(prompts))
    if config.image_encoder is not None:
        images = operations.image_encoder(config.image_encoder) * config.dit.image_frames
        yield "condition", durations.network("image_encoder", images, 1)
    if config.task != "t2v":
        clips = 2 if config.task == "vace" else 1
        clip = operations.vae_encoder(config.vae, run.frames, height, width)
        plan = plans.get("condition")
        yield "condition", durations.vae("vae_encoder_down_rest", clip * clips, plan)
    frames = times + len(run.references or ())
    tokens = frames * height * width // config.dit.patch_volume
    step = operations.denoiser(config.dit, tokens)
    yield "denoise", durations.network("dit", step * forwards, forwards)
    video = operations.vae_decoder(config.vae, times, height, width)
    yield "decode", durations.vae("vae_decoder_up_rest", video, plans.get("decode"))


def product_rate() -> float:
    """Multiply-adds per second of a large product in fp32, measured."""
    rows, depth, columns = _SHAPE
    draw = np.random.default_rng(0)
    a = draw.standard_normal((rows, depth), np.float32)
    b = draw.standard_normal((depth, columns), np.float32)
    a @ b
    taken = []
    for _ in range(5):
        start = time.perf_counter()
        a @ b
        taken.append(time.perf_counter() - start)
    return rows * depth * columns / min(taken)
