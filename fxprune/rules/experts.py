"""Experts: layers with one weight for each of several experts, of which every row of the input uses its own."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from fxprune.rules.choices import apart
from fxprune.rules.context import Context
from fxprune.rules.labels import Labels, labelled
from fxprune.rules.table import rule, takes_index
from fxprune.rules.vocabulary import ChannelRead


def expert_linear(
    x: Tensor, experts: Tensor, weight: Tensor, bias: Tensor | None = None, *, transposed: bool = False
) -> Tensor:
    """Every row of `x` through the linear layer of its expert.

    Args:
        x: (rows, inputs).
        experts: (rows,) integers.
        weight: (experts, outputs, inputs), or (experts, inputs, outputs) where it is `transposed`.
        bias: (experts, outputs).

    Returns:
        (rows, outputs)

    >>> weight = torch.tensor([[[1.0, 1.0]], [[0.0, 2.0]]])
    >>> expert_linear(torch.tensor([[3.0, 4.0], [3.0, 4.0]]), torch.tensor([1, 0]), weight)
    tensor([[8.],
            [7.]])
    """
    given = (x, experts, weight, bias)
    if has_torch_function(given):  # a symbol of a tracer, for which the call is one node
        return handle_torch_function(expert_linear, given, *given, transposed=transposed)  # type: ignore[no-any-return]
    matrices = weight if transposed else weight.transpose(1, 2)
    exporting = getattr(torch.compiler, "is_exporting", torch.compiler.is_compiling)()
    if x.device.type == "meta" or exporting:  # a program cannot hold sizes that depend on values
        out = torch.bmm(x.unsqueeze(1), matrices[experts]).squeeze(1)
    else:
        order, counts = experts.argsort(), torch.bincount(experts, minlength=len(weight)).tolist()
        pairs = zip(x[order].split(counts), matrices, strict=True)
        parts = [rows @ matrix for rows, matrix in pairs if len(rows)] or [x @ matrices[0]]
        out = torch.cat(parts)[order.argsort()]
    return out if bias is None else out + bias[experts]


@rule(expert_linear)
@takes_index
def expert_linear_rule(
    ctx: Context, x: Labels, experts: Labels, weight: Labels, bias: Labels | None = None, *, transposed: bool = False
) -> Labels:
    """All experts read the same inputs and make the same outputs; each is a row of the weight."""
    ctx.tie(ctx.consume(x, 1), ctx.vector(weight, 1 if transposed else 2))
    outputs = ctx.vector(weight, 2 if transposed else 1)
    _choose(ctx, weight, experts)
    if bias is not None:
        ctx.tie(outputs, ctx.vector(bias, 1))
        _choose(ctx, bias, experts)
    ctx.produce(outputs, ctx.site(weight))
    return Labels((x.shape[0], len(outputs)), (*x.beside(1), *labelled(outputs, 1, 2)))


def _choose(ctx: Context, table: Labels, experts: Labels) -> None:
    """Each row of a table is that of an expert; of experts that are chosen by other numbers, all are kept."""
    for plane in apart(ctx, table, 0, experts).along(0):
        ctx.freeze(plane.core, f"chosen by a computed number in {ctx.describe()}")


def sum_of_experts(rows: Tensor, experts: Tensor) -> Tensor:
    """The sum, for each token, of the outputs of its experts.

    Args:
        rows: (tokens x k, width), those of a token one after another.
        experts: (tokens, k), the number of the expert that each is of.

    Returns:
        (tokens, width)
    """
    if has_torch_function((rows, experts)):
        return handle_torch_function(sum_of_experts, (rows, experts), rows, experts)  # type: ignore[no-any-return]
    return rows.view(*experts.shape, rows.shape[-1]).sum(1)


@rule(sum_of_experts)
@takes_index
def sum_of_experts_rule(ctx: Context, rows: Labels, experts: Labels) -> Labels:
    """The node reads the experts: the outputs of a removed one are zero."""
    source, chosen = ctx.source(rows), ctx.source(experts)
    if experts.index_of is not None and source is not None and chosen is not None:
        read = ChannelRead(ctx.node.name, source.name, 1, experts.index_of, chosen=chosen.name)
        ctx.edge(read)
    return Labels((experts.shape[0], rows.shape[1]), rows.beside(0))


def experts_forward(module: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """The forward of a module of experts of transformers, whose weights are stacked, in operations that have rules.

    Args:
        module: one whose class `use_experts_implementation` of transformers has decorated.
        hidden_states: (tokens, width).
        top_k_index, top_k_weights: (tokens, k), the experts of each token and their weights.

    Returns:
        (tokens, width)
    """
    experts, options = top_k_index.reshape(-1), {"transposed": module.is_transposed}
    name = "gate_up_proj" if module.has_gate else "up_proj"
    rows = hidden_states.repeat_interleave(top_k_index.shape[-1], dim=0)
    rows = expert_linear(rows, experts, *_parameters(module, name), **options)
    rows = module._apply_gate(rows) if module.has_gate else module.act_fn(rows)
    rows = expert_linear(rows, experts, *_parameters(module, "down_proj"), **options)
    if module.has_post_expert_norm:
        rows = module.post_expert_norm(rows)
    rows = rows * top_k_weights.reshape(-1, 1)
    return sum_of_experts(rows, top_k_index).to(hidden_states.dtype)


def has_stacked_experts(module: Any) -> bool:
    """Whether a module holds experts that transformers can run in several ways, and all of them are on this machine."""
    home, code = sys.modules.get("transformers.integrations.moe"), getattr(type(module).forward, "__code__", None)
    decorated = home is not None and code is not None and code.co_filename == home.__file__
    return decorated and not module._is_expert_parallel


def _parameters(module: Any, name: str) -> tuple[Tensor, Tensor | None]:
    """A weight of the experts, and their bias where they have one."""
    return getattr(module, name), getattr(module, f"{name}_bias") if module.has_bias else None
