"""Streamed 8-bit weights against float64 and a search among all numbers of the format."""

from __future__ import annotations

import gc
import tracemalloc
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tests.support.checkpoints import OUR_DIT, OUR_T5, write_diffusers
from tests.support.eightbit import make_recipe, random_feeds, random_weights
from wanx.checkpoints.checkpoint import open_checkpoint
from wanx.checkpoints.tensors.source import JoinedTensor, TensorSource
from wanx.checkpoints.weights import ComponentWeights, open_weights
from wanx.errors import CorruptInputError
from wanx.exporter.options import ExportOptions, resolve
from wanx.exporter.quantization.quantize import QuantizedTensor, quantize_weights, scale_tensors
from wanx.exporter.quantization.recipe import Recipe, shared_input, smoothing_of, text_recipe
from wanx.exporter.quantization.scheme import SCHEMES, QuantizeOptions
from wanx.exporter.quantized_weights import write_quantized_weights
from wanx.models.quantized import quantize_weight
from wanx.models.text_encoder import UMT5Encoder

FLOATS = [torch.float32, torch.bfloat16, torch.float16]
NAN, INF = float("nan"), float("inf")


def samples(*shape: int, seed: int = 0) -> Tensor:
    """Rows of very different sizes."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return x * torch.logspace(-3, 2, shape[0])[:, None]


def stored(weight: Tensor, folder: Path, *, pickled: bool = False) -> TensorSource:
    folder.mkdir(exist_ok=True)
    if pickled:
        torch.save({"w": weight}, folder / "dit.pth")
    else:
        save_file({"other": torch.zeros(3), "w": weight}, folder / "dit.safetensors")
    return open_weights(folder, "dit")[0]["w"]


def read(source: QuantizedTensor, **options: int) -> Tensor:
    data = b"".join(bytes(piece) for piece in source.iter_bytes(**options))
    assert len(data) == source.nbytes
    return torch.frombuffer(bytearray(data), dtype=source.scheme.dtype).view(source.shape)


def zero_point(dtype: torch.dtype) -> int:
    return 128 if dtype == torch.uint8 else 0


def numbers_of(dtype: torch.dtype) -> Tensor:
    """All numbers that a weight may become, ascending, in float64."""
    if dtype in (torch.int8, torch.uint8):
        return torch.arange(-127, 128, dtype=torch.float64)
    every = torch.arange(256, dtype=torch.uint8).view(dtype).double()
    return every[every.isfinite()].unique()


def require_nearest_numbers(stored8: Tensor, scale: Tensor, weight: Tensor) -> None:
    """Every number is the nearest of its format, but for a hair beside the middle of two."""
    numbers = numbers_of(stored8.dtype)
    units = weight.double() / scale.double().reshape(-1, 1)
    found = stored8.double() - zero_point(stored8.dtype)
    assert found.isfinite().all()
    right = torch.bucketize(units, numbers).clamp(1, len(numbers) - 1)
    below, above = numbers[right - 1], numbers[right]
    best = torch.minimum((units - below).abs(), (above - units).abs())
    hair = 1e-4 * (above - below)
    assert ((found - units).abs() <= best + hair).all()


@pytest.mark.parametrize("shape", [(1, 1), (7, 13), (130, 257)])
@pytest.mark.parametrize("smooth", [False, True])
@pytest.mark.parametrize("per_tensor", [False, True])
@pytest.mark.parametrize("scheme", ["int8", "fp8", "int8-weight"])
@pytest.mark.parametrize("dtype", FLOATS)
def test_numbers_and_scales(
    dtype: torch.dtype,
    scheme: str,
    per_tensor: bool,
    smooth: bool,
    shape: tuple[int, int],
    tmp_path: Path,
) -> None:
    weight = samples(*shape).to(dtype)
    vector = torch.linspace(0.3, 4, shape[1]) if smooth else None
    source = QuantizedTensor.of(
        stored(weight, tmp_path), SCHEMES[scheme], per_tensor=per_tensor, smooth=vector
    )
    assert (source.name, source.dtype, source.shape) == ("w", SCHEMES[scheme].stored, shape)
    out = read(source, chunk=1000)
    exact = weight.float() if vector is None else weight.float() * vector
    amax = exact.double().abs()
    amax = amax.amax() if per_tensor else amax.amax(1)
    assert (source.scale.dtype, source.scale.shape) == (torch.float32, amax.shape)
    limit = SCHEMES[scheme].limit
    torch.testing.assert_close(source.scale.double(), amax / limit, rtol=1e-7, atol=0)
    require_nearest_numbers(out, source.scale, exact)

    # The layers of the model say the same, but for a hair beside the middle of two numbers.
    again, scale = quantize_weight(exact, out.dtype, per_tensor=per_tensor)
    assert torch.equal(scale, source.scale)
    different = again.float() != out.float()
    assert different.sum() <= 1 + exact.numel() / 1000
    numbers = numbers_of(out.dtype)
    places = [torch.bucketize(x.double(), numbers) for x in (again, out)]
    assert (places[0] - places[1]).abs().amax() <= 1


def test_halves_go_to_the_even_neighbour(tmp_path: Path) -> None:
    """The scale is 1, so that units are the weights themselves."""
    row = torch.tensor([127, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 126.5, 3.49, 3.51])
    out = read(QuantizedTensor.of(stored(row[None], tmp_path), SCHEMES["int8"]))
    assert out.tolist() == [[127, 0, 2, 2, 0, -2, -2, 126, 3, 4]]
    # E4M3 has 16 and 18, 2^-9 and 2^-8, and nothing between.
    row = torch.tensor([448, 17, 19, -17, 16.9, 2**-10, 3 * 2**-10, 1.1 * 2**-10])
    out = read(QuantizedTensor.of(stored(row[None], tmp_path / "fp8"), SCHEMES["fp8"]))
    assert out.tolist() == [[448, 16, 20, -16, 16, 0, 2**-8, 2**-9]]


@pytest.mark.parametrize("pickled", [False, True])
@pytest.mark.parametrize("per_tensor", [False, True])
@pytest.mark.parametrize("scheme", ["int8", "fp8", "int8-weight"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pieces_do_not_show(
    dtype: torch.dtype, scheme: str, per_tensor: bool, pickled: bool, tmp_path: Path
) -> None:
    weight = samples(37, 19).to(dtype)
    source = QuantizedTensor.of(
        stored(weight, tmp_path, pickled=pickled), SCHEMES[scheme], per_tensor=per_tensor
    )
    whole = read(source)
    scale = source.scale.clone()
    row = 19 * dtype.itemsize
    for chunk in (1, row - 1, row, row + 1, 5 * row, 36 * row, 37 * row, 100 * row):
        source.scale.fill_(torch.nan)
        assert torch.equal(read(source, chunk=chunk).float(), whole.float())
        assert torch.equal(source.scale, scale)
        sizes = [len(piece) for piece in source.iter_bytes(chunk)]
        rows = min(37, max(1, chunk // row))
        assert sizes[:-1] == [19 * rows] * (len(sizes) - 1)
        assert 0 < sizes[-1] <= 19 * rows
    converted = b"".join(bytes(p) for p in source.iter_converted(source.dtype, chunk=100))
    assert converted == bytes(whole.view(torch.uint8).numpy().tobytes())


@pytest.mark.parametrize("per_tensor", [False, True])
@pytest.mark.parametrize("scheme", ["int8", "fp8", "int8-weight"])
def test_a_joined_tensor(scheme: str, per_tensor: bool, tmp_path: Path) -> None:
    weight = samples(23, 11).to(torch.bfloat16)
    parts = [
        stored(part.contiguous(), tmp_path / str(i))
        for i, part in enumerate(weight.split((5, 17, 1)))
    ]
    joined = QuantizedTensor.of(JoinedTensor.of(*parts), SCHEMES[scheme], per_tensor=per_tensor)
    one = QuantizedTensor.of(
        stored(weight, tmp_path / "one"), SCHEMES[scheme], per_tensor=per_tensor
    )
    for chunk in (1, 100, 1 << 20):
        assert torch.equal(read(joined, chunk=chunk).float(), read(one).float())
        assert torch.equal(joined.scale, one.scale)
    assert joined.files == tuple(part.file for part in parts)


@pytest.mark.parametrize("scheme", ["int8", "fp8", "int8-weight"])
def test_rows_of_any_size(scheme: str, tmp_path: Path) -> None:
    """Zeros, numbers below the smallest normal one, and the largest that fp32 holds."""
    most = torch.finfo(torch.float32).max
    sizes = [0.0, 1e-45, 1e-39, 1e-31, 1e-29, 1.0, most]
    weight = torch.randn(7, 9, generator=torch.Generator().manual_seed(0)).clamp(-1, 1)
    weight[:, 4] = 1
    weight *= torch.tensor(sizes)[:, None]
    source = QuantizedTensor.of(stored(weight, tmp_path), SCHEMES[scheme])
    out = read(source)
    numbers = out.float() - zero_point(out.dtype)
    assert source.scale[:4].tolist() == [1] * 4
    assert (numbers[:4] == 0).all()
    assert (numbers[4:].abs().amax(1) == SCHEMES[scheme].limit).all()
    require_nearest_numbers(out[4:], source.scale[4:], weight[4:])


@pytest.mark.parametrize("scheme", ["int8", "fp8", "int8-weight"])
def test_a_tensor_of_zeros(scheme: str, tmp_path: Path) -> None:
    zeros = stored(torch.zeros(3, 5), tmp_path)
    source = QuantizedTensor.of(zeros, SCHEMES[scheme], per_tensor=True)
    out = read(source)
    assert (out.float() == zero_point(out.dtype)).all()
    assert source.scale.item() == 1


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
@pytest.mark.parametrize("place", [0, -1])
@pytest.mark.parametrize("per_tensor", [False, True])
@pytest.mark.parametrize("dtype", FLOATS)
def test_a_number_that_is_not_finite(
    dtype: torch.dtype, per_tensor: bool, place: int, bad: float, tmp_path: Path
) -> None:
    weight = samples(9, 7).to(dtype)
    weight.view(-1)[place] = bad
    for vector in (None, torch.ones(7)):
        source = QuantizedTensor.of(
            stored(weight, tmp_path), SCHEMES["fp8"], per_tensor=per_tensor, smooth=vector
        )
        with pytest.raises(CorruptInputError, match="tensor 'w' holds NaN or infinity") as caught:
            read(source, chunk=30)
        assert str(tmp_path / "dit.safetensors") in str(caught.value)


def test_smoothing_that_overflows(tmp_path: Path) -> None:
    source = QuantizedTensor.of(
        stored(torch.full((2, 3), 1e37), tmp_path),
        SCHEMES["int8"],
        smooth=torch.tensor([1.0, 100, 1]),
    )
    with pytest.raises(CorruptInputError, match=r"'w' overflows .* smaller --smooth"):
        read(source)


@pytest.mark.parametrize("shape", [(), (6,), (2, 3, 1), (2, 3, 1, 2, 2)])
def test_a_weight_that_has_not_two_sides(shape: tuple[int, ...], tmp_path: Path) -> None:
    source = stored(torch.zeros(shape), tmp_path)
    with pytest.raises(CorruptInputError) as caught:
        QuantizedTensor.of(source, SCHEMES["int8"])
    message = str(caught.value)
    assert all(word in message for word in ("'w'", str(list(shape)), "two sides"))
    assert "\n" not in message


@dataclass(frozen=True, kw_only=True)
class Endless(TensorSource):
    """A tensor of which there is never more than what was asked for."""

    asked: list[int]

    def iter_bytes(self, chunk: int = 1 << 30) -> Iterator[memoryview]:
        self.asked.append(chunk)
        buffer = bytearray(torch.ones(chunk // 2, dtype=torch.bfloat16).view(torch.uint8).numpy())
        for start in range(0, self.nbytes, chunk):
            yield memoryview(buffer)[: self.nbytes - start]


@pytest.mark.parametrize(("per_tensor", "smooth"), [(False, True), (True, False)])
def test_a_large_tensor_is_never_held(per_tensor: bool, smooth: bool) -> None:
    rows, columns = 4096, 5120
    nbytes = 2 * rows * columns
    tensor = Endless(
        name="w", dtype="BF16", shape=(rows, columns), nbytes=nbytes, file=Path("w"), asked=[]
    )
    source = QuantizedTensor.of(
        tensor,
        SCHEMES["int8"],
        per_tensor=per_tensor,
        smooth=torch.ones(columns) if smooth else None,
    )
    gc.collect()
    before = storages().keys()
    largest = total = 0
    for number, piece in enumerate(source.iter_bytes()):
        total += len(piece)
        if number == 5:
            # Those of other tests may be freed meanwhile, so only new ones count.
            new = {place: size for place, size in storages().items() if place not in before}
            largest = sum(new.values())
    assert total == nbytes // 2
    assert len(tensor.asked) == 1 + per_tensor
    assert max(tensor.asked) <= nbytes / 8
    assert largest < nbytes / 2
    # A pass of its own: Python's memory would count the list that storages() looks through.
    tracemalloc.start()
    for _ in source.iter_bytes():
        pass
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < nbytes / 5
    assert source.scale.shape == (() if per_tensor else (rows,))


def storages() -> dict[int, int]:
    """Place and size of the memory behind every tensor that is alive."""
    tensors = [item for item in gc.get_objects() if type(item) in (Tensor, nn.Parameter)]
    dense = (t for t in tensors if t.device.type == "cpu" and t.layout == torch.strided)
    found = [t.untyped_storage() for t in dense]
    return {storage.data_ptr(): storage.nbytes() for storage in found}


SMOOTH = QuantizeOptions(smooth=0.5)


def recipe_of(scheme: str = "int8", options: QuantizeOptions | None = None) -> Recipe:
    return make_recipe(OUR_DIT, random_weights(OUR_DIT), random_feeds(OUR_DIT), scheme, options)


def test_the_diffusers_layout_on_disk(tmp_path: Path) -> None:
    """What safetensors reads from the written files, against the checkpoint's own tensors."""
    folder = write_diffusers(tmp_path / "checkpoint", "t2v")
    checkpoint = open_checkpoint(folder)
    recipe = recipe_of(options=SMOOTH).without({"blocks.1.ffn.2": "test"})
    sources = quantize_weights(checkpoint.components["dit"], recipe)
    original = checkpoint.components["dit"].tensors
    assert sources.keys() == original.keys()
    changed = {name for name in sources if sources[name] is not original[name]}
    assert changed == recipe.weights
    assert sources["blocks.0.self_attn.q.weight"].name == "blocks.0.attn1.to_q.weight"

    resolved = resolve(ExportOptions(source=folder, precision="int8", quantize=SMOOTH), checkpoint)
    out = tmp_path / "weights"
    out.mkdir()
    portions: list[int] = []
    written = write_quantized_weights(resolved, "dit", out, portions.append, recipe)
    names = {"dit.safetensors", "dit-scales.safetensors"}
    assert {path.name for path in out.iterdir()} == names
    assert {path.name for path in written.sha256} == names
    (file,) = (folder / "transformer").glob("*.safetensors")
    assert list(written.source_sha256) == [file]
    theirs = load_file(file)
    found = load_file(out / "dit.safetensors")
    scales = load_file(out / "dit-scales.safetensors")
    assert sum(portions) == sum(tensor.nbytes for tensor in found.values())
    assert found.keys() == original.keys()
    for name, tensor in found.items():
        source = theirs[original[name].name]
        if name not in recipe.weights:
            assert torch.equal(tensor, source)
            continue
        vector = recipe.smooth.get(smoothing_of(name.removesuffix(".weight")) or "")
        readers = ("self_attn.q.weight", "self_attn.k.weight", "self_attn.v.weight", "ffn.0.weight")
        assert (vector is not None) == name.endswith(readers)
        exact = source if vector is None else source * vector
        assert tensor.dtype == torch.int8
        require_nearest_numbers(tensor, scales[f"{name}_scale"], exact)
    assert {ref.name for ref in written.tensors.values()} == found.keys() | scales.keys()


@pytest.mark.parametrize("order", [1, -1])
@pytest.mark.parametrize("scheme", ["int8", "fp8", "int8-weight"])
def test_names_of_scales(scheme: str, order: int, tmp_path: Path) -> None:
    """Layers with one input have one scale, named by the first of them, in whatever order."""
    options = QuantizeOptions(smooth=0.5, attention="fp8" if scheme == "fp8" else "none")
    recipe = recipe_of(scheme, options).without({"blocks.1.self_attn.q": "test"})
    recipe = replace(recipe, layers=dict(list(recipe.layers.items())[::order]))
    sources: dict[str, TensorSource] = {}
    for name in recipe.layers:
        weight = stored(samples(5, 3), tmp_path)
        sources[f"{name}.weight"] = quantised = QuantizedTensor.of(weight, SCHEMES[scheme])
        read(quantised)
    found = scale_tensors(sources, recipe)
    assert all(tensor.dtype == torch.float32 for tensor in found.values())
    leaders = {shared_input(name) for name in recipe.layers} - {"blocks.1.self_attn.q"}
    leaders |= {"blocks.1.self_attn.k"}
    scales = {name for name in found if name.endswith(".input_scale")}
    assert scales == {f"{name}.input_scale" for name in leaders}
    for name in leaders:
        scale = found[f"{name}.input_scale"]
        assert (scale.item(), scale.shape) == (pytest.approx(recipe.layers[name], rel=1e-7), ())
    rows = {f"{name}.weight_scale" for name in recipe.layers}
    assert all(found[name].shape == (5,) for name in rows)
    heads = {
        f"{name}.{letter}_scale": scale
        for name, of_qkv in recipe.attention.items()
        for letter, scale in zip("qkv", of_qkv, strict=True)
    }
    assert len(heads) == (9 if scheme == "fp8" else 0)
    assert {name: found[name].item() for name in heads} == pytest.approx(heads, rel=1e-7)
    assert found.keys() == scales | rows | heads.keys() | recipe.smooth.keys()
    assert all(torch.equal(found[name], vector) for name, vector in recipe.smooth.items())


def test_scales_that_are_not_fixed(tmp_path: Path) -> None:
    """Inputs scaled per token, and layers whose inputs stay high, have no scale of their own."""
    dynamic = recipe_of("fp8", QuantizeOptions(activation_scale="dynamic", weight_scale="tensor"))
    weights = stored_weights(random_weights(OUR_DIT), tmp_path)
    sources = quantize_weights(weights, dynamic)
    for name in dynamic.weights:
        read(sources[name])
    found = scale_tensors(sources, dynamic)
    assert found.keys() == {f"{name}_scale" for name in dynamic.weights}
    assert all(scale.shape == () for scale in found.values())


def stored_weights(weights: dict[str, Tensor], folder: Path) -> ComponentWeights:
    save_file(weights, folder / "dit.safetensors")
    tensors, files = open_weights(folder, "dit")
    return ComponentWeights(component="dit", tensors=tensors, files=files)


def test_a_table_has_a_scale_for_each_row(tmp_path: Path) -> None:
    recipe = text_recipe(OUR_T5)
    weights = stored_weights(dict(UMT5Encoder(OUR_T5).state_dict()), tmp_path)
    sources = quantize_weights(weights, recipe)
    for name in recipe.weights:
        read(sources[name])
    found = scale_tensors(sources, recipe)
    assert found.keys() == {f"{name}_scale" for name in recipe.weights}
    assert found["token_embedding.weight_scale"].shape == (OUR_T5.vocab_size,)
