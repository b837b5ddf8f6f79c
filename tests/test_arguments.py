"""Arguments of a wrong type or range: every stage refuses them with an error of its own, before it begins."""

from __future__ import annotations

import inspect
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from nets import layers
from torch import nn

import fxprune
from fxprune.caller.arguments import CHECKS, shown
from fxprune.errors import CalibrationError, CaptureError, FxpruneError, PlanError

X, Y = torch.randn(12, 6), torch.arange(12) % 3
LOADER = [(X, Y)]


@layers(lambda: dict(a=nn.Linear(6, 8), b=nn.Linear(8, 3)))
def Net(self, x: torch.Tensor) -> torch.Tensor:
    """Three layers."""
    return self.b(self.a(x).relu())


MODEL = Net().eval()
SCORES = fxprune.score(MODEL, LOADER, progress=False)
PLAN = SCORES.plan(0.9)
SMALL = fxprune.apply(MODEL, PLAN)
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # torch has newer ways
    SCRIPTED, TRACED = torch.jit.script(Net()), torch.jit.trace(Net(), X)

PER_NAME: dict[str, tuple[Any, type[FxpruneError], str]] = {
    "device": ("nope", FxpruneError, r"device is 'nope', which cannot be used \(Expected one of cpu.*\): name another"),
    "seed": (2**70, FxpruneError, r"seed is 1180591620717411303424; it is a whole number from 0 to 2\*\*63 - 1"),
    "exclude": ([3], FxpruneError, r"exclude is \[3\]; it is a name or glob pattern of names, or module types, or a"),
    "alpha": ("0.3", PlanError, "alpha is '0.3'; it is a share of units and lies between 0 and 1"),
    "latency=": (10**400, PlanError, "latency is a whole number of 1,329 bits; it is a share of the original's laten"),
    "params": (True, PlanError, "params is True; it is a share of the original's parameters: more than 0, at most 1"),
    "params=": (50, PlanError, r"params is 50; it is a share .* more than 0, at most 1; for 50 % pass 0\.5$"),
    "macs": (torch.tensor(0.5), PlanError, "macs is a Tensor; it is a share of the original's MACs"),
    "latency": (float("nan"), PlanError, "latency is nan; it is a share of the original's latency"),
    "macs=": (10**5000, PlanError, "macs is a whole number of 16,610 bits; it is a share"),
    "min_keep": (0, PlanError, r"min_keep is 0; it is a whole number, at least 1 and below 2\*\*31"),
    "round_to": (1.5, PlanError, "round_to is 1.5; it is a whole number"),
    "rounds": (None, PlanError, "rounds is None; it is a whole number"),
    "samples_per_class": (-1, CalibrationError, "samples_per_class is -1; it is a whole number"),
    "max_samples": (2**31, CalibrationError, "max_samples is 2147483648; it is a whole number"),
    "sample_memory": ("1 GB", CalibrationError, "sample_memory is '1 GB'; it is a whole number of bytes"),
    "every": (0, CalibrationError, "every is 0; it is a whole number"),
    "checkpoint": (3, CalibrationError, "checkpoint is 3; it is the path of a file"),
    "loss": (3, CalibrationError, r"loss is 3; it is a function, loss\(output, targets\)"),
    "unpack": ("x", CalibrationError, r"unpack is 'x'; it is a function, unpack\(batch\), which gives"),
    "classes": (3, CalibrationError, r"classes is 3; it is a function, classes\(targets\)"),
    "run": (1, CalibrationError, r"run is 1; it is a function, run\(model, inputs, targets\)"),
    "propose": (7, CalibrationError, "propose is 7; it is one of .*, random, or a function from fxprune.Evidence to"),
    "protect": ("fisher", CalibrationError, "protect is 'fisher'; it is one of separability, "),
    "compensate": (None, PlanError, "compensate is None; it is one of none, bias, ridge, sequential"),
    "allocate": (
        3,
        PlanError,
        r"allocate is 3; it is one of tod, .*, or a function \(propose, protect, groups\) -> lev",
    ),
    "unknown": ("skip", FxpruneError, "unknown is 'skip'; it is one of error, freeze"),
    "submodule": (3, FxpruneError, "submodule is 3; it is the path of a module"),
    "inexact": ("no", FxpruneError, "inexact is 'no'; it is True or False"),
    "progress": (None, FxpruneError, "progress is None; it is True or False"),
    "finetune": ([("epochs", 3)], FxpruneError, r"finetune is \[\['epochs', 3\]\]; it is a dict of arguments"),
    "loader": (None, CalibrationError, "the loader is None, and it gives no batches"),
}


@pytest.mark.parametrize("name", PER_NAME)
def test_an_argument_is_refused_with_its_name_its_value_and_what_it_has_to_be(name: str) -> None:
    value, error, message = PER_NAME[name]
    given = {"model": MODEL, "loader": LOADER, "progress": False, name.rstrip("="): value}
    with pytest.raises(error, match=message):
        fxprune.compress(**given)


def raising(error: Any) -> Callable[..., Any]:
    """A function, or a method, that fails."""

    def fail(*_: Any, **__: Any) -> Any:
        raise error

    return fail


def odd(*, uninitialised: bool = False, **methods: Any) -> nn.Module:
    """A model whose class overrides some methods."""
    kind = type("Odd", (Net,), methods)
    return kind.__new__(kind) if uninitialised else kind()


CYCLE = nn.Sequential(nn.Linear(6, 3), nn.Sequential())
CYCLE[1].append(CYCLE)
MODELS: dict[str, tuple[Any, str]] = {
    "a class": (Net, r"model is the class Net; give an instance of it, Net\(...\)"),
    "a path": (Path("net.pt"), "model is a .*Path; build the model, and load its weights with model.load_state_dict"),
    "a name": ("net.pt", r"model is 'net.pt'; build the model, and .*load_state_dict\(torch.load\(path\)\)"),
    "a state dict": (
        MODEL.state_dict(),
        "model is an OrderedDict; build the model, and load the weights with model.load",
    ),
    "scripted": (
        SCRIPTED,
        "model is a RecursiveScriptModule; it is scripted or traced.*: give the Net that it was made",
    ),
    "traced": (TRACED, "model is a TopLevelTracedModule; it is scripted or traced"),
    "None": (None, "model is None; give a model, an nn.Module"),
    "no __init__": (odd(uninitialised=True), "the model is an Odd that was not initialised: call super"),
    "lazy": (nn.Sequential(nn.LazyLinear(3)), "0.weight of Sequential has no shape yet: run the model once on a batch"),
    "its own part": (
        CYCLE,
        "1.0 is a module that holds itself, through its submodules: keep a reference to it in a li",
    ),
    "no forward": (odd(forward=None), "the forward of Odd has no signature .*: define forward"),
    "builtin": (odd(forward=max), "the forward of Odd has no signature .ValueError.*: define forward"),
    "no list": (
        odd(parameters=lambda _: None),
        r"Odd.parameters fails \(TypeError.*: let it list what nn.Module.param",
    ),
    "names": (odd(named_modules=lambda *_, **__: ["a"]), "Odd.named_modules fails .*: let it list what"),
    "numbers": (odd(buffers=lambda _: [3]), "Odd.buffers gives an int: let it list what nn.Module.buffers does"),
    "lookup": (odd(__getattr__=raising(KeyError)), "__getattr__ of Odd fails on a name that is not there .*Attribute"),
    "the loader": (LOADER, r"model is \[\[a Tensor, a Tensor\]\]; give a model"),
}


@pytest.mark.parametrize(("model", "message"), MODELS.values(), ids=MODELS)
@pytest.mark.parametrize(
    "stage",
    [
        lambda model: fxprune.compress(model, LOADER),
        lambda model: fxprune.score(model, LOADER),
        lambda model: fxprune.capture(model, X),
        lambda model: fxprune.apply(model, PLAN),
        lambda model: fxprune.verify(model, PLAN, SMALL, X),
        lambda model: fxprune.narrow(model, PLAN),
        lambda model: fxprune.Scores.random(model, X),
    ],
    ids=["compress", "score", "capture", "apply", "verify", "narrow", "random"],
)
def test_what_is_given_in_place_of_a_model(stage: Callable[[Any], Any], model: Any, message: str) -> None:
    with pytest.raises(CaptureError, match=message):
        stage(model)


class WordlessError(Exception):
    """Says nothing of itself."""

    def __str__(self) -> str:
        raise ValueError


def without_return(self: nn.Module, mode: bool = True) -> None:
    nn.Module.train(self, mode)


@pytest.mark.parametrize(
    "methods",
    [
        {"train": without_return},
        {"eval": lambda self: without_return(self, mode=False)},
        {"to": lambda *_: None},
        {"state_dict": raising(WordlessError)},
        {"__len__": raising(WordlessError)},
        {"extra_repr": lambda _: 3},
    ],
    ids=lambda methods: next(iter(methods)),
)
def test_methods_that_give_nothing_back_or_are_not_asked(methods: dict[str, Any]) -> None:
    small = fxprune.compress(odd(**methods), LOADER, 0.9, progress=False)
    assert small(X).shape == (12, 3)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (
            odd(train=raising(WordlessError)),
            r"Odd.eval fails \(WordlessError\): look at the methods train, eval, to and",
        ),
        (odd(__deepcopy__=raising(KeyError("a"))), r"Odd cannot be deep-copied \(KeyError: 'a'\): remove what"),
        (odd(__getstate__=raising(StopIteration)), r"Odd cannot be deep-copied \(StopIteration\)"),
        (odd(__getstate__=lambda _: None), "Odd cannot be deep-copied .*_modules"),
        (odd(__deepcopy__=lambda self, _: self), "Odd cannot be deep-copied .the __deepcopy__ of the model gives its"),
        (odd(forward=raising(WordlessError)), r"Odd does not run on the example \(WordlessError\)"),
        (odd(forward=lambda _, x: x.to_sparse()), "the output of Odd holds a tensor of the layout torch.sparse_coo"),
        (odd(forward=lambda _, x: torch.nested.nested_tensor(list(x))), "the output of Odd holds a nested tensor: pad"),
    ],
)
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_methods_that_fail(model: nn.Module, message: str) -> None:
    with pytest.raises(CaptureError, match=message):
        fxprune.compress(model, LOADER, progress=False)


def test_what_is_given_in_place_of_plans_scores_and_graphs() -> None:
    with pytest.raises(PlanError, match=r"plan is a dict; give what Scores.plan or Plan.load gave"):
        fxprune.apply(MODEL, PLAN.to_dict())
    with pytest.raises(PlanError, match=r"scores is a Plan; give what fxprune.score or Scores.load gave"):
        fxprune.apply(MODEL, PLAN, scores=PLAN)
    for graph in (MODEL, SMALL):
        with pytest.raises(CaptureError, match=r"graph is a Net; give what fxprune.capture gave"):
            fxprune.couple(graph)
    with pytest.raises(FxpruneError, match=r"small is a Plan; give a model, an nn.Module"):
        fxprune.report(PLAN)


@pytest.mark.parametrize("stage", [fxprune.compress, fxprune.score])
def test_an_unknown_keyword_names_the_function_that_was_called(stage: Callable[..., Any]) -> None:
    with pytest.raises(TypeError, match=rf"^{stage.__name__}\(\) got an unexpected keyword argument 'foo'$"):
        stage(MODEL, LOADER, foo=1)
    with pytest.raises(TypeError, match=rf"^{stage.__name__}\(\) missing 1 required positional argument: 'loader'$"):
        stage(MODEL)


@pytest.mark.parametrize(
    ("given", "close"), [("round", "'rounds', 'round_to'"), ("max_sample", "'max_samples'"), ("progess", "'progress'")]
)
def test_names_close_to_an_unknown_keyword(given: str, close: str) -> None:
    """`max_samples` is of compress itself, `samples_per_class` one that it hands on."""
    message = rf"^compress\(\) got an unexpected keyword argument '{given}'; close names: {close}"
    with pytest.raises(TypeError, match=message):
        fxprune.compress(MODEL, LOADER, **{given: 1})


@pytest.mark.parametrize(
    ("name", "given", "close"),
    [
        ("propose", "reconstuction", "reconstruction"),
        ("protect", "tailor", "taylor"),
        ("allocate", "unifrom", "uniform"),
        ("compensate", "sequental", "sequential"),
        ("unknown", "freze", "freeze"),
    ],
)
def test_names_close_to_an_unknown_choice(name: str, given: str, close: str) -> None:
    with pytest.raises(FxpruneError, match=f"^{name} is '{given}'; close names: '{close}'.*; it is one of "):
        fxprune.compress(MODEL, LOADER, **{name: given})


def test_names_close_to_modules() -> None:
    net = nn.Sequential()
    net.conv1, net.conv2 = nn.Linear(2, 2), nn.Linear(2, 2)
    batch = torch.zeros(2, 2)
    with pytest.raises(FxpruneError, match=r"^exclude: no module of Sequential matches 'conv11'; close names: 'conv1'"):
        fxprune.couple(fxprune.capture(net, batch), exclude="conv11")
    with pytest.raises(FxpruneError, match=r"leaves: no module of Sequential matches 'cnov\*'; close names: 'conv2'"):
        fxprune.capture(net, batch, leaves="cnov*")
    with pytest.raises(FxpruneError, match=r"no module of that name; close names: 'conv2', 'conv1'$"):
        fxprune.score(net, [(batch, torch.tensor([0, 1]))], submodule="conv")


def test_names_close_to_an_option_of_finetune() -> None:
    pytest.importorskip("lightning_fabric")
    options = {"train_loader": LOADER, "val_loader": LOADER, "epoch": 3}
    with pytest.raises(FxpruneError, match=r"keyword argument 'epoch'; close names: 'epochs'\): see fxprune"):
        fxprune.compress(MODEL, LOADER, finetune=options)


def test_functions_that_do_not_give_what_they_should() -> None:
    pytest.importorskip("lightning_fabric")
    with pytest.raises(PlanError, match=r"allocate= fails \(ValueError: could not .*'x'\): a function \(propose"):
        SCORES.plan(0.1, allocate=lambda *_: "x")
    with pytest.raises(CalibrationError, match=r"the signal <lambda> fails on what scoring found \(ValueError"):
        fxprune.score(MODEL, LOADER, propose=lambda _: "x", progress=False)
    with pytest.raises(CalibrationError, match=r"optimizer= fails on the parameters of Net \(TypeError"):
        fxprune.finetune(SMALL, LOADER, LOADER, optimizer=nn.Linear, progress=False)
    with pytest.raises(CalibrationError, match=r"metric= fails on the model before its first epoch, batch 0 .*'str'"):
        fxprune.finetune(SMALL, LOADER, LOADER, metric=lambda *_: "x", progress=False)
    with pytest.raises(CalibrationError, match=r"the model fails on the example \(RuntimeError: mat1 and mat2"):
        SCORES.with_latency(MODEL, X[:, :3], repeats=1)
    with pytest.raises(CalibrationError, match=r"example= fails on a batch of 2 \(TypeError.*a function from a batch"):
        fxprune.measure_latency(MODEL, SMALL, nn.Linear, (2,), repeats=1)


def test_a_value_that_cannot_be_asked_for_its_class() -> None:
    class Asked:
        @property
        def __class__(self) -> type:  # type: ignore[override]
            raise RuntimeError("not now")

    with pytest.raises(FxpruneError, match="loader cannot be looked at: it raises RuntimeError: not now"):
        fxprune.score(MODEL, Asked())  # type: ignore[arg-type]


def test_numbers_of_numpy_are_numbers(tmp_path: Path) -> None:
    seed, one = np.int64(3), np.int32(1)
    options = {"min_keep": one, "round_to": one, "samples_per_class": np.uint8(4), "propose": "separability"}
    found = fxprune.score(MODEL, LOADER, seed=seed, **options, checkpoint=tmp_path / "pass", progress=False)
    found.save(tmp_path / "scores")
    plan = fxprune.Scores.load(tmp_path / "scores").plan(np.float32(0.5))
    assert json.loads(json.dumps(plan.to_dict()))["alpha"] == 0.5
    assert fxprune.Scores.random(MODEL, X, seed=seed).about == {"model": "Net", "random": 3}
    small = fxprune.compress(MODEL, LOADER, np.float64(0.9), seed=seed, progress=False)
    assert fxprune.report(small).alpha == 0.9


# -- any wrong argument ------------------------------------------------------------------------------------------------

STAGES: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
    "compress": (fxprune.compress, {"model": MODEL, "loader": LOADER, "progress": False}),
    "score": (fxprune.score, {"model": MODEL, "loader": LOADER, "progress": False}),
    "plan": (SCORES.plan, {}),
    "apply": (fxprune.apply, {"model": MODEL, "plan": PLAN}),
    "verify": (fxprune.verify, {"model": MODEL, "plan": PLAN, "small": SMALL, "example": X}),
    "load": (fxprune.load, {"path": "small.safetensors", "model": MODEL}),
    "save": (fxprune.save, {"small": SMALL, "path": "out.safetensors"}),
    "capture": (fxprune.capture, {"model": MODEL, "example": X}),
    "narrow": (fxprune.narrow, {"model": MODEL, "plan": PLAN}),
}
PLACES = [
    (stage, name)
    for stage, (function, _) in STAGES.items()
    for name, parameter in inspect.signature(function).parameters.items()
    if parameter.kind is not parameter.VAR_KEYWORD
]
WRONG = [
    None, True, 0, -1, 1.5, 2**70, float("nan"), float("inf"), 1j, "x", "", b"x", "a\0b", [], [3], [None], (), {},
    {"a": 1}, {3: 4}, set(), range(3), iter([1]), object(), print, int, Net, Net(), nn.Sequential(), MODEL.state_dict(),
    torch.randn(3), X[:0], torch.float32, torch.device("meta"), "meta", "cuda:7", np.float32(0.3), np.arange(3),
    SCRIPTED, TRACED, SMALL, fxprune.capture(MODEL, X), PLAN, SCORES, LOADER, {"labels": Y}, (X, Y), lambda *_: None,
    lambda *_: "x",
]  # fmt: skip


@pytest.mark.filterwarnings("ignore::fxprune.FxpruneWarning")
@settings(max_examples=200)
@given(place=st.sampled_from(PLACES), value=st.sampled_from(WRONG))
def test_any_argument_gives_a_result_or_an_error_of_ours(
    place: tuple[str, str], value: Any, tmp_path_factory: pytest.TempPathFactory
) -> None:
    function, given = STAGES[place[0]]
    folder = tmp_path_factory.getbasetemp() / "arguments"
    with pytest.MonkeyPatch.context() as patch:
        folder.mkdir(exist_ok=True)
        patch.chdir(folder)
        fxprune.save(SMALL, "small.safetensors")
        try:
            found = function(**{**given, place[1]: value})
        except FxpruneError as error:
            found = str(error)
            assert found
    assert found is None or isinstance(found, (str, float, nn.Module, fxprune.Plan, fxprune.Scores))


def test_every_shared_argument_is_in_the_table() -> None:
    free = {"example", "other", "path"}
    for stage, name in PLACES:
        assert name in CHECKS or name in free, (stage, name)


def test_values_are_shown_in_a_few_words() -> None:
    assert shown("a" * 99) == f"'{'a' * 59}..."
    assert shown([1, "b", None, 4]) == "[1, 'b', None, ...]"
    assert shown(np.float32(0.5)) == "0.5"
    assert shown(X) == "a Tensor"
    assert shown("\x1b[31m") == r"'\x1b[31m'"
