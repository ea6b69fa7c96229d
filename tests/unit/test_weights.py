from __future__ import annotations

import os
import pickle
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from medtl_dist.errors import UserError
from medtl_dist.models import registry
from medtl_dist.models.backbones import Created, create_model, native_normalisation, spec
from medtl_dist.models.families import torchvision_backbones
from medtl_dist.models.imagenet import sha256_of
from medtl_dist.models.normalise import Normalisation, normalise
from medtl_dist.models.registry import BackboneSpec
from medtl_dist.models.weights import _present_names, find_weights, read_tensors

GREY = native_normalisation(spec("resnet18"), 1)
RGB = native_normalisation(spec("resnet18"), 3)


class Tiny(nn.Module):
    """Stem, one body layer, head: enough tensors for every case, files of a few kB."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(width)
        self.body = nn.Conv2d(width, width, 3)
        self.fc = nn.Linear(width, 1000)

    def forward(self, images: Tensor) -> Tensor:
        return self.fc(self.body(self.norm(self.stem(images)).relu()).mean(dim=(2, 3)))


TINY = BackboneSpec(
    name="tiny",
    build=Tiny,
    stages=(("stem", "norm"), ("body",)),
    head="fc",
    first_conv="stem",
    feature_dim=8,
    weights_urls=("https://example.invalid/tiny-0123abcd.pth",),
    zero_init=("norm",),
)


@pytest.fixture(autouse=True)
def _tiny_is_registered(monkeypatch: pytest.MonkeyPatch) -> None:
    wide = replace(TINY, name="tiny_wide", build=_wide, feature_dim=16)
    monkeypatch.setattr(registry, "_BACKBONES", {"tiny": TINY, "tiny_wide": wide})


def _wide() -> Tiny:
    return Tiny(16)


def create(weights: str | Path, *, in_channels: int = 3, num_outputs: int = 2, normalisation=None) -> Created:
    return create_model(
        "tiny",
        num_outputs=num_outputs,
        in_channels=in_channels,
        weights=str(weights),
        normalisation=normalisation or (RGB if in_channels == 3 else GREY),
        seed=0,
    )


def given_tensors(num_outputs: int = 1000, width: int = 8) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(9)
    model = Tiny(width)
    model.fc = nn.Linear(width, num_outputs)
    return {
        name: torch.rand(tensor.shape, generator=generator) + 0.1 if tensor.is_floating_point() else tensor
        for name, tensor in model.state_dict().items()
    }


def saved(tensors: Any, path: Path) -> Path:
    if path.suffix == ".safetensors":
        save_file(tensors, path)
    else:
        torch.save(tensors, path)
    return path


def body_equal(model: nn.Module, tensors: dict[str, Tensor]) -> bool:
    state = model.state_dict()
    return all(torch.equal(state[name], tensors[name]) for name in tensors if not name.startswith("fc"))


@pytest.mark.parametrize("name", ["w.pth", "w.safetensors"])
def test_the_body_comes_from_the_file_and_a_head_of_another_size_is_dropped_by_name(tmp_path: Path, name: str) -> None:
    tensors = given_tensors()
    path = saved(tensors, tmp_path / name)
    created = create(path)
    assert body_equal(created.model, tensors)
    assert torch.equal(created.model.get_parameter("fc.weight"), create("random").model.get_parameter("fc.weight"))
    assert created.weights == f"weights file {name}"
    assert created.weights_sha256 == sha256_of(path)
    assert created.message == (
        f"tiny: weights file {name}; new head with 2 outputs (dropped the file's: fc.weight [1000, 8], fc.bias [1000])"
    )


def test_a_matching_head_is_kept(tmp_path: Path) -> None:
    tensors = given_tensors(num_outputs=2)
    created = create(saved(tensors, tmp_path / "w.pth"))
    assert all(torch.equal(created.model.state_dict()[name], tensors[name]) for name in tensors)
    assert created.message.endswith("head with 2 outputs from the file")


@pytest.mark.parametrize(
    ("head", "remark"),
    [
        ({}, "new head with 2 outputs (the file has none)"),
        (
            {"fc.1.weight": torch.ones(2, 8), "fc.1.bias": torch.ones(2)},
            "new head with 2 outputs (dropped the file's: fc.1.weight [2, 8], fc.1.bias [2])",
        ),
        ({"fc.weight": torch.ones(2, 8)}, "new head with 2 outputs (dropped the file's: fc.weight [2, 8])"),
    ],
    ids=["none", "another kind", "half"],
)
def test_without_a_usable_head_it_is_new(tmp_path: Path, head: dict[str, Tensor], remark: str) -> None:
    tensors = {name: tensor for name, tensor in given_tensors().items() if not name.startswith("fc")}
    created = create(saved(tensors | head, tmp_path / "w.pth"))
    assert body_equal(created.model, tensors)
    assert created.message.endswith(remark)


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.module.", "model.", "backbone."])
@pytest.mark.parametrize("nest", [None, "state_dict", "model_state_dict", "model"])
def test_wrappings_of_training_scripts_are_taken_off(tmp_path: Path, prefix: str, nest: str | None) -> None:
    tensors = given_tensors(num_outputs=2)
    content: Any = {prefix + name: tensor for name, tensor in tensors.items()}
    if nest:
        content = {"epoch": 3, nest: content, "optimizer": {"state": {}, "param_groups": [{"lr": 0.1}]}}
    assert body_equal(create(saved(content, tmp_path / "w.pth")).model, tensors)


def test_files_of_old_pytorch_versions_lack_the_counters(tmp_path: Path) -> None:
    tensors = given_tensors()
    del tensors["norm.num_batches_tracked"]
    assert body_equal(create(saved(tensors, tmp_path / "w.pth")).model, tensors)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions_are_converted(tmp_path: Path, dtype: torch.dtype) -> None:
    tensors = {
        name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in given_tensors().items()
    }
    model = create(saved(tensors, tmp_path / "w.pth")).model
    assert torch.equal(model.get_parameter("body.weight"), tensors["body.weight"].float())


@pytest.mark.parametrize("half", [False, True], ids=["native", "half"])
def test_an_rgb_file_in_a_grey_model_sees_replicated_rgb(tmp_path: Path, half: bool) -> None:
    path = saved(given_tensors(num_outputs=2), tmp_path / "w.pth")
    grey = Normalisation((0.5,), (0.5,)) if half else GREY
    rgb = Normalisation((0.5,) * 3, (0.5,) * 3) if half else RGB
    one, three = create(path, in_channels=1, normalisation=grey), create(path, normalisation=rgb)
    assert "first convolution turned from RGB to grey" in one.message
    assert "first convolution" not in three.message
    assert_same_on_grey_images(one.model, grey, three.model, rgb)


def test_our_own_grey_weights_load_back_as_they_are(tmp_path: Path) -> None:
    tensors = learned_grey_tensors()
    created = create(saved(tensors, tmp_path / "w.safetensors"), in_channels=1)
    assert all(torch.equal(created.model.state_dict()[name], tensors[name]) for name in tensors)
    assert "first convolution" not in created.message


def test_grey_weights_in_an_rgb_model_act_the_same_on_grey_images(tmp_path: Path) -> None:
    path = saved(learned_grey_tensors(), tmp_path / "w.safetensors")
    one, three = create(path, in_channels=1), create(path)
    assert "first convolution turned from grey to RGB" in three.message
    assert_same_on_grey_images(one.model, GREY, three.model, RGB)


def test_a_plain_one_channel_convolution_is_taken_without_offset(tmp_path: Path) -> None:
    tensors = learned_grey_tensors()
    del tensors["stem.offset"]
    model = create(saved(tensors, tmp_path / "w.pth"), in_channels=1).model
    assert torch.equal(model.get_parameter("stem.weight"), tensors["stem.weight"])
    assert torch.count_nonzero(model.get_parameter("stem.offset")) == 0


def learned_grey_tensors() -> dict[str, Tensor]:
    model = create("random", in_channels=1).model
    generator = torch.Generator().manual_seed(3)
    return {
        name: torch.rand(tensor.shape, generator=generator) + 0.1 if tensor.is_floating_point() else tensor
        for name, tensor in model.state_dict().items()
    }


def assert_same_on_grey_images(one: nn.Module, grey: Normalisation, three: nn.Module, rgb: Normalisation) -> None:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (2, 1, 11, 8), dtype=torch.uint8, generator=generator)
    with torch.no_grad():
        result = one.eval()(normalise(images, grey))
        expected = three.eval()(normalise(images.expand(-1, 3, -1, -1), rgb))
    assert (result - expected).norm() < 1e-5 * expected.norm()  # float32


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda t: t.pop("body.weight"), r"1 missing tensors \(body\.weight\); give weights with torchvision's"),
        (lambda t: t.update(extra=torch.ones(1)), r"1 unknown tensors \(extra\)"),
        (
            lambda t: t.update({"body.bias": torch.ones(9)}),
            r"1 tensors of another shape \(body\.bias \[9\] instead of \[8\]\)",
        ),
        (
            lambda t: t.update({"body.bias": torch.ones(8, dtype=torch.int8)}),
            r"another shape \(body\.bias int8 \[8\] instead of \[8\]\)",
        ),
        (
            lambda t: [t.update({f"new{i}": torch.ones(1)}) for i in range(5)],
            r"5 unknown tensors \(new0, new1, new2, …\)",
        ),
        (lambda t: t.update({"stem.weight": torch.ones(8, 4, 3, 3)}), r"stem\.weight \[8, 4, 3, 3\] instead of"),
    ],
    ids=["missing", "unknown", "shape", "type", "many", "four channels"],
)
@pytest.mark.parametrize("in_channels", [1, 3])
def test_misfits_are_named_and_counted(tmp_path: Path, change, told: str, in_channels: int) -> None:
    if in_channels == 1 and "four" in told:
        return
    tensors = given_tensors()
    change(tensors)
    with pytest.raises(UserError, match=rf"w\.pth does not fit tiny: .*{told}") as caught:
        create(saved(tensors, tmp_path / "w.pth"), in_channels=in_channels)
    assert "\n" not in caught.value.message


@pytest.mark.parametrize("prefix", ["", "module."])
def test_weights_of_another_backbone_are_recognised(tmp_path: Path, prefix: str) -> None:
    tensors = {prefix + name: tensor for name, tensor in given_tensors(num_outputs=3, width=16).items()}
    with pytest.raises(UserError, match=r"they are tiny_wide weights: set model\.backbone=tiny_wide$"):
        create(saved(tensors, tmp_path / "w.pth"))


def test_resnet34_in_resnet18_and_resnet50_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()  # the real table
    with torch.device("meta"):
        shapes = spec("resnet34").build().state_dict()
    zeros = {name: torch.zeros(tensor.shape, dtype=torch.bfloat16) for name, tensor in shapes.items()}
    path = saved(zeros, tmp_path / "w.pth")
    for backbone, what in (("resnet18", "96 unknown tensors"), ("resnet50", "missing tensors")):
        with pytest.raises(UserError, match=rf"{what}.*; they are resnet34 weights: set model\.backbone=resnet34$"):
            create_model(backbone, num_outputs=2, in_channels=1, weights=str(path), normalisation=GREY, seed=0)
    path.unlink()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_numbers_are_refused(tmp_path: Path, value: float) -> None:
    tensors = given_tensors()
    tensors["body.weight"][0, 0, 0, 0] = value
    with pytest.raises(UserError, match=r"NaN or infinite values in body\.weight$"):
        create(saved(tensors, tmp_path / "w.pth"))


class RunsCode:
    """Unpickled the ordinary way, it makes a folder."""

    def __init__(self, proof: Path) -> None:
        self.proof = proof

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, (str(self.proof),))


@pytest.mark.parametrize("zipped", [True, False])
def test_code_in_a_file_is_refused_and_not_run(tmp_path: Path, zipped: bool) -> None:
    proof, path = tmp_path / "proof", tmp_path / "w.pth"
    content = {"state_dict": given_tensors(), "hook": RunsCode(proof)}
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(UserError, match=r"w\.pth was refused: it holds Python objects \(\w+\.mkdir\)") as caught:
        create(path)
    assert not proof.exists()
    assert "\n" not in caught.value.message
    torch.load(path, weights_only=False)  # the file does what the test needs it to
    assert proof.exists()


@pytest.mark.parametrize("name", ["w.pth", "w.safetensors", "w"])
@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_code_in_a_bare_pickle_is_not_run_whatever_its_name(tmp_path: Path, name: str, protocol: int) -> None:
    proof, path = tmp_path / "proof", tmp_path / name
    path.write_bytes(pickle.dumps({"hook": RunsCode(proof)}, protocol=protocol))
    with pytest.raises(UserError, match=r"was refused|can't be read as weights"):
        create(path)
    assert not proof.exists()


def test_a_whole_pickled_model_is_refused_with_the_way_out(tmp_path: Path) -> None:
    torch.save(Tiny(), tmp_path / "model.pth")
    with pytest.raises(UserError, match=r"holds Python objects \(.*Tiny\).*save the tensors alone: torch\.save\("):
        create(tmp_path / "model.pth")


@pytest.mark.parametrize("name", ["w.pth", "w.safetensors"])
@pytest.mark.parametrize("kept", [0.0, 0.02, 0.5, 0.99])
def test_a_truncated_file_is_one_clear_line(tmp_path: Path, name: str, kept: float) -> None:
    path = saved(given_tensors(), tmp_path / name)
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * kept)])
    with pytest.raises(UserError, match=r"can't be read as weights \(truncated, or another kind of file\?\)") as caught:
        create(path)
    assert "\n" not in caught.value.message


@pytest.mark.parametrize("content", [b"hello", b"\x89PNG\r\n\x1a\n" + bytes(100), b"<html>", bytes(1000)])
@pytest.mark.parametrize("name", ["w.pth", "w.safetensors"])
def test_another_kind_of_file_is_one_clear_line(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match="can't be read as weights") as caught:
        create(tmp_path / name)
    assert "\n" not in caught.value.message
    assert "weights_only" not in caught.value.message  # PyTorch's text tells how to switch the protection off


@pytest.mark.parametrize("content", [{"epoch": 1}, [torch.ones(1)], torch.ones(2), {}, {"state_dict": {}}], ids=str)
def test_a_file_without_named_tensors_says_how_to_save(tmp_path: Path, content: Any) -> None:
    with pytest.raises(UserError, match=r"holds no named tensors; save a state dict: torch\.save"):
        read_tensors(saved(content, tmp_path / "w.pth"))


def test_a_missing_file_or_a_typo_names_the_choices(tmp_path: Path) -> None:
    for given in (tmp_path / "none.pth", "imagnet"):
        with pytest.raises(UserError, match=r"no file /.*; give imagenet, random or the path of"):
            create(given)


def test_a_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"is a folder; give the \.safetensors or \.pth file in it"):
        create(tmp_path)


def test_a_torchvision_file_name_promises_its_content(tmp_path: Path) -> None:
    path = saved(given_tensors(), tmp_path / "tiny-0123abcd.pth")
    with pytest.raises(UserError, match=r"is damaged: its sha256 starts with [0-9a-f]{8}, its name says 0123abcd"):
        find_weights(str(path), TINY)
    other = path.rename(tmp_path / "mine-20240101.pth")  # looks like a hash, promises nothing
    assert find_weights(str(other), TINY) is not None


def test_random_weights_need_no_file() -> None:
    assert find_weights("random", TINY) is None


class TinyTransformer(Tiny):
    """With learned positions of a 3x3 grid and one class token, built for a given size."""

    def __init__(self, image_size_px: int = 12) -> None:
        super().__init__()
        self.position = nn.Parameter(torch.zeros(1, 1 + (image_size_px // 4) ** 2, 5))


POSITIONED = replace(
    TINY, name="tiny_vit", build=TinyTransformer, stages=(("stem", "norm", "position"), ("body",)), image_size_px=12,
    patch_px=4, position="position",
)  # fmt: skip


def create_positioned(path: Path, image_size_px: int, monkeypatch: pytest.MonkeyPatch) -> Created:
    monkeypatch.setattr(registry, "_BACKBONES", {"tiny_vit": POSITIONED})
    return create_model(
        "tiny_vit",
        num_outputs=2,
        in_channels=3,
        weights=str(path),
        normalisation=RGB,
        image_size_px=image_size_px,
        seed=0,
    )


def test_positions_of_another_size_are_interpolated_and_the_token_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ramp = torch.arange(3.0).view(3, 1, 1).expand(3, 3, 5).reshape(1, 9, 5)  # the row of each patch
    tensors = given_tensors() | {"position": torch.cat([torch.full((1, 1, 5), 7.0), ramp], dim=1)}
    path = saved(tensors, tmp_path / "w.pth")
    same = create_positioned(path, 12, monkeypatch)
    assert torch.equal(same.model.get_parameter("position"), tensors["position"])
    assert "interpolated" not in same.message
    larger = create_positioned(path, 24, monkeypatch)
    assert "positions interpolated from 3x3 to 6x6 patches" in larger.message
    position = larger.model.get_parameter("position").detach()
    assert torch.equal(position[:, 0], torch.full((1, 5), 7.0))
    grid = position[0, 1:].view(6, 6, 5)
    assert torch.allclose(grid, grid[:, :1].expand(6, 6, 5), atol=1e-6)  # rows stay rows
    assert grid[:, 0, 0].diff().min() > 0
    assert grid.mean().item() == pytest.approx(1, abs=1e-5)


def test_positions_of_another_width_are_a_misfit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = saved(given_tensors() | {"position": torch.zeros(1, 26, 6)}, tmp_path / "w.pth")
    with pytest.raises(
        UserError, match=r"1 tensors of another shape \(position \[1, 26, 6\] instead of \[1, 10, 5\]\)"
    ):
        create_positioned(path, 12, monkeypatch)


def zeros_on_meta(backbone: str, rename: tuple[str, str] | None = None) -> dict[str, Tensor]:
    with torch.device("meta"):
        shapes = spec(backbone).build_for(None).state_dict()
    pattern, replacement = rename or ("$^", "")
    return {
        re.sub(pattern, replacement, name): torch.zeros(tensor.shape, dtype=torch.bfloat16)
        for name, tensor in shapes.items()
    }


@pytest.mark.parametrize(
    ("backbone", "rename", "extra", "remark"),
    [  # as the published files have them
        ("densenet121", (r"(denselayer\d+\.(?:norm|conv))([12])\.", r"\1.\2."), {}, "densenet121: weights file"),
        ("inception_v3", None, {"AuxLogits.fc.weight": torch.zeros(1000, 768)}, "left out AuxLogits"),
    ],
)
def test_published_files_with_other_names_fit(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    backbone: str,
    rename: tuple[str, str] | None,
    extra: dict[str, Tensor],
    remark: str,
) -> None:
    monkeypatch.undo()  # the real table
    path = saved(zeros_on_meta(backbone, rename) | extra, tmp_path / "w.pth")
    created = create_model(
        backbone,
        num_outputs=2,
        in_channels=1,
        weights=str(path),
        normalisation=native_normalisation(spec(backbone), 1),
        seed=0,
    )
    path.unlink()
    assert remark in created.message
    body = {
        name: tensor for name, tensor in created.model.named_parameters() if not name.startswith(spec(backbone).head)
    }
    assert not any(tensor.count_nonzero() for tensor in body.values())


def test_published_transformers_have_other_names_inside_their_layers() -> None:
    renamed, remarks = _present_names(
        {"encoder.layers.encoder_layer_3.mlp.linear_1.weight": torch.zeros(1), "x.mlp.linear_2.bias": torch.zeros(1)},
        next(one for one in torchvision_backbones() if one.name == "vit_b_16"),
    )
    assert list(renamed) == ["encoder.layers.encoder_layer_3.mlp.0.weight", "x.mlp.3.bias"]
    assert remarks == []


def test_weights_of_another_family_are_recognised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()  # the real table
    path = saved(zeros_on_meta("efficientnet_b0"), tmp_path / "w.pth")
    with pytest.raises(UserError, match=r"they are efficientnet_b0 weights: set model\.backbone=efficientnet_b0$"):
        create_model("resnet18", num_outputs=2, in_channels=3, weights=str(path), normalisation=RGB, seed=0)
    path.unlink()
