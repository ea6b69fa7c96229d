from __future__ import annotations

import json
from pathlib import Path

import pytest

from medtl_dist.cli.main import run

PAGE = Path(__file__).parents[2] / "docs" / "models.md"


def test_the_page_holds_the_commands_output(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["models"]) == 0
    assert capsys.readouterr().out in PAGE.read_text(encoding="utf-8")


def test_json_lists_the_modules_of_each_stage(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["models", "resnet18", "vit_b_16", "--json"]) == 0
    first, second = json.loads(capsys.readouterr().out)
    assert first == {
        "name": "resnet18",
        "stages": [["conv1", "bn1"], ["layer1"], ["layer2"], ["layer3"], ["layer4"]],
        "parameters": 11_689_512,
        "image_size_px": 224,
        "patch_px": None,
        "feature_dim": 512,
        "mean": [0.485, 0.456, 0.406],
        "std": [0.229, 0.224, 0.225],
    }
    assert (second["patch_px"], len(second["stages"])) == (16, 13)


def test_a_model_of_timm_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("timm", reason="timm is not installed")
    assert run(["models", "timm/tf_efficientnet_lite0"]) == 0
    row = [cell.strip() for cell in capsys.readouterr().out.splitlines()[2].split("|")]
    assert row[1:-1] == ["timm/tf_efficientnet_lite0", "8", "4.7", "224", "1280", "0.5, 0.5"]


def test_an_unknown_name_is_the_users_mistake(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["models", "vgg17"]) == 2
    assert "unknown backbone 'vgg17' (did you mean vgg1" in capsys.readouterr().err
