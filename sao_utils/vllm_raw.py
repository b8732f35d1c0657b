"""vLLM without the kit, for `engine_benchmarks`, which starts it by the path of this file.

One call of `vllm.LLM.generate`, as vLLM's own manual has it, as often as it is asked for. It needs
vLLM and nothing of the kit. One line of JSON is one message. Into standard input come the arguments
of `vllm.LLM`, then {"sampling": {...}, "prompts": [token ids], "seeds": [...]}, then any number of
lines "generate", and "replies". To standard output go {"version": ...}; for each "generate" the
seconds of the call; and for "replies" what the last call said, lists of [token ids, ended by itself].
"""

import json
import os
import sys
import time


def main() -> None:
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what vLLM prints is no message

    def say(message: object) -> None:
        out.write(json.dumps(message) + "\n")
        out.flush()

    lines = map(json.loads, sys.stdin)
    import vllm
    from vllm.sampling_params import RequestOutputKind

    llm = vllm.LLM(**next(lines))
    say({"version": vllm.__version__})
    work = next(lines)
    final = RequestOutputKind.FINAL_ONLY
    prompts = [{"prompt_token_ids": ids} for ids in work["prompts"]]
    done = []
    for line in lines:
        if line == "replies":
            replies = [request.outputs[0] for request in done]
            say([[list(reply.token_ids), reply.finish_reason == "stop"] for reply in replies])
            continue
        started = time.perf_counter()
        params = [
            vllm.SamplingParams(**work["sampling"], seed=s, detokenize=False, output_kind=final)
            for s in work["seeds"]
        ]
        done = llm.generate(prompts, params, use_tqdm=False)
        say(time.perf_counter() - started)


if __name__ == "__main__":
    main()
