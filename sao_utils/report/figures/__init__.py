"""The pictures of a run, as matplotlib figures; `save` keeps one as an SVG file.

Each function takes plain rows, or the table of results, and returns a figure that a notebook shows as a
cell's last value. Where there is nothing to draw, the picture says so: a small run is no error. Colours
can be told apart by colour-blind readers (Okabe and Ito), and never carry a meaning alone.
"""

# ruff: noqa: F401 - what notebooks call as `figures.<name>`
from sao_utils.report.figures.data import distinct_prompts, funnel, lengths, near_duplicates
from sao_utils.report.figures.judge import calibration, judge_matrix, judge_shares, margins, orders
from sao_utils.report.figures.results import (
    differences,
    good_answers,
    length_control,
    outcomes,
    win_rates,
)
from sao_utils.report.figures.style import as_svg, save
from sao_utils.report.figures.training import (
    learning_rates,
    live_curves,
    probe,
    search_table,
    simpo_loss,
    sums_and_means,
    training_curves,
)
