"""The files that set up the environment agree with each other and with what is installed."""

import importlib.metadata
import re
import tomllib
from pathlib import Path

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


def test_every_constraint_is_one_exact_pin_for_cpu_and_gpu_machines_alike():
    for line in constraint_lines():  # no local version such as 2.13.0+cpu
        assert re.fullmatch(r"[A-Za-z0-9._-]+==[A-Za-z0-9._!]+", line), line
    names = [canonicalize_name(line.split("==")[0]) for line in constraint_lines()]
    assert sorted(names) == sorted(set(names)), "a package is pinned twice"
    tied = re.compile(r"(triton|pytorch-triton|nvidia|cuda|flashinfer)(-|$)")
    assert not [name for name in names if tied.match(name)]


def test_environment_yml_installs_the_project_itself_with_the_constraints():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text(encoding="utf-8"))
    python, pip, packages = environment["dependencies"]
    assert pip == "pip" and packages["pip"][0] == "-c constraints.txt"
    assert re.fullmatch(r"-e \.(\[[a-z,]+\])?", packages["pip"][1]) and len(packages["pip"]) == 2
    assert python.removeprefix("python=") in SpecifierSet(PROJECT["requires-python"])


def test_versions_that_are_installed_or_required_are_those_of_the_pins():
    for requirement in DIRECT:
        pin = pins()[canonicalize_name(requirement.name)]
        assert requirement.specifier.contains(pin, prereleases=True), requirement
        try:
            installed = importlib.metadata.version(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            assert requirement not in BASE + EXTRAS["dev"], f"{requirement} is not installed"
        else:
            # The public part only: a CPU build of torch calls itself 2.13.0+cpu.
            assert Version(installed).public == pin, requirement
