"""8-bit floats of a checkpoint that a bundle keeps, byte for byte."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import wanx
from tools.repackage import fp8_scaled, save, tensors_of
from wanx.bundle.reader import Bundle
from wanx.checkpoints.weights import open_files
from wanx.errors import CorruptInputError
from wanx.exporter.calibration.options import CalibrationOptions
from wanx.exporter.quantization.kept_weights import kept_weight
from wanx.exporter.quantization.scheme import SCHEMES, QuantizeOptions
from wanx.exporter.source import open_source

Tensors = dict[str, torch.Tensor]
QUICK = CalibrationOptions(prompts=1, steps=2, golden_steps=1)


def by_rows(tensors: Tensors) -> Tensors:
    """A scale for each row."""
    found = dict(tensors)
    for name in [name for name in tensors if name.endswith(".weight") and tensors[name].ndim == 2]:
        if name.startswith("blocks."):
            scale = tensors[name].float().abs().amax(1, keepdim=True) / 448
            found[name] = (tensors[name].float() / scale).to(torch.float8_e4m3fn)
            found[name.replace(".weight", ".weight_scale")] = scale
    return found


def stored(bundle: Bundle) -> Tensors:
    files = [bundle.root / name for name in bundle.manifest.components["dit"].weights]
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def export(
    form: Callable[[Tensors], Tensors], folder: Path, **options: Any
) -> tuple[Tensors, Bundle]:
    """Export the built-in model with its transformer in a form; returns what the file has too."""
    checkpoint = open_source("tiny")
    tensors = form(tensors_of(checkpoint.components["dit"]))
    save(tensors, folder / "dit.safetensors")
    for part in ("text_encoder", "vae"):
        save(tensors_of(checkpoint.components[part]), folder / f"{part}.safetensors")
    parts = wanx.PartPaths(
        **{part: folder / f"{part}.safetensors" for part in ("dit", "text_encoder", "vae")},
        tokenizer=checkpoint.tokenizer.path,
    )
    settings = {"calibration": QUICK, "graph_cache": True} | options
    return tensors, wanx.export(None, folder / "bundle", parts=parts, **settings)


@pytest.mark.parametrize(
    ("form", "weight_scale"),
    [(fp8_scaled, "channel"), (fp8_scaled, "tensor"), (by_rows, "channel")],
)  # fmt: skip
def test_numbers_and_scales_are_the_files(
    form: Callable[[Tensors], Tensors], weight_scale: Any, tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    caplog.set_level("INFO", "wanx.exporter")
    options = QuantizeOptions(weight_scale=weight_scale, layer_gate_db=-100.0)
    source, bundle = export(form, tmp_path, precision="fp8", quantize=options, gate=True)
    quantization = bundle.manifest.components["dit"].quantization
    assert quantization is not None
    layers, found = list(quantization.layers), stored(bundle)
    assert len(layers) == 60
    assert quantization.kept_weights == len(layers)
    assert "dit: 60 weights keep the 8-bit floats of the source" in caplog.text
    for layer in layers:
        codes = source[f"{layer}.weight"]
        assert codes.dtype == torch.float8_e4m3fn
        assert torch.equal(found[f"{layer}.weight"].view(torch.uint8), codes.view(torch.uint8))
        scale = source.get(f"{layer}.scale_weight", source.get(f"{layer}.weight_scale"))
        expected = torch.ones(1) if scale is None else scale.float().flatten()
        scales = found[f"{layer}.weight_scale"]
        assert scales.shape == (() if weight_scale == "tensor" else (len(codes),))
        assert torch.equal(
            scales, expected.reshape(-1).expand(scales.numel()).reshape(scales.shape)
        )


def test_what_changes_is_quantised_anew(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A LoRA on one layer, smoothing on others."""
    caplog.set_level("INFO", "wanx.exporter")
    layer = "blocks.1.cross_attn.q"
    shape = tensors_of(open_source("tiny").components["dit"])[f"{layer}.weight"].shape
    lora = {f"diffusion_model.{layer}.diff": torch.full(shape, 1e-3)}
    save_file(lora, tmp_path / "lora.safetensors")
    _, bundle = export(
        fp8_scaled, tmp_path, precision="fp8", loras=[tmp_path / "lora.safetensors"],
        quantize=QuantizeOptions(smooth=0.5, layer_gate_db=-100.0),
    )  # fmt: skip
    quantization = bundle.manifest.components["dit"].quantization
    assert quantization is not None
    smoothed = [
        name for name in quantization.layers
        if name.endswith((".self_attn.q", ".self_attn.k", ".self_attn.v", ".ffn.0"))
    ]  # fmt: skip
    assert quantization.kept_weights == len(quantization.layers) - len(smoothed) - 1
    anew = len(smoothed)  # the fused weight is one of 32 bits by then
    assert f"{anew} weights are 8-bit floats in the source and quantised anew" in caplog.text


@pytest.mark.parametrize("scale", [0.0, -0.5, [0.5, -0.5], [[0.25], [0.5]], 0.5, None])
def test_scales_that_can_be_kept(scale: Any, tmp_path: Path) -> None:
    codes = torch.tensor([[1.0, 2.0, -448.0], [0.0, 0.5, 3.0]]).to(torch.float8_e4m3fn)
    tensors = {"a.weight": codes}
    if scale is not None:
        tensors["a.weight_scale"] = torch.tensor(scale)
    save_file(tensors, tmp_path / "w.safetensors")
    source = open_files([tmp_path / "w.safetensors"])[0]["a.weight"]
    kept = kept_weight(source, SCHEMES["fp8"], QuantizeOptions())
    values = [1.0] if scale is None else torch.tensor(scale).flatten().tolist()
    if min(values) <= 0:
        assert kept is None
        return
    assert kept is not None
    assert torch.equal(kept.numbers().view(torch.uint8), codes.view(torch.uint8))
    assert torch.equal(
        kept.scale, torch.tensor(values).expand(2) if len(values) == 1 else torch.tensor(values)
    )
    whole = b"".join(bytes(piece) for piece in source.iter_converted("F32"))
    expected = kept.numbers().float() * kept.scale[:, None]
    assert torch.equal(torch.frombuffer(bytearray(whole), dtype=torch.float32).view(2, 3), expected)
    assert kept_weight(source, SCHEMES["int8"], QuantizeOptions()) is None
    one = kept_weight(source, SCHEMES["fp8"], QuantizeOptions(weight_scale="tensor"))
    assert (one is None) == (len(values) > 1)


def test_numbers_of_a_weight_that_is_read_in_pieces(tmp_path: Path) -> None:
    codes = torch.randn(1500, 2000).to(torch.float8_e4m3fn)
    save_file({"a.weight": codes}, tmp_path / "w.safetensors")
    kept = kept_weight(
        open_files([tmp_path / "w.safetensors"])[0]["a.weight"], SCHEMES["fp8"], QuantizeOptions()
    )
    assert kept is not None
    assert torch.equal(kept.numbers().view(torch.uint8), codes.view(torch.uint8))


def test_other_floats_are_not_kept(tmp_path: Path) -> None:
    tensors = {"a.weight": torch.ones(2, 3).to(torch.float8_e5m2), "b.weight": torch.ones(2, 3)}
    save_file(tensors, tmp_path / "w.safetensors")
    for source in open_files([tmp_path / "w.safetensors"])[0].values():
        assert kept_weight(source, SCHEMES["fp8"], QuantizeOptions()) is None


def test_codes_that_are_no_numbers(tmp_path: Path) -> None:
    codes = torch.tensor([[1.0, float("nan")]]).to(torch.float8_e4m3fn)
    save_file({"a.weight": codes}, tmp_path / "w.safetensors")
    source = open_files([tmp_path / "w.safetensors"])[0]["a.weight"]
    kept = kept_weight(source, SCHEMES["fp8"], QuantizeOptions())
    assert kept is not None
    with pytest.raises(CorruptInputError, match=r"'a\.weight' holds NaN"):
        kept.numbers()


def test_a_kept_weight_that_is_written_wrong_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The readback holds for what is kept, too."""
    from wanx.errors import WanxError
    from wanx.exporter.quantization import kept_weights

    original = kept_weights.kept_weight

    def doubled(*args: Any) -> Any:
        kept = original(*args)
        return kept and dataclasses.replace(kept, scale=2 * kept.scale)

    monkeypatch.setattr(kept_weights, "kept_weight", doubled)
    with pytest.raises(WanxError, match="these weights do not match their scales"):
        export(fp8_scaled, tmp_path, precision="fp8")


def test_kept_weights_measure_better(tmp_path: Path) -> None:
    """Rounded once, not twice: against a bundle that quantises the same numbers anew."""
    tensors = fp8_scaled(tensors_of(open_source("tiny").components["dit"]))
    _, kept = export(lambda _: tensors, tmp_path / "kept", precision="fp8")
    wide = {}
    for name, source in open_files([tmp_path / "kept" / "dit.safetensors"])[0].items():
        data = bytearray(b"".join(bytes(p) for p in source.iter_converted("F32")))
        wide[name] = torch.frombuffer(data, dtype=torch.float32).view(source.shape)
    _, anew = export(lambda _: wide, tmp_path / "anew", precision="fp8")

    def mean(bundle: Bundle) -> float:
        quantization = bundle.manifest.components["dit"].quantization
        assert quantization is not None
        figures = [layer.sqnr_db for layer in quantization.layers.values()]
        return sum(db for db in figures if db is not None) / len(figures)

    assert mean(kept) > mean(anew) + 1
    with safe_open(kept.root / "weights" / "dit.safetensors", "pt") as file:
        assert file.get_tensor("blocks.0.ffn.0.weight").dtype == torch.float8_e4m3fn
