"""The schedules of training against their closed forms, halving on plateaus, AdamW with a bounded second moment."""

import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_dalle.optimization import BoundedAdamW, PlateauHalving, cosine_anneal, get_scheduler


def list_learning_rates(num_steps, *args, peak=2.0, name="cosine", **kwargs):
    """The learning rate of each update."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=peak)
    schedule = get_scheduler(name, optimizer, *args, **kwargs)
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
    schedule = get_scheduler("cosine", optimizer, 0, 10)
    for _ in range(5):
        optimizer.step()
        schedule.step()
    assert schedule.get_last_lr() == pytest.approx([0.5, 0.05])


def test_linear_and_constant_schedules():
    rates = list_learning_rates(12, 3, 11, 0.25, name="linear")
    assert rates == pytest.approx([0.5, 1.0, 1.5, *(2 - 1.5 * step / 8 for step in range(8)), 0.5])
    assert list_learning_rates(4, 3, name="constant_with_warmup") == pytest.approx([0.5, 1.0, 1.5, 2.0])
    assert list_learning_rates(4, 3, name="constant") == [2.0] * 4


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("cosin", "no learning-rate schedule 'cosin'; known are cosine, linear, constant, "),
        ("cosine", "needs `num_training_steps`"),
        ("linear", "needs `num_training_steps`"),
        ("reduce_lr_on_plateau", "needs a `plateau`"),
    ],
)
def test_schedules_that_cannot_be_are_refused(name, words):
    with pytest.raises(ValueError, match=words):
        list_learning_rates(1, name=name)


# ------------------------------------------------------------------------------------------------------- plateaus


def test_halving_where_the_loss_flattens():
    plateau = PlateauHalving(num_steps=10, threshold=0.01, max_halvings=2, first_step=5)
    rates, losses = [], {}

    def observe(step, loss):
        losses[step] = loss
        plateau.observe(loss, step)

    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=2.0)
    schedule = get_scheduler("reduce_lr_on_plateau", optimizer, num_warmup_steps=5, plateau=plateau)
    # Windows end at 15, 25, ...: means of 4, 3, 3, 2.98, 2, 2, 2. Warm-up is in none.
    means = {0: 9.0, 1: 4.0, 2: 3.0, 3: 3.0, 4: 2.98, 5: 2.0, 6: 2.0, 7: 2.0}
    for step in range(1, 76):
        rates.append(optimizer.param_groups[0]["lr"])  # of update `step - 1`
        optimizer.step()
        schedule.step()
        if step % 5 == 0:
            mean = means[(step + 4) // 10]
            observe(step, mean + (0.5 if step % 10 == 0 else -0.5))  # within a window the loss goes up and down
    assert rates[:5] == pytest.approx([2 * (step + 1) / 6 for step in range(5)])
    # Found after update 35 (a mean of 3 again) and after 45 (2.98 is less, but not by a hundredth): no third time.
    assert plateau.halvings == [36, 46]
    assert rates[5:36] == [2.0] * 31 and rates[36:46] == [1.0] * 10 and rates[46:] == [0.5] * 29


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.floats(1, 3) | st.just(math.nan) | st.just(math.inf), max_size=40),
    st.integers(1, 7),
    st.integers(0, 40),
)
def test_a_plateau_goes_on_from_its_state(losses, interval, cut):
    def run(plateau, start, losses):
        seen = []
        for step, loss in enumerate(losses, start=start):
            seen.append(plateau.ratio(step - 1))
            if step % interval == 0:
                plateau.observe(loss, step)
        return seen

    cut = min(cut, len(losses))
    whole, first, second = (PlateauHalving(6, 0.05, 3) for _ in range(3))
    expected = run(whole, 1, losses)
    found = run(first, 1, losses[:cut])
    second.load_state_dict(first.state_dict())
    assert found + run(second, cut + 1, losses[cut:]) == expected
    assert second.state_dict() == whole.state_dict()
    assert set(expected) <= {0.5**i for i in range(4)} and sorted(expected, reverse=True) == expected


# ---------------------------------------------------------------------------------------------------- BoundedAdamW


def make_parameters(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    return [torch.nn.Parameter(torch.randn(shape, generator=generator, dtype=dtype)) for shape in ((3, 4), (5,), ())]


def draw_gradients(parameters, step):
    generator = torch.Generator().manual_seed(step)
    sizes = (0.1, 30.0, 1.0)  # of which the second's squares go above the bound
    for parameter, size in zip(parameters, sizes, strict=True):
        parameter.grad = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype) * size
    if step % 3 == 1:
        parameters[2].grad = None


def test_bounded_adamw_against_the_definition():
    """In float64, an element at a time."""
    parameters = make_parameters(torch.float64)
    groups = [{"params": parameters[:2]}, {"params": parameters[2:], "weight_decay": 0.0, "lr": 0.2}]
    optimizer = BoundedAdamW(groups, 5.0, lr=0.1, betas=(0.9, 0.96), eps=1e-8, weight_decay=0.045)
    weights = [parameter.detach().clone() for parameter in parameters]
    m, v = ([torch.zeros_like(weight) for weight in weights] for _ in range(2))
    steps, num_bounded = [0, 0, 0], 0
    for step in range(8):
        draw_gradients(parameters, step)
        for i, (parameter, rate, decay) in enumerate(zip(parameters, (0.1, 0.1, 0.2), (0.045, 0.045, 0), strict=True)):
            if parameter.grad is None:
                continue
            g, steps[i] = parameter.grad, steps[i] + 1
            weights[i] = weights[i] - rate * decay * weights[i]
            m[i] = 0.9 * m[i] + 0.1 * g
            v[i] = 0.96 * v[i] + 0.04 * g**2
            num_bounded += (v[i] > 5).sum().item()
            v[i] = v[i].clamp(max=5)
            m_hat, v_hat = m[i] / (1 - 0.9 ** steps[i]), v[i] / (1 - 0.96 ** steps[i])
            weights[i] = weights[i] - rate * m_hat / (v_hat.sqrt() + 1e-8)
        optimizer.step()
        for parameter, expected, second in zip(parameters, weights, v, strict=True):
            torch.testing.assert_close(parameter.detach(), expected, rtol=1e-12, atol=1e-12)
            if parameter in optimizer.state:
                torch.testing.assert_close(optimizer.state[parameter]["exp_avg_sq"], second, rtol=1e-12, atol=1e-12)
    assert num_bounded > 10 and steps == [8, 8, 5]


def test_without_a_bound_it_is_adamw_bit_for_bit_and_takes_its_states():
    settings = {"lr": 0.01, "betas": (0.9, 0.96), "weight_decay": 0.045}
    ours, theirs = make_parameters(), make_parameters()
    bounded = BoundedAdamW(ours, math.inf, **settings)
    adamw = torch.optim.AdamW(theirs, **settings, foreach=True)
    for step in range(6):
        if step == 3:
            adamw.load_state_dict(copy.deepcopy(bounded.state_dict()))
            bounded.load_state_dict(copy.deepcopy(adamw.state_dict()))
        for parameters in (ours, theirs):
            draw_gradients(parameters, step)
        assert bounded.step() is None
        adamw.step()
        for a, b in zip(ours, theirs, strict=True):
            assert torch.equal(a, b)
            assert a.grad is None or adamw.state[b]["step"] == bounded.state[a]["step"]
    assert bounded.step(lambda: torch.tensor(3.0)) == 3.0


@pytest.mark.parametrize("bound", [0, -1.0, math.nan])
def test_a_bound_that_is_none_is_refused(bound):
    with pytest.raises(ValueError, match="`max_second_moment` is .*; expected a number above 0"):
        BoundedAdamW(make_parameters(), bound)
