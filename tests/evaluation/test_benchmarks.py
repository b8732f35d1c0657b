"""Published benchmarks: the official programs' figures, files, and what judges do wrong."""

import hashlib
import importlib.util
import io
import json
import math
import re
import shutil
from pathlib import Path

import families
import pandas as pd
import pytest

from sao_utils import store as rows
from sao_utils.engines.base import first_divergent_token
from sao_utils.engines.loading import load_tokenizer
from sao_utils.evaluation import alpaca_eval, arena_hard, mt_bench
from sao_utils.evaluation import benchmarks as published
from sao_utils.evaluation import tiny_benchmarks as counterparts
from sao_utils.evaluation.answers import Candidate
from sao_utils.methods import evaluate, sao
from sao_utils.oracles import tiny_world as world
from sao_utils.oracles.tiny_oracle import inspect_answer
from sao_utils.recipe import Model, RecipeError
from sao_utils.recipes import load_recipe

FIXTURE = Path(__file__).parent / "alpaca_eval_fixture"
QUICK = {
    "arms": [],
    "others": {"twin": {"path": "tiny", "dtype": "float32"}},
    "evaluation.benchmark_limit": 6,
    "evaluation.max_new_tokens": 48,
}


def settings(**keys):
    return load_recipe("tiny", {f"evaluation.{k}": v for k, v in keys.items()}).evaluation


def write(path: Path, given) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = "".join(json.dumps(row) + "\n" for row in given)
    path.write_text(lines if path.suffix == ".jsonl" else json.dumps(given))
    return path


def run_by_name(run, name, **options):
    """Rows of `run_benchmark` by "<benchmark>.<model>.<judge>.<metric>"."""
    found = published.run_benchmark(run, name, sao.candidates(run), evaluate.judges(run), **options)
    keys = ("benchmark", "model", "judge", "metric")
    return {".".join(row[key] for key in keys): row for row in found}


def saying(reply):
    """A judge that replies with a function of the last message."""
    return lambda requests: [{"text": reply(r["chat"][-1]["content"])} for r in requests]


def judged(protocol, send, benchmark, given):
    """The judgments of one model's answers."""
    return published.judge_answers(send, protocol, benchmark, {"m": given}, "judge")["m"]


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
    benchmark["gamed"] = pd.read_csv(io.StringIO(fixture_script().gamed()))
    said = {row["messages"]: row["logps"] for row in official["rows"]}
    answers = {
        item["id"]: {"turns": [official["rows"][item["id"]]["output_2"]], "id": "x"}
        for item in benchmark["items"]
    }

    def send(requests):
        replies = []
        for request in requests:
            text = json.dumps(request["chat"], sort_keys=True)
            logps = said[hashlib.sha256(text.encode()).hexdigest()]
            replies.append({"logps": [logps.get(choice) for choice in request["choices"]]})
        return replies

    return benchmark, answers, judged(alpaca_eval, send, benchmark, answers)


def test_order_prompt_and_preference_of_every_pair_are_those_of_alpaca_evals_program(
    annotated, official
):
    annotations = annotated[2]
    assert len(annotations) == len(official["rows"]) == 200
    for ours, theirs in zip(annotations, official["rows"]):
        assert ours["preference"] == pytest.approx(theirs["preference"], abs=1e-12)
    asked = [preference for _, preference in alpaca_eval.verdicts(annotations)]
    assert len(asked) == 192  # the other answers are the reference's own
    assert 0 < asked.count(None) == sum(row["preference"] is None for row in official["rows"])


def test_win_rates_are_those_of_alpaca_evals_program(annotated, official):
    benchmark, _, annotations = annotated
    ours, theirs = alpaca_eval.figures(annotations, benchmark), official["figures"]
    assert 100 * ours["win_rate"].value == pytest.approx(theirs["win_rate"])
    assert ours["win_rate"].n == theirs["n_total"]
    half = (ours["win_rate"].high - ours["win_rate"].low) / 2
    assert half == pytest.approx(1.96 * theirs["standard_error"] / 100, rel=0.03)
    # Length control is the program's without its penalty, within a twentieth of a point.
    unpenalised = official["length_controlled"]["unpenalised"]
    assert 100 * ours["lc_win_rate"].value == pytest.approx(unpenalised, abs=0.05)
    minimal = alpaca_eval.figures(annotations, {})["lc_win_rate"]
    assert minimal.low < ours["lc_win_rate"].value < minimal.high
    assert minimal.value != ours["lc_win_rate"].value


def test_the_published_fit_is_that_of_alpaca_evals_program(annotated, official):
    ours = alpaca_eval.figures(annotated[2], annotated[0])["lc_win_rate_published"]
    theirs = official["length_controlled"]["published"]
    assert 100 * ours.value == pytest.approx(theirs, abs=1e-6) and math.isnan(ours.low)


@pytest.mark.skipif(
    not importlib.util.find_spec("alpaca_eval"), reason="extra alpaca not installed"
)
def test_alpaca_evals_program_reads_our_files_and_gives_our_figures(
    annotated, official, tmp_path, monkeypatch
):
    from alpaca_eval.metrics import get_winrate, glm_winrate

    benchmark, answers, annotations = annotated
    given = alpaca_eval.files(benchmark, {"model": answers}, {"model": annotations}, "made_up")
    path = next(p for p in given if p.endswith("annotations.json"))
    read = pd.read_json(write(tmp_path / "annotations.json", given[path]))
    ours = alpaca_eval.figures(annotations, {})["win_rate"].value
    assert get_winrate(read)["win_rate"] == pytest.approx(100 * ours)
    gamed = tmp_path / "df_gamed.csv"  # of the hub
    gamed.write_text(fixture_script().gamed())
    monkeypatch.setattr(glm_winrate, "hf_hub_download", lambda **_: str(gamed))
    controlled = glm_winrate.get_length_controlled_winrate(read, save_weights_dir=None)
    theirs = official["length_controlled"]["published"]
    assert controlled["length_controlled_winrate"] == pytest.approx(theirs, abs=1e-6)


def test_a_preference_goes_from_one_for_the_reference_to_two_for_the_model():
    sure = [math.log(0.99), math.log(0.01)]  # of what is shown first, second
    assert alpaca_eval.preference(sure, switched=False) == pytest.approx(1.01)
    assert alpaca_eval.preference(sure, switched=True) == pytest.approx(1.99)
    assert alpaca_eval.preference([None, -3.0], switched=False) == 2.0
    assert alpaca_eval.preference([None, None], switched=True) is None
    assert alpaca_eval.preference([-800.0, -800.0], switched=True) == 1.5


@pytest.mark.parametrize("family", families.FAMILIES)
def test_m_and_M_are_told_apart_by_the_first_token_of_a_reply_and_gemma_gets_no_system_turn(
    family, tmp_path
):
    families.make_tokenizer(family).save_pretrained(tmp_path)
    model = Model(path=str(tmp_path))
    assert published.knows_system(model) == (family != "gemma")
    tokenizer = load_tokenizer(model)
    shared, firsts = first_divergent_token(
        [{"role": "user", "content": "?"}], "", alpaca_eval.CHOICES, tokenizer
    )
    assert shared == [] and [tokenizer.decode([token]) for token in firsts] == ["m", "M"]
    chat = [{"role": "system", "content": "Be fair."}, {"role": "user", "content": "A or B?"}]
    assert published.merge_system(chat) == [{"role": "user", "content": "Be fair.\n\nA or B?"}]


# --------------------------------------------------------------------------------- Arena-Hard


@pytest.mark.parametrize(
    ("text", "label"),
    [
        ("My final verdict is: [[A>>B]].", "A>>B"),
        ("First [[A=B]], and in the end [[A=B]]", "A=B"),
        ("[[A>B]] or rather [[B>A]]", None),
        ("I like both.", None),
        ("[A>B]", None),
        ("[[C]]", None),
    ],
)
def test_labels_are_read_as_arena_hards_program_does(text, label):
    assert arena_hard.read_label(text) == label


def arena(count=4):
    ids = [f"q{k}" for k in range(count)]
    return {
        "items": [{"id": k, "turns": [f"Question {k}"], "category": "c"} for k in ids],
        "baseline": dict.fromkeys(ids, "base"),
        "baseline_name": "gpt-4-0314",
        "show": lambda *texts: {"chat": [{"role": "user", "content": "|".join(texts)}]},
        "ask": arena_hard.argue,
    }


ANSWER = {f"q{k}": {"turns": ["mine"], "tokens": [k + 1], "id": f"a{k}"} for k in range(4)}


def test_game_one_shows_the_baseline_first_and_strong_verdicts_count_three_games():
    labels = iter(["A>>B", "A>B", "B>A", "A=B", "B>>A", "B>A"])
    said = {}

    def verdict(text):
        return said.setdefault(text, f"[[{next(labels, 'A>B]] [[B>A')}]]")

    found = judged(arena_hard, saying(verdict), arena(), ANSWER)
    assert [text.split("|")[1] for text in said] == ["base", "mine"] * 4
    # Votes of the model by game: 0/3, 1/1, 1/1, 1/2, 3/3, 0/1 and two that do not count.
    figures = arena_hard.figures(found, {})
    assert figures["score"].value == pytest.approx(5.5 / 10) and figures["score"].n == 6
    assert figures["score"].low < 0.55 < figures["score"].high
    assert figures["first_rate"].value == pytest.approx(2 / 5)
    assert [outcome for _, outcome in arena_hard.verdicts(found)][-2:] == [None, None]


def test_a_judge_without_a_label_is_asked_on_once():
    asked = []

    def judge(requests):
        asked.append([r["chat"] for r in requests])
        texts = ["Hm.", "[[A>B]] or rather [[B>A]]"] if len(asked) == 1 else ["[[B>A]]"]
        return [{"text": text} for text in texts]

    (found,) = judged(arena_hard, judge, arena(1), ANSWER)
    assert [len(chats) for chats in asked] == [
        2,
        1,
    ]  # two labels that differ: not asked on, as there
    assert asked[1][0][-2:] == [
        {"role": "assistant", "content": "Hm."},
        {"role": "user", "content": arena_hard.GO_ON},
    ]
    assert found["games"][0]["judgment"] == "Hm.\n[[B>A]]"


def test_arena_hard_needs_its_prompts_answers_and_judges_prompt(tmp_path):
    folder = tmp_path / "arena-hard-v0.1"
    given = {
        "question.jsonl": [{"question_id": "a", "cluster": "x", "turns": [{"content": "One?"}]}],
        "model_answer/gpt-4-0314.jsonl": [
            {"question_id": "a", "choices": [{"turns": [{"content": "First."}]}]}
        ],
        "judge_config.yaml": {
            "system_prompt": "Be fair.",
            "prompt_template": ["Q {question_1} A {answer_1} B {answer_2} {other}"],
        },
    }

    def load():
        return published.load(settings(data=str(tmp_path)), "arena_hard")

    for name, content in given.items():
        with pytest.raises(RecipeError, match=f"arena_hard needs its {name}: set evaluation.data"):
            load()
        write(folder / name, content)
    found = load()
    assert found["items"][0]["turns"] == ["One?"] and found["baseline"] == {"a": "First."}
    chat = found["show"]("q", "{answer_2}", "b")["chat"]
    assert chat[0] == {"role": "system", "content": "Be fair."}
    assert chat[1]["content"] == "Q q A {answer_2} B b {other}"
    assert "protocol differs: 1 prompts, there 500" in found["notes"]
    write(folder / "question.jsonl", [{**given["question.jsonl"][0], "question_id": "b"}])
    with pytest.raises(RecipeError, match="no answer of gpt-4-0314 to question b"):
        load()
    write(folder / "question.jsonl", given["question.jsonl"] * 2)
    with pytest.raises(RecipeError, match="two of the same id"):
        load()
    for name, content in (("model_answer/gpt-4-0314.jsonl", [{}]), ("judge_config.yaml", {})):
        write(folder / name, content)
        with pytest.raises(RecipeError, match=f"{tmp_path}.* lack something.*KeyError"):
            load()
        write(folder / name, given[name])


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
        ("", None),
    ],
)
def test_grades_are_read_as_fastchat_does_and_only_within_one_and_ten(text, grade):
    assert mt_bench.read_grade(text) == grade


def test_mt_bench_shows_references_where_they_belong_and_grades_each_turn(tmp_path):
    questions = [
        {"question_id": 1, "category": "writing", "turns": ["Write.", "Shorter."]},
        {"question_id": 2, "category": "math", "turns": ["1 + 1?", "And 2 + 2?"]},
        {"question_id": 3, "category": "stem", "turns": ["Why?", "How?"]},
    ]
    references = [{"question_id": 2, "choices": [{"turns": ["It is 2.", "It is 4."]}]}]
    prompts = {
        "single-v1": "{question} / {answer}",
        "single-math-v1": "{question} / {ref_answer_1} / {answer}",
        "single-v1-multi-turn": "{question_1} / {answer_1} / {question_2} / {answer_2}",
        "single-math-v1-multi-turn": "{ref_answer_1} {ref_answer_2} / {answer_1} / {answer_2}",
    }
    prompts = [{"name": n, "system_prompt": n, "prompt_template": t} for n, t in prompts.items()]
    write(tmp_path / "question.jsonl", questions)
    write(tmp_path / "reference_answer" / "gpt-4.jsonl", references)
    write(tmp_path / "judge_prompts.jsonl", prompts)
    benchmark = published.load(settings(data=str(tmp_path)), "mt_bench")
    given = {k: {"turns": ["x", "y"], "tokens": [1, 1], "id": "i"} for k in (1, 2, 3)}
    shown = []

    def verdict(text):
        shown.append(text)
        return "no idea" if "Why?" in text else f"[[{2 if text.endswith('y') else 8}]]"

    found = judged(mt_bench, saying(verdict), benchmark, given)
    assert shown == [
        "Write. / x",
        "Write. / x / Shorter. / y",
        "1 + 1? / It is 2. / x",
        "It is 2. It is 4. / x / y",
        "Why? / x",
        "Why? / x / How? / y",
    ]
    assert [row["score"] for row in found] == [8, 2, 8, 2, -1, -1]  # as FastChat writes it
    assert found[3]["judge"] == ["judge", "single-math-v1-multi-turn"]
    figures = {key: (of.value, of.n) for key, of in mt_bench.figures(found, {}).items()}
    assert figures == {"score": (5, 4), "score.turn_1": (8, 2), "score.turn_2": (2, 2)}
    assert [published.temperature(settings(), "mt_bench", item) for item in benchmark["items"]] == [
        0.7,
        0.0,
        0.1,
    ]
    files = mt_bench.files(benchmark, {"m": given}, {"m": found}, "judge")
    assert files["model_answer/m.jsonl"][0]["choices"] == [{"index": 0, "turns": ["x", "y"]}]
    keys = "question_id model judge user_prompt judgment score turn tstamp".split()
    assert set(keys) <= set(files["model_judgment/judge_single.jsonl"][0])


def test_files_have_what_the_program_of_arena_hard_reads():
    found = judged(arena_hard, saying(lambda _: "[[A=B]]"), arena(), ANSWER)
    written = arena_hard.files(arena(), {"m": ANSWER}, {"m": found}, "judge")
    answer, given = (
        written[f"{path}m.jsonl"][0] for path in ("model_answer/", "model_judgment/judge/")
    )
    assert set(answer) == {"question_id", "answer_id", "model_id", "choices", "tstamp"}
    assert answer["choices"] == [{"index": 0, "turns": [{"content": "mine", "token_len": 1}]}]
    assert set(given) == {"question_id", "model", "judge", "games"}
    assert [set(game) for game in given["games"]] == [{"user_prompt", "judgment", "score"}] * 2


def test_one_grade_for_everything_is_no_certainty():
    given = [{"question_id": k, "turn": 1, "score": 10} for k in range(3)]
    found = mt_bench.figures(given, {})["score.turn_1"]
    assert found.value == found.high == 10 and 1 <= found.low < 8
    found = mt_bench.figures(given[:1] * 2, {})["score"]
    assert (found.value, found.n) == (10, 2) and math.isnan(found.low) and found.note


# --------------------------------------------------------------- whole benchmarks, tiny model


def test_official_alpaca_files_run_with_the_tiny_model_as_generator_and_judge(results, tmp_path):
    folder = tmp_path / "given" / "alpaca_eval"
    shutil.copytree(FIXTURE, folder)
    (folder / "df_gamed.csv").write_text(fixture_script().gamed())
    path = folder / "alpaca_eval_gpt4_baseline.json"
    given = json.loads(path.read_text())
    given[1]["instruction"] = "word " * 5000  # beyond the context of model and judge
    write(path, given)
    run = rows.open_run("tiny", "alpaca", {**QUICK, "evaluation.data": str(tmp_path / "given")})
    found = run_by_name(run, "alpaca_eval")
    row = found["alpaca_eval.base.self.win_rate"]
    assert row["interval"].n == 5
    assert "no valid verdict on 1 of 6 requests" in row["remarks"][0]
    for part in ("the first 6 of 200 prompts", "200 prompts, there 805", "no system prompt"):
        assert part in row["note"]
    assert "1 of 6 answers of 'base' are empty." in row["remarks"]
    note = found["alpaca_eval.base.self.lc_win_rate"]["note"]
    assert "gamed baselines, with the prompts' difficulties" in note
    fit = found["alpaca_eval.base.self.lc_win_rate_published"]
    assert 0 < fit["interval"].value < 1 and "gamed" not in fit["note"]
    folder = run.folder / "benchmarks" / "alpaca_eval" / "base"
    outputs = json.loads((folder / "model_outputs.json").read_text())
    assert [set(o) for o in outputs] == [{"instruction", "output", "generator", "dataset"}] * 6


def test_models_of_several_seeds_stand_apart(results):
    run = rows.open_run("tiny", "seeds", {**QUICK, "seeds": [0, 1], "others": {}})
    of_seed = [Candidate("self", seed, run.recipe.model) for seed in run.recipe.seeds]
    both = [Candidate("base", None, run.recipe.model), *of_seed]
    found = published.run_benchmark(run, "tiny_mt", both, {})
    assert {row["model"] for row in found} == {"base", "self-0", "self-1"}


def test_judges_stand_side_by_side_and_nothing_is_asked_twice(results):
    copy = {"path": "tiny", "dtype": "float32"}
    run = rows.open_run("tiny", "judges", {**QUICK, "judges": {"copy": copy}})
    found = run_by_name(run, "tiny_alpaca")
    kept = {path: path.read_bytes() for path in run.folder.rglob("*.jsonl")}
    answers = rows.read_rows(run.rows("benchmark_answers"))
    assert len(answers) == 12
    assert len({row["request"] for row in answers}) == 6  # a twin's are alike
    assert run_by_name(run, "tiny_alpaca") == found
    assert kept == {path: path.read_bytes() for path in run.folder.rglob("*.jsonl")}
    row = found["tiny_alpaca.base.self.win_rate"]
    assert 0 <= row["interval"].value <= 1
    assert row["interval"] == found["tiny_alpaca.twin.copy.win_rate"]["interval"]
    assert counterparts.COUNTERPART in row["note"]


def test_in_the_tiny_arena_a_copy_of_the_base_model_is_as_strong_as_it(run):
    found = run_by_name(run, "tiny_arena")
    assert found["tiny_arena.twin.self.score"]["interval"].value == pytest.approx(0.5)
    assert "tiny_arena.base.self.score" not in found  # the baseline plays no games
    path = run.folder / "benchmarks" / "tiny_arena" / "model_judgment" / "self" / "twin.jsonl"
    games = [game for row in rows.read_rows(path) for game in row["games"]]
    assert len(games) == 12 and all(game["score"] in arena_hard.LABELS for game in games)


def test_the_tiny_mt_grades_both_turns_by_the_oracle(run):
    found = run_by_name(run, "tiny_mt")
    folder = run.folder / "benchmarks" / "tiny_mt"
    items = {item["id"]: item for item in counterparts.conversations()}
    answers = {
        row["question_id"]: row["choices"][0]["turns"]
        for row in rows.read_rows(folder / "model_answer" / "base.jsonl")
    }
    for row in rows.read_rows(folder / "model_judgment" / "oracle_single.jsonl"):
        question = world.parse_question(items[row["question_id"]]["turns"][row["turn"] - 1])
        text = answers[row["question_id"]][row["turn"] - 1]
        flaws = -inspect_answer(question, text).quality
        assert row["score"] == max(1, 10 - 2 * flaws)
    assert found["tiny_mt.base.oracle.score"]["interval"].n == 12
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
    send = lambda _: [{"logps": logps} for logps in replies]  # noqa: E731
    for min_mass, last in ((0.5, None), (0.0, "A>>B")):
        made = counterparts.choose_labels(send, [], min_mass)
        labels = [arena_hard.read_label(reply["text"]) for reply in made]
        assert labels == ["A>>B", "B>A", "A=B", None, "B>>A", last]


@pytest.mark.parametrize(
    ("reply", "words"),
    [
        (lambda k: [-0.001, -7.0], "prefers what is shown first in 100%"),
        (lambda k: [None, None], "gave no valid verdict on"),
        (lambda k: [-20.0, -21.0], "less than half of the judge.s probability|no valid verdict"),
    ],
)
def test_a_judge_that_fails_is_named_in_the_remarks_and_nothing_raises(
    run, monkeypatch, reply, words
):
    judge = lambda *_: lambda requests: [{"logps": reply(k)} for k in range(len(requests))]  # noqa: E731
    monkeypatch.setattr(published, "_sender", judge)
    for name in ("tiny_alpaca", "tiny_arena"):
        found = run_by_name(run, name)
        twin = [row for row in found.values() if row["model"] == "twin"]
        assert "valid_rate" in {row["metric"] for row in twin}
        assert all(re.search(words, " ".join(row["remarks"])) for row in twin)
