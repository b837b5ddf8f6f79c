"""Plain models of transformers: a configuration that says the widths, and folders that transformers loads alone."""

from __future__ import annotations

import copy
import importlib
import json
import pickle
import re
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import parameters, part_of
from torch import Tensor

import fxprune
from fxprune.errors import ArtifactError, FxpruneError, FxpruneWarning, NarrowError, PlanError
from fxprune.rewriting.shorter_lists import shorten_config

pytestmark = [
    pytest.mark.filterwarnings("ignore"),  # of transformers
    pytest.mark.filterwarnings("default::fxprune.FxpruneWarning"),
]

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    T = pytest.importorskip("transformers")
    import experts

    from fxprune.integrations.huggingface import (
        compress_pretrained,
        from_pretrained,
        narrow_pretrained,
        save_pretrained,
    )

ENDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
TEXT = {
    "vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48,
    "max_position_embeddings": 64, **ENDS,
}  # fmt: skip
DECODER = {**TEXT, "num_key_value_heads": 2}
GPT = {"vocab_size": 50, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, **ENDS}
OPT = {
    "vocab_size": 50, "hidden_size": 32, "word_embed_proj_dim": 32, "ffn_dim": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "max_position_embeddings": 64, **ENDS,
}  # fmt: skip
HALF = {"num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 24}
HIDDEN = {"intermediate_size": 24}

# name: its arguments, and what half of all units changes in the configuration
DECODERS: dict[str, tuple[dict[str, Any], dict[str, int]]] = {
    "llama": (DECODER, HALF),
    "mistral": (DECODER, HALF),
    "qwen2": (DECODER, {**HALF, "head_dim": 8}),
    "qwen3": ({**DECODER, "head_dim": 8}, HALF),
    "gemma2": ({**DECODER, "head_dim": 8}, HALF),
    "gemma3_text": ({**DECODER, "head_dim": 8}, HALF),
    "phi": (DECODER, {**HALF, "head_dim": 8}),
    "phi3": (DECODER, {**HALF, "head_dim": 8}),
    "olmo2": (DECODER, HIDDEN),  # its norm runs over all heads
    "smollm3": (DECODER, {**HALF, "head_dim": 8}),
    "granite": (DECODER, {**HALF, "head_dim": 8}),
    "stablelm": (DECODER, HIDDEN),
    "gpt_neox": (TEXT, HIDDEN),
    "falcon": ({**TEXT, "new_decoder_architecture": True, "num_kv_heads": 2, "ffn_hidden_size": 48}, {}),
    "gpt2": (GPT, {"n_inner": 64}),
    "opt": (OPT, {"ffn_dim": 24}),
}
MIXTURES: dict[str, dict[str, int]] = {
    "mixtral": {"num_local_experts": 2, "intermediate_size": 8},
    "qwen3_moe": {"num_local_experts": 2, "moe_intermediate_size": 8},
    "olmoe": {"num_experts": 2},
    "gpt_oss": {"num_local_experts": 2},
    "deepseek_v3": {"n_routed_experts": 4},
}
HOW: dict[str, Any] = {"plain": True, "progress": False, "compensate": "none", "verify": False}


def batch(size: int = 4, length: int = 7) -> dict[str, Tensor]:
    """Words, of which the first sample has fewer, with padding behind."""
    words = torch.randint(3, 40, (size, length), generator=torch.Generator().manual_seed(size))
    mask = torch.ones_like(words)
    mask[0, -2:] = 0
    return {"input_ids": words, "attention_mask": mask, "labels": words}


def decoder(name: str) -> Any:
    torch.manual_seed(0)
    return T.AutoModelForCausalLM.from_config(T.AutoConfig.for_model(name, **DECODERS[name][0])).eval()


def generated(model: Any, **options: Any) -> Tensor:
    given = {name: value.flip(1) for name, value in batch(3, 5).items() if name != "labels"}  # padding in front
    ids = {"pad_token_id": 0, "eos_token_id": None, "do_sample": False, "max_new_tokens": 5}
    return model.generate(**given, **ids, **options)


def changed(own: Any, model: Any) -> dict[str, Any]:
    """The fields of a configuration that pruning changed."""
    before, after = model.config.to_dict(), own.config.to_dict()
    return {name: value for name, value in after.items() if before.get(name) != value}


def check_generation(own: Any, again: Any) -> None:
    assert torch.equal(generated(own), generated(again))
    assert torch.equal(generated(own), generated(own, use_cache=False))
    assert torch.equal(generated(own, num_beams=3), generated(again, num_beams=3))


NAMES = [*DECODERS, *MIXTURES]


@pytest.mark.parametrize("name", ["llama", *(pytest.param(n, marks=pytest.mark.wide) for n in NAMES if n != "llama")])
def test_half_of_a_decoder_is_a_checkpoint_like_any_other(name: str, tmp_path: Path) -> None:
    model = experts.family(name) if name in MIXTURES else decoder(name)
    own: Any = compress_pretrained(model, [batch(), batch(3, 5)], ratios={"*": 0.5}, **HOW)
    assert type(own) is type(model)
    assert parameters(own) < parameters(model)
    found = changed(own, model)
    wanted = MIXTURES[name] if name in MIXTURES else DECODERS[name][1]
    assert wanted.items() <= found.items()
    own.save_pretrained(tmp_path)
    again = T.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert type(again) is type(model)
    check_generation(own, again)
    assert not any(path.name.startswith("fxprune") for path in tmp_path.iterdir())
    assert "pruned_shapes" not in json.loads((tmp_path / "config.json").read_text())


def seq2seq(name: str) -> tuple[Any, dict[str, Tensor], dict[str, int]]:
    """An encoder-decoder, a batch, and what half of all units changes in its configuration."""
    torch.manual_seed(0)
    ends = {**ENDS, "decoder_start_token_id": 0}
    sizes = {f"{part}_{what}": n for part in ("encoder", "decoder") for what, n in PARTS.items()}
    labels, words = (torch.randint(3, 40, (6, n), generator=torch.Generator().manual_seed(n)) for n in (5, 7))
    told = {"input_ids": words, "attention_mask": torch.ones_like(words), "labels": labels}
    halves = {"encoder_ffn_dim": 24, "decoder_ffn_dim": 24}
    if name == "t5":
        config = T.T5Config(vocab_size=50, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, **ends)
        return T.T5ForConditionalGeneration(config).eval(), told, {"d_ff": 24, "num_heads": 2}
    if name == "bart":
        config = T.BartConfig(vocab_size=50, d_model=32, max_position_embeddings=64, **sizes, **ends)
        return T.BartForConditionalGeneration(config).eval(), told, halves
    audio = {"num_mel_bins": 16, "max_source_positions": 20, "max_target_positions": 32}
    config = T.WhisperConfig(
        vocab_size=50, d_model=32, suppress_tokens=None, begin_suppress_tokens=None, **audio, **sizes, **ends
    )
    heard = {"input_features": torch.randn(6, 16, 40, generator=torch.Generator().manual_seed(0)), "labels": labels}
    return T.WhisperForConditionalGeneration(config).eval(), heard, halves


SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
IMAGE = {**SIZES, "image_size": 16, "patch_size": 8}
TOLD: dict[str, Any] = {**SIZES, "vocab_size": 50, "max_position_embeddings": 64, **ENDS}


def encoder(name: str) -> tuple[Any, dict[str, Tensor]]:
    """A model without a decoder, and a batch."""
    torch.manual_seed(0)
    pixels = torch.randn(6, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    words, numbers = batch(6, 7), torch.arange(6) % 3
    words["input_ids"][:, -1] = 2  # an end, of which CLIP takes the value
    words["attention_mask"][:] = 1
    if name in ("clip", "siglip"):
        inner = {"text_config": {**TOLD, "projection_dim": 16}, "vision_config": {**IMAGE, "projection_dim": 16}}
        kind = {"clip": T.CLIPModel, "siglip": T.SiglipModel}[name]
        config = kind.config_class(**inner, **({"projection_dim": 16} if name == "clip" else {}))
        return kind(config).eval(), {**words, "pixel_values": pixels}
    if name in ("vit", "dinov2"):
        config = T.AutoConfig.for_model(name, **IMAGE, num_labels=3)
        return T.AutoModelForImageClassification.from_config(config).eval(), {"pixel_values": pixels, "labels": numbers}
    sizes = {**TOLD, "intermediate_size": 48, "num_labels": 3}
    more = {"cls_token_id": 1, "sep_token_id": 2} if name == "modernbert" else {}
    config = T.AutoConfig.for_model(name, **sizes, **more)
    return T.AutoModelForSequenceClassification.from_config(config).eval(), {**words, "labels": numbers}


ENCODERS = ("bert", "roberta", "modernbert", "deberta", "deberta-v2", "vit", "dinov2", "clip", "siglip")


@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.wide) for name in ENCODERS])
def test_half_of_an_encoder(name: str, tmp_path: Path) -> None:
    model, told = encoder(name)
    own: Any = compress_pretrained(model, [told], ratios={"*": 0.5}, **HOW)
    assert type(own) is type(model)
    assert parameters(own) < parameters(model)
    own.save_pretrained(tmp_path)
    again = type(own).from_pretrained(tmp_path).eval()
    options = {"return_loss": True} if name in ("clip", "siglip") else {}
    told = {name: value for name, value in told.items() if not options or name != "labels"}
    with torch.no_grad():
        found, wanted = again(**told, **options), own(**told, **options)
    assert torch.isfinite(wanted.loss)
    assert torch.equal(found.loss, wanted.loss)
    whole = own.config.to_dict()
    for part in (whole["text_config"], whole["vision_config"]) if options else (whole,):
        assert part["mlp_ratio"] == 2 if name == "dinov2" else part["intermediate_size"] == 24


@pytest.mark.wide
def test_a_ratio_that_has_to_be_whole() -> None:
    """The configuration of DINOv2 takes whole ratios alone, so that its layers keep multiples of their inputs."""
    model, told = encoder("dinov2")
    own: Any = compress_pretrained(model, [told], ratios={"*.fc1": 0.3}, **HOW)
    assert own.config.mlp_ratio == 3
    assert own.dinov2.encoder.layer[0].mlp.fc1.out_features == 96


PARTS = {"layers": 2, "attention_heads": 4, "ffn_dim": 48}


@pytest.mark.parametrize("way", ["plain", "own_class"])
@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.wide) for name in ("t5", "bart", "whisper")])
def test_half_of_an_encoder_decoder(name: str, way: str, tmp_path: Path) -> None:
    model, told, halves = seq2seq(name)
    own: Any = compress_pretrained(model, [told], ratios={"*": 0.5}, **{**HOW, "plain": False, way: True})
    assert type(own) is type(model)
    assert parameters(own) < parameters(model)
    given = {name: value for name, value in told.items() if name != "labels"}
    options = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None}
    found = own.generate(**given, **options)
    assert torch.equal(found, own.generate(**given, **options, use_cache=False))
    assert torch.isfinite(own(**told).loss)
    if way == "plain":
        assert changed(own, model) == halves
        own.save_pretrained(tmp_path)
        again = type(own).from_pretrained(tmp_path).eval()
        assert torch.equal(
            again.generate(**given, **options, num_beams=2), own.generate(**given, **options, num_beams=2)
        )
    else:
        assert changed(own, model).keys() == {"pruned_shapes"}


ALONE = """
import sys
sys.modules["fxprune"] = None
import torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1]).eval()
given = torch.load(sys.argv[2], weights_only=True)
print(model.generate(**given, pad_token_id=0, eos_token_id=None, do_sample=False, max_new_tokens=5).tolist())
"""


@pytest.fixture(scope="module")
def llama() -> Any:
    return decoder("llama")


@pytest.fixture(scope="module")
def plain(llama: Any) -> Any:
    return compress_pretrained(llama, [batch(), batch(3, 5)], params=0.7, plain=True, progress=False)


@pytest.mark.wide
def test_another_process_loads_it_without_fxprune(llama: Any, plain: Any, tmp_path: Path) -> None:
    report = fxprune.report(plain)
    assert report.error < 1e-5
    assert 0.6 < report.budget.achieved <= 0.7
    assert plain.state_dict().keys() == llama.state_dict().keys()  # no new biases
    save_pretrained(plain, tmp_path / "folder")
    given = {name: value.flip(1) for name, value in batch(3, 5).items() if name != "labels"}
    torch.save(given, tmp_path / "given.pt")
    command = [sys.executable, "-c", ALONE, str(tmp_path / "folder"), str(tmp_path / "given.pt")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == generated(plain).tolist()


def test_a_plain_model_trains_and_is_saved_again(plain: Any, tmp_path: Path) -> None:
    own = pickle.loads(pickle.dumps(copy.deepcopy(plain)))
    trained = copy.deepcopy(plain).train()
    optimizer = torch.optim.SGD(trained.parameters(), lr=0.1)
    trained(**batch()).loss.backward()
    optimizer.step()
    trained.save_pretrained(tmp_path)  # of the copy, not of the one that it was copied from
    again = T.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in trained.state_dict().items())
    assert not torch.equal(trained.lm_head.weight, plain.lm_head.weight)
    assert torch.equal(generated(own), generated(plain))


def test_a_folder_that_does_not_load_is_an_error(plain: Any, tmp_path: Path) -> None:
    own = copy.deepcopy(plain)
    own.config.intermediate_size += 8
    with pytest.raises(ArtifactError, match=r"cannot be loaded again|is not that which was saved"):
        own.save_pretrained(tmp_path)


SAVED: dict[str, dict[str, Any]] = {
    "variant": {"variant": "fp16"},
    "other tensors": {"state_dict": lambda own: {name: t.half() for name, t in own.state_dict().items()}},
    "by another process": {"is_main_process": False},
}


@pytest.mark.parametrize("options", SAVED.values(), ids=SAVED)
def test_it_is_saved_by_the_options_of_its_class(plain: Any, options: dict[str, Any], tmp_path: Path) -> None:
    given = {name: value(plain) if callable(value) else value for name, value in options.items()}
    plain.save_pretrained(tmp_path, **given)
    if not given.get("is_main_process", True):
        assert not list(tmp_path.iterdir())
        return
    again = T.AutoModelForCausalLM.from_pretrained(tmp_path, variant=given.get("variant"), dtype="auto")
    wanted = given.get("state_dict", plain.state_dict())
    assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in wanted.items())


def test_what_is_no_number_is_saved_and_a_file_is_no_folder(plain: Any, tmp_path: Path) -> None:
    own = copy.deepcopy(plain)
    with torch.no_grad():
        own.lm_head.weight[0, 0] = torch.nan
    own.save_pretrained(tmp_path / "folder", True)
    assert T.AutoModelForCausalLM.from_pretrained(tmp_path / "folder").lm_head.weight[0, 0].isnan()
    (tmp_path / "file").touch()
    with pytest.raises(ArtifactError, match=r"file is a file: name a folder"):
        plain.save_pretrained(tmp_path / "file")


@pytest.mark.parametrize("tied", [False, True])
def test_the_configuration_has_to_build_the_model(tied: bool) -> None:
    torch.manual_seed(0)
    model: Any = T.LlamaForCausalLM(T.LlamaConfig(**DECODER, tie_word_embeddings=tied)).eval()
    embedding = model.get_input_embeddings().weight
    model.lm_head.weight = torch.nn.Parameter(embedding.detach() + 1) if tied else embedding
    told = r"\(50, 32\) in the model, and missing or tied" if tied else "one tensor with another parameter in the model"
    with pytest.raises(NarrowError, match=rf"lm_head\.weight is {told}.*set tie_word_embeddings as the model has it"):
        compress_pretrained(model, [batch()], params=0.8, **HOW)


def test_a_model_that_was_pruned_builds_no_other(llama: Any, tmp_path: Path) -> None:
    own: Any = compress_pretrained(
        llama, [batch()], ratios={"*mlp*": 0.5}, own_class=True, compensate="none", progress=False
    )
    with pytest.raises(NarrowError, match=r"is \(32, \d+\) in the model.*prune the model that it was made from"):
        compress_pretrained(own, [batch()], params=0.8, **HOW)
    with pytest.raises(ArtifactError, match=r"model= is a LlamaForCausalLM that was pruned itself"):
        save_pretrained(own, tmp_path, own)


@pytest.mark.parametrize("name", part_of(["mixtral", "qwen3_moe"], 2))
def test_experts_of_one_kernel_keep_the_multiples_that_it_needs(name: str) -> None:
    model = experts.family(name, "grouped_mm")
    own: Any = compress_pretrained(model, [batch(), batch(3, 5)], params=0.7, **HOW)
    width = getattr(own.config, "moe_intermediate_size", own.config.intermediate_size)
    assert width % 4 == 0
    assert parameters(own) < 0.75 * parameters(model)
    assert own(**batch()).loss.isfinite()


def test_numbers_of_layers_in_a_configuration_are_those_that_stay() -> None:
    config = T.Qwen3MoeConfig(mlp_only_layers=[0, 2, 3], num_hidden_layers=4)
    shorten_config(config, "num_hidden_layers", 4, [0, 1, 3])
    assert (config.num_hidden_layers, config.mlp_only_layers) == (3, [0, 2])


def test_a_plain_folder_is_not_one_of_ours(plain: Any, tmp_path: Path) -> None:
    save_pretrained(plain, tmp_path)
    with pytest.raises(ArtifactError, match="holds a plain checkpoint: load it with transformers, AutoModel"):
        from_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "pruned_shapes": {}}))
    with pytest.raises(ArtifactError, match=r"holds a narrowed class, .*save_pretrained\(model, folder, original\)$"):
        from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("share", "heads"), [(0.25, (8, 4)), pytest.param(0.6, (4, 2), marks=pytest.mark.wide), (0.75, (2, 1))]
)
def test_heads_are_as_many_as_the_configuration_takes(share: float, heads: tuple[int, int], tmp_path: Path) -> None:
    """Of four heads of keys, three would make six of queries, and transformers wants a divisor of 32."""
    config = T.AutoConfig.for_model("llama", **DECODER | {"num_attention_heads": 8, "num_key_value_heads": 4})
    model = T.AutoModelForCausalLM.from_config(config).eval()
    own = compress_pretrained(model, [batch()], ratios={"*k_proj": share, "*gate_proj": 0.5}, **HOW)
    assert (own.config.num_attention_heads, own.config.num_key_value_heads, own.config.head_dim) == (*heads, 4)
    own.save_pretrained(tmp_path)
    check_generation(own, T.AutoModelForCausalLM.from_pretrained(tmp_path).eval())


def test_a_configuration_that_its_own_checks_refuse_is_none() -> None:
    model = decoder("llama")
    model.config.num_attention_heads = 5
    with pytest.raises(NarrowError, match=r"cannot be built by its configuration alone \(ValueError: The hidden size"):
        compress_pretrained(model, [batch()], params=0.8, **HOW)


@pytest.mark.parametrize("value", [1.5, "8", {"hidden": 1.5}])
def test_multiples_of_a_plain_model_are_whole(llama: Any, value: Any) -> None:
    with pytest.raises(PlanError, match=r"round_to.* it is a whole number, at least 1"):
        compress_pretrained(llama, [batch()], params=0.8, round_to=value, **HOW)


@pytest.mark.parametrize(
    ("value", "told"),
    [
        ({"experts": 2}, r"round_to: the model has no prunable units of the kind 'experts'; it has 48 'hidden', 2 'h"),
        (
            {"heads": 3},
            r"round_to: 3 is more than the 2 'heads' of a layer, none of which could be removed; .*'heads': 1",
        ),
        (16, r"round_to: 16 is more than the 2 'heads' .* has 48 'hidden', 2 'heads': give a multiple for each kind"),
        ({"hidden": 64}, r"round_to: 64 is more than the 48 'hidden' of a layer"),
    ],
)
def test_multiples_of_a_plain_model_fit_its_layers(llama: Any, value: Any, told: str) -> None:
    with pytest.raises(PlanError, match=told):
        compress_pretrained(llama, [batch()], params=0.8, round_to=value, **HOW)


def test_the_steps_of_a_class_count_in_multiples() -> None:
    model, told = encoder("dinov2")
    with pytest.raises(
        PlanError, match=r"round_to: 5 \(with the steps of its class, 160\) is more than the 128 'hidden'"
    ):
        compress_pretrained(model, [told], ratios={"*": 0.5}, round_to={"hidden": 5}, **HOW)


def budget_of(model: Any, told: Any = None, **options: Any) -> str:
    """The message for a budget that cannot be reached."""
    with pytest.raises(fxprune.UnreachableError) as error:
        compress_pretrained(model, told or [batch(), batch(3, 5)], **{**HOW, "params": 0.05, **options})
    return str(error.value)


@pytest.mark.wide
def test_advice_for_a_budget_that_a_plain_model_cannot_reach(llama: Any) -> None:
    """What is advised can be done: nothing that a plain model refuses, and no multiple that its class needs."""
    assert fxprune.UnreachableError is fxprune.errors.UnreachableError
    assert re.search(
        r"35\.4% is the least that can be reached: raise params=0\.05 to at least 0\.354$", budget_of(llama)
    )
    rounded = budget_of(llama, params=0.3, round_to={"hidden": 16})
    assert re.search(r"reached: lower round_to={'hidden': 16} or raise params=0\.3 to at least 0\.5", rounded)
    at_least = re.search(r"at least (\S+)$", rounded)
    assert at_least is not None
    share = float(at_least[1])
    own: Any = compress_pretrained(llama, [batch(), batch(3, 5)], params=share, round_to={"hidden": 16}, **HOW)
    assert parameters(own) <= share * parameters(llama)


@pytest.mark.wide
def test_advice_that_leads_out_of_plain_models() -> None:
    model = decoder("gpt2")  # whose heads no configuration can have fewer of
    told = budget_of(model, params=0.4)
    assert "reached: use own_class=True in place of plain=True or raise params=0.4" in told
    own: Any = compress_pretrained(model, [batch()], params=0.4, **{**HOW, "plain": False, "own_class": True})
    assert parameters(own) <= 0.4 * parameters(model)
    assert "score with inexact=True" in budget_of(decoder("olmo2"))  # whose norm runs over all heads
    model, batches = encoder("dinov2")
    assert "round_to" not in budget_of(model, [batches])
    assert budget_of(decoder("llama"), rounds=2) == budget_of(decoder("llama"))


def test_inexact_where_it_frees_nothing_that_a_configuration_says(llama: Any) -> None:
    told = r"inexact=True prunes nothing more of a plain model: no field of LlamaConfig says .* leave out plain=True"
    with pytest.raises(NarrowError, match=told):
        compress_pretrained(llama, [batch()], params=0.8, inexact=True, **HOW)


@pytest.mark.wide
def test_inexact_where_a_norm_runs_over_all_heads() -> None:
    model = decoder("olmo2")
    own: Any = compress_pretrained(model, [batch(), batch(3, 5)], ratios={"*": 0.5}, inexact=True, **HOW)
    assert HALF.items() <= changed(own, model).items()


def test_a_plain_model_is_narrow_already(llama: Any, plain: Any) -> None:
    with pytest.raises(FxpruneError, match=r"LlamaForCausalLM is a model of its own class already, by plain=True"):
        narrow_pretrained(plain, llama)
    with pytest.raises(FxpruneError, match=r"LlamaForCausalLM has no plan: give the graph that compress_pretrained or"):
        narrow_pretrained(llama, llama)


def test_what_a_plain_model_cannot_have(llama: Any) -> None:
    others = {"submodule": "model", "equal_blocks": False, "new_biases": True, "own_class": False}
    for name, value in others.items():
        with pytest.raises(NarrowError, match=rf"plain=True needs {name}=.*: (the c|a plain model is one of its own)"):
            compress_pretrained(llama, [batch()], params=0.8, **{**HOW, name: value})


def test_a_class_whose_configuration_says_no_widths() -> None:
    torch.manual_seed(0)
    config = T.BloomConfig(vocab_size=50, hidden_size=32, n_layer=2, n_head=4, **ENDS)
    message = r"BloomForCausalLM cannot be built narrower .*: no change of n_head.* own_class=True in place of plain"
    with pytest.raises(NarrowError, match=message):
        compress_pretrained(T.BloomForCausalLM(config).eval(), [batch()], params=0.8, **HOW)


def test_layers_cannot_have_configurations_of_their_own(llama: Any) -> None:
    """Transformers' `per_layer_config` changes what a configuration says of a layer, and not what classes build."""
    described = llama.config.to_dict() | {"per_layer_config": {1: {"intermediate_size": 24}}}
    with pytest.raises(Exception, match="intermediate_size"):  # ambiguous, as the class asks for one of all layers
        T.LlamaForCausalLM(T.LlamaConfig(**described))


@pytest.mark.wide
def test_a_model_narrowed_to_its_own_class_is_never_saved_in_silence(llama: Any, tmp_path: Path) -> None:
    loader = [batch(), batch(3, 5)]
    own: Any = narrow_pretrained(
        compress_pretrained(llama, loader, 0.4, progress=False, compensate="none", verify=False), llama
    )
    shapes = own.config.pruned_shapes
    assert shapes["model.layers.0.mlp.up_proj.weight"] == list(own.model.layers[0].mlp.up_proj.weight.shape)
    with pytest.warns(
        FxpruneWarning, match=r"no class loads the folder .*: layers of this LlamaForCausalLM have other"
    ):
        own.save_pretrained(tmp_path / "theirs")
    own.train()
    optimizer = torch.optim.SGD(own.parameters(), lr=0.1)
    own(**batch()).loss.backward()
    optimizer.step()
    own.eval()
    own.model.embed_tokens.requires_grad_(False)
    save_pretrained(own, tmp_path / "ours", llama)
    again: Any = from_pretrained(tmp_path / "ours", own_class=True)
    assert torch.equal(generated(again), generated(own))
    assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in own.state_dict().items())
    assert not again.model.embed_tokens.weight.requires_grad
    assert fxprune.report(again) == fxprune.report(own)
    with pytest.raises(ArtifactError, match="LlamaForCausalLM is no plain model: pass model="):
        save_pretrained(own, tmp_path / "ours")
    with pytest.raises(ArtifactError, match=r"model\.safetensors holds the weights of another checkpoint"):
        save_pretrained(own, tmp_path / "theirs", llama)
    with pytest.raises(ArtifactError, match=r"fxprune\.safetensors holds the weights of another checkpoint"):
        own.save_pretrained(tmp_path / "ours")


def test_a_gguf_file_of_a_plain_folder(plain: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The widths and the tensors of a file for llama.cpp, which transformers reads again."""
    gguf = pytest.importorskip("gguf")
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "examples"))
    write = importlib.import_module("gguf_file").write
    plain.save_pretrained(tmp_path)
    write(tmp_path, tmp_path / "small.gguf")
    reader = gguf.GGUFReader(tmp_path / "small.gguf")
    config = plain.config
    assert reader.fields["llama.feed_forward_length"].contents() == config.intermediate_size
    assert reader.fields["llama.attention.head_count_kv"].contents() == config.num_key_value_heads
    shapes = {tensor.name: tuple(int(n) for n in tensor.shape) for tensor in reader.tensors}
    assert shapes["blk.1.ffn_gate.weight"] == (config.hidden_size, config.intermediate_size)
    assert shapes["blk.0.attn_q.weight"] == (config.hidden_size, config.num_attention_heads * config.head_dim)
    assert len(shapes) == len(plain.state_dict())
    again = T.AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="small.gguf").eval()
    assert torch.equal(generated(again), generated(plain))


def test_what_vllm_looks_for(plain: Any, tmp_path: Path) -> None:
    """Its LLaMA makes all shapes of the configuration, and loads tensors by these names; others are errors there."""
    from safetensors import safe_open

    plain.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    width, hidden = config["hidden_size"], config["intermediate_size"]
    queries, keys = (config[name] * config["head_dim"] for name in ("num_attention_heads", "num_key_value_heads"))
    wanted = {"model.embed_tokens": (config["vocab_size"], width), "model.norm": (width,)}
    wanted["lm_head"] = (config["vocab_size"], width)
    for layer in range(config["num_hidden_layers"]):
        attention = {"q_proj": (queries, width), "k_proj": (keys, width), "v_proj": (keys, width)}
        attention["o_proj"] = (width, queries)
        mlp = {"gate_proj": (hidden, width), "up_proj": (hidden, width), "down_proj": (width, hidden)}
        for part, shapes in (("self_attn", attention), ("mlp", mlp)):
            wanted |= {f"model.layers.{layer}.{part}.{name}": shape for name, shape in shapes.items()}
        wanted |= {f"model.layers.{layer}.{norm}": (width,) for norm in ("input_layernorm", "post_attention_layernorm")}
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        found = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    assert found == {f"{name}.weight": shape for name, shape in wanted.items()}
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["num_attention_heads"] % config["num_key_value_heads"] == 0


def vision_language(name: str) -> Any:
    """A model of images and texts with a language model of two layers."""
    torch.manual_seed(0)
    words = {**TOLD, "num_key_value_heads": 2}
    if name == "llava":
        vision = T.CLIPVisionConfig(**IMAGE, projection_dim=16)
        config = T.LlavaConfig(vision_config=vision, text_config=T.LlamaConfig(**words), image_token_index=49)
        return T.LlavaForConditionalGeneration(config).eval()
    vision = {"depth": 1, "embed_dim": 32, "hidden_size": 32, "num_heads": 4, "patch_size": 4}
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}
    config = T.Qwen2VLConfig(
        text_config={**words, "rope_parameters": rope}, vision_config=vision, image_token_id=49, video_token_id=48,
        vision_start_token_id=47, vision_end_token_id=46,
    )  # fmt: skip
    return T.Qwen2VLForConditionalGeneration(config).eval()


@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.wide) for name in ("llava", "qwen2_vl")])
def test_the_language_part_of_a_model_of_images_and_texts(name: str, tmp_path: Path) -> None:
    """Batches of texts prune what these run through; the part for images is kept."""
    model = vision_language(name)
    own: Any = compress_pretrained(model, [batch(), batch(3, 5)], ratios={"*": 0.5}, **HOW)
    assert own.config.text_config.intermediate_size == 24
    assert own.config.vision_config.to_dict() == model.config.vision_config.to_dict()
    own.save_pretrained(tmp_path)
    again = T.AutoModelForImageTextToText.from_pretrained(tmp_path).eval()
    assert type(again) is type(model)
    assert torch.equal(generated(again), generated(own))


@pytest.mark.filterwarnings("error::fxprune.FxpruneWarning")
@pytest.mark.parametrize("name", ["llama", pytest.param("qwen2_vl", marks=pytest.mark.wide)])
def test_lengths_of_a_decoder_are_free(name: str) -> None:
    """Its words and mask are changed together: a mask of another length than the words is none that a user gives."""
    model = decoder(name) if name in DECODERS else vision_language(name)
    small = compress_pretrained(model, [batch(), batch(3, 5)], ratios={"*": 0.5}, progress=False, compensate="none")
    assert fxprune.report(small).error < 1e-5


@pytest.mark.wide
@pytest.mark.parametrize(("keys", "attention"), [(1, "sdpa"), (2, "sdpa"), (2, "eager")])
def test_queries_that_share_keys_and_values(keys: int, attention: str, tmp_path: Path) -> None:
    """Of each group of queries the same are removed; a single head of keys leaves no other choice."""
    torch.manual_seed(0)
    sizes = {**TEXT, "num_attention_heads": 8, "num_key_value_heads": keys, "head_dim": 8}
    model = T.LlamaForCausalLM(T.LlamaConfig(**sizes, attn_implementation=attention)).eval()
    options = {"ratios": {"*.q_proj": 0.5}, "plain": True, "compensate": "none", "progress": False}
    own: Any = compress_pretrained(model, [batch(), batch(3, 5)], query_heads=keys > 1, **options)
    assert changed(own, model) == {"num_attention_heads": 4}
    report = fxprune.report(own)
    assert report.error < 1e-5
    assert [(group.before, group.after) for group in report.groups[:1]] == [(8 // keys, 4 // keys)]
    own.save_pretrained(tmp_path)
    check_generation(own, T.AutoModelForCausalLM.from_pretrained(tmp_path).eval())
