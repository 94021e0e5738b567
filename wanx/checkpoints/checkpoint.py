"""Opening a Wan2.1 checkpoint, in whichever layout it came, without loading it."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from wanx.checkpoints import checkpoint_config as sizes
from wanx.checkpoints import image_encoder_checkpoint as image_encoder
from wanx.checkpoints import key_maps
from wanx.checkpoints.component import open_component
from wanx.checkpoints.config_file import ConfigFile
from wanx.checkpoints.renamings import file_renaming
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
from wanx.files.input_file import open_input

_DIT_STEM = "diffusion_pytorch_model"
_VAE_STEM = "Wan2.1_VAE"
_T5_STEM = "models_t5_umt5-xxl-enc-bf16"
_DIFFUSERS_PARTS = ("WanTransformer3DModel", "WanVACETransformer3DModel", "AutoencoderKLWan")


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A source of weights.

    Attributes:
        source: the folder.
        layout: ``original`` or ``diffusers``.
        config: sizes of the networks; named after its preset, or ``custom``.
        components: weights of ``dit``, ``text_encoder`` and ``vae``, and for tasks that start from
            images of ``image_encoder``.
        tokenizer: ``tokenizer.json``, or ``spiece.model`` where only that exists; copy it with
            :func:`wanx.checkpoints.tokenizer_file.write_tokenizer`.
    """

    source: Path
    layout: str
    config: ModelConfig
    components: dict[str, ComponentWeights]
    tokenizer: Path

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors as stored."""
        return sum(weights.nbytes for weights in self.components.values())


def open_checkpoint(source: Path, *, task: Task | None = None) -> Checkpoint:
    """Recognise the layout of a checkpoint and read what its files say about themselves.

    Args:
        source: folder of the checkpoint.
        task: what it has to be for; None takes what it is.

    Raises:
        UsageError: the folder is missing, not a checkpoint, or of an unsupported model or task.
        CorruptInputError: files are missing, damaged, unsafe or contradict each other.
        WanxError: the operating system refuses to read them.
    """
    try:
        checkpoint = _open(source)
    except OSError as error:
        raise WanxError(
            f"cannot read {error.filename or source}: {error.strerror}; check its permissions"
        ) from None
    if task is not None and task != checkpoint.config.task:
        raise UsageError(
            f"{source} is a checkpoint for {checkpoint.config.task}, not {task}; leave the task "
            "out or give another checkpoint"
        )
    return checkpoint


def _open(source: Path) -> Checkpoint:
    if not source.exists():
        raise UsageError(f"{source} does not exist; give the folder of a Wan2.1 checkpoint")
    if not source.is_dir():
        raise UsageError(f"{source} is a file; give the folder of the checkpoint that it is in")
    names = sorted(entry.name for entry in source.iterdir())
    for matches, open_layout in _LAYOUTS:
        if matches(source):
            return open_layout(source)
    content = f"only {', '.join(names[:5])}" if names else "nothing"
    raise UsageError(
        f"{source} holds {content}; expected the files of Wan-AI/Wan2.1-* (config.json, "
        f"{_DIT_STEM}*.safetensors, …) or of its Diffusers version (model_index.json, …)"
    )


def _is_original(source: Path) -> bool:
    # A .bin is refused, with the name that it should have.
    return any(any(source.glob(f"{_DIT_STEM}*{end}")) for end in (".safetensors*", ".pth", ".bin"))


def _open_original(source: Path) -> Checkpoint:
    config_file = ConfigFile(source / "config.json")
    if config_file.values.get("_class_name") in _DIFFUSERS_PARTS:
        raise UsageError(
            f"{source} is one part of a Diffusers checkpoint; give the folder that it is in"
        )
    _require_files(
        source,
        f"{_T5_STEM}.pth or {_T5_STEM}.safetensors",
        f"{_VAE_STEM}.pth or {_VAE_STEM}.safetensors",
        "google/umt5-xxl/tokenizer.json or google/umt5-xxl/spiece.model",
    )
    dit = open_component("dit", source, _DIT_STEM)
    text_encoder = open_component("text_encoder", source, _T5_STEM)
    vae = open_component("vae", source, _VAE_STEM)
    dit_config = sizes.dit_config(sizes.original_dit_fields(config_file), dit, config_file.path)
    images = None
    if dit_config.image_dim is not None:
        _require_files(source, f"{image_encoder.STEM}.pth or {image_encoder.STEM}.safetensors")
        images = image_encoder.open_original_image_encoder(source)
    return _checkpoint(
        source,
        "original",
        (dit, text_encoder, vae),
        images,
        dit_config=dit_config,
        text_encoder_config=sizes.text_encoder_config({}, text_encoder, text_encoder.files[0]),
        vae_config=sizes.vae_config({}, vae, vae.files[0]),
        tokenizer=_tokenizer(source / "google" / "umt5-xxl"),
    )


def _is_diffusers(source: Path) -> bool:
    return (source / "model_index.json").exists() or (source / "transformer").is_dir()


def _open_diffusers(source: Path) -> Checkpoint:
    _require_files(
        source,
        "model_index.json",
        "transformer/config.json",
        "text_encoder/config.json",
        "vae/config.json",
        "tokenizer/tokenizer.json or tokenizer/spiece.model",
    )
    # Wan2.2 splits the steps between two transformers, or gives each token its own timestep.
    index = ConfigFile(source / "model_index.json")
    index.require("transformer_2", None, [None, None])
    index.require("expand_timesteps", None, False)
    dit_file, text_encoder_file, vae_file = (
        ConfigFile(source / part / "config.json") for part in ("transformer", "text_encoder", "vae")
    )
    dit_fields = sizes.diffusers_dit_fields(dit_file)
    text_encoder_fields = sizes.diffusers_text_encoder_fields(text_encoder_file)
    vae_fields = sizes.diffusers_vae_fields(vae_file)
    vae_map = key_maps.vae_key_map(len(vae_fields["multipliers"]), vae_fields["num_res_blocks"])
    dit = open_component("dit", source / "transformer", _DIT_STEM, key_maps.DIT)
    text_encoder = open_component(
        "text_encoder", source / "text_encoder", "model", key_maps.TEXT_ENCODER
    )
    vae = open_component("vae", source / "vae", _DIT_STEM, vae_map)
    dit_config = sizes.dit_config(dit_fields, dit, dit_file.path)
    images = None
    if dit_config.image_dim is not None:
        _require_files(source, "image_encoder/config.json")
        images = image_encoder.open_diffusers_image_encoder(source / "image_encoder")
    return _checkpoint(
        source,
        "diffusers",
        (dit, text_encoder, vae),
        images,
        dit_config=dit_config,
        text_encoder_config=sizes.text_encoder_config(
            text_encoder_fields, text_encoder, text_encoder_file.path
        ),
        vae_config=sizes.vae_config(vae_fields, vae, vae_file.path),
        tokenizer=_tokenizer(source / "tokenizer"),
    )


_LAYOUTS: tuple[tuple[Callable[[Path], bool], Callable[[Path], Checkpoint]], ...] = (
    (_is_diffusers, _open_diffusers),
    (_is_original, _open_original),
)


def _require_files(source: Path, *needed: str) -> None:
    missing = [
        names
        for names in needed
        if not any((source / name).exists() for name in names.split(" or "))
    ]
    if missing:
        # Of "a.pth or a.safetensors" the stem is a, whatever the suffix of what is there.
        stems = [re.sub(r"\.(pth|safetensors) or .*", "", names) for names in missing]
        renamings = [file_renaming(source, stem) for stem in stems]
        if all(renamings):
            remedy = ", and ".join(filter(None, renamings))
        else:
            remedy = "download it completely"
        raise CorruptInputError(f"{source} lacks {', '.join(missing)}; {remedy}")


def _checkpoint(
    source: Path,
    layout: str,
    parts: tuple[ComponentWeights, ...],
    images: image_encoder.ImageEncoderParts | None,
    *,
    dit_config: DiTConfig,
    text_encoder_config: TextEncoderConfig,
    vae_config: VAEConfig,
    tokenizer: Path,
) -> Checkpoint:
    image_encoder_config: ImageEncoderConfig | None = None
    agreements: list[tuple[str, int | None, str, int]] = [
        ("text features", dit_config.text_dim, "text encoder", text_encoder_config.dim),
        ("latent channels", dit_config.out_dim, "VAE", vae_config.z_dim),
    ]
    if images is not None:
        weights, image_encoder_config = images
        parts, tokens = (*parts, weights), image_encoder_config.tokens
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
    components = {weights.component: weights for weights in parts}
    task = sizes.infer_task(components["dit"].tensors)
    preset_of_task = next(preset for preset in PRESETS.values() if preset.task == task)
    config = ModelConfig(
        name="custom",
        task=task,
        dit=dit_config,
        text_encoder=text_encoder_config,
        image_encoder=image_encoder_config,
        vae=vae_config,
        defaults=preset_of_task.defaults,
    )
    for preset in PRESETS.values():
        if preset == dataclasses.replace(config, name=preset.name, defaults=preset.defaults):
            config = preset
    return Checkpoint(
        source=source, layout=layout, config=config, components=components, tokenizer=tokenizer
    )


def _tokenizer(folder: Path) -> Path:
    path = folder / "tokenizer.json"
    if not path.exists():
        path = folder / "spiece.model"
    open_input(path).close()
    return path
