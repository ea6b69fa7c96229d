"""crossval.json → crossval.html: one self-contained page, made from the folder alone and the same bytes each time."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from markupsafe import Markup

from medtl_dist.errors import DataError, UserError
from medtl_dist.report import charts
from medtl_dist.report.crossval_figures import class_table, fold_figure, fold_table, roc_figures
from medtl_dist.report.page import render_page, write_page
from medtl_dist.report.record import clean
from medtl_dist.report.svg import Told
from medtl_dist.report.wording import decimals, interval, level, millions, moment, plural, typeset
from medtl_dist.storage import Folder
from medtl_dist.store_folder import StoreFolder, fetched

PAGE = "crossval.html"
RECORD = "crossval.json"
SCHEMA_VERSION = 1


def build_crossval_page(folder: Path) -> Path:
    """Writes ``crossval.html`` into the folder of a cross-validation, all of it or nothing, and returns its path.

    Raises:
        UserError: the folder holds no finished cross-validation, or can't be written.
        DataError: crossval.json or config.yaml is damaged, or of a schema version that isn't known.
    """
    folder = Path(folder)
    found = read_crossval(folder)
    try:
        config = clean((folder / "config.yaml").read_text(encoding="utf-8"))
        page = render(found, config)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, OSError) as error:
        raise DataError(
            f"{folder / RECORD} or config.yaml beside it is damaged ({type(error).__name__}): restore it, or run "
            "`medtl crossval --resume` to write it again"
        ) from None
    return write_page(folder / PAGE, page)


def build_crossval_page_in(folder: Folder) -> str:
    """As ``build_crossval_page``, wherever the folder lies; returns the page's path or address."""
    if not isinstance(folder, StoreFolder):
        return str(build_crossval_page(folder.local_path))
    folder.expect_run()
    with fetched(folder, ("config.yaml", RECORD)) as here:
        page = build_crossval_page(here).read_bytes()
    if not folder.exists(PAGE) or folder.read(PAGE) != page:  # of a finished one it lies there untouched
        folder.write(PAGE, page)
    return folder.shown(PAGE)


def read_crossval(folder: Path) -> dict[str, Any]:
    """The content of crossval.json. Raises: as ``build_crossval_page``."""
    file = folder / RECORD
    try:
        found = clean(json.loads(file.read_bytes()))
        version = found["schema_version"]
    except FileNotFoundError:
        raise UserError(
            f"{folder} has no {RECORD}: the cross-validation has not finished; go on with --resume"
        ) from None
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        raise DataError(f"{file} is damaged: restore it, or run `medtl crossval --resume` to write it again") from None
    if version != SCHEMA_VERSION:
        raise DataError(f"{file} has schema version {version!r}; this medtl reads version {SCHEMA_VERSION}")
    return found


def render(found: Mapping[str, Any], config_yaml: str) -> str:
    """The page, a pure function."""
    bounds = tuple(found["auc_ci"]) if found["auc_ci"] else None
    return render_page(
        "crossval.html",
        run=found["run"],
        lead=_lead(found),
        auc=decimals(found["auc"], missing="undefined"),
        auc_label="AUC, pairs within folds"
        if found["task"] == "binary"
        else "AUC, pairs within folds, mean over classes",
        auc_interval=interval(bounds),
        confidence=level(found["ci_level"]),
        scale=_scale(found, bounds),
        sentence=_sentence(found, bounds),
        counts=_counts(found),
        method=typeset(found["ci_method"]),
        cautions=[*([f"The interval is {found['ci_warning']}."] if found["ci_warning"] else []), *found["cautions"]],
        leaves_out=found["leaves_out"],
        fold_figure=fold_figure(found),
        rocs=roc_figures(found),
        folds=fold_table(found),
        classes=class_table(found) if found["task"] != "binary" else None,
        facts=list(_facts(found)),
        config_yaml=config_yaml,
    )


def _lead(found: Mapping[str, Any]) -> str:
    classes = found["classes"]
    what = f"{classes[1]} against {classes[0]}" if found["task"] == "binary" else plural(len(classes), "class")
    return (
        f"{what} · data set {found['data']['name']} · {found['model']['backbone']} · {found['folds']} folds × "
        f"{plural(found['repeats'], 'repeat')} · {moment(found['provenance']['finished'])}"
    )


def _scale(found: Mapping[str, Any], bounds: tuple[float, float] | None) -> Markup | None:
    if found["auc"] is None:
        return None
    low = 0.5 if min(found["auc"], *(bounds or (1.0,))) >= 0.5 else 0.0
    words = f"AUC {decimals(found['auc'])}" + (f", interval {interval(bounds)}" if bounds else "")
    return charts.interval_chart(Told("scale", "AUC on a scale", words), found["auc"], bounds, low)


def _sentence(found: Mapping[str, Any], bounds: tuple[float, float] | None) -> str:
    if found["auc"] is None:
        return f"The AUC is undefined: {found['auc_undefined'].removeprefix('undefined: ')}."
    unit = found["unit"]
    spread = f" ({level(found['ci_level'])} interval: {bounds[0] * 100:.0f} to {bounds[1] * 100:.0f})" if bounds else ""
    if found["task"] == "binary":
        one, other = f"one {unit} with {found['classes'][1]}", "one without"
    else:
        one, other = f"for each class in turn, one {unit} with it", "one without"
    return (
        f"In 100 pairs of {one} and {other}, both from a fold that the model had not seen, the model gives the higher score to "
        f"the one with it in about {found['auc'] * 100:.0f}{spread}. Guessing gives 50 of 100. Scores of two folds are never "
        "compared: they are of two models."
    )


def _counts(found: Mapping[str, Any]) -> str:
    patients = f" of {plural(found['n_groups'], 'patient')}" if found["n_groups"] is not None else ""
    return (
        f"{plural(found['n'], found['unit'])}{patients} outside the test split, each held out once"
        f"{' in each repeat' if found['repeats'] > 1 else ''}. The test split was not opened."
    )


def _facts(found: Mapping[str, Any]) -> list[tuple[str, str]]:
    model, per_repeat = found["model"], [auc for auc in found["per_repeat"] if auc is not None]
    epochs = {
        "fixed": "fixed beforehand: the last epoch's model is scored",
        "inner": "the best epoch on an inner validation part of other patients",
    }
    rows = [
        ("Folds", f"{found['folds']}, dealt by {'patient' if found['n_groups'] is not None else 'image'} and class"),
        ("Repeats", f"{found['repeats']}, each with other folds and another training seed"),
        ("Epochs", epochs[found["epochs_from"]]),
        ("Network", f"{model['backbone']}, {millions(model['parameters'])} parameters, weights: {model['weights']}"),
        ("Data set", f"{found['data']['name']}, SHA-256 {found['data']['sha256']}"),
        ("medtl", f"{found['provenance']['versions']['medtl_dist']}"),
    ]
    if len(per_repeat) > 1:
        rows.insert(2, ("AUC of each repeat", ", ".join(decimals(auc) for auc in per_repeat)))
    return rows
