"""Measure what quantising the weights of a checkpoint takes, calibration apart.

    python -m benchmarks.quantization CHECKPOINT OUTPUT --precision fp8

It copies the checkpoint's weights beside OUTPUT, removes the copy, and exports with every input
scale set to 1 instead of calibrated: the bundle is good for nothing but its time, its memory and
its size. Printed as JSON, like benchmarks/export.py, with the size of a bf16 bundle beside it.
``weights_seconds`` is the part of the export in which the denoiser's weights are read, hashed,
quantised, written, hashed and read back; tracing every graph makes the rest.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

import wanx.exporter.export as exporter
from benchmarks.export import copy_seconds, export_seconds, weight_files
from wanx.exporter import quantized_weights
from wanx.exporter.calibration.options import CalibrationOptions
from wanx.exporter.options import ExportOptions, resolve
from wanx.exporter.quantization import choose_recipe
from wanx.exporter.quantization.recipe import Recipe, dit_candidates
from wanx.exporter.source import open_source
from wanx.exporter.weights import WrittenWeights


def export_uncalibrated(source: Path, output: Path, precision: str) -> None:
    """Export with input scales of 1, in this process; leave the weights' time beside OUTPUT."""

    def fixed(checkpoint, bundle, scheme, options, *_):  # type: ignore[no-untyped-def]
        layers, kept = dit_candidates(checkpoint.config.dit, options)
        return Recipe(
            scheme=scheme, layers=dict.fromkeys(layers, 1.0), unquantized_layers=kept
        ), None

    write = quantized_weights.write_quantized_weights

    def timed(resolved, group, *args) -> WrittenWeights:  # type: ignore[no-untyped-def]
        start = time.perf_counter()
        written = write(resolved, group, *args)
        if group == "dit":
            seconds_file(output).write_text(str(time.perf_counter() - start))
        return written

    choose_recipe.choose_recipe = fixed
    quantized_weights.write_quantized_weights = timed
    options = ExportOptions(
        source=source, output=output, precision=precision, force=True,
        calibration=CalibrationOptions(golden_steps=0),
    )  # fmt: skip
    exporter.export(options)


def seconds_file(output: Path) -> Path:
    """Path at which the exporting process leaves the time of the weights."""
    return output.with_name(output.name + ".seconds")


def bundle_gb(source: Path, precision: str) -> float:
    """Size of the weights of a bundle."""
    options = ExportOptions(
        source=source, precision=precision, calibration=CalibrationOptions(golden_steps=0)
    )
    resolved = resolve(options, open_source(source))
    return sum(resolved.weight_bytes(group) for group in resolved.checkpoint.components) / 1e9


def main() -> None:
    """Parse the command line, measure, print JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("source", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--precision", choices=("int8", "fp8"), default="fp8")
    parser.add_argument("--export-only", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.export_only:
        export_uncalibrated(arguments.source, arguments.output, arguments.precision)
        return
    files = weight_files(arguments.source)
    copying = copy_seconds(files, arguments.output.with_name(arguments.output.name + ".copy"))
    command = [
        sys.executable,
        "-m",
        "benchmarks.quantization",
        "--export-only",
        "--precision",
        arguments.precision,
    ]
    exporting, peak = export_seconds(
        files, [*command, str(arguments.source), str(arguments.output)]
    )
    weights = float(seconds_file(arguments.output).read_text())
    seconds_file(arguments.output).unlink()
    written = sum(path.stat().st_size for path in arguments.output.rglob("*")) / 1e9
    figures = {
        "source_gb": sum(path.stat().st_size for path in files) / 1e9,
        "copy_seconds": copying,
        "weights_seconds": weights,
        "weights_ratio": weights / copying,
        "export_seconds": exporting,
        "export_ratio": exporting / copying,
        "peak_anonymous_gb": peak / 1e9,
        "bundle_gb": written,
        "of_the_bf16_bundle": written / bundle_gb(arguments.source, "bf16"),
    }
    print(json.dumps({name: round(value, 3) for name, value in figures.items()}))


if __name__ == "__main__":
    main()
