"""SAO reproduction kit: a language model aligns itself on data that it makes itself.

The layers, lowest first. Each may import only from those listed above it, and no two modules import each
other in a circle (tests/test_house.py):

    recipe       settings of a run, validated; which models a run has
    colab        installation into a notebook that is already open
    machine      versions and hardware, for a run's manifest
    disk         files that are written whole or not at all, and locks between processes
    recipes      the shipped recipes, and how a recipe is loaded
    store        a run's folder: append-only rows, resuming, the manifest
    fetch        downloads a real model onto this machine, once
    files        a user's tables: JSON lines, JSON, CSV, TSV, Parquet
    statistics   intervals, length control, ratings
    oracles      judges that know what is right, such as the grammar of the tiny world
    templates    prompts/*.jinja, and how replies are parsed
    engines      models that write and choose: transformers, vLLM, servers
    stages       personas or keywords, prompts, responses, judging or scoring, pairs: rows in, rows out
    training     losses, packing, trainer, merging
    evaluation   answers, comparisons, published benchmarks, tasks, leakage
    methods      stages put together: SAO, SynPO, others, controls; iterations and studies of them
    report       one table of results; tables, figures, the page, model cards, publishing
    plan         what a recipe will need, before it runs: rows, tokens, hours, memory, money
    tiny, bench  the tiny model and where it comes from; measurements of speed and memory
    notebooks    the numbered notebooks, run in order by papermill
    cli          the command `sao`

`prompts/`, `studies/` and `launch/` hold texts and settings, no code.
"""

import logging
import os
import warnings

# Set before any library that would read these is imported: nothing here phones home.
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("HF_UPDATE_DOWNLOAD_COUNTS", "0")  # counts of loaded data sets
# Both warnings come from inside the libraries, ask nothing of the user, and would print this machine's
# paths into executed notebooks.
warnings.filterwarnings("ignore", message="IProgress not found")
warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")

# bitsandbytes advises installing `kernels`, with which it would query the hub at every import.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)

__version__ = "0.1.0"
