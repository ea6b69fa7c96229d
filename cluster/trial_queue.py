"""waiting trials → which one a free worker takes next: those that share a frozen prefix follow each other. No Ray."""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence

from cluster.trial_state import TrialSpec
from medtl_dist.config import Config

# What decides the outputs of the frozen stages, and so what trials can share (prefix_plan says it exactly, for one data set;
# an order needs less). The seed decides which views of an image there are.
_PREFIX_KEYS = {
    "data": ("shards", "image_size_px", "eval_view", "normalisation", "eval_batch_size"),
    "train": ("precision", "channels_last", "threads", "seed"),
}


def prefix_of(config: Config) -> str:
    """A name for the trial's frozen prefix: trials with the same name train behind the same stages on the same images.

    Nothing is frozen: the name of the network and its data, so that such trials, too, stay together and find both loaded.
    """
    tree = config.model_dump(mode="json")
    kept = {section: {key: tree[section][key] for key in keys} for section, keys in _PREFIX_KEYS.items()}
    return json.dumps(kept | {"model": tree["model"], "augment": tree["augment"]}, sort_keys=True)


def next_of(
    waiting: Sequence[TrialSpec], worker_prefix: str | None, busy_prefixes: Collection[str]
) -> TrialSpec | None:
    """The trial for a free worker: of the prefix it ran last; else of one that no busy worker has; else the first.

    Within each choice by number, so points to try first come first. None where nothing waits.
    """
    by_number = sorted(waiting, key=lambda spec: spec.number)
    if not by_number:
        return None
    prefixes = [prefix_of(spec.config) for spec in by_number]
    for wanted in (lambda prefix: prefix == worker_prefix, lambda prefix: prefix not in busy_prefixes):
        for spec, prefix in zip(by_number, prefixes, strict=True):
            if wanted(prefix):
                return spec
    return by_number[0]
