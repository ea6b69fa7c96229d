"""registry → table: what each network is, read off the network itself without making its weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from medtl_dist.models import registry
from medtl_dist.models.freezing import count_parameters
from medtl_dist.models.spec import IMAGENET_MEAN, IMAGENET_STD


def overview(names: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """A row of plain values for each of ``names`` (None: all of torchvision's), in the order given.

    ``parameters`` counts the original network, its 1000-class head included; ``stages`` lists the modules of each, and
    model.frozen_depth counts them; ``patch_px`` is set where the network is built for one input size.

    Raises:
        UserError: an unknown name.
    """
    rows: list[dict[str, Any]] = []
    for name in names or registry.names():
        spec = registry.spec(name)
        with torch.device("meta"):
            parameters = count_parameters(spec.build_for(None)).total
        rows.append(
            {
                "name": name,
                "stages": [list(stage) for stage in spec.stages],
                "parameters": parameters,
                "image_size_px": spec.image_size_px,
                "patch_px": spec.patch_px,
                "feature_dim": spec.feature_dim,
                "mean": list(spec.mean),
                "std": list(spec.std),
            }
        )
    return rows


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows as a Markdown table, aligned for a terminal."""
    cells = [["name", "stages", "parameters (M)", "input (px)", "features", "normalisation"]]
    for row in rows:
        native = "ImageNet" if (tuple(row["mean"]), tuple(row["std"])) == (IMAGENET_MEAN, IMAGENET_STD) else _short(row)
        size = f"{row['image_size_px']}" + (f" ({row['patch_px']}·n)" if row["patch_px"] else "")
        millions = f"{row['parameters'] / 1e6:.1f}"
        cells.append([row["name"], str(len(row["stages"])), millions, size, str(row["feature_dim"]), native])
    widths = [max(len(line[column]) for line in cells) for column in range(len(cells[0]))]
    cells.insert(1, ["-" * width for width in widths])
    return "\n".join(
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |" for line in cells
    )


def _short(row: dict[str, Any]) -> str:
    mean, std = ("/".join(f"{value:g}" for value in dict.fromkeys(row[kind])) for kind in ("mean", "std"))
    return f"{mean}, {std}"
