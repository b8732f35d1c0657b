"""Settings of a run that is small enough for a test."""

SMALL = {"prompts.count": 40, "evaluation.per_combination": 1, "evaluation.bootstrap": 200}
