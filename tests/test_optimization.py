"""The schedules of training against their closed forms."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hf_dalle.optimization import cosine_anneal, get_warmup_cosine_schedule


def list_learning_rates(num_steps, *args, peak=2.0, **kwargs):
    """The learning rate of each update."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=peak)
    schedule = get_warmup_cosine_schedule(optimizer, *args, **kwargs)
    rates = []
    for _ in range(num_steps):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return rates


@given(st.floats(-10, 10), st.floats(-10, 10), st.integers(1, 1000), st.integers(0, 1200))
def test_cosine_by_closed_form(start, end, num_steps, step):
    share = math.sin(math.pi / 2 * min(step / num_steps, 1)) ** 2  # (1 - cos x) / 2 = sin^2(x / 2)
    assert cosine_anneal(step, start, end, num_steps) == pytest.approx(start + (end - start) * share, abs=1e-9)


def test_cosine_has_exact_ends():
    """The paper's temperature and KL weight: 1 to 1/16 and 0 to 6.6, then constant."""
    assert cosine_anneal(0, 1.0, 1 / 16, 150_000) == 1 and cosine_anneal(0, 0.0, 6.6, 5_000) == 0
    for step in (5_000, 5_001, 10**9):
        assert cosine_anneal(step, 0.0, 6.6, 5_000) == 6.6
    assert cosine_anneal(75_000, 1.0, 1 / 16, 150_000) == pytest.approx((1 + 1 / 16) / 2)
    assert cosine_anneal(0, 1.0, 0.5, 0) == 0.5  # no steps: the end at once


def test_warmup_then_cosine():
    rates = list_learning_rates(30, 4, 24, min_ratio=0.1)
    assert rates[:5] == pytest.approx([0.4, 0.8, 1.2, 1.6, 2.0])
    expected = [0.2 + 1.8 * (1 + math.cos(math.pi * step / 20)) / 2 for step in range(20)]
    assert rates[4:24] == pytest.approx(expected)
    assert rates[24:] == pytest.approx([0.2] * 6)


@pytest.mark.parametrize(("arguments", "expected"), [((0, 2), [2, 1, 0]), ((5, 3), [1 / 3, 2 / 3, 1]),
                                                     ((0, 3, 1.0), [2, 2, 2])])  # fmt: skip
def test_no_warmup_long_warmup_and_constant(arguments, expected):
    assert list_learning_rates(3, *arguments) == pytest.approx(expected)


def test_groups_keep_their_ratio():
    groups = [{"params": [torch.zeros(1, requires_grad=True)]}, {"params": [torch.ones(1)], "lr": 0.1}]
    optimizer = torch.optim.SGD(groups, lr=1.0)
    schedule = get_warmup_cosine_schedule(optimizer, 0, 10)
    for _ in range(5):
        optimizer.step()
        schedule.step()
    assert schedule.get_last_lr() == pytest.approx([0.5, 0.05])
