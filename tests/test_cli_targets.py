"""Models and their weights by name."""

import argparse
import pickle

import numpy as np
import pytest
import torch
from command_line import typer  # noqa: F401 - skips what follows where it is missing
from safetensors.torch import save_file
from torch import nn

from fxprune.cli.named_objects import arguments_of, build, object_of
from fxprune.cli.weights import with_weights
from fxprune.errors import FxpruneError, FxpruneWarning


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
        ("nowhere.nets:build", "nowhere.nets:build: there is no module nowhere in .* or installed$"),
        ("mynet:build", "mynet:build: there is no module mynet in .* or installed; did you mean mynets?"),
        ("torchvison:resnet18", "there is no module torchvison in .* or installed; did you mean torchvision?"),
        ("mynets:biuld", r"mynets:biuld: mynets has no biuld; did you mean build"),
        ("mynets:number", "mynets:number is an int, which cannot be called: name a function or a class"),
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
    message = (
        r"net.pt is not of this Linear: it lacks bias; it has besides scale; it has weight \(2, 5\) in place of "
        r"\(2, 3\); 0 of its 2 entries fit; build the model with the same --model-arg as in training, or name other "
        "weights with --weights-key"
    )
    with pytest.raises(FxpruneError, match=message):
        with_weights(nn.Linear(3, 2), tmp_path / "net.pt")


def net():
    return nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))


class Outer(nn.Module):
    def __init__(self):
        super().__init__()
        self.backbone = net()


def averaged(model):
    from torch.optim.swa_utils import AveragedModel

    return AveragedModel(model).state_dict()


def prefixed(state, prefix):
    return {f"{prefix}{name}": tensor for name, tensor in state.items()}


KEPT = {
    "model": lambda m: {"model": m.state_dict(), "epoch": 3},
    "model_state_dict": lambda m: {"model_state_dict": m.state_dict(), "optimizer": {"state": {}}},
    "net": lambda m: {"net": m.state_dict(), "acc": np.float64(0.5), "step": np.int64(3)},
    "model_ema": lambda m: {"model_ema": prefixed(m.state_dict(), "module.")},
    "params": lambda m: {"params": m.state_dict(), "args": argparse.Namespace(lr=0.1)},
    "nested": lambda m: {"module": {"state_dict": m.state_dict()}},
    "lightning": lambda m: {"state_dict": prefixed(m.state_dict(), "model."), "hyper_parameters": {"lr": 1}},
    "averaged": lambda m: {"ema": averaged(m)},
    "compiled in parallel": lambda m: prefixed(m.state_dict(), "module._orig_mod."),
    "any prefix": lambda m: prefixed(m.state_dict(), "encoder.trunk."),
}


@pytest.mark.parametrize("kept", KEPT.values(), ids=KEPT)
def test_checkpoints_as_training_scripts_keep_them(tmp_path, kept):
    first = net()
    torch.save(kept(first), tmp_path / "net.pt")
    for second in (net(), Outer()):  # the names of the second have a prefix of their own
        found = with_weights(second, tmp_path / "net.pt")
        assert torch.equal(getattr(found, "backbone", found)[0].weight, first[0].weight)


def test_a_dict_that_holds_itself_is_no_state_dict(tmp_path):
    content = {"epoch": 3}
    content["model"] = content
    torch.save(content, tmp_path / "net.pt")
    with pytest.raises(FxpruneError, match=r"net.pt holds no state_dict under .* it has epoch, model \(2 entries\)"):
        with_weights(net(), tmp_path / "net.pt")


def test_a_prefix_that_not_all_names_share_is_kept(tmp_path):
    torch.save(prefixed(net().state_dict(), "model.") | {"loss.weight": torch.ones(2)}, tmp_path / "net.pt")
    with pytest.raises(FxpruneError, match=r"it lacks 0\.weight, .* and 4 more; it has besides model\.0\.wei"):
        with_weights(net(), tmp_path / "net.pt")


def test_one_of_several_weights_is_taken_and_said(tmp_path):
    first, second, small = net(), net(), nn.Linear(3, 2)
    torch.save({"ema": second.state_dict(), "model": first.state_dict(), "net": small.state_dict()}, tmp_path / "a.pt")
    with pytest.warns(
        FxpruneWarning, match=r"a.pt has weights under model and ema: took model; --weights-key names an"
    ):
        assert torch.equal(with_weights(net(), tmp_path / "a.pt")[0].weight, first[0].weight)
    assert torch.equal(with_weights(net(), tmp_path / "a.pt", "ema")[0].weight, second[0].weight)
    assert torch.equal(with_weights(nn.Linear(3, 2), tmp_path / "a.pt").weight, small.weight)  # the only one that fits


def test_weights_under_a_key(tmp_path):
    first = net()
    content = {"student": {"weights": {"state_dict": first.state_dict()}}, "a.b": first.state_dict(), "epoch": 3}
    torch.save(content, tmp_path / "net.pt")
    for key in ("student.weights.state_dict", "student.weights", "a.b"):
        assert torch.equal(with_weights(net(), tmp_path / "net.pt", key)[0].weight, first[0].weight)


@pytest.mark.parametrize(
    ("key", "message"),
    [
        (
            None,
            r"no state_dict .*: name its place with .*-key, --weights-key weights say; it has weights \(7 entries\)",
        ),
        ("wieghts", "has no wieghts for --weights-key: it has weights, epoch; did you mean weights?"),
        ("weights.ema", "has no ema for --weights-key: it has 0.weight, 0.bias, 1.weight and 4 more"),
        ("epoch", "--weights-key epoch names no state_dict in .*net.pt, which has weights"),
        ("epoch.model", "has no model for --weights-key: it has $"),
    ],
)
def test_weights_that_are_not_where_they_are_looked_for(tmp_path, key, message):
    torch.save({"weights": net().state_dict(), "epoch": 3}, tmp_path / "net.pt")
    with pytest.raises(FxpruneError, match=message):
        with_weights(net(), tmp_path / "net.pt", key)


def test_where_weights_were_found_is_said_of_those_that_do_not_fit(tmp_path):
    torch.save({"model": {"0.weight": torch.zeros(2, 3), "1.weight": torch.zeros(4)}}, tmp_path / "net.pt")
    message = (
        r"net.pt, under model, is not of this Sequential: it lacks .* and 2 more; it has 1.weight \(4,\) in place "
    )
    with pytest.raises(FxpruneError, match=message + r"of \(2,\); 1 of its 2 entries fit"):
        with_weights(net(), tmp_path / "net.pt")


def test_an_error_of_torch_is_whole_where_all_names_fit(tmp_path):
    class Old(nn.Linear):
        def _load_from_state_dict(self, *arguments):
            arguments[-1].append("made before version 2, which had another layout")

    torch.save(nn.Linear(3, 2).state_dict(), tmp_path / "net.pt")
    with pytest.raises(
        FxpruneError, match="loading state_dict for Old: made before version 2, which had another layout;"
    ):
        with_weights(Old(3, 2), tmp_path / "net.pt")


def test_files_that_are_no_weights(tmp_path):
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(FxpruneError, match=r"list.pt holds a list that is no state_dict: save model.state_dict\(\)"):
        with_weights(nn.Linear(3, 2), tmp_path / "list.pt")
    (tmp_path / "code.pt").write_bytes(pickle.dumps(test_files_that_are_no_weights, protocol=2))
    with pytest.raises(
        FxpruneError, match=r"code.pt cannot be read as a state_dict \(it needs the code of \S*test_files"
    ):
        with_weights(nn.Linear(3, 2), tmp_path / "code.pt")
    torch.save(net(), tmp_path / "model.pt")
    message = r"needs the code of torch\.nn\.modules\.container\.Sequential, which may do anything\): save model.state"
    with pytest.raises(FxpruneError, match=message):
        with_weights(net(), tmp_path / "model.pt")
    (tmp_path / "cut.pt").write_bytes((tmp_path / "model.pt").read_bytes()[:200])
    with pytest.raises(
        FxpruneError, match=r"cut.pt cannot be read as a state_dict \(it is cut off, or of other kind\)"
    ):
        with_weights(net(), tmp_path / "cut.pt")
    (tmp_path / "torn.safetensors").write_bytes(b"\x08")
    with pytest.raises(FxpruneError, match=r"torn.safetensors is no safetensors file, or is cut off"):
        with_weights(nn.Linear(3, 2), tmp_path / "torn.safetensors")


def test_an_unknown_argument_of_a_callable(project):
    with pytest.raises(FxpruneError) as raised:
        build("mynets:build", {"clases": 3})
    assert str(raised.value).endswith("unexpected keyword argument 'clases'; did you mean classes?")
    assert "named_objects.py" not in str(raised.value)


@pytest.mark.parametrize(("weights", "close"), [("DEFALT", "; did you mean DEFAULT[?]"), ("mine", "$")])
def test_unknown_weights_of_torchvision(weights, close):
    message = f"torchvision:resnet18 has no weights '{weights}'; it has IMAGENET1K_V1, DEFAULT{close}"
    with pytest.raises(FxpruneError, match=message):
        build("torchvision:resnet18", {"weights": weights})
