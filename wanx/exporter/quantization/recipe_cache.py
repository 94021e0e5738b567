"""Cache of recipes, so that layers are not measured again on the same calibration."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import SafetensorError

from wanx.exporter.calibration.tensor_cache import load_tensors, save_tensors
from wanx.exporter.quantization.recipe import Recipe
from wanx.exporter.quantization.scheme import QuantizeOptions, Scheme


def save_recipe(recipe: Recipe, path: Path) -> None:
    """Write a recipe beside the calibration that it came from."""
    facts = {
        "layers": dict(recipe.layers),
        "kept": dict(recipe.unquantized_layers),
        "sqnr_db": dict(recipe.sqnr_db),
        "attention": dict(recipe.attention),
    }
    save_tensors(dict(recipe.smooth) or {"empty": torch.zeros(1)}, facts, path)


def load_recipe(path: Path, scheme: Scheme, options: QuantizeOptions) -> Recipe | None:
    """Read what :func:`save_recipe` wrote; None if it is missing or damaged."""
    try:
        smooth, facts = load_tensors(path)
        return Recipe(
            scheme=scheme,
            options=options,
            layers=facts["layers"],
            unquantized_layers=facts["kept"],
            sqnr_db=facts["sqnr_db"],
            smooth={name: value for name, value in smooth.items() if name != "empty"},
            attention={name: (q, k, v) for name, (q, k, v) in facts["attention"].items()},
        )
    except (SafetensorError, KeyError, ValueError, TypeError, AttributeError, OSError):
        return None
