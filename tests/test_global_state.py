"""Nothing is shared: threads, many calls in a row, and what torch is told to do, give the same as one call alone."""

from __future__ import annotations

import gc
import importlib
import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import numpy as np
import pytest
import torch
from helpers import part_of, picture, same_picture, same_state, squares
from nets import layers
from torch import Tensor, nn
from torch.fx import graph_module as fx_internals
from torch.overrides import TorchFunctionMode
from torch.utils.data import DataLoader, TensorDataset
from zoo import ZOO, images, tensors

import fxprune
from fxprune.errors import CaptureError

IMAGES = images()(40)
BATCHES = [(images()(20), torch.arange(20) % 5), (images()(7), torch.arange(7) % 5)]


def model(name: str = "residual") -> nn.Module:
    return ZOO[name].build().eval()


def shuffled() -> DataLoader[Any]:
    """Batches in an order that is drawn from torch's own generator, as are those of most training loaders."""
    return DataLoader(TensorDataset(IMAGES, torch.arange(40) % 5), batch_size=16, shuffle=True)


def compress(given: nn.Module, loader: Any = BATCHES, **options: Any) -> nn.Module:
    return fxprune.compress(given, loader, 0.3, progress=False, **options)


def tune(given: nn.Module) -> nn.Module:
    pytest.importorskip("lightning_fabric")
    return fxprune.finetune(compress(given), shuffled(), BATCHES, epochs=2, progress=False)


# -- threads -----------------------------------------------------------------------------------------------------------


def at_once(*calls: Callable[[], Any]) -> list[Any]:
    """What calls give that begin together, each in a thread of its own; an error of one is raised here."""
    results: list[Any] = [None] * len(calls)
    start = threading.Barrier(len(calls))

    def run(index: int) -> None:
        start.wait()
        try:
            results[index] = calls[index]()
        except Exception as error:  # noqa: BLE001 - it is raised in the test
            results[index] = error

    threads = [threading.Thread(target=run, args=(index,)) for index in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for result in results:
        if isinstance(result, Exception):
            raise result
    return results


TASKS: dict[str, tuple[str, Callable[[nn.Module], nn.Module]]] = {
    "compress": ("residual", compress),
    "the same again": ("residual", compress),
    "a shuffled loader": ("residual", lambda given: compress(given, shuffled(), seed=1)),
    "random signals": ("squeeze_excite", partial(compress, propose="random", seed=3)),
    "captured by values": ("branch_on_shape", partial(compress, loss=squares)),
    "fine-tuning": ("residual", tune),
}


@pytest.mark.wide
@pytest.mark.parametrize(
    "pair",
    [(0, 1), (3, 2), (4, 5)],
    ids=str,
)
def test_two_threads_at_once_give_what_one_gives_alone(pair: tuple[int, int]) -> None:
    tasks = [list(TASKS.values())[index] for index in pair]
    alone = [task(model(name)) for name, task in tasks]
    given = [model(name) for name, _ in tasks]
    before = [picture(each) for each in given]
    for _ in range(2):
        calls = [partial(task, each) for (_, task), each in zip(tasks, given, strict=True)]
        found = at_once(*calls)
        assert all(same_state(a, b) for a, b in zip(alone, found, strict=True))
    assert all(same_picture(a, picture(each)) for a, each in zip(before, given, strict=True))


@pytest.mark.parametrize("method", ["fx", "values"])
def test_other_threads_run_their_models_while_one_is_traced(method: str) -> None:
    """What tracing replaces in torch, it replaces for all threads."""
    other, x, found = (
        nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)),
        torch.randn(2, 3),
        SimpleQueue[Tensor](),
    )

    def work() -> None:
        found.put(other(x) + torch.zeros(2) + torch.arange(2))

    @layers(lambda: dict(layer=nn.Linear(3, 5)))
    def Waiting(self, x: Tensor) -> Tensor:
        at_once(work)
        return self.layer(x) + torch.zeros(5)

    graph = fxprune.capture(Waiting(), x, method=method)
    results, wanted = [found.get() for _ in range(found.qsize())], other(x) + torch.arange(2)
    assert results
    assert all(type(result) is Tensor and torch.equal(result, wanted) for result in results)
    assert {node.target for node in graph.graph.nodes if node.op == "call_module"} == {"layer"}


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_child_process_does_not_wait_for_threads_that_it_has_not() -> None:
    """A thread of the parent is in the middle of its work when the process is forked."""
    inside, go_on = threading.Event(), threading.Event()

    def loss(output: Tensor, target: Tensor) -> Tensor:
        inside.set()
        assert go_on.wait(60)
        return squares(output)

    thread = threading.Thread(target=lambda: compress(model(), loss=loss))
    thread.start()
    assert inside.wait(60)
    child = os.fork()
    if child == 0:
        fxprune.caller.isolation.undisturbed().__enter__()
        os._exit(7)
    go_on.set()
    thread.join()
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7


# -- many in a row -----------------------------------------------------------------------------------------------------


def held() -> tuple[int, int, int]:
    """Objects that there are, the most memory so far in MiB, and sources of generated code."""
    import resource

    gc.collect()
    unit = 1024 if sys.platform == "darwin" else 1
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024 // unit
    return len(gc.get_objects()), most, len(fx_internals._loader.eval_cache)


@pytest.mark.skipif(os.name == "nt", reason="Windows does not tell the most memory so far in this way")
@pytest.mark.wide
def test_forty_in_a_row_give_the_same_and_leave_nothing() -> None:
    given, batches = model("mlp"), [(tensors(6)(20), torch.arange(20) % 5)]
    first = compress(given, batches)
    compress(given, batches)
    before = held()
    assert all(same_state(first, compress(given, batches)) for _ in range(40))
    after = held()
    assert after[0] - before[0] < 40
    assert after[1] - before[1] < 32
    assert after[2] == before[2]


# -- what torch is told to do ------------------------------------------------------------------------------------------


@contextmanager
def default_dtype() -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextmanager
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(mode=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(mode=False)


WORLDS: dict[str, Callable[[], Any]] = {
    "default dtype": default_dtype,
    "deterministic mode": deterministic,
    "inference mode": torch.inference_mode,
    "no gradients": torch.no_grad,
    "autocast": partial(torch.autocast, "cpu", torch.bfloat16),
    "a device": partial(torch.device, "cpu"),
}


@pytest.mark.parametrize(
    ("world", "task"),
    part_of([*((world, compress) for world in WORLDS), ("inference mode", tune), ("autocast", tune)], 2),
)
def test_what_torch_is_told_makes_no_difference(world: str, task: Callable[[nn.Module], nn.Module]) -> None:
    given = model()
    alone = task(given)
    with WORLDS[world]():
        before = picture(given)
        asked = torch.is_autocast_enabled("cpu"), torch.is_autocast_cache_enabled(), torch.is_inference_mode_enabled()
        found = task(given)
        now = torch.is_autocast_enabled("cpu"), torch.is_autocast_cache_enabled(), torch.is_inference_mode_enabled()
        assert now == asked
        assert same_picture(before, picture(given))
    assert same_state(found, alone)
    assert not any(tensor.is_inference() for tensor in (*found.parameters(), *found.buffers()))


class Precisions(TorchFunctionMode):
    """Notes how convolutions of numbers multiply: on a GPU, and products of matrices on the CPU."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[tuple[Any, ...]] = set()

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is torch.conv2d and type(args[0]) is Tensor and not args[0].is_meta:
            self.seen.add(precisions())
        return function(*args, **(kwargs or {}))


def precisions() -> tuple[str, ...]:
    """How torch was told to multiply: by layers and matrices on a GPU, by matrices on the CPU."""
    backends = torch.backends
    if not hasattr(backends.cudnn, "conv"):
        return "tf32" if backends.cudnn.allow_tf32 else "ieee", torch.get_float32_matmul_precision()
    operations = backends.cudnn.conv, backends.cudnn.rnn, backends.cuda.matmul, backends.mkldnn.matmul
    return tuple(operation.fp32_precision for operation in operations)


@contextmanager
def told_one_by_one() -> Iterator[None]:
    torch.backends.cudnn.rnn.fp32_precision = "ieee"
    torch.backends.mkldnn.matmul.fp32_precision = "bf16"
    try:
        yield
    finally:
        torch.backends.cudnn.rnn.fp32_precision = "tf32"
        torch.backends.mkldnn.matmul.fp32_precision = "ieee"


@contextmanager
def told_at_once() -> Iterator[None]:
    torch.set_float32_matmul_precision("medium")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision("highest")


one_by_one = pytest.param(
    told_one_by_one, marks=pytest.mark.skipif(not hasattr(torch.backends.cudnn, "conv"), reason="needs torch 2.9")
)


@pytest.mark.parametrize("told", [told_at_once, one_by_one])
def test_float32_is_multiplied_in_full_and_torch_told_the_same_afterwards(told: Callable[[], Any]) -> None:
    given, alone = model(), fxprune.score(model(), BATCHES, progress=False)
    with told():
        asked = precisions()
        with Precisions() as while_scored:
            scores = fxprune.score(given, BATCHES, progress=False)
        with Precisions() as while_applied:
            small = fxprune.apply(given, scores.plan(alpha=0.3), loader=BATCHES, compensate="sequential")
        with Precisions() as while_verified:
            plan = scores.plan(alpha=0.3)
            fxprune.verify(given, plan, fxprune.apply(given, plan), images()(3))
        with Precisions() as while_run:
            small(images()(3))
        assert precisions() == asked
    for seen in (while_scored.seen, while_applied.seen, while_verified.seen):
        assert len(seen) == 1
        assert not {"tf32", "bf16", "high", "medium"} & {precision for found in seen for precision in found}
    assert while_run.seen == {asked}
    assert np.array_equal(scores.propose, alone.propose)


def test_a_model_and_batches_that_were_made_in_inference_mode() -> None:
    with torch.inference_mode():
        given, batches = model(), [(x.clone(), y.clone()) for x, y in BATCHES]
    found = compress(given, batches)
    assert same_state(found, compress(model()))
    assert not any(tensor.is_inference() for tensor in (*found.parameters(), *found.buffers()))
    found(images()(3)).sum().backward()


def test_mixed_precision_inside_of_autocast_trains_on_its_newest_weights() -> None:
    """The cache of an outer autocast would keep the weights of the first step."""
    pytest.importorskip("lightning_fabric")
    small = compress(model())
    options = {"epochs": 3, "precision": "bf16-mixed", "progress": False}
    alone = fxprune.finetune(small, BATCHES, BATCHES, **options)
    with torch.autocast("cpu", torch.bfloat16):
        found = fxprune.finetune(small, BATCHES, BATCHES, **options)
    assert same_state(found, alone)
    assert not same_state(found, small)


class Around(nn.Module):
    """Holds a wrapped model."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.head = inner, nn.Linear(5, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.inner(x).relu())


WRAPPERS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "OptimizedModule": partial(torch.compile, backend="eager"),
    "DataParallel": nn.DataParallel,
}


@pytest.mark.parametrize("wrapper", part_of(WRAPPERS, 2))
def test_wrapped_models_are_refused_by_name(wrapper: str) -> None:
    wrapped, inside = WRAPPERS[wrapper](model()), "_orig_mod" if wrapper == "OptimizedModule" else "module"
    message = rf"is wrapped in {wrapper}, .* give what is inside, its \.{inside}, in its place, and wrap what comes"
    calls: list[Callable[[], Any]] = [
        partial(compress, wrapped),
        partial(compress, wrapped, submodule=f"{inside}.a"),
        partial(fxprune.capture, wrapped, images()(2)),
    ]
    for call in calls:
        with pytest.raises(CaptureError, match=f"the model {message}"):
            call()
    with pytest.raises(CaptureError, match=rf"Around\.inner {message}"):
        compress(Around(wrapped))
    assert same_state(compress(getattr(wrapped, inside)), compress(model()))


def test_modules_of_a_package_that_name_each_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a forward names outside of the model is followed once, however often it leads back."""
    package = tmp_path / "circular_package"
    package.mkdir()
    (package / "__init__.py").write_text("from circular_package import one, two\n")
    (package / "one.py").write_text("import circular_package\nfrom circular_package import two\nscale = 2.0\n")
    (package / "two.py").write_text("import circular_package\nimport circular_package.one as one\n")
    monkeypatch.syspath_prepend(tmp_path)
    circular = importlib.import_module("circular_package")

    class Scaled(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            return self[1](self[0](x).relu() * circular.two.one.two.one.scale)

    graph = fxprune.capture(Scaled(nn.Linear(4, 6), nn.Linear(6, 2)).eval(), torch.zeros(2, 4))
    assert [node.name for node in graph.graph.nodes if node.op == "call_module"] == ["_0", "_1"]
