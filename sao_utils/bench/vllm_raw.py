"""`vllm.LLM.chat` without the kit, for `overhead`, which starts this file by its path.

It needs vLLM and nothing of the kit. The first line of standard input is a JSON object: "arguments" of
`vllm.LLM`, "sampling" (arguments of `SamplingParams`), "seeds" and "chats"; the answer is a line with
vLLM's version. Each further line asks for one call, and gets a line with the list of the replies' texts.
"""

import json
import os
import sys


def main() -> None:
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what vLLM prints is no reply
    import vllm

    work = json.loads(sys.stdin.readline())
    llm = vllm.LLM(**work["arguments"])
    print(json.dumps(vllm.__version__), file=out, flush=True)
    for _ in sys.stdin:
        params = [vllm.SamplingParams(**work["sampling"], seed=seed) for seed in work["seeds"]]
        done = llm.chat(work["chats"], params, use_tqdm=False)
        print(json.dumps([request.outputs[0].text for request in done]), file=out, flush=True)


if __name__ == "__main__":
    main()
