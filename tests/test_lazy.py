"""What `import fxprune` and `fxprune --help` import; names, rules and types are all there at their first use."""

from __future__ import annotations

import json
import pickle
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torchvision
from helpers import part_of

import fxprune
from fxprune.rules import vision
from fxprune.rules.table import RULES
from fxprune.rules.vision import register_torchvision

HEAVY = ("torch", "torchvision", "numpy", "scipy", "networkx", "sympy", "rich", "jinja2", "safetensors", "typer")


def modules_after(code: str, *names: str) -> dict[str, bool]:
    """Which modules a fresh process has imported once it has run some code."""
    told = f"import sys, json\n{code}\nprint(json.dumps({{name: name in sys.modules for name in {names!r}}}))"
    done = subprocess.run([sys.executable, "-c", told], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_importing_fxprune_imports_nothing_else() -> None:
    assert not any(modules_after("import fxprune; dir(fxprune); fxprune.__version__", *HEAVY).values())


def test_errors_need_no_torch() -> None:
    assert not any(modules_after("import fxprune; fxprune.FxpruneError", *HEAVY).values())


@pytest.mark.wide
def test_a_model_of_ones_own_needs_no_library_that_it_does_not_use() -> None:
    code = (
        "import fxprune\nfrom torch import nn, ones\nnet = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))\n"
        "small = fxprune.compress(net, [(ones(3, 4), ones(3).long())], 0.5, progress=False)\nstr(fxprune.report(small))"
    )
    unused = ("torchvision", "networkx", "sympy", "jinja2", "torch.utils.benchmark")
    found = modules_after(code, *unused, "torch", "scipy", "rich")
    assert [name for name, there in found.items() if there] == ["torch", "scipy", "rich"]


def test_the_list_of_commands_needs_no_torch() -> None:
    pytest.importorskip("typer")
    code = "import fxprune.cli\nsys.argv = ['fxprune', '--help']\ntry: fxprune.cli.main()\nexcept SystemExit: pass"
    found = modules_after(code, "torch", "numpy", "scipy", "typer")
    assert found == {"torch": False, "numpy": False, "scipy": False, "typer": True}


SPELLINGS = [
    "from fxprune import *; Plan",
    "import fxprune; fxprune.rules.rule",
    "import fxprune.rules; fxprune.rules.rule",
    "from fxprune.pipeline import compress; import fxprune; assert fxprune.compress is compress",
    "from fxprune import rules; rules.rule",
    "from fxprune import classes; import fxprune.caller.classes as home; assert classes is home",
    "import fxprune.planning.plan; assert fxprune.planning.plan.Plan is fxprune.Plan",
]


@pytest.mark.parametrize("code", part_of(SPELLINGS, 7))
def test_names_are_there_however_they_are_imported(code: str) -> None:
    assert modules_after(code, "torch") == {"torch": True}


def test_a_name_that_is_not_there_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'fxprune' has no attribute 'prune'"):
        fxprune.prune  # noqa: B018
    with pytest.raises(ImportError, match="cannot import name 'prune' from 'fxprune'"):
        exec("from fxprune import prune")


@pytest.mark.wide
def test_the_first_use_of_a_name_draws_no_random_number() -> None:
    code = (
        "import random, fxprune\nbefore = random.getstate()\nfxprune.report\n"
        "assert random.getstate() == before, 'the state changed'"
    )
    assert modules_after(code, "rich") == {"rich": True}


def test_a_stage_brings_all_rules() -> None:
    assert torchvision.ops.StochasticDepth is not None  # it is imported
    assert fxprune.capture is not None
    register_torchvision()
    own = set(RULES) - {key for key, _ in vision._rules(torchvision.ops)}
    assert len(RULES) - len(own) >= 8
    code = (
        "import fxprune\nfxprune.capture\nfrom fxprune.rules.table import RULES\n"
        f"assert len(RULES) == {len(own)}, len(RULES)"
    )
    assert modules_after(code, "torchvision") == {"torchvision": False}


@pytest.mark.wide
def test_operations_of_torchvision_have_rules_where_it_is_imported() -> None:
    code = (
        "from torch import nn, ones\nimport fxprune\nnet = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))\n"
        "fxprune.couple(fxprune.capture(net, ones(2, 4)))\nassert 'torchvision' not in sys.modules\n"
        "from torchvision.ops import StochasticDepth\nnet.insert(1, StochasticDepth(0.5, 'row'))\n"
        "first, last = fxprune.couple(fxprune.capture(net, ones(2, 4)))\n"
        "assert (len(first), first.frozen) == (8, None)"
    )
    assert modules_after(code, "torchvision") == {"torchvision": True}


def test_a_pickled_plan_opens_in_a_fresh_process(tmp_path: Path) -> None:
    net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
    plan = fxprune.Plan.from_kept(net, torch.ones(2, 4), {"0": [1, 5]})
    (tmp_path / "plan.pickle").write_bytes(pickle.dumps(plan))
    file = str(tmp_path / "plan.pickle")
    code = f"import pickle\nplan = pickle.load(open({file!r}, 'rb'))\nassert plan.keep['0'] == (1, 5)"
    assert modules_after(code, "fxprune.planning.plan") == {"fxprune.planning.plan": True}


@pytest.mark.wide
def test_type_checkers_see_the_names(tmp_path: Path) -> None:
    mypy = pytest.importorskip("mypy.api")
    (tmp_path / "user.py").write_text(
        "import fxprune\nfrom fxprune import compress\n\nreveal_type(fxprune.Plan.load('plan.json'))\n"
        "reveal_type(compress)\nreveal_type(fxprune.rules.rule)\nfxprune.prune\n"
    )
    (tmp_path / "mypy.ini").write_text(
        "[mypy]\nstrict = True\nfollow_imports = silent\n"
        "[mypy-torch.*,torchvision.*,numpy.*,scipy.*,rich.*,networkx.*,safetensors.*,jinja2.*]\nfollow_imports = skip\n"
    )
    where = ["--config-file", str(tmp_path / "mypy.ini"), "--cache-dir", str(tmp_path / "cache")]
    out, _, _ = mypy.run([*where, str(tmp_path / "user.py")])
    assert 'Revealed type is "fxprune.planning.plan.Plan"' in out
    assert re.search(r'Revealed type is "def \(model: Any, loader: .*alpha: (float \| None|Union)', out)
    assert 'error: Module has no attribute "prune"' in out
    assert out.count("error:") == 1
