"""What the README says is what the repository holds."""

import json
import re
from pathlib import Path

from sao_utils.results import in_words, unit

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_each_figure_in_the_readmes_table_is_that_of_the_reference_run():
    stored = json.loads((ROOT / "results/reference/tables/results.json").read_text())
    table = README.split("<!-- reference table -->")[1].split("<!-- end of reference table -->")[0]
    rows = re.findall(r"^\|[^|]*\| ([^|]+) \| ([\d,]+) \| `([^`]+)` \|$", table, re.MULTILINE)
    assert len(rows) >= 10
    for value, n, key in rows:
        assert value == f"{in_words(key, stored[key])} {unit(key)}"
        assert int(n.replace(",", "")) == stored[key]["n"]


def test_links_to_files_of_the_repository_lead_somewhere():
    for target in re.findall(r"\]\((?!http)([^)#]+)", README):
        assert (ROOT / target).exists(), target


def test_the_reference_run_keeps_tables_and_figures_only_and_no_large_file():
    kept = [p for p in (ROOT / "results/reference").rglob("*") if p.is_file()]
    ignored = ("rows", "adapters", "notebooks", "variants")
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
