"""Conditioning of the denoiser beside text: encoded images, control videos, masks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from wanx.config.models import ModelConfig
from wanx.runtime.inputs import control
from wanx.runtime.inputs.image import to_signed
from wanx.runtime.inputs.reading import Inputs
from wanx.runtime.inputs.resize import clip_pixels, cover, letterbox, resize_bicubic
from wanx.runtime.options import ResolvedRun
from wanx.runtime.sessions.base import Array, OpenSession
from wanx.runtime.sizes import latent_shape
from wanx.runtime.tokens import patchify
from wanx.runtime.vae.encode import Clip

Float32 = NDArray[np.float32]
Encode = Callable[[Sequence[tuple[Clip, int]]], list[Float32]]


@dataclass(frozen=True, kw_only=True)
class Conditioning:
    """Inputs of the denoiser that stay the same over all steps, beside text.

    Attributes:
        channels: ``[c, T, h, w]``, put behind the channels of the noisy latent (i2v, flf2v).
        constants: further inputs of the denoiser's graph.
        references: latent frames in front of the video, which are not decoded (vace).
    """

    channels: Float32 | None = None
    constants: dict[str, Array] = field(default_factory=dict)
    references: int = 0


def condition(
    run: ResolvedRun,
    inputs: Inputs,
    config: ModelConfig,
    open_session: OpenSession,
    encode: Encode,
) -> Conditioning:
    """Encode the inputs of a run, with one component in memory at a time.

    Args:
        run: that they are for.
        inputs: images and videos.
        config: of the model.
        open_session: gives the image encoder.
        encode: clips, each with its number of frames, to latents ``[z, T, h, w]``.
    """
    if config.task == "vace":
        return _control(run, inputs, config, encode)
    if config.task == "t2v":
        return Conditioning()
    return _images(run, inputs, config, open_session, encode)


def _images(
    run: ResolvedRun,
    inputs: Inputs,
    config: ModelConfig,
    open_session: OpenSession,
    encode: Encode,
) -> Conditioning:
    """Condition on the first frame, and on the last one where there is one.

    The video around them is empty (zeros); a mask of four channels, one for each frame of a latent
    frame, is 1 on the frames that there are. The first latent frame has one frame only, whose mask
    stands four times.
    """
    assert inputs.image is not None
    assert config.image_encoder is not None
    pixels = [inputs.image]
    if inputs.last_image is not None:
        height, width, _ = inputs.image.shape
        pixels.append(cover(inputs.last_image, height, width))
    images = [to_signed(image) for image in pixels]
    features = []
    with open_session("image_encoder") as session:
        for image in images:
            clip_input = clip_pixels(image, config.image_encoder.image_size)[None]
            features.append(session.run({"pixels": clip_input})["features"])
    frames = [resize_bicubic(image, run.height, run.width) for image in images]
    known = dict(zip((0, run.frames - 1), frames, strict=False))

    def clip(start: int, end: int) -> Float32:
        empty = np.zeros_like(frames[0])
        return np.stack([known.get(i, empty) for i in range(start, end)], axis=1)

    (latent,) = encode([(clip, run.frames)])
    is_known = np.isin(np.arange(run.frames), list(known)).astype(np.float32)
    stride = config.vae.temporal_stride
    mask = np.concatenate([np.repeat(is_known[:1], stride), is_known[1:]]).reshape(-1, stride).T
    mask = np.broadcast_to(mask[..., None, None], (stride, *latent.shape[1:]))
    return Conditioning(
        channels=np.concatenate([mask, latent]),
        constants={"image_context": np.concatenate(features, axis=1)},
    )


def _control(run: ResolvedRun, inputs: Inputs, config: ModelConfig, encode: Encode) -> Conditioning:
    """Condition on a control video, whose mask is 1 where to draw anew, and on references.

    Without a mask everything is drawn anew; without a video, on grey.
    """
    frames, size = run.frames, (run.height, run.width)
    pixels = masked = None
    if inputs.video is not None:
        ids = control.sample_frames(inputs.video.times, frames)
        pixels = inputs.video.read(ids, *size)
        if inputs.mask is not None:
            masked = inputs.mask.read(ids, *size)

    def part(start: int, end: int) -> tuple[Float32, Float32]:
        shape = (end - start, *size)
        video = (
            np.zeros((3, *shape), np.float32) if pixels is None else to_signed(pixels[start:end])
        )
        mask = (
            np.ones(shape, np.float32) if masked is None else control.mask_values(masked[start:end])
        )
        return control.split_by_mask(video, mask)

    references = [letterbox(to_signed(item), *size)[:, None] for item in inputs.references]
    inactive, reactive, *encoded = encode(
        [
            (lambda start, end: part(start, end)[0], frames),
            (lambda start, end: part(start, end)[1], frames),
            *((lambda start, end, image=image: image, 1) for image in references),
        ]
    )
    mask = np.ones((frames, *size), np.float32) if masked is None else control.mask_values(masked)
    hints = control.with_references(
        np.concatenate([inactive, reactive]),
        encoded,
        control.mask_latent(mask, inactive.shape[1], config.vae.spatial_stride),
    )
    layers = len(config.dit.vace_layers)
    with np.errstate(over="ignore"):  # the first step refuses what is not finite
        scale = np.full(layers, run.vace_scale, np.float32)
    return Conditioning(
        constants={
            "vace_tokens": patchify(hints, config.dit.patch_size)[None],
            "vace_scale": scale,
        },
        references=len(references),
    )


def noise_shape(
    run: ResolvedRun, conditioning: Conditioning, config: ModelConfig
) -> tuple[int, int, int, int]:
    """Shape ``[C, T, h, w]`` of the latent that is denoised, references included."""
    channels, times, rows, columns = latent_shape(run.width, run.height, run.frames, config.vae)
    return channels, times + conditioning.references, rows, columns
