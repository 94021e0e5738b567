"""The command ``wanx build``."""

from __future__ import annotations

from typing import Annotated

from wanx.builtin import find_bundle, is_builtin
from wanx.commands.completion import complete_target
from wanx.commands.options import BundlePath, Json, Quiet, bundle_facts, option, print_json
from wanx.errors import UsageError
from wanx.interruption import ends_at_interrupt


def build(
    bundle: BundlePath,
    target: Annotated[
        str,
        option(
            help="As for export: aoti, rtx:sm89, tensorrt, cpu.", autocompletion=complete_target
        ),
    ] = "aoti",
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
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Build the engines of another target into a bundle, from the bundle alone."""
    from wanx.exporter.packages import require_packages

    require_packages()
    from wanx.bundle.reader import open_bundle
    from wanx.commands.display.generation import bars, print_bundle
    from wanx.exporter.build import EngineOptions
    from wanx.exporter.build import build as run_build
    from wanx.exporter.targets.tensorrt.tuning import parse_tuning
    from wanx.runtime.sizes import parse_size

    options = EngineOptions(
        plugins=plugins,
        sizes=tuple(parse_size(size) for size in sizes.split(",")) if sizes else (),
        frames=frames,
        tuning=parse_tuning(workspace, opt_level),
    )
    folder = find_bundle(bundle)
    if is_builtin(folder):
        raise UsageError(
            f"{bundle} is built in and stays as it is; `wanx export {bundle} --target {target}` "
            "makes a bundle of it"
        )
    with ends_at_interrupt(), bars(quiet) as progress:
        built = run_build(open_bundle(folder), target, progress, options)
    if as_json:
        print_json(bundle_facts(built))
    else:
        print_bundle(built)
