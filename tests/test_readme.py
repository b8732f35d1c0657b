"""What the README says is what the repository holds."""

import json
import re
import shlex
from pathlib import Path

import pytest

from sao_utils.recipes import load_recipe, recipe_names, valid_keys
from sao_utils.report.results import in_words, unit

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
a_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)


def test_each_figure_in_the_readmes_table_is_that_of_the_reference_run():
    stored = json.loads((ROOT / "results/reference/tables/results.json").read_text())
    table = README.split("<!-- reference table -->")[1].split("<!-- end of reference table -->")[0]
    rows = re.findall(r"^\|[^|]*\| ([^|]+) \| ([\d,]+) \| `([^`]+)` \|$", table, re.MULTILINE)
    assert len(rows) >= 10
    for value, n, key in rows:
        assert value == f"{in_words(key, stored[key])} {unit(key)}"
        assert int(n.replace(",", "")) == stored[key]["n"]


@a_page
def test_links_to_files_of_the_repository_lead_somewhere(page):
    for target in re.findall(r"\]\((?!http)([^)#]+)", page.read_text("utf-8")):
        assert (page.parent / target).exists(), target


@a_page
def test_each_key_that_a_page_names_is_one_of_the_recipes(page):
    sections = {key.split(".")[0] for key in valid_keys() if "." in key}
    named = re.findall(r"`(?:--set )?([a-z]+\.[a-z_]+)(?:[=:][^`]*)?`", page.read_text("utf-8"))
    for key in named:
        if key.split(".")[0] in sections and not key.endswith((".md", ".yaml")):
            assert key in valid_keys(), key


@a_page
def test_each_recipe_and_setting_in_a_pages_commands_loads(page, tmp_path):
    text = page.read_text("utf-8")
    for number, block in enumerate(
        re.findall(r"^```yaml\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    ):
        (tmp_path / f"{number}.yaml").write_text(block)
        load_recipe(str(tmp_path / f"{number}.yaml"))
    for line in re.findall(r"^\.venv/bin/sao (.*)$", text, re.MULTILINE):
        words = shlex.split(line)
        settings = [words[k + 1] for k, word in enumerate(words) if word == "--set"]
        for k, word in enumerate(words):
            if word == "--recipe" and words[k + 1] in recipe_names():
                load_recipe(words[k + 1], dict(setting.split("=", 1) for setting in settings))
            elif word == "--recipe":
                assert words[k + 1].endswith(".yaml")


def test_the_reference_run_keeps_tables_and_figures_only_and_no_large_file():
    kept = [p for p in (ROOT / "results/reference").rglob("*") if p.is_file()]
    ignored = ("rows", "adapters", "notebooks", "variants", "benchmarks")
    for path in kept:
        if path.relative_to(ROOT / "results/reference").parts[0] not in ignored:
            assert path.stat().st_size < 1_000_000, path


def test_the_claim_holds_in_the_reference_run():
    stored = json.loads((ROOT / "results/reference/tables/results.json").read_text())
    gain, over = (stored[f"oracle_good_rate.gain{k}"] for k in ("", "_over_sft_random"))
    assert gain["value"] >= 0.10 and gain["low"] > 0 and gain["n"] >= 3 * 800
    assert over["value"] >= 0.05 and over["low"] > 0
    # Random labels: far less than the model's own labels; when sampling, no gain to be told from none.
    assert stored["oracle_good_rate.gain_over_random"]["low"] >= 0.10
    assert stored["oracle_good_rate.random_gain"]["high"] < gain["low"] / 2
    assert stored["oracle_good_rate_t0.6.random_gain"]["low"] <= 0
