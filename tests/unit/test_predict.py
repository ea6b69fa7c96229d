"""`medtl predict` as a library: raw files score as their packed selves to the bit, and every input once, whatever happens."""

from __future__ import annotations

import json
import os
import shutil
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cv2
import dicom_files
import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
from predict_runs import linkage, pack_table, train, write_images
from tiny_backbone import tiny_registered

from medtl_dist.data.dicom_source import DicomOptions
from medtl_dist.data.dicom_window import Rendering
from medtl_dist.data.inputs import InputOptions
from medtl_dist.data.pack import PackOptions, pack
from medtl_dist.data.sources import Columns
from medtl_dist.errors import DataError, UserError
from medtl_dist.metrics.scores import by_patient, probability
from medtl_dist.train.predict import Outcome, PredictOptions, predict
from medtl_dist.train.predictor import load_predictor


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """images/ of grey PNGs, set/ (JPEG, 72 px), run/; another run on the same set."""
    place = tmp_path_factory.mktemp("predict")
    with tiny_registered():
        shards = pack_table(write_images(place / "images"), place / "set")
        train(shards, place / "run")
        train(shards, place / "other", "train.seed=5")
        yield place


def _predict(place: Path, source: Path | str, out: Path, **options: Any) -> tuple[pd.DataFrame, Outcome]:
    given: dict[str, Any] = options.pop("inputs", {})
    inputs = InputOptions(**given)
    run = options.pop("run", place / "run")
    settings: Any = {"part_size": 16} | options
    outcome = predict(run, str(source), out, PredictOptions(inputs=inputs, **settings))
    return pq.read_table(out).to_pandas(), outcome


def _same_as_val(scores: pd.DataFrame, run: Path, shards: Path) -> int:
    """How many images of val have other logits than these, joined by file; all of val must be there."""
    val = pd.read_parquet(run / "predictions" / "val.parquet")
    known = val.merge(linkage(shards).rename(columns={"row": "place"})[["key", "file", "place"]], on="key")
    place = scores["row"].fillna(-1).astype(int) if "row" in scores else -1
    both = known.merge(scores.assign(place=place), on=["file", "place"], suffixes=("", "_raw"))
    assert len(both) == len(val) > 5
    names = [name for name in val if name.startswith("logit_")]
    return int((both[names].to_numpy() != both[[f"{name}_raw" for name in names]].to_numpy()).any(axis=1).sum())


def test_raw_files_of_a_table_score_as_their_packed_selves_to_the_bit(place: Path, tmp_path: Path) -> None:
    scores, outcome = _predict(place, place / "images" / "labels.csv", tmp_path / "scores.parquet")
    assert list(scores) == ["file", "row", "logit_NORMAL", "logit_SICK", "score_NORMAL", "score_SICK", "predicted"]
    assert (outcome.scored, outcome.bad, outcome.left_out, outcome.resumed) == (48, 0, 0, 0)
    assert _same_as_val(scores, place / "run", place / "set") == 0
    np.testing.assert_allclose(scores.score_SICK, 1 / (1 + np.exp(-scores.logit_SICK)), rtol=1e-12)
    fixed = json.loads((place / "run" / "results.json").read_text())["threshold"]["logit"]
    assert scores.predicted.tolist() == ["SICK" if one >= fixed else "NORMAL" for one in scores.logit_SICK]
    assert sorted(os.listdir(tmp_path)) == ["scores.parquet"]  # nothing else is left


def test_the_threshold_of_the_run_decides_what_is_predicted(place: Path, tmp_path: Path) -> None:
    """With a threshold in the midst of the scores, for how far one epoch gets differs between processors."""
    run = tmp_path / "run"
    shutil.copytree(place / "run", run)
    results = json.loads((run / "results.json").read_text())
    before, _ = _predict(place, place / "images", tmp_path / "before.parquet", run=run)
    results["threshold"]["logit"] = fixed = float(np.sort(before.logit_SICK)[24])
    (run / "results.json").write_text(json.dumps(results))
    scores, _ = _predict(place, place / "images", tmp_path / "after.parquet", run=run)
    assert scores.predicted.tolist() == ["SICK" if one >= fixed else "NORMAL" for one in scores.logit_SICK]
    assert scores.predicted.value_counts().to_dict() == {"SICK": 24, "NORMAL": 24}


def test_a_folder_one_image_and_the_packed_set_score_the_same(place: Path, tmp_path: Path) -> None:
    table, _ = _predict(place, place / "images" / "labels.csv", tmp_path / "table.parquet")
    folder, outcome = _predict(place, place / "images", tmp_path / "folder.parquet")
    assert folder.file.tolist() == table.file.tolist()
    assert (folder.logit_SICK == table.logit_SICK).all()
    assert outcome.notes == ("1 files that are no image were left alone",)  # the table
    one, _ = _predict(place, place / "images" / "pictures" / "007.png", tmp_path / "one.parquet")
    assert one.file.tolist() == ["007.png"]
    assert one.logit_SICK.item() == table.logit_SICK[7]
    packed, outcome = _predict(place, place / "set", tmp_path / "packed.parquet")
    assert list(packed)[:3] == ["split", "key", "group"]
    both = packed.merge(linkage(place / "set")[["key", "file"]], on="key").merge(table, on="file")
    assert len(both) == len(packed) == 48
    assert (both.logit_SICK_x == both.logit_SICK_y).all()
    val = pd.read_parquet(place / "run" / "predictions" / "val.parquet")
    mine = packed[packed.split == "val"]
    assert mine.key.tolist() == val.key.tolist()
    assert (mine.logit_SICK.to_numpy() == val.logit_SICK.to_numpy()).all()
    assert mine.group.tolist() == val.group.tolist()


@pytest.mark.parametrize(
    ("colour", "options", "overrides"),
    [
        (True, {"image_size_px": 72}, ["evaluate.views=mirror"]),
        (False, {"image_size_px": 48}, ["train.precision=bf16", "data.eval_view=center_crop", "train.channels_last=true"]),
        (True, {"image_size_px": None, "color": "grey"}, ["model.fold_frozen=true", "model.frozen_depth=2"]),
        (False, {"color": "rgb"}, ["data.normalisation=half", "evaluate.views=right_angles"]),
    ],
    ids=["rgb-jpeg-mirror", "png-bf16-crop", "native-grey-folded", "rgb-of-grey-eight-views"],
)  # fmt: skip
def test_whatever_the_preprocessing_raw_files_score_as_packed(
    place: Path, tmp_path: Path, colour: bool, options: dict[str, Any], overrides: list[str]
) -> None:
    table = write_images(tmp_path / "images", 32, colour=colour)
    shards = pack_table(table, tmp_path / "set", **options)
    run = train(shards, tmp_path / "run", *overrides)
    shutil.move(shards, tmp_path / "gone")  # only the checkpoint is asked
    scores, _ = _predict(place, table, tmp_path / "scores.parquet", run=run)
    shutil.move(tmp_path / "gone", shards)
    assert _same_as_val(scores, run, shards) == 0


def test_dicom_files_go_through_the_window_of_the_pack(place: Path, tmp_path: Path) -> None:
    tree = dicom_files.write_tree(tmp_path / "tree", 24)
    options = PackOptions(
        dicom=DicomOptions(label_tag="BodyPartExamined", rendering=Rendering("fixed", 100.0, 900.0)),
        columns=Columns(), num_workers=1, fractions=(0.5, 0.25, 0.25),
    )  # fmt: skip
    pack(tree, tmp_path / "set", options)
    run = train(tmp_path / "set", tmp_path / "run")
    (tree / "notes.txt").write_text("no image")
    dicom_files.write(tree / "burned", dicom_files.ramp(3), bits=12, BurnedInAnnotation="YES")
    (tree / "cut").write_bytes((tree / "study0" / "series" / "IM0000").read_bytes()[:700])
    scores, outcome = _predict(place, tree, tmp_path / "scores.parquet", run=run, inputs={"group": "PatientID"})
    assert _same_as_val(scores, run, tmp_path / "set") == 0
    assert (outcome.scored, outcome.bad, outcome.left_out) == (24, 1, 1)
    assert outcome.errors is not None
    told = pd.read_parquet(tmp_path / "scores.errors.parquet")
    assert dict(zip(told.file, told.status, strict=True)) == {"burned": "left out", "cut": "bad"}
    assert outcome.patients is not None
    assert pd.read_parquet(outcome.patients).group.tolist() == sorted(f"P{n}" for n in range(12))
    allowed, _ = _predict(place, tree, tmp_path / "all.parquet", run=run, inputs={"allow": ("burned-in",)})
    assert len(allowed) == 25


def test_dicom_for_a_run_of_image_files_needs_a_window(place: Path, tmp_path: Path) -> None:
    tree = dicom_files.write_tree(tmp_path / "tree", 4)
    with pytest.raises(UserError, match="says nothing of how DICOM becomes pixels: say it with --window"):
        _predict(place, tree, tmp_path / "scores.parquet")
    scores, outcome = _predict(place, tree, tmp_path / "scores.parquet", window="percentile")
    assert len(scores) == 4
    assert "nobody knows" in outcome.notes[-1]
    with pytest.raises(UserError, match="--window tags: the input is a folder; leave it out"):
        _predict(place, place / "images", tmp_path / "other.parquet", window="tags")


def test_a_medmnist_archive_needs_no_labels(place: Path, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (21, 28, 28), dtype=np.uint8)
    np.savez(tmp_path / "some.npz", test_images=images, train_images=images[:5])
    scores, outcome = _predict(place, tmp_path / "some.npz", tmp_path / "scores.parquet")
    assert scores.file.tolist() == ["train_images.npy"] * 5 + ["test_images.npy"] * 21
    assert scores["row"].tolist() == [*range(5), *range(21)]
    assert (scores.logit_SICK[:5].to_numpy() == scores.logit_SICK[5:10].to_numpy()).all()  # the same pixels
    assert scores.logit_SICK.nunique() == 21
    assert outcome.bad == 0


def test_hostile_files_are_listed_and_the_others_scored(place: Path, tmp_path: Path) -> None:
    inputs = tmp_path / "inputs"
    shutil.copytree(place / "images" / "pictures", inputs / "ünïcode 患者")
    good = next(inputs.rglob("000.png")).read_bytes()
    bomb = bytearray(good)
    bomb[16:24] = (60_000).to_bytes(4, "big") * 2
    bomb[29:33] = zlib.crc32(bomb[12:29]).to_bytes(4, "big")
    hostile = {"bomb.png": bytes(bomb), "cut.png": good[: len(good) // 2], "text.jpg": b"no image", "empty.png": b""}
    for name, data in hostile.items():
        (inputs / name).write_bytes(data)
    (inputs / "right.jpg").write_bytes(good)  # a PNG all the same
    (inputs / "gone.png").symlink_to(tmp_path / "nowhere")
    latin = os.fsencode(inputs) + b"/caf\xe9.png"
    Path(os.fsdecode(latin)).write_bytes(good)
    scores, outcome = _predict(place, inputs, tmp_path / "scores.parquet")
    assert outcome.errors == tmp_path / "scores.errors.parquet"
    told = pd.read_parquet(tmp_path / "scores.errors.parquet")
    assert dict(zip(told.file, told.reason, strict=True)) == {
        "bomb.png": "more than 100 Mpx", "cut.png": "unreadable image", "empty.png": "unreadable image",
        "gone.png": "missing file", "text.jpg": "unreadable image",
    }  # fmt: skip
    assert outcome.reasons == {"missing file": 1, "more than 100 Mpx": 1, "unreadable image": 3}
    assert (outcome.scored, outcome.bad) == (50, 5)
    assert scores.file.is_unique
    assert {"ünïcode 患者/000.png", "right.jpg", "caf\\xe9.png"} <= set(scores.file)
    alike = scores.set_index("file").logit_SICK[["ünïcode 患者/000.png", "right.jpg", "caf\\xe9.png"]]
    assert alike.nunique() == 1


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads whatever the permissions say")
def test_a_file_that_may_not_be_read_is_listed(place: Path, tmp_path: Path) -> None:
    (tmp_path / "inputs").mkdir()
    for name in ("a.png", "b.png"):
        shutil.copy(place / "images" / "pictures" / "000.png", tmp_path / "inputs" / name)
    (tmp_path / "inputs" / "b.png").chmod(0)
    _, outcome = _predict(place, tmp_path / "inputs", tmp_path / "scores.parquet")
    assert outcome.reasons == {"file cannot be opened": 1}


def test_a_damaged_image_of_a_set_is_listed_by_key(place: Path, tmp_path: Path) -> None:
    shutil.copytree(place / "set", tmp_path / "set")
    index = pq.read_table(tmp_path / "set" / "index.parquet").to_pandas()
    row = index.iloc[9]
    with (tmp_path / "set" / row.shard).open("r+b") as tar:
        tar.seek(row.offset + row["size"] // 2)
        tar.write(b"\x00\xff\x00\xff")
    scores, outcome = _predict(place, tmp_path / "set", tmp_path / "scores.parquet")
    assert outcome.errors is not None
    told = pd.read_parquet(tmp_path / "scores.errors.parquet")
    assert told.key.tolist() == [row.key.hex()]
    assert "differ from the checksum" in told.reason[0]
    assert len(scores) == 47
    assert row.key.hex() not in set(scores.key)


def test_patients_get_the_mean_or_the_largest_of_their_images(place: Path, tmp_path: Path) -> None:
    table = pd.read_csv(place / "images" / "labels.csv")
    for run, aggregate in ((place / "run", "mean"), (_with(place, tmp_path, "aggregate: max"), "max")):
        scores, outcome = _predict(
            place,
            place / "images" / "labels.csv",
            tmp_path / f"{aggregate}.parquet",
            run=run,
            inputs={"group": "patient"},
        )
        assert scores.group.tolist() == table.patient.tolist()
        assert outcome.patients == tmp_path / f"{aggregate}.patients.parquet"
        told = pd.read_parquet(tmp_path / f"{aggregate}.patients.parquet")
        logits = scores[["logit_NORMAL", "logit_SICK"]].to_numpy()
        expected = by_patient(np.zeros(len(logits)), logits, scores.group.to_numpy(), aggregate=aggregate)
        assert told.group.tolist() == expected.groups.tolist()
        assert told.num_images.tolist() == [2] * 24
        np.testing.assert_allclose(told[["logit_NORMAL", "logit_SICK"]], expected.logits, rtol=1e-14)
        np.testing.assert_allclose(told.score_SICK, probability(expected.logits[:, 1]), rtol=1e-14)
        assert "predicted" not in told  # the threshold is of images


def test_a_threshold_of_patients_is_applied_to_patients_alone(place: Path, tmp_path: Path) -> None:
    run = _with(place, tmp_path, "unit: patient")
    scores, outcome = _predict(
        place, place / "images" / "labels.csv", tmp_path / "scores.parquet", run=run, inputs={"group": "patient"}
    )
    assert "predicted" not in scores
    assert outcome.patients is not None
    told = pd.read_parquet(outcome.patients)
    fixed = json.loads((run / "results.json").read_text())["threshold"]["logit"]
    assert told.predicted.tolist() == ["SICK" if one >= fixed else "NORMAL" for one in told.logit_SICK]
    assert any("fixed for patients" in note for note in outcome.notes)


def _with(place: Path, folder: Path, setting: str) -> Path:
    """A copy of the run with another value in the section evaluate of its config."""
    run = folder / setting.replace(": ", "-")
    shutil.copytree(place / "run", run)
    key = setting.partition(":")[0]
    lines = (run / "config.yaml").read_text().splitlines()
    assert sum(line.startswith(f"  {key}:") for line in lines) == 1
    (run / "config.yaml").write_text(
        "\n".join(f"  {setting}" if line.startswith(f"  {key}:") else line for line in lines)
    )
    return run


def test_an_ensemble_is_the_mean_of_its_members_logits(place: Path, tmp_path: Path) -> None:
    folder = tmp_path / "cv"
    for number, name in enumerate(("run", "other")):
        shutil.copytree(place / name, folder / "folds" / str(number))
    (folder / "ensemble.json").write_text(json.dumps({"members": ["folds/0", "folds/1"]}))
    source = place / "images"
    mean, outcome = _predict(place, source, tmp_path / "mean.parquet", run=folder)
    each = [_predict(place, source, tmp_path / f"{name}.parquet", run=place / name)[0] for name in ("run", "other")]
    assert not np.allclose(each[0].logit_SICK, each[1].logit_SICK)
    np.testing.assert_array_equal(mean.logit_SICK, np.mean([one.logit_SICK for one in each], axis=0))
    assert "predicted" not in mean  # no threshold was fixed for it
    assert "mean of the logits of 2 models" in outcome.notes[0]
    for members, words in (
        (["../x"], "outside its own"),
        (["folds/0"] * 2, "a member twice"),
        ([], "names no members"),
    ):
        (folder / "ensemble.json").write_text(json.dumps({"members": members}))
        with pytest.raises((UserError, DataError), match=words):
            _predict(place, source, tmp_path / "bad.parquet", run=folder)


class _Stop(Exception):
    pass


def test_interrupted_and_called_again_it_goes_on_and_scores_each_input_once(place: Path, tmp_path: Path) -> None:
    source, out = place / "images" / "labels.csv", tmp_path / "scores.parquet"
    _predict(place, source, tmp_path / "whole.parquet")
    options = PredictOptions(part_size=16)

    def stop(stage: str, done: int, total: int) -> None:
        assert (stage, total) == ("scoring", 48)
        if done == 32:
            raise _Stop

    with pytest.raises(_Stop):
        predict(place / "run", str(source), out, options, progress=stop)
    parts = sorted((tmp_path / "scores.parquet.parts").glob("part-*"))
    assert [part.name for part in parts] == ["part-00000.parquet", "part-00001.parquet"]
    assert not out.exists()
    scored: list[int] = []
    outcome = predict(place / "run", str(source), out, options, progress=lambda _, done, total: scored.append(done))
    assert (outcome.resumed, outcome.scored) == (2, 48)
    assert scored == [48]  # one part alone was made
    assert out.read_bytes() == (tmp_path / "whole.parquet").read_bytes()
    again = predict(place / "run", str(source), out, options, progress=lambda *_: pytest.fail("nothing is left to do"))
    assert (again.resumed, again.scored) == (3, 48)
    assert not (tmp_path / "scores.parquet.parts").exists()


def test_an_output_of_another_run_input_or_partition_is_refused(place: Path, tmp_path: Path) -> None:
    shutil.copytree(place / "images", tmp_path / "images")
    source, out = tmp_path / "images" / "labels.csv", tmp_path / "scores.parquet"
    _predict(place, source, out)
    before = out.read_bytes()
    for options, words in (
        ({"run": place / "other"}, "another run or checkpoint"),
        ({"part_size": 24}, "another part size"),
        ({"inputs": {"group": "patient"}}, "another group"),
    ):
        with pytest.raises(UserError, match=words):
            _predict(place, source, out, **options)
    with pytest.raises(UserError, match="begun with another input"):
        _predict(place, place / "images", out)
    shutil.copytree(tmp_path / "images", tmp_path / "twin")
    with pytest.raises(UserError, match="begun with another input; delete"):  # the same names and lengths elsewhere
        _predict(place, tmp_path / "twin" / "labels.csv", out)
    shutil.copy(place / "images" / "pictures" / "001.png", tmp_path / "images" / "pictures" / "000.png")
    with pytest.raises(UserError, match="begun with an input that has changed since; delete it to start again"):
        _predict(place, source, out)
    assert out.read_bytes() == before
    (tmp_path / "foreign.parquet").write_bytes((place / "set" / "index.parquet").read_bytes())
    with pytest.raises(UserError, match="not of `medtl predict`"):
        _predict(place, place / "images", tmp_path / "foreign.parquet")


def test_parts_begun_by_another_run_are_refused(place: Path, tmp_path: Path) -> None:
    def stop(stage: str, done: int, total: int) -> None:
        raise _Stop

    options, source, out = PredictOptions(part_size=16), str(place / "images"), tmp_path / "scores.parquet"
    with pytest.raises(_Stop):
        predict(place / "run", source, out, options, progress=stop)
    with pytest.raises(UserError, match="begun with another run or checkpoint"):
        predict(place / "other", source, out, options)
    assert predict(place / "run", source, out, options).resumed == 1


def test_what_cannot_be_an_output_or_an_input(place: Path, tmp_path: Path) -> None:
    for out, words in (
        (Path("s3://bucket/x.parquet"), "lies in a folder; copy it to a store after"),
        (tmp_path / "x.csv", "name it FILE.parquet"),
        (tmp_path / "no" / "x.parquet", "make it first"),
    ):
        with pytest.raises(UserError, match=words):
            _predict(place, place / "images", out)
    (tmp_path / "empty").mkdir()
    for source, options, words in (
        (tmp_path / "empty", {}, "holds no image to score"),
        (tmp_path / "nothing.png", {}, "no such file or folder"),
        (place / "images", {"inputs": {"group": "patient"}}, "a folder names no patients in columns"),
        (place / "images", {"inputs": {"image_column": "file"}}, "are for a table"),
        (place / "images", {"inputs": {"allow": ("burned-in",)}}, "is for DICOM trees"),
        (place / "images", {"inputs": {"kind": "xray"}}, "--format xray: one of auto, folder"),
        (place / "images", {"run": place / "images"}, "is not a run folder"),
    ):
        with pytest.raises(UserError, match=words):
            _predict(place, source, tmp_path / "x.parquet", **options)


def test_only_one_process_writes_an_output(place: Path, tmp_path: Path) -> None:
    def second(stage: str, done: int, total: int) -> None:
        with pytest.raises(UserError, match="another process is writing it"):
            predict(place / "other", str(place / "images"), tmp_path / "scores.parquet")
        raise _Stop

    with pytest.raises(_Stop):
        predict(place / "run", str(place / "images"), tmp_path / "scores.parquet", progress=second)


def test_a_run_that_has_not_finished_or_whose_checkpoint_was_changed_is_refused(place: Path, tmp_path: Path) -> None:
    import torch

    shutil.copytree(place / "run", tmp_path / "run")
    weights = next((tmp_path / "run" / "checkpoints").glob("*/model.safetensors"))
    data = bytearray(weights.read_bytes())
    data[-3] ^= 1
    weights.write_bytes(bytes(data))
    with pytest.raises(DataError, match=r"model\.safetensors"):
        load_predictor(tmp_path / "run", torch.device("cpu"))
    (tmp_path / "run" / "results.json").unlink()
    with pytest.raises(UserError, match="has not finished"):
        load_predictor(tmp_path / "run", torch.device("cpu"))


def test_memory_holds_a_part_and_not_the_inputs(place: Path, tmp_path: Path) -> None:
    """Pixels of a part are let go as soon as they are scored: the listing yields, and nothing is kept of earlier parts."""
    from medtl_dist.train import predict as module

    sizes: list[int] = []
    table = module.part_table

    def watched(predictor: Any, inputs: Any, seen: Any, logits: Any) -> Any:
        sizes.append(sum(sys.getsizeof(one.image) for one in seen if isinstance(one.image, np.ndarray)))
        return table(predictor, inputs, seen, logits)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "part_table", watched)
        _predict(place, place / "images", tmp_path / "scores.parquet")
    assert sizes == [0, 0, 0]


def test_the_pictures_are_what_the_tests_think(place: Path) -> None:
    assert np.asarray(cv2.imread(str(place / "images" / "pictures" / "000.png"), cv2.IMREAD_UNCHANGED)).ndim == 2
    index = pq.read_table(place / "set" / "index.parquet").to_pandas()
    assert set(index.channels) == {1}
    info = json.loads((place / "set" / "dataset.json").read_text())
    assert info["preprocessing"]["encoding"] == "jpeg95"  # lossy, so that equal scores mean the same encoding
