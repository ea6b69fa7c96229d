"""cluster/launcher/aws.yaml: what Ray's launcher itself would say of it, and our own rules."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

FILE = Path(__file__).parents[2] / "cluster/launcher/aws.yaml"


@pytest.fixture(scope="module")
def launcher() -> dict[str, Any]:
    return yaml.safe_load(FILE.read_text(encoding="utf-8"))


def check_by_ray(config: dict[str, Any]) -> dict[str, Any]:
    """What `ray up` does first: fill in its defaults, then its own schema and checks. Nothing is started."""
    from ray.autoscaler._private.util import prepare_config, validate_config

    prepared = prepare_config(copy.deepcopy(config))
    validate_config(prepared)
    return prepared


def faults(config: dict[str, Any]) -> list[str]:
    types, head = config["available_node_types"], config["head_node_type"]
    start = " ".join(config["head_start_ray_commands"])
    options = config["docker"]["run_options"]
    market = {name: node["node_config"].get("InstanceMarketOptions") for name, node in types.items() if name != head}
    on_demand, spot = (
        [n for n, m in market.items() if (m == {"MarketType": "spot"}) is is_spot] for is_spot in (False, True)
    )
    wrong = {
        "the dashboard is public": "--dashboard-host=127.0.0.1" not in start or "0.0.0.0" in start,
        "public addresses": config["provider"].get("use_internal_ips") is not True,
        "no token authentication": "--env=RAY_AUTH_MODE=token" not in options,
        "no token": not any(path.endswith("/.ray/auth_token") for path in config["file_mounts"]),
        "the image is not pinned": not re.search(r"@sha256:[0-9a-f]{64}$", config["docker"]["image"]),
        "work may land on the head": "--num-cpus=0" not in start or types[head]["resources"] != {"CPU": 0},
        "the head is on spot": "InstanceMarketOptions" in types[head]["node_config"],
        "no spot nodes with on-demand nodes behind them": not (
            spot
            and on_demand
            and min(types[n]["priority"] for n in spot) > max(types[n]["priority"] for n in on_demand)
        ),
        "a market option that AWS refuses": any(
            m is None and "InstanceMarketOptions" in types[n]["node_config"] for n, m in market.items()
        ),
        "workers without GPUs": not all(types[n]["resources"].get("GPU", 0) > 0 for n in market),
        "a secret in the file": re.search(r"AKIA|aws_secret|PRIVATE KEY|RAY_AUTH_TOKEN=", str(config)) is not None,
    }
    for name, node in types.items():
        settings = node["node_config"]
        wrong[f"{name}: no instance role"] = "IamInstanceProfile" not in settings
        wrong[f"{name}: Ray would make a security group that is open to all"] = "SecurityGroupIds" not in settings
        wrong[f"{name}: old metadata service"] = settings.get("MetadataOptions", {}).get("HttpTokens") != "required"
        wrong[f"{name}: bounds"] = not 0 <= node["min_workers"] <= node["max_workers"] <= config["max_workers"]
    return [fault for fault, is_so in wrong.items() if is_so]


def test_rays_own_schema_accepts_it(launcher: dict[str, Any]) -> None:
    prepared = check_by_ray(launcher)
    assert prepared["available_node_types"].keys() == launcher["available_node_types"].keys()
    assert prepared["setup_commands"] == []  # Ray's default would install another Ray


def test_it_keeps_our_rules(launcher: dict[str, Any]) -> None:
    assert faults(launcher) == []


def test_rays_schema_catches_a_typo(launcher: dict[str, Any]) -> None:
    for broken in (
        launcher | {"max_worker": 3},
        launcher | {"max_workers": -1},
        launcher | {"docker": launcher["docker"] | {"imge": "x"}},
        launcher | {"auth": {"ssh_usr": "ubuntu"}},
    ):
        with pytest.raises(jsonschema.ValidationError):
            check_by_ray(broken)
    with pytest.raises(ValueError, match="head_node_type"):
        check_by_ray(launcher | {"head_node_type": "other"})


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (
            lambda c: c["head_start_ray_commands"].__setitem__(
                1, "ray start --head --num-cpus=0 --dashboard-host=0.0.0.0"
            ),
            "public",
        ),
        (lambda c: c["provider"].pop("use_internal_ips"), "public addresses"),
        (lambda c: c["docker"]["run_options"].pop(1), "no token authentication"),
        (lambda c: c["file_mounts"].clear(), "no token"),
        (lambda c: c["docker"].update(image="medtl:latest"), "not pinned"),
        (lambda c: c["available_node_types"]["gpu-spot"].update(priority=0), "no spot nodes with on-demand"),
        (lambda c: c["available_node_types"].pop("gpu-on-demand"), "no spot nodes with on-demand"),
        (
            lambda c: c["available_node_types"]["gpu-on-demand"]["node_config"].update(InstanceMarketOptions=None),
            "AWS refuses",
        ),
        (
            lambda c: c["available_node_types"]["gpu-spot"]["node_config"].pop("IamInstanceProfile"),
            "gpu-spot: no instance role",
        ),
        (lambda c: c["available_node_types"]["head"]["node_config"].pop("SecurityGroupIds"), "head: Ray would make"),
        (lambda c: c["available_node_types"]["gpu-spot"].update(max_workers=9), "gpu-spot: bounds"),
        (lambda c: c["docker"]["run_options"].append("--env=RAY_AUTH_TOKEN=abc"), "a secret in the file"),
    ],
)
def test_a_seeded_error_is_caught(launcher: dict[str, Any], break_it: Callable[[Any], Any], message: str) -> None:
    broken = yaml.safe_load(FILE.read_text(encoding="utf-8"))  # anew: copies would share what the file's anchors share
    broken = {
        **broken,
        "available_node_types": {n: copy.deepcopy(t) for n, t in broken["available_node_types"].items()},
    }
    break_it(broken)
    assert any(message in fault for fault in faults(broken))
