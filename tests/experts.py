"""Mixtures of experts: those of transformers, built small, and loops over experts written by hand."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

import fxprune

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import transformers as T

COMMON = {
    "vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2,
    "intermediate_size": 16, "moe_intermediate_size": 16, "num_experts_per_tok": 2, "max_position_embeddings": 32,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "use_cache": False,
}  # fmt: skip
LATENT = {
    "n_routed_experts": 8, "n_group": 2, "topk_group": 1, "n_shared_experts": 1, "first_k_dense_replace": 1,
    "kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8, "v_head_dim": 8,
}  # fmt: skip
MAMBA = {
    "num_experts": 4, "attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2,
    "expert_layer_offset": 1, "mamba_d_state": 4, "mamba_d_conv": 2, "mamba_expand": 2, "mamba_dt_rank": 4,
}  # fmt: skip
FAMILIES: dict[str, dict[str, Any]] = {
    "deepseek_v3": LATENT,
    "mixtral": {"num_local_experts": 4},
    "qwen2_moe": {"num_experts": 4, "shared_expert_intermediate_size": 10},
    "qwen3_moe": {"num_experts": 4, "head_dim": 8},
    "gpt_oss": {"num_local_experts": 4, "head_dim": 8},
    "olmoe": {"num_experts": 4},
    "granitemoe": {"num_local_experts": 4},
    "jamba": MAMBA,  # whose scan fixes the length
}


def family(name: str, way: str = "eager") -> Any:
    """A model of a family of transformers whose experts run in a way of its own."""
    torch.manual_seed(0)
    config = T.AutoConfig.for_model(name, **COMMON, **FAMILIES[name])
    model = T.AutoModelForCausalLM.from_config(config, experts_implementation=way).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.numel() > 1 and parameter.std() < 0.1:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    return model


def words(batch: int = 3, length: int = 6) -> dict[str, Tensor]:
    """Seeded tokens."""
    return {"input_ids": torch.randint(3, 40, (batch, length), generator=torch.Generator().manual_seed(batch))}


def routers_of(model: nn.Module) -> dict[str, nn.Module]:
    """The routers of a model of transformers, by their paths."""
    return {name: module for name, module in model.named_modules() if type(module).__name__.lower().endswith("router")}


@contextmanager
def at_minus_infinity(removed: dict[int, list[int]]) -> Iterator[None]:
    """Run models with the outputs of linear layers at minus infinity: by the ids of their weights, these channels."""

    class Masking(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            found = func(*args, **(kwargs or {}))
            if func is F.linear and id(args[1]) in removed:
                found[..., removed[id(args[1])]] = -torch.inf
            return found

    with Masking():
        yield


class Loop(nn.Module):
    """The layers that all loops over experts share."""

    def __init__(self, experts: int = 4, hidden: int = 6) -> None:
        super().__init__()
        self.inputs, self.router = nn.Linear(5, 8), nn.Linear(8, experts, bias=False)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(8, hidden), nn.GELU(), nn.Linear(hidden, 8)) for _ in range(experts)
        )
        self.outputs = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.inputs(x)
        weights, chosen = torch.topk(self.router(x).softmax(-1), 2)
        return self.outputs(self.mixed(x, weights / weights.sum(-1, keepdim=True), chosen))

    def mixed(self, x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        raise NotImplementedError


class Always(Loop):
    """Every expert gets its rows, if there are none, too."""

    def mixed(self, x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        found = torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            rows, places = torch.where(chosen == number)
            found.index_add_(0, rows, expert(x[rows]) * weights[rows, places, None])
        return found


class Skipping(Loop):
    """Experts without rows are left out."""

    def mixed(self, x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        found = torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            rows, places = (chosen == number).nonzero(as_tuple=True)
            if len(rows) == 0:
                continue
            found[rows] += weights[rows, places].unsqueeze(1) * expert(x[rows])
        return found


class Masks(Loop):
    """Rows are chosen by masks."""

    def mixed(self, x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        found = torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            mine = (chosen == number).any(-1)
            if mine.any():
                weight = (weights * (chosen == number)).sum(-1)
                found[mine] = found[mine] + expert(x[mine]) * weight[mine].unsqueeze(-1)
        return found


class Hit(Loop):
    """A loop over the numbers of the experts that were chosen, which are a tensor."""

    def mixed(self, x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        found = torch.zeros_like(x)
        mask = F.one_hot(chosen, len(self.experts)).permute(2, 1, 0)
        for number in torch.greater(mask.sum(dim=(-1, -2)), 0).nonzero():
            places, rows = torch.where(mask[number[0]])
            found.index_add_(0, rows, self.experts[number[0]](x[rows]) * weights[rows, places, None])
        return found


class Single(Loop):
    """One expert for each row, and a list of the numbers that were chosen."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.inputs(x)
        weight, chosen = self.router(x).softmax(-1).max(-1)
        found = torch.zeros_like(x)
        for number in chosen.unique().tolist():
            mine = chosen == number
            found[mine] = self.experts[number](x[mine]) * weight[mine].unsqueeze(1)
        return self.outputs(found)


class Stacked(Loop):
    """A loop over the slices of stacked weights."""

    def __init__(self, experts: int = 4, hidden: int = 6) -> None:
        super().__init__(experts, hidden)
        del self.experts
        self.up = nn.Parameter(torch.randn(experts, 8, hidden) / 3)
        self.down = nn.Parameter(torch.randn(experts, hidden, 8) / 3)

    def mixed(self, x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        found = torch.zeros_like(x)
        for number in range(len(self.up)):
            rows, places = torch.where(chosen == number)
            hidden = F.gelu(x[rows] @ self.up[number])
            found.index_add_(0, rows, (hidden @ self.down[number]) * weights[rows, places, None])
        return found


class Dense(Loop):
    """Every expert computes all rows, and weighs nothing in those that did not choose it."""

    def mixed(self, x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        found = torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            weight = (weights * (chosen == number)).sum(-1, keepdim=True)
            found = found + weight * expert(x)
        return found


class Numbered(Loop):
    """One expert for each row, by its number, and the weight on its own."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.inputs(x)
        scores = self.router(x).softmax(-1)
        chosen, found = scores.argmax(-1), x.clone()
        for number, expert in enumerate(self.experts):
            found[chosen == number] = expert(x[chosen == number])
        return self.outputs(found * scores.max(-1).values.unsqueeze(-1))


LOOPS = (Always, Skipping, Masks, Hit, Single, Stacked, Dense, Numbered)


def loop(kind: type[Loop], experts: int = 4) -> Loop:
    """A loop whose router prefers some experts."""
    torch.manual_seed(0)
    model = kind(experts).eval()
    with torch.no_grad():
        model.router.weight.mul_(3)
    return model


def halved(graph: Any, example: Any, seed: int = 0, **ratios: float) -> fxprune.Plan:
    """The plan that removes half of the units of all groups, or of the layers that are named, by random scores."""
    names = [group.sites[0].name for group in fxprune.couple(graph) if group.frozen is None]
    return fxprune.Scores.random(graph, example, seed=seed).plan(ratios=ratios or dict.fromkeys(names, 0.5))
