"""Reads a verdict from the tokens that a server reports, with their likeliest alternatives."""

from __future__ import annotations

import math
import re

SURE = 1e-6  # least probability assumed to be left for a choice that is not reported (ours)


def read_verdict(
    tokens: list[tuple[str, dict[str, float]]], prefix: str, choices: tuple[str, ...]
) -> list[float]:
    """Log-probability of each choice, at the token of a reply where the choices differ.

    Args:
        tokens: the reply's tokens, each with the server's alternatives and their log-probabilities.
        prefix: what the verdict in the reply must begin with; case is ignored, and blanks and asterisks
            may follow.
        choices: as in `Engine.choose`; they differ in their first non-blank character. A token counts
            for the choice that begins with it, ignoring blanks and asterisks.

    Returns:
        Nats, one per choice. A choice that is not among the alternatives gets an upper bound: the
        smaller of the least likely alternative's probability and the probability left over by all of
        them (at least SURE). This understates the margin, and no verdict is invalid for being too
        certain. If that bound is not below the best reported choice, it gets minus infinity instead. If
        every choice is a single letter, an unreported one gets minus infinity at once, as in
        alpaca_eval (`logprob_parser`). All get minus infinity if the reply contains no verdict.
    """
    said = ""
    for token, alternatives in tokens:
        begun = said.lower().rstrip(" *").endswith(prefix.lower())
        if begun and _bare(token):
            odds = [
                sum(math.exp(p) for other, p in alternatives.items() if _begins(other, choice))
                for choice in choices
            ]  # also 0 where a server reports -9999
            found = [math.log(p) if p else -math.inf for p in odds]
            if max(found) == -math.inf or all(len(_bare(choice)) == 1 for choice in choices):
                return found
            rest = 1 - sum(map(math.exp, alternatives.values()))
            known = [p for p in alternatives.values() if math.exp(p)]  # without -9999
            most = min(*known, math.log(max(rest, SURE)))
            most = most if most < max(found) else -math.inf
            return [most if p == -math.inf else p for p in found]
        said += token
    return [-math.inf] * len(choices)


def _bare(text: str) -> str:
    """The text without blanks and asterisks."""
    return re.sub(r"[\s*]", "", text)


def _begins(token: str, choice: str) -> bool:
    return bool(_bare(token)) and _bare(choice).startswith(_bare(token))
