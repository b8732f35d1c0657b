"""Training: preference losses and supervised fine-tuning, from rows to weights. Start with `fit`."""


class TrainingFailed(RuntimeError):
    """Training went wrong; the message says where and what to try. No adapter was saved."""
