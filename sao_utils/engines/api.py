"""The API engine: asks a server that speaks OpenAI's chat completions, near or far.

What differs from an engine that has the weights: the server puts the chat into the model's template
(and must itself take care of special tokens in it), and its seeds are a wish. A verdict is forced
only by a vLLM server, which goes on after a given beginning of the reply. Any other server writes a
few tokens freely, at temperature 0, and the verdict's log-probabilities are read where it names its
choice, from the alternatives that the server reports there; a reply without the beginning counts as
an invalid verdict.

Servers tell a row that they will not answer from a wrong setting by words only, each its own. So
after a refusal the same is asked again with harmless words: when that is answered, it was the row.
"""

from __future__ import annotations

import math
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import suppress
from email.utils import parsedate_to_datetime
from pathlib import Path
from urllib.parse import urlsplit

from sao_utils.engines.base import Chat, Completion, EngineError, Sampling
from sao_utils.engines.reasoning import CLOSE, OPEN, parted
from sao_utils.engines.verdicts import read_verdict
from sao_utils.engines.vllm import NEUTRAL
from sao_utils.recipe import Model

OPENAI = "api.openai.com"
LOCAL = ("localhost", "127.0.0.1", "::1")
ALTERNATIVES = 20  # the most that such servers report
VERDICT_TOKENS = 16  # "ranking: 1 > 2" is six to ten
RETRIES = 5  # of the client, after 0.5 s, 1 s, ... or what the server asks for, up to two minutes
PAUSE = 10.0  # seconds, at least, before the client tries again so often
PATIENCE = 900.0  # seconds to wait altogether while the server limits the rate
TOO_LARGE = 413  # said by what stands before a server, whatever its context is
# What servers say when prompt and reply do not fit, in the body of a 400 or 422.
TOO_MUCH = ("context", "too long", "too large", "too big", "max_tokens", "max_new_tokens")
HARMLESS = "Hi"


class ApiEngine:
    """Asks an OpenAI-compatible server, `model.concurrency` requests at a time.

    The key comes from the environment variable `model.key_variable`. Without that name no key is sent,
    so that none goes to a stranger; OpenAI's own server gets OPENAI_API_KEY. It stays inside of the
    client: no row, message or manifest has it.
    """

    tokenizer = None  # the server's business

    def __init__(self, model: Model, adapter: Path | None, name: str):
        if adapter is not None:
            raise EngineError(
                "A server cannot be handed an adapter. Serve the tuned model, and give its name as "
                "model.path; or take model.engine=transformers or vllm."
            )
        try:
            import openai
        except ModuleNotFoundError:
            raise EngineError("model.engine=api needs: pip install -e '.[api]'") from None
        host = urlsplit(model.url).hostname
        self._variable = model.key_variable or ("OPENAI_API_KEY" if host == OPENAI else None)
        key = os.environ.get(self._variable) if self._variable else None
        if self._variable and not key and host not in LOCAL:
            raise EngineError(
                f"{model.url} wants a key: set the environment variable {self._variable} (another "
                "name: model.key_variable). Never write a key into a recipe or a notebook."
            )
        self.model, self.name = model, name
        self._client = openai.OpenAI(api_key=key or "none", base_url=model.url, max_retries=RETRIES)
        self._limit = "max_tokens"
        self._reported_at = -math.inf
        #: row of the latest call -> tokens read and written, where the server says them
        self.usage: dict[int, tuple[int, int]] = {}
        self._forces = self._goes_on_after_a_beginning()

    def generate(self, chats: list[Chat], sampling: Sampling, seeds: list[int]):
        def complete(i: int) -> Completion:
            if chats[i][-1].get("open"):
                raise EngineError(
                    "prompts.source=pre_query needs the weights: a server writes no user's turn. Set "
                    "model.engine to transformers or vllm, or take another source."
                )
            answer = self._ask(
                chats[i],
                sampling.max_new_tokens,
                temperature=sampling.temperature,
                top_p=sampling.top_p,
                presence_penalty=0.0,
                frequency_penalty=0.0,
                seed=seeds[i] % 2**31,
                extra_body=self._extra(),
            )
            self._note(i, answer)
            return _completion(answer) if answer else Completion("", 0, False)

        return self._each(complete, len(chats))

    def choose(self, chats: list[Chat], prefix: str, choices: tuple[str, ...]):
        def verdict(i: int) -> list[float]:
            chat, extra = chats[i], {}
            if self._forces and prefix:  # nothing to go on after: the turn would end at once
                chat = [*chat, {"role": "assistant", "content": prefix}]
                extra = {"add_generation_prompt": False, "continue_final_message": True}
            extra = self._extra() | extra
            answer = self._ask(
                chat,
                VERDICT_TOKENS,
                temperature=0.0,
                logprobs=True,
                top_logprobs=ALTERNATIVES,
                extra_body=extra,
            )
            self._note(i, answer)
            if answer is None:
                return [-math.inf] * len(choices)
            reply = answer.choices[0]
            steps = reply.logprobs.content if reply.logprobs else None
            if not steps and not reply.message.content:  # it says nothing, so it names no choice
                return [-math.inf] * len(choices)
            if not steps or steps[0].top_logprobs is None:
                raise EngineError(_WITHOUT_LOGPROBS.format(self.model.url))
            tokens = [
                (step.token, {a.token: a.logprob for a in step.top_logprobs}) for step in steps
            ]
            return read_verdict(tokens, "" if self._forces else prefix, choices)

        return self._each(verdict, len(chats))

    def _extra(self) -> dict:
        """What OpenAI's interface has no name for.

        A vLLM server fills in a model's own defaults for settings that a request leaves out, so all are
        named; other servers might refuse names that they do not know.
        """
        extra = {}
        if self._forces:
            names = ("top_k", "min_p", "repetition_penalty")
            extra = {name: NEUTRAL[name] for name in names}
        if self.model.template_options:
            extra["chat_template_kwargs"] = self.model.template_options
        return extra

    def _goes_on_after_a_beginning(self) -> bool:
        """Whether this is a vLLM server; also finds a wrong address or key before any work."""
        import openai

        try:
            served = self._client.with_options(max_retries=1).models.list()
            listed = getattr(served, "data", None) or []
            return any(getattr(m, "owned_by", None) == "vllm" for m in listed)
        except (openai.APIConnectionError, openai.AuthenticationError) as error:
            raise self._stop(error) from None
        except openai.APIError:  # not every server lists its models
            return False

    def _each(self, work: Callable[[int], object], count: int) -> Iterator[list[tuple]]:
        """`work` on each row, some at a time; yields each as it finishes.

        When one fails for good, those under way are still yielded before the fault is raised.
        """
        fault = None
        self.usage, self._refused, self._shortened = {}, [], []
        self._over = threading.Event()  # wakes those who wait for a rate limit
        with ThreadPoolExecutor(self.model.concurrency) as pool:
            rows = {pool.submit(work, i): i for i in range(count)}
            try:
                for done in as_completed(rows):
                    if done.cancelled():
                        continue
                    if done.exception() is None:
                        yield [(rows[done], done.result())]
                        continue
                    fault = fault or done.exception()
                    self._over.set()
                    for row in rows:
                        row.cancel()
            finally:
                self._over.set()
                for row in rows:
                    row.cancel()
                self._report(count)
        if fault:
            raise fault

    def _note(self, row: int, answer) -> None:
        """What the server says that a row took; a refused row took nothing."""
        if answer is None:
            self.usage[row] = (0, 0)
        elif used := _used(answer):
            self.usage[row] = used

    def _report(self, count: int) -> None:
        """How many rows of a call the server did not answer, or not in full length."""
        if self._refused:
            print(
                f"{self.model.url} refused {len(self._refused)} of {count} rows; they get no reply and "
                f"count as discarded. It said last: {self._refused[-1]}\nIf it takes longer rows by "
                "now, another model.max_context asks them again.",
                flush=True,
            )
        if self._shortened:
            print(
                f"{self.model.url}: {len(self._shortened)} of {count} replies got fewer tokens than asked "
                "for, as many as the server has room for. Lower max_new_tokens of the stage, or serve "
                "the model with a longer context.",
                flush=True,
            )

    def _ask(self, chat: Chat, tokens: int, **options):
        """One chat completion; None when the server refuses this row.

        The harmless question that shows this costs a few tokens, which are not counted.
        """
        answer, refusal, limited = self._answer(chat, tokens, **options)
        if refusal:
            harmless = [{**message, "content": HARMLESS} for message in chat]
            if self._answer(harmless, tokens, **options)[1]:
                raise self._stop(refusal) from None
            self._refused.append(self._without_key(refusal)[:300])
        elif not limited:
            self._shortened.append(tokens)
        return answer

    def _answer(self, chat: Chat, tokens: int, **options):
        """A chat completion, or the error when the server finds fault with the request.

        One that does not fit is asked once more without a limit to the reply: the room that is left
        is then the limit, and smaller.

        Returns:
            (completion | None, error | None, whether the reply was limited to `tokens`).
        """
        import openai

        started, limited = time.monotonic(), True
        while True:
            limit = self._limit
            try:
                answer = self._client.chat.completions.create(
                    model=self.model.path,
                    messages=chat,
                    **({limit: tokens} if limited else {}),
                    **options,
                )
                choices = getattr(answer, "choices", None)
                if not choices or not choices[0].message:
                    raise self._stop(ValueError(f"there is no reply in its answer: {answer}"))
                return answer, None, limited
            except openai.RateLimitError as error:  # the client has waited and tried already
                if error.code == "insufficient_quota":
                    raise self._stop(error) from None
                self._wait(error, time.monotonic() - started)
            except (openai.BadRequestError, openai.UnprocessableEntityError) as error:
                text = str(error).lower()
                if "max_completion_tokens" in text and "support" in text and limit == "max_tokens":
                    self._limit = "max_completion_tokens"  # newer models know the limit as this
                elif "logprobs" in options and "logprobs" in text:
                    raise EngineError(_WITHOUT_LOGPROBS.format(self.model.url)) from None
                elif limited and any(words in text for words in TOO_MUCH):
                    limited = False
                else:
                    return None, error, limited
            except openai.OpenAIError as error:
                if getattr(error, "status_code", None) == TOO_LARGE:
                    return None, error, limited
                raise self._stop(error) from None

    def _wait(self, error, waited: float) -> None:
        """As long as the server asks for; the client does so by itself for up to two minutes only."""
        pause = max(PAUSE, asked_to_wait(error.response.headers))
        if waited + pause > PATIENCE:
            raise self._stop(error) from None
        if time.monotonic() - self._reported_at > 60:
            self._reported_at = time.monotonic()
            print(
                f"{self.model.url} limits the rate; waiting ({waited:.0f} s for a row so far). "
                "A smaller model.concurrency may help.",
                flush=True,
            )
        if self._over.wait(pause):
            raise self._stop(error) from None

    def _stop(self, error: Exception) -> EngineError:
        """A fault that ends the call, in words that tell what to do and no key."""
        import openai

        if isinstance(error, (openai.AuthenticationError, openai.PermissionDeniedError)):
            advice = "Set model.key_variable to the name of the environment variable with its key."
            if self._variable:
                advice = f"Check the key in the environment variable {self._variable}."
        elif isinstance(error, openai.NotFoundError):
            advice = f"Check the model's name, '{self.model.path}', and the url."
        elif isinstance(error, openai.RateLimitError):
            advice = "The server's rate or quota is used up; run again later to go on."
        elif isinstance(error, openai.APIConnectionError):
            advice = "Is the server running, and is the url right (most end in /v1)?"
        elif isinstance(error, (openai.BadRequestError, openai.UnprocessableEntityError)):
            advice = (
                "It refuses a harmless question, too: change the setting that it names, and run again "
                "to go on."
            )
        else:
            advice = "The rows made so far are kept; run again to go on."
        return EngineError(f"{self.model.url}: {self._without_key(error)[:500]}\n{advice}")

    def _without_key(self, error: Exception) -> str:
        key = os.environ.get(self._variable or "")  # a server may repeat it
        return str(error).replace(key, "***") if key else str(error)


_WITHOUT_LOGPROBS = (
    "{} gives no log-probabilities. Set judging.method=sampled, which needs none; AlpacaEval always "
    "does, so leave it out of evaluation.benchmarks or take another judge."
)


def asked_to_wait(headers: Mapping[str, str]) -> float:
    """Seconds that a server asks to wait before the next request (RFC 9110, 10.2.3); 0 if it does not.

    `retry-after` is a number of seconds or a date; some servers send `retry-after-ms`.
    """
    asked = headers.get("retry-after", "")
    for value, unit in ((headers.get("retry-after-ms", ""), 1000), (asked, 1)):
        with suppress(ValueError):
            seconds = float(value) / unit
            return max(0.0, seconds) if math.isfinite(seconds) else 0.0
    with suppress(TypeError, ValueError):
        return max(0.0, parsedate_to_datetime(asked).timestamp() - time.time())
    return 0.0


def _used(answer) -> tuple[int, int] | None:
    """Tokens read and written, if the server says both."""
    told = [getattr(answer.usage, f"{kind}_tokens", None) for kind in ("prompt", "completion")]
    return tuple(told) if all(isinstance(count, int) for count in told) else None


def _completion(answer) -> Completion:
    choice = answer.choices[0]
    # A server that cuts inside of a character may send half of one, which no file takes.
    halves = (choice.message.content or "").encode("utf-16", "surrogatepass")
    text = halves.decode("utf-16", "replace").strip()
    if choice.finish_reason == "content_filter":
        return Completion("", 0, False)
    used = _used(answer)
    tokens, finished = used[1] if used else len(text.split()), choice.finish_reason == "stop"
    # Servers that part reasoning themselves name it so (vLLM, DeepSeek, OpenRouter).
    thought = getattr(choice.message, "reasoning_content", None)
    thought = thought or getattr(choice.message, "reasoning", None)
    if isinstance(thought, str) and thought.strip():
        text = f"{OPEN}{thought}{CLOSE}{text}"
    return parted(text, tokens, finished)
