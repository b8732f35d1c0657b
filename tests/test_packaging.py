"""The files that set up the environment agree with each other and with what is installed."""

import ast
import importlib.metadata
import os
import re
import subprocess
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
BASE = [Requirement(line) for line in PROJECT["dependencies"]]
EXTRAS = {
    extra: [Requirement(line) for line in lines]
    for extra, lines in PROJECT["optional-dependencies"].items()
}
DIRECT = BASE + [requirement for lines in EXTRAS.values() for requirement in lines]


def constraint_lines():
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    return [line.strip() for line in lines if line.strip() and not line.startswith("#")]


def pins():
    return {
        canonicalize_name(line.split("==")[0]): line.split("==")[1] for line in constraint_lines()
    }


def makefile_recipe(target):
    """The commands of one Makefile target, without their leading tab."""
    text = (ROOT / "Makefile").read_text(encoding="utf-8")
    block = re.search(rf"^{target}:[^\n]*\n((?:\t[^\n]*\n)+)", text, re.MULTILINE)
    assert block, f"the Makefile has no target {target}"
    return [line.strip() for line in block.group(1).splitlines()]


def test_every_constraint_is_one_exact_pin():
    for line in constraint_lines():
        assert re.fullmatch(r"[A-Za-z0-9._-]+==[A-Za-z0-9._!]+", line), line
    names = [canonicalize_name(line.split("==")[0]) for line in constraint_lines()]
    assert sorted(names) == sorted(set(names)), "a package is pinned twice"


@pytest.mark.parametrize("requirement", DIRECT, ids=str)
def test_every_requirement_has_a_pin_that_satisfies_it(requirement):
    name = canonicalize_name(requirement.name)
    assert name in pins(), f"constraints.txt has no line for {name}"
    assert requirement.specifier.contains(pins()[name], prereleases=True)


def test_constraints_serve_cpu_and_gpu_machines_alike():
    assert not [line for line in constraint_lines() if "+" in line], "a local version suffix"
    tied = re.compile(r"(triton|pytorch-triton|nvidia|cuda|flashinfer)(-|==)", re.IGNORECASE)
    assert not [line for line in constraint_lines() if tied.match(line)]


#: A range where Colab must keep its own build; everything else is installed with constraints.txt.
ASKED = {"torch": ">=2.6"}


@pytest.mark.parametrize(
    ("name", "version"),
    [("torch", "2.13.0"), ("transformers", "5.23.0"), ("trl", "1.16.0"), ("vllm", "0.30.0")],
)
def test_the_model_stack_stays_on_the_versions_that_were_tested_together(name, version):
    assert pins()[name] == version
    asked = [requirement for requirement in DIRECT if requirement.name == name]
    assert [str(requirement.specifier) for requirement in asked] == [
        ASKED.get(name, f"=={version}")
    ]


@pytest.mark.parametrize("name", ["Makefile", "docs/real-models.md", "docs/training.md"])
def test_whoever_installs_the_kit_takes_the_constraints(name):
    """torch is a range: without them, pip would take another version, and gigabytes of CUDA."""
    lines = (ROOT / name).read_text(encoding="utf-8").splitlines()
    installs = [line for line in lines if "pip install" in line and " -e " in line]
    assert installs and all("-c constraints.txt" in line for line in installs)


def test_environment_yml_installs_the_project_itself_with_the_constraints():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text(encoding="utf-8"))
    conda = [entry for entry in environment["dependencies"] if isinstance(entry, str)]
    (pip,) = [entry["pip"] for entry in environment["dependencies"] if isinstance(entry, dict)]
    assert {re.split("[=<>]", entry)[0] for entry in conda} == {"python", "pip"}
    assert pip[0] == "-c constraints.txt"
    assert len(pip) == 2 and re.fullmatch(r"-e \.(\[[a-z,]+\])?", pip[1])


def test_environment_yml_asks_for_a_python_that_the_project_accepts():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text(encoding="utf-8"))
    (python,) = [e for e in environment["dependencies"] if str(e).startswith("python")]
    version = re.fullmatch(r"python=(\d+\.\d+)", python).group(1)
    assert version in SpecifierSet(PROJECT["requires-python"])


def test_the_makefile_accepts_the_pythons_that_the_project_accepts():
    text = (ROOT / "Makefile").read_text(encoding="utf-8")
    low, high = re.search(r"\(3, (\d+)\) <= sys\.version_info\[:2\] <= \(3, (\d+)\)", text).groups()
    makefile = {minor for minor in range(8, 20) if int(low) <= minor <= int(high)}
    project = SpecifierSet(PROJECT["requires-python"])
    assert makefile == {minor for minor in range(8, 20) if f"3.{minor}" in project}


def test_ci_run_runs_all_tests_and_nothing_else():
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    lines = script.read_text(encoding="utf-8").splitlines()
    assert lines[0] == "#!/usr/bin/env bash"
    assert "set -euo pipefail" in lines
    commands = [line for line in lines[1:] if line and not line.startswith(("#", "set ", "cd "))]
    assert commands == ["make test", "make test-vllm"]


def test_make_test_runs_all_tests_without_the_hub():
    (command,) = makefile_recipe("test")
    run = "HF_HUB_OFFLINE=1 $(VENV)/bin/python -m pytest -q"
    assert command == f"{run} -n auto --maxprocesses 4 --dist loadfile"


def test_make_reproduce_runs_the_tiny_recipe_without_the_hub():
    (command,) = makefile_recipe("reproduce")
    assert command == "HF_HUB_OFFLINE=1 $(VENV)/bin/sao run --recipe tiny"
    assert PROJECT["scripts"] == {"sao": "sao_utils.cli:main"}


def test_git_keeps_the_reported_numbers_and_ignores_other_runs():
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")

    def ignored(path):
        return subprocess.run(["git", "check-ignore", "-q", path], cwd=ROOT).returncode == 0

    assert ignored("results/tiny/rows.jsonl")
    for kept in ("reported/sao.csv", "reference/table.csv", "benchmarks/speed.csv"):
        assert not ignored(f"results/{kept}")
    assert not ignored("sao_utils/tiny/model/model.safetensors")


@pytest.mark.parametrize("requirement", DIRECT, ids=str)
def test_installed_versions_equal_the_pins(requirement):
    try:
        installed = importlib.metadata.version(requirement.name)
    except importlib.metadata.PackageNotFoundError:
        optional = requirement not in BASE + EXTRAS["dev"]
        assert optional, f"{requirement.name} is not installed"
        pytest.skip(f"{requirement.name} belongs to an extra that is not installed")
    # The public part only: a CPU build of torch calls itself 2.13.0+cpu.
    assert Version(installed).public == pins()[canonicalize_name(requirement.name)]


def test_modules_import_from_lower_floors_only():
    """The floors are listed in the package's docstring, with every module."""
    package = ROOT / "sao_utils"
    modules = {path.stem for path in package.glob("[!_]*.py")} | {"tiny"}
    listed = re.split(
        r"^\d\. ", ast.get_docstring(ast.parse((package / "__init__.py").read_text())), flags=re.M
    )
    floors = {
        word: floor
        for floor, text in enumerate(listed)
        for word in re.findall(r"\w+", text)
        if floor and word in modules
    }
    assert set(floors) == modules
    for path in package.rglob("[!_]*.py"):
        name = "tiny" if "tiny" in path.parts else path.stem
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("sao_utils"):
                taken = node.module.split(".")[1:2] or [alias.name for alias in node.names]
                assert all(floors.get(one, 0) <= floors[name] for one in taken), (path.name, taken)
