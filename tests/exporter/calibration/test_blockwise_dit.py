"""The streamed transformer against the whole one with the same weights."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from tests.support.checkpoints import TASKS
from tests.support.peers import randomise, relative_error
from wanx.checkpoints.tensors.source import TensorSource
from wanx.checkpoints.weights import open_weights
from wanx.config.models import DiTConfig
from wanx.errors import CorruptInputError, UsageError, WanxError
from wanx.exporter.calibration.blockwise_dit import BlockwiseDiT, read_fp32
from wanx.exporter.components import dit_spec
from wanx.models.dit.model import WanDiT

CONFIGS = {
    **{task: config for task, (_, _, config) in TASKS.items()},
    "vace everywhere": replace(TASKS["vace"][2], vace_layers=(0, 1, 2)),
}
T2V, VACE = CONFIGS["t2v"], CONFIGS["vace"]
DTYPES = [torch.bfloat16, torch.float32, torch.float16]
LENGTHS = (7, 1, 45)
CPU = torch.device("cpu")
Feed = dict[str, np.ndarray]


def random_weights(config: DiTConfig, dtype: torch.dtype) -> dict[str, Tensor]:
    torch.manual_seed(3)
    dit = randomise(WanDiT(config), seed=3)
    return {name: weight.to(dtype) for name, weight in dit.state_dict().items()}


def write(folder: Path, weights: dict[str, Tensor]) -> dict[str, TensorSource]:
    """Store weights as the original layout does, whose patch embeddings are convolutions."""
    stored = {
        name: weight.reshape(len(weight), -1, 1, 2, 2)
        if name.endswith("patch_embedding.weight")
        else weight
        for name, weight in weights.items()
    }
    save_file(stored, folder / "dit.safetensors")
    return open_weights(folder, "dit")[0]


def random_feed(config: DiTConfig, length: int, seed: int, text: int = 512) -> Feed:
    spec, generator = dit_spec(config), np.random.default_rng(seed)
    feed = {}
    for item in spec.inputs:
        shape = item.example({"L": length}).shape
        feed[item.name] = generator.standard_normal(shape, dtype=np.float32)
    feed["timestep"] = np.array([generator.integers(1000)], np.float32)
    feed["context"] = feed["context"][:, :text]
    angles = feed["rope_cos"]
    return feed | {"rope_cos": np.cos(angles), "rope_sin": np.sin(angles)}


def whole(config: DiTConfig, weights: dict[str, Tensor], feeds: Sequence[Feed]) -> list[Tensor]:
    dit = WanDiT(config).requires_grad_(False)
    dit.load_state_dict(weights)
    return [dit(**{name: torch.from_numpy(value) for name, value in f.items()}) for f in feeds]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_it_equals_the_whole_network(config: DiTConfig, dtype: torch.dtype, tmp_path: Path) -> None:
    weights = random_weights(config, dtype)
    feeds = [random_feed(config, length, seed) for seed, length in enumerate(LENGTHS)]
    out = BlockwiseDiT(config, write(tmp_path, weights), device=CPU).run(feeds)
    expected = whole(config, weights, feeds)
    assert len(out) == len(LENGTHS)
    for velocity, reference, length in zip(out, expected, LENGTHS, strict=True):
        assert velocity.dtype == np.float32
        assert velocity.shape == (1, length, config.velocity_dim)
        assert relative_error(velocity, reference) <= 1e-6


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_it_equals_the_whole_network_on_a_gpu(tmp_path: Path) -> None:
    weights = random_weights(VACE, torch.bfloat16)
    feeds = [random_feed(VACE, length, seed) for seed, length in enumerate(LENGTHS)]
    out = BlockwiseDiT(VACE, write(tmp_path, weights)).run(feeds)
    for velocity, reference in zip(out, whole(VACE, weights, feeds), strict=True):
        assert relative_error(velocity, reference) <= 1e-5


@pytest.mark.parametrize("config", [T2V, VACE], ids=["t2v", "vace"])
def test_each_block_is_watched_once_while_all_samples_pass(
    config: DiTConfig, tmp_path: Path
) -> None:
    seen: list[Any] = []

    @contextmanager
    def watch(block: nn.Module, name: str) -> Iterator[None]:
        def keep_length(layer: nn.Module, inputs: tuple[Tensor]) -> None:
            seen.append(inputs[0].shape[1])

        linear = block.get_submodule("ffn.2")
        assert torch.equal(linear.weight, weights[f"{name}.ffn.2.weight"].float())
        handle = linear.register_forward_pre_hook(keep_length)
        seen.append(name)
        yield
        seen.append(name)
        handle.remove()

    weights = random_weights(config, torch.bfloat16)
    streamed = BlockwiseDiT(config, write(tmp_path, weights), device=CPU)
    feeds = [random_feed(config, length, 0) for length in LENGTHS]
    told: list[tuple[int, int]] = []
    streamed.run(feeds, watch=watch, on_block=lambda *progress: told.append(progress))
    names = [f"vace_blocks.{i}" for i in range(len(config.vace_layers))]
    names += [f"blocks.{i}" for i in range(config.num_layers)]
    assert seen == [item for name in names for item in (name, *LENGTHS, name)]
    assert told == [(i + 1, len(names)) for i in range(len(names))]


def live_bytes() -> int:
    tensors = [item for item in gc.get_objects() if type(item) in (Tensor, nn.Parameter)]
    dense = (t for t in tensors if t.device.type == "cpu" and t.layout == torch.strided)
    storages = [t.untyped_storage() for t in dense]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


@pytest.mark.parametrize("config", [T2V, VACE], ids=["t2v", "vace"])
def test_one_block_is_in_memory_at_a_time(config: DiTConfig, tmp_path: Path) -> None:
    """Counts every tensor of the process; the samples are small beside the smallest part."""
    config = replace(config, text_dim=300)
    weights = random_weights(config, torch.float32)

    def size(prefix: str) -> int:
        return sum(w.nbytes for name, w in weights.items() if name.startswith(prefix))

    streamed = BlockwiseDiT(config, write(tmp_path, weights), device=CPU)
    feed = random_feed(config, 2, 0, text=1)
    activations = 10_000
    smallest = min(size("blocks.0."), size("text_embedding."), size("time_projection."))
    assert activations < smallest / 2
    gc.collect()
    before = live_bytes()

    @contextmanager
    def watch(block: nn.Module, name: str) -> Iterator[None]:
        live = live_bytes() - before
        assert live >= sum(p.nbytes for p in block.parameters()) == size(f"{name}.")
        # The largest block of a stack is its first, and memory for that may be kept.
        extras[name] = live - size(f"{name.split('.')[0]}.0.")
        yield

    extras: dict[str, int] = {}
    gc.disable()  # what only a collection frees is in memory
    try:
        streamed.run([feed], watch=watch)
        left = live_bytes() - before
    finally:
        gc.enable()
    assert len(extras) == config.num_layers + len(config.vace_layers)
    assert all(extra < activations for extra in extras.values()), extras
    assert left < activations


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("name", ["blocks.1.ffn.0.weight", "vace_blocks.1.after_proj.bias"])
def test_a_weight_that_is_not_finite_is_named(name: str, value: float, tmp_path: Path) -> None:
    weights = random_weights(VACE, torch.bfloat16)
    weights[name].view(-1)[-1] = value
    streamed = BlockwiseDiT(VACE, write(tmp_path, weights), device=CPU)
    with pytest.raises(CorruptInputError, match=f"'{name}' holds NaN or infinity"):
        streamed.run([random_feed(VACE, 4, 0)])


@pytest.mark.parametrize("block", ["vace_blocks.0", "blocks.1"])
def test_a_block_that_overflows_is_named(block: str, tmp_path: Path) -> None:
    weights = random_weights(VACE, torch.float32)
    for layer in (0, 2):
        weights[f"{block}.ffn.{layer}.weight"] *= 1e20
    streamed = BlockwiseDiT(VACE, write(tmp_path, weights), device=CPU)
    with pytest.raises(WanxError, match=rf"after {block} \(sample 1 of 1\)"):
        streamed.run([random_feed(VACE, 4, 0)])


def spoil_second(block: nn.Module) -> Callable[[], None]:
    calls: list[int] = []

    def replace_output(layer: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        calls.append(len(calls))
        return output * torch.nan if len(calls) == 2 else output

    return block.register_forward_hook(replace_output).remove


def test_the_sample_that_fails_is_named_and_the_next_run_is_right(tmp_path: Path) -> None:
    @contextmanager
    def watch(block: nn.Module, name: str) -> Iterator[None]:
        restore = spoil_second(block) if name == "blocks.1" else None
        try:
            yield
        finally:
            if restore is not None:
                restore()

    weights = random_weights(T2V, torch.bfloat16)
    streamed = BlockwiseDiT(T2V, write(tmp_path, weights), device=CPU)
    feeds = [random_feed(T2V, length, length) for length in LENGTHS]
    with pytest.raises(WanxError, match=r"after blocks\.1 \(sample 2 of 3\)"):
        streamed.run(feeds, watch=watch)
    feeds[2]["context"][0, 5, 3] = np.nan
    with pytest.raises(WanxError, match=r"after the embeddings \(sample 3 of 3\)"):
        streamed.run(feeds)
    out = streamed.run(feeds[:1])[0]
    assert relative_error(out, whole(T2V, weights, feeds[:1])[0]) <= 1e-6


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    tensors = write(tmp_path, random_weights(VACE, torch.bfloat16))
    feed = random_feed(VACE, 4, 0)
    del feed["vace_scale"]
    streamed = BlockwiseDiT(VACE, tensors, device=CPU)
    with pytest.raises(UsageError, match="sample 2 of 2 lacks vace_scale"):
        streamed.run([random_feed(VACE, 4, 0), feed])
    lost = tensors.pop("vace_blocks.0.before_proj.bias")
    with pytest.raises(CorruptInputError, match=rf"missing {lost.name}"):
        BlockwiseDiT(VACE, tensors, device=CPU)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(), (1,), (3, 5), (700, 1001)])
def test_weights_are_read_exactly(
    dtype: torch.dtype, shape: tuple[int, ...], tmp_path: Path
) -> None:
    """Among them a tensor of more than one chunk, the last of which is not full."""
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    save_file({"w": weight}, tmp_path / "dit.safetensors")
    out = torch.full(shape, torch.nan)
    read_fp32(open_weights(tmp_path, "dit")[0]["w"], out)
    assert torch.equal(out, weight.float())
