"""Choice of a denoiser's recipe: calibrate, measure each layer, apply the gate."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, replace

from wanx.bundle.golden_steps import Golden
from wanx.bundle.reader import Bundle
from wanx.checkpoints.checkpoint import Checkpoint
from wanx.exporter.calibration.blockwise_dit import BlockwiseDiT
from wanx.exporter.calibration.calibrate import calibrate
from wanx.exporter.calibration.options import CalibrationOptions, PlannedRuns
from wanx.exporter.quantization.kept_weights import kept_weight
from wanx.exporter.quantization.recipe import Recipe, dit_candidates, shared_input
from wanx.exporter.quantization.recipe_cache import load_recipe, save_recipe
from wanx.exporter.quantization.scheme import QuantizeOptions, Scheme
from wanx.exporter.quantization.sensitivity import select_layers
from wanx.progress import Progress


def choose_recipe(
    checkpoint: Checkpoint,
    bundle: Bundle,
    scheme: Scheme,
    options: QuantizeOptions,
    calibration: CalibrationOptions,
    progress: Progress,
    runs: PlannedRuns | None = None,
) -> tuple[Recipe, Golden]:
    """Decide which layers of a denoiser become 8-bit, and with which scales.

    What was calibrated and measured before, on the same weights and with the same options, is not
    done again.

    Returns:
        The recipe, and the recorded steps that it was measured on.

    Raises:
        WanxError: as :func:`~wanx.exporter.calibration.calibrate.calibrate` and
            :func:`~wanx.exporter.quantization.sensitivity.select_layers`.
    """
    config = checkpoint.config.dit
    candidates = dit_candidates(config, options)
    attentions = frozenset(
        f"blocks.{block}.self_attn.attend"
        for block in range(config.num_layers)
        if options.attention == "fp8"
    )
    # All schemes observe the same inputs, so that one calibration serves them all.
    candidate_layers, unquantized = dit_candidates(config, QuantizeOptions())
    observed_inputs = {shared_input(name) for name in (*candidate_layers, *unquantized)}
    observed_inputs |= {f"blocks.{block}.self_attn.attend" for block in range(config.num_layers)}
    # Measuring needs a recorded step, even if the bundle is to keep none.
    with_golden_step = replace(calibration, golden_steps=max(1, calibration.golden_steps))
    state = calibrate(checkpoint, bundle, with_golden_step, observed_inputs, progress, runs)
    assert state.golden is not None
    tensors = checkpoint.components["dit"].tensors
    kept = {
        f"{layer}.weight": weight
        for layer in candidates[0]
        if (weight := kept_weight(tensors[f"{layer}.weight"], scheme, options)) is not None
    }
    path = None
    if state.path is not None:
        names = [sorted(kept)] if kept else []
        facts = json.dumps([scheme.name, asdict(options), *names], sort_keys=True)
        key = hashlib.sha256(facts.encode()).hexdigest()[:16]
        path = state.path.with_suffix(f".{key}.safetensors")
        if not calibration.fresh and (cached := load_recipe(path, scheme, options)) is not None:
            return cached, state.golden

    def on_block(done: int, total: int) -> None:
        progress("measure layers", done, total, "steps")

    dit = BlockwiseDiT(config, tensors)
    recipe = select_layers(
        dit, state.golden, state.observers, scheme, options, candidates, attentions, on_block, kept
    )
    if path is not None:
        save_recipe(recipe, path)
    return recipe, state.golden
