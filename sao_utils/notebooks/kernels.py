"""One notebook: its kernel, its execution by papermill, and the executed copy that is kept."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

from sao_utils.disk import write_whole
from sao_utils.store import Run

ERROR_LINES = 8  # of a cell's error message; long ones end with what matters
#: What a kernel imports while the notebook before its own still runs, which saves 5 seconds of waiting.
IMPORTS = "import sao_utils, torch, pandas, matplotlib.pyplot; from transformers import AutoModelForCausalLM"


class NotebookFailed(RuntimeError):
    """A notebook did not reach its end; the message says why, and where the partly executed copy is."""


def start_kernel(run: Run, folder: Path, ahead: bool = False):
    """Start a kernel with this very Python for a notebook of a run, in the folder of the notebooks.

    Args:
        ahead: the kernel will wait for its notebook, and meanwhile imports what all notebooks need.
    """
    from jupyter_client import AsyncKernelManager
    from jupyter_client.kernelspec import KernelSpecManager
    from jupyter_core.utils import run_sync

    # With no folders to search, "python3" is this Python, not a kernel that the user has installed.
    kernel = AsyncKernelManager(
        kernel_name="python3", kernel_spec_manager=KernelSpecManager(kernel_dirs=[])
    )
    # log_level: without it, each kernel prints a warning about local sockets.
    arguments = ["--IPKernelApp.log_level=50", "--HistoryManager.hist_file=:memory:"]
    if ahead:
        # A kernel checks that its parent is still there only once it is ready.
        code = f"{IMPORTS}; import os; os.getppid() == {os.getpid()} or os._exit(1)"
        arguments += [f"--IPKernelApp.exec_lines=exec({code!r}, {{}})"]  # leaves no names
    run_sync(kernel.start_kernel)(
        cwd=str(folder.resolve()), env={**os.environ, **_settings(run)}, extra_arguments=arguments
    )
    return kernel


def _settings(run: Run) -> dict[str, str]:
    """Environment variables for the kernels of a run, in addition to those already set."""
    package = str(Path(__file__).resolve().parents[2])
    settings = {
        "SAO_RESULTS": str(run.folder.resolve().parent),
        "SAO_BATCH": "1",  # nobody watches: progress every 30 s instead of every second
        "TRL_EXPERIMENTAL_SILENCE": "1",
        "PYDEVD_DISABLE_FILE_VALIDATION": "1",  # silences a debugger's warning at kernel start
        # The kernel must import the very package that started it.
        "PYTHONPATH": os.pathsep.join(filter(None, [package, os.environ.get("PYTHONPATH")])),
    }
    if run.recipe.model.path == "tiny":
        # More threads only wait for each other, busily and for minutes if another program takes their core.
        settings |= {"OMP_NUM_THREADS": "2", "OMP_WAIT_POLICY": "PASSIVE"}
    return settings


def stop_kernel(kernel) -> None:
    """Stop a kernel if there is one and it runs."""
    from jupyter_core.utils import run_sync

    if kernel is not None and kernel.has_kernel:
        run_sync(kernel.shutdown_kernel)()


def execute(path: Path, out: Path, values: dict[str, Any], kernel) -> None:
    """Run a notebook in a kernel, and keep the executed copy in the folder `out`.

    Args:
        values: the values of the notebook's parameters.

    Raises:
        NotebookFailed: the notebook did not reach its end.
    """
    import papermill
    from nbclient.exceptions import DeadKernelError

    failed = out / f"{path.stem}.failed.ipynb"  # its name until it has reached its end
    failed.unlink(missing_ok=True)
    reason = None
    try:
        papermill.execute_notebook(
            path,
            failed,
            parameters=values,
            kernel_name="python3",
            km=kernel,
            progress_bar=False,
            start_timeout=120,
            iopub_timeout=120,  # the default of 4 s fails a notebook on a busy machine
        )
    except papermill.PapermillExecutionError as error:
        lines = re.sub(r"\x1b\[[0-9;]*[A-Za-z]", "", f"{error.ename}: {error.evalue}").splitlines()
        reason = f"an error in cell [{error.exec_count}].\n" + "\n".join(lines[-ERROR_LINES:])
    except DeadKernelError:
        reason = (
            "its Python process was killed, most often because the machine ran out of memory.\n"
            "Close other programs, or try a smaller model.batch_tokens or training.token_budget."
        )
    except (OSError, RuntimeError) as error:  # a full disk, or a kernel that does not start
        reason = f"{type(error).__name__}: {error}"
    if failed.exists():
        notebook = json.loads(failed.read_text(encoding="utf-8"))
        # Keep this machine's paths private.
        notebook["metadata"]["papermill"].update(input_path=path.name, output_path=path.name)
        write_whole(failed, json.dumps(notebook, indent=1, ensure_ascii=False) + "\n")
    if reason:
        kept = f"\nThe notebook as far as it got: {failed}" if failed.exists() else ""
        raise NotebookFailed(f"{path.name} did not finish: {reason}{kept}")
    failed.replace(out / path.name)
