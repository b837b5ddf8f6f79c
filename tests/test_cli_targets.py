"""Models and their weights by name."""

import pickle

import pytest
import torch
from command_line import typer  # noqa: F401 - skips what follows where it is missing
from safetensors.torch import save_file
from torch import nn

from fxprune.cli.named_objects import arguments_of, build, object_of
from fxprune.cli.weights import with_weights
from fxprune.errors import FxpruneError


def test_values_are_literals_or_text():
    pairs = ["a=1", "b=1.5", "c=(1, 2)", "d=None", "e=resnet", "f='1'", "g=", "h={'x': [1]}", "i=__import__('os')"]
    assert arguments_of(pairs, "--model-arg") == {
        "a": 1, "b": 1.5, "c": (1, 2), "d": None, "e": "resnet", "f": "1", "g": "", "h": {"x": [1]},
        "i": "__import__('os')",
    }  # fmt: skip


def test_arguments_that_json_cannot_hold_make_no_recipe(project):
    built = build("mynets:build", {"notes": (1, 2)})
    assert (built.builder, built.builder_kwargs) == (None, {})


def test_a_model_may_be_named_itself(project):
    built = build("mynets:model", {})
    assert isinstance(built.model, nn.Module)
    assert built.builder is None
    with pytest.raises(FxpruneError, match="mynets:model is a model already, and takes no --model-arg width"):
        build("mynets:model", {"width": 3})


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("nowhere.nets:build", "nowhere.nets:build: there is no module nowhere in .* or installed"),
        ("mynets:biuld", r"mynets:biuld: mynets has no biuld; did you mean build"),
        ("mynets:number", "mynets:number is a int, which cannot be called: name a function or a class"),
        ("mynets:dataset", "mynets:dataset gives a TensorDataset, not a torch.nn.Module"),
        ("torchvision:resnet1", "torchvision has no model 'resnet1'; did you mean resnet1"),
    ],
)
def test_what_cannot_be_named_is_said(project, target, message):
    with pytest.raises(FxpruneError, match=message):
        build(target, {})


def test_a_module_that_fails_is_told_from_one_that_is_not_there(project):
    (project / "half.py").write_text("import mynets\nimport not_there\n")
    (project / "fails.py").write_text("\n1 / 0\n")
    with pytest.raises(FxpruneError, match=r"half:f: half cannot be imported: ModuleNotFoundError: .*not_there"):
        object_of("half:f", "MODEL")
    with pytest.raises(FxpruneError, match=r"fails cannot be imported: ZeroDivisionError: .* \(line 2 of .*fails.py\)"):
        object_of("fails:f", "MODEL")


def test_torchvision_by_name():
    built = build("torchvision:squeezenet1_1", {"num_classes": 4})
    assert built.input_size == (3, 224, 224)
    assert built.builder == "torchvision.models:get_model"
    assert built.builder_kwargs == {"name": "squeezenet1_1", "num_classes": 4}
    assert built.model.num_classes == 4


def test_timm_by_name():
    pytest.importorskip("timm")
    built = build("timm:resnet10t", {"num_classes": 4})
    assert built.input_size == (3, 176, 176)
    assert built.builder == "timm:create_model"
    assert built.model.num_classes == 4
    with pytest.raises(FxpruneError, match="timm has no model 'resnet1t'; did you mean resnet"):
        build("timm:resnet1t", {})


def test_timm_that_is_not_there(monkeypatch):
    monkeypatch.setattr("fxprune.cli.extras.find_spec", lambda name: None)
    with pytest.raises(FxpruneError, match="timm:resnet18 needs timm, which this Python does not have"):
        build("timm:resnet18", {})


def wrapped(state):
    return {"epoch": 3, "state_dict": {f"module.{name}": tensor for name, tensor in state.items()}}


@pytest.mark.parametrize(
    ("write", "name"),
    [(torch.save, "net.pt"), (lambda s, p: torch.save(wrapped(s), p), "net.pt"), (save_file, "net.safetensors")],
    ids=["plain", "wrapped", "safetensors"],
)
def test_weights_by_kind_of_file(tmp_path, write, name):
    first, second = nn.Linear(3, 2), nn.Linear(3, 2)
    write(first.state_dict(), tmp_path / name)
    assert torch.equal(with_weights(second, tmp_path / name).weight, first.weight)


def test_weights_of_another_model_are_told(tmp_path):
    torch.save({"weight": torch.zeros(2, 5), "scale": torch.zeros(1)}, tmp_path / "net.pt")
    message = r"net.pt is not of this Linear: it lacks bias; it has besides scale; it has weight \(2, 5\) in place of"
    with pytest.raises(FxpruneError, match=message):
        with_weights(nn.Linear(3, 2), tmp_path / "net.pt")


def test_files_that_are_no_weights(tmp_path):
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(FxpruneError, match=r"list.pt holds a list that is no state_dict: save model.state_dict\(\)"):
        with_weights(nn.Linear(3, 2), tmp_path / "list.pt")
    (tmp_path / "code.pt").write_bytes(pickle.dumps(test_files_that_are_no_weights, protocol=2))
    with pytest.raises(FxpruneError, match=r"code.pt cannot be read as a state_dict"):
        with_weights(nn.Linear(3, 2), tmp_path / "code.pt")
    (tmp_path / "torn.safetensors").write_bytes(b"\x08")
    with pytest.raises(FxpruneError, match=r"torn.safetensors is no safetensors file, or is cut off"):
        with_weights(nn.Linear(3, 2), tmp_path / "torn.safetensors")
