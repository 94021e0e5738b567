"""Command ``wanx inspect``."""

from __future__ import annotations

from wanx.commands.options import BundlePath, Json, bundle_facts, print_json


def inspect(bundle: BundlePath, as_json: Json = False) -> None:
    """Show what a bundle holds."""
    import wanx
    from wanx.builtin.prompts import prompt_hint
    from wanx.commands.display.generation import print_bundle

    opened = wanx.inspect(bundle)
    if as_json:
        hint = prompt_hint(opened.manifest)
        facts = bundle_facts(opened) | ({} if hint is None else {"prompts": hint})
        print_json(facts | opened.manifest.model_dump(mode="json", by_alias=True))
    else:
        print_bundle(opened)
