"""SAO reproduction kit: a language model aligns itself on data it makes itself.

Floors, from the ground up; a module imports only from lower ones:
1. recipe, colab, rows, templates, intervals, length_control, wording,
   ratings, shapes
2. engines (one interface: engine_transformers, engine_vllm with vllm_child, engine_api, engine_ray),
   losses, packing, questions, overlap, tiny (its world, model and exams)
3. the stages: asking, personas, responses, judging, pairs, trainer, training, evaluation, contests,
   published (alpaca_eval, arena_hard, mt_bench), harness, publishing
4. results, leakage, tables, figures, viewer, costs, workload, planning,
   tiny_card, tiny_search; measuring, contenders, benchmarks, engine_benchmarks with vllm_raw
5. pipeline, cli
"""

import logging
import os
import warnings

# Before any library that would read it: nothing here phones home.
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("HF_UPDATE_DOWNLOAD_COUNTS", "0")  # of loads of data sets
# Both come from inside the libraries, tell a user nothing to do, and would print paths of the
# machine into executed notebooks.
warnings.filterwarnings("ignore", message="IProgress not found")
warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")

# bitsandbytes advises to install `kernels`; with that it would ask the hub at every import.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)

__version__ = "0.1.0"
