"""Tiny models of Hugging Face transformers, drawn at random: captured with values, pruned and proved."""

from __future__ import annotations

import pickle
import warnings
from typing import Any

import pytest
import torch
from helpers import part_of

import fxprune
from fxprune.scoring.scores import Scores

pytestmark = pytest.mark.filterwarnings("ignore")

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    T = pytest.importorskip("transformers")
    from language import SMALL

TEXT = {
    "vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24,
    "max_position_embeddings": 32,
}  # fmt: skip
MODELS = {
    "bert": lambda how: T.BertForSequenceClassification(T.BertConfig(**TEXT, attn_implementation=how)),
    "llama": lambda how: T.LlamaForCausalLM(T.LlamaConfig(**TEXT, use_cache=False, attn_implementation=how)),
    "gpt2": lambda how: T.GPT2LMHeadModel(
        T.GPT2Config(
            vocab_size=50, n_embd=16, n_layer=2, n_head=2, n_positions=32, use_cache=False, attn_implementation=how
        )
    ),
}


def sentences(batch: int, length: int = 7, padding: int = 0) -> dict[str, torch.Tensor]:
    words = torch.randint(2, 48, (batch, length), generator=torch.Generator().manual_seed(batch))
    mask = torch.ones_like(words)
    mask[0, length - padding :] = 0
    return {"input_ids": words, "attention_mask": mask}


@pytest.mark.parametrize("how", ["sdpa", pytest.param("eager", marks=pytest.mark.wide)])
@pytest.mark.parametrize("name", part_of(MODELS, 3))
def test_captured_pruned_and_proved(name: str, how: str) -> None:
    torch.manual_seed(0)
    model: Any = MODELS[name](how).eval()
    graph = fxprune.capture(model, sentences(2))
    with torch.no_grad():
        for other in (sentences(3), sentences(1, 9), sentences(4, 8, padding=3)):
            expected, found = model(**other), pickle.loads(pickle.dumps(graph))(**other)
            assert type(found) is type(expected)
            assert torch.equal(found.logits, expected.logits)
    plan = Scores.random(model, sentences(2), unknown="freeze").plan(alpha=1.0)
    small = fxprune.apply(model, plan)
    assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in model.parameters())
    assert fxprune.verify(model, plan, small, sentences(3, 9)) < 1e-5


@pytest.mark.parametrize("inexact", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", part_of(SMALL, 18))
def test_a_small_member_of_each_family(name: str, inexact: bool) -> None:
    torch.manual_seed(0)
    make, example = SMALL[name]
    model, inputs = make().eval(), example()
    plan = Scores.random(model, inputs, seed=1, inexact=inexact).plan(alpha=0.5)
    small = fxprune.apply(model, plan)
    assert fxprune.verify(model, plan, small, inputs) < 1e-5
    assert sum(p.numel() for p in small.parameters()) < 0.85 * sum(p.numel() for p in model.parameters())
    assert list(small.state_dict()) == list(model.state_dict())
    groups = fxprune.couple(fxprune.capture(model, inputs))
    heads = [g for g in groups if g.frozen is None and any(len(g) <= 4 and s.width > len(g) for s in g.sites)]
    assert heads or name == "ConvNeXt", "no group of whole heads"
