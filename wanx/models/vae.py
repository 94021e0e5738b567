"""The causal video VAE of Wan2.1, whole clips or chunk by chunk.

Every temporal convolution looks at its own past only. :class:`History` carries that past from one
chunk to the next, so a clip of any length is encoded or decoded in constant memory; a clip given
whole and the same clip given in chunks (1 frame, then 4, 4, …) have the same result.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from wanx.config.models import VAEConfig
from wanx.kernels.attention.op import attention
from wanx.kernels.channel_norm import channel_norm


class History:
    """Past frames of each temporal layer, in the order in which the layers run.

    ``past`` is None for the first chunk (or a whole clip) and otherwise what ``kept`` held after
    the chunk before. ``keep=False`` drops the new past, as a whole clip needs none.
    """

    def __init__(self, past: Sequence[Tensor] | None = None, *, keep: bool = True) -> None:
        self.first = past is None
        self._past = iter(past or ())
        self._keep = keep
        self.kept: list[Tensor] = []

    def extend(self, x: Tensor, frames: int, *, pad_first: bool = True) -> Tensor:
        """Put the last ``frames`` frames of the past in front of ``x`` ``[B, C, F, H, W]``.

        The past of a first chunk is zeros, or with ``pad_first=False`` nothing.
        """
        if not self.first:
            x = torch.cat([next(self._past), x], dim=2)
        elif pad_first:
            x = F.pad(x, (0, 0, 0, 0, frames, 0))
        if self._keep:
            self.kept.append(x[:, :, -frames:])
        return x


class CausalConv3d(nn.Conv3d):
    """A 3-D convolution padded in time by its past only, and in space by zeros."""

    def forward(self, x: Tensor, history: History) -> Tensor:  # type: ignore[override]
        """Convolve ``x`` ``[B, C, F, H, W]``; a temporal kernel of 1 has no past."""
        frames = self.kernel_size[0] - 1
        if frames:
            x = history.extend(x, frames)
        return F.conv3d(x, self.weight, self.bias, self.stride, self.padding)


def causal_conv(in_dim: int, out_dim: int, kernel: tuple[int, int, int]) -> CausalConv3d:
    """Build a causal convolution that keeps height and width."""
    return CausalConv3d(in_dim, out_dim, kernel, padding=(0, kernel[1] // 2, kernel[2] // 2))


class ChannelNorm(nn.Module):
    """x / ‖x‖₂ over the channels, times √C · γ."""

    def __init__(self, dim: int, spatial_dims: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(dim, *(1,) * spatial_dims))

    def forward(self, x: Tensor) -> Tensor:
        """Normalise ``x`` ``[B, C, ...]`` over dimension 1 in fp32."""
        return channel_norm(x, self.gamma)


class ResidualBlock(nn.Module):
    """Norm, SiLU, convolution, twice, beside a shortcut."""

    def __init__(self, in_dim: int, out_dim: int) -> None:
        super().__init__()
        # Index 5 is the dropout of the original, which has no weights and is off outside training.
        self.residual = nn.ModuleDict(
            {
                "0": ChannelNorm(in_dim, 3),
                "2": causal_conv(in_dim, out_dim, (3, 3, 3)),
                "3": ChannelNorm(out_dim, 3),
                "6": causal_conv(out_dim, out_dim, (3, 3, 3)),
            }
        )
        self.shortcut = causal_conv(in_dim, out_dim, (1, 1, 1)) if in_dim != out_dim else None

    def forward(self, x: Tensor, history: History) -> Tensor:
        """Transform ``x`` ``[B, C, F, H, W]``."""
        y = self.residual["2"](F.silu(self.residual["0"](x)), history)
        y = self.residual["6"](F.silu(self.residual["3"](y)), history)
        return y + (x if self.shortcut is None else self.shortcut(x, history))


class AttentionBlock(nn.Module):
    """Single-head self-attention within each frame."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm = ChannelNorm(dim, 2)
        self.to_qkv = nn.Conv2d(dim, dim * 3, 1)
        self.proj = nn.Conv2d(dim, dim, 1)

    def forward(self, x: Tensor, history: History) -> Tensor:
        """Transform ``x`` ``[B, C, F, H, W]``."""
        _, channels, frames, height, width = x.shape
        y = self.norm(x.transpose(1, 2).flatten(0, 1))
        y = self.to_qkv(y).flatten(2).transpose(1, 2)
        q, k, v = (y[..., i * channels : (i + 1) * channels] for i in range(3))
        y = attention(q, k, v, num_heads=1)
        y = self.proj(y.transpose(1, 2).unflatten(2, (height, width)))
        return x + y.reshape(-1, frames, channels, height, width).transpose(1, 2)


def per_frame(
    conv: nn.Conv2d, x: Tensor, *, pad: tuple[int, int, int, int] | None = None
) -> Tensor:
    """Apply a 2-D convolution to each frame of ``x`` ``[B, C, F, H, W]``."""
    frames = x.shape[2]
    y = x.transpose(1, 2).flatten(0, 1)
    y = conv(y if pad is None else F.pad(y, pad))
    return y.unflatten(0, (-1, frames)).transpose(1, 2)


class Downsample(nn.Module):
    """Halve height and width, and with ``temporal`` the frames after the first."""

    def __init__(self, dim: int, *, temporal: bool) -> None:
        super().__init__()
        self.resample = nn.ModuleDict({"1": nn.Conv2d(dim, dim, 3, stride=2)})
        self.time_conv = CausalConv3d(dim, dim, (3, 1, 1), stride=(2, 1, 1)) if temporal else None

    def forward(self, x: Tensor, history: History) -> Tensor:
        """Transform ``x`` ``[B, C, F, H, W]``."""
        x = per_frame(self.resample["1"], x, pad=(0, 1, 0, 1))
        if self.time_conv is None:
            return x
        conv = self.time_conv
        joined = history.extend(x, 1, pad_first=False)
        # The clip's first frame has no past to be merged with and passes as it is.
        head = joined[:, :, :1] if history.first else joined[:, :, :0]
        if joined.shape[2] < 3:
            return head
        tail = F.conv3d(joined, conv.weight, conv.bias, conv.stride)
        return torch.cat([head, tail], dim=2) if history.first else tail


class Upsample(nn.Module):
    """Double height and width, and with ``temporal`` the frames after the first."""

    def __init__(self, dim: int, *, temporal: bool) -> None:
        super().__init__()
        self.resample = nn.ModuleDict({"1": nn.Conv2d(dim, dim // 2, 3, padding=1)})
        self.time_conv = CausalConv3d(dim, dim * 2, (3, 1, 1)) if temporal else None

    def forward(self, x: Tensor, history: History) -> Tensor:
        """Transform ``x`` ``[B, C, F, H, W]``."""
        if self.time_conv is not None:
            x = self._double_frames(x, self.time_conv, history)
        frames = x.shape[2]
        x = x.transpose(1, 2).flatten(0, 1)
        # At a factor of two, "nearest" and the original's "nearest-exact" copy the same pixels.
        x = F.interpolate(x, scale_factor=2.0, mode="nearest")
        return self.resample["1"](x).unflatten(0, (-1, frames)).transpose(1, 2)

    def _double_frames(self, x: Tensor, conv: CausalConv3d, history: History) -> Tensor:
        # The clip's first frame stays single and never enters the convolution's past.
        head, tail = (x[:, :, :1], x[:, :, 1:]) if history.first else (None, x)
        joined = history.extend(tail, 2)
        if tail.shape[2] == 0:
            return x
        pairs = F.conv3d(joined, conv.weight, conv.bias).unflatten(1, (2, -1))
        doubled = pairs.permute(0, 2, 3, 1, 4, 5).flatten(2, 3)
        return doubled if head is None else torch.cat([head, doubled], dim=2)


class Middle(nn.ModuleDict):
    """Residual block, attention, residual block at the lowest resolution."""

    def __init__(self, dim: int) -> None:
        super().__init__(
            {"0": ResidualBlock(dim, dim), "1": AttentionBlock(dim), "2": ResidualBlock(dim, dim)}
        )

    def forward(self, x: Tensor, history: History) -> Tensor:
        """Transform ``x`` ``[B, C, F, H, W]``."""
        for block in self.values():
            x = block(x, history)
        return x


class Head(nn.ModuleDict):
    """Norm, SiLU, convolution to the output channels."""

    def __init__(self, dim: int, out_dim: int) -> None:
        super().__init__({"0": ChannelNorm(dim, 3), "2": causal_conv(dim, out_dim, (3, 3, 3))})

    def forward(self, x: Tensor, history: History) -> Tensor:
        """Transform ``x`` ``[B, C, F, H, W]``."""
        out: Tensor = self["2"](F.silu(self["0"](x)), history)
        return out


class Encoder(nn.Module):
    """Pixels ``[B, 3, F, 8h, 8w]`` to latent moments ``[B, 2z, T, h, w]``."""

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        dims = [config.base_dim * m for m in (1, *config.multipliers)]
        self.conv1 = causal_conv(3, dims[0], (3, 3, 3))
        layers: list[nn.Module] = []
        for level, (in_dim, out_dim) in enumerate(pairwise(dims)):
            for block in range(config.num_res_blocks):
                layers.append(ResidualBlock(in_dim if block == 0 else out_dim, out_dim))
            if level < len(config.multipliers) - 1:
                layers.append(Downsample(out_dim, temporal=config.temporal_downsample[level]))
        self.downsamples = nn.ModuleList(layers)
        self.middle = Middle(dims[-1])
        self.head = Head(dims[-1], config.z_dim * 2)

    def down(self, x: Tensor, history: History) -> Tensor:
        """Features ``[B, C, T, h, w]`` of pixels; every one of them sees a part of the frame."""
        x = self.conv1(x.to(self.conv1.weight.dtype), history)
        for layer in self.downsamples:
            x = layer(x, history)
        return x

    def mid(self, x: Tensor, history: History) -> Tensor:
        """Moments of features, by attention over whole frames."""
        out: Tensor = self.head(self.middle(x, history), history)
        return out

    def forward(self, x: Tensor, history: History) -> Tensor:
        """Encode one chunk or a whole clip."""
        return self.mid(self.down(x, history), history)


class Decoder(nn.Module):
    """Latents ``[B, z, T, h, w]`` to pixels ``[B, 3, F, 8h, 8w]``."""

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        dims = [config.base_dim * m for m in (config.multipliers[-1], *config.multipliers[::-1])]
        upsample_time = config.temporal_downsample[::-1]
        self.conv1 = causal_conv(config.z_dim, dims[0], (3, 3, 3))
        self.middle = Middle(dims[0])
        layers: list[nn.Module] = []
        for level, (in_dim, out_dim) in enumerate(pairwise(dims)):
            in_dim = in_dim if level == 0 else in_dim // 2
            for block in range(config.num_res_blocks + 1):
                layers.append(ResidualBlock(in_dim if block == 0 else out_dim, out_dim))
            if level < len(config.multipliers) - 1:
                layers.append(Upsample(out_dim, temporal=upsample_time[level]))
        self.upsamples = nn.ModuleList(layers)
        self.head = Head(dims[-1], 3)

    def mid(self, x: Tensor, history: History) -> Tensor:
        """Features ``[B, C, T, h, w]`` of latents, by attention over whole frames."""
        out: Tensor = self.middle(self.conv1(x, history), history)
        return out

    def up(self, x: Tensor, history: History) -> Tensor:
        """Pixels of features; every one of them sees a part of the frame."""
        x = x.to(self.head["2"].weight.dtype)
        for layer in self.upsamples:
            x = layer(x, history)
        out: Tensor = self.head(x, history)
        return out

    def forward(self, x: Tensor, history: History) -> Tensor:
        """Decode one chunk or a whole clip."""
        return self.up(self.mid(x, history), history)


class WanVAE(nn.Module):
    """Encoder and decoder between pixels in [-1, 1] and normalised latents.

    Convolutions run in the dtype of their weights, norms and the statistics of latents in fp32.
    ``F = temporal_stride · (T - 1) + 1`` frames correspond to ``T`` latent frames.
    """

    latent_mean: Tensor
    latent_std: Tensor

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        self.encoder = Encoder(config)
        self.conv1 = causal_conv(config.z_dim * 2, config.z_dim * 2, (1, 1, 1))
        self.conv2 = causal_conv(config.z_dim, config.z_dim, (1, 1, 1))
        self.decoder = Decoder(config)
        for name, values in (("mean", config.latent_mean), ("std", config.latent_std)):
            statistic = torch.tensor(values, dtype=torch.float32, device="cpu")
            statistic = statistic.view(1, -1, 1, 1, 1)
            self.register_buffer(f"latent_{name}", statistic, persistent=False)

    def moments(self, video: Tensor, history: History | None = None) -> tuple[Tensor, Tensor]:
        """Encode ``video`` ``[B, 3, F, H, W]`` to means and log variances, ``[B, z, T, h, w]``."""
        history = history or History(keep=False)
        return self._moments(self.encode_down(video, history), history)

    def encode(self, video: Tensor, history: History | None = None) -> Tensor:
        """Encode ``video`` ``[B, 3, F, H, W]`` to normalised mean latents ``[B, z, T, h, w]``."""
        history = history or History(keep=False)
        return self.encode_mid(self.encode_down(video, history), history)

    def encode_down(self, video: Tensor, history: History) -> Tensor:
        """Encode ``video`` as far as it can be cut into tiles: features ``[B, C, T, h, w]``."""
        return self.encoder.down(video, history)

    def encode_mid(self, features: Tensor, history: History) -> Tensor:
        """Encode the features of whole frames to normalised mean latents."""
        mean = self._moments(features.to(self.conv1.weight.dtype), history)[0]
        return (mean - self.latent_mean) / self.latent_std

    def _moments(self, features: Tensor, history: History) -> tuple[Tensor, Tensor]:
        moments = self.conv1(self.encoder.mid(features, history), history)
        z_dim = moments.shape[1] // 2
        return moments[:, :z_dim], moments[:, z_dim:]

    def decode(self, latent: Tensor, history: History | None = None) -> Tensor:
        """Decode a normalised ``latent`` ``[B, z, T, h, w]`` to video clamped to [-1, 1]."""
        history = history or History(keep=False)
        return self.decode_up(self.decode_mid(latent, history), history)

    def decode_mid(self, latent: Tensor, history: History) -> Tensor:
        """Decode whole frames as far as attention takes them: features ``[B, C, T, h, w]``."""
        raw = (latent * self.latent_std + self.latent_mean).to(self.conv2.weight.dtype)
        return self.decoder.mid(self.conv2(raw, history), history)

    def decode_up(self, features: Tensor, history: History) -> Tensor:
        """Decode features, of frames or of tiles, to video clamped to [-1, 1]."""
        return self.decoder.up(features, history).clamp(-1.0, 1.0)
