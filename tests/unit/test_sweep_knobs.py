"""What a trial's knobs were, in the space's own words: of the options that set several keys at once, the one that fits."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

from test_sweep import outcome

from medtl_dist.sweep.knobs import knobs_of


def test_an_option_is_named_only_where_all_of_its_keys_are_as_it_sets_them(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("optim: {lr: 0.1, momentum: 0.9}")
    options = {
        "fast": {"optim.lr": 0.5, "optim.momentum": 0.9},
        "heavy": {"optim.lr": 0.5, "optim.momentum": 0.99},
    }
    (tmp_path / "space.yaml").write_text(json.dumps({"knobs": [{"key": "pace", "options": options}]}))
    drawn = [options["heavy"], options["fast"], {"optim.lr": 0.5}, {"optim.lr": 0.1, "optim.momentum": 0.99}, {}]
    outcomes = [dataclasses.replace(outcome(n, 0.5), overrides=given) for n, given in enumerate(drawn)]
    expected = ["heavy", "fast", "fast", "(as configured)", "(as configured)"]  # what is not drawn is the config's
    assert knobs_of(tmp_path, outcomes) == [{"pace": name} for name in expected]
    (tmp_path / "space.yaml").write_text(json.dumps({"knobs": [{"key": "pace", "options": options | {"odd": 3}}]}))
    assert knobs_of(tmp_path, outcomes)[0] == options["heavy"]  # a damaged space names nothing
