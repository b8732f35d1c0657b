"""vLLM without the kit, for `engine_benchmarks`, which starts it by the path of this file.

One call of `vllm.LLM`, as vLLM's own manual has it, as often as it is asked for. It needs vLLM and
nothing of the kit. One line of JSON is one message. Into standard input come the arguments of
`vllm.LLM`, then {"sampling": {...}, "seeds": [...], "prompts": [token ids], "chats": [messages]}, then
any number of "generate" (ids to ids), "chat" (chats to texts) and "replies". To standard output go
{"version": ...}; for each call its seconds; and for "replies" what the last call said, texts or
lists of [token ids, ended by itself].
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
    chat, done = False, []
    for line in lines:
        if line == "replies":
            replies = [request.outputs[0] for request in done]
            if chat:
                say([reply.text for reply in replies])
            else:
                say([[list(reply.token_ids), reply.finish_reason == "stop"] for reply in replies])
            continue
        chat, started = line == "chat", time.perf_counter()
        same = {**work["sampling"], "detokenize": chat, "output_kind": final}
        params = [vllm.SamplingParams(**same, seed=seed) for seed in work["seeds"]]
        if chat:
            done = llm.chat(work["chats"], params, use_tqdm=False)
        else:
            done = llm.generate(prompts, params, use_tqdm=False)
        say(time.perf_counter() - started)


if __name__ == "__main__":
    main()
