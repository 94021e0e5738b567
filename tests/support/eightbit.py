"""A small denoiser with 8-bit layers, built as an export does, and an oracle in plain PyTorch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx_ir as ir
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from tests.support.peers import randomise
from wanx.checkpoints.tensors.source import SafetensorsTensor, TensorSource
from wanx.checkpoints.weights import ComponentWeights
from wanx.config.models import DiTConfig
from wanx.config.number_formats import BY_SAFETENSORS
from wanx.exporter.component_writer import save_graph
from wanx.exporter.components import ComponentSpec, dit_spec
from wanx.exporter.graph.attach import attach_weights
from wanx.exporter.graph.trace import trace
from wanx.exporter.quantization.quantize import quantize_weights, scale_tensors
from wanx.exporter.quantization.quantized_spec import quantized_spec
from wanx.exporter.quantization.recipe import Recipe, dit_candidates, shared_input, smoothing_of
from wanx.exporter.quantization.scheme import SCHEMES, QuantizeOptions
from wanx.exporter.targets.onnxruntime.graph import optimize_for_ort
from wanx.files.safetensors import SafetensorsWriter, TensorRef
from wanx.models.dit.model import WanDiT
from wanx.runtime.sessions.onnxruntime.loading import create_session

Feeds = Mapping[str, np.ndarray]
SMALL = DiTConfig(
    dim=48, ffn_dim=72, num_heads=2, num_layers=3, in_dim=4, out_dim=4, freq_dim=32, text_len=9,
    text_dim=20,
)  # fmt: skip


def random_weights(config: DiTConfig, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    dit = randomise(WanDiT(config), seed=5)
    return {name: weight.to(dtype) for name, weight in dit.state_dict().items()}


def random_feeds(config: DiTConfig, length: int = 13) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(length)
    feeds = {}
    for item in dit_spec(config).inputs:
        shape = item.example({"L": length}).shape
        feeds[item.name] = generator.standard_normal(shape, dtype=np.float32)
    angles = feeds["rope_cos"]
    return feeds | {
        "timestep": np.array([700], np.float32),
        "rope_cos": np.cos(angles),
        "rope_sin": np.sin(angles),
    }


def run_torch(model: nn.Module, feeds: Feeds) -> Tensor:
    with torch.inference_mode():
        return model(**{name: torch.from_numpy(value) for name, value in feeds.items()})


def linear_and_attention_inputs(
    config: DiTConfig, weights: Mapping[str, Tensor], feeds: Feeds
) -> dict[str, Tensor]:
    """The input of every linear, and q, k and v of every attention, in one plain forward."""
    model = WanDiT(config)
    model.load_state_dict({name: weight.float() for name, weight in weights.items()})
    inputs: dict[str, Tensor] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            module.register_forward_pre_hook(
                lambda _, args, name=name: inputs.__setitem__(name, args[0].clone())
            )
        elif name.endswith(".attend"):
            module.register_forward_pre_hook(
                lambda _, args, name=name: inputs.update(
                    {f"{name}.{letter}": x.clone() for letter, x in zip("qkv", args, strict=True)}
                )
            )
    run_torch(model, feeds)
    return inputs


def make_recipe(
    config: DiTConfig,
    weights: Mapping[str, Tensor],
    feeds: Feeds,
    scheme: str = "int8",
    options: QuantizeOptions | None = None,
    kept: tuple[str, ...] = (),
) -> Recipe:
    """Every layer but ``kept``, with the scales of one forward."""
    options = options or QuantizeOptions()
    inputs = linear_and_attention_inputs(config, weights, feeds)
    names = [name for name in dit_candidates(config, options)[0] if name not in kept]
    smooth = {}
    if options.smooth:
        generator = torch.Generator().manual_seed(0)
        vectors = {vector for name in names if (vector := smoothing_of(name))}
        smooth = {v: torch.rand(config.dim, generator=generator) + 0.5 for v in sorted(vectors)}
    limit = SCHEMES[scheme].limit

    def scale(name: str) -> float | None:
        if options.activation_scale == "dynamic":
            return None
        x = inputs[shared_input(name)]
        vector = smooth.get(smoothing_of(name) or "")
        x = x if vector is None else x / vector
        return float((x.abs().amax() / limit).float())

    attention = {
        f"blocks.{i}.self_attn.attend": tuple(
            float(inputs[f"blocks.{i}.self_attn.attend.{letter}"].abs().amax() / 448)
            for letter in "qkv"
        )
        for i in range(config.num_layers)
        if options.attention == "fp8"
    }
    return Recipe(
        scheme=SCHEMES[scheme],
        options=options,
        layers={name: scale(name) for name in names},
        unquantized_layers=dict.fromkeys(kept, "test"),
        smooth=smooth,
        attention=attention,  # type: ignore[arg-type]
    )


@dataclass(frozen=True, kw_only=True)
class Built:
    """A quantised denoiser on disk; ``sources`` are its weights as they were."""

    folder: Path
    recipe: Recipe
    spec: ComponentSpec
    sources: dict[str, TensorSource]
    written: dict[str, TensorRef]

    @property
    def portable(self) -> Path:
        return self.folder / "dit.onnx"

    @property
    def engine(self) -> Path:
        return self.folder / "engine.onnx"

    def run(self, feeds: Feeds, *, engine: bool = True) -> Tensor:
        graph = self.engine if engine else self.portable
        session = create_session(graph, self.folder, threads=1)
        return torch.from_numpy(session.run(["velocity"], dict(feeds))[0])

    def tensors(self) -> dict[str, Tensor]:
        return {
            name: value
            for file in {ref.file for ref in self.written.values()}
            for name, value in load_file(file).items()
        }


_TRACED: dict[object, ir.Model] = {}


def trace_once(spec: ComponentSpec) -> ir.Model:
    """Trace ``spec``, or hand out a copy of an equal trace.

    A graph follows from the types of a module's parts and from its parameters.
    """
    with torch.device("meta"):
        module = spec.module()
    parameters = tuple((n, p.dtype, p.shape) for n, p in module.named_parameters())
    key = spec.name, spec.blocks, repr(module), parameters
    if key not in _TRACED:
        _TRACED[key] = trace(spec)
    model = _TRACED[key].clone()
    for node in model.graph:
        node.name = None  # which a clone is given
    return model


Change = Callable[[dict[str, Tensor]], None]


def build(
    folder: Path,
    config: DiTConfig,
    weights: Mapping[str, Tensor],
    recipe: Recipe,
    *,
    traced: Recipe | None = None,
    change: Change | None = None,
    graphs: bool = True,
) -> Built:
    """Quantise, and trace unless no ``graphs`` are wanted.

    ``traced`` is what the graph is made by where a test plants a fault; ``change`` may alter the
    8-bit weights and the scales before they are written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    header = [(n, _stored(w), tuple(w.shape)) for n, w in weights.items()]
    with SafetensorsWriter(folder / "source.safetensors", header) as writer:
        for weight in weights.values():
            writer.write(weight.contiguous().view(torch.uint8).numpy().tobytes())
    original = {n: SafetensorsTensor.from_ref(ref) for n, ref in writer.header.entries.items()}
    component = ComponentWeights(component="dit", tensors=dict(original), files=())
    sources = quantize_weights(component, recipe)
    tensors: dict[str, Tensor] = {}
    for name, source in sources.items():
        data = bytearray(b"".join(bytes(piece) for piece in source.iter_bytes()))
        tensors[name] = torch.frombuffer(data, dtype=_TORCH[source.dtype]).reshape(source.shape)
    tensors |= scale_tensors(sources, recipe)
    if change is not None:
        change(tensors)
    rows = sorted(tensors.items(), key=lambda row: -BY_SAFETENSORS[_stored(row[1])].bits)
    header = [(n, _stored(t), tuple(t.shape)) for n, t in rows]
    with SafetensorsWriter(folder / "dit.safetensors", header) as writer:
        for _, tensor in rows:
            data = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
            writer.write(data)
    written = dict(writer.header.entries)
    spec = dit_spec(config)
    if graphs:
        model = trace_once(quantized_spec(spec, traced or recipe))
        attach_weights(model, written, folder)
        save_graph(model, folder / "dit.onnx")
        optimize_for_ort(model)
        save_graph(model, folder / "engine.onnx")
    return Built(folder=folder, recipe=recipe, spec=spec, sources=original, written=written)


_TORCH = {
    "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I8": torch.int8, "F8_E4M3": torch.float8_e4m3fn,
}  # fmt: skip


def _stored(tensor: Tensor) -> str:
    return next(name for name, dtype in _TORCH.items() if dtype == tensor.dtype)


def quantized_reference(
    config: DiTConfig, weights: Mapping[str, Tensor], built: Built, feeds: Feeds
) -> Tensor:
    """The same arithmetic by hooks on the plain network: rounded inputs, dequantised weights."""
    model = WanDiT(config).requires_grad_(False)
    model.load_state_dict({name: weight.float() for name, weight in weights.items()})
    tensors, recipe = built.tensors(), built.recipe
    for name, scale in recipe.layers.items():
        linear = model.get_submodule(name)
        steps = tensors[f"{name}.weight_scale"].reshape(-1, 1)
        linear.weight.copy_(tensors[f"{name}.weight"].float() * steps)
        smooth = recipe.smooth.get(smoothing_of(name) or "", torch.ones(()))
        linear.register_forward_pre_hook(
            lambda _, args, scale=scale, smooth=smooth: (
                _quantize_dequantize(args[0] / smooth, scale, recipe),
            )
        )
    for name, scales in recipe.attention.items():
        attend = model.get_submodule(name)
        heads = attend.num_heads

        def attention(q: Tensor, k: Tensor, v: Tensor, s=scales, heads=heads) -> Tensor:
            q, k, v = (
                _quantize_dequantize(x, scale, recipe)
                .unflatten(-1, (heads, -1))
                .transpose(1, 2)
                .double()
                for x, scale in zip((q, k, v), s, strict=True)
            )
            scores = q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5
            out = _quantize_dequantize(scores.softmax(-1).float(), 1 / 448, recipe).double() @ v
            return out.transpose(1, 2).flatten(-2).float()

        attend.forward = attention  # type: ignore[method-assign]
    return run_torch(model, feeds)


def _quantize_dequantize(x: Tensor, scale: float | None, recipe: Recipe) -> Tensor:
    """``x`` as 8 bits hold it."""
    step = x.abs().amax(-1, keepdim=True) / 448 if scale is None else torch.tensor(scale)
    if recipe.scheme.dtype == torch.int8:
        return (x / step).round().clamp(-128, 127) * step
    return (x / step).clamp(-448, 448).to(torch.float8_e4m3fn).float() * step


def edit_graph_file(graph: Path, change: Callable[[ir.Model], None]) -> None:
    """Alter a graph on disk; its weights stay where they are."""
    model = ir.load(graph)
    change(model)
    save_graph(model, graph)
