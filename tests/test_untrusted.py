"""Files that nobody vouches for end in an error of ours; files that are being written are whole or not there."""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import io
import json
import os
import re
import subprocess
import sys
import warnings
import zipfile
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import outputs, same_state
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load, save
from torch.utils import _pytree as pytree
from zoo import ZOO

import fxprune
from fxprune import FxpruneError, Plan, Scores
from fxprune.caller import arrays
from fxprune.caller.tensors import bytes_of
from fxprune.recovery import epoch_checkpoint as checkpoint
from fxprune.reporting.html.page import page
from fxprune.saving.container import read_artifact
from fxprune.tracing.settings import FREE, example_for

CASE = ZOO["mlp_batchnorm_dropout"]
FAST, SLOW = 80, 3000  # mutations of each file, in each of two ways


def times(count: int) -> settings:
    """Settings for so many attempts."""
    return settings(max_examples=count, suppress_health_check=list(HealthCheck), database=None)


def scored() -> Scores:
    """Scores with everything in them that a file can hold."""
    model = CASE.build().eval()
    inputs = CASE.example(4)
    scores = fxprune.score(model, [(inputs, torch.arange(4) % 2)], progress=False)
    return scores.with_latency(model, repeats=1)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The bytes of a file of each kind."""
    folder, scores, model = tmp_path_factory.mktemp("files"), scored(), CASE.build().eval()
    plan = scores.plan(params=0.7)
    plan.save(folder / "plan")
    scores.save(folder / "scores")
    batches = [(CASE.example(8), torch.arange(8) % 2)]
    small = fxprune.apply(model, plan, scores=scores, loader=batches, compensate="ridge")
    if find_spec("lightning_fabric"):
        small = fxprune.finetune(small, batches, batches, epochs=1, progress=False)
    fxprune.measure_latency(model, small, CASE.example(2), (1,), repeats=1)
    fxprune.save(small, folder / "model")
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def read_plan(path: Path) -> None:
    plan = Plan.load(path)
    assert str(plan).startswith("plan")
    assert Plan.from_dict(plan.to_dict()).to_dict() == plan.to_dict()
    fxprune.apply(CASE.build(), plan)


def read_scores(path: Path) -> None:
    scores = Scores.load(path)
    for options in ({"alpha": 0.3}, {"params": 0.9}, {"macs": 0.9}):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", fxprune.FxpruneWarning)  # of MACs that are inexact
            scores.plan(**options)
    if scores.times is not None:
        scores.times.estimate(np.ones(len(scores.propose), dtype=bool))


def read_model(path: Path) -> None:
    """What loads after all is what was saved."""
    header, _ = read_artifact(path)
    for part in header.parts:
        read_report(part.report)
    model = fxprune.load(path, CASE.build())
    found = outputs(model, CASE.example(2))
    assert all(t.isfinite().all() for t in found)


def read_report(report: fxprune.Report) -> None:
    """A report that can be read can be shown, too."""
    assert "</html>" in page(report)
    assert str(report)
    assert str(report.compare(report))


READ: dict[str, Callable[[Path], None]] = {"plan": read_plan, "scores": read_scores, "model": read_model}
every_kind = pytest.mark.parametrize("kind", READ)


def try_to_read(kind: str, content: bytes, folder: Path) -> bool:
    """Whether a file of this content can be read; any failure but one of ours is one of the test."""
    path = folder / f"mutated-{kind}"
    path.write_bytes(content)
    try:
        READ[kind](path)
    except FxpruneError:
        return False
    return True


# -- damage to bytes ---------------------------------------------------------------------------------------------------

places = st.floats(0, 1, exclude_max=True)
edits = st.one_of(
    st.tuples(st.just("flip"), places, st.integers(0, 7)),
    st.tuples(st.just("byte"), places, st.integers(0, 255)),
    st.tuples(st.just("cut"), places, st.just(0)),
    st.tuples(st.just("drop"), places, st.integers(1, 200)),
    st.tuples(st.just("twice"), places, st.integers(1, 200)),
    st.tuples(st.just("early"), places, st.integers(0, 255)),  # a byte of the first hundred, where the lengths are
)


def edited(content: bytes, how: str, where: float, what: int) -> bytes:
    """The bytes of a file after one change."""
    data, at = bytearray(content), int(where * len(content))
    if how == "flip" and data:
        data[at] ^= 1 << what
    elif how == "byte" and data:
        data[at] = what
    elif how == "early" and data:
        data[int(where * min(len(data), 100))] = what
    elif how == "cut":
        del data[at:]
    elif how == "drop":
        del data[at : at + what]
    elif how == "twice":
        data[at:at] = data[at : at + what]
    return bytes(data)


some_or_many = pytest.mark.parametrize("count", [FAST, pytest.param(SLOW, marks=pytest.mark.slow)])


@some_or_many
@every_kind
def test_damaged_bytes(kind: str, count: int, files: dict[str, bytes], tmp_path: Path) -> None:
    assert try_to_read(kind, files[kind], tmp_path)

    @times(count)
    @given(changes=st.lists(edits, min_size=1, max_size=3))
    def attempt(changes: list[tuple[str, float, int]]) -> None:
        content = files[kind]
        for change in changes:
            content = edited(content, *change)
        if content != files[kind]:
            try_to_read(kind, content, tmp_path)

    attempt()


# -- files that are well made, and say odd things ----------------------------------------------------------------------

odd = st.one_of(
    st.none(), st.booleans(), st.integers(-(2**70), 2**70), st.integers(-3, 12), st.floats(), st.text(max_size=5),
    st.just([]), st.just({}), st.lists(st.integers(-3, 12), max_size=4), st.just([[[]]]),
    st.just({"tensor": [1 << 40, 1 << 40], "dtype": "float32"}), st.just("\ud800"),
)  # fmt: skip


def spots(content: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The paths of all entries of nested JSON."""
    inner = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    for key, value in inner:
        yield (*path, key)
        yield from spots(value, (*path, key))


def replaced(content: Any, where: float, value: Any, *, drop: bool) -> Any:
    """Nested JSON with one entry taken out, or another in its place."""
    found = list(spots(content))
    path = found[int(where * len(found))]
    content = json.loads(json.dumps(content))
    inner = content
    for key in path[:-1]:
        inner = inner[key]
    if drop:
        del inner[path[-1]]
    else:
        inner[path[-1]] = value
    return content


def with_notes(kind: str, content: bytes, change: Callable[[Any], Any]) -> bytes:
    """A file whose JSON was changed, with all checksums right again."""
    if kind == "plan":
        return json.dumps(change(json.loads(content))).encode()
    if kind == "scores":
        with zipfile.ZipFile(io.BytesIO(content)) as file:
            held = {name.removesuffix(".npy"): np.load(io.BytesIO(file.read(name))) for name in file.namelist()}
        held["header"] = np.frombuffer(
            json.dumps(change(json.loads(held["header"].tobytes()))).encode(), dtype=np.uint8
        )
        return archived(held)
    size = int.from_bytes(content[:8], "little")
    notes = json.loads(content[8 : 8 + size])["__metadata__"]
    text = json.dumps(change(json.loads(notes["fxprune"])))
    notes |= {"fxprune": text, "sha256": hashlib.sha256(text.encode()).hexdigest()}
    return save(load(content), notes)


def archived(held: dict[str, Any]) -> bytes:
    file = io.BytesIO()
    np.savez_compressed(file, **held)
    return file.getvalue()


@some_or_many
@every_kind
def test_odd_notes(kind: str, count: int, files: dict[str, bytes], tmp_path: Path) -> None:
    assert try_to_read(kind, with_notes(kind, files[kind], lambda notes: notes), tmp_path)

    @times(count)
    @given(where=places, value=odd, drop=st.booleans())
    def attempt(where: float, value: Any, drop: bool) -> None:
        changed = with_notes(kind, files[kind], lambda notes: replaced(notes, where, value, drop=drop))
        try_to_read(kind, changed, tmp_path)

    attempt()


strange = st.one_of(
    st.integers(-5, 10**6).map(lambda n: np.full(3, n)),
    st.just(np.zeros(0, dtype=np.int64)), st.just(np.array(3)), st.just(np.zeros((2, 2))),
    st.just(np.array(["a"])), st.just(np.full(4, np.nan)), st.just(np.zeros(3, dtype=np.float16)),
)  # fmt: skip


def test_odd_arrays(files: dict[str, bytes], tmp_path: Path) -> None:
    with np.load(io.BytesIO(files["scores"])) as content:
        held = dict(content)

    @times(FAST)
    @given(name=st.sampled_from(sorted(set(held) - {"header"})), array=strange, shift=st.integers(-3, 3))
    def attempt(name: str, array: Any, shift: int) -> None:
        other = held[name] + shift if shift and held[name].dtype.kind in "if" else array
        try_to_read("scores", archived(held | {name: other}), tmp_path)

    attempt()


WRONG = {
    "plan": (lambda notes: notes | {"fxprune_plan": 99}, "has plan format 99, this fxprune reads 1: update it"),
    "scores": (lambda notes: notes | {"fxprune_scores": 99}, "has score format 99, this fxprune reads 3: update it"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_versions_to_come(kind: str, files: dict[str, bytes], tmp_path: Path) -> None:
    change, text = WRONG[kind]
    (tmp_path / kind).write_bytes(with_notes(kind, files[kind], change))
    with pytest.raises(fxprune.PlanError, match=text):
        READ[kind](tmp_path / kind)


@every_kind
def test_a_way_of_capture_that_was_removed(kind: str, files: dict[str, bytes], tmp_path: Path) -> None:
    def change(notes: Any) -> Any:
        settings = notes["parts"][0]["plans"][0]["settings"] if kind == "model" else notes["settings"]
        assert settings["method"] == "fx"
        settings["method"] = "export"
        return notes

    (tmp_path / kind).write_bytes(with_notes(kind, files[kind], change))
    with pytest.raises(
        FxpruneError, match=f'{kind} was made with method="export", a way of capture that was removed: score the model'
    ):
        READ[kind](tmp_path / kind)


@every_kind
def test_files_that_are_not_there(kind: str, tmp_path: Path) -> None:
    with pytest.raises(FxpruneError, match="nothing cannot be read"):
        READ[kind](tmp_path / "nothing")
    with pytest.raises(FxpruneError, match="cannot be read"):
        READ[kind](tmp_path)  # a folder


def test_scores_that_contradict_themselves(files: dict[str, bytes], tmp_path: Path) -> None:
    (tmp_path / "scores").write_bytes(with_notes("scores", files["scores"], lambda notes: notes | {"min_keep": 2**70}))
    with pytest.raises(fxprune.PlanError, match=r"min_keep and round_to: .* contradict"):
        Scores.load(tmp_path / "scores")
    with np.load(io.BytesIO(files["scores"])) as content:
        held = dict(content)
    for name, array, text in (
        ("site0", held["site0"] + 10_000, "the units of .* contradict"),
        ("propose", held["propose"][:-1], "contradict"),
        ("propose", np.full_like(held["propose"], np.nan), "propose: .* contradict"),
        ("costs_params_axes", held["costs_params_axes"] + 10_000, "products: .* contradict"),
        ("propose", np.array(["pickled?"]), "which are no numbers"),
    ):
        (tmp_path / "scores").write_bytes(archived(held | {name: array}))
        with pytest.raises(fxprune.PlanError, match=text):
            Scores.load(tmp_path / "scores")


def test_objects_in_an_archive_are_not_unpickled(files: dict[str, bytes], tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(tmp_path / "unpickled"),)

    with np.load(io.BytesIO(files["scores"])) as content:
        held = dict(content)
    (tmp_path / "scores").write_bytes(archived(held | {"propose": np.array([Bomb()], dtype=object)}))
    with pytest.raises(fxprune.PlanError, match="holds object, which are no numbers"):
        Scores.load(tmp_path / "scores")
    torch.save({"settings": Bomb()}, tmp_path / "tuning")
    with pytest.raises(FxpruneError, match="is not a checkpoint that finetune wrote"):
        checkpoint.read(tmp_path / "tuning", {}, torch.device("cpu"))
    assert not (tmp_path / "unpickled").exists()


# -- files that would grow ---------------------------------------------------------------------------------------------

GROWING = """
import io, json, resource, sys, zipfile
sys.path[:0] = {paths!r}
from pathlib import Path
import numpy as np
import torch
import fxprune
from fxprune import FxpruneError, Plan, Scores

root = Path({root!r})

def sparse(name, start, size):
    with (root / name).open("wb") as file:
        file.write(start)
        file.truncate(size)
    return root / name

def archive(name, head, data=b"", zeros=0):
    with zipfile.ZipFile(root / name, "w", zipfile.ZIP_DEFLATED) as file, file.open("header.npy", "w") as content:
        content.write(head)
        content.write(data)
        for _ in range(zeros):
            content.write(bytes(1 << 20))
    return root / name

def head(shape, text=None):
    made = io.BytesIO()
    np.lib.format.write_array_header_1_0(made, dict(descr="<f8", fortran_order=False, shape=shape))
    return made.getvalue()

def text(name, content):
    (root / name).write_text(content)
    return root / name

def applied(path):
    fxprune.apply(torch.nn.Linear(16384, 2), Plan.load(path))

plan = '{{"fxprune_plan": 1, "alpha": null, "frozen": {{}}, "settings": {{}}, "example": %s, "sites": {{}}}}'
tries = [
    (fxprune.load, sparse("a", (1 << 62).to_bytes(8, "little"), 100)),
    (fxprune.load, sparse("b", (1 << 33).to_bytes(8, "little"), 1 << 34)),
    (fxprune.load, sparse("c", (90 << 20).to_bytes(8, "little"), 1 << 33)),
    (fxprune.load, sparse("d", (1000).to_bytes(8, "little") + b'{{"a":{{"dtype":"F32","shape":[9999999999],'
     b'"data_offsets":[0,39999999996]}}}}'.ljust(1000), 4000)),
    (Scores.load, archive("e", head((10**12,)))),
    (Scores.load, archive("f", head((1 << 28,)), zeros=700)),
    (Scores.load, archive("g", head((-5, -5)))),
    (Scores.load, archive("h", b"\\x93NUMPY\\x02\\x00\\xff\\xff\\xff\\x7f", b"x" * 100)),
    (Scores.load, sparse("i", b"PK", 1 << 34)),
    (Plan.load, sparse("j", b"", 1 << 34)),
    (Plan.load, text("k", "[" * 200_000 + "]" * 200_000)),
    (Plan.load, text("l", plan % ("[" * 900 + "]" * 900))),
    (Plan.load, text("m", plan % '{{"tensor": [4294967296, 4294967296], "dtype": "float32"}}')),
    (Plan.load, text("n", plan % ("1" * 100_000))),
    (applied, text("p", plan % '{{"tensor": [4096, 16384], "dtype": "float64"}}')),
    (applied, text("q", plan % ('[' + '{{"tensor": [2, 3, 512, 512], "dtype": "float32"}},' * 40 + 'null]'))),
    (applied, text("r", plan % '{{"tensor": [2, 3], "dtype": "qint8"}}')),
    (Plan.load, text("o", plan.replace('"sites": {{}}', '"sites": {{"a": {{"of": 1e400, "keep": [0]}}}}') % "null")),
]
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
resource.setrlimit(resource.RLIMIT_CPU, (60, 60))
for load, path in tries:
    try:
        load(path)
    except FxpruneError:
        continue
    raise SystemExit(f"{{path.name}} was read")
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) >> 10)
"""


@pytest.mark.wide
@pytest.mark.skipif(os.name == "nt", reason="limits of processes")
def test_files_that_would_take_all_memory_or_time(tmp_path: Path) -> None:
    paths = [str(Path(fxprune.__file__).parents[1])]
    code = GROWING.format(paths=paths, root=str(tmp_path))
    ended = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True, timeout=300)
    assert ended.returncode == 0, ended.stderr + ended.stdout
    assert int(ended.stdout) < 600, "MiB of memory were taken"


sizes = st.one_of(st.integers(0, 8), st.integers(0, 1 << 16), st.sampled_from([1 << 20, 1 << 31]))
tensors_said = st.fixed_dictionaries({
    "tensor": st.lists(sizes, max_size=4),
    "dtype": st.sampled_from(["float64", "float32", "bfloat16", "int64", "bool", "complex64", "qint8", "float8_e5m2"]),
    "largest": st.integers(-3, 300),
})  # fmt: skip
examples = st.recursive(
    st.one_of(tensors_said, st.none()),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=3), inner, max_size=3)),
)


@times(FAST)
@given(description=examples)
def test_an_example_is_made_in_proportion_to_the_model(description: Any) -> None:
    model = CASE.build()
    plan = {"fxprune_plan": 1, "alpha": None, "frozen": {}, "settings": {}, "example": description, "sites": {}}
    try:
        made = example_for(model, Plan.from_dict(plan).example)
    except fxprune.PlanError:
        return
    assert sum(t.nbytes for t in pytree.tree_leaves(made) if isinstance(t, torch.Tensor)) <= FREE + bytes_of(model)


def test_an_example_out_of_proportion_says_what_to_do() -> None:
    plan = Scores.random(CASE.build(), CASE.example(2)).plan(alpha=0.5)
    large = dataclasses.replace(plan, example=[{"tensor": [2, 5_000_000], "dtype": "float32"}])
    said = r"40,000,000 bytes, more than the 33,\d{3},\d{3} that are made for a .*: score smaller samples, or capture"
    with pytest.raises(fxprune.PlanError, match=said):
        fxprune.apply(CASE.build(), large)
    graph = fxprune.capture(CASE.build(), CASE.example(2))
    assert same_state(fxprune.apply(graph, large), fxprune.apply(graph, plan))


# -- writing -----------------------------------------------------------------------------------------------------------


def writers() -> dict[str, Callable[[Path], None]]:
    scores = Scores.random(CASE.build(), CASE.example(2))
    plan = scores.plan(alpha=0.5)
    small = fxprune.apply(CASE.build(), plan)
    return {
        "plan": plan.save,
        "scores": scores.save,
        "model": lambda path: fxprune.save(small, path),
        "tuning": lambda path: checkpoint.write(path, {}, small.state_dict()),
        "arrays": lambda path: arrays.write(path, {"a": np.zeros(3)}, FxpruneError),
    }


@pytest.mark.parametrize("old", [True, False], ids=["replaced", "new"])
@pytest.mark.parametrize("call", ["fsync", "replace"])
@pytest.mark.parametrize("kind", ["plan", "scores", "model", "tuning", "arrays"])
def test_a_full_disk(kind: str, call: str, old: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, write = tmp_path / "file", writers()[kind]
    if old:
        path.write_bytes(b"what was there")

    def full(*args: Any) -> Any:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(*((os, "fsync", full) if call == "fsync" else (Path, "replace", full)))
    with pytest.raises(FxpruneError, match=r"file cannot be written .*No space left on device.*is there room"):
        write(path)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == ({"file": b"what was there"} if old else {})


WRITING = """
import errno, os, resource, signal, sys
sys.path[:0] = {paths!r}
from pathlib import Path
import torch
import test_untrusted as tests
from fxprune import FxpruneError

root = Path({root!r})
torch.manual_seed(0)
for kind, write in tests.writers().items():
    path = root / kind / "file"
    path.parent.mkdir()
    path.write_bytes(b"what was there")
    if os.fork() == 0:  # a disk that takes no more than a few bytes
        resource.setrlimit(resource.RLIMIT_FSIZE, (10, 10))
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        try:
            write(path)
        except FxpruneError as error:
            os._exit(0 if "is there room" in str(error) and len(os.listdir(path.parent)) == 1 else 3)
        os._exit(4)
    assert os.waitstatus_to_exitcode(os.wait()[1]) == 0, kind
    assert path.read_bytes() == b"what was there", kind
    for owner, call in ((os, "fsync"), (Path, "replace")):  # killed while the file is brought to the disk, or its place
        if os.fork() == 0:
            setattr(owner, call, lambda *args: os.kill(os.getpid(), signal.SIGKILL))
            write(path)
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.wait()[1]) == -signal.SIGKILL, kind
        assert path.read_bytes() == b"what was there", kind
        assert len(os.listdir(path.parent)) == 2, kind
    write(path)
    assert path.read_bytes() != b"what was there", kind
    assert os.listdir(path.parent) == ["file"], kind
print("done")
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="processes that are killed")
def test_a_disk_with_little_room_and_a_process_that_is_killed(tmp_path: Path) -> None:
    paths = [str(Path(__file__).parent), str(Path(fxprune.__file__).parents[1])]
    code = WRITING.format(paths=paths, root=str(tmp_path))
    ended = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True, timeout=300)
    assert ended.stdout == "done\n", ended.stderr


# -- what the package itself may not do --------------------------------------------------------------------------------

SOURCES = sorted(Path(fxprune.__file__).parent.rglob("*.py"))
FORBIDDEN = re.compile(
    r"^\s*(?:import|from) (?:pickle|dill|cloudpickle|joblib|marshal|shelve|subprocess|pty|runpy)\b(?!.*UnpicklingError)"
    r"|(?<![\w.])(?:eval|exec|compile|__import__|breakpoint)\(|\bos\.system\(|\.(?:popen|exec_module|unsafe_load)\("
    r"|\bnp\.load\(|allow_pickle=True|\btorch\.load\((?!.*weights_only=True)|\bimport_module\((?!\")|\bresolve_name\(",
    re.MULTILINE,
)
ALLOWED = {
    ("__init__.py", "import_module("),  # the modules that __init__.pyi names
    ("app.py", "import_module("),  # the modules of the table of commands
    ("rebuild.py", "resolve_name("),  # load(build=True)
    ("graph.py", "import_module("),  # a graph that the user unpickles
    ("named_objects.py", "import_module("),  # what the user names on the command line
    ("arguments.py", "torch.load("),  # in a message
    ("drawing.py", "import subprocess"),  # dot, of Graphviz, where the user asks for a drawing by it
}


def offences(path: Path) -> set[tuple[str, str]]:
    """What a file does that could run what a file says."""
    return {(path.name, found.strip()) for found in FORBIDDEN.findall(path.read_text(encoding="utf-8"))}


def test_nothing_is_unpickled_or_run() -> None:
    assert set().union(*map(offences, SOURCES)) == ALLOWED
    assert len(SOURCES) > 80


@pytest.mark.parametrize(
    "line",
    [
        "import pickle", "from pickle import loads", "eval('1')", "exec('1')", "torch.load(p)", "np.load(p)",
        "torch.load(p, weights_only=False)", "np.savez(p, allow_pickle=True)", "importlib.import_module(name)",
        "pkgutil.resolve_name(target)",
        "os.system('x')",
    ],
)  # fmt: skip
def test_offences_are_found(line: str, tmp_path: Path) -> None:
    (tmp_path / "bad.py").write_text(line)
    assert offences(tmp_path / "bad.py")
