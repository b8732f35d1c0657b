"""Chunked log-probabilities and losses against plain formulas, in double precision where it matters."""

import math

import pytest
import torch

from sao_utils.training import losses
from sao_utils.training.losses import dpo_loss, orpo_loss, simpo_loss, token_logps


def plain(hidden, weight, targets, softcap=None):
    logits = hidden @ weight.T
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    return logits.log_softmax(-1).gather(1, targets[:, None])[:, 0]


def example(rows=70, vocabulary=311, width=24, seed=0):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(rows, width, generator=generator)
    weight = torch.randn(vocabulary, width, generator=generator)
    return hidden, weight, torch.randint(vocabulary, (rows,), generator=generator)


@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("trained", [False, True])
def test_values_and_gradients_equal_full_logits(monkeypatch, softcap, trained):
    monkeypatch.setitem(losses.CHUNK_BYTES, "cpu", 16 * 4 * 311)  # five chunks, the last not full
    hidden, weight, targets = example()
    upstream = torch.randn(70, dtype=torch.float64, generator=torch.Generator().manual_seed(3))

    def run(function, dtype):
        leaves = [hidden.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_(trained)]
        logps = function(*leaves, targets, softcap)
        (logps * upstream.to(logps.dtype)).sum().backward()
        return logps.detach(), [x.grad for x in leaves if x.grad is not None]

    truth, gradients = run(plain, torch.float64)
    ours, of_ours = run(token_logps, torch.float32)
    assert ours.dtype == torch.float32
    assert (ours - truth).abs().max() < 1e-4
    assert abs(ours.double().mean() / truth.mean() - 1) < 1e-6
    assert len(of_ours) == len(gradients) == 1 + trained
    for found, wanted in zip(of_ours, gradients):
        assert (found - wanted).norm() / wanted.norm() < 1e-5


def test_full_logits_never_exist(monkeypatch):
    widest = 0
    original = torch.nn.functional.linear

    def spy(*args):
        nonlocal widest
        out = original(*args)
        widest = max(widest, out.numel())
        return out

    monkeypatch.setitem(losses.CHUNK_BYTES, "cpu", 16 * 4 * 311)
    monkeypatch.setattr(torch.nn.functional, "linear", spy)
    hidden, weight, targets = example(rows=400)
    token_logps(hidden.requires_grad_(), weight, targets).sum().backward()
    assert widest == 16 * 311


def test_simpo_loss_is_the_equation_with_the_raw_margin():
    # Rewards 10 * -1.2 and 10 * -1.5 lead by 3, which is the margin: -log sigmoid(0) = log 2.
    loss = simpo_loss(*map(torch.tensor, (-12.0, 10.0, -30.0, 20.0)), beta=10, gamma=3)
    assert loss.item() == pytest.approx(math.log(2), rel=1e-6)
    # A margin of 0.3 (gamma/beta taken for gamma) would be 2.7 short.
    wrong = simpo_loss(*map(torch.tensor, (-12.0, 10.0, -30.0, 20.0)), beta=10, gamma=0.3)
    assert wrong.item() == pytest.approx(math.log(1 + math.exp(-2.7)), rel=1e-5)


def test_dpo_loss_is_the_equation_and_begins_at_log_2():
    same = dpo_loss(*map(torch.tensor, (-12.0, -30.0, -12.0, -30.0)), beta=0.1)
    assert same.item() == pytest.approx(math.log(2), rel=1e-6)
    # Log-ratios +2 and -3: -log sigmoid(0.1 * 5).
    ahead = dpo_loss(*map(torch.tensor, (-10.0, -33.0, -12.0, -30.0)), beta=0.1)
    assert ahead.item() == pytest.approx(math.log(1 + math.exp(-0.5)), rel=1e-6)


def test_orpo_loss_is_the_equation():
    # Mean probabilities 1/2 and 1/4: odds 1 and 1/3, ratio 3, sigmoid(log 3) = 3/4.
    given = (10 * math.log(0.5), 10.0, 4 * math.log(0.25), 4.0)
    loss = orpo_loss(*(torch.tensor(x, dtype=torch.float64) for x in given), lam=0.2)
    assert loss.item() == pytest.approx(math.log(2) - 0.2 * math.log(0.75), rel=1e-9)
