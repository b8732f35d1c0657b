"""Contests between any two models by any judge.

The tiny model plays and judges for real; models and judges that misbehave stand behind a real server
on loopback (test_engine_api.py), which also stands in for one that is paid.
"""

import json
import math

import pytest
from test_engine_api import reply, server, settings  # noqa: F401 (a fixture)

from sao_utils import store as rows
from sao_utils.engines import requests as asking
from sao_utils.engines.requests import CostError
from sao_utils.evaluation import answers as evaluation
from sao_utils.evaluation import comparisons as contests
from sao_utils.recipe import RecipeError
from sao_utils.recipes import load_recipe
from sao_utils.statistics.length_control import length_controlled_win_rate

PROMPTS = ["What is tea?", "Name a hobby.", "What is tea?", "How do I begin?", "Say hello."]
JUDGED = "You are an impartial judge"
TWIN = {"path": "tiny", "dtype": "auto"}  # the same weights under another name: other samples


class Script(dict):
    """What the server says: `verdict` to the ranking prompt, `answer` to all else."""

    def __init__(self, verdict="ranking: 1 > 2", answer="Tea is a plant."):
        self.verdict, self.answer = verdict, answer

    def get(self, text, default=None):
        return [(200, reply(self.verdict if text.startswith(JUDGED) else self.answer), {})]


@pytest.fixture
def opened(results, tmp_path, server):  # noqa: F811
    """Opens runs with the competitors "twin" and "remote", and the judges "copy" and "one"."""
    server.answers = Script()
    prompts = tmp_path / "asked.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in PROMPTS))

    def open_run(name="contests", method="logprob", **evaluated):
        remote = settings(server, price_in=1.0, price_out=1.0).model_dump()
        overrides = {
            "arms": [],
            "others": {"twin": TWIN, "remote": remote},
            "judges": {"copy": TWIN, "one": remote},
            "judging.method": method,
            "pairs.min_margin": 1,
            "evaluation.questions": str(prompts),
            "evaluation.temperatures": [0.6],
            "evaluation.max_new_tokens": 24,
            "evaluation.bootstrap": 200,
        }
        overrides |= {f"evaluation.{key}": value for key, value in evaluated.items()}
        return rows.open_run("tiny", name, overrides)

    return open_run


def board_of(run, found):
    name = contests.name_of(run, found[0])
    board = contests.scoreboard(run, found)
    assert all(key.startswith(name + ".") for key in board)
    return {key.removeprefix(name + "."): value for key, value in board.items()}


# ---------------------------------------------------------------------- names


@pytest.mark.parametrize(
    "key, name",
    [("others", "base"), ("others", "random"), ("judges", "self"), ("others", "a.b"),
     ("judges", "../x"), ("judges", ""), ("others", "a b")],
)  # fmt: skip
def test_names_that_are_taken_or_would_break_a_key_are_refused(key, name):
    with pytest.raises(RecipeError, match=key):
        load_recipe("tiny", {key: {name: TWIN}})


def test_named_models_are_set_as_a_whole_also_in_words_and_local_ones_are_kept_by_whole_paths(
    results, tmp_path, monkeypatch
):
    from sao_utils.notebooks import parameters

    (tmp_path / "adapter").mkdir()
    monkeypatch.chdir(tmp_path)
    run = rows.open_run("tiny", "mine", {"others": "{mine: {path: tiny, adapter: adapter}}"})
    assert run.recipe.others["mine"].adapter == str(tmp_path / "adapter")
    told = parameters(run)
    assert set(told["overrides"]) == {"others"}
    assert load_recipe(told["recipe"], told["overrides"]) == run.recipe


def test_unknown_models_and_judges_are_named_with_those_there_are(opened):
    run = opened()
    with pytest.raises(RecipeError, match="base, twin, remote"):
        contests.contest(run, "tuned", "base")
    with pytest.raises(RecipeError, match="self, copy, one"):
        contests.contest(run, "twin", "base", "gpt")
    with pytest.raises(RecipeError, match="itself"):
        contests.contest(run, "base", "base")


# ---------------------------------------------------------------------- real contests


def test_a_local_model_meets_one_behind_a_server_before_the_local_judge(opened):
    run = opened()
    found = contests.contest(run, "remote", "base")
    assert len(found) == len(PROMPTS) == len({row["id"] for row in found})  # a prompt comes twice
    for row in found:
        assert row["responses"][0] == "Tea is a plant." != row["responses"][1]
        assert (row["model"], row["opponent"], row["judge"]) == ("remote", "base", "self")
        wanted = {"consistent": float((row["margin"] or 0) > 0), "invalid": None}
        assert row["win"] == wanted.get(row["outcome"], 0.5)
    board = board_of(run, found)
    assert board["win_rate"].n == board["valid"].n == len(PROMPTS)
    assert contests.remarks(found)[-1].startswith("1 of 5 prompts repeat")
    turned = contests.contest(run, "base", "remote")
    assert [row["win"] for row in turned] == [1 - row["win"] for row in found]
    assert contests.contest(run, "remote", "base") == found


def test_several_judges_stand_side_by_side_and_a_copy_of_a_judge_agrees_with_it(opened):
    found = contests.judges_agreement(opened(), "twin", "base", ("self", "copy"))
    a, b = (found[f"contest.twin_vs_base.{judge}.win_rate"] for judge in ("self", "copy"))
    assert a == b and found["contest.twin_vs_base.self_and_copy.agreement"].value == 1
    assert "contest.twin_vs_base.self_and_copy.kappa" in found


def test_a_league_ranks_all_against_the_base(opened):
    run = opened()
    found = contests.league(run, names=("base", "twin", "remote"))
    assert found["league.self.base.elo"].value == 1000
    assert found["league.self.base.elo"].n == 2 * len(PROMPTS)
    assert {key.rpartition(".")[0] for key in found} == {
        f"league.self.{name}" for name in ("base", "twin", "remote")
    }
    star = contests.league(run, names=("base", "twin", "remote"), star=True)
    assert star["league.self.twin.elo"].n == len(PROMPTS)


def test_two_models_are_compared_by_their_games_with_a_third(opened):
    run = opened()
    (key, gain), *more = contests.compared(run, "remote", "twin").items()
    assert key == "contest.remote_over_twin_vs_base.self.gain" and not more
    wins = [[row["win"] for row in contests.contest(run, x, "base")] for x in ("remote", "twin")]
    assert gain.value == pytest.approx(sum(wins[0]) / 5 - sum(wins[1]) / 5)
    turned = contests.compared(run, "twin", "remote")["contest.twin_over_remote_vs_base.self.gain"]
    assert turned.value == pytest.approx(-gain.value)


def test_an_adapter_competes_and_seeds_are_paired(opened, tmp_path, monkeypatch):
    import torch
    from peft import LoraConfig, get_peft_model

    from sao_utils.engines.loading import load_model
    from sao_utils.recipe import Model

    folders = {}
    for seed in (0, 1):
        base = load_model(Model(path="tiny", dtype="float32"))
        config = LoraConfig(target_modules="all-linear", init_lora_weights=False, r=2)
        folders[seed] = tmp_path / f"adapter-{seed}"
        torch.manual_seed(seed)  # some adapters make a judge's verdict invalid
        get_peft_model(base, config).save_pretrained(folders[seed])
    run = opened()
    random = {"path": "tiny", "dtype": "float32", "adapter": str(folders[0])}
    recipe = run.recipe.model_copy(
        update={"others": {"adapted": Model(**random)}, "arms": ("self",), "seeds": (0, 1)}
    )
    run = rows.Run(recipe, run.folder)
    # What is trained does not matter here: each seed's adapter is a real one, of random weights.
    monkeypatch.setattr(evaluation, "train", lambda run, arm, seed: folders[seed])
    answers = evaluation.answer(run)
    by_model = {(row["model"], row["seed"]): row["weights"] for row in answers}
    assert by_model["adapted", None] == by_model["self", 0] != by_model["self", 1]
    assert by_model["base", None] not in (by_model["self", 0], by_model["self", 1])
    text = {(r["model"], r["seed"], r["question_id"]): r["text"] for r in answers}
    found = contests.contest(run, "self", "adapted")
    assert [row["seed"] for row in found] == [0] * 5 + [1] * 5
    assert len({row["id"] for row in found}) == 10
    for row in found:
        assert row["responses"][0] == text["self", row["seed"], row["question_id"]]
        assert row["responses"][1] == text["adapted", None, row["question_id"]]
        assert row["seed"] == 1 or row["outcome"] == "identical"
    gain, *alone = contests.compared(run, "self", "adapted").values()
    assert [one.n for one in alone] == [5, 5] and gain.n == 10
    assert {row["model"] for row in contests.duel(run)} == {"self"}


# ---------------------------------------------------------------------- judges and models that misbehave


def test_a_judge_that_always_says_1_decides_nothing_and_is_reported(opened):
    run = opened(method="sampled")
    found = contests.contest(run, "twin", "base", "one")
    assert {row["outcome"] for row in found} <= {"inconsistent", "identical"}
    board = board_of(run, found)
    assert board["win_rate"].value == 0.5 and board["decided"].value == 0
    assert board["first_position"].value == 1
    assert any("shown first in 100%" in text for text in contests.remarks(found))


@pytest.mark.parametrize("verdict", ["", "Both are fine.", "ranking: 1 > 2, or ranking: 2 > 1"])
def test_malformed_verdicts_are_counted_and_give_no_win_rate(opened, server, verdict):  # noqa: F811
    run = opened(method="sampled")
    server.answers.verdict = verdict
    found = contests.contest(run, "remote", "base", "one")
    assert {row["win"] for row in found} == {None}
    board = board_of(run, found)
    assert board["valid"].value == 0 and "win_rate" not in board and "first_position" not in board
    assert any("no valid verdict on 5 of 5" in text for text in contests.remarks(found))
    assert contests.compared(run, "remote", "twin", judge="one") == {}
    assert "contest.remote_vs_base.one.win_rate" not in contests.judges_agreement(
        run, "remote", "base", ("one",)
    )


def test_empty_answers_are_judged_counted_and_reported(opened, server):  # noqa: F811
    run = opened()
    server.answers.answer = ""
    found = contests.contest(run, "remote", "base")
    board = board_of(run, found)
    assert board["empty_a"].value == 1 and board["empty_b"].value == 0
    assert board["length_difference"].value < 0
    assert "5 of 5 answers of 'remote' are empty." in contests.remarks(found)


# ---------------------------------------------------------------------- paid judges


def test_no_answer_and_no_verdict_is_bought_twice_not_even_by_another_run(opened, server):  # noqa: F811
    first = contests.contest(opened("one", "sampled"), "remote", "base", "one")
    bought = len(server.requests)
    assert bought == 4 + 2 * 4  # one of the five prompts is a repetition
    assert contests.contest(opened("one", "sampled"), "remote", "base", "one") == first
    second = contests.contest(opened("two", "sampled"), "remote", "base", "one")
    assert [row["win"] for row in second] == [row["win"] for row in first]
    assert len(server.requests) == bought


def test_the_cap_stops_a_contest_before_it_is_passed_and_the_answers_stay(opened, server):  # noqa: F811
    with pytest.raises(CostError, match="max_cost"):
        contests.contest(opened(method="sampled", max_cost=2e-4), "remote", "base", "one")
    assert len(server.requests) == 4  # the answers; the verdicts would have been too much
    run = opened(method="sampled", max_cost=1.0)
    assert asking.spent(run) == pytest.approx(4 * 8 / 1e6)
    assert len(contests.contest(run, "remote", "base", "one")) == 5
    assert len(server.requests) == 4 + 8


# ---------------------------------------------------------------------- numbers


def row(k, win, outcome="consistent", responses=("four", "five5"), first=(True, False), seed=None):
    return {
        "id": str(k), "model": "a", "opponent": "b", "judge": "j", "seed": seed, "prompts": "test",
        "temperature": 0.0, "prompt": f"P{k}", "combination": f"P{k}", "question_id": str(k),
        "responses": list(responses), "outcome": outcome, "win": win,
        **dict(zip(("margin_12", "margin_21", "margin"), margins(outcome, *first))),
    }  # fmt: skip


def margins(outcome, *first):
    """Margins of both orders and of the pair, by whether each prefers what is shown first."""
    if outcome in ("invalid", "identical"):
        return None, None, None
    by_order = [0 if outcome == "tie" else 1 if wins else -1 for wins in first]
    return by_order[0], -by_order[1], (by_order[0] - by_order[1]) / 2


def test_the_scoreboard_adds_up(results):
    run = rows.open_run("tiny", "numbers", {"evaluation.bootstrap": 500})
    found = [row(k, 1.0) for k in range(60)] + [row(60 + k, 0.0) for k in range(20)]
    found += [row(80 + k, 0.5, "inconsistent", first=(True, True)) for k in range(10)]
    found += [row(90 + k, 0.5, "identical", ("same", "same")) for k in range(5)]
    found += [row(95 + k, None, "invalid", ("", "five5")) for k in range(5)]
    board = board_of(run, found)
    assert contests.name_of(run, found[0]) == "contest.a_vs_b.j"
    assert board["win_rate"].value == pytest.approx(67.5 / 95) and board["win_rate"].n == 95
    shares = {"decided": 80 / 95, "inconsistent": 10 / 95, "tie": 0, "identical": 5 / 95}
    shares |= {"valid": 0.95, "empty_a": 0.05, "empty_b": 0, "first_position": 100 / 180}
    for key, share in shares.items():
        assert board[key].value == pytest.approx(share), key
        assert board[key].low <= share <= board[key].high
    assert board["length_difference"].value == pytest.approx((90 * -1 + 5 * -5) / 100)
    needed = board["prompts_needed"]
    assert needed.low < needed.value < needed.high < math.inf
    elsewhere = {**found[0], "prompts": "/some/where/hard.jsonl", "temperature": 0.6}
    assert contests.name_of(run, elsewhere) == "contest.a_vs_b.j.hard.t0.6"


def test_a_win_rate_that_may_be_a_half_needs_any_number_of_prompts(results):
    run = rows.open_run("tiny", "numbers")
    even = [row(k, float(k % 2)) for k in range(40)]
    board = board_of(run, even)
    assert board["prompts_needed"].value == board["prompts_needed"].high == math.inf
    assert board["win_rate_lc"].value == pytest.approx(0.5)


def test_length_counts_in_characters_whatever_the_tokens(results):
    run = rows.open_run("tiny", "numbers")
    found = [
        row(k, float(k % 3 > 0), responses=("x" * (40 + 7 * k % 31), "x" * 50)) for k in range(90)
    ]
    for k, of in enumerate(found):
        of["lengths"] = [k, 90 - k]  # tokens: another order of the same texts
    wins, longer = [of["win"] for of in found], [len(of["responses"][0]) - 50 for of in found]
    expected = length_controlled_win_rate(wins, longer, range(90))
    assert board_of(run, found)["win_rate_lc"] == expected == contests.rate_at_equal_length(found)


def test_several_trainings_widen_the_interval_of_a_win_rate(results):
    run = rows.open_run("tiny", "numbers", {"evaluation.bootstrap": 500})
    one = [row(k, float(k % 2)) for k in range(40)]
    apart = [row(k, float(seed), seed=seed) for seed in (0, 1) for k in range(40)]
    narrow, wide = (board_of(run, found)["win_rate"] for found in (one, apart))
    assert narrow.value == wide.value == 0.5
    assert wide.high - wide.low > 2 * (narrow.high - narrow.low)


def test_each_training_has_a_win_rate_of_its_own_beside_the_whole(results, monkeypatch):
    from sao_utils.report import figures
    from sao_utils.report import results as numbers

    few = {"evaluation.bootstrap": 500, "arms": ["self", "random"]}
    run = rows.open_run("tiny", "numbers", {**few, "seeds": [0, 4]})
    made = {
        (name, "base"): [
            {**row(k, float(k % 10 < won), seed=seed), "model": name, "opponent": "base"}
            for seed, won in shares.items()
            for k in range(40)
        ]
        for name, shares in {"self": {0: 6, 4: 8}, "random": {0: 5, 4: 5}}.items()
    }
    for of in made.values():
        for at in of:
            at["responses"] = ["a" * (20 + int(at["question_id"]) % 7), "a" * 23]
    monkeypatch.setattr(contests, "contest", lambda run, a, b, *judge: made[a, b])
    found = numbers.win_rates(run)
    alone = [found[f"self_win_rate.seed{seed}"] for seed in (0, 4)]
    assert [one.value for one in alone] == [0.6, 0.8] and [one.n for one in alone] == [40, 40]
    whole = found["self_win_rate"]
    assert whole.value == pytest.approx(0.7) and whole.n == 80
    assert whole.high - whole.low > max(one.high - one.low for one in alone)
    assert {"self_win_rate_lc.seed4", "self_win_rate.random.seed0"} <= set(found)
    gains = contests.compared(run, "self", "random")
    start = "contest.self_over_random_vs_base.j.gain"
    assert set(gains) == {start, f"{start}.seed0", f"{start}.seed4"}
    assert gains[f"{start}.seed4"].value == pytest.approx(0.3)
    assert numbers.unit(f"{start}.seed4") == "points" and numbers.unit(f"{start}") == "points"
    shown = figures.win_rates(found)
    assert shown.axes[0].get_title("left").endswith("(n = 80)")
    one = rows.Run(run.recipe.model_copy(update={"seeds": (0,)}), run.folder)
    assert not [key for key in numbers.win_rates(one) if "seed" in key]


@pytest.mark.parametrize("win", [0.5, 1.0])
def test_prompts_that_all_fared_alike_are_no_certainty_after_several_trainings_either(results, win):
    run = rows.open_run("tiny", "numbers", {"evaluation.bootstrap": 500})
    alike = [row(k, win, seed=seed) for seed in (0, 1, 2) for k in range(40)]
    one, three = (board_of(run, found)["win_rate"] for found in (alike[:40], alike))
    assert three.value == win and (three.low, three.high) == (one.low, one.high)
    assert three.high - three.low > 0.08


def test_even_odds_prefer_no_place(results):
    run = rows.open_run("tiny", "numbers", {"evaluation.bootstrap": 500})
    even = [row(k, 0.5, "tie") for k in range(20)]
    assert board_of(run, even)["first_position"].value == 0.5
    assert not [text for text in contests.remarks(even) if "shown" in text]


def test_units_of_a_contests_results_do_not_depend_on_names():
    from sao_utils.report.results import in_words, unit

    assert unit("contest.again_vs_kappa.elo.win_rate") == "%"
    assert unit("contest.a_over_b_vs_base.self.gain") == "points"
    assert unit("contest.a_vs_b.x_and_y.kappa") == ""
    assert unit("contest.a_vs_b.x.prompts_needed") == "prompts"
    assert unit("self_judge.labelled.accuracy.against_bias") == "%"  # a subset of a user's file
    assert unit("self_judge.labelled.length_bias") == "points"
    assert in_words("league.self.a.elo", {"value": 1012, "low": 1000, "high": 1024}) == (
        "1012.0 [1000.0, 1024.0]"
    )
