from __future__ import annotations

import json

from medtl_dist.cli.follow import epoch_line, following, progress_facts

_ROW = {
    "epoch": 1, "epochs": 20, "step": 312, "steps": 1050, "loss": 0.41234, "images_per_s": 1142.86,
    "data_wait_fraction": 0.061, "best_val_auc": 0.9131, "seconds_left": 3725.0,
}  # fmt: skip


def test_progress_fits_80_columns_beside_its_bar() -> None:
    lines = progress_facts(_ROW).splitlines()
    assert lines == [
        "step 312/1050 · 62:05 left · 1142.9 images/s",
        "6% waiting for data · loss 0.412 · best val AUC 0.913",
    ]
    assert max(map(len, lines)) + len("epoch 20/20 ") + 12 + 1 <= 80
    first = dict.fromkeys(_ROW) | {"step": 0, "steps": 10}
    assert progress_facts(first) == "step 0/10\n"


def test_what_a_run_logs_is_printed_once_and_only_what_is_new(tmp_path, capsys) -> None:
    log = tmp_path / "log.jsonl"
    log.write_text(json.dumps({"kind": "note", "text": "an earlier attempt's note"}) + "\n")
    row = {
        "epoch": 0,
        "train_loss": 0.5,
        "val_loss": 0.25,
        "val_auc": None,
        "images_per_s": 10.0,
        "data_wait_fraction": 0.0,
    }
    row |= {"epoch_s": 3.0, "kind": "epoch"}
    with following(tmp_path), log.open("a") as file:
        file.write(json.dumps({"kind": "note", "text": "random [initial] weights"}) + "\n" + json.dumps(row) + "\n")
        file.write('{"kind": "note", "te')  # a line being written
    assert capsys.readouterr().err.splitlines() == ["random [initial] weights", epoch_line(row)]
    assert "val AUC undefined" in epoch_line(row)
