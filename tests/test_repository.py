"""The files around the package: what they say agrees with pyproject.toml, with the package and with each other."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest

import fxprune

yaml = pytest.importorskip("yaml")
try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10, where pytest brings it
    import tomli as tomllib

ROOT = Path(__file__).parent.parent
GITHUB = ROOT / ".github"
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
SOURCE = PROJECT["project"]["urls"]["Source"]
FORMS = sorted(path for path in (GITHUB / "ISSUE_TEMPLATE").glob("*.yml") if path.stem != "config")


def read(path: Path) -> Any:
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def jobs(workflow: str) -> dict[str, Any]:
    return read(GITHUB / "workflows" / f"{workflow}.yml")["jobs"]


def commands(workflow: str) -> list[str]:
    return [step["run"] for job in jobs(workflow).values() for step in job.get("steps", ()) if "run" in step]


def lower_bound(package: str) -> str:
    (bound,) = (line for line in PROJECT["project"]["dependencies"] if re.match(rf"{package}>=", line))
    return bound.partition(">=")[2]


def test_pythons_are_those_of_the_classifiers() -> None:
    pythons = jobs("ci")["tests"]["strategy"]["matrix"]["python"]
    classifiers = "\n".join(PROJECT["project"]["classifiers"])
    assert pythons == re.findall(r"^Programming Language :: Python :: (3\.\d+)$", classifiers, re.MULTILINE)
    assert PROJECT["project"]["requires-python"] == f">={pythons[0]}"
    assert PROJECT["tool"]["ruff"]["target-version"] == f"py{pythons[0].replace('.', '')}"
    assert PROJECT["tool"]["mypy"]["python_version"] == pythons[0]
    minors = [int(version.partition(".")[2]) for version in pythons]
    assert minors == list(range(minors[0], minors[0] + len(minors)))
    assert all(step["with"]["python-version"] in (pythons[-1], "${{ matrix.python }}") for step in set_ups())


def set_ups() -> list[dict[str, Any]]:
    steps = [step for workflow in ("ci", "release") for job in jobs(workflow).values() for step in job.get("steps", ())]
    return [step for step in steps if step.get("uses", "").startswith("actions/setup-python@")]


def test_the_oldest_torch_is_that_of_the_dependencies() -> None:
    tests = jobs("ci")["tests"]
    oldest, newest = tests["strategy"]["matrix"]["torch"]
    installs = {step["if"]: step["run"] for step in tests["steps"] if "if" in step}
    assert (oldest, newest) == (lower_bound("torch"), "newest")
    pinned = f"'torch=={oldest}.*' 'torchvision=={lower_bound('torchvision')}.*'"
    assert installs == {
        f"matrix.torch == '{oldest}'": f"pip install {pinned} -e '.[test]'",
        f"matrix.torch == '{newest}'": "pip install -e '.[test]'",
    }


def test_readme_names_the_versions_and_the_license() -> None:
    pythons, license_name = (PROJECT["project"][key].lstrip(">=") for key in ("requires-python", "license"))
    line = f"Python ≥ {pythons} · PyTorch ≥ {lower_bound('torch')} · {license_name}"
    assert line in (ROOT / "README.md").read_text(encoding="utf-8").splitlines()


def test_workflows_check_what_the_script_checks() -> None:
    checks = r"ruff check|ruff format|mypy|pytest -n auto|-m wide|-m slow .*|mkdocs build|python \.ci/wheel\.py"
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    plain = re.sub(r'"\$bin/(\w+)"', r"\1", script).replace("-p no:cacheprovider ", "")
    assert set(re.findall(checks, "\n".join(commands("ci")))) == set(re.findall(checks, plain))


def test_a_release_waits_for_all_checks() -> None:
    release = jobs("release")
    assert release["ci"]["uses"] == "./.github/workflows/ci.yml"
    assert set(release["publish"]["needs"]) == set(release) - {"publish"}
    assert release["publish"]["permissions"] == {"id-token": "write"}
    assert not re.search(r"password|secrets\.", (GITHUB / "workflows" / "release.yml").read_text(encoding="utf-8"))


def release_check() -> Any:
    spec = importlib.util.spec_from_file_location("release", ROOT / ".ci" / "release.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_release_says_what_disagrees(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check = release_check()
    wrong = check.disagreements("v99.0", "https://elsewhere.example/fxprune")
    assert f"fxprune/version.py says v{fxprune.__version__}, and the release is v99.0" in wrong
    assert f"CITATION.cff says v{fxprune.__version__}, and the release is v99.0" in wrong
    assert f"Source in pyproject.toml says {SOURCE}, and the release is https://elsewhere.example/fxprune" in wrong
    (tmp_path / "fxprune").mkdir()
    texts = {
        "fxprune/version.py": '__version__ = "1.2.3"\n',
        "CITATION.cff": "version: 1.2.3\n",
        "pyproject.toml": '[project.urls]\nSource = "https://elsewhere.example/fxprune"\n',
        "CHANGELOG.md": "# Changelog\n\n## [Unreleased]\n\n## [1.2.3] - 2026-01-31\n\n## [1.2.2] - 2026-01-01\n",
    }
    for name, text in texts.items():
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(check, "ROOT", tmp_path)
    assert check.disagreements("v1.2.3", "https://elsewhere.example/fxprune") == []
    (tmp_path / "CHANGELOG.md").write_text("# Changelog\n\n## [Unreleased]\n")
    (message,) = check.disagreements("v1.2.3", "https://elsewhere.example/fxprune")
    assert message == "the newest section of CHANGELOG.md says vNone, and the release is v1.2.3"


@pytest.mark.parametrize("path", FORMS, ids=lambda path: path.stem)
def test_issue_forms_ask_and_name_each_answer_once(path: Path) -> None:
    form = read(path)
    asked = [field for field in form["body"] if field["type"] != "markdown"]
    identities = [field["id"] for field in asked]
    assert form["name"]
    assert form["description"]
    assert len(set(identities)) == len(identities) >= 4
    assert all(field["validations"]["required"] and field["attributes"]["label"] for field in asked)


def test_the_forms_are_the_kinds_of_issues() -> None:
    config = read(GITHUB / "ISSUE_TEMPLATE" / "config.yml")
    assert [path.stem for path in FORMS] == ["bug", "unsupported_operation", "wrong_result"]
    assert config["blank_issues_enabled"] is False
    assert [link["name"] for link in config["contact_links"]] == ["Question", "Limits", "Vulnerability"]


def test_the_command_that_a_bug_report_asks_for_runs() -> None:
    fields = {field["id"]: field["attributes"] for field in read(GITHUB / "ISSUE_TEMPLATE" / "bug.yml")["body"]}
    (command,) = re.findall(r'`python -c "(.*)"`', fields["versions"]["description"])
    with contextlib.redirect_stdout(io.StringIO()) as out:
        exec(command, {})
    assert fxprune.__version__ in out.getvalue().split()


def test_hooks_run_the_tools_of_the_test_extra() -> None:
    local, hygiene = read(ROOT / ".pre-commit-config.yaml")["repos"]
    extra = {re.split(r"[>\[]", line)[0] for line in PROJECT["project"]["optional-dependencies"]["test"]}
    assert {hook["entry"].split()[0] for hook in local["hooks"]} == {"ruff", "mypy"} < extra
    assert {hook["language"] for hook in local["hooks"]} == {"system"}
    assert {"check-yaml", "check-toml", "end-of-file-fixer", "trailing-whitespace"} < {
        h["id"] for h in hygiene["hooks"]
    }


def test_the_citation_is_of_this_version_and_of_the_paper() -> None:
    citation = read(ROOT / "CITATION.cff")
    assert citation["cff-version"] == "1.2.0"
    assert citation["version"] == fxprune.__version__
    assert citation["license"] == PROJECT["project"]["license"]
    (paper,) = citation["references"]
    number = paper["url"].rpartition("/")[2]
    assert f"arXiv {number}" in str(fxprune.__doc__)
    assert f"https://arxiv.org/abs/{number}" in (ROOT / "docs" / "method.md").read_text(encoding="utf-8")
    assert paper["title"].startswith("FAIR-Pruner: ")
    assert all(set(author) == {"given-names", "family-names"} for author in paper["authors"])


def test_addresses_are_of_one_repository() -> None:
    places = [ROOT / "pyproject.toml", ROOT / "CITATION.cff", *FORMS, GITHUB / "ISSUE_TEMPLATE" / "config.yml"]
    found = {url for path in places for url in re.findall(r"https://github\.com/\S+/\w+", path.read_text("utf-8"))}
    assert found
    assert {url for url in found if not f"{url}/".startswith(f"{SOURCE}/")} == set()
    named = {url.removeprefix(SOURCE).partition("main/")[2] for url in PROJECT["project"]["urls"].values()}
    assert all((ROOT / path).exists() for path in named)


def test_the_source_distribution_holds_what_is_tracked() -> None:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode or not listed.stdout:
        pytest.skip("not a checkout")
    included = {path.strip("/") for path in PROJECT["tool"]["hatch"]["build"]["targets"]["sdist"]["include"]}
    by_itself = {".gitignore", "LICENSE", "pyproject.toml"}
    assert {path.partition("/")[0] for path in listed.stdout.splitlines()} == included | by_itself


def test_the_package_index_shows_the_readme_with_addresses() -> None:
    settings = PROJECT["tool"]["hatch"]["metadata"]["hooks"]["fancy-pypi-readme"]
    text = "![plot](docs/a.svg) [page](docs/b.md#c) [paper](https://arxiv.org/abs/1) [below](#limits)"
    for rule in settings["substitutions"]:
        text = re.sub(rule["pattern"], rule["replacement"].replace("$HFPR_VERSION", "1.0"), text)
    assert text == (
        f"![plot]({SOURCE}/raw/v1.0/docs/a.svg) [page]({SOURCE}/blob/v1.0/docs/b.md#c) "
        "[paper](https://arxiv.org/abs/1) [below](#limits)"
    )


def test_the_changelog_begins_with_what_is_not_released() -> None:
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    sections = re.findall(r"^## (.*)$", text, re.MULTILINE)
    assert sections[0] == "[Unreleased]"
    assert all(re.fullmatch(r"\[\d+\.\d+\.\d+\] - \d{4}-\d\d-\d\d", section) for section in sections[1:])
    kinds = set(re.findall(r"^### (.*)$", text, re.MULTILINE))
    assert kinds <= {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}
