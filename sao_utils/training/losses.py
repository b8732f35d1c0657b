"""Log-probabilities of answers without full logits, and the losses computed from them.

The logits of a pair are what fills a consumer GPU: Gemma-2 has 256,000 of them per token, in float32
a gigabyte for a thousand tokens, and a plain loss keeps several copies. Here the logits of a few rows
at a time are computed, used and discarded, and only for the tokens that are learned from.
"""

from __future__ import annotations

import torch
from torch.nn.functional import logsigmoid

from sao_utils.training.memory import CHUNK_BYTES


def simpo_loss(logp_chosen, len_chosen, logp_rejected, len_rejected, beta: float, gamma: float):
    """SimPO's loss, one value per pair (Meng, Xia, Chen 2024, arXiv 2405.14734, equation 6).

        L = -log sigmoid(beta/|y_w| log p(y_w|x) - beta/|y_l| log p(y_l|x) - gamma)

    The reward of an answer is its mean log-probability per token times beta: there is no reference
    model, and a long answer is not rewarded for its length.

    Args:
        logp_chosen, logp_rejected: summed log-probability of each answer, tensors [pairs], nats.
        len_chosen, len_rejected: tokens of each answer, its end token included, tensors [pairs].
        beta: scale of the reward.
        gamma: the raw margin by which the chosen reward should exceed the rejected one (not gamma/beta).
    """
    lead = logp_chosen / len_chosen - logp_rejected / len_rejected
    return -logsigmoid(beta * (lead - gamma / beta))


def dpo_loss(logp_chosen, logp_rejected, ref_chosen, ref_rejected, beta: float):
    """DPO's loss, one value per pair (Rafailov et al. 2023, arXiv 2305.18290, equation 7).

        L = -log sigmoid(beta log p(y_w|x)/p_ref(y_w|x) - beta log p(y_l|x)/p_ref(y_l|x))

    Args:
        logp_chosen, logp_rejected: summed log-probability of each answer, tensors [pairs], nats.
        ref_chosen, ref_rejected: the same under the model before training.
        beta: scale of the reward.
    """
    return -logsigmoid(beta * ((logp_chosen - ref_chosen) - (logp_rejected - ref_rejected)))


def orpo_loss(logp_chosen, len_chosen, logp_rejected, len_rejected, lam: float):
    """ORPO's loss, one value per pair (Hong, Lee, Thorne 2024, arXiv 2403.07691, equations 6 and 7).

        L = -m_w - lam log sigmoid(log odds(y_w) - log odds(y_l)),  odds = e^m / (1 - e^m)

    with m the mean log-probability of an answer's tokens. The first term imitates the chosen answer.
    trl's ORPOTrainer counts the prompt's tokens in it as well; the paper's equation does not.

    Args:
        logp_chosen, logp_rejected: summed log-probability of each answer, tensors [pairs], nats.
        len_chosen, len_rejected: tokens of each answer, its end token included, tensors [pairs].
        lam: weight of the second term.
    """
    better, worse = logp_chosen / len_chosen, logp_rejected / len_rejected

    def log_odds(mean):
        return mean - torch.log(-torch.expm1(mean.clamp(max=-1e-7)))  # e^m = 1 has no odds

    return -better - lam * logsigmoid(log_odds(better) - log_odds(worse))


def token_logps(hidden, weight, targets, softcap=None):
    """Log-probability of each target under softmax(softcap(hidden @ weight.T)).

    The logits exist for only one chunk of rows at a time (`CHUNK_BYTES`), in float32. With a frozen
    head, a row's gradient is known up to a factor as soon as its logits are: it is kept instead of them
    ([N, H]), and the backward pass multiplies it by that factor. With a trained head the backward pass
    recomputes the logits.

    Args:
        hidden: [N, H], the last hidden state at the positions that predict the targets.
        weight: [V, H], the output head.
        targets: [N], token ids (int64).
        softcap: c of Gemma-2's c * tanh(logits / c) on the logits; None for none.

    Returns:
        [N], float32, nats.
    """
    return TokenLogps.apply(hidden, weight, targets, softcap)


class TokenLogps(torch.autograd.Function):
    """See `token_logps`."""

    @staticmethod
    def forward(ctx, hidden, weight, targets, softcap):
        kind = hidden.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
        dtype = dtype or hidden.dtype
        wanted, ctx.head_trained = ctx.needs_input_grad[:2]
        ctx.dtype, ctx.softcap = dtype, softcap
        logps = torch.empty(len(hidden), dtype=torch.float32, device=hidden.device)
        lse = torch.empty_like(logps)
        slopes = None
        if wanted and not ctx.head_trained:
            slopes = torch.empty(hidden.shape, dtype=dtype, device=hidden.device)
        with torch.autocast(kind, enabled=False):
            full = weight.to(dtype)
            for rows in _chunks(len(hidden), weight.shape[0], kind):
                logits = _logits(hidden[rows].to(dtype), full, softcap)
                lse[rows] = logits.logsumexp(-1)
                logps[rows] = logits.gather(1, targets[rows, None])[:, 0] - lse[rows]
                if slopes is not None:
                    found = _residual(logits, lse[rows], targets[rows], softcap)
                    slopes[rows] = found.to(dtype) @ full
        ctx.save_for_backward(hidden, weight, targets, lse, slopes)
        return logps

    @staticmethod
    def backward(ctx, gradient):
        hidden, weight, targets, lse, slopes = ctx.saved_tensors
        if slopes is not None:
            return (gradient[:, None] * slopes).to(hidden.dtype), None, None, None
        kind = hidden.device.type
        of_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        with torch.autocast(kind, enabled=False):
            of_weight = torch.zeros_like(weight, dtype=torch.float32)
            full = weight.to(ctx.dtype)
            for rows in _chunks(len(hidden), weight.shape[0], kind):
                part = hidden[rows].to(ctx.dtype)
                logits = _logits(part, full, ctx.softcap)
                found = _residual(logits, lse[rows], targets[rows], ctx.softcap)
                found = found.mul_(gradient[rows, None]).to(ctx.dtype)
                if of_hidden is not None:
                    of_hidden[rows] = (found @ full).to(hidden.dtype)
                of_weight += found.T @ part
        return of_hidden, of_weight.to(weight.dtype), None, None


def _logits(hidden, weight, softcap):
    logits = torch.nn.functional.linear(hidden, weight).float()
    return logits.div_(softcap).tanh_().mul_(softcap) if softcap else logits


def _residual(logits, lse, targets, softcap):
    """d log p(target) / d (hidden @ weight.T), [rows, V]; overwrites the logits."""
    slope = (logits / softcap).square_().neg_().add_(1) if softcap else None
    found = logits.sub_(lse[:, None]).exp_().neg_()
    found[torch.arange(len(targets), device=targets.device), targets] += 1
    return found.mul_(slope) if softcap else found


def _chunks(rows: int, vocabulary: int, kind: str):
    size = max(16, CHUNK_BYTES.get(kind, CHUNK_BYTES["cuda"]) // (4 * vocabulary))
    for start in range(0, rows, size):
        yield slice(start, start + size)
