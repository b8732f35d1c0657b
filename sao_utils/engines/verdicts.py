"""Reading a verdict off the tokens that a server reports, with their likeliest alternatives."""

from __future__ import annotations

import math
import re

SURE = 1e-6  # probability that is left to a choice which no server reports, at least (ours)


def read_verdict(
    tokens: list[tuple[str, dict[str, float]]], prefix: str, choices: tuple[str, ...]
) -> list[float]:
    """Log-probability of each choice, at the place of a reply where the choices part.

    Args:
        tokens: the reply's tokens, each with the server's alternatives and their log-probabilities.
        prefix: what the reply has to begin its verdict with; case and blanks do not count.
        choices: as in `Engine.choose`; they part in their first character that is not blank. A token
            counts for the choice that it is the beginning of, blanks and stars apart.

    Returns:
        Nats, one a choice. A choice that is not among the alternatives gets what it has at most: as
        much as the least of them, and as they leave. So the margin is understated, and no verdict is
        invalid for being too sure; but minus infinity where that is no less than the others have. A
        choice of one letter gets minus infinity at once, as in alpaca_eval (`logprob_parser`). Minus
        infinity for all when the reply does not come to a verdict.
    """
    said = ""
    for token, alternatives in tokens:
        begun = said.lower().rstrip(" *").endswith(prefix.lower())
        if begun and _bare(token):
            odds = [
                sum(math.exp(p) for other, p in alternatives.items() if _begins(other, choice))
                for choice in choices
            ]  # 0 also where a server says -9999
            found = [math.log(p) if p else -math.inf for p in odds]
            if max(found) == -math.inf or all(len(_bare(choice)) == 1 for choice in choices):
                return found
            rest = 1 - sum(map(math.exp, alternatives.values()))
            known = [p for p in alternatives.values() if math.exp(p)]  # no -9999
            most = min(*known, math.log(max(rest, SURE)))
            most = most if most < max(found) else -math.inf
            return [most if p == -math.inf else p for p in found]
        said += token
    return [-math.inf] * len(choices)


def _bare(text: str) -> str:
    """Without blanks and stars."""
    return re.sub(r"[\s*]", "", text)


def _begins(token: str, choice: str) -> bool:
    return bool(_bare(token)) and _bare(choice).startswith(_bare(token))
