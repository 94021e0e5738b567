"""The command ``wanx export``."""

from __future__ import annotations

import os
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from wanx.commands.completion import (
    complete_bundle,
    complete_precision,
    complete_preset,
    complete_target,
    complete_task,
)
from wanx.commands.options import (
    CalibrateCache,
    CalibrationFrames,
    CalibrationPrompts,
    CalibrationSize,
    Json,
    Quiet,
    bundle_facts,
    option,
    print_json,
)
from wanx.interruption import exit_on_sigint

if TYPE_CHECKING:
    from wanx.exporter.export import ExportPlan


def export(
    source: Annotated[
        str | None,
        typer.Argument(
            help="Folder of a checkpoint or bundle, file of weights, a repository of the Hugging "
            "Face hub (owner/name), t2v-1.3B and the like (--list), or tiny, the built-in model.",
            autocompletion=complete_bundle,
            show_default="tiny, unless parts are given",
        ),
    ] = None,
    output: Annotated[
        Path | None, option("--output", "-o", help="Folder of the bundle to write.")
    ] = None,
    precision: Annotated[
        str,
        option(
            help="Of DiT and text encoder. Storage: auto (as they are), fp32, bf16, fp16. "
            "Quantised: int8, fp8.",
            autocompletion=complete_precision,
        ),
    ] = "auto",
    revision: Annotated[
        str | None,
        option(help="Branch, tag or commit of a source on the hub.", show_default="main"),
    ] = None,
    list_sources: Annotated[
        bool,
        option("--list", help="List the official checkpoints on the hub, and export nothing."),
    ] = False,
    dit: Annotated[
        str | None,
        option(
            metavar="PATH",
            help="Transformer in the place of the source's: a file, a folder of shards, or "
            "hf://owner/name/file. Names of tensors tell what a file is, and what it is stored in: "
            "also 8-bit floats, GGUF.",
        ),
    ] = None,
    text_encoder: Annotated[str | None, option(metavar="PATH", help="The same for umT5.")] = None,
    vae: Annotated[str | None, option(metavar="PATH", help="The same for the VAE.")] = None,
    image_encoder: Annotated[
        str | None, option(metavar="PATH", help="The same for CLIP's vision tower.")
    ] = None,
    tokenizer: Annotated[
        str | None,
        option(
            metavar="PATH",
            help="File or folder with tokenizer.json or spiece.model.",
            show_default="the text encoder's",
        ),
    ] = None,
    comfyui: Annotated[
        Path | None,
        option(help="ComfyUI's folder of models; with --dit NAME it finds the other parts."),
    ] = None,
    lora: Annotated[
        list[str] | None,
        option(
            metavar="FILE[:STRENGTH]",
            help="LoRA to put into the transformer before anything else, in any of the usual "
            "formats; may be repeated.",
            show_default="none",
        ),
    ] = None,
    target: Annotated[
        str,
        option(
            help="What will run the bundle: cpu, aoti (compiled for this GPU), rtx:sm89 "
            "(TensorRT-RTX for such GPUs, several with commas), tensorrt (for this GPU), "
            "tensorrt:sm80+ (and all newer ones), or providers of ONNX Runtime: cuda, openvino.",
            autocompletion=complete_target,
        ),
    ] = "cpu",
    task: Annotated[
        str | None,
        option(
            help="Insist on this task; an error names what was found.",
            autocompletion=complete_task,
        ),
    ] = None,
    quantize: Annotated[
        list[str] | None,
        option(
            help="Component to quantise: dit, text_encoder; may be repeated.", show_default="both"
        ),
    ] = None,
    skip_layers: Annotated[
        list[str] | None,
        option(
            metavar="<pattern>",
            help="Layers of the DiT that stay as they are, such as 'blocks.0.*'; may be repeated.",
        ),
    ] = None,
    keep_high: Annotated[
        list[str] | None, option(hidden=True, help="Old name of --skip-layers.")
    ] = None,
    weight_scale: Annotated[
        str, option(help="fp8: a scale per channel or per tensor.")
    ] = "channel",
    activation_scale: Annotated[
        str, option(help="fp8: static (calibrated) or dynamic (per token).")
    ] = "static",
    smooth: Annotated[
        float, option(help="SmoothQuant's strength: 0 (off) to 1, such as 0.5.")
    ] = 0.0,
    attention: Annotated[
        str,
        option(
            help="8-bit self-attention: none, or fp8 with --precision fp8.",
            callback=lambda value: "none" if value == "high" else value,  # its old name
        ),
    ] = "none",
    layer_gate: Annotated[
        float | None,
        option(help="Least SQNR of a layer in dB, below which it stays high.", show_default="auto"),
    ] = None,
    percentile: Annotated[
        float, option(help="Of activations, above which they are clipped; 100 clips none.")
    ] = 100.0,
    calibration: Annotated[
        Path | None,
        option(help="JSON Lines of prompts to calibrate with.", show_default="a shipped set"),
    ] = None,
    calibration_prompts: CalibrationPrompts = 4,
    calibration_steps: Annotated[int, option(help="Denoising steps for each.")] = 6,
    calibration_size: CalibrationSize = None,
    calibration_frames: CalibrationFrames = None,
    fresh_calibration: Annotated[
        bool, option("--fresh-calibration", help="Ignore what was calibrated before.")
    ] = False,
    golden_steps: Annotated[
        int, option(help="Steps with their right answers to put into the bundle; 0 for none.")
    ] = 3,
    gate: Annotated[
        bool, option("--gate", help="Run the golden steps; exit 3 if they are not close enough.")
    ] = False,
    preset: Annotated[
        str | None,
        option(
            help="Solver, steps and guidance that the bundle runs by, such as lightx2v-4step.",
            show_default="the source's",
            autocompletion=complete_preset,
        ),
    ] = None,
    calibrate_cache: CalibrateCache = False,
    no_graph_cache: Annotated[
        bool, option("--no-graph-cache", help="Trace every graph anew, and keep none.")
    ] = False,
    force: Annotated[bool, option("--force", help="Replace a bundle that exists.")] = False,
    dry_run: Annotated[
        bool, option("--dry-run", help="Check the source and print what it would take.")
    ] = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Export a checkpoint to a bundle."""
    if list_sources:
        _list_sources(as_json)
        return
    # Products of LoRAs have a thread of their own beside the one that reads and rounds; threads of
    # NumPy's library beside both took a third longer. It reads this when it is imported.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    from wanx.exporter.packages import GRAPHS, require_packages

    require_packages("export", GRAPHS)
    import wanx
    from wanx.checkpoints.checkpoint import PartPaths
    from wanx.checkpoints.lora.fuse import Lora
    from wanx.commands.display.accuracy import print_quantization
    from wanx.commands.display.generation import (
        log_lines,
        print_bundle,
        print_plan,
        progress_bars,
    )
    from wanx.commands.leftovers import find_leftovers
    from wanx.exporter.calibration.options import CalibrationOptions
    from wanx.exporter.quantization.scheme import QUANTIZED, QuantizeOptions
    from wanx.runtime.sizes import parse_size

    width, height = (None, None) if calibration_size is None else parse_size(calibration_size)
    options: dict[str, Any] = {
        "source": source, "revision": revision,
        "parts": PartPaths(
            dit=dit, text_encoder=text_encoder, vae=vae,  # type: ignore[arg-type]
            image_encoder=image_encoder, tokenizer=tokenizer,  # type: ignore[arg-type]
            comfyui=comfyui,
        ),
        "loras": tuple(Lora.parse(text) for text in lora or ()),
        "output": output, "precision": precision, "target": target,
        "task": task, "force": force, "gate": gate, "graph_cache": not no_graph_cache,
        "preset": preset, "calibrate_cache": calibrate_cache,
        "quantize": QuantizeOptions(
            components=tuple(quantize or QUANTIZED),
            skip_layers=(*(skip_layers or ()), *(keep_high or ())),
            weight_scale=weight_scale,  # type: ignore[arg-type]
            activation_scale=activation_scale,  # type: ignore[arg-type]
            smooth=smooth,
            attention=attention,  # type: ignore[arg-type]
            layer_gate_db=layer_gate, percentile=percentile,
        ),
        "calibration": CalibrationOptions(
            file=calibration, prompts=calibration_prompts, steps=calibration_steps, width=width,
            height=height, frames=calibration_frames, golden_steps=golden_steps,
            fresh=fresh_calibration,
        ),
    }  # fmt: skip
    if dry_run:
        with progress_bars(quiet) as progress, log_lines(quiet, "wanx.exporter"):
            planned = wanx.plan_export(**options, progress=progress)
        if as_json:
            print_json(_planned_facts(planned))
        else:
            print_plan(planned)
        return
    find_leftovers((output or Path("bundle")).parent, remove=True)
    with exit_on_sigint(), progress_bars(quiet) as progress, log_lines(quiet, "wanx.exporter"):
        bundle = wanx.export(**options, progress=progress)
    if as_json:
        print_json(bundle_facts(bundle))
    else:
        print_bundle(bundle)
        print_quantization(bundle)


def _planned_facts(planned: ExportPlan) -> dict[str, Any]:
    checkpoint = planned.resolved.checkpoint
    return {
        "name": checkpoint.config.name, "precision": planned.resolved.precision,
        "output": str(planned.resolved.output), "layout": checkpoint.layout,
        "files": {
            part: [
                planned.hub.named(str(file)) if planned.hub else str(file)
                for file in weights.files
            ]
            for part, weights in checkpoint.components.items()
        },
        "loras": [asdict(lora) for lora in checkpoint.loras],
        "download_bytes": planned.hub.missing_bytes if planned.hub else 0,
    } | asdict(planned.estimate)  # fmt: skip


def _list_sources(as_json: bool) -> None:
    """Print the official checkpoints."""
    from rich.table import Table

    from wanx.commands.display.generation import STDOUT
    from wanx.hub.official import OFFICIAL

    if as_json:
        print_json([asdict(one) for one in OFFICIAL])
        return
    table = Table("name", "on the hub", "task", "about", box=None, pad_edge=False)
    for one in OFFICIAL:
        table.add_row(one.name, one.repository, one.task, f"{one.gigabytes:.0f} GB")
    STDOUT.print(table)
    STDOUT.print("wanx export NAME downloads one; any other repository goes by owner/name")
