"""The pictures of a run, as matplotlib figures; `save` keeps one as an SVG file.

Each function takes plain rows, or the table of results, and returns a figure that a notebook shows as a
cell's last value. If there is nothing to draw, the picture says so: a small run is not an error. Colours
can be told apart by colour-blind readers (Okabe and Ito), and never carry meaning alone.
"""

# ruff: noqa: F401 - what notebooks call as `figures.<name>`
from sao_utils.report.figures.data import distinct_prompts, funnel, lengths
from sao_utils.report.figures.judge import margins, orders
from sao_utils.report.figures.results import differences, good_answers, length_control, win_rates
from sao_utils.report.figures.rounds import rounds, similarity
from sao_utils.report.figures.studies import break_even, stopping, study
from sao_utils.report.figures.style import as_svg, save
from sao_utils.report.figures.training import (
    live_curves,
    probe,
    simpo_loss,
    sums_and_means,
    training_curves,
)
