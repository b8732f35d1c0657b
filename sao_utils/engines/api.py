"""The API engine: asks a local or remote server that offers OpenAI's chat completions.

Unlike an engine that has the weights, the server itself applies the model's chat template (and must
deal with special tokens in the chat), and it may ignore seeds. Only a vLLM server can be forced to
give a verdict, since it continues a given beginning of the reply. Any other server writes a few
tokens freely at temperature 0; the verdict's log-probabilities are then read from the alternatives
that it reports at the token where it names its choice. A reply without the expected beginning counts
as an invalid verdict.

A refused row and a wrong setting differ only in the error's text, which each server words
differently. So after a refusal the request is repeated with harmless content: if that is answered,
the row was at fault.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from urllib.parse import urlsplit

from sao_utils.engines.base import NOTHING, Chat, Completion, EngineError, Sampling
from sao_utils.engines.reasoning import CLOSE, OPEN, parted
from sao_utils.engines.verdicts import read_verdict
from sao_utils.engines.vllm import NEUTRAL
from sao_utils.recipe import Model

OPENAI = "api.openai.com"
ALTERNATIVES = 20  # per token; the most that such servers report
VERDICT_TOKENS = 16  # "ranking: 1 > 2" takes six to ten
RETRIES = 10  # by the client, after the delay the server asks for, else 0.5 to 8 s: a minute in all
REFUSALS = (400, 413, 422)  # HTTP statuses for a bad request, or one too long or disallowed
HARMLESS = "Hi"
KEY = "Check the key in the environment variable that model.key_variable names."
SETTING = "The server refuses even a harmless question: change the setting that it names."
ADVICE = {
    400: SETTING,
    401: KEY,
    403: KEY,
    404: "Check model.path, the model's name there, and model.url.",
    422: SETTING,
    429: "The server's rate or quota is used up; a smaller model.concurrency may help.",
    "APIConnectionError": "Is the server running, and is model.url right (most end in /v1)?",
}


class ApiEngine:
    """Asks an OpenAI-compatible server, `model.concurrency` requests at a time.

    The key comes from the environment variable that `model.key_variable` names; if the recipe names none,
    no key is sent. The key stays in the client object: no row, message or manifest contains it.
    """

    tokenizer = None  # the server tokenises

    def __init__(self, model: Model, adapter: None = None):
        try:
            import openai
        except ModuleNotFoundError:
            raise EngineError("model.engine=api needs: pip install -e '.[api]'") from None
        key = os.environ.get(model.key_variable) if model.key_variable else "no key is sent"
        if not key:
            raise EngineError(
                f"{model.url} needs a key: set the environment variable {model.key_variable} (or name "
                "another one in model.key_variable). Never write a key into a recipe or a notebook."
            )
        self.model = model
        self._client = openai.OpenAI(api_key=key, base_url=model.url, max_retries=RETRIES)
        at_openai = urlsplit(model.url).hostname == OPENAI
        self._limit = "max_completion_tokens" if at_openai else "max_tokens"
        #: row of the latest call -> tokens read and written, where the server reports them
        self.usage: dict[int, tuple[int, int]] = {}
        self._forces = self._is_vllm()

    def generate(self, chats: list[Chat], sampling: Sampling, seeds: list[int]):
        if chats and chats[0][-1].get("open"):
            raise EngineError(
                "prompts.source=pre_query needs the weights: a server cannot write the user's turn. Set "
                "model.engine to transformers or vllm, or take another prompts.source."
            )

        def reply(i: int) -> Completion:
            answer = self._ask(
                chats[i],
                i,
                sampling.max_new_tokens,
                temperature=sampling.temperature,
                top_p=sampling.top_p,
                presence_penalty=0.0,
                frequency_penalty=0.0,
                seed=seeds[i] % 2**31,
                extra_body=self._extra(),
            )
            return _completion(answer) if answer else NOTHING

        return self._each(reply, len(chats))

    def choose(self, chats: list[Chat], prefix: str, choices: tuple[str, ...]):
        nothing = [-math.inf] * len(choices)

        def verdict(i: int) -> list[float]:
            chat, extra = chats[i], self._extra()
            if self._forces and prefix:  # with an empty prefix the turn would end at once
                chat = [*chat, {"role": "assistant", "content": prefix}]
                extra |= {"add_generation_prompt": False, "continue_final_message": True}
            answer = self._ask(
                chat,
                i,
                VERDICT_TOKENS,
                temperature=0.0,
                logprobs=True,
                top_logprobs=ALTERNATIVES,
                extra_body=extra,
            )
            if answer is None:
                return nothing
            reply = answer.choices[0]
            steps = reply.logprobs.content if reply.logprobs else None
            if not steps and not reply.message.content:  # an empty reply names no choice
                return nothing
            if not steps or steps[0].top_logprobs is None:
                raise EngineError(
                    f"{self.model.url} gives no log-probabilities. Set judging.method=sampled, which "
                    "needs none; AlpacaEval always does, so leave it out of evaluation.benchmarks or "
                    "take another judge."
                )
            tokens = [
                (step.token, {a.token: a.logprob for a in step.top_logprobs}) for step in steps
            ]
            return read_verdict(tokens, "" if self._forces else prefix, choices)

        return self._each(verdict, len(chats))

    def _extra(self) -> dict:
        """Settings that OpenAI's interface does not have.

        A vLLM server fills in the model's own defaults for settings that a request leaves out, so all
        of them are sent; other servers might refuse names that they do not know.
        """
        names = ("top_k", "min_p", "repetition_penalty") if self._forces else ()
        extra = {name: NEUTRAL[name] for name in names}
        if self.model.template_options:
            extra["chat_template_kwargs"] = self.model.template_options
        return extra

    def _is_vllm(self) -> bool:
        """Whether this is a vLLM server; also detects a wrong address or key before any work is done."""
        import openai

        try:
            served = self._client.with_options(max_retries=1).models.list()
            return any(getattr(m, "owned_by", None) == "vllm" for m in served.data or [])
        except (openai.APIConnectionError, openai.AuthenticationError) as error:
            raise self._fault(error) from None
        except (openai.APIError, AttributeError):  # not every server lists its models
            return False

    def _each(self, work: Callable[[int], object], count: int) -> Iterator[list[tuple]]:
        """Call `work` for each row, several at a time; yield each result as it finishes.

        If one fails for good, those already under way are still yielded before the error is raised.
        """
        self.usage, self._refused, fault = {}, [], None
        with ThreadPoolExecutor(self.model.concurrency) as pool:
            rows = {pool.submit(work, i): i for i in range(count)}
            try:
                for done in as_completed(rows):
                    if done.cancelled():
                        continue
                    if not done.exception():
                        yield [(rows[done], done.result())]
                        continue
                    fault = fault or done.exception()
                    for row in rows:
                        row.cancel()
            finally:
                for row in rows:
                    row.cancel()
        if self._refused:
            print(
                f"{self.model.url} refused {len(self._refused)} of {count} rows; they get no reply and "
                f"count as discarded. Its last answer: {self._refused[-1]}\nIf it takes longer rows by "
                "now, change model.max_context, and they are asked again.",
                flush=True,
            )
        if fault:
            raise fault

    def _ask(self, chat: Chat, row: int, tokens: int, **options):
        """One chat completion, with its tokens noted in `usage`; None if the server refuses this row.

        The harmless request that tells a refused row from a wrong setting costs a few tokens, which are
        not counted.
        """
        import openai

        options |= {"model": self.model.path, self._limit: tokens}
        create = self._client.chat.completions.create
        try:
            answer = create(messages=chat, **options)
        except openai.OpenAIError as error:
            if getattr(error, "status_code", None) not in REFUSALS:
                raise self._fault(error) from None
            try:
                create(messages=[{**turn, "content": HARMLESS} for turn in chat], **options)
            except openai.OpenAIError:
                raise self._fault(error) from None
            self._refused.append(self._without_key(error)[:300])
            self.usage[row] = (0, 0)
            return None
        choices = getattr(answer, "choices", None)
        if not choices or not choices[0].message:  # an error sent as if it were an answer
            raise self._fault(f"there is no reply in its answer: {answer}")
        if used := _used(answer):
            self.usage[row] = used
        return answer

    def _fault(self, error: Exception | str) -> EngineError:
        """An error that ends the call; its message says what to do and does not contain the key."""
        kind = getattr(error, "status_code", type(error).__name__)
        advice = ADVICE.get(kind, "The server has a fault of its own.")
        return EngineError(
            f"{self.model.url}: {self._without_key(error)[:500]}\n{advice} The rows made so far are "
            "kept; run again to go on."
        )

    def _without_key(self, error: Exception | str) -> str:
        return str(error).replace(self._client.api_key, "***")  # a server may echo the key


def _used(answer) -> tuple[int, int] | None:
    """Tokens read and written, if the server reports both."""
    counts = [getattr(answer.usage, f"{kind}_tokens", None) for kind in ("prompt", "completion")]
    return tuple(counts) if all(isinstance(count, int) for count in counts) else None


def _completion(answer) -> Completion:
    choice = answer.choices[0]
    if choice.finish_reason == "content_filter":
        return NOTHING
    # A server that cuts a reply within a character may send half of it, which cannot be written to a file.
    text = (choice.message.content or "").encode(errors="replace").decode().strip()
    used = _used(answer)
    tokens = used[1] if used else len(text.split())
    # Servers that split off the reasoning themselves use these names (vLLM, DeepSeek, OpenRouter).
    thought = getattr(choice.message, "reasoning_content", None)
    thought = thought or getattr(choice.message, "reasoning", None)
    if isinstance(thought, str) and thought.strip():
        text = f"{OPEN}{thought}{CLOSE}{text}"
    return parted(text, tokens, choice.finish_reason == "stop")
