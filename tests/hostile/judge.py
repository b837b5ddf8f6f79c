"""What becomes of a hostile network, judged without any of the package's own proofs."""

from __future__ import annotations

import operator
import random
import warnings
from collections.abc import Callable, Sequence
from contextlib import nullcontext, redirect_stderr
from dataclasses import dataclass
from fnmatch import fnmatch
from io import StringIO
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from helpers import call, picture, same_picture, tensors_of
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import fxprune
from hostile.case import Hostile
from hostile.matching import Kept, UnmatchedError, kept, masked

TOLERANCE = 1e-4  # of the largest entry of an output
SIZES = (4, 2, 5)  # of the fresh batches
VERDICTS = ("exact", "refused", "said", "foreign", "silent")  # from good to bad
IDLE = ("can be pruned", "nothing was pruned")  # warnings that say nothing about the graph


@dataclass(frozen=True, slots=True)
class Finding:
    """ "exact", "refused" (an error of the package's own), "said" (another network, and a warning says that it may be),
    "foreign" (any other error) or "silent" (another network, or one that cannot be trained, and no word of it)."""

    verdict: str
    why: str = ""
    shrunk: bool = False

    def __str__(self) -> str:
        return f"{self.verdict}: {self.why}" if self.why else self.verdict


def judge(case: Hostile) -> Finding:
    """The worse of what becomes of the graph and of the small model. Raises AssertionError for a broken network."""
    _check(case)
    captured = _guarded(_captured, case)
    if captured.verdict == "refused":  # and compress captures first
        return captured
    compressed = _guarded(_compressed, case)
    worst = max(captured, compressed, key=lambda finding: VERDICTS.index(finding.verdict))
    return Finding(worst.verdict, worst.why, compressed.shrunk)


def _guarded(look: Callable[[Hostile], Finding], case: Hostile) -> Finding:
    """What is found, where errors are findings, too; the process's random generators come back as they were."""
    states = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(), warnings.catch_warnings(record=True) as caught, redirect_stderr(StringIO()):
            warnings.simplefilter("always")
            found = look(case)
        said = [str(w.message) for w in caught if issubclass(w.category, fxprune.FxpruneWarning)]
        said = [text for text in said if not any(idle in text for idle in IDLE)]
        if found.verdict == "silent" and case.wanted == "said" and said:
            return Finding("said", f"{found.why}, but: {said[0]}")
        return found
    except fxprune.FxpruneError as error:
        return Finding("refused", f"{type(error).__name__}: {error}")
    except (AssertionError, KeyboardInterrupt):
        raise
    except Exception as error:
        return Finding("foreign", f"{type(error).__name__}: {error}")
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])


def _captured(case: Hostile) -> Finding:
    """Whether the captured graph gives what the caller's model gives, and the model is as it was."""
    model, before = _watched(case)
    graph = fxprune.capture(model, case.inputs(4, 0))
    faults = _disturbed(model, before, "capture")
    return _finding(faults or _differences(graph, [case.build()], case))


def _compressed(case: Hostile) -> Finding:
    """Whether the small model gives what the caller's gives with the removed channels zeroed, and can be trained."""
    model, before = _watched(case)
    loader = [(case.inputs(size, seed), torch.arange(size) % 4) for size, seed in ((6, 10), (4, 11))]
    small = fxprune.compress(model, loader, 0.3, compensate="none", progress=False)
    faults = _disturbed(model, before, "compress") + _other_buffers(case.build(), small)
    make = _form(case, small)
    try:
        held = _kept(make(), small)
    except UnmatchedError as error:
        return _finding([*faults, str(error)])
    references = [_reference(make(), held, readers) for readers in (True, False)]
    faults += [f"{name} reads less" for name, some in held.items() if some.reads_less and _is_any(name, case.whole)]
    with Expected() if _draws(case) else nullcontext():
        faults += _differences(small, references, case)
    faults += _untrained(make(), small, case)
    return _finding(faults, shrunk=any(some.narrower for some in held.values()))


def _finding(faults: Sequence[str], *, shrunk: bool = False) -> Finding:
    return Finding("silent", "; ".join(faults), shrunk) if faults else Finding("exact", shrunk=shrunk)


def _check(case: Hostile) -> None:
    """That the network runs, and that its plain form is the same network."""
    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            given, plain = _answers(case.build(), case), _answers(case.plain(case.build()), case)
        except Exception as error:
            raise AssertionError(f"the network itself fails ({type(error).__name__}: {error})") from error
    assert all(t.isfinite().all() and t.abs().max() > 1e-3 for some in given for t in some), "odd numbers"
    if case.plain is not Hostile.__dataclass_fields__["plain"].default:
        assert max(_apart(a, b) for a, b in zip(given, plain, strict=True)) < TOLERANCE, "the plain form is another"


# -- the caller's model ----------------------------------------------------------------------------------------------


def _watched(case: Hostile) -> tuple[nn.Module, Any]:
    model = case.build()
    return model, (picture(model), _lengths(model))


def _disturbed(model: nn.Module, before: Any, by: str) -> list[str]:
    after = picture(model), _lengths(model)
    return [] if same_picture(before, after) else [f"{by} changes the caller's model"]


def _lengths(model: nn.Module) -> dict[str, int | float]:
    """How long the containers are, and what the numbers are, that its modules keep as attributes."""
    values = {f"{name}.{key}": v for name, m in model.named_modules() for key, v in vars(m).items()}
    sizes = {key: len(v) for key, v in values.items() if isinstance(v, (list, dict, set, tuple))}
    return sizes | {key: v for key, v in values.items() if isinstance(v, (int, float))}


def _other_buffers(model: nn.Module, small: nn.Module) -> list[str]:
    """The buffers of the caller's names that hold other values; of narrowed ones, those that are not the caller's."""
    found = dict(small.named_buffers())
    pairs = {name: (buffer, found[name]) for name, buffer in model.named_buffers() if name in found}
    return [f"the buffer {name} holds other values" for name, (a, b) in pairs.items() if not _is_part(a, b)]


def _is_part(whole: Tensor, part: Tensor) -> bool:
    if whole.shape == part.shape:
        return bool(torch.equal(whole, part) or (whole.isnan() & part.isnan()).any())
    return bool(torch.isin(part, whole).all())


# -- outputs ---------------------------------------------------------------------------------------------------------


def _answers(model: nn.Module, case: Hostile) -> list[list[Tensor]]:
    """What a model gives on fresh batches, one after the other, each under a seed of its own."""
    model.eval()
    given = []
    for seed, size in enumerate(SIZES, 1):
        torch.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed)
        with torch.no_grad():
            given.append([t.clone() for t in tensors_of(call(model, case.inputs(size, seed)))])
    return given


def _differences(model: nn.Module, references: Sequence[nn.Module], case: Hostile) -> list[str]:
    """Where a model differs from all references, or fails."""
    wanted = [_answers(reference, case) for reference in references]
    try:
        given = _answers(model, case)
    except Exception as error:
        return [f"what is emitted fails at batch sizes {SIZES} ({type(error).__name__}: {str(error)[:160]})"]
    errors = [[_apart(a, b) for a, b in zip(some, given, strict=True)] for some in wanted]
    worst = min(errors, key=max)
    if max(worst) <= TOLERANCE:
        return []
    return [f"off by {', '.join(f'{error:.2g}' for error in worst)} at batch sizes {SIZES}"]


def _apart(wanted: Sequence[Tensor], given: Sequence[Tensor]) -> float:
    if [t.shape for t in wanted] != [t.shape for t in given]:
        return float("inf")
    errors = [float((a - b).abs().max() / a.abs().max()) for a, b in zip(wanted, given, strict=True)]
    return float("inf") if any(np.isnan(errors)) else max(errors)


class Expected(TorchDispatchMode):
    """Numbers in the place of random ones, since fewer channels draw others."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = func(*args, **(kwargs or {}))
        if torch.Tag.nondeterministic_seeded in func.tags:
            for tensor in tensors_of(given):
                tensor.fill_(0.6)
        return given


def _draws(case: Hostile) -> bool:
    """Whether what the caller's model gives depends on torch's random numbers."""
    given = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        with torch.no_grad():
            given.append(tensors_of(call(case.build(), case.inputs(2, 1))))
    return not all(torch.equal(a, b) for a, b in zip(*given, strict=True))


# -- weights ---------------------------------------------------------------------------------------------------------


def _form(case: Hostile, small: nn.Module) -> Callable[[], nn.Module]:
    """What makes the caller's model as it is, or the plain one, whichever has the small one's parameters."""
    own, given = ({name for name, _ in model.named_parameters()} for model in (case.build(), small))
    return case.build if own == given else lambda: case.plain(case.build())


def _is_any(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatch(name, pattern) for pattern in patterns)


def _kept(plain: nn.Module, small: nn.Module) -> dict[str, Kept]:
    """What stays of every parameter of the caller's model, found in the small one by its values."""
    held = {}
    for name, parameter in plain.named_parameters():
        tensor = _at(small, name)
        if not isinstance(tensor, Tensor):
            raise UnmatchedError(f"the small model has no tensor {name}")
        held[name] = kept(parameter.detach(), tensor.detach(), name)
    return held


def _at(model: nn.Module, name: str) -> Any:
    """The tensor of that name, computed or not; None where there is none."""
    own = dict(model.named_parameters())
    try:
        return own[name] if name in own else operator.attrgetter(name)(model)
    except AttributeError:
        return None


def _reference(plain: nn.Module, held: dict[str, Kept], readers: bool) -> nn.Module:
    """The caller's model with zeros for what went: in those who read it only, or in the layers that make it, too."""
    with torch.no_grad():
        for name, parameter in plain.named_parameters():
            parameter.copy_(masked(parameter, held[name], first=1 if readers else 0))
    return plain


def _untrained(plain: nn.Module, small: nn.Module, case: Hostile) -> list[str]:
    """What gets a gradient in the caller's model, and none in the small one."""
    try:
        reached = _reached(plain, case)
    except RuntimeError:  # a network that cannot be trained
        return []
    try:
        own = _reached(small, case)
    except Exception as error:
        return [f"the small model cannot be trained ({type(error).__name__}: {str(error)[:160]})"]
    lost = [name for name in sorted(reached) if name not in own and not _is_computed(small, name)]
    idle = [n for n, p in small.named_parameters() if n not in own and n not in dict(plain.named_parameters())]
    return [f"no gradient: {', '.join(lost + idle)}"] if lost or idle else []


def _is_computed(model: nn.Module, name: str) -> bool:
    tensor = _at(model, name)
    return not isinstance(tensor, nn.Parameter) and bool(tensor.requires_grad)


def _reached(model: nn.Module, case: Hostile) -> set[str]:
    """The names of the parameters that a loss reaches in train mode."""
    torch.manual_seed(0)
    model.train()
    model.zero_grad()
    F.cross_entropy(call(model, case.inputs(4, 5)), torch.arange(4)).backward()
    return {name for name, parameter in model.named_parameters() if parameter.grad is not None}
