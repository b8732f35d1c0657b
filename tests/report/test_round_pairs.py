"""What a round's pairs are worth."""

from sao_utils.methods import sao
from sao_utils.report.rounds import pair_metrics
from sao_utils.stages.pairs import kept_pairs


def test_a_judge_is_right_or_wrong_on_the_pairs_it_chose_not_on_those_of_a_coin(small_run):
    of = {
        arm: sao.pairs(small_run, arm) and kept_pairs(small_run, arm) for arm in ("self", "random")
    }
    found = {arm: pair_metrics(rows) for arm, rows in of.items()}
    assert found["self"]["judge is right"].value > 0.8
    assert "judge is right" not in found["random"]
    assert {"pairs kept", "chosen is better", "flip rate"} <= found["random"].keys()
