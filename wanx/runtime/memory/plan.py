"""Host memory of each stage of a run, known before it runs, and how the VAE fits into it.

The values of a graph are the export's law of its size; what ONNX Runtime takes beyond them, on the
processor, was measured (docs/performance.md). Of networks on GPUs the VAE alone is counted.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from dataclasses import dataclass

from wanx.bundle.manifest import Manifest
from wanx.errors import UsageError
from wanx.runtime.available_memory import usable_memory
from wanx.runtime.options import ResolvedRun
from wanx.runtime.sessions.onnxruntime.providers import AUTO, CPU
from wanx.runtime.sessions.registry import device_memory, provider_of
from wanx.runtime.sizes import latent_shape
from wanx.runtime.vae.memory import PROCESS, VaeMemory, VaePlan

_log = logging.getLogger("wanx.runtime")
# Of the values of a graph whose sizes vary: the arena grows by doubling.
_ARENA = 2.2
_WIDENED = 16  # bytes for each weight of the largest layer: some are widened, and copied in order


@dataclass(frozen=True, kw_only=True)
class StageMemory:
    """Memory of one stage of a run.

    Attributes:
        name: as of :class:`wanx.runtime.stages.Stage`.
        weights: bytes that are mapped from files.
        other: all other bytes.
        vae: plan of the VAE in this stage, if it has a part in it.
        least: bytes of the stage where the VAE takes as little as it can, weights included.
        least_other: likewise, without them.
        on_gpu: whether this is memory of a GPU.
    """

    name: str
    weights: int
    other: int
    vae: VaePlan | None = None
    least: int
    least_other: int
    on_gpu: bool = False

    @property
    def total(self) -> int:
        """Bytes altogether."""
        return self.weights + self.other


def plan_memory(
    manifest: Manifest,
    run: ResolvedRun,
    *,
    limit: int | None = None,
    vram_budget: int | None = None,
    provider: str = AUTO,
) -> list[StageMemory]:
    """Memory of the stages of a run whose networks run on the processor, and of the VAE on a GPU.

    Args:
        manifest: of the bundle.
        run: of which the size counts.
        limit: bytes of the host that the process may take; None is what is free less a margin, and
            mapped weights do not count.
        vram_budget: bytes of the GPU; None is what is free.
        provider: that was asked for.

    Raises:
        UsageError: a stage takes more, with the least that would do.
    """
    host = usable_memory() if limit is None else limit
    device = device_memory(manifest, vram_budget)
    stages = list(_stages(manifest, run, host, device, provider))
    if limit is not None and (left := _not_counted(manifest, provider)):
        _log.warning("--memory does not count %s: another provider runs it", " and ".join(left))
    for stage in sorted(stages, key=lambda stage: stage.least, reverse=True):
        if stage.on_gpu:
            # What is free refuses nothing: of GPUs the law has not been measured.
            _require(stage, stage.least, vram_budget, vram_budget, "--vram-budget", "GPU memory")
        else:
            needed = stage.least_other if limit is None else stage.least
            _require(stage, needed, host, limit, "--memory", "memory")
    return stages


def _not_counted(manifest: Manifest, provider: str) -> list[str]:
    """Networks whose memory is the host's and not known."""
    names = ("text_encoder", "image_encoder", "dit")
    return [
        name
        for name in names
        if name in manifest.components
        and provider_of(manifest, name, provider) not in (CPU, "cuda", None)
    ]


def _require(
    stage: StageMemory, needed: int, budget: int | None, limit: int | None, option: str, kind: str
) -> None:
    """Refuse a stage that takes more than a budget, which a limit set or what is free."""
    if budget is None or needed <= budget:
        return
    takes = f"{_WORK[stage.name]} takes {needed / 1e9:.1f} GB of {kind}"
    advice = "choose a smaller --size or fewer --frames"
    if limit is None:
        raise UsageError(
            f"{takes}, and {budget / 1e9:.1f} GB are free; {advice}, end other programs, or say "
            f"how much it may take with {option} {_megabytes(stage.least)}"
        )
    raise UsageError(
        f"{takes}, more than {option} {_megabytes(limit)} allows; give {option} "
        f"{_megabytes(needed)} or more, or {advice}"
    )


_WORK = {
    "text": "encoding the prompt",
    "condition": "encoding the images or videos",
    "denoise": "denoising this size",
    "decode": "decoding this size, in the smallest tiles,",
}


def _megabytes(size: int) -> str:
    return f"{math.ceil(size / (1 << 20))}M"


def _stages(
    manifest: Manifest, run: ResolvedRun, host: int | None, device: int | None, provider: str
) -> Iterator[StageMemory]:
    config = manifest.config
    _, *latent = latent_shape(run.width, run.height, run.frames, config.vae)
    times, height, width = latent
    frames = times + len(run.references or ())
    tokens = frames * height * width // math.prod(config.dit.patch_size)
    text, dit = config.text_encoder, config.dit
    # Of the table of words a prompt reads a few rows.
    table = text.vocab_size * text.dim * (4 if manifest.precision == "fp32" else 2)
    yield from _network(
        manifest, "text", "text_encoder", 0, text.dim * text.ffn_dim, provider, unread=table
    )
    if config.task != "t2v":
        image = config.image_encoder
        if image is not None:
            largest = image.dim * image.ffn_dim
            yield from _network(manifest, "condition", "image_encoder", 0, largest, provider)
        clips = 2 if config.task == "vace" else 1  # what stays of the video, and what is drawn
        memory = VaeMemory(manifest, "vae_encoder_down", (times, height, width), provider, clips)
        yield from _vae("condition", memory, device if memory.on_gpu else host)
    yield from _network(manifest, "denoise", "dit", tokens, dit.dim * dit.ffn_dim, provider)
    memory = VaeMemory(manifest, "vae_decoder_up", (times, height, width), provider)
    yield from _vae("decode", memory, device if memory.on_gpu else host)


def _network(
    manifest: Manifest,
    stage: str,
    component: str,
    size: int,
    largest: int,
    provider: str,
    unread: int = 0,
) -> Iterator[StageMemory]:
    record = manifest.components[component]
    law = record.activation_bytes
    if law is None or provider_of(manifest, component, provider) != CPU:
        return
    weights = max(sum(manifest.files[name].size for name in record.weights) - unread, 0)
    other = PROCESS + math.ceil(_ARENA * (law.fixed + law.each * size)) + _WIDENED * largest
    if manifest.precision == "fp32":  # packed for its products when it is loaded, not mapped
        weights, other = 0, other + weights
    elif record.quantization is not None and component == "dit":  # packed beside the file's
        other += weights
    yield StageMemory(
        name=stage, weights=weights, other=other, least=weights + other, least_other=other
    )


def _vae(stage: str, memory: VaeMemory, budget: int | None) -> Iterator[StageMemory]:
    if not memory.known or (memory.on_gpu and budget is None):
        return
    plan, smallest = memory.plan(budget), memory.smallest()
    assert plan.bytes is not None
    assert smallest.bytes is not None
    yield StageMemory(
        name=stage, weights=plan.weights, other=plan.bytes - plan.weights, vae=plan,
        least=smallest.bytes, least_other=smallest.bytes - smallest.weights,
        on_gpu=memory.on_gpu,
    )  # fmt: skip
