"""The logit-Laplace density and the pixel map, against closed forms."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_dalle.logit_laplace import logit_laplace_log_prob, map_pixels, unmap_pixels


@settings(max_examples=50, deadline=None)
@given(mu=st.floats(-4, 4), log_b=st.floats(-3, 1.5))
def test_density_integrates_to_one(mu, log_b):
    # Substituting y = logit(x) turns the integral over (0, 1) into one over the real line, dx = x (1 - x) dy.
    y = torch.linspace(-300, 300, 1_200_001, dtype=torch.float64)
    y = y[(y.abs() < 30)]  # beyond, x rounds to 0 or 1; the tails there are below e^-5.8 of the mass at b = e^1.5
    x = torch.sigmoid(y)
    log_prob = logit_laplace_log_prob(x, x.new_full((), mu).expand_as(x), x.new_full((), log_b).expand_as(x))
    total = torch.trapezoid(log_prob.exp() * x * (1 - x), y).item()
    tail = 0.5 * (math.exp(-(30 - mu) / math.exp(log_b)) + math.exp(-(30 + mu) / math.exp(log_b)))
    assert total == pytest.approx(1 - tail, abs=1e-3)


@settings(max_examples=50, deadline=None)
@given(x=st.floats(0.1, 0.9), mu=st.floats(-4, 4), log_b=st.floats(-3, 2))
def test_density_is_the_formula(x, mu, log_b):
    b = math.exp(log_b)
    expected = math.exp(-abs(math.log(x / (1 - x)) - mu) / b) / (2 * b * x * (1 - x))
    arguments = (torch.tensor(value, dtype=torch.float64) for value in (x, mu, log_b))
    assert logit_laplace_log_prob(*arguments).item() == pytest.approx(math.log(expected), rel=1e-9, abs=1e-9)


def test_map_pixels_keeps_the_logit_finite_and_comes_back():
    pixels = torch.linspace(0, 1, 256)
    mapped = map_pixels(pixels)
    assert mapped.min().item() == pytest.approx(0.1) and mapped.max().item() == pytest.approx(0.9)
    torch.testing.assert_close(unmap_pixels(mapped), pixels)
    assert unmap_pixels(torch.tensor([0.0, 1.0])).tolist() == [0, 1]
