"""Saved models: made again bit for bit from the architecture and one file, and refused where anything is amiss."""

from __future__ import annotations

import copy
import hashlib
import json
import random
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from detectors import BATCHES as DETECTED
from detectors import OPTIONS, detector
from helpers import call, outputs, part_of, picture, same_picture, squares, storages, tensors_of
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from zoo import ZOO, images

import fxprune
from fxprune.errors import ArtifactError, FxpruneWarning
from fxprune.saving import container, header

BATCHES = [(images()(20), torch.arange(20) % 5), (images()(7), torch.arange(7) % 5)]
KINDS = (
    "residual", "channel_shuffle", "multihead_masked", "tied_words", "one_tensor_in_two_modules", "dict_input",
    "lstm_projected_deep_both_ways", "named_outputs", "permutation", "packed_there",
)  # fmt: skip


class Bare(nn.Module):
    """Layers without biases, so that compensation has to create some."""

    def __init__(self, width: int = 12, activation: type[nn.Module] = nn.ReLU) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, width, 3, bias=False), nn.Conv2d(width, width, 3, bias=False)
        self.act, self.head = activation(), nn.Linear(width, 5, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.act(self.b(self.act(self.a(x)))).mean((2, 3)))


def scrambled(model: nn.Module) -> nn.Module:
    """The model with other weights."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    return model


def pruned(name: str = "residual", alpha: float = 0.5) -> tuple[nn.Module, nn.Module]:
    """A model of the zoo, and what is left of it."""
    model = ZOO[name].build().eval()
    scores = fxprune.Scores.random(model, ZOO[name].example(2))
    return model, fxprune.apply(model, scores.plan(alpha=alpha, allocate="tod-by-group"))


def same(a: nn.Module, b: nn.Module, inputs: Any) -> bool:
    """Whether two models have the same tensors and give the same outputs, bit for bit."""
    names = [name for name, _ in a.named_parameters()] == [name for name, _ in b.named_parameters()]
    states = same_picture(dict(a.state_dict()), dict(b.state_dict()))
    return (
        names and states and all(torch.equal(x, y) for x, y in zip(outputs(a, inputs), outputs(b, inputs), strict=True))
    )


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "small.safetensors"


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("meta", [False, True], ids=["other weights", "meta"])
def test_a_model_comes_back_bit_for_bit(name: str, meta: bool, path: Path) -> None:
    _, small = pruned(name)
    fxprune.save(small, path)
    architecture = ZOO[name].build().to("meta") if meta else scrambled(ZOO[name].build())
    before = None if meta else picture(architecture)
    loaded = fxprune.load(path, architecture)
    assert meta or same_picture(before, picture(architecture))
    assert not storages(loaded) & storages(architecture)
    assert same(small, loaded, ZOO[name].example(3 if ZOO[name].any_batch else 2))
    assert fxprune.report(loaded) == fxprune.report(small)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_the_dtype_is_kept(dtype: torch.dtype, path: Path) -> None:
    small = fxprune.compress(
        ZOO["residual"].build().to(dtype), [(x.to(dtype), y) for x, y in BATCHES], 0.3, progress=False
    )
    fxprune.save(small, path)
    assert same(small, fxprune.load(path, ZOO["residual"].build().to(dtype)), images()(3).to(dtype))
    with pytest.raises(
        ArtifactError, match=rf"is .* {str(dtype)[6:]} in .*, and .* float32 in the rebuilt .*same dtype"
    ):
        fxprune.load(path, ZOO["residual"].build())


@pytest.mark.parametrize("level", ["bias", "ridge", "sequential"])
def test_biases_that_compensation_created_are_created_again(level: Any, path: Path) -> None:
    small = fxprune.compress(Bare(), BATCHES, 0.5, compensate=level, progress=False)
    created = {name for name, _ in small.named_parameters() if name.endswith("bias")}
    assert created
    fxprune.save(small, path)
    loaded = fxprune.load(path, Bare())
    assert same(small, loaded, images()(3))
    assert fxprune.report(loaded).compensation == fxprune.report(small).compensation
    assert {name for name, _ in loaded.named_parameters() if name.endswith("bias")} == created


def test_a_fine_tuned_model_comes_back_and_trains_on(path: Path) -> None:
    pytest.importorskip("lightning_fabric")
    tuned = fxprune.compress(
        ZOO["residual"].build(), BATCHES, 0.3, progress=False,
        finetune={"train_loader": BATCHES, "val_loader": BATCHES, "epochs": 1, "lr": 1e-3},
    )  # fmt: skip
    fxprune.save(tuned, path)
    loaded = fxprune.load(path, ZOO["residual"].build())
    assert fxprune.report(loaded).finetuned == fxprune.report(tuned).finetuned
    assert same(tuned, loaded, images()(3))
    squares(loaded(images()(2))).backward()
    assert all(parameter.grad is not None for parameter in loaded.parameters())
    assert same(tuned, fxprune.load(path, ZOO["residual"].build()), images()(3))


def test_a_loaded_model_can_be_saved_and_pruned_again(path: Path) -> None:
    _, small = pruned()
    fxprune.save(small, path)
    loaded = fxprune.load(path, ZOO["residual"].build())
    fxprune.save(loaded, path)
    assert same(small, fxprune.load(path, ZOO["residual"].build()), images()(3))
    smaller = fxprune.compress(loaded.eval(), BATCHES, 0.3, progress=False)
    fxprune.save(smaller, path)
    assert same(smaller, fxprune.load(path, ZOO["residual"].build()), images()(3))


def test_parts_of_a_model_come_back_in_the_whole(path: Path) -> None:
    small = fxprune.compress(detector(), DETECTED, 0.3, **OPTIONS)
    fxprune.save(small, path)
    loaded = fxprune.load(path, scrambled(detector()))
    assert same_picture(dict(small.state_dict()), dict(loaded.state_dict()))
    assert fxprune.report(loaded) == fxprune.report(small)
    a, b = (tensors_of(call(m.eval(), (DETECTED[0][0],))) for m in (small, loaded))
    assert a
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
    with pytest.raises(ArtifactError, match=r"holds a pruned \w+ \(its backbone\)"):
        fxprune.load(path)


def test_several_parts_come_back(path: Path) -> None:
    def build() -> nn.Module:
        return nn.Sequential(Bare(), nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 5)))

    model = build()
    for part, example in (("0", images()(2)), ("1", torch.randn(2, 5))):
        scores = fxprune.Scores.random(model, example, submodule=part)
        model = fxprune.apply(model, scores.plan(alpha=0.5))
    fxprune.save(model, path)
    loaded = fxprune.load(path, build())
    assert same(model, loaded, images()(3))
    assert [fxprune.report(m) for m in loaded] == [fxprune.report(m) for m in model]


def test_modes_and_frozen_parameters_are_kept(path: Path) -> None:
    _, small = pruned("mlp_batchnorm_dropout")
    small.train()
    next(small.children()).eval()
    next(small.parameters()).requires_grad_(False)
    fxprune.save(small, path)
    loaded = fxprune.load(path, ZOO["mlp_batchnorm_dropout"].build().eval())
    assert [m.training for m in loaded.modules()] == [m.training for m in small.modules()]
    assert [p.requires_grad for p in loaded.parameters()] == [p.requires_grad for p in small.parameters()]


def test_the_memory_format_is_kept(path: Path) -> None:
    small = pruned()[1].to(memory_format=torch.channels_last)
    fxprune.save(small, path)
    loaded = fxprune.load(path, ZOO["residual"].build())
    assert [p.stride() for p in loaded.parameters()] == [p.stride() for p in small.parameters()]
    assert same(small, loaded, images()(3))


def test_tied_weights_stay_tied_and_are_written_once(path: Path) -> None:
    _, small = pruned("tied_words")
    fxprune.save(small, path)
    held = dict(small.named_parameters(remove_duplicate=False))
    assert len(load_file(path)) < len(held) + len(dict(small.named_buffers()))
    loaded = dict(fxprune.load(path, ZOO["tied_words"].build()).named_parameters(remove_duplicate=False))
    twins = [(a, b) for a in held for b in held if a < b and held[a] is held[b]]
    assert twins
    assert all(loaded[a] is loaded[b] for a, b in twins)


def test_another_process_gets_the_same_outputs(path: Path) -> None:
    small = fxprune.compress(Bare(), BATCHES, 0.3, progress=False)
    fxprune.save(small, path, builder="test_artifact:Bare", builder_kwargs={"width": 12})
    torch.save(outputs(small, images()(3)), path.with_suffix(".outputs"))
    script = (
        "import sys, torch, fxprune; torch.set_num_threads(1); from zoo import images\n"
        "small = fxprune.load(sys.argv[1], build=True).eval(); print(fxprune.report(small).params_after)\n"
        "wanted = torch.load(sys.argv[1].replace('.safetensors', '.outputs'))\n"
        "with torch.no_grad(): assert torch.equal(small(images()(3)), wanted[0])"
    )
    folders = ":".join((str(Path(__file__).parent), str(Path(fxprune.__file__).parents[1])))
    done = subprocess.run(
        [sys.executable, "-c", script, str(path)],
        env={"PYTHONPATH": folders},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) == fxprune.report(small).params_after


# Building


def test_a_builder_is_called_only_where_that_is_asked_for(path: Path) -> None:
    _, small = pruned()
    target = "torch:_a_name_that_torch_does_not_have.at_all"
    fxprune.save(small, path, builder=target)
    assert same(small, fxprune.load(path, ZOO["residual"].build()), images()(3))
    with pytest.raises(
        ArtifactError, match=r"pass model=.*or build=True to import and call torch:_a_name.*if you trust"
    ):
        fxprune.load(path)
    with pytest.raises(ArtifactError, match=r"names the builder torch:.*, which fails \(AttributeError: .*pass model="):
        fxprune.load(path, build=True)


def test_a_builder_that_gives_no_model(path: Path) -> None:
    fxprune.save(pruned()[1], path, builder="builtins:dict", builder_kwargs={"a": 1})
    with pytest.raises(ArtifactError, match=r"names the builder builtins:dict\(a=1\), which gives a dict: pass model="):
        fxprune.load(path, build=True)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"builder": "no colon"}, "builder is 'no colon'; write \"package.module:callable\""),
        ({"builder_kwargs": {"a": 1}}, "builder_kwargs are given without builder="),
        (
            {"builder": "a:b", "builder_kwargs": {"a": object()}},
            "cannot be written as JSON .*give builder_kwargs of numbers",
        ),
    ],
)
def test_what_no_builder_can_be(options: Any, text: str, path: Path) -> None:
    with pytest.raises(ArtifactError, match=text):
        fxprune.save(pruned()[1], path, **options)
    assert not path.exists()


def test_what_load_needs(path: Path) -> None:
    fxprune.save(pruned()[1], path)
    with pytest.raises(ArtifactError, match=r"holds a pruned Residual, made by fxprune .*, torch .*: pass model="):
        fxprune.load(path)
    with pytest.raises(ArtifactError, match="the file names no builder for build=True"):
        fxprune.load(path, build=True)
    with pytest.raises(ArtifactError, match="model= and build=True are both given"):
        fxprune.load(path, ZOO["residual"].build(), build=True)


# Other architectures


@pytest.mark.parametrize(
    ("build", "text"),
    [
        (
            lambda: Bare(width=16),
            r"its plan does not fit the Bare .*12 channels of '\w+', the model has 16.*same arguments",
        ),
        (
            lambda: Bare(activation=nn.SiLU),
            r"in which node \d+ is .*ReLU.*, and in the model given .*SiLU.*same arguments",
        ),
        (lambda: ZOO["mlp"].build(), r"was made from a Bare, and its plan does not fit the \w+ that was given"),
    ],
)
def test_another_architecture_is_refused(build: Callable[[], nn.Module], text: str, path: Path) -> None:
    fxprune.save(fxprune.compress(Bare(), BATCHES, 0.3, progress=False), path)
    with pytest.raises(ArtifactError, match=text):
        fxprune.load(path, build())


def test_a_model_without_the_hooks_that_compute_is_refused(path: Path) -> None:
    """And one with its hooks is taken."""

    class Encoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.first(x).relu()).mean((2, 3))

    def with_hook() -> nn.Module:
        model = Encoder()
        model.first.register_forward_hook(lambda module, inputs, output: output * 2)
        return model.eval()

    small = fxprune.compress(with_hook(), [(images()(6), torch.arange(6) % 4)], 0.5, progress=False)
    fxprune.save(small, path)
    text = r"was made from an Encoder in which node 2 is .*mul.* the same arguments, and with those of"
    with pytest.raises(ArtifactError, match=text):
        fxprune.load(path, Encoder())
    loaded = fxprune.load(path, with_hook())
    assert torch.equal(outputs(loaded, images()(3))[0], outputs(small, images()(3))[0])


def test_another_version_of_torch_that_spells_the_graph_otherwise_is_a_warning(path: Path) -> None:
    small = fxprune.compress(Bare(), BATCHES, 0.3, progress=False)
    fxprune.save(small, path)

    def older(notes: Any) -> None:
        notes["versions"]["torch"] = "2.0.0"
        notes["parts"][0]["structure"][1] += " spelled otherwise"

    rewrite_header(path, older)
    with pytest.warns(FxpruneWarning, match=r"It was made by fxprune .*, torch 2.0.0; compare the outputs"):
        loaded = fxprune.load(path, Bare())
    assert same(small, loaded, images()(3))


def test_a_tensor_that_the_architecture_has_and_the_file_has_not(path: Path) -> None:
    fxprune.save(fxprune.compress(Bare(), BATCHES, 0.3, progress=False), path)
    model = Bare()
    model.extra = nn.Linear(2, 2)
    with pytest.raises(ArtifactError, match=r"the rebuilt \w+ has extra.weight, which .* does not hold: pass model="):
        fxprune.load(path, model)


def test_tied_weights_have_to_be_tied(path: Path) -> None:
    fxprune.save(pruned("tied_weights")[1], path)
    model = ZOO["tied_weights"].build()
    model.out.weight = nn.Parameter(model.out.weight.detach().clone())
    with pytest.raises(ArtifactError, match=r"does not fit|is one tensor with .*: tie them as they were"):
        fxprune.load(path, model)


# What cannot be saved


def test_a_model_without_a_plan(path: Path) -> None:
    with pytest.raises(
        ArtifactError, match=r"Bare has no plan: save what fxprune\.compress, apply, finetune or load gave"
    ):
        fxprune.save(Bare(), path)


def test_a_wrapped_model(path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"stands at '0' in Sequential, and its plan is for ''.*without a wrapper"):
        fxprune.save(nn.Sequential(pruned()[1]), path)


def test_a_state_that_is_no_tensor(path: Path) -> None:
    class Counted(nn.ReLU):
        def get_extra_state(self) -> Any:
            return {"count": 3}

    small = fxprune.compress(Bare(activation=Counted), BATCHES, 0.3, progress=False)
    with pytest.raises(ArtifactError, match="act is a Counted with an extra state: it is not kept"):
        fxprune.save(small, path)


@pytest.mark.parametrize("failure", [KeyboardInterrupt, OSError(28, "No space left on device"), RuntimeError("odd")])
def test_nothing_is_left_of_a_file_that_was_not_finished(
    failure: Any, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, small = pruned()
    fxprune.save(small, path)
    before = path.read_bytes()

    def half(tensors: Any, unfinished: Path, notes: Any) -> None:
        unfinished.write_bytes(b"half")
        raise failure

    monkeypatch.setattr(container, "save_file", half)
    with pytest.raises((ArtifactError, KeyboardInterrupt)) as caught:
        fxprune.save(small, path)
    assert caught.type is KeyboardInterrupt or "cannot be written" in str(caught.value)
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]


def test_who_reads_a_file_while_it_is_replaced_reads_the_old_one(path: Path) -> None:
    fxprune.save(pruned()[1], path)
    before = path.read_bytes()
    with path.open("rb") as reader:
        fxprune.save(pruned(alpha=0.9)[1], path)
        assert reader.read() == before
    assert path.read_bytes() != before


def test_a_file_has_the_usual_rights_and_a_link_stays_one(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    link, real, plain = tmp_path / "link", tmp_path / "real" / "file", tmp_path / "plain"
    link.symlink_to(real)
    plain.write_text("")
    fxprune.save(pruned()[1], link)
    assert link.is_symlink()
    assert stat.S_IMODE(real.stat().st_mode) == stat.S_IMODE(plain.stat().st_mode)
    real.chmod(0o640)
    fxprune.save(pruned()[1], link)
    assert stat.S_IMODE(real.stat().st_mode) == 0o640


# Files that are not what they should be


def rewrite_header(path: Path, change: Callable[[Any], Any]) -> None:
    """Change the header of a file, and its checksum with it."""
    with safe_open(path, "pt") as file:
        notes = file.metadata()
    content = json.loads(notes["fxprune"])
    content = change(content) or content
    text = content if isinstance(content, str) else json.dumps(content)
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    save_file(tensors, path, notes | {"fxprune": text, "sha256": hashlib.sha256(text.encode()).hexdigest()})


def raw_header(path: Path, old: bytes, new: bytes) -> None:
    """Replace bytes of the safetensors header by as many others."""
    content = path.read_bytes()
    assert old in content
    assert len(old) == len(new)
    path.write_bytes(content.replace(old, new, 1))


def damage(how: str, path: Path) -> None:
    """Spoil a file in one way."""
    content = path.read_bytes()
    if how in CHANGES:
        rewrite_header(path, CHANGES[how])
    elif how == "newer":
        raw_header(path, b'"fxprune_artifact":"1"', b'"fxprune_artifact":"2"')
    elif how == "numbers":
        path.write_bytes(content[:-3] + bytes([content[-3] ^ 1]) + content[-2:])
    elif how == "notes":
        raw_header(path, b"params_after", b"params_aftes")
    elif how == "missing":
        path.unlink()
    elif how == "foreign":
        save_file({"a": torch.zeros(2)}, path)
    else:
        path.write_bytes(RAW[how](content))


RAW: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda content: b"",
    "half": lambda content: content[: len(content) // 2],
    "cut": lambda content: content[:-1],
    "longer": lambda content: content + b"\0",
    "text": lambda content: b"this is no model at all",
    "huge header": lambda content: (1 << 62).to_bytes(8, "little") + content[8:],
    "no json": lambda content: content[:8] + b"x" + content[9:],
    "pickle": lambda content: b"\x80\x04N." + content,
}
EXAMPLE = {"tensor": [1 << 20, 1 << 20], "dtype": "float32"}
CHANGES: dict[str, Callable[[Any], Any]] = {
    "a list": lambda notes: "[1, 2]",
    "deep": lambda notes: "[" * 100_000 + "]" * 100_000,
    "no parts": lambda notes: notes | {"parts": []},
    "no plans": lambda notes: notes["parts"][0].update(plans=[]),
    "a number for a name": lambda notes: notes | {"model": 3},
    "lists for records": lambda notes: notes | {"tensors": []},
    "report": lambda notes: notes["parts"][0]["report"].update(params_after="many"),
    "plan": lambda notes: notes["parts"][0]["plans"][0].update(sites=3),
    "settings": lambda notes: notes["parts"][0]["plans"][0]["settings"].update(leaves=5),
    "example": lambda notes: notes["parts"][0]["plans"][0].update(example=EXAMPLE),
    "shape": lambda notes: next(iter(notes["tensors"].values())).update(shape=[1, 2]),
    "checksum": lambda notes: next(iter(notes["tensors"].values())).update(sha256="0"),
    "layout": lambda notes: notes["tensors"]["norm.bias"].update(memory_format="channels_last"),
    "another tensor": lambda notes: notes["tensors"].update(other=next(iter(notes["tensors"].values()))),
    "alias": lambda notes: notes | {"aliases": {"stem.weight": "nowhere"}},
    "submodule": lambda notes: notes["parts"][0]["plans"][0]["settings"].update(submodule="stem.nowhere"),
}  # fmt: skip
TEXTS = {
    "empty": "is cut off", "half": "is cut off|damaged", "cut": "is cut off or damaged", "longer": "or damaged",
    "text": "is cut off, or no safetensors file", "huge header": "its header alone would need 4,611,686,018",
    "no json": "not a model that fxprune.save wrote", "pickle": "get it anew", "newer": "format 2, .*reads 1: update",
    "numbers": "the numbers of .* do not have their checksum; get it anew", "notes": "its header does not have",
    "missing": "cannot be read .*name a file that fxprune.save wrote", "foreign": "without fxprune's header: load it",
    "a list": "its header cannot be read .*should be a", "deep": "its header cannot be read .*recursion",
    "no parts": "it has no plan", "no plans": "it has no plan", "a number for a name": "model is an int, and should",
    "lists for records": "tensors is a list", "report": r"parts\[0\].report.params_after is a str",
    "plan": "holds a plan that cannot be used", "settings": "cannot be used: .*settings.leaves is an int",
    "example": "an example batch of 4,398,046,511,104 bytes, more than", "shape": "was altered: .* its header says",
    "checksum": "do not have their checksum", "layout": "has 1 axes and the memory format channels_last",
    "another tensor": "it lacks the tensor other, against its header", "alias": "stem.weight is",
    "submodule": "its plan does not fit .*no module of that name",
}  # fmt: skip


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The bytes of a saved model."""
    path = tmp_path_factory.mktemp("saved") / "small.safetensors"
    model = ZOO["mlp_batchnorm_dropout"].build().eval()
    fxprune.save(
        fxprune.apply(model, fxprune.Scores.random(model, ZOO["mlp_batchnorm_dropout"].example(2)).plan(0.5)), path
    )
    return path.read_bytes()


@pytest.mark.parametrize("how", part_of(TEXTS, 3))
def test_a_file_that_was_spoiled_is_refused(how: str, path: Path) -> None:
    fxprune.save(pruned()[1], path)
    damage(how, path)
    with pytest.raises(ArtifactError, match=TEXTS[how]) as caught:
        fxprune.load(path, ZOO["residual"].build())
    assert str(path) in str(caught.value)


def test_every_bit_of_the_library_s_own_note_counts(saved: bytes, path: Path) -> None:
    model, start = ZOO["mlp_batchnorm_dropout"].build(), saved.index(b'"format":"pt"')
    for place in range(start, start + len(b'"format":"pt"')):
        for bit in range(8):
            flipped = bytearray(saved)
            flipped[place] ^= 1 << bit
            path.write_bytes(flipped)
            with pytest.raises(ArtifactError):
                fxprune.load(path, model)


def test_any_flipped_byte_is_found(saved: bytes, path: Path) -> None:
    """What cannot be told from the original, such as white space between the parts, does no harm."""
    model = ZOO["mlp_batchnorm_dropout"].build()
    draw, start = random.Random(0), int.from_bytes(saved[:8], "little") + 8
    places = [*range(8), *draw.sample(range(8, start), 150), *draw.sample(range(start, len(saved)), 150)]
    for place in places:
        flipped = bytearray(saved)
        flipped[place] ^= 1 << draw.randrange(8)
        path.write_bytes(flipped)
        with pytest.raises(ArtifactError):
            fxprune.load(path, model)


def test_a_header_that_is_too_large(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, small = pruned()
    fxprune.save(small, path)
    for module in (header, container):
        monkeypatch.setattr(module, "LARGEST", 100)
    with pytest.raises(ArtifactError, match=r"has a header of [\d,]+ bytes, more than the 200 that are read"):
        fxprune.load(path, ZOO["residual"].build())
    with pytest.raises(ArtifactError, match=r"the header of \w+ has [\d,]+ bytes, more than 100"):
        fxprune.save(copy.deepcopy(small), path)
