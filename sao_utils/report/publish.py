"""What is saved is usable elsewhere: the card of a trained model, and publishing it on the hub.

Nothing here trains, evaluates or generates: a card says what is known of a model that is finished.
What made it is noted once, beside it, when training ends: a recipe may be changed later. To publish
is one explicit call, and it uploads the files of `ADAPTER` or `WHOLE` only, none with a path in it.
"""

from __future__ import annotations

import json
import re
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable
from fnmatch import fnmatch
from pathlib import Path

import yaml

from sao_utils.recipe import Arm
from sao_utils.report.formatting import NOT_COMPARABLE, in_words, unit
from sao_utils.stages.pairs import build_pairs
from sao_utils.stages.prompts import HUB_PERSONAS, write_prompts
from sao_utils.store import Run, versions, write_whole

PAPER = "https://arxiv.org/abs/2510.06652"
#: Files that may leave the machine, of an adapter and of a whole model. Logs, probes, rows and
#: checkpoints are not among them, nor is anything pickled.
ADAPTER = ("README.md", "adapter_config.json", "adapter_model.safetensors")
WHOLE = (
    "README.md",
    "model.safetensors",
    "model-*-of-*.safetensors",
    "model.safetensors.index.json",
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
)
#: Where the embedded model lies in a checkout: what an adapter on it calls its base elsewhere. It is
#: no name that the hub could know, so nobody can put another model there.
TINY = "sao_utils/tiny/model"
BASE_KEYS = ("base_model_name_or_path", "_name_or_path", "name_or_path")
ARMS = {
    "self": "the pairs that the model itself judged",
    "random": "a control: the self-judged pairs with winners drawn by lot",
    "oracle": "for comparison: pairs labelled by the tiny world's exact oracle",
    "sft_random": "a control: supervised fine-tuning on own answers drawn by lot, without judging",
}
#: The sections of a recipe that make a model; the others say how it is looked at.
MAKING = ("model", "personas", "responses", "judging", "pairs", "training")
#: Settings of training that say nothing about the model: how it was watched and kept.
ASIDE = {"checkpoint_minutes", "probe_steps", "probe_prompts", "algorithm", "method"}
#: setting -> the algorithm that it belongs to.
OWN = {
    "beta": "simpo",
    "gamma": "simpo",
    "dpo_beta": "dpo",
    "orpo_lambda": "orpo",
    "learning_rate": "simpo dpo orpo",
    "sft_learning_rate": "sft",
    "share_prompt": "simpo dpo orpo",
}


class PublishError(RuntimeError):
    """A model cannot be published; the message says why and what to do. Nothing was uploaded."""


# ---------------------------------------------------------------------- the card


def write_card(run: Run, arm: Arm, seed: int) -> Path:
    """Write the card of a trained model, README.md in its folder, and note beside it what made it.

    Called at the end of training. Called later it adds the results that there are by then; what made
    the model stays as it was noted, even if the run's recipe has changed since.
    """
    folder = finished(run, arm, seed)
    facts = _facts(run, arm, seed)
    write_whole(folder / "made_with.json", json.dumps(facts, indent=1))
    write_whole(folder / "README.md", _render(run, arm, seed, facts))
    return folder / "README.md"


def card(run: Run, arm: Arm, seed: int) -> str:
    """The model card as text: base model, data, recipe, results, limits, and how to load it.

    Raises:
        PublishError: the model is not trained yet.
    """
    finished(run, arm, seed)
    return _render(run, arm, seed, _facts(run, arm, seed))


def finished(run: Run, arm: Arm, seed: int) -> Path:
    """The folder of a trained model. Raises PublishError when it is not finished."""
    folder = run.folder / "adapters" / f"{arm}-{seed}"
    weights = [*folder.glob("adapter_model.safetensors"), *folder.glob("model*.safetensors")]
    if not (folder / "done.json").is_file() or not weights:
        raise PublishError(
            f"The model '{arm}' of seed {seed} in the run '{run.folder.name}' is not trained yet, or "
            "its training did not finish."
        )
    return folder


def _facts(run: Run, arm: Arm, seed: int) -> dict:
    """What made a model: as noted when it was trained, else from the run as it is now."""
    folder = run.folder / "adapters" / f"{arm}-{seed}"
    done = json.loads((folder / "done.json").read_text(encoding="utf-8"))
    noted = _noted(folder)
    if noted.get("fingerprint") == done["fingerprint"]:
        return noted
    prompts = [row for row in write_prompts(run) if row["seed"] == seed]
    pairs = build_pairs(run, arm, seed)
    return {
        "fingerprint": done["fingerprint"],
        "recipe": run.recipe.model_dump(mode="json"),
        "versions": versions(),
        "pairs": done["pairs"],
        "steps": done["steps"],
        "funnel": [
            ["personas", len(prompts)],
            *_reasons(prompts),
            ["prompts", sum(row["discarded"] is None for row in prompts)],
            *_reasons(pairs),
            ["pairs", sum(row["discarded"] is None for row in pairs)],
        ],
    }


def _noted(folder: Path) -> dict:
    path = folder / "made_with.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _reasons(rows: list[dict]) -> list[list]:
    counts = Counter(row["discarded"] for row in rows if row["discarded"] is not None)
    return [[reason, -count] for reason, count in counts.most_common()]


def _render(run: Run, arm: Arm, seed: int, facts: dict) -> str:
    recipe = facts["recipe"]
    training, model = recipe["training"], recipe["model"]
    algorithm = "sft" if arm == "sft_random" else training["algorithm"]
    full = training.get("method") == "full"
    what = "All weights" if full else "A LoRA adapter"
    parts = [
        _front(model, full, algorithm),
        f"# {what} of {_base_words(model)}, aligned on its own data",
        f"{what}, made with the loop of Self-Alignment Optimization ([arXiv 2510.06652]({PAPER})): the "
        "model plays personas to write prompts, answers each prompt twice, judges its own two "
        f"answers, and is trained on the pairs. This one is the arm `{arm}` ({ARMS[arm]}), seed "
        f"{seed}, of the run `{run.folder.name}`. A model card filled in by a program; nobody has "
        "read the answers one by one.",
        "## Base model",
        _base(model),
        "## Data",
        _data(recipe, arm, facts),
        "## Training",
        _training(training, algorithm, facts),
        "## Results",
        _results(run, arm, seed, recipe),
        "## Limits",
        _limits(model, arm),
        "## How to load it",
        _loading(model, full),
    ]
    return "\n\n".join(parts) + "\n"


def _front(model: dict, full: bool, algorithm: str) -> str:
    """YAML that the hub reads. It refuses a base model that it does not know, such as the tiny one."""
    front = {"library_name": "transformers" if full else "peft", "license": "unknown"}
    front["pipeline_tag"] = "text-generation"
    front["tags"] = ["self-alignment", "sao", algorithm, "self-generated-data"]
    if _kind(model) == "hub":
        front["base_model"] = model["path"]
        front["base_model_relation"] = "finetune" if full else "adapter"
    return "---\n" + yaml.safe_dump(front, sort_keys=False, allow_unicode=True) + "---"


def _kind(model: dict) -> str:
    """Where a base model is: "tiny" (embedded), "folder" of this machine, or "hub"."""
    path = model["path"]
    if path == "tiny":
        return "tiny"
    local = Path(path).exists() or not re.fullmatch(r"[\w.-]+/[\w.-]+", path) or path[0] == "."
    return "folder" if local else "hub"


def _base_words(model: dict) -> str:
    words = {"tiny": "the embedded tiny model", "folder": "a local model", "hub": model["path"]}
    return words[_kind(model)]


def _base(model: dict) -> str:
    kind = _kind(model)
    if kind == "tiny":
        return (
            "The embedded tiny model of the SAO reproduction kit (`sao_utils/tiny/model`, 1.2 million "
            "parameters, MIT), which is not on the hub: it comes with a checkout of the kit."
        )
    if kind == "folder":
        return (
            "A folder of the machine that it was made on; which model it holds is not known here."
        )
    revision = f"revision `{model['revision']}`" if model["revision"] else "no revision was pinned"
    return (
        f"[{model['path']}](https://huggingface.co/{model['path']}), {revision}. Its licence and its "
        "terms of use hold for what is made of it; this card states no licence of its own."
    )


def _data(recipe: dict, arm: Arm, facts: dict) -> str:
    source = recipe["personas"]["source"]
    labels = {
        "self": "its own verdicts, too",
        "oracle": "the labels are the oracle's",
    }.get(arm, "the labels were drawn by lot")
    people = {
        "tiny": "The personas are invented by the tiny world's grammar.",
        "hub": f"The personas are those of [{HUB_PERSONAS}](https://huggingface.co/datasets/"
        f"{HUB_PERSONAS}), CC BY-NC-SA 4.0: see what that means for your use.",
    }.get(source, "The personas are from a file of whoever made it.")
    rows = "\n".join(f"| {_row_label(label, n)} | {n:,} |" for label, n in facts["funnel"])
    return (
        f"{facts['pairs']:,} pairs. Prompts and answers were made by the base model itself, by no "
        f"human and no other model; {labels}. {people}\n\nFrom the personas to the pairs; negative "
        f"counts were left out:\n\n| | rows |\n|---|---|\n{rows}"
    )


def _row_label(label: str, count: int) -> str:
    return label if count >= 0 else f"- {label}"


def _training(training: dict, algorithm: str, facts: dict) -> str:
    """The settings that apply: none of another algorithm, none of LoRA where all weights learn."""
    full = training.get("method") == "full"
    kept = {
        key: value
        for key, value in training.items()
        if key not in ASIDE
        and algorithm in OWN.get(key, algorithm)
        and not (full and key.startswith("lora_"))
    }
    rows = [("algorithm", algorithm), ("method", training.get("method", "lora"))]
    rows += [*kept.items(), ("steps", facts["steps"])]
    made = ", ".join(f"{name} {number}" for name, number in facts["versions"].items())
    table = "\n".join(f"| {key} | {value} |" for key, value in rows)
    return f"| setting | value |\n|---|---|\n{table}\n\nVersions: {made}."


def _results(run: Run, arm: Arm, seed: int, recipe: dict) -> str:
    """The run's results that are about this model, if they belong to it: else that there are none."""
    folder = run.folder / "tables"
    seeds = _evaluated_seeds(run, arm, seed, recipe)
    found = json.loads((folder / "results.json").read_text(encoding="utf-8")) if seeds else {}
    rows = []
    for key, result in found.items():
        judge = _judge(key, arm, seed)
        if judge and result["value"] is not None:
            value = f"{in_words(key, result)} {unit(key)}"
            rows.append(f"| `{key}` | {value} | {result['n']:,} | {judge} |")
    if not rows:
        return "Not evaluated yet."
    head = "| result | value [95 % interval] | n | judge |\n|---|---|---|---|\n"
    told = "Held-out questions; `base` is the model before training."
    if len(seeds) > 1:
        told += (
            f" But for the rows that name a seed, the numbers are over the models of the seeds "
            f"{', '.join(map(str, seeds))}, of which this is one."
        )
    note = f"\n\n{NOT_COMPARABLE}" if recipe["model"]["path"] == "tiny" else ""
    return f"{told}\n\n{head}" + "\n".join(rows) + note


def _evaluated_seeds(run: Run, arm: Arm, seed: int, recipe: dict) -> list[int]:
    """The seeds that the run's results are over, [] unless they are about this model.

    They are if all that makes a model was the same for them, and they were made after it.
    """
    results, made_with = (run.folder / "tables" / name for name in ("results.json", "recipe.yaml"))
    if not results.is_file() or not made_with.is_file():
        return []
    then = yaml.safe_load(made_with.read_text(encoding="utf-8"))
    same = all(then.get(key) == recipe[key] for key in MAKING)
    trained = run.folder / "adapters" / f"{arm}-{seed}" / "done.json"
    after = results.stat().st_mtime >= trained.stat().st_mtime
    return then["seeds"] if same and after and arm in then["arms"] and seed in then["seeds"] else []


def _judge(key: str, arm: Arm, seed: int) -> str | None:
    """Who judged a result; None for one that is not about this model."""
    name = "tuned" if arm == "self" else arm
    gain = "gain" if arm == "self" else f"{arm}_gain"
    own = "" if arm == "self" else rf"\.{arm}"
    oracle = "the tiny world's exact oracle"
    patterns = {
        rf"oracle_good_rate(_t[\d.]+)?\.(base|{name}|{gain}(\.seed{seed})?)": oracle,
        rf"flaw_rate\.\w+\.(base|{name})": oracle,
        rf"self_win_rate(_lc)?{own}(\.seed{seed})?": "the base model itself, both orders",
        rf"answer_length\.(base|{name})": "a count",
    }
    if arm == "self":
        patterns[rf"oracle_good_rate(_t[\d.]+)?\.gain_over_[a-z_]+(\.seed{seed})?"] = oracle
    if arm in ("self", "random"):
        patterns[r"self_judge\.(accuracy|first_position_rate)"] = oracle
    return next((who for pattern, who in patterns.items() if re.fullmatch(pattern, key)), None)


def _limits(model: dict, arm: Arm) -> str:
    lines = []
    if _kind(model) == "tiny":
        lines.append(
            "A toy: it knows the hobbies of an invented village and nothing else. Its numbers show how "
            "the method works and say nothing about large models."
        )
    if arm in ("self", "random", "sft_random"):
        lines.append(
            "The model was its own judge: what it cannot judge, it did not learn, and its biases "
            "(position, length, its own style) may have grown."
        )
    lines += [
        "Not evaluated for safety, truthfulness, or bias against people; no safety training was added.",
        "A research artefact, to study the method. Look at its answers before you use it.",
    ]
    return "\n".join(f"- {line}" for line in lines)


def _loading(model: dict, full: bool) -> str:
    """A code block that needs transformers, and plain peft for an adapter; nothing of this kit."""
    here = 'here = "FOLDER OR NAME OF THIS MODEL"'
    base = {"hub": model["path"], "tiny": TINY, "folder": "FOLDER OF THE BASE MODEL"}[_kind(model)]
    revision = f', revision="{model["revision"]}"' if model["revision"] else ""
    lines = ["from transformers import AutoModelForCausalLM, AutoTokenizer", "", here]
    if full:
        lines += ["model = AutoModelForCausalLM.from_pretrained(here)"]
        lines += ["tokenizer = AutoTokenizer.from_pretrained(here)"]
    else:
        lines.insert(0, "from peft import PeftModel")
        if _kind(model) == "tiny":
            lines.append("# from the root of a checkout of the kit")
        lines += [
            f'base = "{base}"',
            f"model = AutoModelForCausalLM.from_pretrained(base{revision})",
        ]
        lines += ["model = PeftModel.from_pretrained(model, here)"]
        lines += [f"tokenizer = AutoTokenizer.from_pretrained(base{revision})"]
    return "\n".join(["```python", *lines, "```"])


# ---------------------------------------------------------------------- publishing


def contents(run: Run, arm: Arm, seed: int) -> list[Path]:
    """The files of a finished model that publishing uploads, its card first."""
    folder = finished(run, arm, seed)
    names = ADAPTER if (folder / "adapter_model.safetensors").is_file() else WHOLE
    files = [path for path in sorted(folder.iterdir()) if path.is_file()]
    kept = [path for path in files if any(fnmatch(path.name, name) for name in names)]
    return sorted(kept, key=lambda path: path.name != "README.md")


def check_repository(repo: str) -> None:
    """Raises ValueError unless this is how the hub names a repository: user/name."""
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(repo)
        if repo.count("/") != 1:
            raise HFValidationError("the part before or after the '/' is missing")
    except HFValidationError as error:
        raise ValueError(f"--to takes user/name, such as anna/my-adapter; not '{repo}'.") from error


def publish(
    run: Run,
    arm: Arm,
    seed: int,
    repo: str,
    private: bool = True,
    say: Callable[[str], None] = print,
) -> str:
    """Upload a finished model and its card, written anew, to a repository on the Hugging Face hub.

    The token is the one of `hf auth login` or of HF_TOKEN; it is never written. Files are copied to a
    temporary folder first, where the base model's local path is replaced by its name.

    Args:
        repo: "user/name"; made if there is none.
        private: whether only you see it. An existing public repository is then refused.

    Returns:
        The address of the repository.

    Raises:
        ValueError: `repo` is no name of a repository.
        PublishError: not trained, a base model that nobody else has, offline, not logged in, or the
            hub refused; the message says which.
    """
    import huggingface_hub
    from huggingface_hub import constants
    from huggingface_hub.errors import HfHubHTTPError, HTTPError, LocalTokenNotFoundError

    check_repository(repo)
    folder = finished(run, arm, seed)
    done = json.loads((folder / "done.json").read_text(encoding="utf-8"))
    facts = _noted(folder)
    if facts.get("fingerprint") != done["fingerprint"]:
        raise PublishError(
            "It was not noted how this model was made (the training was stopped at its very end, or "
            f"an older version of the kit made it). Run notebook 04 of '{run.folder.name}' again."
        )
    model = facts["recipe"]["model"]
    if _kind(model) == "folder":
        raise PublishError(
            "The base model of this run is a folder on this machine: nobody else could load the "
            "adapter, and the card could not say what it is. Set model.path to the model's name on "
            "the hub and train again, or publish the base model first."
        )
    if constants.HF_HUB_OFFLINE:
        raise PublishError("HF_HUB_OFFLINE=1 is set. Unset it to publish. Nothing was uploaded.")
    write_card(run, arm, seed)
    try:
        with tempfile.TemporaryDirectory() as temporary:
            stage = Path(temporary)
            for path in contents(run, arm, seed):
                _copy(path, stage / path.name, model)
            api = huggingface_hub.HfApi()
            user = api.whoami()["name"]
            url = api.create_repo(repo, private=private, exist_ok=True)
            if private and not api.model_info(repo).private:
                raise PublishError(
                    f"{repo} exists already and is public. Say --public if you mean it, or take "
                    "another name. Nothing was uploaded."
                )
            say(f"Uploading to {repo} as {user} ...")
            message = f"{arm}, seed {seed}, of the run {run.folder.name}"
            api.upload_folder(
                repo_id=repo,
                folder_path=stage,
                allow_patterns=[*ADAPTER, *WHOLE],
                commit_message=message,
            )
    except LocalTokenNotFoundError:
        raise PublishError(_LOGIN) from None
    except HfHubHTTPError as error:
        status = getattr(error.response, "status_code", None)
        if status == 401:
            raise PublishError(_LOGIN) from None
        raise PublishError(f"The hub refused ({status}): {error.server_message or error}") from None
    except (HTTPError, OSError, ValueError) as error:  # no network, or a card that it refuses
        raise PublishError(f"The upload did not finish: {error}") from None
    return str(url)


_LOGIN = (
    "You are not logged in to the hub, or your token is not valid. Run `hf auth login`, or set "
    "HF_TOKEN, with a token that may write. Nothing was uploaded."
)


def _copy(source: Path, target: Path, model: dict) -> None:
    """Copy a file for upload; in a configuration the base model is called by its name.

    Raises:
        PublishError: a path of this machine is left in a configuration.
    """
    if not source.name.endswith("config.json"):
        shutil.copyfile(source, target)
        return
    config = json.loads(source.read_text(encoding="utf-8"))
    for key in BASE_KEYS:
        if key in config:
            config[key] = TINY if _kind(model) == "tiny" else model["path"]
    if "base_model_name_or_path" in config:
        config["revision"] = model["revision"]
    key = _path_in({k: v for k, v in config.items() if k != "added_tokens_decoder"})
    if key:
        raise PublishError(f"{source.name} has a path of this machine under '{key}'.")
    target.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _path_in(value: object, key: str = "") -> str:
    """The key under which a text is an absolute path, "" if there is none."""
    if isinstance(value, dict):
        return next((found for k, v in value.items() if (found := _path_in(v, k))), "")
    absolute = isinstance(value, str) and re.match(r"(/|~/|[A-Za-z]:[\\/])\S", value)
    return key if absolute else ""
