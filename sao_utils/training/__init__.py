"""Training: preference losses and supervised fine-tuning, from rows to weights. `fit` is the entry."""


class TrainingFailed(RuntimeError):
    """Training went wrong; the message says where and what to try. No adapter was saved."""
