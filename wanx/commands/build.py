"""The command ``wanx build``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from wanx.commands.completion import complete_target
from wanx.commands.options import (
    BundlePath,
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


def build(
    bundle: BundlePath,
    target: Annotated[
        str | None,
        option(
            help="As for export: aoti, rtx:sm89, tensorrt, cuda, openvino, cpu.",
            autocompletion=complete_target,
            show_default="aoti; with --lora or --calibrate-cache the bundle's own",
        ),
    ] = None,
    lora: Annotated[
        list[str] | None,
        option(
            metavar="FILE[:STRENGTH]",
            help="LoRA to put into the transformer of a new bundle, which -o names; may be "
            "repeated. The bundle's weights must not be quantised.",
            show_default="none",
        ),
    ] = None,
    output: Annotated[
        Path | None, option("--output", "-o", help="Folder of the new bundle, with --lora.")
    ] = None,
    plugins: Annotated[
        str,
        option(
            help="TensorRT: auto (what was measured to be faster, so far nothing), none, or "
            "kernels of ours such as RMSNormRope,GeluQuantize."
        ),
    ] = "auto",
    sizes: Annotated[
        str | None,
        option(
            help="TensorRT: sizes to cover, the usual one first, such as 832x480,1280x720.",
            show_default="all of Wan2.1",
        ),
    ] = None,
    frames: Annotated[
        int | None,
        option(min=1, help="TensorRT: most frames to cover.", show_default="the model's own"),
    ] = None,
    workspace: Annotated[
        str | None,
        option(
            help="TensorRT: most memory that a kernel may work in, such as 4G, 512M, or MiB.",
            show_default="all of the GPU's",
        ),
    ] = None,
    opt_level: Annotated[
        int | None,
        option(help="TensorRT: 0 to 5; more tries more kernels.", show_default="TensorRT's own"),
    ] = None,
    calibrate_cache: CalibrateCache = False,
    calibration: Annotated[
        Path | None,
        option(help="For that: JSON Lines of prompts.", show_default="a shipped set"),
    ] = None,
    calibration_prompts: CalibrationPrompts = 4,
    calibration_size: CalibrationSize = None,
    calibration_frames: CalibrationFrames = None,
    no_graph_cache: Annotated[
        bool, option("--no-graph-cache", help="cuda: trace every graph anew, and keep none.")
    ] = False,
    force: Annotated[bool, option(help="Build engines that are there too.")] = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Build the engines of another target into a bundle, from the bundle alone."""
    import wanx
    from wanx.commands.display.generation import log_lines, print_bundle, progress_bars
    from wanx.commands.leftovers import find_leftovers
    from wanx.errors import UsageError
    from wanx.exporter.calibration.options import CalibrationOptions
    from wanx.exporter.targets.options import parse_workspace
    from wanx.runtime.sizes import parse_size

    if bool(lora) != (output is not None):
        raise UsageError("--lora makes a new bundle, which --output names: give both, or neither")
    if lora:
        others = {
            "--calibrate-cache": calibrate_cache, "--plugins": plugins != "auto",
            "--sizes": sizes, "--frames": frames, "--workspace": workspace,
            "--opt-level": opt_level,
        }  # fmt: skip
        if refused := [name for name, given in others.items() if given]:
            raise UsageError(
                f"{', '.join(refused)} does not go with --lora; build the new bundle's engines "
                "afterwards"
            )
        find_leftovers((output or Path()).parent, remove=True)
        with exit_on_sigint(), progress_bars(quiet) as progress, log_lines(quiet, "wanx.exporter"):
            made = wanx.export(
                bundle, output, loras=lora, force=force, progress=progress,
                graph_cache=not no_graph_cache,
                target=target or wanx.inspect(bundle).manifest.target,
            )  # fmt: skip
        if as_json:
            print_json(bundle_facts(made))
        else:
            print_bundle(made)
        return
    find_leftovers(Path(bundle).parent, remove=True)
    width, height = (None, None) if calibration_size is None else parse_size(calibration_size)
    measured = CalibrationOptions(
        file=calibration, prompts=calibration_prompts, width=width, height=height,
        frames=calibration_frames,
    )  # fmt: skip
    with exit_on_sigint(), progress_bars(quiet) as progress, log_lines(quiet, "wanx.exporter"):
        built = wanx.build(
            bundle,
            target=target or (None if calibrate_cache else "aoti"),
            calibrate_cache=measured if calibrate_cache else None,
            force=force,
            progress=progress,
            plugins=plugins,
            sizes=tuple(parse_size(size) for size in sizes.split(",")) if sizes else (),
            frames=frames,
            workspace=parse_workspace(workspace),
            opt_level=opt_level,
            graph_cache=not no_graph_cache,
        )
    if as_json:
        print_json(bundle_facts(built))
    else:
        print_bundle(built)
