"""Several raters and several models.

`kappa`: how far two raters (judges, or two ways to ask one judge) agree beyond chance.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import numpy as np

from sao_utils.intervals import (
    Interval,
    cluster_codes,
    resampled_sums,
    tail_of,
    wilson,
    without_single_cluster,
)


def kappa(
    a: Sequence[Hashable],
    b: Sequence[Hashable],
    clusters: Sequence | None = None,
    resamples: int = 10_000,
    seed: int = 0,
) -> Interval:
    r"""Cohen's kappa of two raters with nominal labels, with a bootstrap over clusters.

    kappa = (p_o - p_e) / (1 - p_e): p_o the share of items with the same label, p_e the share that
    two raters with these label frequencies would share by chance (Cohen, 1960, "A coefficient of
    agreement for nominal scales", Educational and Psychological Measurement 20).

    Args:
        a, b: [n] the label that each rater gave to item i (1, 2, "tie", ...): drop and count the
            items that one of them did not label before the call.
        clusters: [n] the cluster of each item; None: items are independent.
        resamples: how many resamples.
        seed: the same seed, labels and clusters give the same interval.

    Returns:
        Kappa, in -1..1, and its interval. Where both raters give one and the same label to all
        items kappa is 0 / 0: the value is NaN and the interval all of -1..1. Where they always
        agree on several labels there is nothing to resample: the lower bound is kappa at the lower
        bound of Wilson's interval for p_o, with each cluster as one trial. Resamples in which
        kappa is 0 / 0 are left out. One item alone says nothing: the interval is all of -1..1.

    Raises:
        ValueError: no items, missing labels, or lengths that differ.
    """
    if len(a) != len(b):
        raise ValueError(f"kappa needs as many labels of a ({len(a)}) as of b ({len(b)})")
    n = len(a)
    if not n:
        raise ValueError("there are no labels: kappa needs at least one item that both rated")
    # NaN is the one label that does not equal itself.
    missing = sum(label is None or label != label for pair in zip(a, b) for label in pair)
    if missing:
        raise ValueError(
            f"{missing} of {2 * n} labels are missing: drop their items first, and count them"
        )
    number = {label: i for i, label in enumerate(dict.fromkeys([*a, *b]))}
    first, second = (np.eye(len(number))[[number[label] for label in of]] for of in (a, b))
    codes = np.arange(n) if clusters is None else cluster_codes(clusters, n, "labels")
    if len(number) == 1:
        return Interval(float("nan"), -1.0, 1.0, n)
    trials = int(codes.max()) + 1
    codes = without_single_cluster(codes) if n > 1 else codes
    same = (first * second).sum(1)
    items = np.column_stack([same, first, second])
    sums = np.zeros((codes.max() + 1, items.shape[1]))
    np.add.at(sums, codes, items)

    def of(totals: np.ndarray) -> np.ndarray:
        observed, by_a, by_b = np.split(totals, [1, 1 + len(number)], axis=-1)
        size = by_a.sum(-1)
        chance = (by_a * by_b).sum(-1) / size**2
        with np.errstate(invalid="ignore", divide="ignore"):
            return (observed[..., 0] / size - chance) / (1 - chance)

    value = float(of(sums.sum(0)))
    if n == 1:
        return Interval(value, -1.0, 1.0, 1)
    if same.all():
        chance = float((first.mean(0) * second.mean(0)).sum())
        low = (wilson(trials, trials).low - chance) / (1 - chance)
        return Interval(1.0, max(-1.0, low), 1.0, n)
    found = of(resampled_sums(sums, resamples, np.random.default_rng(seed)))
    tail = tail_of(codes)
    low, high = np.nanquantile(found, (tail, 1 - tail))
    return Interval(value, float(low), float(high), n)
