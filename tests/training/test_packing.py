"""Plans of microbatches, and what is fed: nothing lost, nothing twice, nothing padded."""

from hypothesis import given
from hypothesis import strategies as st

from sao_utils.training.packing import cost, pack, pad, plan

ROWS = [
    {"prompt_ids": [5, 6, 7], "chosen_ids": [10, 11], "rejected_ids": [20, 21, 22]},
    {"prompt_ids": [8], "chosen_ids": [12, 13, 14], "rejected_ids": [23]},
]


@given(st.lists(st.integers(1, 50), min_size=1, max_size=40), st.integers(1, 12))
def test_every_pair_is_in_exactly_one_microbatch(costs, at_least):
    for padded in (False, True):
        bins = plan(costs, 60, at_least, padded)
        assert sorted(i for group in bins for i in group) == list(range(len(costs)))
        assert len(bins) >= min(at_least, len(costs)) and all(bins)


@given(st.lists(st.integers(1, 90), min_size=1, max_size=40))
def test_only_a_pair_that_is_too_long_itself_breaks_the_budget(costs):
    for group in plan(costs, 60):
        assert sum(costs[i] for i in group) <= 60 or len(group) == 1
    for group in plan(costs, 60, padded=True):
        assert 2 * len(group) * max(costs[i] for i in group) <= 60 or len(group) == 1


def read_back(made):
    """The answers that the rows of the head predict, by owner, and what each follows."""
    ids = made.inputs["input_ids"].flatten().tolist()
    answers = {}
    for row, target, owner in zip(*(x.tolist() for x in (made.rows, made.targets, made.owner))):
        answers.setdefault(owner, []).append((ids[row], target))
    return answers


def expected():
    wanted = {}
    for k, row in enumerate(ROWS):
        for side, key in enumerate(("chosen_ids", "rejected_ids")):
            before = [row["prompt_ids"][-1], *row[key][:-1]]
            wanted[2 * k + side] = list(zip(before, row[key]))
    return wanted


def test_each_answer_token_is_predicted_once_from_the_token_before_it():
    for made in (pack(ROWS, True), pack(ROWS, False), pad(ROWS)):
        assert read_back(made) == expected()
        assert made.pairs == 2 and len(made.rows) == 9


def test_what_is_fed_is_counted():
    assert pack(ROWS, False).fed == sum(cost(row, False) for row in ROWS) == 17
    assert pack(ROWS, True).fed == sum(cost(row, True) for row in ROWS) == 13
    assert pad(ROWS).fed == 4 * 6


def test_positions_begin_anew_and_go_on_after_a_shared_prompt():
    shared = pack(ROWS, True).inputs
    assert shared["position_ids"].tolist() == [[0, 1, 2, 3, 4, 3, 4, 5, 0, 1, 2, 3, 1]]
    assert shared["packed_segments"] == [
        (0, 3, 0, 0),
        (3, 5, 0, 3),
        (5, 8, 0, 3),
        (8, 9, 0, 0),
        (9, 12, 8, 9),
        (12, 13, 8, 9),
    ]
    apart = pack(ROWS[:1], False).inputs
    assert apart["position_ids"].tolist() == [[0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 5]]
    assert apart["packed_segments"] == [(0, 5, 0, 0), (5, 11, 0, 0)]


def test_sft_feeds_no_rejected_answer():
    row = {**ROWS[0], "rejected_ids": []}
    assert pack([row], False).fed == pack([row], True).fed == pad([row]).fed == 5
    assert set(read_back(pad([row]))) == {0}
