"""compress(own_class=True): plans that the code of the model's class runs narrower, and the class as the result."""

from __future__ import annotations

import copy
import json
import pickle
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from detectors import BATCHES as DETECTED
from detectors import OPTIONS, Detector, detector, run
from helpers import difference, outputs, parameters, part_of, picture, same_picture
from nets import layers
from test_narrow import REFUSED, Halves, Heads
from torch import Tensor, nn
from zoo import ZOO, images

import fxprune
from fxprune.coupling.couple import analyse
from fxprune.errors import NarrowError
from fxprune.reporting.report import pruned_of
from fxprune.rewriting.class_limits import keep_to, limits_of, trial

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    T: Any = pytest.importorskip("transformers")

BATCHES = [(images()(20), torch.arange(20) % 5), (images()(7), torch.arange(7) % 5)]
WORDS = torch.arange(14).view(2, 7)
SIZES = {"vocab_size": 50, "use_cache": False}


def plan_in_class(model: nn.Module, example: Any) -> tuple[fxprune.Plan, Any]:
    """A random plan that keeps to the class, and the limits of the class."""
    graph = fxprune.capture(model, example)
    limits = limits_of(model, graph)
    return fxprune.Scores.random(graph, example).plan(alpha=0.5, allocate="tod-by-group"), limits


@pytest.mark.parametrize("name", part_of([name for name in ZOO if name.startswith(REFUSED)], 6))
def test_plans_keep_to_what_the_class_runs(name: str) -> None:
    case = ZOO[name]
    model = case.build().eval()
    before = picture(model)
    plan, limits = plan_in_class(model, case.example(2))
    assert limits.held or limits.even
    own = fxprune.narrow(model, plan)
    assert same_picture(before, picture(model))
    assert type(own) is type(model)
    assert all(len(plan.keep[site]) == plan.widths[site] for site in limits.held)
    inputs = case.example(3 if case.any_batch else 2)
    assert difference(outputs(fxprune.apply(model, plan), inputs), outputs(own, inputs)) < 1e-6


@pytest.mark.parametrize("name", part_of([name for name in ZOO if not name.startswith(REFUSED)][1::4], 8))
def test_what_runs_anyway_is_not_limited(name: str) -> None:
    case = ZOO[name]
    model = case.build().eval()
    limits = limits_of(model, fxprune.capture(model, case.example(2)))
    assert not limits.held
    assert not limits.even


def test_only_what_cannot_be_is_held() -> None:
    """One of three convolutions is read by a forward that names its channels."""

    @layers(lambda: dict(a=nn.Conv2d(3, 8, 3), b=nn.Conv2d(8, 8, 3), c=nn.Conv2d(6, 8, 3), head=nn.Linear(8, 5)))
    def Named(self, x: Tensor) -> Tensor:
        x = self.c(self.b(self.a(x).relu()).relu()[:, :6])
        return self.head(x.relu().mean((2, 3)))

    plan, limits = plan_in_class(Named(), images()(2))
    assert list(limits.held) == ["b"]
    assert "its own class does not run with fewer" in limits.held["b"]
    assert "x = self.c(self.b(self.a(x).relu()).relu()[:, :6])" in limits.held["b"]
    assert {site for site in plan.keep if len(plan.keep[site]) < plan.widths[site]} == {"a", "c"}


def test_a_failure_without_a_node_is_searched_for() -> None:
    """The forward takes another way where a layer is narrower; nothing in the graph tells which."""

    @layers(lambda: dict(a=nn.Conv2d(3, 8, 3), b=nn.Conv2d(8, 6, 3), c=nn.Conv2d(6, 8, 3), head=nn.Linear(8, 5)))
    def Branching(self, x: Tensor) -> Tensor:
        x = self.b(self.a(x).relu()).relu()
        x = x if self.b.out_channels == 6 else x + 1
        return self.head(self.c(x).relu().mean((2, 3)))

    _, limits = plan_in_class(Branching(), images()(2))
    assert limits.held == {
        "b": "its own class does not run with fewer (the rewritten graph has other nodes than the original)"
    }


def test_pieces_that_share_a_number_are_kept_equal() -> None:
    model, example = Halves().eval(), images()(2)
    graph = fxprune.capture(model, example)
    limits = limits_of(model, graph)
    assert not limits.held
    assert limits.even == ((("split", 0, 1), ("split", 1, 1)),)
    (even,) = analyse(graph).even
    assert even == (tuple(range(6)), tuple(range(6, 12)))
    for seed in range(5):
        keep = trial(analyse(graph), seed)
        assert keep[:6].sum() == keep[6:12].sum() < 6


class Split(nn.Module):
    """A forward in halves of any size, and others for export that read the size."""

    def __init__(self) -> None:
        super().__init__()
        self.c = 6
        self.a, self.b, self.d = nn.Conv2d(3, 12, 1), nn.Conv2d(6, 6, 1), nn.Conv2d(12, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        first, second = self.a(x).chunk(2, 1)
        return self.d(torch.cat([first, self.b(second).relu()], 1)).relu()

    def forward_split(self, x: Tensor) -> Tensor:
        first, second = self.a(x).split((self.c, self.c), 1)
        return self.d(torch.cat([first, self.b(second).relu()], 1)).relu()

    def forward_sliced(self, x: Tensor) -> Tensor:
        x = self.a(x)
        return self.d(torch.cat([x[:, : self.c], self.b(x[:, -self.c :]).relu()], 1)).relu()

    def forward_scaled(self, x: Tensor) -> Tensor:
        return self.forward(x) * self.c

    def write(self, x: Tensor) -> Tensor:
        raise AssertionError(f"it is no forward, and is not run: {self.c}")


def test_sizes_that_only_other_forwards_read_are_mended() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(Split(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5))
    own: Any = fxprune.compress(model, BATCHES, params=0.4, own_class=True, progress=False).eval()
    halves, x = own[0], BATCHES[0][0]
    assert halves.c == halves.b.in_channels < 6
    assert model[0].c == 6
    assert torch.equal(halves(x), halves.forward_split(x))
    assert torch.equal(halves(x), halves.forward_sliced(x))


class Decorated(Split):
    """The size is read behind a decorator, in a parent's method, and in a function inside."""

    @torch.no_grad()
    def forward_split(self, x: Tensor) -> Tensor:
        return super().forward_split(x)

    def forward_sliced(self, x: Tensor) -> Tensor:
        x = self.a(x)
        first, second = (half(x) for half in (lambda x: x[:, : self.c], lambda x: x[:, -self.c :]))
        return self.d(torch.cat([first, self.b(second).relu()], 1)).relu()


class Scaled(Split):
    """The forward reads the size, too: what it gives is not to change."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * (self.c / 6)

    def forward_split(self, x: Tensor) -> Tensor:
        return super().forward_split(x) * (self.c / 6)


class Guarded(Split):
    def forward(self, x: Tensor) -> Tensor:
        if self.c < 6:
            raise ValueError("6, please")
        return super().forward(x)


class Training(Split):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * (self.c if self.training else 1)


class Checked(Split):
    """Its one attribute would have to be two widths."""

    def forward_split(self, x: Tensor) -> Tensor:
        first, second = self.a(x).chunk(2, 1)
        joined = torch.cat([first, self.b(second).relu()], 1)
        assert joined.shape[1] == 12
        return self.d(joined[:, : 2 * self.c]).relu()


class Builtin(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.count = 3

    forward = staticmethod(torch.relu)


def around(split: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(split, Builtin(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5)).eval()


@pytest.mark.wide
def test_sizes_behind_decorators_and_in_parents_are_mended() -> None:
    own: Any = fxprune.compress(around(Decorated()), BATCHES, params=0.4, own_class=True, progress=False)
    halves, x = own[0], BATCHES[0][0]
    assert halves.c < 6
    assert torch.equal(halves(x), halves.forward_split(x))
    assert torch.equal(halves(x), halves.forward_sliced(x))


@pytest.mark.parametrize("kind", part_of([Scaled, Guarded, Training, Checked], 2))
def test_another_forward_that_cannot_be_mended_is_named(kind: type[Split]) -> None:
    model = around(kind())
    with pytest.warns(fxprune.FxpruneWarning, match=rf"{kind.__name__}\.forward_split.* gave what the forward gives"):
        own: Any = fxprune.compress(model, BATCHES, params=0.4, own_class=True, compensate="none", progress=False)
    small = fxprune.apply(model, pruned_of(own).plan)
    assert own[0].b.in_channels < 6
    assert difference(outputs(small, BATCHES[0][0]), outputs(own, BATCHES[0][0])) < 1e-6


def test_score_files_keep_the_pieces(tmp_path: Path) -> None:
    graph = fxprune.capture(Halves().eval(), images()(2))
    keep_to(graph, limits_of(Halves(), graph))
    scores = fxprune.Scores.random(graph, images()(2))
    scores.save(tmp_path / "scores.npz")
    again = fxprune.Scores.load(tmp_path / "scores.npz")
    assert again.even == scores.even
    assert len(scores.even) == 1
    assert again.plan(alpha=0.3).keep == scores.plan(alpha=0.3).keep


@pytest.mark.parametrize("options", [{"alpha": 0.4}, {"params": 0.6}, {"macs": 0.6, "rounds": 2}], ids=str)
def test_compress_returns_the_class(options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    model = Halves().train()
    before = picture(model)
    own: Any = fxprune.compress(model, BATCHES, own_class=True, progress=False, **options)
    assert same_picture(before, picture(model))
    assert type(own) is Halves
    assert own.training
    assert own.a.out_channels == 2 * own.c
    report = fxprune.report(own)
    assert report.params_after == parameters(own) < parameters(model)
    assert report.error < 1e-5
    assert "own_class=True" in report.provenance.call
    nn.functional.cross_entropy(own(BATCHES[0][0]), BATCHES[0][1]).backward()
    assert own.a.weight.grad is not None


def test_the_outputs_are_those_of_the_compensated_graph(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = ZOO["residual"].build().eval()
    own = fxprune.compress(model, BATCHES, 0.5, own_class=True, progress=False)
    small = fxprune.compress(model, BATCHES, 0.5, progress=False)
    assert type(own) is type(model)
    assert fxprune.report(own).compensation == fxprune.report(small).compensation
    assert difference(outputs(small, images()(3)), outputs(own, images()(3))) < 1e-6
    for path, saved in ((tmp_path / "own.safetensors", own), (tmp_path / "graph.safetensors", small)):
        fxprune.save(saved, path)
        again = fxprune.load(path, model, own_class=True)
        assert type(again) is type(model)
        assert difference(outputs(own, images()(3)), outputs(again, images()(3))) < 1e-6
        assert fxprune.report(again).params_after == parameters(own)


def test_a_held_layer_is_in_the_report() -> None:
    model = ZOO["channel_slices"].build()
    own = fxprune.compress(model, BATCHES, 0.5, own_class=True, progress=False)
    reasons = [frozen.reason for frozen in fxprune.report(own).frozen]
    assert any("its own class does not run with fewer" in reason for reason in reasons)


def test_a_part_in_the_class_trains_by_the_models_own_loss() -> None:
    model = detector().eval()
    small: Any = fxprune.compress(model, DETECTED, 0.3, own_class=True, **OPTIONS)
    assert type(small) is Detector
    assert type(small.backbone) is type(model.backbone)
    assert parameters(small) < parameters(model)
    tuned = fxprune.finetune(small, DETECTED, DETECTED, epochs=2, lr=1e-2, run=run, progress=False)
    assert fxprune.report(tuned.backbone).finetuned.ran == 2
    assert not torch.equal(tuned.backbone.stem[0].weight, small.backbone.stem[0].weight)
    assert set(small.train()(*DETECTED[0])) == {"0", "1"}
    assert "label" in small.eval()(DETECTED[0][0])[0]


def test_copies_keep_the_report_and_pickles_do_not_need_it() -> None:
    own = fxprune.compress(nn.Sequential(nn.Flatten(), nn.Linear(192, 9), nn.ReLU(), nn.Linear(9, 5)), BATCHES, 0.3,
                           own_class=True, progress=False)  # fmt: skip
    assert fxprune.report(copy.deepcopy(own)) == fxprune.report(own)
    packed = pickle.dumps(own)
    assert b"fxprune" not in packed
    code = f"import pickle, sys; net = pickle.loads({packed!r}); assert 'fxprune' not in sys.modules; print(net[1].out_features)"  # noqa: E501
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(found.stdout) == own[1].out_features < 9


def test_a_graph_has_no_class() -> None:
    graph = fxprune.capture(ZOO["residual"].build(), images()(2))
    with pytest.raises(NarrowError, match=r"Residual is a graph already, with no forward of its own"):
        fxprune.compress(graph, BATCHES, 0.3, own_class=True, progress=False)


@pytest.mark.parametrize("how", ["list", "batched"])
def test_attention_by_attributes_loses_heads(how: str) -> None:
    plan, limits = plan_in_class(Heads(how).eval(), torch.randn(2, 4, 6))
    assert not limits.held
    assert len(plan.keep["qkv"]) < 36


MODELS: dict[str, Any] = {
    "opt": lambda: T.OPTForCausalLM(T.OPTConfig(
        **SIZES, hidden_size=32, num_hidden_layers=1, ffn_dim=48, num_attention_heads=4, word_embed_proj_dim=32,
        max_position_embeddings=32,
    )),
    "gpt2": lambda: T.GPT2LMHeadModel(T.GPT2Config(**SIZES, n_embd=32, n_layer=1, n_head=4, n_positions=32)),
    "t5": lambda: T.T5ForConditionalGeneration(
        T.T5Config(**SIZES, d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=4)
    ),
    "whisper": lambda: T.WhisperForAudioClassification(T.WhisperConfig(
        **SIZES, d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=4, decoder_attention_heads=4,
        encoder_ffn_dim=48, decoder_ffn_dim=48, num_mel_bins=16, max_source_positions=20, pad_token_id=0,
    )),
    "siglip": lambda: T.SiglipVisionModel(T.SiglipVisionConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4, image_size=16, patch_size=8,
    )),
}  # fmt: skip
INPUTS: dict[str, Any] = {
    "opt": {"input_ids": WORDS}, "gpt2": {"input_ids": WORDS}, "t5": {"input_ids": WORDS, "decoder_input_ids": WORDS},
    "whisper": {"input_features": torch.randn(2, 16, 40)}, "siglip": {"pixel_values": torch.randn(2, 3, 16, 16)},
}  # fmt: skip


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", part_of(MODELS, 5))
def test_models_whose_layers_name_their_widths(name: str) -> None:
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    plan, limits = plan_in_class(model, INPUTS[name])
    own = fxprune.narrow(model, plan)
    assert type(own) is type(model)
    assert parameters(own) < 0.85 * parameters(model)
    assert bool(limits.held) == (name == "siglip")  # whose pooling is an nn.MultiheadAttention


class Auxiliary(nn.Module):
    """Has a second head that only training mode reads, as GoogLeNet and many detectors do."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 3)
        self.head, self.second = nn.Linear(8, 5), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Any:
        x = self.b(self.a(x).relu()).relu()
        y = self.head(self.c(x).relu().mean((2, 3)))
        return (y, self.second(x.mean((2, 3)))) if self.training else y


def test_what_only_training_mode_reads_is_held() -> None:
    model = Auxiliary().train()
    own: Any = fxprune.compress(model, BATCHES, 0.6, own_class=True, progress=False)
    assert own.b.out_channels == own.second.in_features == 8
    assert own.a.out_channels + own.c.out_channels < 16
    assert [y.shape for y in own(BATCHES[0][0])] == [(20, 5), (20, 5)]
    (reason,) = (frozen.reason for frozen in fxprune.report(own).frozen if frozen.sites == ("b",))
    assert "its own class does not run with fewer (mat1 and mat2 shapes cannot be multiplied" in reason


def test_a_module_is_blamed_where_others_have_the_same_code() -> None:
    """One of two blocks of a class does not run narrower."""

    class Block(nn.Module):
        def __init__(self, size: int) -> None:
            super().__init__()
            self.a, self.b, self.size = nn.Linear(8, 8), nn.Linear(8, 8), [size]

        def forward(self, x: Tensor) -> Tensor:
            y = self.a(x).relu()
            return x + self.b(y if len(self.size) > 1 else y.view(-1, *map(int, map(str, self.size))))

    model = nn.Sequential(Block(8), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 5))
    plan, limits = plan_in_class(model, torch.randn(2, 8))
    assert "0.a" in limits.held
    assert len(plan.keep["1"]) < 8
