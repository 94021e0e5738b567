"""The command ``wanx build``."""

from __future__ import annotations

from typing import Annotated

from wanx.builtin import find_bundle, is_builtin
from wanx.cli_options import BundlePath, Json, Quiet, bundle_facts, option, print_json
from wanx.errors import UsageError


def build(
    bundle: BundlePath,
    target: Annotated[str, option(help="What will run the bundle: aoti or cpu.")] = "aoti",
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Build the engines of another target into a bundle, from the bundle alone."""
    from wanx.export import require_packages

    require_packages()
    from wanx.bundle import open_bundle
    from wanx.export.build import build as run_build
    from wanx.rendering import bars, print_bundle

    folder = find_bundle(bundle)
    if is_builtin(folder):
        raise UsageError(
            f"{bundle} is built in and stays as it is; `wanx export {bundle} --target {target}` "
            "makes a bundle of it"
        )
    with bars(quiet) as progress:
        built = run_build(open_bundle(folder), target, progress)
    if as_json:
        print_json(bundle_facts(built))
    else:
        print_bundle(built)
