"""The prompts that the model sees, kept as data in `prompts/*.jinja`, and how its replies are parsed.

Text that a model wrote is data: `render` never interprets it, and the markers that set it apart from the
prompt's own words (around the two responses to rank, or the prompt to label) are escaped inside it.
"""

from __future__ import annotations

import hashlib
import re
from functools import cache
from importlib.resources import files

import jinja2

#: The judge's reply is forced to begin with this; the verdicts are what may follow (ranking.jinja).
VERDICT_PREFIX = "ranking:"
VERDICTS = (" 1 > 2", " 2 > 1")

# The number of blanks is bounded: without a bound, a text of many blanks takes quadratic time.
_UNSEEN = "\u00ad\u200b-\u200f\u2060-\u2064\ufeff"  # soft hyphen, zero-width spaces, and the like
_BLANKS = rf"[\s{_UNSEEN}]{{0,9}}"


def _marker(word: str, after: str = "") -> re.Pattern:
    """The `<` before `word` or `/word`: ASCII, full-width or small form."""
    letters = rf"[{_UNSEEN}]{{0,9}}".join(f"[{c}{chr(ord(c) + 0xFEE0)}]" for c in word)
    start = rf"[<\uff1c\ufe64](?={_BLANKS}[/\uff0f]{{0,9}}{_BLANKS}"
    return re.compile(rf"{start}{letters}{after})", re.IGNORECASE)


_MARKER = _marker("response", rf"[\s_{_UNSEEN}]{{0,9}}[\d>\uff1e\ufe65]")
_PROMPT_MARKER = _marker("prompt")
_RANKING = re.compile(r"ranking[\s*]{0,9}:[\s*]{0,9}(\d(?:\s{0,9}>\s{0,9}\d+)+)", re.IGNORECASE)
_SCORE = re.compile(r"score[\s*]{0,9}:[\s*]{0,9}(\d+)(?!\.?\d)", re.IGNORECASE)
_QUESTION = re.compile(r"<question>(.*?)</question>", re.DOTALL)
# A label is a few plain words: no markup, and no more than a table can show.
_LABEL = re.compile(
    r"^[\s*]{0,9}(topic|intention)[\s*]{0,9}:(.{0,99})$", re.IGNORECASE | re.MULTILINE
)
_PLAIN = re.compile(r"\w[\w &/+#.,'-]{0,39}")
_USER_PROMPT = re.compile(r"([\"'*]{0,3})user prompt([\s*]{0,9}:\*{0,2})\s*", re.IGNORECASE)


@cache
def _template(name: str) -> jinja2.Template:
    environment = jinja2.Environment(undefined=jinja2.StrictUndefined, autoescape=False)
    return environment.from_string(source(name))


def source(name: str) -> str:
    """The text of a prompt template ("persona", "no_persona", "ranking") as it is kept."""
    return (files("sao_utils") / "prompts" / f"{name}.jinja").read_text(encoding="utf-8")


def fingerprint(name: str) -> str:
    """A short hash of a template; part of the ids of rows written with it (verdicts hash the prompt)."""
    return hashlib.sha256(source(name).encode()).hexdigest()[:12]


def render(name: str, **values: str) -> str:
    """Fill a template. Raises `jinja2.UndefinedError` when a value is missing."""
    return _template(name).render(**values)


def fill(template: str, **values: str) -> str:
    """Put texts in place of each {name} in a third-party template; other braces stay as they are.

    This takes one pass, so that braces inside a text that a model wrote stay text.
    """
    names = "|".join(values)
    return re.sub(rf"\{{({names})\}}", lambda place: values[place[1]], template)


def escape(text: str) -> str:
    """Make the judge's markers (`<Response 1>`, `</response>`, ...) in a text harmless.

    The angle bracket becomes a round one, so that an answer cannot close its own section of the
    judge's prompt and open another; the words stay readable.
    """
    return _MARKER.sub("(", text)


def ranking_prompt(prompt: str, response_1: str, response_2: str) -> str:
    """The paper's ranking prompt for one order of two responses."""
    texts = {"prompt": prompt, "response_1": response_1, "response_2": response_2}
    return render("ranking", **{name: escape(text) for name, text in texts.items()})


def points_prompt(template: str, prompt: str, response: str) -> str:
    """A prompt that asks for 0 to 5 points for a response: "points" (Self-Rewarding's) or "points_short"."""
    return render(template, prompt=escape(prompt), response=escape(response))


def parse_points(text: str) -> int | None:
    """The points in a reply to `points_prompt`, 0 to 5; None without a score, or with two different ones."""
    found = {int(points) for points in _SCORE.findall(text)}
    points = found.pop() if len(found) == 1 else None
    return points if points in range(6) else None


def topics_prompt(prompt: str) -> str:
    """The prompt that asks a judge for the topic and the intention of another prompt."""
    return render("topics", prompt=_PROMPT_MARKER.sub("(", prompt))


def parse_ranking(text: str) -> int | None:
    """Which response a free-form verdict puts first: 1, 2, or None when it is malformed.

    Only a reply that names both responses once ("ranking: 2 > 1") counts, and two
    contradicting rankings in one reply count as malformed.
    """
    found = {re.sub(r"\s", "", order) for order in _RANKING.findall(text)}
    return {"1>2": 1, "2>1": 2}.get(found.pop()) if len(found) == 1 else None


def parse_user_prompt(text: str) -> str | None:
    """The prompt in a reply to the persona template; None when it does not start as instructed.

    Quotes and asterisks that open before it and close after it are not part of it.
    """
    match = _USER_PROMPT.match(text.strip())
    if not match:
        return None
    opened, label = match.groups()
    if "*" in opened and "*" in label:  # **User prompt:** closes what it opens
        opened = opened.replace("*", "")
    else:
        opened += "*" * label.count("*")
    prompt = text.strip()[match.end() :].strip().removesuffix(opened[::-1]).strip()
    return prompt or None


def parse_question(text: str) -> str | None:
    """The question in a reply to SynPO's generator template; None if no <question> tag is closed."""
    found = _QUESTION.search(text)
    return found and found[1].strip() or None


def parse_topics(text: str) -> tuple[str, str] | None:
    """The topic and the intention in a reply, in lower case; None when it is malformed.

    Each must be named once, by at most 40 characters of plain text.
    """
    found = _LABEL.findall(text)
    labels = {
        what.lower(): " ".join(label.strip("\"'*. \t").lower().split()) for what, label in found
    }
    if len(found) != 2 or len(labels) != 2 or not all(map(_PLAIN.fullmatch, labels.values())):
        return None
    return labels["topic"], labels["intention"]
