"""Whatever a user types is refused, or reaches Kubernetes and the shells as one and the same word."""

from __future__ import annotations

import contextlib
import re
import shlex
from typing import Any

import pytest
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st
from k8s_targets import CONFIG, FILE, GPU, IMAGE, LOADER, of_kind

from cluster.manifests import Target, config_for, doctor_command, render, to_yaml, train_command
from cluster.placement import Store, checked_words
from cluster.sweep_pods import tune_command
from medtl_dist.errors import UserError

HOSTILE = st.text(max_size=40) | st.sampled_from(
    [
        "a; id",
        "$(HOME)",
        "`id`",
        "a\nb: c",
        "{{x}}",
        "'",
        '"',
        "a b",
        "--set",
        "a&&b",
        "|",
        "%s",
        "1e3",
        "0o17",
        "~",
        "null",
        "no",
        "é",
        "",
    ]
)


@settings(max_examples=50, deadline=None)
@given(
    name=HOSTILE,
    root=HOSTILE,
    claim=st.none() | HOSTILE,
    kind=st.sampled_from(["train", "tune", "cluster", "doctor"]),
    test=st.booleans(),
)
def test_a_hostile_name_or_store_is_refused_or_stays_one_word(
    name: str, root: str, claim: str | None, kind: str, test: bool
) -> None:
    test = test and kind == "train"
    space = FILE if kind == "tune" else None
    for store_root in (root, f"s3://bucket/{root}", f"/mnt/{root}"):
        with contextlib.suppress(UserError):
            target = Target(name, IMAGE, GPU, Store(store_root, claim), kind=kind, space=space)
            _holds_together(target, render(CONFIG, target, open_test=test), open_test=test)
        with contextlib.suppress(UserError):
            job = "train" if kind == "cluster" else kind
            target = Target("good", IMAGE, GPU, Store(store_root, claim), kind=job, space=space)
            _holds_together(target, render(CONFIG, target, open_test=test), open_test=test)


# What a user may type, at its strangest: every value here is accepted.
LABEL = st.from_regex(r"[a-z0-9]([a-z0-9-]{0,20}[a-z0-9])?", fullmatch=True)
NAME = st.from_regex(r"[a-z]([a-z0-9-]{0,45}[a-z0-9])?", fullmatch=True)
ROOT = st.from_regex(r"(s3|gs)://[a-z0-9]{3}(/[A-Za-z0-9_=+-][A-Za-z0-9._=+-]{0,10}){0,2}", fullmatch=True)


@example(name="a", root="s3://000", label="0", value="0", shards="\x85")  # a line break to YAML 1.1, none to 1.2
@example(name="a", root="s3://000", label="0", value="0", shards="é 漢 #: x")
@settings(max_examples=25, deadline=None)
@given(
    name=NAME,
    root=ROOT,
    label=LABEL,
    value=st.from_regex(r"[ -~]{1,30}", fullmatch=True),
    shards=st.text(min_size=1, max_size=30),
)
def test_what_is_accepted_comes_through_yaml_and_shells_unchanged(
    name: str, root: str, label: str, value: str, shards: str
) -> None:
    target = Target(
        name, IMAGE, GPU, Store(root), namespace=label, queue=label, credentials_secret=label, identity={"a/b": value}
    )
    config = CONFIG.model_copy(update={"data": CONFIG.data.model_copy(update={"shards": shards})})
    manifests = None
    with contextlib.suppress(UserError):  # a folder of this machine, a login
        manifests = render(config, target)
    if manifests is None:
        return
    assert shards.isprintable()
    _holds_together(target, manifests, open_test=False)
    placed = yaml.safe_load(of_kind(manifests, "ConfigMap")["data"]["config.yaml"])["data"]["shards"]
    assert placed == config_for(config, target).data.shards


def _holds_together(target: Target, manifests: list[dict[str, Any]], *, open_test: bool) -> None:
    text = to_yaml(manifests)
    read = list(yaml.load_all(text, Loader=LOADER))
    assert read == manifests
    # kubectl reads YAML by other rules than PyYAML: what is bare must be a word in both.
    for scalar in _bare_texts(text):
        assert re.fullmatch(r"[A-Za-z/].*", scalar, re.DOTALL)
        assert scalar.lower() not in ("y", "n", "yes", "no", "on", "off", "true", "false", "null")
    for manifest in read:
        if manifest["kind"] == "RayJob":
            wanted = [
                "medtl",
                "train",
                "--config",
                "/etc/medtl/config.yaml",
                "--run-dir",
                target.run_folder,
                "--resume",
            ]
            wanted += ["--test"] if open_test else []
            made = train_command(target, open_test=open_test)
            if target.space is not None:
                wanted[1], wanted[4] = "tune", "--sweep-dir"
                wanted += ["--space", "/etc/medtl/space.yaml"]
                made = tune_command(target.run_folder, target.space)
            if target.kind == "doctor":
                wanted = ["medtl", "doctor", "--nodes", "--config", "/etc/medtl/config.yaml", "--store"]
                wanted += [target.run_folder.removesuffix(f"/runs/{target.name}"), "--step"]
                made = doctor_command(target)
            words = shlex.split(manifest["spec"]["entrypoint"])
            assert words == wanted == made
            assert shlex.split(shlex.join(words)) == words == manifest["spec"]["entrypoint"].split(" ")


def _bare_texts(text: str) -> list[str]:
    events = yaml.parse(text, Loader=LOADER)
    scalars = [event for event in events if isinstance(event, yaml.ScalarEvent) and not event.style]
    resolve = yaml.SafeLoader("").resolve
    return [s.value for s in scalars if resolve(yaml.ScalarNode, s.value, (True, False)) == "tag:yaml.org,2002:str"]


def is_accepted(word: str) -> bool:
    try:
        return checked_words([word]) == [word]
    except UserError:
        return False


@settings(max_examples=50, deadline=None)
@given(st.text(max_size=30) | st.lists(HOSTILE, max_size=4).map("\n".join))
@example("a\n\x85b\n")
@example("a \n\tb\n\n")
def test_any_text_comes_through_yaml(text: str) -> None:
    for loader in (LOADER, yaml.SafeLoader):
        (read,) = yaml.load_all(to_yaml([{"a": text, text: ["b"]}]), Loader=loader)
        assert read == {"a": text, text: ["b"]}


def test_a_word_is_accepted_exactly_where_a_shell_needs_no_quotes() -> None:
    for character in map(chr, range(0x250)):
        for word in (character, f"a{character}", f"{character}a"):
            assert is_accepted(word) == (word.isascii() and shlex.quote(word) == word), repr(word)
    assert not is_accepted("")
    with pytest.raises(UserError, match="would be part of a command line"):
        checked_words(["medtl", "$(HOME)"])
