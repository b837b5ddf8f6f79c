"""A language model that is trained here, in some minutes, on the docstrings of Python's standard library."""

from __future__ import annotations

import ast
import os
import platform
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from measure import CONSOLE
from oneshot_real import CONTEXT, Task, Tokens, next_token_loss, task_of_windows
from torch import Tensor, nn

WORDS, STEPS, BATCH, RATE = 1024, 700, 16, 4e-3
_NOT_READ = {"site-packages", "test", "tests", "idlelib"}
_HELD_OUT = 10  # every so many files one whose docstrings are held out


def docstrings() -> Task:
    """Perplexity on docstrings of other files than the training's; the model is kept among the temporary files."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    train, test = encoded()
    config = Qwen2Config(
        vocab_size=WORDS, hidden_size=128, num_hidden_layers=4, num_attention_heads=8, num_key_value_heads=4,
        intermediate_size=512, max_position_embeddings=512, tie_word_embeddings=True, bos_token_id=0, eos_token_id=0,
        pad_token_id=0, use_cache=False,
    )  # fmt: skip
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(config)
    path = Path(tempfile.gettempdir()) / f"docstrings-{platform.python_version()}-{STEPS}.pt"
    if not path.exists():
        trained(model, torch.from_numpy(train))
        torch.save(model.state_dict(), path)
    model.load_state_dict(torch.load(path, weights_only=True))
    return task_of_windows(model.eval(), train, test)


def texts() -> Iterator[str]:
    """The docstrings of each file of the standard library, but those of its tests."""
    root = Path(os.__file__).parent
    for path in sorted(root.rglob("*.py")):
        if _NOT_READ.isdisjoint(path.relative_to(root).parts):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of strings with odd escapes
                tree = ast.parse(path.read_bytes())
            kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
            found = (ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, kinds))
            yield "\n\n".join(text for text in found if text)


def encoded() -> tuple[Tokens, Tokens]:
    """The token numbers of the files that are trained on, and of the others, by 1,024 merged pairs of bytes."""
    from tokenizers import ByteLevelBPETokenizer

    files = list(texts())
    train = [text for number, text in enumerate(files) if (number + 1) % _HELD_OUT]
    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(train, vocab_size=WORDS, show_progress=False)
    parts = "\n\n".join(train), "\n\n".join(files[_HELD_OUT - 1 :: _HELD_OUT])
    first, second = (np.array(tokenizer.encode(part).ids, dtype=np.int64) for part in parts)
    return first, second


def trained(model: nn.Module, tokens: Tensor) -> None:
    """Train a model on random windows: AdamW, with a rate that rises and falls again."""
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(model.parameters(), RATE, betas=(0.9, 0.95), weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=STEPS, pct_start=0.1)
    for step in range(STEPS):
        starts = torch.randint(len(tokens) - CONTEXT, (BATCH,), generator=generator)
        windows = torch.stack([tokens[start : start + CONTEXT] for start in starts])
        loss = next_token_loss(model(input_ids=windows).logits, windows)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if not step % 50:
            CONSOLE.print(f"training: step {step} of {STEPS}, loss {float(loss):.2f}")
