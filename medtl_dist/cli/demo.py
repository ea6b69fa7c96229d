"""`medtl demo`: the whole path on made-up radiographs, or on the user's own images, in a few minutes on a laptop."""

from __future__ import annotations

import datetime
import time
from pathlib import Path
from typing import Annotated

import typer

from medtl_dist.cli.data import summary
from medtl_dist.cli.progress import one_bar
from medtl_dist.cli.train import run_train
from medtl_dist.config import load_config

_PATIENTS = 600
_IMAGE_SIZE_PX = 96


def demo(
    data: Annotated[
        Path | None,
        typer.Option("--data", metavar="FOLDER", help="Your own images (folder per class, table, .npz) instead."),
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", metavar="DIR", help="Where everything goes [default: runs/demo-TIME].")
    ] = None,
    workers: Annotated[int, typer.Option("--workers", metavar="N", help="Ray Train workers; 0: without Ray.")] = 2,
) -> None:
    """Pack, train ResNet101 on two Ray workers, evaluate and report, on made-up radiographs.

    Random initial weights and 48-pixel images: it shows that everything works, not what the method can do.

    Example: medtl demo
    """
    from medtl_dist.data.pack import PackOptions, pack
    from medtl_dist.data.sources import Columns
    from medtl_dist.demo_data import write_demo_images

    began = time.monotonic()
    place = (out or Path("runs") / f"demo-{datetime.datetime.now().astimezone():%Y%m%d-%H%M%S}").absolute()
    if data is None:
        typer.echo(f"drawing radiographs of {_PATIENTS} made-up patients in {place / 'images'}")
        place.mkdir(parents=True, exist_ok=True)
        source = write_demo_images(place / "images", num_patients=_PATIENTS, seed=0, image_size_px=_IMAGE_SIZE_PX)
        columns = Columns(group=("patient_id",), domain="domain", keep=("view",))
    else:
        source, columns = data, Columns()
    with one_bar("packing") as progress:
        dataset = pack(source, place / "shards", PackOptions(columns=columns, image_size_px=_IMAGE_SIZE_PX), progress)
    for line in summary(dataset):
        typer.echo(line)
    config = load_config(preset="demo", overrides=[f"cluster.num_workers={workers}"])
    # A path is set as it is: through an override it would be read as YAML, where " #" begins a comment.
    config = config.model_copy(update={"data": config.data.model_copy(update={"shards": str(place / "shards")})})
    typer.echo(f"training {config.model.backbone} on {workers} worker{'s' if workers != 1 else ''}")
    run_train(config, place / "run", resume=False, test="test" in dataset.splits)
    typer.echo(f"done in {time.monotonic() - began:.0f} s")
