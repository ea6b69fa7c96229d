"""The audit of whole sets, its command, and the set that --fix writes."""

from __future__ import annotations

import copy
import dataclasses
import json
from itertools import combinations
from pathlib import Path

import cv2
import numpy as np
import pyarrow.parquet as pq
import pytest
from audit_sets import Entry, base, pack_entries, texture, write_entries
from shard_sets import write_set
from typer.testing import CliRunner

from medtl_dist.cli import main as cli
from medtl_dist.data.audit import Audit, audit, record, refuse_leaks
from medtl_dist.data.audit_accept import read_accepted
from medtl_dist.data.audit_fix import fix, plan_fix
from medtl_dist.data.findings import Finding, Match
from medtl_dist.data.fingerprint import NUM_VARIANTS
from medtl_dist.data.pack import PackOptions, pack
from medtl_dist.data.shards import Dataset, open_dataset, read_split
from medtl_dist.data.sources import Columns
from medtl_dist.errors import DataError, LeakageError, UserError

# Copies of images of train (even numbers), under other patients; 7 and 11 are in val.
COPY = cv2.imdecode(cv2.imencode(".jpg", texture(4)[3:92, 2:94], [cv2.IMWRITE_JPEG_QUALITY, 70])[1], 0)
LEAKING = [
    *base(),
    Entry(texture(0), "Doe-same", "test", "normal"),
    Entry(np.asarray(COPY), "Doe-near", "test", "sick"),
    Entry(255 - texture(8), "Doe-negative", "val", "sick"),
    Entry(texture(12), "Doe-within", "train", "sick"),
]


@pytest.fixture(scope="module")
def leaking(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return pack_entries(tmp_path_factory.mktemp("leaking"), LEAKING)


@pytest.fixture(scope="module")
def found(leaking: Dataset) -> Audit:
    return audit(leaking, num_workers=1)


def finding(audited: Audit, kind: str) -> Finding | None:
    return next((entry for entry in audited.findings if entry.kind == kind), None)


def patients(dataset: Dataset) -> dict[str, str]:
    """Key to patient, from the private linkage."""
    table = pq.read_table(Path(f"{dataset.folder}.private") / "linkage.parquet")
    return dict(zip(table.column("key").to_pylist(), table.column("group_name").to_pylist(), strict=True))


def run(*arguments: object) -> tuple[int, str, str]:
    """The command's exit code, output and errors, errors turned into messages as on the command line."""
    result = CliRunner().invoke(cli.app, [str(argument) for argument in arguments])
    if isinstance(result.exception, (UserError, DataError, LeakageError)):
        return result.exception.exit_code, result.output, result.exception.message
    return result.exit_code, result.output, ""


def test_leaks_across_splits_are_found_and_told_by_key(leaking: Dataset, found: Audit) -> None:
    leak = finding(found, "duplicates_across_splits")
    assert leak is not None
    names = patients(leaking)
    pairs = {frozenset(names[key] for key in item["keys"]): item for item in leak.items}
    assert set(pairs) == {
        frozenset(("Doe-0", "Doe-same")), frozenset(("Doe-4", "Doe-near")), frozenset(("Doe-8", "Doe-negative")),
    }  # fmt: skip
    assert pairs[frozenset(("Doe-0", "Doe-same"))]["how"] == "identical pixels"
    assert pairs[frozenset(("Doe-4", "Doe-near"))]["how"] == "as it is"
    assert pairs[frozenset(("Doe-8", "Doe-negative"))]["how"] == "negative"
    assert all(item["splits"][0] != item["splits"][1] and not item["same_group"] for item in leak.items)
    assert found.leaks == 3
    with pytest.raises(LeakageError, match=r"3 pairs of images .* --fix NEWDEST; .* --accept FILE") as caught:
        refuse_leaks(leaking, found.summary)
    assert "Doe" not in caught.value.message + json.dumps(found.summary)


def test_duplicates_within_a_split_and_other_labels_are_warnings(leaking: Dataset, found: Audit) -> None:
    names = patients(leaking)
    within, labels = finding(found, "duplicates_of_other_groups"), finding(found, "duplicates_with_other_labels")
    assert within is not None
    assert labels is not None
    assert {names[key] for key in within.items[0]["keys"]} == {"Doe-12", "Doe-within"}
    assert (within.level, within.count) == ("warning", 1)
    assert [{names[key] for key in item["keys"]} for item in labels.items] == [{"Doe-8", "Doe-negative"}]


def test_pack_records_the_audit_and_the_command_ends_with_4(leaking: Dataset, found: Audit, tmp_path: Path) -> None:
    recorded = leaking.info["audit"]
    assert recorded == json.loads(json.dumps(found.summary))
    assert (recorded["images"], recorded["leaks"]) == (84, 3)
    assert (recorded["identical_sets"], recorded["identical_images"], recorded["near_pairs"]) == (2, 4, 2)
    source = Path(leaking.folder).parent / "set-source/labels.csv"
    code, out, message = run(
        "data", "pack", source, "--out", tmp_path / "set", "--group-col", "patient", "--split-col", "split",
        "--workers", 1,
    )  # fmt: skip
    assert code == 4
    assert f"{tmp_path}/set: 3 pairs of images" in message
    assert "84 images" in out
    assert open_dataset(tmp_path / "set").info["audit"]["leaks"] == 3


def test_the_same_set_gives_the_same_bytes_with_any_number_of_processes(leaking: Dataset, tmp_path: Path) -> None:
    again = pack_entries(tmp_path, LEAKING, workers=2)
    first = (Path(leaking.folder) / "dataset.json").read_bytes()
    assert (Path(again.folder) / "dataset.json").read_bytes() == first


def test_different_images_are_no_finding(tmp_path: Path) -> None:
    dataset = pack_entries(tmp_path, base())
    recorded = dataset.info["audit"]
    assert (recorded["leaks"], recorded["near_pairs"], recorded["identical_sets"]) == (0, 0, 0)
    code, out, _ = run("data", "audit", dataset.folder, "--workers", 1)
    assert code == 0
    assert "no leakage between splits was found" in out
    code, _, message = run("data", "audit", dataset.folder, "--fix", tmp_path / "new", "--workers", 1)
    assert code == 2
    assert "nothing to mend" in message
    assert not (tmp_path / "new").exists()


def test_the_command_lists_pairs_and_prints_json(leaking: Dataset, found: Audit) -> None:
    code, out, message = run("data", "audit", leaking.folder, "--workers", 1)
    assert code == 4
    assert "leakage: 3 pairs of images show the same picture in two splits" in out
    leak = finding(found, "duplicates_across_splits")
    assert leak is not None
    assert all(f"  {' '.join(item['keys'])}  " in out for item in leak.items)
    assert "Doe" not in out + message
    code, out, _ = run("data", "audit", leaking.folder, "--workers", 1, "--json")
    facts = json.loads(out)
    assert code == 4
    assert facts["sha256"] == leaking.sha256
    assert facts["findings"] == leaking.info["audit"]["findings"]


def test_fix_joins_moves_and_leaves_the_old_set_alone(leaking: Dataset, found: Audit, tmp_path: Path) -> None:
    before = {path.name: path.read_bytes() for path in Path(leaking.folder).iterdir()}
    mended, again = fix(found, tmp_path / "new", num_workers=1)
    assert {path.name: path.read_bytes() for path in Path(leaking.folder).iterdir()} == before
    assert again.leaks == 0
    assert mended.info["audit"] == json.loads(json.dumps(again.summary))
    assert mended.info["fix"]["joined_groups"] == 8
    assert mended.info["fix"]["into_groups"] == 4
    assert mended.info["fix"]["from_dataset_sha256"] == leaking.sha256
    assert mended.info["fix"]["moved"] == [
        {"from": "train", "to": "test", "samples": 2}, {"from": "train", "to": "val", "samples": 1},
    ]  # fmt: skip
    names = patients(mended)
    old, new = (
        {row["key"]: row for split in d.splits for row in read_split(d, split).to_pylist()} for d in (leaking, mended)
    )
    assert old.keys() == new.keys()
    place = {names[key.hex()]: (row["split"], row["group"]) for key, row in new.items()}
    assert place["Doe-0"] == place["Doe-same"] == ("test", place["Doe-0"][1])
    assert place["Doe-8"] == place["Doe-negative"] == ("val", place["Doe-8"][1])
    assert place["Doe-12"] == place["Doe-within"] == ("train", place["Doe-12"][1])
    touched = {"Doe-0", "Doe-same", "Doe-4", "Doe-near", "Doe-8", "Doe-negative", "Doe-12", "Doe-within"}
    for key, row in new.items():
        for column in ("sha256", "label", "age", "width", "height", "channels", "domain"):
            assert row[column] == old[key][column]
        if names[key.hex()] not in touched:
            assert (row["split"], row["group"]) == (old[key]["split"], old[key]["group"])
    counts = {split: entry["samples"] for split, entry in mended.info["splits"].items()}
    assert counts == {"train": 38, "val": 22, "test": 24}
    assert sum(sum(entry["classes"].values()) for entry in mended.info["splits"].values()) == 84
    linkage = pq.read_table(tmp_path / "new.private/linkage.parquet").to_pylist()
    assert {row["key"]: (row["split"], row["group"], row["status"]) for row in linkage} == {
        key.hex(): (row["split"], row["group"], "packed") for key, row in new.items()
    }
    assert oct((tmp_path / "new.private").stat().st_mode)[-3:] == "700"


def test_fix_joins_what_is_confirmed_and_no_candidate(found: Audit) -> None:
    confirmed = {group for match in found.matches if match.level == "confirmed" for group in match[:2]}
    strangers = [image for image in range(len(found.seen)) if image not in confirmed][:2]
    candidate = Match(strangers[0], strangers[1], "candidate", 0.7, "as it is")
    assert plan_fix(found.seen, [*found.matches, candidate], {}) == plan_fix(found.seen, found.matches, {})
    joined = plan_fix(found.seen, [*found.matches, candidate._replace(level="confirmed")], {})
    assert joined.changes["joined_groups"] == 10


def test_fix_says_of_the_new_counts_what_packing_would(found: Audit, tmp_path: Path) -> None:
    """Cautions that the moves have settled, or made, are told anew; the others stay."""
    info = copy.deepcopy(found.seen.dataset.info)
    info["splits"]["val"]["classes"]["sick"] = 0  # as if val had none before the moves
    info["cautions"] = ["there is no dark room", "split val has no image of class 'sick'"]
    seen = dataclasses.replace(found.seen, dataset=dataclasses.replace(found.seen.dataset, info=info))
    mended, _ = fix(dataclasses.replace(found, seen=seen), tmp_path / "new", num_workers=1)
    assert mended.info["cautions"] == ["there is no dark room"]


def test_fix_is_deterministic_and_an_untouched_set_of_images_keeps_its_bytes(found: Audit, tmp_path: Path) -> None:
    first, _ = fix(found, tmp_path / "a", num_workers=1)
    second, _ = fix(found, tmp_path / "b", num_workers=1)
    for path in Path(first.folder).iterdir():
        assert path.read_bytes() == (Path(second.folder) / path.name).read_bytes(), path.name


def test_fix_by_command(leaking: Dataset, tmp_path: Path) -> None:
    code, out, _ = run("data", "audit", leaking.folder, "--fix", tmp_path / "new", "--workers", 1)
    assert code == 0
    assert "8 groups joined into 4; images moved: 2 from train to test, 1 from train to val" in out
    assert out.count("no leakage between splits was found") == 1
    assert run("data", "audit", tmp_path / "new", "--workers", 1)[0] == 0


def test_accepted_pairs_do_not_fail_and_are_recorded(found: Audit, tmp_path: Path) -> None:
    dataset = pack_entries(tmp_path, LEAKING)
    leak = finding(found, "duplicates_across_splits")
    assert leak is not None
    file = tmp_path / "accepted.yaml"
    file.write_text("".join(f"- keys: [{', '.join(item['keys'])}]\n  reason: a twin\n" for item in leak.items))
    code, out, _ = run("data", "audit", dataset.folder, "--accept", file, "--workers", 1)
    assert code == 0
    assert out.count("accepted: a twin") == 3
    recorded = open_dataset(dataset.folder).info["audit"]
    assert recorded["leaks"] == 0
    [accepted] = [entry for entry in recorded["findings"] if entry["kind"] == "accepted_duplicates"]
    assert [item["reason"] for item in accepted["items"]] == ["a twin"] * 3
    table = tmp_path / "accepted.csv"
    a, b = leak.items[0]["keys"]
    table.write_text(f"key_a,key_b,reason\n{b},{a},a twin\n")
    assert read_accepted(table, dataset) == {frozenset((a, b)): "a twin"}
    code, _, message = run("data", "audit", dataset.folder, "--accept", table, "--workers", 1)
    assert code == 4
    assert "2 pairs of images" in message


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- keys: [{0}, {1}]\n", "entry 1: no reason"),
        ("- keys: [{0}, {1}]\n  reason: ' '\n", "entry 1: no reason"),
        ("- keys: [{0}, {0}]\n  reason: x\n", "two different keys"),
        ("- keys: [{0}]\n  reason: x\n", "two different keys"),
        ("- keys: [{0}, 12345678901234567890123456789012]\n  reason: x\n", "no image 12345678901234567890123456789012"),
        ("- keys: [{0}, {1}]\n  why: x\n", "`keys` and `reason` expected"),
        ("keys: x\n", "is no list"),
        ("- [", "is no list"),
        (
            "- keys: [{0}, {1}]\n  reason: x\n- keys: [{1}, {0}]\n  reason: y\n",
            "entry 2: this pair was accepted before",
        ),
    ],
)
def test_a_bad_list_is_refused(found: Audit, tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "accepted.yaml"
    file.write_text(text.format(found.seen.key(0), found.seen.key(1)))
    with pytest.raises(UserError, match="--accept") as caught:
        read_accepted(file, found.seen.dataset)
    assert message in caught.value.message
    other = tmp_path / "accepted.csv"
    other.write_text("a,b,reason\n")
    with pytest.raises(UserError, match="columns key_a, key_b, reason"):
        read_accepted(other, found.seen.dataset)
    with pytest.raises(UserError, match="cannot be read"):
        read_accepted(tmp_path / "nowhere.yaml", found.seen.dataset)


def test_accepting_what_is_no_finding_is_said(found: Audit) -> None:
    pair = frozenset((found.seen.key(0), found.seen.key(1)))
    again = audit(found.seen.dataset, accepted={pair: "x"}, num_workers=1)
    needless = finding(again, "needless_acceptance")
    assert needless is not None
    assert again.leaks == 3


def test_groups_in_two_splits_are_leaks_of_their_own(tmp_path: Path) -> None:
    """The set is written by hand: group ``p<i // 3>`` of every split has the same name."""
    dataset = write_set(tmp_path / "set", {"train": [7, 5], "val": [4], "test": [3]})
    audited = audit(dataset, num_workers=1)
    straddling = finding(audited, "groups_in_several_splits")
    assert straddling is not None
    assert {item["group"]: item["splits"] for item in straddling.items} == {
        "p0": ["train", "val", "test"], "p1": ["train", "val"],
    }  # fmt: skip
    assert "2 of 4 groups" in straddling.text
    mended, again = fix(audited, tmp_path / "new", num_workers=1)
    assert finding(again, "groups_in_several_splits") is None
    assert {split: entry["samples"] for split, entry in mended.info["splits"].items()}["test"] >= 9
    assert not (tmp_path / "new.private").exists()


def test_a_damaged_image_is_named_by_key(tmp_path: Path) -> None:
    dataset = write_set(tmp_path / "set", {"train": [4], "val": [2]})
    row = read_split(dataset, "train").to_pylist()[2]
    path = Path(dataset.folder) / row["shard"]
    data = bytearray(path.read_bytes())
    data[row["offset"] + 20 : row["offset"] + 60] = bytes(40)
    path.write_bytes(data)
    with pytest.raises(DataError, match=row["key"].hex()):
        audit(dataset, num_workers=1)


def test_recording_keeps_the_rest_of_the_set(tmp_path: Path) -> None:
    dataset = write_set(tmp_path / "set", {"train": [4], "val": [2]})
    again = record(dataset, {"findings": [], "leaks": 0})
    assert again.info == dataset.info | {"audit": {"findings": [], "leaks": 0}}
    assert again.sha256 != dataset.sha256
    assert not list(Path(dataset.folder).glob("*.part"))


def test_packing_tells_the_progress_of_its_audit_too(tmp_path: Path) -> None:
    table = write_entries(tmp_path / "source", base(12))
    told: list[tuple[int, int]] = []
    columns = Columns(label="label", group=("patient",), split="split")
    pack(table, tmp_path / "set", PackOptions(columns=columns, num_workers=1), lambda *counts: told.append(counts))
    assert told.count((12, 12)) >= 2  # images written, images read again
    assert (NUM_VARIANTS, NUM_VARIANTS) in told


def test_of_three_identical_images_the_leak_between_the_second_and_the_third_is_seen_too(tmp_path: Path) -> None:
    one = texture(500)
    entries = [*base(40), *(Entry(one, f"Trio-{split}", split) for split in ("train", "val", "test"))]
    dataset = pack_entries(tmp_path, entries)
    names = patients(dataset)
    key_of = {name: key for key, name in names.items()}
    leak = finding(audit(dataset), "duplicates_across_splits")
    assert leak is not None
    pairs = {frozenset(names[key] for key in item["keys"]) for item in leak.items}
    trio = ["Trio-train", "Trio-val", "Trio-test"]
    assert pairs == {frozenset(pair) for pair in combinations(trio, 2)}
    # Two of the three pairs are accepted: the third still leaks.
    accepted = {frozenset((key_of[trio[0]], key_of[other])): "seen" for other in trio[1:]}
    again = audit(dataset, accepted=accepted)
    assert again.leaks == 1
    mended, after = fix(again, tmp_path / "mended", accepted=accepted)
    assert after.leaks == 0
    assert mended.folder == str(tmp_path / "mended")


def test_a_near_copy_of_an_image_that_occurs_twice_leaks_to_both(tmp_path: Path) -> None:
    one = texture(501)
    recoded = cv2.imdecode(cv2.imencode(".jpg", one, [cv2.IMWRITE_JPEG_QUALITY, 60])[1], cv2.IMREAD_GRAYSCALE)
    entries = [*base(60), Entry(one, "A", "train"), Entry(one, "B", "val"), Entry(np.asarray(recoded), "C", "test")]
    dataset = pack_entries(tmp_path, entries)
    names = patients(dataset)
    leak = finding(audit(dataset), "duplicates_across_splits")
    assert leak is not None
    found_pairs = {frozenset(names[key] for key in item["keys"]) for item in leak.items}
    assert found_pairs == {frozenset(pair) for pair in combinations("ABC", 2)}


def test_fix_does_not_write_over_the_key_of_another_set(leaking: Dataset, found: Audit, tmp_path: Path) -> None:
    private = tmp_path / "mended.private"
    private.mkdir()
    (private / "key").write_text("00" * 32)
    with pytest.raises(UserError, match=r"mended\.private holds another key already: name another set with --fix"):
        fix(found, tmp_path / "mended")
    assert (private / "key").read_text() == "00" * 32
    assert not (tmp_path / "mended").exists()
