"""The benchmarks' own programs and real files against ours; docs/evaluation.md says how to run it.

Nothing of theirs is part of the kit: SAO_OFFICIAL names a folder with checkouts of alpaca_eval,
arena-hard-auto and FastChat at the commits of `benchmark_files.PINNED`. Without it all is skipped.
"""

import csv
import hashlib
import importlib
import json
import os
import random
import re
import shutil
import subprocess
import sys
import types
from collections import Counter
from pathlib import Path

import pytest

from sao_utils import store as rows
from sao_utils.evaluation import alpaca_eval, arena_hard, mt_bench
from sao_utils.evaluation import benchmarks as published
from sao_utils.evaluation.benchmark_files import BENCHMARKS, OFFICIAL, PINNED
from sao_utils.methods import evaluate, sao
from sao_utils.recipes import load_recipe

PLACE = Path(os.environ.get("SAO_OFFICIAL", "no such folder"))
#: A Python with the packages of arena-hard-auto's requirements.txt, and numpy < 2.
PYTHON = os.environ.get("SAO_OFFICIAL_PYTHON", sys.executable)
FROM_HUB = ("df_gamed.csv",)  # in no checkout: PLACE/hub, if at all
pytestmark = pytest.mark.skipif(not PLACE.is_dir(), reason="SAO_OFFICIAL names no folder")
ODD = 'He said: {answer_1} \\n {"a": {}} [[A>B]] <|im_end|> é'  # an answer that may trip a template


def place_of(benchmark: str, name: str) -> Path:
    if name in FROM_HUB:
        return PLACE / "hub" / name
    if name == "alpaca_eval_gpt4_baseline.json":  # the hub's file, byte by byte
        return PLACE / "alpaca_eval/results/gpt4_1106_preview/model_outputs.json"
    repository, path = re.fullmatch(
        r"https://raw\.githubusercontent\.com/[^/]+/([^/]+)/[0-9a-f]{40}/(.*)",
        PINNED[benchmark, name][0],
    ).groups()
    return PLACE / repository / path


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """The real files in the folders that `evaluation.data` takes."""
    folder = tmp_path_factory.mktemp("official")
    for benchmark, name in PINNED:
        to, source = folder / OFFICIAL[benchmark] / name, place_of(benchmark, name)
        if source.is_file() or name not in FROM_HUB:
            to.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(source, to)
    return folder


@pytest.fixture
def program(monkeypatch):
    """Imports a module of a program; packages that it would only call a server with are empty."""
    there = set(sys.modules)

    def load(repository, module, **stubs):
        monkeypatch.syspath_prepend(str(PLACE / repository))
        for name, stub in stubs.items():
            monkeypatch.setitem(sys.modules, name.replace("__", "."), stub)
        return importlib.import_module(module)

    yield load
    for name in set(sys.modules) - there:
        if name.split(".")[0] in ("fastchat", "alpaca_eval", "utils", "gen_judgment"):
            del sys.modules[name]


def alpaca_evals(program, module):
    """A module of alpaca_eval, without all that the package imports."""
    package = types.ModuleType("alpaca_eval")
    package.__path__ = [str(PLACE / "alpaca_eval/src/alpaca_eval")]
    stubs = {"alpaca_eval": package, "pkg_resources": types.ModuleType("pkg_resources")}
    return program("alpaca_eval/src", f"alpaca_eval.{module}", **stubs)


def settings(data, **keys):
    overrides = {f"evaluation.{key}": value for key, value in keys.items()}
    return load_recipe("tiny", {"evaluation.data": str(data), **overrides}).evaluation


# --------------------------------------------------------------------------- the real files


@pytest.mark.parametrize(("benchmark", "name"), PINNED)
def test_the_real_file_is_the_pinned_one(benchmark, name):
    path = place_of(benchmark, name)
    if name in FROM_HUB and not path.is_file():
        pytest.skip("lies on the hub only")
    assert hashlib.sha256(path.read_bytes()).hexdigest() == PINNED[benchmark, name][1]


@pytest.mark.parametrize("name", OFFICIAL)
def test_the_real_benchmark_is_loaded_whole(name, data):
    protocol, of = published.PROTOCOLS[name], BENCHMARKS[name]
    loaded = published.load(settings(data, max_new_tokens=of.get("max_tokens", 1)), name)
    assert len(loaded["items"]) == of["prompts"] and not loaded["notes"]
    if protocol is mt_bench:
        assert {len(item["turns"]) for item in loaded["items"]} == {2}
        categories = Counter(item["category"] for item in loaded["items"])
        assert categories == dict.fromkeys(of["temperature"], 10)
        for item in loaded["items"]:
            wanted = 2 if item["category"] in mt_bench.WITH_REFERENCE else None
            assert (item["reference"] and len(item["reference"])) == wanted
    else:
        assert loaded["baseline_name"] == getattr(protocol, "BASELINE", alpaca_eval.REFERENCE)
        assert all(loaded["baseline"][item["id"]].strip() for item in loaded["items"])


# ------------------------------------------------------------------- what the judge is shown


def test_alpaca_evals_program_shows_its_judge_what_we_show(data, program):
    import pandas

    loaded = alpaca_eval.load(settings(data))
    utils = alpaca_evals(program, "utils")
    template = (data / "alpaca_eval/alpaca_eval_clf.txt").read_text()
    given = [
        {"instruction": i["turns"][0], "output_1": loaded["baseline"][i["id"]], "output_2": answer}
        for i in loaded["items"]
        for answer in ("Yes.", ' {"a": {}} é\n')
    ]
    theirs, _ = utils.make_prompts(pandas.DataFrame(given), template)
    for row, prompt in zip(given, theirs, strict=True):
        assert loaded["show"](*row.values())["chat"] == utils.prompt_to_chatml(prompt)


def test_arena_hards_program_shows_its_judge_what_we_show_and_reads_the_same_labels(
    data, program, tmp_path, monkeypatch
):
    gen = program("arena-hard-auto", "gen_judgment")
    configs = gen.make_config(str(PLACE / "arena-hard-auto/config/judge_config.yaml"))
    said = ["I. [[B>A]]", "Hm.", "So: [[A=B]]", "[[A>>B]]", "[[A>B]] or [[B>A]]", "Hm.", "Hm."]
    loaded = arena_hard.load(settings(data))
    raw, base = (
        {row["question_id"]: row for row in map(json.loads, open(data / "arena-hard-v0.1" / name))}
        for name in ("question.jsonl", "model_answer/gpt-4-0314.jsonl")
    )
    monkeypatch.setattr(gen, "endpoint_info", {"model_name": "m"}, raising=False)
    seen, n = [], 0

    def get_answer(_, conv, temperature, max_tokens, __):
        seen.append([dict(turn) for turn in conv])
        assert (temperature, max_tokens) == (0, arena_hard.VERDICT_TOKENS)
        return said[(len(seen) - 1) % len(said)]

    monkeypatch.setattr(gen, "get_answer", get_answer)
    answers = {"mine": {i["id"]: {"turns": [f"{k} {ODD}"]} for k, i in enumerate(loaded["items"])}}
    for item in loaded["items"]:
        turns = [{"content": answers["mine"][item["id"]]["turns"][0]}]
        gen.judgment(
            question=raw[item["id"]],
            answer={"model_id": "mine", "choices": [{"turns": turns}]},
            reference=None,
            baseline_answer=base[item["id"]],
            configs=configs,
            output_file=str(tmp_path / "theirs.jsonl"),
            regex_pattern=re.compile(configs["regex_pattern"]),
            endpoint_dict=None,
        )
    theirs = [json.loads(line) for line in open(tmp_path / "theirs.jsonl")]
    replies = {json.dumps(chat[:2]): [] for chat in seen}
    for chat, text in zip(seen, (said[k % len(said)] for k in range(len(seen)))):
        replies[json.dumps(chat[:2])].append(text)

    def ask(requests):
        return [{"text": replies[json.dumps(r["chat"][:2])].pop(0)} for r in requests]

    judge = configs["judge_model"]
    ours = published.judge_answers(ask, arena_hard, loaded, answers, judge)["mine"]
    assert len(ours) == len(theirs) == 500
    for mine, their in zip(ours, theirs):
        for game in their["games"]:
            game["judgment"] = game["judgment"].removeprefix("\n")
            n += game["score"] is None
        assert mine == their
    assert n > 100 and not any(replies.values())


def test_fastchats_program_shows_its_judge_what_we_show_and_reads_the_same_grades(
    data, program, monkeypatch
):
    conversation = program("FastChat", "fastchat.conversation")
    adapter = types.ModuleType("fastchat.model.model_adapter")
    adapter.get_conversation_template = lambda _: conversation.get_conv_template("chatgpt")
    adapter.OPENAI_MODEL_LIST, adapter.ANTHROPIC_MODEL_LIST = ("gpt-4",), ()
    stubs = {name: types.ModuleType(name) for name in ("openai", "anthropic", "fastchat.model")}
    stubs["fastchat.model.model_adapter"] = adapter
    stubs = {name.replace(".", "__"): stub for name, stub in stubs.items()}
    common = program("FastChat", "fastchat.llm_judge.common", **stubs)
    gen = program("FastChat", "fastchat.llm_judge.gen_judgment")
    prompts = common.load_judge_prompts(str(data / "mt_bench/judge_prompts.jsonl"))
    references = common.load_model_answers(str(data / "mt_bench/reference_answer"))["gpt-4"]
    judges = gen.make_judge_single("gpt-4", prompts)
    said = ["Good. [[7]]", "Rating: [[8.5]]", "[6]", "none", "[[3]] no, [[4]]"]
    shown = []

    def complete(_, conv, temperature, max_tokens):
        assert (temperature, max_tokens) == (0, mt_bench.VERDICT_TOKENS)
        shown.append(conv.to_openai_api_messages())
        return said[len(shown) % len(said)]

    monkeypatch.setattr(common, "chat_completion_openai", complete)
    loaded = mt_bench.load(settings(data))
    for item in loaded["items"]:
        assert (
            published.temperature(settings(data), "mt_bench", item)
            == common.temperature_config[item["category"]]
        )
        with_reference = item["category"] in common.NEED_REF_CATS
        answer = {"choices": [{"turns": [ODD, f"More: {ODD}"]}]}
        for turn in (1, 2):
            kind = ("math" if with_reference else "default") + "-mt" * (turn == 2)
            grade, user, text = common.run_judge_single(
                {"turns": item["turns"]},
                answer,
                judges[kind],
                references[item["id"]] if with_reference else None,
                multi_turn=turn == 2,
            )
            request = loaded["show"](item, answer["choices"][0]["turns"][:turn])
            assert request["chat"] == shown[-1] and request["chat"][-1]["content"] == user
            assert request["prompt"] == judges[kind].prompt_template["name"]
            ours = mt_bench.read_grade(text)
            assert (-1 if ours is None else ours) == grade
    assert len(shown) == 160


# ------------------------------------------------------------------- figures of real models


def real_annotations():
    """(model, its real annotations with what our figures take, its row of the leaderboard)."""
    folder = PLACE / "alpaca_eval"
    board = folder / "src/alpaca_eval/leaderboards/data_AlpacaEval_2"
    with open(board / f"{alpaca_eval.ANNOTATOR}_leaderboard.csv", newline="") as file:
        published = {row[""]: row for row in csv.DictReader(file)}
    given = json.loads(place_of("alpaca_eval", "alpaca_eval_gpt4_baseline.json").read_text())
    index = {row["instruction"]: k for k, row in enumerate(given)}
    for path in sorted(folder.glob(f"results/*/{alpaca_eval.ANNOTATOR}/annotations.json")):
        model = path.parents[1].name
        if model in published:
            annotations = json.loads(path.read_text())
            for row in annotations:
                row["index"] = index[row["instruction"]]
                row["is_switched_outputs"] = alpaca_eval.is_switched(row["instruction"])
            yield model, annotations, published[model]


def test_figures_of_real_models_are_those_of_alpaca_evals_leaderboard():
    models, verdicts = 0, 0
    for model, annotations, theirs in real_annotations():
        ours = alpaca_eval.figures(annotations, {})["win_rate"]
        assert 100 * ours.value == pytest.approx(float(theirs["win_rate"]), abs=1e-6), model
        assert ours.n == int(theirs["n_total"]), model
        for row in annotations:  # the draw of the order, and the preference from log-probabilities
            said = (row.get("raw_completion") or {}).get("logprobs")
            if said and row["preference"] is not None:
                top = {t["token"]: t["logprob"] for t in said["content"][0]["top_logprobs"]}
                logps = [top.get(choice) for choice in alpaca_eval.CHOICES]
                mine = alpaca_eval.preference(logps, row["is_switched_outputs"])
                assert mine == pytest.approx(row["preference"], abs=1e-6), model
                verdicts += 1
        models += 1
    assert models >= 5 and verdicts > 4000


def test_length_controlled_win_rates_of_real_models_are_those_of_the_leaderboard():
    path = PLACE / "hub" / "df_gamed.csv"
    if not path.is_file():
        pytest.skip("needs the hub's df_gamed.csv in SAO_OFFICIAL/hub")
    import pandas as pd

    gamed = pd.read_csv(path)
    for model, annotations, theirs in real_annotations():
        # The reference is one half there by definition; where rows are missing, prompts are
        # taken by their place among those that are left.
        if (
            model != alpaca_eval.REFERENCE
            and len(annotations) == BENCHMARKS["alpaca_eval"]["prompts"]
        ):
            ours = 100 * alpaca_eval.published_fit(annotations, gamed)
            official = float(theirs["length_controlled_winrate"])
            assert ours == pytest.approx(official, abs=0.1), model


# --------------------------------------------------------- the programs on what a run leaves


@pytest.fixture
def folder(data, results, monkeypatch):
    """Runs a benchmark with real files: the tiny model answers, a judge says any of `texts`."""

    def run(name, texts):
        draw = random.Random(0)
        judge = lambda requests: [{"text": draw.choice(texts)} for _ in requests]  # noqa: E731
        monkeypatch.setattr(published, "_sender", lambda *_: judge)
        overrides = {
            "arms": [],
            "others": {"twin": {"path": "tiny", "dtype": "float32"}},
            "evaluation.benchmark_limit": 40,
            "evaluation.max_new_tokens": 24,
            "evaluation.data": str(data),
        }
        opened = rows.open_run("tiny", "official", overrides)
        judges = evaluate.judges(opened)
        found = published.run_benchmark(opened, name, sao.candidates(opened), judges)
        at = opened.folder / "benchmarks"
        (at / "data").symlink_to(".")
        return at, {(row["model"], row["metric"]): row["interval"] for row in found}

    return run


def show_result(repository, at, *arguments, python=sys.executable):
    program = PLACE / repository / "show_result.py"
    done = subprocess.run(
        [python, str(program), *arguments], cwd=at, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_fastchats_show_result_gives_our_grades(folder):
    texts = ["[[7]]", "[[8.5]]", "Poor. [2]", "[[10]]", "none"]
    at, found = folder("mt_bench", texts)
    said = show_result("FastChat/fastchat/llm_judge", at, "--judge-model", "self")
    sections = re.split(r"#{10} (.*) #{10}", said)[1:]
    for title, metric in (
        ("First turn", "score.turn_1"),
        ("Second turn", "score.turn_2"),
        ("Average", "score"),
    ):
        table = sections[sections.index(title) + 1]
        for model in ("base", "twin"):
            theirs = float(re.search(rf"^{model}\s.*?([\d.]+)$", table, re.MULTILINE)[1])
            assert theirs == pytest.approx(found[model, metric].value)


def test_arena_hards_show_result_gives_our_scores(folder):
    if subprocess.run(
        [PYTHON, "-c", "import plotly, numpy; numpy.NAN"], capture_output=True
    ).returncode:
        pytest.skip("SAO_OFFICIAL_PYTHON names no Python with plotly and numpy < 2")
    texts = [f"Verdict: [[{label}]]" for label in arena_hard.LABELS] + ["none", "[[A>B]] [[B>A]]"]
    at, found = folder("arena_hard", texts)
    said = show_result("arena-hard-auto", at, "--judge-name", "self", python=PYTHON)
    line = r"^(\S+)\s+\| score:\s+([\d.]+).*CI:\s+\(([-\d.]+), ([-\d.]+)\)"
    theirs = {m[0]: [float(x) for x in m[1:]] for m in re.findall(line, said, re.MULTILINE)}
    assert theirs["gpt-4-0314"][0] == 50
    for model in ("base", "twin"):
        score, low, high = theirs[model]
        ours = found[model, "score"]
        assert 100 * ours.value == pytest.approx(score, abs=0.06)
        # Theirs resamples the three games of a strong verdict as if they were three verdicts;
        # ours keeps them together: wider by sqrt(sum w^2 / sum w), here 1.5.
        assert 1.2 < 100 * (ours.high - ours.low) / (high - low) < 2
