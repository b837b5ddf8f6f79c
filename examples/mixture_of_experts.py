"""A mixture of experts: hidden units of the experts, and whole experts with the rows of their router.

python examples/mixture_of_experts.py        (needs transformers, beside what the library needs)
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import MixtralConfig, MixtralForCausalLM

import fxprune
from fxprune.integrations.huggingface import compress_pretrained, narrow_pretrained

TOKENS, LENGTH, RULES, STEPS = 32, 16, 6, 300


def sentences(count: int, seed: int) -> Tensor:
    """Sequences (count, LENGTH) that each follow one of a few rules, by which every token gives the next."""
    generator = torch.Generator().manual_seed(seed)
    rule = torch.randint(0, RULES, (count,), generator=generator)
    found = [rule, torch.randint(RULES, TOKENS, (count,), generator=generator)]
    for _ in range(LENGTH - 2):
        found.append((found[-1] * (2 * rule + 3) + rule * 5) % (TOKENS - RULES) + RULES)
    return torch.stack(found, 1)


def network() -> MixtralForCausalLM:
    """Two layers of eight experts, two of which work on each token."""
    return MixtralForCausalLM(
        MixtralConfig(
            vocab_size=TOKENS, hidden_size=48, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, num_local_experts=8, num_experts_per_tok=2, max_position_embeddings=LENGTH,
            pad_token_id=None, bos_token_id=None, eos_token_id=None,
        )
    )  # fmt: skip


def train(model: Any) -> None:
    """Train on fresh sentences; the model is left in eval mode."""
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(STEPS):
        batch = sentences(64, seed=step)
        optimizer.zero_grad()
        model(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
    model.eval()


@torch.inference_mode()
def accuracy(model: Any) -> float:
    """The share of tokens behind the second one that are predicted right, in sentences of their own."""
    batch = sentences(256, seed=10_000)
    return float((model(input_ids=batch).logits[:, 1:-1].argmax(-1) == batch[:, 2:]).float().mean())


def show(name: str, small: Any) -> None:
    """What was removed, the proof, and the accuracy."""
    report = fxprune.report(small)
    print(f"{name}: {report.params_after / report.params_before:.0%} of the parameters, accuracy {accuracy(small):.3f}")
    print(f"  equal to the original without them up to {report.error:.0e} of its outputs' scale")
    for group in report.groups:
        if group.name.endswith("gate_up_proj"):
            print(f"  {group.name}: {group.before} hidden units of each expert -> {group.after}")
    for router in report.routers:
        use = ", ".join(f"{expert} ({router.usage[expert]:.0%})" for expert in router.kept) if router.usage else ""
        print(f"  {router.router}: {router.experts} experts -> {len(router.kept)}: {use}")


def main() -> None:
    """Train, then remove hidden units, whole experts, and both by a budget of parameters."""
    torch.manual_seed(0)
    model = network()
    train(model)
    print(f"original: accuracy {accuracy(model):.3f}")
    loader = [{"input_ids": batch, "labels": batch} for batch in sentences(256, seed=20_000).split(64)]
    hidden = compress_pretrained(model, loader, ratios={"*.experts.gate_up_proj": 0.5}, progress=False)
    show("hidden units", hidden)
    experts = compress_pretrained(model, loader, ratios={"*.gate": 0.5}, progress=False)
    show("whole experts", experts)
    show("a budget", compress_pretrained(model, loader, params=0.6, progress=False))

    own = narrow_pretrained(experts, model)
    tokens = own.generate(input_ids=sentences(1, seed=1)[:, :4], max_new_tokens=6, do_sample=False)
    print(f"{type(own).__name__} with half of its experts goes on: {tokens[0].tolist()}")


if __name__ == "__main__":
    main()
