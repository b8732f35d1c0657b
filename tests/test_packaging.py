"""The files that set up the environment agree with each other and with what is installed."""

import importlib.metadata
import os
import re
import shutil
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


@pytest.mark.parametrize(
    ("name", "version", "required"),
    [
        ("torch", "2.13.0", ">=2.6"),  # a range: Colab must keep its own build
        ("transformers", "5.23.0", "==5.23.0"),
        ("trl", "1.16.0", "==1.16.0"),
        ("vllm", "0.30.0", "==0.30.0"),
    ],
)
def test_the_model_stack_stays_on_the_versions_that_were_tested_together(name, version, required):
    assert pins()[name] == version
    assert [str(r.specifier) for r in DIRECT if r.name == name] == [required]


@pytest.mark.parametrize("name", ["docs/real-models.md", "docs/training.md"])
def test_whoever_installs_the_kit_takes_the_constraints(name):
    """torch is a range: without them, pip would take another version, and gigabytes of CUDA."""
    lines = (ROOT / name).read_text(encoding="utf-8").splitlines()
    installs = [line for line in lines if "pip install" in line and " -e " in line]
    assert installs and all("-c constraints.txt" in line for line in installs)


#: Stand-ins that only note what they would install.
PIP = """#!/bin/sh
case "$*" in
*"config list") echo "global.find-links='/wheels /more'" ;;
*install*) echo "pip $*" >> calls ;;
esac
"""
UV = """#!/bin/sh
echo "uv $* $UV_FIND_LINKS" >> calls
exit {status}
"""


@pytest.fixture
def installed_by_make(tmp_path):
    """What make installs with; `uv` is the status that uv ends with, None: there is no uv."""

    def run(uv=None):
        scripts = {".venv/bin/python": PIP, "tools/uv": uv is not None and UV.format(status=uv)}
        for name, text in scripts.items():
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text or "")
            path.chmod(0o755 if text else 0o644)
        for name in ("Makefile", "pyproject.toml", "constraints.txt"):
            shutil.copy(ROOT / name, tmp_path)
        (tmp_path / "calls").unlink(missing_ok=True)
        environment = {"PATH": f"{tmp_path / 'tools'}:/usr/bin:/bin"}
        subprocess.run(
            ["make", "-sB", ".venv/.installed"], cwd=tmp_path, env=environment, check=True
        )
        return (tmp_path / "calls").read_text().splitlines()

    return run


def test_make_installs_with_uv_from_the_folders_that_pip_knows(installed_by_make):
    (call,) = installed_by_make(uv=0)
    assert call.startswith("uv pip install") and call.endswith("/more,/wheels")
    assert "-c constraints.txt -e .[dev]" in call and "--python .venv/bin/python" in call


@pytest.mark.parametrize(("uv", "tools"), [(None, ["pip"]), (2, ["uv", "pip"])])
def test_make_installs_with_pip_where_uv_is_missing_or_fails(installed_by_make, uv, tools):
    calls = installed_by_make(uv)
    assert [call.split()[0] for call in calls] == tools
    assert "-c constraints.txt -e .[dev]" in calls[-1]


def test_environment_yml_installs_the_project_itself_with_the_constraints():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text(encoding="utf-8"))
    python, pip, packages = environment["dependencies"]
    assert pip == "pip" and packages["pip"][0] == "-c constraints.txt"
    assert re.fullmatch(r"-e \.(\[[a-z,]+\])?", packages["pip"][1]) and len(packages["pip"]) == 2
    assert python.removeprefix("python=") in SpecifierSet(PROJECT["requires-python"])


def test_the_makefile_accepts_the_pythons_that_the_project_accepts():
    text = (ROOT / "Makefile").read_text(encoding="utf-8")
    low, high = re.search(r"\(3, (\d+)\) <= sys\.version_info\[:2\] <= \(3, (\d+)\)", text).groups()
    project = SpecifierSet(PROJECT["requires-python"])
    for minor in range(8, 20):
        assert (int(low) <= minor <= int(high)) == (f"3.{minor}" in project)


def test_ci_run_runs_all_tests_and_none_of_them_needs_the_hub():
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    lines = script.read_text(encoding="utf-8").splitlines()
    assert lines[0] == "#!/usr/bin/env bash" and "set -euo pipefail" in lines
    assert [line for line in lines if line.startswith("make")] == ["make test", "make test-vllm"]
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
