"""The pipeline of diffusers, with the weights, the noise and the noise levels of a bundle."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from wanx.benchmarks.peers.requirements import require_peer
from wanx.benchmarks.peers.weights import plain_weights
from wanx.bundle.reader import Bundle
from wanx.checkpoints.key_maps import DIT, TEXT_ENCODER, KeyMap, vae_key_map
from wanx.errors import UsageError
from wanx.runtime.options import ResolvedRun
from wanx.runtime.output.video import VideoWriter
from wanx.runtime.sampling.noise import randn
from wanx.runtime.sampling.solvers import make_sampler
from wanx.runtime.sizes import latent_shape
from wanx.runtime.stages import Stage, StageTimer

_SCHEDULERS = {"unipc": "UniPCMultistepScheduler", "dpm++": "DPMSolverMultistepScheduler"}


@dataclass(frozen=True, kw_only=True, eq=False)
class PeerRun:
    """Stages and latents of a peer's run.

    Attributes:
        stages: as those of wanx; ``decode`` is one call for the whole video, and the load of
            ``denoise`` holds a first step of its own, which compiles, where that is asked for.
        first_latent: float32 ``[C, T, h, w]`` after the first step.
        latent: likewise after the last.
    """

    stages: tuple[Stage, ...]
    first_latent: NDArray[np.float32]
    latent: NDArray[np.float32]


@torch.inference_mode()
def generate(
    bundle: Bundle,
    run: ResolvedRun,
    *,
    compiled: bool,
    threads: int | None,
    output: Path,
) -> PeerRun:
    """Make a video as a user of diffusers does: on the GPU in bf16, else on the processor in fp32.

    Networks are built and freed stage by stage, as in wanx. The scheduler is that of diffusers, at
    the noise levels of wanx.

    Args:
        bundle: whose weights, tokenizer and configuration are taken; 8-bit weights become floats.
        run: what to make.
        compiled: whether the transformer runs under ``torch.compile``.
        threads: of the processor; None takes all cores.
        output: the file to write.

    Raises:
        EnvironmentMismatchError: packages are missing.
        UsageError: the task is not text-to-video.
    """
    require_peer(bundle)
    if threads is not None:
        torch.set_num_threads(threads)
    diffusers: Any = importlib.import_module("diffusers")
    gpu = torch.cuda.is_available()
    device, dtype = ("cuda", torch.bfloat16) if gpu else ("cpu", torch.float32)
    wait: Callable[[], None] = torch.cuda.synchronize if gpu else _nothing
    config, timer = bundle.manifest.config, StageTimer()
    latents: list[Tensor] = []

    def pipeline(**parts: Any) -> Any:
        missing = {"tokenizer", "text_encoder", "transformer", "vae"} - parts.keys()
        pipeline = diffusers.WanPipeline(
            **dict.fromkeys(missing), **{"scheduler": _scheduler(diffusers, run), **parts}
        )
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    with timer.stage("text"):
        with timer.loading():
            texts = pipeline(
                tokenizer=_tokenizer(bundle), text_encoder=_text_encoder(bundle, dtype, device)
            )
        scale = max(run.guidance.scales)
        guided = scale > 1
        length = config.dit.text_len
        prompts = [run.prompt, *([run.negative_prompt] if guided else [])]
        contexts = []
        for prompt in prompts:
            with timer.call():
                embeds, _ = texts.encode_prompt(
                    prompt, do_classifier_free_guidance=False, max_sequence_length=length,
                    device=device, dtype=dtype,
                )  # fmt: skip
                contexts.append(embeds)
                wait()
        del texts
    shape = latent_shape(run.width, run.height, run.frames, config.vae)
    noise = torch.from_numpy(randn(shape, run.seed))[None].to(device)
    with timer.stage("denoise"):
        with timer.loading():
            transformer = _transformer(diffusers, bundle, dtype, device)
            if compiled:
                # A module that is compiled in place is still what the pipeline expects.
                transformer.compile(dynamic=False)
            video = pipeline(transformer=transformer, vae=_Strides(config.vae))
            denoise = partial(
                video,
                prompt_embeds=contexts[0],
                negative_prompt_embeds=contexts[1] if guided else None,
                height=run.height, width=run.width, num_frames=run.frames,
                num_inference_steps=run.steps, guidance_scale=scale,
                latents=noise, output_type="latent",
            )  # fmt: skip
            if compiled:
                # Compiled code holds for calls of one form, so the pipeline itself makes the first.
                denoise(callback_on_step_end=_interrupt)
                wait()

        def note(_: Any, step: int, timestep: Any, values: dict[str, Tensor]) -> dict[str, Any]:
            wait()
            timer.lap()
            if step in (0, run.steps - 1):
                latents.append(values["latents"].clone())
            return {}

        latent = denoise(callback_on_step_end=note).frames
        del denoise, video, transformer
    with timer.stage("decode"):
        with timer.loading():
            vae = _vae(diffusers, bundle, device)
        with timer.call():
            mean, std = (
                torch.tensor(values, device=device).view(1, -1, 1, 1, 1)
                for values in (config.vae.latent_mean, config.vae.latent_std)
            )
            pixels = vae.decode(latent.float() * std + mean, return_dict=False)[0]
            levels = (pixels / 2 + 0.5).clamp(0, 1).mul(255).round().byte()
            frames = levels[0].permute(1, 2, 3, 0).cpu().numpy()
        with timer.writing(), VideoWriter(output, run.width, run.height, fps=run.fps) as writer:
            writer.write(frames)
    first, last = (latent[0].float().cpu().numpy() for latent in (latents[0], latents[-1]))
    return PeerRun(stages=tuple(timer.stages), first_latent=first, latent=last)


def _nothing() -> None:
    """On the processor a call returns when it is done."""


def _interrupt(video: Any, *_: Any) -> dict[str, Any]:
    """End a run after the step that calls this back, as diffusers documents."""
    video._interrupt = True
    return {}


class _Strides:
    """Stand-in for a VAE that the pipeline asks for its strides and does not run."""

    def __init__(self, config: Any) -> None:
        self.config = self
        self.scale_factor_temporal = config.temporal_stride
        self.scale_factor_spatial = config.spatial_stride
        self.dtype = torch.float32


def _scheduler(diffusers: Any, run: ResolvedRun) -> Any:
    if run.solver not in _SCHEDULERS or run.sigmas is not None:
        raise UsageError(
            f"Diffusers is measured with {' and '.join(_SCHEDULERS)} and their own noise levels; "
            "leave the peer out, or --preset"
        )
    scheduler = getattr(diffusers, _SCHEDULERS[run.solver])(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=run.shift
    )
    ours, original = make_sampler(run.solver, run.steps, run.shift), scheduler.set_timesteps

    def set_timesteps(steps: int, device: Any = None) -> None:
        original(steps, device=device)
        scheduler.sigmas = torch.from_numpy(ours.sigmas)
        scheduler.timesteps = torch.tensor(ours.timesteps, device=device)

    scheduler.set_timesteps = set_timesteps
    return scheduler


def _tokenizer(bundle: Bundle) -> Any:
    transformers: Any = importlib.import_module("transformers")
    return transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(bundle.held(bundle.tokenizer_path)),
        pad_token="<pad>", eos_token="</s>", unk_token="<unk>",
    )  # fmt: skip


def _text_encoder(bundle: Bundle, dtype: torch.dtype, device: str) -> Any:
    transformers: Any = importlib.import_module("transformers")
    accelerate: Any = importlib.import_module("accelerate")
    sizes = bundle.manifest.config.text_encoder
    with accelerate.init_empty_weights():
        model = transformers.UMT5EncoderModel(
            transformers.UMT5Config(
                vocab_size=sizes.vocab_size, d_model=sizes.dim, d_kv=sizes.head_dim,
                d_ff=sizes.ffn_dim, num_heads=sizes.num_heads, num_layers=sizes.num_layers,
                relative_attention_num_buckets=sizes.num_buckets,
                relative_attention_max_distance=sizes.max_distance,
                feed_forward_proj="gated-gelu", layer_norm_epsilon=sizes.eps,
            )
        )  # fmt: skip
    model = _with_weights(model, bundle, "text_encoder", TEXT_ENCODER, dtype, device)
    model.tie_weights()
    return model


def _transformer(diffusers: Any, bundle: Bundle, dtype: torch.dtype, device: str) -> Any:
    accelerate: Any = importlib.import_module("accelerate")
    sizes = bundle.manifest.config.dit
    with accelerate.init_empty_weights():
        model = diffusers.WanTransformer3DModel(
            patch_size=sizes.patch_size, num_attention_heads=sizes.num_heads,
            attention_head_dim=sizes.head_dim, in_channels=sizes.in_dim,
            out_channels=sizes.out_dim, text_dim=sizes.text_dim, freq_dim=sizes.freq_dim,
            ffn_dim=sizes.ffn_dim, num_layers=sizes.num_layers, cross_attn_norm=True,
            eps=sizes.eps,
        )  # fmt: skip
    return _with_weights(model, bundle, "dit", DIT, dtype, device)


def _vae(diffusers: Any, bundle: Bundle, device: str) -> Any:
    accelerate: Any = importlib.import_module("accelerate")
    sizes = bundle.manifest.config.vae
    with accelerate.init_empty_weights():
        model = diffusers.AutoencoderKLWan(
            base_dim=sizes.base_dim, z_dim=sizes.z_dim, dim_mult=list(sizes.multipliers),
            num_res_blocks=sizes.num_res_blocks,
            temperal_downsample=list(sizes.temporal_downsample),
        )  # fmt: skip
    names = vae_key_map(len(sizes.multipliers), sizes.num_res_blocks)
    # Pipelines of diffusers keep the VAE in fp32.
    return _with_weights(model, bundle, "vae_decoder_up_first", names, torch.float32, device)


def _with_weights(
    model: Any, bundle: Bundle, component: str, names: KeyMap, dtype: torch.dtype, device: str
) -> Any:
    """Give a model without weights those of a component; networks that do not run go without."""
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    wide = tuple(model._keep_in_fp32_modules or ())
    state = {}
    for original, tensor in plain_weights(bundle, component):
        theirs = names.to_diffusers(original)
        if theirs is not None and theirs in shapes:
            kept = torch.float32 if any(part in theirs for part in wide) else dtype
            state[theirs] = tensor.reshape(shapes[theirs]).to(device, kept)
    model.load_state_dict(state, strict=False, assign=True)
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, buffer.to(device))
    return model.eval().requires_grad_(False)
