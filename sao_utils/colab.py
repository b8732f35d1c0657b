"""Install the kit into a notebook that is already running, without disturbing what is there.

The first cell of each notebook runs this file if the kit is missing, above all on Colab, whose torch and
numpy match its GPU and are partly loaded already. It needs only Python's standard library.

pip gets three kinds of constraints. Packages that are loaded in this kernel, or compiled against the
GPU's software, stay as they are. The libraries that were tested together are installed in the kit's
versions, and so is everything that the machine lacks.
"""

import re
import shutil
import subprocess
import sys
import tempfile
import tomllib
from importlib import invalidate_caches
from importlib.metadata import distributions, packages_distributions
from importlib.util import find_spec
from pathlib import Path

#: The installed build of these is always kept.
KEPT = ("torch", "torchvision", "torchaudio", "triton", "numpy")
#: Tested together: trl.experimental changes with every release.
STACK = (
    *("transformers", "tokenizers", "trl", "peft", "accelerate", "datasets"),
    *("huggingface-hub", "safetensors", "bitsandbytes"),
)
#: Dependencies of the kit that a notebook running this has already.
LEFT_OUT = ("jupyterlab", "ipykernel")
#: peft raises an error for every LoRA if it finds torchao below 0.16, and Colab has 0.10. 0.17 needs no
#: other package; newer versions need a newer torch.
TORCHAO = "torchao==0.17.0"
#: The user's Drive, if it is mounted, and the folder in it for runs.
DRIVE = Path("/content/drive/MyDrive")
RESULTS = "sao-results"


def on_colab() -> bool:
    """Whether this is a Colab machine."""
    try:
        return find_spec("google.colab") is not None
    except ModuleNotFoundError:  # not even a package `google`
        return False


def plain(name: str) -> str:
    """A package's name in the form in which pip compares names."""
    return re.sub(r"[-_.]+", "-", name).lower()


def installed() -> dict[str, str]:
    """Name and version of every package on the machine."""
    return {plain(found.name): found.version for found in distributions() if found.name}


def loaded() -> set[str]:
    """The packages from which this process has imported something."""
    modules = {name.partition(".")[0] for name in sys.modules}
    owners = packages_distributions()
    return {plain(package) for module in modules for package in owners.get(module, ())}


def constraints(pins: dict[str, str], there: dict[str, str], in_use: set[str]) -> list[str]:
    """The lines of a constraints file that hold pip to the rules above.

    Args:
        pins: the kit's versions by package.
        there: the machine's versions by package.
        in_use: packages that are loaded.
    """
    stays = {name: there[name] for name in there if name in KEPT or name in in_use}
    comes = {name: pin for name, pin in pins.items() if name in STACK or name not in there}
    return [f"{name}=={version}" for name, version in sorted((comes | stays).items())]


def install(source: Path) -> None:
    """Install the checkout in `source`, and what it needs, for this Python.

    Raises:
        RuntimeError: pip failed.
    """
    project = tomllib.loads((source / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    lines = (source / "constraints.txt").read_text(encoding="utf-8").split()
    pins = {plain(n): v for n, _, v in (line.partition("==") for line in lines) if v}
    there = installed()
    needs = [
        n for n in project["dependencies"] if plain(re.split(r"[^\w.-]", n)[0]) not in LEFT_OUT
    ]
    if shutil.which("nvidia-smi"):
        needs.append("bitsandbytes")  # training in 4 bit
    if re.match(r"0\.(\d|1[0-5])\.", there.get("torchao", "")):
        needs.append(TORCHAO)
    print("Installing the kit (about a minute)", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        rules = Path(folder) / "constraints.txt"
        rules.write_text("\n".join(constraints(pins, there, loaded())), encoding="utf-8")
        _pip("-c", str(rules), *needs)
    _pip("--no-deps", str(source))
    invalidate_caches()
    print("Done.")


def _pip(*arguments: str) -> None:
    command = [sys.executable, "-m", "pip", "install", "-q", "--disable-pip-version-check"]
    done = subprocess.run([*command, *arguments], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(
            "pip could not install the kit. If a library is loaded in another version, restart the "
            "session (on Colab: Runtime > Restart session) and run this cell first.\n"
            + done.stderr.strip()[-2000:]
        )


def advice() -> None:
    """On Colab, print which recipe fits the machine, and where rows outlive it."""
    if not on_colab():
        return
    if shutil.which("nvidia-smi"):
        print('A GPU is here: set recipe = "colab-t4" in the cell of parameters below.')
    if DRIVE.is_dir():
        print(f"Rows are kept on your Drive, in {RESULTS}. After a disconnect, run all again.")
    else:
        print(
            "Rows are lost when this machine goes. To keep them, run first: "
            "from google.colab import drive; drive.mount('/content/drive')"
        )


if __name__ == "__main__":
    install(Path(__file__).resolve().parents[1])
    advice()
