"""The kit on a machine like Colab's: torch and numpy are there and stay, the kit comes beside them.

The machine is a real virtual environment with pip, Colab's IPython, a real numpy of another version
than the kit's pin, a torch and a torchao that are names and versions only, and a `google.colab` that
is empty. Not covered: a real Colab machine, its other packages, a real mounted Drive.
"""

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from sao_utils import colab, store

ROOT = Path(__file__).resolve().parent.parent
NUMPY, IPYTHON = "2.3.4", "7.34.0"
STAND_INS = {"torch": "2.9.1+cu126", "torchao": "0.10.0"}
#: Needs of a copy of the kit whose real installation takes seconds.
FEW = ("torch", "numpy", "pydantic", "pyyaml", "tqdm")


def guard():
    notebook = json.loads((ROOT / "notebooks" / "00_start_here.ipynb").read_text(encoding="utf-8"))
    return "".join(next(c for c in notebook["cells"] if c["cell_type"] == "code")["source"])


def call(*command, **options):
    """What a command prints; fails with it if the command does."""
    done = subprocess.run(
        [str(part) for part in command],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
        **options,
    )
    assert done.returncode == 0, done.stdout[-3000:]
    return done.stdout


def python_of_colab():
    """A Python 3.12, as Colab has; this one where there is none."""
    root = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"))
    found = [*sorted(root.glob("versions/3.12.*/bin/python")), shutil.which("python3.12")]
    return next((python for python in found if python), sys.executable)


@pytest.fixture(scope="module")
def machine(tmp_path_factory):
    """The environment's Python, and its folder of packages."""
    folder = tmp_path_factory.mktemp("colab")
    call(python_of_colab(), "-m", "venv", folder)
    python = folder / "bin" / "python"
    needs = (f"numpy=={NUMPY}", f"ipython=={IPYTHON}")
    command = [str(part) for part in (python, "-m", "pip", "install", "-q", *needs)]
    pip = subprocess.run(command, capture_output=True, text=True)
    if pip.returncode:
        pytest.skip(f"pip reaches no index here: {pip.stderr.strip().splitlines()[-1]}")
    (packages,) = folder.glob("lib/python3.*/site-packages")
    (packages / "google" / "colab").mkdir(parents=True)
    (packages / "google" / "colab" / "__init__.py").touch()
    for name, version in STAND_INS.items():
        (packages / name).mkdir()
        (packages / name / "__init__.py").write_text(f"__version__ = {version!r}\n")
        info = packages / f"{name}-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        (info / "INSTALLER").write_text("pip\n")
        (info / "RECORD").write_text(f"{name}/__init__.py,,\n{info.name}/METADATA,,\n")
    return python, packages


def files_of(packages, *names):
    """Every file of some packages, with a hash of its content."""
    return {
        str(path.relative_to(packages)): hashlib.sha256(path.read_bytes()).hexdigest()
        for name in names
        for folder in (name, f"{name}-*", f"{name}.libs")
        for path in packages.glob(f"{folder}/**/*")
        if path.is_file() and path.suffix != ".pyc"
    }


@pytest.fixture
def address(tmp_path):
    """The address of a repository with the kit, which needs few packages."""
    copy = tmp_path / "origin"
    shutil.copytree(ROOT / "sao_utils", copy / "sao_utils", ignore=shutil.ignore_patterns("__py*"))
    shutil.copytree(ROOT / "results" / "reported", copy / "results" / "reported")
    for name in ("README.md", "LICENSE", "constraints.txt"):
        shutil.copy(ROOT / name, copy / name)
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    every = re.search(r"^dependencies = \[\n(.*?)^\]", project, re.MULTILINE | re.DOTALL).group(1)
    few = "".join(re.findall(rf' *"(?:{"|".join(FEW)})\b.*\n', every))
    assert len(few.splitlines()) == len(FEW)
    (copy / "pyproject.toml").write_text(project.replace(every, few), encoding="utf-8")
    author = ("-c", "user.name=nobody", "-c", "user.email=nobody@example.org")
    call("git", "init", "-q", copy)
    call("git", "-C", copy, "add", ".")
    call("git", "-C", copy, *author, "commit", "-q", "-m", "kit")
    return f"file://{copy}"


@pytest.mark.slow
def test_the_guard_cell_fetches_the_kit_and_leaves_torch_and_numpy_alone(
    machine, address, tmp_path
):
    python, packages = machine
    kept = files_of(packages, "torch", "numpy")
    content = tmp_path / "content"  # where Colab opens a notebook: without a checkout beside it
    content.mkdir()
    after = "from sao_utils.recipes import load_recipe; print('recipe', load_recipe('tiny').name)"
    filled = guard().replace('".."', f'"{address}"')
    assert address in filled
    (content / "cells.ipy").write_text(f"import google.colab, numpy, torch\n{filled}\n{after}\n")
    place = {"IPYTHONDIR": str(tmp_path / "ipython"), "PYTHONPATH": ""}
    ipython = (python, "-m", "IPython", "--colors=NoColor", "cells.ipy")

    shown = call(*ipython, cwd=content, env={**os.environ, **place})
    assert "Done." in shown and "recipe tiny" in shown and "drive.mount" in shown
    assert files_of(packages, "torch", "numpy") == kept and kept
    there = call(python, "-m", "pip", "list", "--format=freeze").split()
    assert f"numpy=={NUMPY}" in there and f"torch=={STAND_INS['torch']}" in there
    assert "torchao==0.17.0" in there  # with the older one, peft stops at the first LoRA
    pins = (ROOT / "constraints.txt").read_text(encoding="utf-8").split()
    assert {line for line in there if line.startswith("pydantic==")} <= {*pins}
    kit = packages / "sao_utils"
    assert (kit / "recipe.py").is_file(), "an editable install is not imported"
    assert (kit / "report" / "reported" / "sao.csv").is_file()  # without a checkout beside it

    shown = call(*ipython, cwd=content, env={**os.environ, **place, "PIP_NO_INDEX": "1"})
    assert "recipe tiny" in shown and "Installing" not in shown and "fatal" not in shown


@pytest.mark.slow
def test_all_needs_of_the_kit_fit_beside_that_torch_and_numpy(machine, tmp_path):
    """pip resolves them for real and installs nothing."""
    python, _ = machine
    report = tmp_path / "report.json"
    code = (
        "import runpy, pathlib, sys, numpy, torch\n"
        "kit = runpy.run_path('sao_utils/colab.py')\n"
        "space = kit['install'].__globals__\n"
        "pip = space['_pip']\n"
        f"trial = ('--dry-run', '--report', {str(report)!r})\n"
        "space['_pip'] = lambda *a: '--no-deps' in a or pip(*trial, *a)\n"
        "kit['install'](pathlib.Path('.'))\n"
    )
    call(python, "-c", code, cwd=ROOT)
    new = {
        colab.plain(entry["metadata"]["name"]): entry["metadata"]["version"]
        for entry in json.loads(report.read_text(encoding="utf-8"))["install"]
    }
    pins = dict(
        line.split("==")
        for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").split()
        if "==" in line
    )
    assert {"transformers", "trl", "peft", "datasets", "papermill"} <= set(new)
    assert not {"torch", "numpy", "jupyterlab", "triton", "ipython"} & set(new)
    assert {name: pins[name] for name in new} == new


def test_constraints_hold_what_is_loaded_or_bound_to_the_gpu_and_pin_the_rest():
    pins = {"torch": "2.13.0", "peft": "0.21.2", "rich": "15.0", "tornado": "6.6.1", "tqdm": "4.67"}
    there = {"torch": "2.9.1+cu126", "peft": "0.17", "rich": "13.9", "tornado": "6.5.1"}
    assert colab.constraints(pins, there, in_use={"tornado"}) == [
        "peft==0.21.2",  # tested together with trl
        "torch==2.9.1+cu126",
        "tornado==6.5.1",  # loaded
        "tqdm==4.67",  # was not there
    ]  # and rich: there, not loaded, so pip keeps it if it can


def test_rows_go_to_a_mounted_drive_unless_the_user_says_otherwise(monkeypatch, tmp_path):
    monkeypatch.delenv("SAO_RESULTS", raising=False)
    monkeypatch.setattr(colab, "DRIVE", tmp_path)
    assert store.results_folder() == ROOT / "results"  # not on Colab, whatever folder there is
    monkeypatch.setattr(colab, "on_colab", lambda: True)
    assert store.results_folder() == tmp_path / "sao-results"
    monkeypatch.setenv("SAO_RESULTS", str(tmp_path / "mine"))
    assert store.results_folder() == tmp_path / "mine"
