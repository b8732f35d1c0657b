"""The process in which vLLM runs. `engines/vllm.py` starts it by the path of this file.

It needs vLLM and nothing from the kit, so it may have an environment of its own. Each message is one
line of JSON. Standard input takes the engine's arguments, then any number of calls:

    {"sampling": {...}, "adapter": {"name": ..., "path": ...} | null, "rows": [[row, token ids, seed], ...]}

Standard output gets {"ready": {...}}, and for each call lists of [row, [new token ids, ended by
itself]] or, if log-probabilities are requested, [row, log-probabilities]; then null. If the process
fails, its last message is {"error": text}.
"""

import json
import multiprocessing
import os
import signal
import sys
import threading
import time
import traceback

FLUSH = 0.5  # seconds that finished rows wait, at most


def main() -> None:
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what vLLM prints goes to the log instead of among the messages

    def say(message: object) -> None:
        out.write(json.dumps(message) + "\n")
        out.flush()

    started: list = []  # vLLM's own processes
    threading.Thread(target=_watch, args=(os.getppid(), started, say), daemon=True).start()
    try:
        serve(say, started)
    except Exception as error:
        traceback.print_exc()
        say({"error": "".join(traceback.format_exception_only(error)).strip()})
    finally:
        _end()


def _watch(parent: int, started: list, say) -> None:
    """End everything once the parent or one of vLLM's processes is gone; vLLM would wait forever.

    PR_SET_PDEATHSIG will not do: it fires when the parent's *thread* that started this process ends.
    """
    while os.getppid() == parent and all(process.is_alive() for process in started):
        time.sleep(1.0)
    if os.getppid() == parent:
        say({"error": "vLLM's engine process has crashed, or was killed for its memory"})
    _end()


def _end() -> None:
    """Kill the whole group: in an orderly exit, vLLM's threads and processes would keep the GPU's memory."""
    os.killpg(os.getpgrp(), signal.SIGKILL)  # engines/vllm.py gave this process its own group


def serve(say, started: list) -> None:
    """Load the model, and answer calls until standard input is closed.

    Appends the processes that vLLM starts to `started`.
    """
    from vllm import EngineArgs, LLMEngine
    from vllm.platforms import current_platform
    from vllm.usage.usage_lib import UsageContext

    arguments = json.loads(sys.stdin.readline())
    if current_platform.is_cpu():
        # On a CPU, seeded rows do not work with chunked prefill: after part of a prompt vLLM draws a
        # token for nothing, and a CPU's random generator cannot be set back by one draw.
        arguments |= {"enforce_eager": True, "enable_chunked_prefill": False}
    # As `vllm.LLM` does: without this vLLM runs 128 rows at a time, with it up to 1,024 (on an H100).
    offline = UsageContext.LLM_CLASS
    engine = LLMEngine.from_engine_args(EngineArgs(**arguments), usage_context=offline)
    started += multiprocessing.active_children()
    config = engine.vllm_config.model_config
    brought = config.try_get_generation_config().get("eos_token_id")
    stops = config.hf_config.eos_token_id if brought is None else brought
    ready = {
        "max_context": config.max_model_len,
        "stops": stops if isinstance(stops, list) else [stops],
        "arguments": arguments,
    }
    say({"ready": ready})
    numbers: dict[str, int] = {}  # vLLM identifies adapters by number
    for line in sys.stdin:
        answer(engine, json.loads(line), numbers, say)


def answer(engine, call: dict, numbers: dict[str, int], say) -> None:
    """Answer one call: hand all its rows to vLLM, and send the replies as they finish."""
    from vllm import SamplingParams
    from vllm.lora.request import LoRARequest
    from vllm.sampling_params import RequestOutputKind

    lora = None
    if call["adapter"]:
        name = call["adapter"]["name"]
        number = numbers.setdefault(name, len(numbers) + 1)
        lora = LoRARequest(name, number, call["adapter"]["path"])
    asked = call["sampling"].get("logprob_token_ids")
    for row, ids, seed in call["rows"]:
        params = SamplingParams(
            **call["sampling"],
            seed=seed,
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        prompt = {"type": "token", "prompt_token_ids": ids}  # what the engine takes as is
        engine.add_request(str(row), prompt, params, lora_request=lora)
    batch, last = [], time.monotonic()
    while engine.has_unfinished_requests():
        for output in engine.step():
            if not output.finished:
                continue
            reply = output.outputs[0]
            if asked:
                made = [reply.logprobs[0][token].logprob for token in asked]
            else:
                made = [list(reply.token_ids), reply.finish_reason == "stop"]
            batch.append([int(output.request_id), made])
        if batch and time.monotonic() - last > FLUSH:
            say(batch)
            batch, last = [], time.monotonic()
    say(batch)
    say(None)


if __name__ == "__main__":
    main()
