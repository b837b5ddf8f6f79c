"""Images as the model wants them: by the library of the model, by the options, and as the output says."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import done, flat, invoke

from fxprune.cli.input_options import DataOptions
from fxprune.cli.named_objects import build
from fxprune.cli.output import Output
from fxprune.cli.preprocessing import IMAGENET, Preparation
from fxprune.errors import FxpruneError

Image = pytest.importorskip("PIL.Image")
models = pytest.importorskip("torchvision.models")


def picture(width: int = 300, height: int = 260) -> Any:
    noise = torch.randint(0, 256, (height, width, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    return Image.fromarray(noise.numpy())


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three classes of four pictures."""
    for index in range(3):
        place = tmp_path / "images" / f"class{index}"
        place.mkdir(parents=True)
        for number in range(4):
            colour = [40, 40, 40]
            colour[index] = 200 + number
            Image.new("RGB", (40, 30), tuple(colour)).save(place / f"{number}.png")
    return tmp_path / "images"


@pytest.mark.parametrize(
    ("name", "weights", "wanted"),
    [
        ("resnet50", None, "IMAGENET1K_V2"),
        ("resnet50", "IMAGENET1K_V1", "IMAGENET1K_V1"),
        ("efficientnet_b1", None, "IMAGENET1K_V2"),
    ],
)
def test_of_torchvision_they_are_those_of_the_weights(name: str, weights: str | None, wanted: str) -> None:
    from fxprune.cli.preprocessing import of_torchvision

    kind = models.get_model_weights(name)
    found = of_torchvision(name, {"weights": weights} if weights else {})
    assert torch.equal(found(picture()), kind[wanted].transforms()(picture()))
    assert found.source == f"the transforms of {kind.__name__}.{wanted}"


def test_of_torchvision_other_kinds_of_models_say_nothing() -> None:
    from fxprune.cli.preprocessing import of_torchvision

    assert of_torchvision("fasterrcnn_resnet50_fpn", {}) is IMAGENET
    assert of_torchvision("a_builder_of_ones_own", {}) is IMAGENET
    assert (
        build("torchvision:squeezenet1_1", {}).images.source == "the transforms of SqueezeNet1_1_Weights.IMAGENET1K_V1"
    )


@pytest.mark.parametrize("crop_mode", ["center", "squash"])
@pytest.mark.parametrize("name", ["resnet10t", "vit_tiny_patch16_224"])
def test_of_timm_they_are_timms_own(name: str, crop_mode: str) -> None:
    data = pytest.importorskip("timm.data")
    from fxprune.cli.preprocessing import of_timm

    model = build(f"timm:{name}", {"num_classes": 4}).model
    model.pretrained_cfg["crop_mode"] = crop_mode
    wanted = data.create_transform(**data.resolve_model_data_config(model), is_training=False)
    found = of_timm(name, model)
    assert torch.allclose(found(picture()), wanted(picture()), atol=1e-6)
    assert found.source == f"timm's data configuration of {name}"
    assert found(picture()).shape[-1] == found.size


OWN = Preparation(
    32, 0.5, (0.1, 0.2, 0.3), (0.5, 0.6, 0.7), geometry=lambda image: torch.ones(3, 5, 5), source="a test"
)


def test_options_win_and_the_rest_is_the_models() -> None:
    assert OWN.with_options(size=None, crop=None, mean=None, std=None) is OWN
    mean = OWN.with_options(mean=(0.5, 0.5, 0.5))
    assert torch.allclose(mean(picture())[:, 0, 0], torch.tensor([0.5 / 0.5, 0.5 / 0.6, 0.5 / 0.7]))
    assert mean.source == "a test, but for --mean"
    sized = OWN.with_options(size=16, std=(1.0, 1.0, 1.0))
    assert (sized.geometry, sized.size, sized.crop, sized.mean) == (None, 16, 0.5, OWN.mean)
    assert sized.source == "a test, but for --image-size, --std"
    assert sized(picture()).shape == (3, 16, 16)
    small = picture(16, 16)
    raw = torch.from_numpy(__import__("numpy").array(small)).permute(2, 0, 1) / 255
    assert torch.allclose(sized(small), raw - torch.tensor(OWN.mean).view(3, 1, 1))  # it has the size already


def test_the_text_says_what_is_done_and_by_whom() -> None:
    assert str(OWN) == "Images: 32 x 32, the middle of 64; mean 0.1, 0.2, 0.3; std 0.5, 0.6, 0.7. From a test."
    assert str(IMAGENET) == (
        "Images: their own size; mean 0.485, 0.456, 0.406; std 0.229, 0.224, 0.225. From the mean and standard "
        "deviation of ImageNet, because the model names none."
    )


def test_commands_say_how_images_are_prepared(project: Path, folder: Path) -> None:
    command = [
        "score",
        "torchvision:squeezenet1_1",
        "--model-arg",
        "num_classes=3",
        "--data",
        folder,
        "--batch-size",
        "4",
    ]
    result = invoke(*command, "--samples", "3", "--exclude", "features.[3-9]*", "--exclude", "features.1?*", "--json")
    assert result.exit_code == 0, result.stderr
    said = (
        "Images: 224 x 224, the middle of 256; mean 0.485, 0.456, 0.406; std 0.229, 0.224, 0.225. From the transforms "
    )
    assert f"{said}of SqueezeNet1_1_Weights.IMAGENET1K_V1." in flat(result.stderr)
    assert json.loads(result.stdout)["images"] == {
        "size": 224, "crop": 0.875, "mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225],
        "interpolation": "bilinear", "source": "the transforms of SqueezeNet1_1_Weights.IMAGENET1K_V1",
    }  # fmt: skip


def test_other_models_have_imagenets_and_callables_prepare_their_own(project: Path, folder: Path) -> None:
    result = invoke("score", "mynets:build", "--data", folder, "--image-size", "8", "--mean", "0.5,0.5,0.5")
    assert result.exit_code == 0, result.stderr
    said = "because the model names none, but for --image-size, --mean."
    assert said in flat(result.stdout)
    content = done("score", "mynets:build", "--data", folder)
    assert (content["images"]["size"], content["images"]["source"]) == (224, IMAGENET.source)
    assert "images" not in done("score", "mynets:build", "--data", "mynets:loader")


def test_options_on_images_that_a_callable_prepares_do_nothing_and_say_so(project: Path) -> None:
    warned = done("score", "mynets:build", "--data", "mynets:loader", "--mean", "0.5,0.5,0.5")["warnings"]
    said = "mynets:loader prepares its images itself, so that --image-size, --crop, --mean and --std do nothing"
    assert warned == [said]


def test_folders_that_are_no_match_for_the_outputs_warn(project: Path, folder: Path) -> None:
    names = sorted(path.name for path in folder.iterdir())
    command = ["score", "mynets:build", "--data", folder, "--image-size", "8"]
    warned = done(*command, "--model-arg", "classes=10")["warnings"]
    assert warned == [
        f"--data {folder} has 3 folders ({', '.join(names)}), one a class, but Net has 10 outputs: folders are "
        "numbered in alphabetical order, so give one for each output"
    ]
    assert done(*command)["warnings"] == []
    assert done(*command, "--model-arg", "classes=10", "--unpack", "mynets:same")["warnings"] == []
    assert done(*command, "--model-arg", "classes=10", "--samples", "5")["warnings"] == warned
    command = ["compress", "mynets:build", "--data", "mynets:loader", "--eval-data", folder, "--image-size", "8"]
    result = invoke(*command, "--model-arg", "classes=4")
    assert f"Warning: --eval-data {folder} has 3 folders ({', '.join(names)}), one a class, but Net" in result.stderr


def test_a_folder_of_splits_is_said_to_be_one(project: Path, folder: Path) -> None:
    for name in ("test", "train"):
        shutil.copytree(folder, project / "sets" / name)
    found = done("score", "mynets:build", "--data", project / "sets", "--image-size", "8")["warnings"]
    assert found == [
        f"--data {project / 'sets'} has 2 folders (test, train), one a class, but Net has 3 outputs: give one of "
        f"them, --data {project / 'sets'}/train"
    ]


def test_a_model_that_fails_on_an_image_is_named_where_it_runs(project: Path, folder: Path) -> None:
    result = invoke("score", "mynets:model", "--data", folder, "--mean", "0.5", "--std", "0.5", "--image-size", "8")
    assert result.exit_code == 1
    assert "Error: Net does not run on the example (RuntimeError: " in result.stderr
    assert result.stderr.endswith("give one batch as its forward takes it; --image-size sets the size of the images\n")


def test_a_folder_that_is_not_there_is_the_first_thing_said(project: Path, folder: Path) -> None:
    near = folder.with_name(f"{folder.name[:-1]}_")
    result = invoke("score", "mynets:build", "--data", near, "--image-size", "8")
    assert result.exit_code == 2
    assert f"there is no folder '{near}'; did you mean {folder}" in flat(result.output)
    assert "prepares its images itself" not in result.output


def test_means_and_deviations_are_as_many(project: Path, folder: Path) -> None:
    result = invoke("score", "mynets:build", "--data", folder, "--mean", "0.5")
    assert result.exit_code == 2
    assert "1 means and 3 standard deviations: give one or three of each" in flat(result.output)


def test_the_loader_of_a_model_takes_its_images(project: Path, folder: Path) -> None:
    built = build("torchvision:resnet50", {"num_classes": 3})
    loader = DataOptions(data=str(folder), batch_size=2).loader(built, Output(json=False, quiet=True), 0)
    assert loader is not None
    images, _ = next(iter(loader))
    path, _ = loader.dataset.samples[0]
    assert torch.equal(images[0], models.ResNet50_Weights.IMAGENET1K_V2.transforms()(Image.open(path).convert("RGB")))


def test_a_missing_package_is_said_before_anything_is_done(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from fxprune.cli.pruning import ResultOptions
    from fxprune.errors import ExportError
    from fxprune.saving import export

    monkeypatch.setattr(export, "EXTRA", ("onnx", "no_such_package"))
    with pytest.raises(ExportError, match="exporting to ONNX needs no_such_package, of the extra export"):
        ResultOptions(export=[Path("net.onnx")]).check()
    ResultOptions(export=[Path("net.pt2")]).check()
    result = invoke("apply", "mynets:broken", "mynets.py", "--export", "net.onnx")
    assert "exporting to ONNX needs no_such_package" in result.stderr
    assert issubclass(ExportError, FxpruneError)
