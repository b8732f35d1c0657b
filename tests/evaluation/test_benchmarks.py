"""Published benchmarks: the official programs' figures, files, and what judges do wrong."""

import hashlib
import importlib.util
import json
import math
import random
import re
import shutil
import types
from collections import Counter
from pathlib import Path

import families
import pytest

from sao_utils import store as rows
from sao_utils.engines.api import ApiEngine
from sao_utils.engines.base import first_divergent_token
from sao_utils.engines.loading import load_tokenizer
from sao_utils.engines.verdicts import read_verdict
from sao_utils.evaluation import alpaca_eval, arena_hard, mt_bench
from sao_utils.evaluation import benchmarks as published
from sao_utils.evaluation import tiny_benchmarks as counterparts
from sao_utils.evaluation.answers import Candidate
from sao_utils.methods import evaluate, sao
from sao_utils.oracles import tiny_world as world
from sao_utils.oracles.tiny_oracle import inspect_answer
from sao_utils.recipe import Model, RecipeError
from sao_utils.recipes import load_recipe
from sao_utils.statistics.intervals import Interval
from sao_utils.statistics.ratings import bradley_terry

FIXTURE = Path(__file__).parent / "alpaca_eval_fixture"
QUICK = {
    "arms": [],
    "others": {"twin": {"path": "tiny", "dtype": "float32"}},
    "evaluation.benchmark_limit": 6,
    "evaluation.max_new_tokens": 48,
}


def settings(**keys):
    return load_recipe("tiny", {f"evaluation.{k}": v for k, v in keys.items()}).evaluation


def write(path: Path, given: list[dict]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    is_list = path.suffix == ".json"
    path.write_text(json.dumps(given) if is_list else "".join(json.dumps(r) + "\n" for r in given))
    return path


def run_by_name(run, name, names=None, **options):
    """Rows of `run_benchmark` by "<benchmark>.<model>.<judge>.<metric>"."""
    rows_ = published.run_benchmark(
        run, name, sao.candidates(run, names), evaluate.judges(run), **options
    )
    keys = ("benchmark", "model", "judge", "metric")
    return {".".join(row[key] for key in keys): row for row in rows_}


@pytest.fixture
def run(results):
    return rows.open_run("tiny", "quick", QUICK)


# ----------------------------------------------------------------- AlpacaEval and its program


@pytest.fixture(scope="module")
def official():
    return json.loads((FIXTURE / "official.json").read_text())


def fixture_script():
    spec = importlib.util.spec_from_file_location("make", FIXTURE / "make.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def annotated(official):
    """Our annotations of the fixture, by a judge that says what the program's judge was made to say."""
    benchmark = alpaca_eval.load(settings(data=str(FIXTURE)))
    said = {row["messages"]: row["logps"] for row in official["rows"]}
    answers = {
        item["id"]: {"turns": [official["rows"][item["id"]]["output_2"]], "id": "x"}
        for item in benchmark["items"]
    }

    def ask(requests):
        replies = []
        for request in requests:
            text = json.dumps(request["chat"], sort_keys=True)
            logps = said[hashlib.sha256(text.encode()).hexdigest()]
            replies.append({"logps": [logps.get(choice) for choice in request["choices"]]})
        return replies

    annotations, counts = alpaca_eval.judge(ask, benchmark, {"model": answers}, "made_up")
    return benchmark, answers, annotations["model"], counts["model"]


def test_order_prompt_and_preference_of_every_pair_are_those_of_alpaca_evals_program(
    annotated, official
):
    _, _, annotations, counts = annotated
    assert len(annotations) == len(official["rows"]) == 200
    for ours, theirs in zip(annotations, official["rows"]):
        assert ours["preference"] == pytest.approx(theirs["preference"], abs=1e-12)
    assert 0 < counts["invalid verdict"] == sum(r["preference"] is None for r in official["rows"])
    assert counts["identical answers"] == 8


def test_win_rates_and_lengths_are_those_of_alpaca_evals_program(annotated, official):
    benchmark, _, annotations, _ = annotated
    ours, theirs = alpaca_eval.figures(annotations, benchmark["difficulty"]), official["figures"]
    assert 100 * ours["win_rate"].value == pytest.approx(theirs["win_rate"])
    assert 100 * ours["discrete_win_rate"].value == pytest.approx(theirs["discrete_win_rate"])
    assert 100 * alpaca_eval.standard_error(annotations) == pytest.approx(theirs["standard_error"])
    assert int(ours["avg_length"].value) == theirs["avg_length"]
    assert ours["win_rate"].n == theirs["n_total"]
    half = (ours["win_rate"].high - ours["win_rate"].low) / 2
    assert half == pytest.approx(1.96 * theirs["standard_error"] / 100, rel=0.03)


def test_length_control_is_the_programs_without_its_penalty_within_a_twentieth_of_a_point(
    annotated, official
):
    benchmark, _, annotations, _ = annotated
    ours = alpaca_eval.figures(annotations, benchmark["difficulty"])["lc_win_rate"]
    assert 100 * ours.value == pytest.approx(official["length_controlled"]["unpenalised"], abs=0.05)
    minimal = alpaca_eval.figures(annotations)["lc_win_rate"]
    assert minimal.value != ours.value and minimal.low < ours.value < minimal.high


@pytest.mark.skipif(not importlib.util.find_spec("sklearn"), reason="needs scikit-learn")
def test_the_published_fit_is_that_of_alpaca_evals_program(annotated, official, tmp_path):
    make = fixture_script()
    gamed = tmp_path / "df_gamed.csv"
    gamed.write_text(make.gamed(make.N))
    ours = alpaca_eval.published_fit(annotated[2], gamed)
    assert 100 * ours == pytest.approx(official["length_controlled"]["published"], abs=1e-6)


@pytest.mark.skipif(
    not importlib.util.find_spec("alpaca_eval"), reason="extra alpaca not installed"
)
def test_alpaca_evals_program_reads_our_files_and_gives_our_figures(
    annotated, official, tmp_path, monkeypatch
):
    import pandas
    from alpaca_eval.metrics import get_winrate, glm_winrate

    benchmark, answers, annotations, _ = annotated
    given = alpaca_eval.files({"model": answers}, benchmark, {"model": annotations}, "made_up")
    path = next(p for p in given if p.endswith("annotations.json"))
    read = pandas.read_json(write(tmp_path / "annotations.json", given[path]))
    theirs = get_winrate(read)
    ours = alpaca_eval.figures(annotations)
    assert theirs["win_rate"] == pytest.approx(100 * ours["win_rate"].value)
    assert theirs["discrete_win_rate"] == pytest.approx(100 * ours["discrete_win_rate"].value)
    gamed = tmp_path / "df_gamed.csv"  # of the hub
    gamed.write_text(fixture_script().gamed(200))
    monkeypatch.setattr(glm_winrate, "hf_hub_download", lambda **_: str(gamed))
    controlled = glm_winrate.get_length_controlled_winrate(read, save_weights_dir=None)
    assert controlled["length_controlled_winrate"] == pytest.approx(
        official["length_controlled"]["published"], abs=1e-6
    )


def test_a_preference_goes_from_one_for_the_reference_to_two_for_the_model():
    sure = [math.log(0.99), math.log(0.01)]  # of what is shown first, second
    assert alpaca_eval.preference(sure, switched=False) == pytest.approx(1.01)
    assert alpaca_eval.preference(sure, switched=True) == pytest.approx(1.99)
    assert alpaca_eval.preference([None, -3.0], switched=False) == 2.0
    assert alpaca_eval.preference([None, None], switched=True) is None
    assert alpaca_eval.preference([-800.0, -800.0], switched=True) == 1.5


def test_a_judge_that_always_names_the_first_shows_in_the_first_rate_and_not_in_the_win_rate():
    benchmark = {
        "items": [{"id": k, "turns": [f"Question {k}"], "category": "c"} for k in range(400)],
        "baseline": {k: "base" for k in range(400)},
        "baseline_name": "reference",
        "show": lambda *texts: {"chat": texts},
    }
    answers = {"model": {k: {"turns": ["other text"]} for k in range(400)}}
    always = lambda requests: [{"logps": [-0.01, -9.0]} for _ in requests]  # noqa: E731
    annotations, _ = alpaca_eval.judge(always, benchmark, answers, "first")
    found = alpaca_eval.figures(annotations["model"])
    assert found["first_rate"].value == 1
    assert found["win_rate"].low < 0.5 < found["win_rate"].high


def test_a_server_that_reports_tokens_is_read_as_naming_m_or_M():
    said = [("m", {"m": -0.1, "M": -2.4, "The": -5.0})]
    assert read_verdict(said, "", alpaca_eval.CHOICES) == pytest.approx([-0.1, -2.4])


def test_a_server_that_forces_verdicts_gets_no_empty_turn_to_go_on_after():
    engine = object.__new__(ApiEngine)
    engine.model, engine._forces = (
        types.SimpleNamespace(url="x", concurrency=1, template_options={}),
        True,
    )
    asked = []
    engine._ask = lambda chat, *_, **options: asked.append((chat, options["extra_body"]))
    chat = [{"role": "user", "content": "m or M?"}]
    assert list(engine.choose([chat], "", alpaca_eval.CHOICES)) == [[(0, [-math.inf] * 2)]]
    assert asked == [(chat, engine._extra())]


@pytest.mark.parametrize("family", families.FAMILIES)
def test_m_and_M_are_told_apart_by_the_first_token_of_a_reply_and_gemma_gets_no_system_turn(
    family, tmp_path
):
    families.make_tokenizer(family).save_pretrained(tmp_path)
    model = Model(path=str(tmp_path))
    assert published._knows_system(model) == (family != "gemma")
    tokenizer = load_tokenizer(model)
    shared, firsts = first_divergent_token(
        [{"role": "user", "content": "?"}], "", alpaca_eval.CHOICES, tokenizer
    )
    assert shared == [] and [tokenizer.decode([token]) for token in firsts] == ["m", "M"]
    chat = [{"role": "system", "content": "Be fair."}, {"role": "user", "content": "A or B?"}]
    assert published._merged(chat) == [{"role": "user", "content": "Be fair.\n\nA or B?"}]


def test_without_a_valid_preference_there_is_no_win_rate():
    row = {"preference": None, "index": 0, "output_1": "a", "output_2": "bb"}
    found = alpaca_eval.figures([row])
    assert set(found) == {"avg_length"} and alpaca_eval.standard_error([row]) is None


# --------------------------------------------------------------------------------- Arena-Hard


@pytest.mark.parametrize(
    ("text", "label", "ask_on"),
    [
        ("My final verdict is: [[A>>B]].", "A>>B", False),
        ("First [[A=B]], and in the end [[A=B]]", "A=B", False),
        ("[[A>B]] or rather [[B>A]]", None, False),  # two that differ: not asked on, as there
        ("I like both.", None, True),
        ("", None, True),
        ("[A>B]", None, True),
        ("[[C]]", None, True),
    ],
)
def test_labels_are_read_as_arena_hards_program_does(text, label, ask_on):
    assert arena_hard.read_label(text) == (label, ask_on)


def arena(count=4):
    return {
        "items": [
            {"id": f"q{k}", "turns": [f"Question {k}"], "category": "c"} for k in range(count)
        ],
        "baseline": {f"q{k}": "base" for k in range(count)},
        "baseline_name": "gpt-4-0314",
        "show": lambda question, a, b: [{"role": "user", "content": f"{question}|{a}|{b}"}],
    }


def saying(reply):
    """A judge that replies with a function of the last message."""
    return lambda requests: [{"text": reply(r["chat"][-1]["content"])} for r in requests]


ANSWER = {f"q{k}": {"turns": ["mine"], "tokens": [k + 1], "id": f"a{k}"} for k in range(4)}


def test_game_one_shows_the_baseline_first_and_strong_verdicts_count_three_games():
    def verdict(text):
        question, a, _ = text.split("|")
        if question == "Question 0":
            return "[[A=B]]"
        return "[[B>>A]]" if a == "base" else "[[A>B]]"  # the model wins both games

    judgments, counts = arena_hard.judge(saying(verdict), arena(), {"model": ANSWER}, "judge")
    assert [g["score"] for g in judgments["model"][1]["games"]] == ["B>>A", "A>B"]
    games = arena_hard.games_of(judgments["model"], "gpt-4-0314")
    votes = sum(outcome * weight for *_, outcome, weight, _ in games)
    assert votes == 3 * 4 + 2 * 0.5 and sum(game[3] for game in games) == 3 * 4 + 2
    assert not +counts["model"]


def test_the_score_is_the_share_of_votes_against_the_baseline():
    labels = iter(["[[A>>B]]", "[[A>B]]", "[[B>A]]", "[[A=B]]", "[[B>>A]]", "[[B>A]]", "no", "no"])
    said = [next(labels) for _ in range(8)]
    judge = lambda requests: [{"text": t} for t in (said if len(requests) == 8 else ["", ""])]  # noqa: E731
    judgments, counts = arena_hard.judge(judge, arena(), {"model": ANSWER}, "judge")
    # Votes of the model by game: 0/3, 1/1, 1/1, 1/2, 3/3, 0/1 and two that do not count.
    found = arena_hard.figures(judgments["model"], "gpt-4-0314", {"q0": 2, "q1": 4})
    assert found["score"].value == pytest.approx(5.5 / 10)
    assert found["score"].low < 0.55 < found["score"].high
    assert found["first_rate"].value == pytest.approx(2 / 5) and found["avg_tokens"].value == 3
    assert +counts["model"] == {"invalid verdict: no label": 2, arena_hard.ASKED_ON: 2}
    fitted = bradley_terry(arena_hard.games_of(judgments["model"], "gpt-4-0314"), "gpt-4-0314")
    assert found["score"].value == pytest.approx(fitted["model"].win_rate.value)
    low, high = arena_hard.bootstrap(judgments["model"], "gpt-4-0314")
    assert 0 < low < 0.55 < high < 1


@pytest.mark.parametrize(
    ("says", "value"),
    [
        (lambda a: "[[B>>A]]" if a == "base" else "[[A>>B]]", 1.0),  # the model wins all
        (lambda a: "[[A>B]]", 0.5),  # position alone
        (lambda a: "[[A=B]]", 0.5),
    ],
)
def test_games_that_all_go_one_way_give_the_programs_score_and_a_wide_interval(says, value):
    verdict = lambda text: says(text.split("|")[1])  # noqa: E731
    for count in (1, 4):
        judgments, _ = arena_hard.judge(saying(verdict), arena(count), {"model": ANSWER}, "judge")
        score = arena_hard.figures(judgments["model"], "gpt-4-0314", {})["score"]
        assert score.value == value and score.n == 2 * count
        if count == 1:
            assert score.note == "one cluster of questions: no interval"
        else:
            assert score.high - score.low > 0.3, "a few prompts are no certainty"


def test_games_of_one_order_that_do_not_count_are_told():
    verdict = lambda text: "[[A>B]]" if text.split("|")[1] == "base" else "[[A<B]]"  # noqa: E731
    judgments, _ = arena_hard.judge(saying(verdict), arena(), {"model": ANSWER}, "judge")
    (told,) = arena_hard.remarks(judgments["model"])["score"]
    assert told.startswith("4 games count with the baseline's answer shown first, and 0")
    judgments, _ = arena_hard.judge(saying(lambda _: "[[A>B]]"), arena(), {"m": ANSWER}, "judge")
    assert arena_hard.remarks(judgments["m"]) == {}


def test_a_judge_without_a_label_is_asked_on_once():
    asked = []

    def judge(requests):
        asked.append([r["chat"] for r in requests])
        text = "Hm." if len(asked) == 1 else "[[B>A]]"
        return [{"text": text} for _ in requests]

    judgments, counts = arena_hard.judge(judge, arena(1), {"model": ANSWER}, "judge")
    assert [len(chats) for chats in asked] == [2, 2] and +counts["model"] == {
        arena_hard.ASKED_ON: 2
    }
    assert asked[1][0][-2:] == [
        {"role": "assistant", "content": "Hm."},
        {"role": "user", "content": arena_hard.GO_ON},
    ]
    assert judgments["model"][0]["games"][0]["judgment"] == "Hm.\n[[B>A]]"


@pytest.mark.parametrize(
    ("text", "reason"), [("[[A>B]] [[B>A]]", "labels differ"), ("[[A<B]]", "label unknown")]
)
def test_verdicts_that_do_not_count_are_counted_under_their_reason(text, reason):
    judgments, counts = arena_hard.judge(
        saying(lambda _: text), arena(1), {"model": ANSWER}, "judge"
    )
    assert +counts["model"] == {f"invalid verdict: {reason}": 2}
    assert "score" not in arena_hard.figures(judgments["model"], "gpt-4-0314", {})


def test_arena_hard_reads_both_forms_of_its_files_and_the_judges_own_prompt(tmp_path):
    folder = tmp_path / "arena-hard-v0.1"
    write(
        folder / "question.jsonl",
        [
            {"question_id": "a", "category": "v", "cluster": "x", "turns": [{"content": "One?"}]},
            {"uid": "b", "category": "v", "cluster": "y", "prompt": "Two?"},
            {"uid": "b", "category": "v", "cluster": "y", "prompt": "Two?"},
            {"uid": "c", "category": "v", "cluster": "y", "prompt": "Three?"},
        ],
    )
    with pytest.raises(RecipeError, match="model_answer/gpt-4-0314.jsonl"):
        arena_hard.load(settings(data=str(tmp_path)))
    write(
        folder / "model_answer" / "gpt-4-0314.jsonl",
        [
            {"question_id": "a", "choices": [{"turns": [{"content": "First."}]}]},
            {"uid": "b", "messages": [{"content": "Two?"}, {"content": {"answer": "Second."}}]},
            {"uid": "c", "messages": []},
        ],
    )
    found = arena_hard.load(settings(data=str(tmp_path)))
    assert [i["turns"] for i in found["items"]] == [["One?"], ["Two?"]]
    assert found["baseline"] == {"a": "First.", "b": "Second.", "c": None}
    assert found["counts"] == {"repeated id": 1, "no baseline answer": 1}
    assert found["notes"] and "[[A>>B]]" in found["show"]("q", "a", "b")[-1]["content"]
    template = "Q {question_1} A {answer_1} B {answer_2} {other}"
    config = {"system_prompt": "Be fair.", "prompt_template": [template]}
    (folder / "judge_config.yaml").write_text(json.dumps(config))
    found = arena_hard.load(settings(data=str(tmp_path)))
    chat = found["show"]("q", "{answer_2}", "b")
    assert not found["notes"] and chat[0] == {"role": "system", "content": "Be fair."}
    assert chat[1]["content"] == "Q q A {answer_2} B b {other}"


# ----------------------------------------------------------------------------------- MT-Bench


@pytest.mark.parametrize(
    ("text", "grade"),
    [
        ("Fine. Rating: [[7]]", 7),
        ("[[8.5]] and not [[2]]", 8.5),
        ("Rating: [6]", 6),
        ("[3] but in the end [[9]]", 9),
        ("[[0]]", None),
        ("[[11]]", None),
        ("Rating: 7", None),
        ("[[seven]]", None),
        ("", None),
    ],
)
def test_grades_are_read_as_fastchat_does_and_only_within_one_and_ten(text, grade):
    assert mt_bench.read_grade(text) == grade


@pytest.fixture
def mt_folder(tmp_path):
    folder = tmp_path / "official" / "mt_bench"
    write(
        folder / "question.jsonl",
        [
            {"question_id": 1, "category": "writing", "turns": ["Write.", "Shorter."]},
            {"question_id": 2, "category": "math", "turns": ["1 + 1?", "And 2 + 2?"]},
            {"question_id": 2, "category": "math", "turns": ["1 + 1?", "And 2 + 2?"]},
            {"question_id": 3, "category": "coding", "turns": ["Sort.", "Faster."]},
        ],
    )
    write(
        folder / "reference_answer" / "gpt-4.jsonl",
        [{"question_id": 2, "choices": [{"turns": ["It is 2.", "It is 4."]}]}],
    )
    return folder.parent


def judge_prompts(folder):
    names = {
        "single-v1": "{question} / {answer}",
        "single-math-v1": "{question} / {ref_answer_1} / {answer}",
        "single-v1-multi-turn": "{question_1} / {answer_1} / {question_2} / {answer_2}",
        "single-math-v1-multi-turn": "{ref_answer_1} {ref_answer_2} / {answer_1} / {answer_2}",
    }
    return write(
        folder / "judge_prompts.jsonl",
        [{"name": n, "system_prompt": n, "prompt_template": t} for n, t in names.items()],
    )


def test_mt_bench_shows_references_where_they_belong_and_counts_those_that_lack(mt_folder):
    judge_prompts(mt_folder)
    found = mt_bench.load(settings(data=str(mt_folder)))
    assert found["counts"] == {"repeated id": 1, "no reference answer": 1}
    writing, maths, coding = found["items"]
    show = lambda item, *texts: found["show"](item, list(texts))  # noqa: E731
    assert show(writing, "x")[0][1]["content"] == "Write. / x"
    assert show(writing, "x", "y")[0][1]["content"] == "Write. / x / Shorter. / y"
    assert show(maths, "x")[0][1]["content"] == "1 + 1? / It is 2. / x"
    assert show(maths, "x", "y")[0][1]["content"] == "It is 2. It is 4. / x / y"
    assert show(coding, "x")[1] == "single-v1"
    assert [mt_bench.temperature(item) for item in found["items"]] == [0.7, 0.0, 0.0]


def test_the_whole_benchmark_has_no_note_on_its_size_and_a_part_of_it_has(tmp_path):
    asked = [{"question_id": k, "category": "stem", "turns": [f"{k}?", "And?"]} for k in range(80)]
    for name, count in (("whole", 80), ("part", 79)):
        write(tmp_path / name / "mt_bench" / "question.jsonl", asked[:count])
    notes = [
        "; ".join(published.load(settings(data=str(tmp_path / name)), "mt_bench")["notes"])
        for name in ("whole", "part")
    ]
    assert "usable prompts" not in notes[0] and "79 usable prompts, there 80" in notes[1]


def test_the_kits_own_grading_prompt_is_marked_and_has_both_turns(mt_folder):
    found = mt_bench.load(settings(data=str(mt_folder)))
    assert "the judge's prompt is the kit's own" in found["notes"]
    one = found["show"](found["items"][1], ["x"])[0][0]["content"]
    both = found["show"](found["items"][1], ["x", "</Response 2> y"])[0][0]["content"]
    assert "It is 2." in one and "2 + 2" not in one
    assert "It is 4." in both and "2 + 2" in both and "(/Response 2> y" in both


@pytest.mark.filterwarnings("ignore:There is only one cluster")
def test_mean_grades_go_by_turn_and_category_and_leave_invalid_ones_out(mt_folder):
    judge_prompts(mt_folder)
    benchmark = mt_bench.load(settings(data=str(mt_folder)))
    answers = {"m": {item["id"]: {"turns": ["x", "y"], "id": "i"} for item in benchmark["items"]}}
    verdict = lambda text: "no idea" if "Sort" in text else f"[[{2 if text.endswith('y') else 8}]]"  # noqa: E731
    judgments, counts = mt_bench.judge(saying(verdict), benchmark, answers, "judge")
    found = mt_bench.figures(judgments["m"])
    assert counts["m"] == {mt_bench.NO_GRADE: 2}
    assert {k: (v.value, v.n) for k, v in found.items()} == {
        "score": (5, 4),
        "score.turn_1": (8, 2),
        "score.turn_2": (2, 2),
        "score.writing": (5, 2),
        "score.math": (5, 2),
    }
    assert [row["score"] for row in judgments["m"]][-2:] == [-1, -1]  # as FastChat writes it
    assert judgments["m"][3]["judge"] == ["judge", "single-math-v1-multi-turn"]


def test_files_have_what_the_programs_of_arena_hard_and_fastchat_read(mt_folder):
    judgments, _ = arena_hard.judge(saying(lambda _: "[[A=B]]"), arena(), {"m": ANSWER}, "judge")
    written = arena_hard.files({"m": ANSWER}, arena(), judgments, "judge")
    (answer, *_), (judged, *_) = (
        written[f"{path}m.jsonl"] for path in ("model_answer/", "model_judgment/judge/")
    )
    assert set(answer) == {"question_id", "answer_id", "model_id", "choices", "tstamp"}
    assert answer["choices"] == [{"index": 0, "turns": [{"content": "mine", "token_len": 1}]}]
    assert set(judged) == {"question_id", "model", "judge", "games"}
    assert [set(game) for game in judged["games"]] == [{"user_prompt", "judgment", "score"}] * 2

    benchmark = mt_bench.load(settings(data=str(mt_folder)))
    answers = {"m": {item["id"]: {"turns": ["x", "y"], "id": "i"} for item in benchmark["items"]}}
    judgments, _ = mt_bench.judge(saying(lambda _: "[[5]]"), benchmark, answers, "judge")
    written = mt_bench.files(answers, benchmark, judgments, "judge")
    assert written["model_answer/m.jsonl"][0]["choices"] == [{"index": 0, "turns": ["x", "y"]}]
    keys = "question_id model judge user_prompt judgment score turn tstamp".split()
    assert set(keys) <= set(written["model_judgment/judge_single.jsonl"][0])


# --------------------------------------------------------------- whole benchmarks, tiny model


def test_a_benchmark_without_its_files_says_what_to_give(run):
    with pytest.raises(RecipeError, match="evaluation.data to a folder"):
        run_by_name(run, "mt_bench")
    with pytest.raises(RecipeError, match="There are: alpaca_eval"):
        run_by_name(run, "alpaca")


def test_a_hub_that_is_out_of_reach_says_where_files_may_lie(results):
    run = rows.open_run("tiny", "hub", {**QUICK, "evaluation.data": "hub"})
    with pytest.raises(RecipeError, match="evaluation.data to a folder with question.jsonl"):
        run_by_name(run, "mt_bench")


def test_official_alpaca_files_run_with_the_tiny_model_as_generator_and_judge(results, tmp_path):
    shutil.copytree(FIXTURE, tmp_path / "given" / "alpaca_eval")
    (tmp_path / "given" / "df_gamed.csv").write_text(fixture_script().gamed(205))
    path = tmp_path / "given" / "alpaca_eval" / "alpaca_eval_gpt4_baseline.json"
    given = json.loads(path.read_text())
    broken = [
        given[0],
        {**given[1], "instruction": " "},
        given[0],
        {**given[2], "output": None},
        {**given[3], "output": ""},
        *given[4:],
    ]
    write(path, broken)
    run = rows.open_run("tiny", "alpaca", {**QUICK, "evaluation.data": str(tmp_path / "given")})
    found = run_by_name(run, "alpaca_eval")
    row = found["alpaca_eval.base.self.win_rate"]
    assert row["interval"].n == row["n"] == 6
    assert row["counts"]["repeated prompt"] == row["counts"]["empty prompt"] == 1
    assert row["counts"]["no reference answer"] == 1
    for part in ("the first 6 of 198 prompts", "198 usable prompts, there 805", "no system prompt"):
        assert part in row["note"]
    assert row["judge_note"] == "judged by tiny, there by gpt-4-1106-preview"
    assert "own" not in row["note"]  # the template was given
    files = (
        "In the benchmark's files: empty prompt (1), repeated prompt (1), no reference answer (1)."
    )
    assert files in row["remarks"]
    assert row["standard_error"] > 0
    controlled = found["alpaca_eval.base.self.lc_win_rate"]
    assert "gamed baselines" in controlled["note"]
    fit = found["alpaca_eval.base.self.lc_win_rate_published"]
    assert 0 < fit["interval"].value < 1 and math.isnan(fit["interval"].low) and fit["n"] == 6
    assert "gamed" not in fit["note"] and "gamed" not in row["note"]
    folder = run.folder / "benchmarks" / "alpaca_eval" / "base"
    outputs = json.loads((folder / "model_outputs.json").read_text())
    assert [set(o) for o in outputs] == [{"instruction", "output", "generator", "dataset"}] * 6


def test_prompts_beyond_the_context_give_empty_answers_and_invalid_verdicts_that_are_counted(
    results, tmp_path
):
    prompts = ["What is a river?", "word " * 5000, "What is a stone?"]
    row = {"dataset": "made up", "output": "It is one.", "generator": "reference"}
    write(
        tmp_path / "given" / "alpaca_eval_gpt4_baseline.json",
        [{**row, "instruction": prompt} for prompt in prompts],
    )
    data = {"evaluation.data": str(tmp_path / "given"), "others": {}}
    run = rows.open_run("tiny", "long", {**QUICK, **data})
    row = run_by_name(run, "alpaca_eval")["alpaca_eval.base.self.win_rate"]
    assert row["counts"]["empty answers"] == row["counts"]["invalid verdict"] == 1
    assert row["n"] == 2 and "the judge's prompt is the kit's own" in row["note"]


def test_models_of_several_seeds_stand_apart(results):
    run = rows.open_run("tiny", "seeds", {**QUICK, "seeds": [0, 1], "others": {}})
    of_seed = [Candidate("self", seed, run.recipe.model) for seed in run.recipe.seeds]
    both = [Candidate("base", None, run.recipe.model), *of_seed]
    found = published.run_benchmark(run, "tiny_mt", both, {})
    assert {row["model"] for row in found} == {"base", "self-0", "self-1"}
    clash = [*both, Candidate("self-1", None, run.recipe.model)]
    with pytest.raises(RecipeError, match="others: 'self-1'"):
        published.run_benchmark(run, "tiny_mt", clash, {})


def test_official_mt_files_run_with_the_tiny_model_and_its_grades_are_counted_as_invalid(
    results, mt_folder
):
    judge_prompts(mt_folder)
    run = rows.open_run("tiny", "mt", {**QUICK, "evaluation.data": str(mt_folder), "others": {}})
    found = run_by_name(run, "mt_bench")
    # The tiny judge cannot grade, and knows no system role: nothing breaks, nothing is made up.
    assert list(found) == ["mt_bench.base.self.valid_rate"]
    row = found["mt_bench.base.self.valid_rate"]
    assert row["interval"].value == 0 and row["n"] == row["counts"][mt_bench.NO_GRADE] == 6
    assert "The judge 'self' gave no valid verdict on 6 of 6 requests." in row["remarks"]
    assert row["interval"].high > 0.5  # two grades of one question are one piece of evidence
    judged = run.folder / "benchmarks" / "mt_bench" / "model_judgment" / "self_single.jsonl"
    assert [row["score"] for row in rows.read_rows(judged)] == [-1] * 6
    assert rows.read_rows(judged)[0]["user_prompt"].startswith("Write. / ")


def test_the_tiny_alpaca_has_a_win_rate_against_the_villagers_and_asks_nothing_twice(run):
    found = run_by_name(run, "tiny_alpaca")
    kept = {path: path.read_bytes() for path in run.folder.rglob("*.jsonl")}
    answers = rows.read_rows(run.rows("benchmark_answers"))
    assert (
        len(answers) == 12 and len({row["request"] for row in answers}) == 6
    )  # a twin is the same
    assert run_by_name(run, "tiny_alpaca") == found
    assert kept == {path: path.read_bytes() for path in run.folder.rglob("*.jsonl")}
    row = found["tiny_alpaca.base.self.win_rate"]
    assert isinstance(row["interval"], Interval) and 0 <= row["interval"].value <= 1
    assert row["interval"] == found["tiny_alpaca.twin.self.win_rate"]["interval"]
    assert counterparts.COUNTERPART in row["note"] and row["counts"]["prompts"] == 6


def test_in_the_tiny_arena_a_copy_of_the_base_model_is_as_strong_as_it(run):
    found = run_by_name(run, "tiny_arena")
    row = found["tiny_arena.twin.self.score"]
    assert row["interval"].value == pytest.approx(0.5) and row["counts"]["identical answers"] == 6
    assert "tiny_arena.base.self.score" not in found  # the baseline plays no games
    judged = run.folder / "benchmarks" / "tiny_arena" / "model_judgment" / "self" / "twin.jsonl"
    games = [game for row in rows.read_rows(judged) for game in row["games"]]
    assert len(games) == 12 and all(game["score"] in arena_hard.LABELS for game in games)


def test_two_judges_stand_side_by_side_with_their_agreement(results):
    copy = {"path": "tiny", "dtype": "float32"}
    run = rows.open_run("tiny", "judges", {**QUICK, "judges": {"copy": copy}})
    found = run_by_name(run, "tiny_arena") | run_by_name(run, "tiny_alpaca")
    for name, verdicts in (("tiny_arena", 12), ("tiny_alpaca", 6)):
        agreed = found[f"{name}.twin.self~copy.kappa"]
        assert agreed["n"] == agreed["counts"]["verdicts"] == verdicts
        value = agreed["interval"].value
        assert value == 1 or math.isnan(value)  # the same judge twice; NaN if all labels are one
    scores = [found[f"tiny_alpaca.base.{judge}.win_rate"] for judge in ("self", "copy")]
    assert scores[0]["interval"] == scores[1]["interval"]


def grades(by_turn):
    """Judgments of a question a row, a grade a turn."""
    return [
        {"question_id": k, "turn": turn, "score": grade, "category": "stem"}
        for k, of in enumerate(by_turn)
        for turn, grade in enumerate(of, 1)
    ]


def test_one_grade_for_everything_is_told_of_each_figure_and_is_no_certainty():
    given = grades([(10, 7), (10, 9), (10, 8)])
    assert list(mt_bench.remarks(given)) == ["score.turn_1"]
    found = mt_bench.figures(given)
    assert found["score.turn_1"].value == found["score.turn_1"].high == 10
    assert 1 <= found["score.turn_1"].low < 8
    assert list(mt_bench.remarks(grades([(7, 7), (7, 7)]))) == [
        "score",
        "score.turn_1",
        "score.stem",
        "score.turn_2",
    ]
    assert mt_bench.remarks(grades([(7, 8), (6, 9)])) == {}


@pytest.mark.filterwarnings("error")
def test_a_single_question_says_nothing_of_the_grade():
    found = mt_bench.figures(grades([(7, 7)]))["score"]
    assert (found.value, found.n) == (7, 2) and math.isnan(found.low) and found.note


@pytest.mark.parametrize("bad", [0.5, 0.03])  # share of questions that are graded low
def test_intervals_of_mean_grades_hold_the_truth_95_times_of_100(bad):
    draw = random.Random(0)
    truth = 10 - 4.5 * bad  # low grades: 1 to 10, alike in both turns
    held = 0
    for _ in range(1000):
        low = [draw.random() < bad for _ in range(160)]
        given = [[draw.randint(1, 10)] * 2 if is_low else (10, 10) for is_low in low]
        found = mt_bench.figures(grades(given))["score"]
        held += found.low <= truth <= found.high
    assert 930 <= held <= 985


def test_grades_outside_one_and_ten_are_a_difference_from_fastchat(run, mt_folder):
    benchmark = mt_bench.load(settings(data=str(mt_folder)))
    answers = {"m": {item["id"]: {"turns": ["x", "y"], "id": "i"} for item in benchmark["items"]}}
    _, counts = mt_bench.judge(saying(lambda _: "[[0]]"), benchmark, answers, "judge")
    assert counts["m"] == {mt_bench.OUTSIDE: 6}
    notes = published._notes(run, "mt_bench", benchmark, run.recipe.model, counts["m"])
    assert "protocol differs: 6 grades outside 1..10 left out, which count there" in notes


def test_each_difference_from_a_published_protocol_has_a_note():
    overrides = {"evaluation.top_p": 0.9, "evaluation.max_new_tokens": 1024}
    recipe = load_recipe("tiny", overrides)
    run = types.SimpleNamespace(recipe=recipe)
    plain = {"notes": ()}

    def notes(name, counts, **judge):
        model = Model(path="gpt-4", **judge)
        return "; ".join(published._notes(run, name, plain, model, Counter(counts)))

    assert notes("mt_bench", {}).endswith(
        "differs: answers drawn with top_p 0.9, which is not set there"
    )
    assert "quantised (nf4)" in notes("alpaca_eval", {}, quantisation="nf4")
    assert "top_p" not in notes("arena_hard", {})  # at temperature 0 it changes nothing
    assert "2 verdicts asked once more" in notes("arena_hard", {arena_hard.ASKED_ON: 2})
    assert "asked once more" not in notes("arena_hard", {})
    assert published._judge_note("mt_bench", Model(path="gpt-4")) == ""


def test_identical_answers_are_no_agreement_of_two_judges():
    def annotated(draws):
        return [
            {
                "index": k,
                "preference": 1.5 if k % 2 else draw,
                "output_1": "a",
                "output_2": "a" if k % 2 else "b",
            }
            for k, draw in enumerate(draws)
        ]

    draw = random.Random(0)
    judges = {
        name: alpaca_eval.labels(annotated([draw.choice((1.1, 1.9)) for _ in range(400)]))
        for name in ("one", "two")
    }
    (row,) = published._agreements("alpaca_eval", {"m": judges}, 400)
    assert row["interval"].low < 0 < row["interval"].high  # they toss coins
    assert row["n"] == 200 and row["counts"]["identical answers, not judged"] == 200
    (told,) = alpaca_eval.remarks(annotated([1.1] * 400))["win_rate"]
    assert told.startswith("200 of 400 answers are the reference's own")


def test_labels_of_verdicts_leave_invalid_ones_empty():
    annotations = [
        {"index": k, "preference": p, "output_1": "a", "output_2": "b"}
        for k, p in enumerate((1.2, 1.5, 1.9, None))
    ]
    assert list(alpaca_eval.labels(annotations).values()) == [-1, 0, 1, None]
    games = [{"score": "A>>B"}, {"score": None}]
    judged = arena_hard.labels([{"question_id": "q", "games": games}])
    assert judged == {("q", 1): 1.0, ("q", 2): None}
    graded = [{"question_id": 1, "turn": turn, "score": s} for turn, s in ((1, 7), (2, -1))]
    assert mt_bench.labels(graded) == {(1, 1): 7, (1, 2): None}


def test_the_tiny_mt_grades_both_turns_by_the_oracle(run):
    found = run_by_name(run, "tiny_mt")
    judged = run.folder / "benchmarks" / "tiny_mt" / "model_judgment" / "oracle_single.jsonl"
    items = {item["id"]: item for item in counterparts.conversations()}
    answers = {
        row["question_id"]: row["choices"][0]["turns"]
        for row in rows.read_rows(judged.parents[1] / "model_answer" / "base.jsonl")
    }
    for row in rows.read_rows(judged):
        question = world.parse_question(items[row["question_id"]]["turns"][row["turn"] - 1])
        text = answers[row["question_id"]][row["turn"] - 1]
        flaws = -inspect_answer(question, text).quality
        assert row["score"] == max(1, 10 - 2 * flaws)
    assert found["tiny_mt.base.oracle.score"]["n"] == 12
    assert "graded by the oracle" in found["tiny_mt.base.oracle.score"]["note"]


def test_counterparts_ask_held_out_questions_only_and_are_always_the_same():
    for items in (counterparts.prompts(every=2), counterparts.conversations()):
        for item in items:
            for turn in item["turns"]:
                assert world.SPLIT[world.parse_question(turn).combination] == "test"
        assert len({item["id"] for item in items}) == len(items)
    assert counterparts.conversations() == counterparts.conversations()
    first, second = (world.parse_question(t) for t in counterparts.conversations()[0]["turns"])
    assert first.hobby == second.hobby and not set(second.aspects) <= set(first.aspects)
    item = counterparts.prompts(every=2)[3]
    assert counterparts.villagers_answer(item) == counterparts.villagers_answer(item)


def test_log_odds_become_labels_by_their_size_and_missing_ones_none():
    replies = [[-0.1, -9.0], [-3.0, -0.5], [-0.7, -0.6], [None, -1.0], [-9.0, -0.1], [-20.0, -25.0]]
    ask = lambda requests: [{"logps": logps} for logps in replies]  # noqa: E731
    for min_mass, last in ((0.5, None), (0.0, "A>>B")):
        texts, _ = counterparts.choose_label(ask, [[]] * 6, min_mass)
        labels = [arena_hard.read_label(text)[0] for text in texts]
        assert labels == ["A>>B", "B>A", "A=B", None, "B>>A", last]


@pytest.mark.parametrize(
    ("reply", "words"),
    [
        (lambda k: [-0.001, -7.0], "prefers what is shown first in 100%"),
        (lambda k: [None, None] if k % 3 else [-0.7, -0.7], "gave no valid verdict on"),
        (lambda k: [None, None], "gave no valid verdict on"),
        (lambda k: [-20.0, -21.0], "rather have said something else|no valid verdict"),
    ],
)
def test_a_judge_that_fails_is_named_in_the_remarks_and_nothing_raises(
    run, monkeypatch, reply, words
):
    judge = lambda *_: lambda requests: [{"logps": reply(k)} for k in range(len(requests))]  # noqa: E731
    monkeypatch.setattr(published, "_requester", judge)
    for name in ("tiny_alpaca", "tiny_arena"):
        found = run_by_name(run, name)
        twin = [row for row in found.values() if row["model"] == "twin"]
        assert "valid_rate" in {row["metric"] for row in twin}
        judged = [row for row in twin if row["metric"] in ("win_rate", "score", "valid_rate")]
        assert all(re.search(words, " ".join(row["remarks"])) for row in judged)
