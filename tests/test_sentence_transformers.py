"""A SentenceTransformer, small and random, where it is installed: pruned, put back, saved and loaded."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import parameters
from torch import Tensor

import fxprune

pytestmark = pytest.mark.filterwarnings("ignore")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    S: Any = pytest.importorskip("sentence_transformers")
    M: Any = pytest.importorskip("sentence_transformers.models")
    T: Any = pytest.importorskip("transformers")
LETTERS = "abcdefghijklmnopqrstuvwxyz"
TEXTS = [" ".join(LETTERS[(7 * i + 3 * j) % 26] for j in range(2 + i % 7)) for i in range(24)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *LETTERS]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    T.BertTokenizerFast(vocab_file=str(tmp_path / "vocab.txt")).save_pretrained(tmp_path)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    torch.manual_seed(0)
    T.BertModel(T.BertConfig(vocab_size=len(words), max_position_embeddings=32, **sizes)).save_pretrained(tmp_path)
    return tmp_path


def encoder(folder: Path) -> Any:
    own = M.Transformer(str(folder))
    return S.SentenceTransformer(modules=[own, M.Pooling(32)], device="cpu")


def loss(model: Any, features: dict[str, Tensor], targets: Tensor) -> Tensor:
    return torch.nn.functional.mse_loss(model(dict(features))["sentence_embedding"], targets)


def test_pruned_put_back_saved_and_loaded(folder: Path) -> None:
    model = encoder(folder)
    (name,) = (f"0.{name}" for name, part in model[0].named_children() if isinstance(part, T.PreTrainedModel))
    wanted = torch.tensor(model.encode(TEXTS)).roll(1, 0)
    parts = [(model.tokenize(TEXTS[i : i + 8]), wanted[i : i + 8]) for i in range(0, 24, 8)]
    loader = [({key: value for key, value in part.items() if isinstance(value, Tensor)}, y) for part, y in parts]
    small = fxprune.compress(model, loader, params=0.8, submodule=name, own_class=True, run=loss, progress=False)
    assert type(small) is type(model)
    assert type(small.get_submodule(name)) is T.BertModel
    assert parameters(small) < 0.85 * parameters(model)
    found = small.encode(TEXTS)
    assert np.abs(found - model.encode(TEXTS)).max() < 1e-2 < np.abs(found).max()
    fxprune.save(small, folder / "small.safetensors")
    again = fxprune.load(folder / "small.safetensors", encoder(folder), own_class=True)
    assert type(again) is type(model)
    assert np.array_equal(again.encode(TEXTS), found)
