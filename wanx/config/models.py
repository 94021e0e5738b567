"""Model facts of Wan2.1, in one place: sizes of the networks, defaults of the tasks."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal

Task = Literal["t2v", "i2v", "flf2v", "vace"]

NEGATIVE_PROMPT = (
    "色调艳丽，过曝，静态，细节模糊不清，字幕，风格，作品，画作，画面，静止，整体发灰，最差质量，"
    "低质量，JPEG压缩残留，丑陋的，残缺的，多余的手指，画得不好的手部，画得不好的脸部，畸形的，"
    "毁容的，形态畸形的肢体，手指融合，静止不动的画面，杂乱的背景，三条腿，背景人很多，倒着走"
)


@dataclass(frozen=True, kw_only=True)
class DiTConfig:
    """Sizes of the diffusion transformer.

    ``image_dim`` switches on the decoupled image cross attention (I2V, FLF2V), ``image_frames`` is
    the number of images it attends to, and ``vace_layers`` lists the blocks that receive a hint.
    """

    dim: int
    ffn_dim: int
    num_heads: int
    num_layers: int
    in_dim: int = 16
    out_dim: int = 16
    freq_dim: int = 256
    text_len: int = 512
    text_dim: int = 4096
    patch_size: tuple[int, int, int] = (1, 2, 2)
    eps: float = 1e-6
    image_dim: int | None = None
    image_tokens: int = 257
    image_frames: int = 1
    vace_layers: tuple[int, ...] = ()
    vace_in_dim: int = 96

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.dim // self.num_heads

    @property
    def patch_volume(self) -> int:
        """Latent cells in one patch."""
        t, h, w = self.patch_size
        return t * h * w

    @property
    def token_dim(self) -> int:
        """Features of one input token: the latent channels of one patch."""
        return self.in_dim * self.patch_volume

    @property
    def velocity_dim(self) -> int:
        """Features of one output token."""
        return self.out_dim * self.patch_volume

    @property
    def rope_dims(self) -> tuple[int, int, int]:
        """Rotary dimensions of the time, height and width axes; they add up to ``head_dim``."""
        side = 2 * (self.head_dim // 6)
        return self.head_dim - 2 * side, side, side


@dataclass(frozen=True, kw_only=True)
class TextEncoderConfig:
    """Sizes of the umT5 encoder; ``dim`` is also the summed width of its heads."""

    vocab_size: int = 256384
    dim: int = 4096
    ffn_dim: int = 10240
    num_heads: int = 64
    head_dim: int = 64
    num_layers: int = 24
    num_buckets: int = 32
    max_distance: int = 128
    eps: float = 1e-6


# Of the pixels that CLIP was trained on, in RGB from 0 to 1.
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True, kw_only=True)
class ImageEncoderConfig:
    """Sizes of the CLIP vision tower, whose last layer is never read."""

    dim: int = 1280
    ffn_dim: int = 5120
    num_heads: int = 16
    num_layers: int = 32
    patch_size: int = 14
    image_size: int = 224
    eps: float = 1e-5

    @property
    def used_layers(self) -> int:
        """Layers that run: all but the last."""
        return self.num_layers - 1

    @property
    def tokens(self) -> int:
        """Tokens of one image: its patches and the class token in front of them."""
        return int((self.image_size // self.patch_size) ** 2) + 1


LATENT_MEAN = (
    -0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508,
    0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921,
)  # fmt: skip
LATENT_STD = (
    2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743,
    3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160,
)  # fmt: skip

TINY_LATENT_MEAN = (
    0.0219, 0.2989, 0.0135, 0.4748, 0.2852, -0.0153, -0.0071, 0.0155,
    0.2878, -0.1763, 0.0519, -0.0266, 0.0122, -0.0265, -0.1291, 0.0753,
)  # fmt: skip
TINY_LATENT_STD = (
    1.3020, 1.4744, 1.9080, 2.7651, 2.0901, 2.6384, 1.6508, 1.5645,
    2.0148, 1.5383, 1.0656, 1.2099, 1.2412, 1.0453, 1.1075, 1.1472,
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class VAEConfig:
    """Sizes of the causal video VAE and the statistics that normalise its latents."""

    base_dim: int = 96
    z_dim: int = 16
    multipliers: tuple[int, ...] = (1, 2, 4, 4)
    num_res_blocks: int = 2
    temporal_downsample: tuple[bool, ...] = (False, True, True)
    latent_mean: tuple[float, ...] = LATENT_MEAN
    latent_std: tuple[float, ...] = LATENT_STD

    @property
    def spatial_stride(self) -> int:
        """Pixels per latent cell along height and width."""
        return int(2 ** (len(self.multipliers) - 1))

    @property
    def temporal_stride(self) -> int:
        """Frames per latent frame, after the first."""
        return int(2 ** sum(self.temporal_downsample))


@dataclass(frozen=True, kw_only=True)
class RunDefaults:
    """Defaults of a run, for the options that the user leaves out.

    ``preset`` is a row of :data:`wanx.config.presets.RUN_PRESETS`, which comes before the others.
    """

    width: int = 832
    height: int = 480
    frames: int = 81
    fps: int = 16
    steps: int = 50
    guide_scale: float = 5.0
    shift: float = 5.0
    negative_prompt: str = NEGATIVE_PROMPT
    prompt: str | None = None
    preset: str | None = None


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Everything needed to build one Wan2.1 pipeline.

    ``image_encoder`` is there where the transformer attends to images.
    """

    name: str
    task: Task
    dit: DiTConfig
    text_encoder: TextEncoderConfig = field(default_factory=TextEncoderConfig)
    image_encoder: ImageEncoderConfig | None = None
    vae: VAEConfig = field(default_factory=VAEConfig)
    defaults: RunDefaults = field(default_factory=RunDefaults)

    def default_shift(self, width: int, height: int) -> float:
        """Shift of the noise schedule, for a run that asks for none.

        The reference's lower one for I2V at 480P is no row of ``defaults``, which bundles made
        before hold with the shift of 720P alone.

        Args:
            width: pixels that were asked for.
            height: likewise.
        """
        if self.task == "i2v" and width * height <= _PIXELS_480P:
            return min(_I2V_SHIFT_480P, self.defaults.shift)
        return self.defaults.shift


_PIXELS_480P = 832 * 480
_I2V_SHIFT_480P = 3.0

_SMALL = DiTConfig(dim=1536, ffn_dim=8960, num_heads=12, num_layers=30)
_LARGE = DiTConfig(dim=5120, ffn_dim=13824, num_heads=40, num_layers=40)

PRESETS: dict[str, ModelConfig] = {
    "t2v-1.3B": ModelConfig(name="t2v-1.3B", task="t2v", dit=_SMALL),
    "t2v-14B": ModelConfig(
        name="t2v-14B", task="t2v", dit=_LARGE,
        defaults=RunDefaults(width=1280, height=720),
    ),
    "i2v-14B": ModelConfig(
        name="i2v-14B", task="i2v", dit=replace(_LARGE, in_dim=36, image_dim=1280),
        image_encoder=ImageEncoderConfig(),
        defaults=RunDefaults(
            width=1280, height=720, steps=40, negative_prompt="镜头晃动，" + NEGATIVE_PROMPT
        ),
    ),
    "flf2v-14B": ModelConfig(
        name="flf2v-14B", task="flf2v",
        dit=replace(_LARGE, in_dim=36, image_dim=1280, image_frames=2),
        image_encoder=ImageEncoderConfig(),
        defaults=RunDefaults(
            width=1280, height=720, shift=16.0,
            negative_prompt="镜头切换，镜头晃动，" + NEGATIVE_PROMPT,
        ),
    ),
    "vace-1.3B": ModelConfig(
        name="vace-1.3B", task="vace", dit=replace(_SMALL, vace_layers=tuple(range(0, 30, 2))),
        defaults=RunDefaults(shift=16.0),
    ),
    "vace-14B": ModelConfig(
        name="vace-14B", task="vace", dit=replace(_LARGE, vace_layers=tuple(range(0, 40, 5))),
        defaults=RunDefaults(width=1280, height=720, shift=16.0),
    ),
    "tiny": ModelConfig(
        name="tiny", task="t2v",
        dit=DiTConfig(
            dim=128, ffn_dim=512, num_heads=4, num_layers=6, freq_dim=128, text_dim=96
        ),
        text_encoder=TextEncoderConfig(
            vocab_size=92, dim=96, ffn_dim=192, num_heads=4, head_dim=24, num_layers=2
        ),
        vae=VAEConfig(
            base_dim=8, latent_mean=TINY_LATENT_MEAN, latent_std=TINY_LATENT_STD
        ),
        defaults=RunDefaults(
            width=64, height=64, frames=17, steps=20, guide_scale=2.5, shift=3.0,
            negative_prompt="",
            prompt="a red circle moving right on a blue background",
        ),
    ),
}  # fmt: skip

_TINY = PRESETS["tiny"]
PRESETS["tiny-i2v"] = replace(
    _TINY,
    name="tiny-i2v",
    task="i2v",
    dit=replace(_TINY.dit, in_dim=36, image_dim=64, image_tokens=17),
    image_encoder=ImageEncoderConfig(dim=64, ffn_dim=128, num_heads=4, num_layers=3, image_size=56),
    defaults=replace(_TINY.defaults, prompt=None),
)
# Sizes only: no weights of these two have been trained.
PRESETS["tiny-flf2v"] = replace(
    PRESETS["tiny-i2v"],
    name="tiny-flf2v",
    task="flf2v",
    dit=replace(PRESETS["tiny-i2v"].dit, image_frames=2),
)
PRESETS["tiny-vace"] = replace(
    _TINY,
    name="tiny-vace",
    task="vace",
    dit=replace(_TINY.dit, vace_layers=(0, 2, 4)),
    defaults=replace(_TINY.defaults, prompt=None),
)
