"""Folders with decoders, pruned one block at a time: equal to the whole model's removal, resumable, plain."""

from __future__ import annotations

import gc
import json
import signal
import subprocess
import sys
import warnings
import weakref
from pathlib import Path
from typing import Any

import pytest
import ranks
import torch
from safetensors import safe_open
from torch import Tensor, nn

import fxprune
from fxprune.errors import CalibrationError, CaptureError, CheckpointError, NarrowError, PlanError

pytestmark = [
    pytest.mark.filterwarnings("ignore"),  # of transformers
    pytest.mark.filterwarnings("default::fxprune.FxpruneWarning"),
]

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    T = pytest.importorskip("transformers")
    from fxprune.integrations.blockwise import compress_folder, passes
    from fxprune.integrations.blockwise.source import Source, filled, source_of
    from fxprune.integrations.blockwise.stream import keeper, stream_into

SIZES: dict[str, Any] = {
    "vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 48, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


def batches(count: int = 3, length: int = 9, *, padded: bool = False) -> list[dict[str, Tensor]]:
    words = torch.randint(3, 40, (count, 4, length), generator=torch.Generator().manual_seed(1))
    masks = torch.ones_like(words)
    masks[:, 0, -2:] = 0 if padded else 1
    return [{"input_ids": w, "attention_mask": m, "labels": w} for w, m in zip(words, masks, strict=True)]


def saved(folder: Path, name: str = "llama", dtype: torch.dtype = torch.float32, **more: Any) -> Any:
    """A random model, written in several files beside a tokenizer's."""
    torch.manual_seed(0)
    model = T.AutoModelForCausalLM.from_config(T.AutoConfig.for_model(name, **{**SIZES, **more})).eval()
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    model.to(dtype).save_pretrained(folder, max_shard_size="20KB")
    (folder / "tokenizer.json").write_text("{}")
    return model


def loaded(folder: Path) -> Any:
    return T.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@torch.no_grad()
def logits(model: Any, batch: dict[str, Tensor]) -> Tensor:
    return model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[1:]


def error(small: Any, model: Any) -> float:
    pairs = [(logits(small, b), logits(model.float(), b)) for b in batches(6)]
    return float(torch.stack([(a - b).square().mean() for a, b in pairs]).mean())


FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"tie_word_embeddings": True},
    "qwen2": {},
    "mistral": {"sliding_window": 4},
    "gpt_neox": {},
    "gemma2": {"head_dim": 8},
    "phi3": {},
}


OTHERS = [pytest.param(name, marks=pytest.mark.wide) for name in FAMILIES if name != "llama"]


@pytest.mark.parametrize("name", ["llama", *OTHERS])
def test_the_plain_removal_is_that_of_the_whole_model(name: str, tmp_path: Path) -> None:
    model = saved(tmp_path / "whole", name, **FAMILIES[name])
    given, allocate = batches(padded=name == "llama"), "measured" if name in ("qwen2", "gpt_neox") else "uniform"
    found = compress_folder(
        tmp_path / "whole", tmp_path / "small", given, params=0.7, compensate="none", allocate=allocate
    )
    assert found.plan.budget is not None
    assert 0.6 < found.plan.budget.achieved <= 0.7
    assert max(block.proof for block in found.blocks) < 1e-5
    own = loaded(tmp_path / "small")
    config = json.loads((tmp_path / "small" / "config.json").read_text())
    assert found.config
    assert all(config[field] == new for field, (_, new) in found.config.items())
    model.config.use_cache = False
    wanted = fxprune.apply(model, fxprune.Plan.load(tmp_path / "small" / "plan.json"))
    for batch in given:
        out = wanted(**{key: value for key, value in batch.items() if key != "labels"})
        assert torch.allclose(logits(own, batch), out["logits"][1:], atol=1e-5)
    names = {path.name for path in (tmp_path / "small").iterdir()}
    assert {"tokenizer.json", "generation_config.json", "blocks.json"} <= names
    assert not [name for name in names if name.startswith("scores")]


@pytest.mark.wide
def test_the_refit_makes_up_for_the_blocks_before(tmp_path: Path) -> None:
    model = saved(tmp_path / "whole", num_hidden_layers=3)
    given, errors = batches(16, 16), {}
    for level in ("none", "sequential"):
        found = compress_folder(tmp_path / "whole", tmp_path / level, given, params=0.6, compensate=level)
        errors[level] = error(loaded(tmp_path / level), model)
    assert errors["sequential"] < 0.8 * errors["none"]
    assert all(block.after < block.before for block in found.blocks)
    assert "by the refit" in str(found)


@pytest.mark.wide
def test_a_small_memory_gives_files_of_hidden_states_and_the_dtype_of_the_source(tmp_path: Path) -> None:
    saved(tmp_path / "whole", dtype=torch.bfloat16)
    found = compress_folder(
        tmp_path / "whole", tmp_path / "small", batches(), macs=0.8, memory=4096, allocate="uniform"
    )
    own = T.AutoModelForCausalLM.from_pretrained(tmp_path / "small", dtype="auto")
    assert {p.dtype for p in own.parameters()} == {torch.bfloat16}
    assert found.plan.budget is not None
    assert found.plan.budget.of == "macs"


def test_tensors_in_memory_and_in_a_file(tmp_path: Path) -> None:
    keep, given = keeper(tmp_path, 100), [torch.randn(3, 5), torch.randn(7), torch.randn(2, 2)]
    kept = [keep(tensor) for tensor in given]
    kept[2] += 1
    assert all(torch.equal(a, b) for a, b in zip(kept[:2], given, strict=False))
    assert torch.equal(kept[2], given[2] + 1)
    assert not list(tmp_path.iterdir())  # the file vanishes with its process


KILLED = """
import logging, os, signal, sys, warnings
warnings.simplefilter("ignore")
sys.path[:0] = [{tests!r}]
import torch
torch.set_num_threads(1)
import test_blockwise

def kill(record):
    if record.getMessage() == {after!r}:
        os.kill(os.getpid(), signal.SIGKILL)

logger = logging.getLogger("fxprune.integrations.blockwise.passes")
logger.setLevel(logging.INFO)
logger.addFilter(kill)
test_blockwise.compress_folder({whole!r}, {small!r}, test_blockwise.batches(), params=0.7)
"""


@pytest.mark.wide
def test_a_run_that_was_killed_continues_to_the_same_files(tmp_path: Path) -> None:
    saved(tmp_path / "whole")
    compress_folder(tmp_path / "whole", tmp_path / "small", batches(), params=0.7)
    target = tmp_path / "resumed"
    folder = tmp_path / ".resumed.unfinished"
    for after, done in {"scored model.layers.0": "scores-00000.npz", "wrote model.layers.0": "blocks.json"}.items():
        names = {"tests": str(Path(__file__).parent), "after": after, "whole": str(tmp_path / "whole")}
        script = KILLED.format(**names, small=str(target))
        ended = subprocess.run([sys.executable, "-c", script], check=False, timeout=600)
        assert ended.returncode == -signal.SIGKILL
        assert (folder / done).exists()
        assert not target.exists()
    with pytest.raises(CheckpointError, match="unfinished run with other arguments, other samples or another source"):
        compress_folder(tmp_path / "whole", target, batches(), params=0.6)
    compress_folder(tmp_path / "whole", target, batches(), params=0.7)
    assert not folder.exists()
    files = {path.name for path in target.iterdir()}
    assert files == {path.name for path in (tmp_path / "small").iterdir()}
    for name in files:
        if name.endswith(".safetensors"):
            with safe_open(target / name, "pt") as ours, safe_open(tmp_path / "small" / name, "pt") as theirs:
                assert ours.keys() == theirs.keys()
                assert all(torch.equal(ours.get_tensor(key), theirs.get_tensor(key)) for key in ours.keys())  # noqa: SIM118
        else:
            assert (target / name).read_bytes() == (tmp_path / "small" / name).read_bytes()


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = tmp_path_factory.mktemp("blockwise") / "whole"
    saved(folder)
    return folder


def source(folder: Path) -> Source:
    return source_of(folder)


def test_what_enters_the_blocks(whole: Path) -> None:
    found = stream_into(source(whole), batches(), keeper(whole, 1 << 20))
    model, given = loaded(whole), batches()
    for states, batch in zip(found.states, given, strict=True):
        assert torch.equal(states, model.model.embed_tokens(batch["input_ids"]))
    assert found.calls[0][0].keys() == {"attention_mask", "position_embeddings", "position_ids"} - (
        set() if "attention_mask" in found.calls[0][0] else {"attention_mask"}
    )
    for number, layer in enumerate(model.model.layers):
        found.through(layer, number)
    with torch.no_grad():
        wanted = model.model(**{key: v for key, v in given[0].items() if key != "labels"}).last_hidden_state
        assert torch.allclose(model.model.norm(found.states[0]), wanted, atol=1e-6)
    shared = found.calls[0][0]["position_embeddings"][0]
    assert shared is found.calls[1][2]["position_embeddings"][0]


def test_hidden_states_that_change_between_blocks(whole: Path) -> None:
    own = source(whole)
    own.model.model.layers[1].register_forward_pre_hook(lambda _, given: (2 * given[0],))  # type: ignore[union-attr, index, operator]
    with pytest.raises(CaptureError, match=r"does not hand the output of model\.layers\.0 to model\.layers\.1"):
        stream_into(own, batches(), keeper(whole, 1 << 20))


def test_a_block_that_is_not_run(whole: Path) -> None:
    own = source(whole)
    own.model.config.num_hidden_layers = 1
    with pytest.raises(CaptureError, match=r"does not run model\.layers\.1 on batch 0"):
        stream_into(own, batches(), keeper(whole, 1 << 20))


def test_padding_in_some_batches_alone(whole: Path) -> None:
    with pytest.raises(CalibrationError, match=r"batch 3 of the loader gives model\.layers\.0 other kinds"):
        stream_into(source(whole), [*batches(padded=True), *batches(1)], keeper(whole, 1 << 20))


def test_a_folder_of_another_class(whole: Path, tmp_path: Path) -> None:
    saved(tmp_path / "other")
    path = tmp_path / "other" / "config.json"
    for name, message in (("NoSuchModel", "names the class NoSuchModel"), (None, "names the class none")):
        path.write_text(json.dumps(json.loads(path.read_text()) | {"architectures": name and [name]}))
        with pytest.raises(CheckpointError, match=message):
            source(tmp_path / "other")
    config = json.loads(path.read_text()) | {"architectures": ["LlamaForCausalLM"]}
    path.write_text(
        json.dumps(config | {"quantization_config": {"quant_method": "bitsandbytes", "load_in_8bit": True}})
    )
    with pytest.raises(CheckpointError, match="holds quantized weights: prune the model before it is quantized"):
        source(tmp_path / "other")
    path.write_text("{")
    with pytest.raises(CheckpointError, match=r"config\.json cannot be read"):
        source(tmp_path / "other")


def test_files_that_do_not_fit_the_configuration(tmp_path: Path) -> None:
    saved(tmp_path / "other")
    path = tmp_path / "other" / "config.json"
    config = json.loads(path.read_text())
    for field, value, message in (
        ("num_hidden_layers", 3, "lacks model.layers.2.self_attn.q_proj.weight .32, 32., which LlamaForCausalLM has"),
        ("intermediate_size", 40, r"proj\.weight is .*48.* in .*safetensors, and .*40.* by config\.json"),
    ):
        path.write_text(json.dumps(config | {field: value}))
        with pytest.raises(CheckpointError, match=message):
            source(tmp_path / "other")


def test_models_without_one_list_of_blocks(tmp_path: Path) -> None:
    sizes = {"d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4}
    more = {"decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "vocab_size": 50}
    T.BartForConditionalGeneration(T.BartConfig(**sizes, **more)).save_pretrained(tmp_path / "bart")
    with pytest.raises(NarrowError, match="has 2 lists of 2 blocks"):
        source(tmp_path / "bart")


def test_arguments(whole: Path, tmp_path: Path) -> None:
    for wrong in ({}, {"params": 0.5, "macs": 0.5}):
        with pytest.raises(PlanError, match="takes one budget: pass params= or macs="):
            compress_folder(whole, tmp_path / "small", batches(), **wrong)
    with pytest.raises(PlanError, match="compensate is 'ridge'; block by block it is one of sequential, none"):
        compress_folder(whole, tmp_path / "small", batches(), params=0.5, compensate="ridge")
    with pytest.raises(PlanError, match="allocate is 'tod'; block by block it is one of measured, uniform"):
        compress_folder(whole, tmp_path / "small", batches(), params=0.5, allocate="tod")
    with pytest.raises(fxprune.FxpruneError, match="memory is 0; it is a whole number of bytes"):
        compress_folder(whole, tmp_path / "small", batches(), params=0.5, memory=0)
    with pytest.raises(CheckpointError, match="whole exists"):
        compress_folder(whole, whole, batches(), params=0.5)
    assert not list(tmp_path.iterdir())


@pytest.mark.wide
@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch was built without distributed")
def test_ranks_share_the_samples(tmp_path: Path) -> None:
    model = saved(tmp_path / "whole")
    assert ranks.started(tmp_path, 2, "blocks") == [0, 0]
    first, second = (ranks.told(tmp_path, rank) for rank in (0, 1))
    for level in ("none", "sequential"):
        alone = tmp_path / f"alone-{level}"
        report = compress_folder(tmp_path / "whole", alone, ranks.words(), params=0.6, compensate=level)
        assert first[level] == second[level]
        plans = {text.partition("model.layers.0")[0] for text in (first[level], repr(str(report)))}
        assert len(plans) == 1
        one, both = (loaded(folder) for folder in (alone, tmp_path / level))
        assert len({(folder / "config.json").read_text() for folder in (alone, tmp_path / level)}) == 1
        assert error(both, model) == pytest.approx(error(one, model), rel=0.1 if level == "sequential" else 1e-4)
    assert error(loaded(tmp_path / "sequential"), model) < 0.7 * error(loaded(tmp_path / "none"), model)
    for told in (first, second):
        assert "the loader has 1 batches for 2 ranks: give at least one" in told["few"]
        assert "none exists" in told["exists"]
    assert "the call of compress_folder on rank 1 is one with the digest" in first["other samples"]
    assert not list(tmp_path.glob("*few*")) + list(tmp_path.glob("*other*"))


def test_weights_that_accelerate_offloaded() -> None:
    accelerate = pytest.importorskip("accelerate")
    model = T.LlamaForCausalLM(T.LlamaConfig(**SIZES)).eval()
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    for call in (fxprune.score, fxprune.compress):
        with pytest.raises(CaptureError, match=r"embed_tokens\.weight of LlamaForCausalLM is offloaded by accelerate"):
            call(model, batches())


def test_weights_without_numbers() -> None:
    with torch.device("meta"):
        model = T.LlamaForCausalLM(T.LlamaConfig(**SIZES)).eval()
    for call in (fxprune.score, fxprune.compress):
        with pytest.raises(CalibrationError, match=r"load the weights first.*compress_folder prunes a folder"):
            call(model, batches())


@pytest.mark.wide
@pytest.mark.parametrize("level", ["sequential", "none"])
def test_no_block_outlives_the_next(level: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Graphs that hold each other in circles are freed, though nothing else starts the collection of garbage."""
    made, alive = list[weakref.ref[nn.Module]](), list[int]()

    def noted(*given: Any) -> nn.Module:
        made.append(weakref.ref(module := filled(*given)))
        alive.append(sum(ref() is not None for ref in made))
        return module

    saved(tmp_path / "whole", num_hidden_layers=4)
    monkeypatch.setattr(passes, "filled", noted)
    gc.disable()
    try:
        compress_folder(tmp_path / "whole", tmp_path / "small", batches(), params=0.7, compensate=level)
    finally:
        gc.enable()
    assert len(made) == 4 + 4 * 3 - 1  # scored; pruned, compared as written, and passed but for the last
    assert max(alive) <= 4
