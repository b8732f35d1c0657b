"""What models are asked for evaluation: sets of questions, and the users' files they come from."""

from __future__ import annotations

import csv
import gzip
import json
import zlib
from collections.abc import Callable, Iterator
from importlib.resources import files
from pathlib import Path

from sao_utils.recipe import Evaluation, RecipeError
from sao_utils.rows import Run, row_id
from sao_utils.tiny import world

QUESTION_SEED = {"test": 4242, "dev": 2424}  # the same questions in every run


def _held_out(split: str) -> Callable[[Evaluation], list[str]]:
    return lambda settings: world.held_out_questions(
        split, settings.per_combination, QUESTION_SEED[split]
    )


def _first_turns(benchmark: str) -> Callable[[Evaluation], list[str]]:
    return lambda settings: [item["turns"][0] for item in official_questions(settings, benchmark)]


#: name of a set -> its questions, given the recipe's section "evaluation". Add a set here.
SETS: dict[str, Callable[[Evaluation], list[str]]] = {
    **{split: _held_out(split) for split in QUESTION_SEED},
    "everyday": lambda _: _everyday(),
    **{name: _first_turns(name) for name in ("alpaca_eval", "arena_hard", "mt_bench")},
}


def _everyday() -> list[str]:
    """A few plain prompts of our own for any model: a look at it, no benchmark."""
    text = (files("sao_utils") / "prompts" / "everyday.txt").read_text(encoding="utf-8")
    return text.splitlines()


def questions(run: Run, source: str | None = None) -> list[dict]:
    """The evaluation questions: rows {id, question, combination}.

    `source`, by default `evaluation.questions` of the recipe, is the name of one of `SETS`, or a
    .jsonl or .csv file with a column "prompt". `combination` is what intervals are clustered by: of
    the tiny world the hobby and the asked things, of others the question itself.

    Raises:
        RecipeError: neither a set nor a file that `read_column` can read.
    """
    settings = run.recipe.evaluation
    source = source or settings.questions
    if source not in SETS and not Path(source).is_file():
        there = ", ".join(SETS)
        raise RecipeError(f"'{source}' is no file that is there, and no set of questions: {there}.")
    texts = SETS[source](settings) if source in SETS else read_column(source, "prompt")
    return [
        {"id": row_id("question", k, text), "question": text, "combination": cluster(text)}
        for k, text in enumerate(texts)
    ]


def cluster(prompt: str) -> str:
    """What an interval is clustered by: the question's combination, else the prompt itself."""
    question = world.parse_question(prompt)
    return " ".join((question.hobby, *question.combination[1])) if question else prompt


def evaluated_prompts(run: Run) -> list[str]:
    """All that the run's evaluation asks: its questions, and every turn of published benchmarks.

    What to keep out of training. lm-eval's tasks are not among it.

    Raises:
        RecipeError: see `questions` and `official_questions`.
    """
    settings = run.recipe.evaluation
    turns = (
        turn
        for name in settings.benchmarks
        if name in OFFICIAL
        for item in official_questions(settings, name)
        for turn in item["turns"]
    )
    return list(dict.fromkeys([*(row["question"] for row in questions(run)), *turns]))


# --------------------------------------------------------------------- a user's files


def read_table(source: str) -> list[dict]:
    """The rows of a .jsonl or .csv file (also .gz), as they are.

    Raises:
        RecipeError: the file is missing, of another kind, damaged, or has a line that is no row.
    """
    return list(_rows_of(source))


def _rows_of(source: str) -> Iterator[dict]:
    path = Path(source)
    kind = Path(path.name.removesuffix(".gz")).suffix
    if kind not in (".jsonl", ".csv") or not path.is_file():
        raise RecipeError(f"'{source}' is no .jsonl or .csv file (or .gz of one) that is there.")
    unpack = gzip.open if path.suffix == ".gz" else open
    try:  # Excel begins a CSV with a mark, hence "sig"
        with unpack(path, "rt", encoding="utf-8-sig", newline="") as file:
            if kind == ".csv":
                yield from csv.DictReader(file)
            else:
                lines = enumerate(file, 1)
                yield from (_read_line(line, k, source) for k, line in lines if line.strip())
    except (UnicodeDecodeError, csv.Error, EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise RecipeError(f"{source} is damaged, or no UTF-8 text: {error}.") from None


def read_column(source: str, column: str) -> list[str]:
    """The non-empty texts of one column of a .jsonl or .csv file (also .gz), stripped.

    Only the texts are held in memory: files may have millions of rows.

    Raises:
        RecipeError: see `read_table`; or there is no such column, or a row has no text in it.
    """
    values = [row.get(column) for row in _rows_of(source)]
    if not any(values):
        raise RecipeError(f"{source} has no column '{column}' with text in it.")
    texts = [value.strip() if isinstance(value, str) else "" for value in values]
    if not all(texts):
        k = texts.index("")
        fault = "holds no text" if values[k] and not isinstance(values[k], str) else "is empty"
        raise RecipeError(f"{source}: row {k + 1}: '{column}' {fault}. Correct or remove it.")
    return texts


def _read_line(line: str, number: int, source: str) -> dict:
    try:
        row = json.loads(line)
    except ValueError:
        row = None
    if not isinstance(row, dict):
        raise RecipeError(f"{source}, line {number} is no JSON object.")
    return row


# --------------------------------------------------------------------- published benchmarks

#: benchmark -> its folder beside others, as its own program names it.
OFFICIAL = {"alpaca_eval": "alpaca_eval", "arena_hard": "arena-hard-v0.1", "mt_bench": "mt_bench"}
#: (benchmark, file) -> where the hub has it: repository, its kind, path, revision.
HUB = {
    **{
        ("alpaca_eval", name): ("tatsu-lab/alpaca_eval", "dataset", name, None)
        for name in (
            "alpaca_eval_gpt4_baseline.json",
            "instruction_difficulty.csv",
            "df_gamed.csv",
        )
    },
    **{
        ("arena_hard", name): (
            "lmarena-ai/arena-hard-auto",
            "dataset",
            f"data/arena-hard-v0.1/{name}",
            "15f3746e21432264ce9b453999bde4f3c946d2e6",
        )
        for name in ("question.jsonl", "model_answer/gpt-4-0314.jsonl")
    },
    ("mt_bench", "question.jsonl"): (
        "lmsys/mt-bench",
        "space",
        "data/mt_bench/question.jsonl",
        None,
    ),
}


def official_file(settings: Evaluation, benchmark: str, name: str) -> Path | None:
    """A file of a published benchmark; None where there is none.

    The benchmarks are other people's texts and no part of this kit. With `evaluation.data: hub` a
    file comes from the hub (`HUB`), else from the folder that it names: from its subfolder
    `OFFICIAL[benchmark]`, or from itself.

    Raises:
        RecipeError: the hub has the file, but could not be reached.
    """
    if settings.data is None:
        return None
    if settings.data != "hub":
        folder = Path(settings.data)
        places = (folder / OFFICIAL[benchmark] / name, folder / name)
        return next((path for path in places if path.is_file()), None)
    if (benchmark, name) not in HUB:
        return None
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    repository, kind, path, revision = HUB[benchmark, name]
    try:
        return Path(hf_hub_download(repository, path, repo_type=kind, revision=revision))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise RecipeError(
            f"Could not get {path} of {repository} from the hub ({type(error).__name__}). Download it "
            f"where there is a network, and set evaluation.data to a folder with {name} in it."
        ) from None


def official_rows(settings: Evaluation, benchmark: str, name: str) -> list[dict] | None:
    """The rows of a benchmark's .json or .jsonl file; None where there is no such file.

    Raises:
        RecipeError: the file is no list of JSON objects.
    """
    path = official_file(settings, benchmark, name)
    if path is None:
        return None
    if path.suffix == ".jsonl":
        return read_table(str(path))
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        rows = None
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise RecipeError(f"{path} is no list of JSON objects.")
    return rows


def official_questions(settings: Evaluation, benchmark: str) -> list[dict]:
    """A benchmark's questions, in its order: rows {id, turns [text, ...], category} and its own keys.

    Raises:
        RecipeError: the file is not there (the message says what to give), or not the benchmark's.
    """
    name = "alpaca_eval_gpt4_baseline.json" if benchmark == "alpaca_eval" else "question.jsonl"
    rows = official_rows(settings, benchmark, name)
    if rows is None:
        raise RecipeError(
            f"{benchmark} needs its {name}: set evaluation.data to a folder that has it (in "
            f"{OFFICIAL[benchmark]}/, if it is for several benchmarks), or to hub."
        )
    found = []
    for k, row in enumerate(rows):
        if benchmark == "alpaca_eval":
            turns, identity, category = [row.get("instruction")], k, row.get("dataset")
        else:  # Arena-Hard has had two forms: turns with content, and one prompt
            turns = row.get("turns", [row.get("prompt")])
            turns = [turn["content"] if isinstance(turn, dict) else turn for turn in turns]
            identity = row.get("question_id", row.get("uid"))
            category = row.get("cluster" if benchmark == "arena_hard" else "category")
        if identity is None or not turns or not all(isinstance(turn, str) for turn in turns):
            raise RecipeError(f"{name} of {benchmark}, row {k + 1} is no question of it.")
        found.append({**row, "id": identity, "turns": turns, "category": category or "all"})
    return found
