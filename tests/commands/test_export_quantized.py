"""``wanx export --precision int8|fp8``: what is refused, in one line, and what is left behind."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import wanx.exporter.component_writer as component_writer
import wanx.exporter.export as exporter
from tests.support.command_line import Wanx
from wanx.builtin import builtin_bundle
from wanx.exporter.calibration.blockwise_dit import BlockwiseDiT
from wanx.exporter.graph.cache import GraphCache
from wanx.exporter.graph.liveness import ACTIVATION_BYTES

FEW = ["--quantize", "dit", "--calibration-prompts", "1", "--calibration-steps", "2",
       "--golden-steps", "1", "--calibration-size", "32x32",
       "--calibration-frames", "5"]  # fmt: skip
PROMPT = '{"prompt": "a red circle"}'


Export = Wanx


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Where commands run; empty."""
    (tmp_path / "folder").mkdir()
    return tmp_path / "folder"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where calibrations are kept; not there yet."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "wanx" / "calibration"


@pytest.fixture
def export(wanx: Wanx, monkeypatch: pytest.MonkeyPatch, folder: Path, cache: Path) -> Export:
    """Run ``wanx export`` in this process, in an empty folder."""
    monkeypatch.chdir(folder)
    return partial(wanx, "export")


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take the graph of the text encoder alone, as calibration does; all fail before the DiT.

    The VAE gets an empty graph.
    """
    find = GraphCache.graph

    def little(self: GraphCache, name: str, *args: Any) -> ir.Model:
        assert name != "dit", "this export should have failed before"
        if name != "text_encoder":
            empty = ir.Graph([], [], nodes=[], opset_imports={"": 23})
            law = {ACTIVATION_BYTES: '{"fixed": 0, "each": 0}'}
            return ir.Model(empty, ir_version=11, metadata_props=law)
        return find(self, name, *args)

    monkeypatch.setattr(GraphCache, "graph", little)
    monkeypatch.setattr(component_writer, "tile_border", lambda *arguments: None)


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows with every pass through the denoiser."""
    done: list[int] = []
    run = BlockwiseDiT.run

    def counted(self: BlockwiseDiT, *arguments: Any, **options: Any) -> Any:
        answer = run(self, *arguments, **options)
        done.append(len(done))
        return answer

    monkeypatch.setattr(BlockwiseDiT, "run", counted)
    return done


INT8 = ["--precision", "int8"]
FP8 = ["--precision", "fp8"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([*INT8, "--weight-scale", "tensor"], "--weight-scale tensor is for --precision fp8"),
        ([*INT8, "--activation-scale", "dynamic"], "--activation-scale dynamic is for --precision"),
        ([*INT8, "--attention", "fp8"], "--attention fp8 is for --precision fp8, not int8"),
        (["--smooth", "0.5"], "--precision auto quantises nothing; choose int8 or fp8"),
        (["--precision", "bf16", "--skip-layers", "*"], "--precision bf16 quantises nothing"),
        (["--precision", "fp32", "--quantize", "dit"], "--precision fp32 quantises nothing"),
        ([*FP8, "--quantize", "vae"], "vae has no 8-bit layers; choose dit or text_encoder"),
        ([*FP8, "--quantize", "dit", "--quantize", "image_encoder"], "image_encoder has no 8-bit"),
        ([*FP8, "--weight-scale", "row"], "--weight-scale row is not available"),
        ([*FP8, "--activation-scale", "none"], "--activation-scale none is not available"),
        ([*FP8, "--attention", "int8"], "--attention int8 is not available; choose none or fp8"),
        ([*FP8, "--smooth", "1.5"], "--smooth is 1.5; choose 0 (off) to 1"),
        ([*FP8, "--smooth", "nan"], "--smooth is nan"),
        ([*FP8, "--percentile", "0"], "--percentile is 0; choose 50 to 100"),
        ([*FP8, "--layer-gate", "nan"], "--layer-gate is nan; choose a finite number"),
        ([*FP8, "--skip-layers", "block.0.*"], "--skip-layers 'block.0.*' matches no layer"),
        ([*FP8, "--skip-layers", ""], "--skip-layers '' matches no layer"),
        ([*FP8, "--skip-layers", "*"], "all 60 layers are kept high"),
        ([*FP8, "--calibration", "none.jsonl"], "none.jsonl is not there"),
        ([*FP8, "--calibration", "."], "is not there or not a file"),
        ([*FP8, "--calibration-prompts", "0"], "--calibration-prompts is 0; choose 1 to 10000"),
        ([*FP8, "--calibration-steps", "1001"], "--calibration-steps is 1001; choose 1 to 1000"),
        ([*FP8, "--calibration-size", "big"], "'big' is not a size"),
        ([*FP8, "--calibration-size", "0x0"], "width must be a multiple of 16"),
        ([*FP8, "--calibration-size", "60x64"], "use 48 or 64"),
        ([*FP8, "--calibration-frames", "0"], "frames must be 4n+1"),
        ([*FP8, "--golden-steps", "-1"], "--golden-steps is -1; choose 0 to 100"),
        (
            [*FP8, "--gate", "--golden-steps", "0"],
            "--gate runs the golden steps, and --golden-steps 0 makes none",
        ),
        (["--calibration-size", "60x64"], "use 48 or 64"),  # golden steps have a size as well
    ],
)
@pytest.mark.parametrize("dry_run", [False, True])
def test_bad_options_are_one_line_and_leave_nothing(
    arguments: list[str],
    words: str,
    dry_run: bool,
    export: Export,
    folder: Path,
    cache: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(exporter, "write_bundle", None)
    result = export(*arguments, *(["--dry-run"] if dry_run else []))
    assert result.code == 2
    assert words in result.error
    assert list(folder.iterdir()) == []
    assert not cache.exists()


@pytest.mark.parametrize(
    ("arguments", "skip_layers", "attention"),
    [
        ([], (), "none"),
        (["--skip-layers", "*.ffn.2", "--attention", "none"], ("*.ffn.2",), "none"),
        (["--keep-high", "*.ffn.2", "--attention", "high"], ("*.ffn.2",), "none"),
        (
            ["--keep-high", "a", "--skip-layers", "b", "--keep-high", "c", "--attention", "fp8"],
            ("b", "a", "c"),
            "fp8",
        ),
    ],
)
def test_old_names_of_options_still_work(
    arguments: list[str],
    skip_layers: tuple[str, ...],
    attention: str,
    export: Export,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    options: dict[str, Any] = {}

    def plan(**given: Any) -> None:
        options.update(given)
        sys.exit(0)

    monkeypatch.setattr("wanx.plan_export", plan)
    assert export(*FP8, "--dry-run", *arguments).code == 0
    assert options["quantize"].skip_layers == skip_layers
    assert options["quantize"].attention == attention


def test_an_old_name_in_the_environment_still_works(
    export: Export, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANX_EXPORT_KEEP_HIGH", "block.0.*")
    assert "--skip-layers 'block.0.*' matches no layer" in export(*FP8, "--dry-run").error


def test_old_names_of_options_are_not_listed(export: Export) -> None:
    text = export("--help").out
    assert "--skip-layers" in text
    assert "keep-high" not in text
    assert "high" not in text.partition("--attention")[2].partition("--layer-gate")[0]


@pytest.mark.parametrize(
    ("text", "code", "words"),
    [
        ("", 2, "p.jsonl has no lines"),
        (f'{PROMPT}\n\n{{"prompt": ', 5, "line 3 of "),
        (f"{PROMPT}\n[1]", 5, "line 2 of "),
        (f'{PROMPT}\n{{"promt": "a"}}', 2, "'promt' is not an option"),
        ('{"prompt": "a", "seed": 1.5}', 2, "seed is 1.5; give a whole number"),
        ('{"prompt": "a", "image": "x.png"}', 2, "takes no --image"),
        ('{"prompt": "a", "video": "x.mp4"}', 2, "takes no --video"),
    ],
)
def test_bad_calibration_files_are_one_line_and_leave_nothing(
    text: str,
    code: int,
    words: str,
    export: Export,
    tmp_path: Path,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Before anything is written or traced."""
    monkeypatch.setattr(exporter, "write_bundle", None)
    file = tmp_path / "p.jsonl"
    file.write_text(text)
    result = export(*FP8, "--calibration", file)
    assert result.code == code
    assert words in result.error
    assert str(file) in result.error
    assert list(folder.iterdir()) == []


def edited(source: Path, target: Path, change: Callable[[dict[str, Tensor]], object]) -> Path:
    """A copy of a checkpoint with other weights of the denoiser."""
    shutil.copytree(source, target)
    (path,) = (target / "transformer").glob("*.safetensors")
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})
    return target


def put_nan(tensors: dict[str, Tensor]) -> None:
    tensors["blocks.1.attn2.to_k.weight"][2, 3] = torch.nan


def overflow(tensors: dict[str, Tensor]) -> None:
    tensors["blocks.1.ffn.net.0.proj.weight"].fill_(3e38)


def no_input(tensors: dict[str, Tensor]) -> None:
    tensors["blocks.0.norm2.weight"].zero_()
    tensors["blocks.0.norm2.bias"].zero_()


@pytest.mark.parametrize(
    ("precision", "change", "code", "words", "calibrated"),
    [
        ("int8", put_nan, 5, ["blocks.1.attn2.to_k.weight", "holds NaN"], False),
        ("fp8", overflow, 1, ["in the input of blocks.1.ffn.2 while calibrating"], False),
        ("int8", no_input, 1,
         ["blocks.0.cross_attn.q was always 0", "--skip-layers blocks.0.cross_attn.q"], True),
    ],
)  # fmt: skip
def test_a_model_that_cannot_be_quantised(
    precision: str,
    change: Callable[[dict[str, Tensor]], None],
    code: int,
    words: list[str],
    calibrated: bool,
    quick: None,
    export: Export,
    checkpoint: Path,
    tmp_path: Path,
    folder: Path,
    cache: Path,
) -> None:
    source = edited(checkpoint, tmp_path / "edited", change)
    result = export(source, "--precision", precision, *FEW, "-q")
    assert result.code == code
    assert all(word in result.error for word in words)
    assert list(folder.iterdir()) == []
    assert len(list(cache.glob("*"))) == calibrated


def test_what_was_calibrated_survives_a_failure(
    quick: None,
    export: Export,
    checkpoint: Path,
    folder: Path,
    cache: Path,
    steps: list[int],
) -> None:
    for attempt, gate in enumerate((200, 150), 1):
        result = export(checkpoint, *INT8, *FEW, "-q", "--layer-gate", gate, "-o", "bundle")
        assert result.code == 1
        assert f"no layer can be int8: below {gate} dB" in result.error
        assert list(folder.iterdir()) == []
        (file,) = cache.iterdir()
        assert file.suffix == ".safetensors"
        # Two steps of calibration, once, and each time what it took to measure.
        assert len(steps) == 2 + attempt


def test_ctrl_c_loses_no_step(
    quick: None,
    export: Export,
    checkpoint: Path,
    folder: Path,
    cache: Path,
    steps: list[int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    counted = BlockwiseDiT.run

    def interrupted(self: BlockwiseDiT, *arguments: Any, **options: Any) -> Any:
        if len(steps) == 1:
            raise KeyboardInterrupt
        return counted(self, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(BlockwiseDiT, "run", interrupted)
        result = export(checkpoint, *INT8, *FEW, "-o", "bundle")
    assert result.code == 130
    assert "Traceback" not in result.err
    assert list(folder.iterdir()) == []
    (file,) = cache.iterdir()
    assert file.suffix == ".safetensors"
    assert export(checkpoint, *INT8, *FEW, "--layer-gate", 200, "-o", "bundle").code == 1
    assert len(steps) == 2 + 1


@pytest.mark.parametrize("precision", ["int8", "fp8"])
def test_dry_run(precision: str, export: Export, folder: Path, cache: Path) -> None:
    result = export("--precision", precision, "--dry-run", "--json")
    facts = json.loads(result.out)
    assert facts["precision"] == precision
    weights = load_file(builtin_bundle() / "weights" / "dit.safetensors")
    blocks = [w for name, w in weights.items() if name.startswith("blocks.") and w.ndim == 2]
    rest = sum(w.nbytes for w in weights.values()) - sum(w.nbytes for w in blocks)
    assert facts["weight_bytes"]["dit"] == rest + sum(w.numel() + 4 * len(w) for w in blocks)
    # Four clips of 80 tokens, six steps, two branches.
    parameters = sum(w.numel() for w in weights.values())
    assert facts["calibration_seconds"] == pytest.approx(2 * parameters * 80 * 4 * 6 * 2 / 150e9)
    assert facts["calibration_seconds"] < facts["seconds"] < 60
    text = export("--precision", precision, "--dry-run").out
    assert ", of which calibration 0.0 s" in text or ", of which calibration 0.1 s" in text
    assert list(folder.iterdir()) == []
    assert not cache.exists()
