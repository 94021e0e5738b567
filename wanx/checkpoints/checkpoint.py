"""Opening a Wan2.1 checkpoint, wherever its parts come from, without loading it."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from wanx.bundle.manifest import LoraRecord
from wanx.checkpoints import checkpoint_config as sizes
from wanx.checkpoints.layouts.base import Layout
from wanx.checkpoints.layouts.comfyui import ComfyUILayout, require_comfyui
from wanx.checkpoints.layouts.diffusers import DiffusersLayout
from wanx.checkpoints.layouts.files import WEIGHT_FILES, FilesLayout, NoLayout, open_part
from wanx.checkpoints.layouts.original import DIT_STEM, OriginalLayout
from wanx.checkpoints.lora.fuse import Lora, fuse
from wanx.checkpoints.part import Part
from wanx.checkpoints.tokenizer_source import TokenizerSource, find_tokenizer
from wanx.checkpoints.weights import ComponentWeights
from wanx.config.models import (
    PRESETS,
    DiTConfig,
    ImageEncoderConfig,
    ModelConfig,
    Task,
    TextEncoderConfig,
    VAEConfig,
)
from wanx.errors import CorruptInputError, UsageError, WanxError
from wanx.hub.reference import HubReference, hub_reference, is_uri


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A source of weights.

    Attributes:
        source: the folder or file.
        layout: such as ``original`` or ``diffusers``.
        config: sizes of the networks; named after its preset, or ``custom``.
        components: weights of ``dit``, ``text_encoder`` and ``vae``, and for tasks that start from
            images of ``image_encoder``.
        tokenizer: of the text encoder; write it with
            :func:`wanx.checkpoints.tokenizer_source.write_tokenizer`.
        loras: that are put into the weights of ``dit``.
        earlier_loras: that were in them before, of a bundle.
    """

    source: Path
    layout: str
    config: ModelConfig
    components: dict[str, ComponentWeights]
    tokenizer: TokenizerSource
    loras: tuple[LoraRecord, ...] = ()
    earlier_loras: tuple[LoraRecord, ...] = ()

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors as stored."""
        return sum(weights.nbytes for weights in self.components.values())


@dataclass(frozen=True, kw_only=True)
class PartPaths:
    """Parts that are given by themselves, each by a file or a folder; None takes the source's.

    A text that begins with ``hf://`` is a file on the hub.

    Attributes:
        dit: of the transformer; with ``comfyui`` the name of a file there is enough.
        text_encoder: of umT5.
        vae: of the VAE.
        image_encoder: of CLIP's vision tower.
        tokenizer: ``tokenizer.json``, ``spiece.model``, or their folder.
        comfyui: ComfyUI's folder of models, in which the others are found.
    """

    dit: Path | HubReference | None = None
    text_encoder: Path | HubReference | None = None
    vae: Path | HubReference | None = None
    image_encoder: Path | HubReference | None = None
    tokenizer: Path | HubReference | None = None
    comfyui: Path | None = None

    def __post_init__(self) -> None:
        """Take texts for paths."""
        for field in dataclasses.fields(self):
            if isinstance(value := getattr(self, field.name), str):
                on_hub = hub_reference(value) if is_uri(value) else None
                object.__setattr__(self, field.name, on_hub or Path(value))

    def path(self, part: str) -> Path | None:
        """Path of a part, which is fetched before where it is on the hub."""
        value = getattr(self, part)
        assert value is None or isinstance(value, Path)
        return value

    def __bool__(self) -> bool:
        """True if there is any."""
        return any(getattr(self, field.name) is not None for field in dataclasses.fields(self))


NO_PARTS = PartPaths()


def open_checkpoint(
    source: Path | None,
    *,
    task: Task | None = None,
    parts: PartPaths = NO_PARTS,
    loras: Sequence[Lora] = (),
    full_precision: bool = False,
) -> Checkpoint:
    """Recognise the layout of a checkpoint and read what its files say about themselves.

    Args:
        source: folder of the checkpoint, or a file of weights; None where all parts are given.
        task: what it has to be for; None takes what it is.
        parts: in the place of the source's.
        loras: put into the weights of the transformer.
        full_precision: take weights in fp32 where a copy in fewer bits lies beside them.

    Raises:
        UsageError: the source is missing, not a checkpoint, or of an unsupported model or task.
        CorruptInputError: files are missing, damaged, unsafe or contradict each other.
        EnvironmentMismatchError: a package that reads a file is missing.
        WanxError: the operating system refuses to read them.
    """
    try:
        checkpoint = _assemble(_layout(source, parts, full_precision), parts)
        if loras:
            checkpoint = with_loras(checkpoint, loras)
    except OSError as error:
        raise WanxError(
            f"cannot read {error.filename or source}: {error.strerror}; check its permissions"
        ) from None
    if task is not None and task != checkpoint.config.task:
        raise UsageError(
            f"{checkpoint.source} is a checkpoint for {checkpoint.config.task}, not {task}; leave "
            "the task out or give another checkpoint"
        )
    return checkpoint


def with_loras(checkpoint: Checkpoint, loras: Sequence[Lora]) -> Checkpoint:
    """Put LoRAs into the weights of the transformer; see :func:`fuse`."""
    weights, fused = fuse(checkpoint.components["dit"], loras)
    return dataclasses.replace(
        checkpoint,
        components=checkpoint.components | {"dit": weights},
        loras=(*checkpoint.loras, *fused),
    )


def _layout(source: Path | None, parts: PartPaths, full_precision: bool) -> Layout:
    if parts.comfyui is not None:
        if source is not None:
            raise UsageError(f"--comfyui takes no source beside it; leave {source} out")
        return require_comfyui(parts.comfyui)
    if source is None:
        named = ("dit", "text_encoder", "vae", "image_encoder", "tokenizer")
        return NoLayout(next(path for name in named if (path := parts.path(name))))
    if not source.exists():
        raise UsageError(f"{source} does not exist; give the folder of a Wan2.1 checkpoint")
    if not source.is_dir():
        if source.suffix not in WEIGHT_FILES:
            raise UsageError(f"{source} is a file; give the folder of the checkpoint that it is in")
        return FilesLayout(source)
    for layout in (DiffusersLayout, OriginalLayout):
        if layout.matches(source):
            return layout(source, full_precision=full_precision)
    if ComfyUILayout.matches(source):
        raise UsageError(
            f"{source} is ComfyUI's folder of models; choose one with --comfyui {source} --dit NAME"
        )
    names = sorted(entry.name for entry in source.iterdir())
    content = f"only {', '.join(names[:5])}" if names else "nothing"
    raise UsageError(
        f"{source} holds {content}; expected the files of Wan-AI/Wan2.1-* (config.json, "
        f"{DIT_STEM}*.safetensors, …) or of its Diffusers version (model_index.json, …)"
    )


def _assemble(layout: Layout, parts: PartPaths) -> Checkpoint:
    """Open every part, those that are given by themselves and the layout's others."""
    given = {
        component: path
        for component in ("dit", "text_encoder", "vae", "image_encoder")
        if (path := parts.path(component)) is not None
    }
    if isinstance(layout, ComfyUILayout):
        if "dit" not in given:
            raise UsageError("--comfyui takes the name of a diffusion model with --dit")
        if not given["dit"].is_file():
            given["dit"] = layout.dit(str(given["dit"]))
    needed = tuple(name for name in ("dit", "text_encoder", "vae") if name not in given)
    layout.require(needed, tokenizer=parts.tokenizer is None and "text_encoder" in needed)

    def part(component: str) -> Part:
        if component in given:
            return open_part(component, given[component])
        return layout.part(component)

    dit, text_encoder, vae = (part(name) for name in ("dit", "text_encoder", "vae"))
    assert isinstance(dit.config, DiTConfig)
    images = None
    if dit.config.image_dim is not None:
        if "image_encoder" not in given:
            layout.require(("image_encoder",), tokenizer=False)
        images = part("image_encoder")
    if (own_tokenizer := parts.path("tokenizer")) is not None:
        tokenizer: TokenizerSource | None = find_tokenizer(own_tokenizer)
    else:
        own = text_encoder.tokenizer
        tokenizer = own if "text_encoder" in given and own else layout.tokenizer() or own
    if tokenizer is None:
        raise CorruptInputError(
            f"{text_encoder.weights.files[0]} brings no tokenizer; give tokenizer.json or "
            "spiece.model of google/umt5-xxl with --tokenizer"
        )
    return _checkpoint(layout, dit, text_encoder, vae, images, tokenizer)


def _checkpoint(
    layout: Layout,
    dit: Part,
    text_encoder: Part,
    vae: Part,
    images: Part | None,
    tokenizer: TokenizerSource,
) -> Checkpoint:
    """Check that the parts are of one model, and name it."""
    assert isinstance(dit.config, DiTConfig)
    assert isinstance(text_encoder.config, TextEncoderConfig)
    assert isinstance(vae.config, VAEConfig)
    dit_config, source = dit.config, layout.source
    image_encoder_config: ImageEncoderConfig | None = None
    parts = [dit, text_encoder, vae]
    agreements: list[tuple[str, int | None, str, int]] = [
        ("text features", dit_config.text_dim, "text encoder", text_encoder.config.dim),
        ("latent channels", dit_config.out_dim, "VAE", vae.config.z_dim),
    ]
    if images is not None:
        assert isinstance(images.config, ImageEncoderConfig)
        parts.append(images)
        image_encoder_config = images.config
        tokens = image_encoder_config.tokens
        if dit_config.image_frames == 1:  # then nothing in the DiT tells their number
            dit_config = dataclasses.replace(dit_config, image_tokens=tokens)
        agreements += [
            ("image features", dit_config.image_dim, "image encoder", image_encoder_config.dim),
            ("tokens of an image", dit_config.image_tokens, "image encoder", tokens),
        ]
    for quantity, dit_size, other, other_size in agreements:
        if dit_size != other_size:
            raise CorruptInputError(
                f"{source}: the DiT has {dit_size} {quantity}, the {other} {other_size}; the parts "
                "are of different models"
            )
    components = {part.component: part.weights for part in parts}
    task = sizes.infer_task(components["dit"].tensors)
    preset_of_task = next(preset for preset in PRESETS.values() if preset.task == task)
    config = ModelConfig(
        name="custom",
        task=task,
        dit=dit_config,
        text_encoder=text_encoder.config,
        image_encoder=image_encoder_config,
        vae=vae.config,
        defaults=preset_of_task.defaults,
    )
    for preset in PRESETS.values():
        if preset == dataclasses.replace(config, name=preset.name, defaults=preset.defaults):
            config = preset
    return Checkpoint(
        source=source, layout=layout.name, config=config, components=components, tokenizer=tokenizer
    )
