"""Memory of a run that is known before it runs, and what happens where there is less."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable

import numpy as np
import pytest

import wanx.runtime.memory.plan as plan_module
import wanx.runtime.memory.vae_plan as vae_module
import wanx.runtime.run_parts as run_parts_module
from tests.support.fake_gpu import FakeCuda
from wanx.benchmarks.accuracy.compare import CompareOptions, compare
from wanx.bundle.reader import Bundle
from wanx.errors import UsageError, WanxError
from wanx.exporter.build import build
from wanx.runtime.options import RunOptions
from wanx.runtime.pipeline import Pipeline
from wanx.runtime.sessions import registry
from wanx.runtime.sessions.device.cuda import RESERVED_BYTES
from wanx.runtime.sessions.onnxruntime.providers import PROVIDERS
from wanx.runtime.vae.parts import require_parts

MIB = 1 << 20
PROMPT = "a red circle moving right"
WIDE = RunOptions(prompt=PROMPT, width=512, height=320, frames=5, steps=1, seed=0)


def least(bundle: Bundle, options: RunOptions = WIDE) -> int:
    """The smallest budget that a refusal names."""
    with pytest.raises(UsageError, match="more than --memory 1M allows; give") as refused:
        Pipeline(bundle, memory=MIB).plan(options)
    (named,) = re.findall(r"give --memory (\d+)M or more", str(refused.value))
    return int(named) * MIB


@pytest.mark.fault("a budget of memory")
def test_the_least_that_is_named(bundle_fp32: Bundle) -> None:
    budget = least(bundle_fp32)
    stages = Pipeline(bundle_fp32, memory=budget).plan(WIDE).stages
    assert [stage.name for stage in stages] == ["text", "denoise", "decode"]
    assert max(stage.total for stage in stages) <= budget
    with pytest.raises(UsageError, match="decoding this size, in the smallest tiles, takes"):
        Pipeline(bundle_fp32, memory=budget - MIB).plan(WIDE)


def test_more_memory_recomputes_less(bundle_fp32: Bundle) -> None:
    overheads, budget = [], least(bundle_fp32)
    while not overheads or overheads[-1] > 1:
        (*_, decode) = Pipeline(bundle_fp32, memory=budget).plan(WIDE).stages
        assert decode.total <= budget
        assert decode.vae is not None
        overheads.append(decode.vae.tiling.overhead)
        budget += 16 * MIB
    assert len(overheads) > 3
    assert overheads == sorted(overheads, reverse=True)


@pytest.mark.parametrize(("free", "refused"), [(None, False), (64 << 30, False), (100 * MIB, True)])
def test_what_is_free(
    free: int | None, refused: bool, bundle_fp32: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan_module, "usable_memory", lambda: free)
    if not refused:
        *_, decode = Pipeline(bundle_fp32).plan(WIDE).stages
        assert decode.vae is not None
        assert not decode.vae.in_tiles
        return
    with pytest.raises(UsageError, match=r"memory, and 0.1 GB are free; .* with --memory \d+M"):
        Pipeline(bundle_fp32).plan(WIDE)


def test_mapped_weights_count_in_a_budget_alone(
    bundle_fp32: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The system takes them back where it has to."""
    budget = least(bundle_fp32)
    stages = Pipeline(bundle_fp32, memory=budget).plan(WIDE).stages
    free = max(stage.least_other for stage in stages)
    monkeypatch.setattr(plan_module, "usable_memory", lambda: free)
    assert free < budget
    Pipeline(bundle_fp32).plan(WIDE)


@pytest.mark.fault("a budget of memory")
def test_nothing_runs_that_does_not_fit(
    bundle_fp32: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_parts_module, "open_session", lambda *a, **k: pytest.fail("it ran"))
    with pytest.raises(UsageError, match="more than --memory 64M allows"):
        Pipeline(bundle_fp32, memory=64 * MIB).run(WIDE)


@pytest.mark.parametrize("task", ["t2v", "i2v", "flf2v", "vace"])
def test_runs_in_tiles_make_the_same_video(
    task: str, bundle_of: Callable[[str, str], Bundle]
) -> None:
    bundle = bundle_of(task, "fp32")
    image = np.random.default_rng(0).integers(0, 256, (320, 512, 3), np.uint8)
    given = {
        "t2v": {}, "i2v": {"image": image}, "flf2v": {"image": image, "last_image": image},
        "vace": {"references": [image]},
    }[task]  # fmt: skip
    options = RunOptions(
        prompt=PROMPT,
        width=512,
        height=320,
        frames=5,
        steps=1,
        seed=0,
        **given,  # type: ignore[arg-type]
    )
    whole = Pipeline(bundle).run(options).frames
    tight = Pipeline(bundle, memory=least(bundle, options))
    planned = [stage.vae for stage in tight.plan(options).stages if stage.vae is not None]
    assert [vae.in_tiles for vae in planned] == [True] * (1 if task == "t2v" else 2)
    tiled = tight.run(options).frames
    assert whole is not None
    assert tiled is not None
    assert np.mean(whole == tiled) >= 0.9999


@pytest.mark.fault("memory that others take")
def test_memory_that_shrinks(bundle_fp32: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    """The next tiles are smaller; what was made so far stays."""
    whole = Pipeline(bundle_fp32).run(WIDE).frames
    budget, asked = least(bundle_fp32) + 48 * MIB, [0]
    *_, decode = Pipeline(bundle_fp32, memory=budget).plan(WIDE).stages
    assert decode.vae is not None

    def shrinks() -> int:
        asked[0] += 1
        return budget if asked[0] < 2 else 64 * MIB

    monkeypatch.setattr(vae_module, "usable_memory", shrinks)
    shrunk = Pipeline(bundle_fp32).run(WIDE).frames
    assert asked[0] > len(decode.vae.tiling.tiles)
    assert whole is not None
    assert shrunk is not None
    assert np.mean(whole == shrunk) >= 0.9999


@pytest.mark.fault("memory that others take")
def test_memory_that_is_gone(bundle_fp32: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    budget, asked = least(bundle_fp32) + 48 * MIB, [0]

    def gone() -> int:
        asked[0] += 1
        return budget if asked[0] < 2 else 0

    monkeypatch.setattr(vae_module, "usable_memory", gone)
    with pytest.raises(WanxError, match="not enough memory is left for even the smallest tile"):
        Pipeline(bundle_fp32).run(WIDE)


@pytest.mark.fault("a bundle of an earlier version")
def test_a_bundle_without_parts(bundle_fp32: Bundle) -> None:
    manifest = bundle_fp32.manifest
    kept = {n: c for n, c in manifest.components.items() if not n.startswith("vae_")}
    older = dataclasses.replace(
        bundle_fp32, manifest=manifest.model_copy(update={"components": kept})
    )
    said = r"was exported before .* make it anew with `wanx export .* -o NEW --precision fp32`"
    with pytest.raises(UsageError, match=said):
        Pipeline(older).run(WIDE)
    with pytest.raises(UsageError, match=said):
        compare(bundle_fp32, older, CompareOptions())
    with pytest.raises(UsageError, match=said):
        build(older, "openvino")
    quantized = older.manifest.model_copy(update={"precision": "int8"})
    with pytest.raises(UsageError, match=r"anew from .*, its checkpoint, with `wanx export CHECK"):
        require_parts(older.root, quantized)


@pytest.fixture
def on_gpu(bundle_fp32: Bundle) -> Bundle:
    """The bundle, as if engines had been built into it."""
    manifest = bundle_fp32.manifest
    components = {
        name: record.model_copy(update={"engines": {"tensorrt": "engines/plan.json"}})
        for name, record in manifest.components.items()
    }
    changed = {"components": components, "target": "tensorrt"}
    return dataclasses.replace(bundle_fp32, manifest=manifest.model_copy(update=changed))


def gpu_with(monkeypatch: pytest.MonkeyPatch, free: int) -> FakeCuda:
    """A GPU that has so much memory, some of which is always kept free."""
    cuda = FakeCuda(memory=free + RESERVED_BYTES)
    monkeypatch.setattr("wanx.runtime.sessions.device.cuda.import_module", lambda name: cuda)
    return cuda


@pytest.mark.parametrize("by_budget", [False, True])
def test_memory_of_a_gpu(by_budget: bool, on_gpu: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    """The VAE is planned by its GPU's memory, whatever the host has."""
    monkeypatch.setattr(plan_module, "usable_memory", lambda: 1)
    gpu_with(monkeypatch, 64 << 30)
    with pytest.raises(UsageError, match="GB of GPU memory, more than --vram-budget 1M allows"):
        Pipeline(on_gpu, vram_budget=MIB).plan(WIDE)
    (decode,) = Pipeline(on_gpu).plan(WIDE).stages
    assert decode.on_gpu
    assert decode.vae is not None
    assert not decode.vae.in_tiles
    enough = decode.least
    gpu_with(monkeypatch, (64 << 30) if by_budget else enough)
    (decode,) = Pipeline(on_gpu, vram_budget=enough if by_budget else None).plan(WIDE).stages
    assert decode.total <= enough
    assert decode.vae is not None
    assert decode.vae.in_tiles


def test_a_gpu_that_is_full(on_gpu: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is refused by a law that was not measured there; the smallest tiles are taken."""
    gpu_with(monkeypatch, MIB)
    (decode,) = Pipeline(on_gpu).plan(WIDE).stages
    assert decode.total == decode.least


def test_without_a_gpu(on_gpu: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    """Loading the engines says what is missing."""

    def absent(name: str) -> None:
        raise ImportError(name)

    monkeypatch.setattr("wanx.runtime.sessions.device.cuda.import_module", absent)
    monkeypatch.setattr(registry, "find_spec", lambda name: None)
    for target in ("tensorrt", "rtx", "aoti"):
        manifest = on_gpu.manifest.model_copy(update={"target": target})
        assert registry.device_memory(manifest, None) is None


def test_other_providers_are_not_counted(
    bundle_fp32: Bundle, caplog: pytest.LogCaptureFixture
) -> None:
    pipeline = Pipeline(bundle_fp32, memory=8 << 30, provider="openvino")
    (decode,) = pipeline.plan(WIDE).stages
    assert decode.name == "decode"
    assert "--memory does not count text_encoder and dit" in caplog.text


def test_a_missing_provider_that_may_be_done_without(bundle_fp32: Bundle) -> None:
    missing = next(name for name, row in PROVIDERS.items() if not row.is_installed)
    pipeline = Pipeline(bundle_fp32, memory=8 << 30, provider=missing, fallback=True)
    assert [stage.name for stage in pipeline.plan(WIDE).stages] == ["text", "denoise", "decode"]
