"""The maths of sets of features, against closed forms, sums over all pairs, and torchmetrics where it has a figure."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_dalle import distribution_metrics
from hf_dalle.distribution_metrics import (
    extrapolate_to_infinity,
    find_nearest,
    frechet_distance,
    inception_score,
    kernel_distance,
    precision_recall,
)


@pytest.fixture(params=[1024, 3])
def block_rows(request, monkeypatch):
    """Tables of all pairs in one block, and in many of which the last is cut."""
    monkeypatch.setattr(distribution_metrics, "BLOCK_ROWS", request.param)


def make_features(num_rows, num_features=4, seed=0, shift=0.0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(num_rows, num_features, generator=generator, dtype=torch.float64) + shift


def whiten(features):
    """Rows with mean 0 and unbiased covariance 1, exactly."""
    features = features - features.mean(0)
    factor = torch.linalg.cholesky(features.T @ features / (len(features) - 1))
    return torch.linalg.solve_triangular(factor, features.T, upper=False).T


# ---------------------------------------------------------------------------------------------------------- distances


def test_frechet_distance_of_known_gaussians():
    base, other = whiten(make_features(50)), whiten(make_features(70, seed=1))
    scales, others = torch.tensor([1.0, 2.0, 0.5, 3.0]).double(), torch.tensor([2.0, 2.0, 1.5, 0.1]).double()
    shift = torch.tensor([1.0, -2.0, 0.0, 0.5]).double()
    # of diagonal covariances: the squared distance of means, and of standard deviations
    wanted = (shift.square() + (scales - others).square()).sum().item()
    assert frechet_distance(base * scales, other * others + shift) == pytest.approx(wanted, rel=1e-10)


def test_frechet_distance_of_covariances_that_do_not_commute():
    generator = np.random.default_rng(0)
    left, right = generator.normal(size=(4, 4)), generator.normal(size=(4, 4))
    first, second = (
        whiten(make_features(50)) @ torch.tensor(left).T,
        whiten(make_features(60, seed=1)) @ torch.tensor(right).T,
    )
    s1, s2 = left @ left.T, right @ right.T
    values, vectors = np.linalg.eigh(s1)
    root = vectors * np.sqrt(values) @ vectors.T
    trace = np.sqrt(np.linalg.eigvalsh(root @ s2 @ root)).sum()
    assert frechet_distance(first, second) == pytest.approx(np.trace(s1) + np.trace(s2) - 2 * trace, rel=1e-9)


@pytest.mark.parametrize(("num_rows", "num_others"), [(60, 40), (5, 40), (40, 5), (6, 6)])
@pytest.mark.parametrize("rank", [8, 2])
def test_frechet_distance_is_torchmetrics(num_rows, num_others, rank):
    from evaluation.fidelity_figures import torchmetrics_fd

    mix = make_features(rank, 8, seed=9)  # of rank 2 the covariances are singular however many rows there are
    first, second = make_features(num_rows, rank) @ mix, make_features(num_others, rank, seed=1, shift=0.3) @ mix * 1.2
    assert frechet_distance(first, second) == pytest.approx(torchmetrics_fd(first, second), rel=1e-5)


def test_frechet_distance_of_a_set_from_itself_is_none():
    for num_rows in (4, 400):
        features = make_features(num_rows, 8)
        assert frechet_distance(features, features) == pytest.approx(0, abs=1e-9)


def test_extrapolation_takes_the_bias_off():
    sizes = [40, 50, 70, 100]
    limit, slope = extrapolate_to_infinity(sizes, [3 + 12 / size for size in sizes])
    assert limit == pytest.approx(3) and slope == pytest.approx(12)
    # two samples of one distribution: the distance is all bias
    many = make_features(4000, 8), make_features(4000, 8, seed=1)
    values = [frechet_distance(many[0][:size], many[1][:size]) for size in (500, 1000, 2000, 4000)]
    assert abs(extrapolate_to_infinity([500, 1000, 2000, 4000], values)[0]) < values[-1] / 2 < values[0] / 8
    with pytest.raises(ValueError, match="two different sizes"):
        extrapolate_to_infinity([5, 5], [1.0, 2.0])


def kernel_by_pairs(x, y):
    """The unbiased estimate, a pair of rows at a time."""
    kernel = lambda a, b: (np.dot(a, b) / len(a) + 1) ** 3  # noqa: E731
    within = [
        np.mean([kernel(rows[i], rows[j]) for i in range(len(rows)) for j in range(len(rows)) if i != j])
        for rows in (x, y)
    ]
    return sum(within) - 2 * np.mean([kernel(a, b) for a in x for b in y])


def test_kernel_distance_is_the_sum_over_pairs(block_rows):
    x, y = make_features(7), make_features(11, seed=1, shift=0.5)
    wanted = kernel_by_pairs(x.numpy(), y.numpy())
    assert kernel_distance(x, y).tolist() == pytest.approx([wanted], rel=1e-12)


def test_kernel_distance_of_one_whole_subset_is_torchmetrics():
    from evaluation.fidelity import Settings
    from evaluation.fidelity_figures import torchmetrics_kd

    x, y = make_features(9), make_features(9, seed=1, shift=0.5)
    value, spread = torchmetrics_kd(x, y, Settings(num_subsets=3), torch.Generator())
    assert kernel_distance(x, y).item() == pytest.approx(value, rel=1e-12) and spread == pytest.approx(0, abs=1e-12)


def test_kernel_distance_of_weights(block_rows):
    x, y = make_features(7), make_features(6, seed=1, shift=0.5)
    weights, others = (
        torch.tensor([[1, 1, 1, 1, 1, 1, 1], [0, 1, 1, 0, 1, 1, 0]]),
        torch.tensor([[1] * 6, [1, 0, 1, 1, 0, 1]]),
    )
    wanted = [kernel_by_pairs(x[w > 0].numpy(), y[o > 0].numpy()) for w, o in zip(weights, others, strict=True)]
    assert kernel_distance(x, y, weights, others).tolist() == pytest.approx(wanted, rel=1e-12)


def test_resamples_leave_the_kernel_distance_unbiased():
    x, y = make_features(12, shift=0.4), make_features(12, seed=1)
    generator = torch.Generator().manual_seed(0)
    picks = torch.randint(12, (2, 20_000, 12), generator=generator)
    weights = torch.nn.functional.one_hot(picks, 12).sum(2)
    resampled = kernel_distance(x, y, weights[0], weights[1])
    error = resampled.std() / len(resampled) ** 0.5
    value = kernel_distance(x, y).item()
    # a ratio of sums, so unbiased but for a part of the spread; pairs of a row with itself would move it by far more
    assert abs(resampled.mean().item() - value) < 5 * error + 0.1 * resampled.std()
    naive = torch.stack([kernel_distance(x[a], y[b])[0] for a, b in zip(*picks[:, :500], strict=True)])
    assert naive.mean() - value > 5 * abs(resampled.mean() - value)


# --------------------------------------------------------------------------------------------------------------- score


def test_inception_score_of_known_tables():
    sure = torch.eye(4).repeat(5, 1) * 1e3
    assert inception_score(sure, 1) == pytest.approx(4)
    assert inception_score(torch.zeros(6, 9), 2) == pytest.approx(1)
    # half of the pictures are of one class surely, the others undecided between it and another
    table = torch.tensor([[1.0, 0.0], [0.5, 0.5]]).log()
    marginal = np.array([0.75, 0.25])
    wanted = 0.5 * math.log(1 / 0.75) + 0.5 * (0.5 * np.log(0.5 / marginal)).sum()
    assert inception_score(table, 1) == pytest.approx(math.exp(wanted), rel=1e-12)


def test_inception_score_of_parts_is_their_mean():
    logits = make_features(30, 5) * 3
    parts = [inception_score(part, 1) for part in logits.chunk(3)]
    assert inception_score(logits, 3) == pytest.approx(np.mean(parts), rel=1e-12)
    with pytest.raises(ValueError, match="30 pictures cannot be split into 31"):
        inception_score(logits, 31)


def test_inception_score_is_torchmetrics():
    from evaluation.fidelity import Settings
    from evaluation.fidelity_figures import torchmetrics_is

    logits = make_features(40, 6) * 2
    value, spread = torchmetrics_is(logits, Settings(num_splits=1), torch.Generator())
    assert inception_score(logits, 1) == pytest.approx(value, rel=1e-12) and math.isnan(spread)


# ------------------------------------------------------------------------------------------------ precision and recall


def by_definition(centres, others, k):
    """Each of `others` in a ball of `centres`, a distance at a time."""
    result = []
    for other in others:
        result.append(
            any(
                (other - centre).norm()
                <= sorted((centre - mate).norm() for j, mate in enumerate(centres) if j != i)[k - 1]
                for i, centre in enumerate(centres)
            )
        )
    return result


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 10**6), st.integers(4, 9), st.integers(4, 9), st.integers(1, 3))
def test_precision_and_recall_by_definition(seed, num_real, num_drawn, k):
    real, drawn = make_features(num_real, 3, seed), make_features(num_drawn, 3, seed + 1, shift=0.7)
    is_in, is_covered = precision_recall(real, drawn, k)
    assert is_in.tolist() == by_definition(real, drawn, k)
    assert is_covered.tolist() == by_definition(drawn, real, k)


def test_planted_clusters(block_rows):
    clusters = [make_features(20, seed=seed) * 0.1 + 10 * seed for seed in range(3)]
    real, drawn = torch.cat(clusters[:2]), torch.cat([clusters[0] + 1e-3, clusters[2]])
    is_in, is_covered = precision_recall(real, drawn)
    # half of what is drawn is in no real cluster; half of what is real is never drawn
    assert is_in.double().mean() == 0.5 and is_in[:20].all() and not is_in[20:].any()
    assert is_covered.double().mean() == 0.5 and is_covered[:20].all()


def test_equal_pictures_are_within_the_manifold():
    real = make_features(5, 64).repeat(5, 1) * 100  # every ball has the radius 0
    is_in, is_covered = precision_recall(real, real.flip(0), 3)
    assert is_in.all() and is_covered.all()


# ----------------------------------------------------------------------------------------------------------- the rest


def test_nearest_by_cosine(block_rows):
    queries = torch.nn.functional.normalize(make_features(8, 5), dim=1)
    references = torch.nn.functional.normalize(make_features(11, 5, seed=1), dim=1)
    similarities, nearest = find_nearest(queries, references, 100)
    for query, similarity, number in zip(queries, similarities, nearest, strict=True):
        products = [float((query * reference).sum()) for reference in references]
        assert similarity.item() == pytest.approx(max(products)) and number == 100 + products.index(max(products))


@pytest.mark.parametrize("measure", [frechet_distance, kernel_distance, precision_recall])
def test_what_cannot_be_compared_is_refused(measure):
    with pytest.raises(ValueError, match="N x D and M x D"):
        measure(make_features(9, 4), make_features(9, 5))
    with pytest.raises(ValueError, match="1 and 9 pictures"):
        measure(make_features(1), make_features(9))
    with pytest.raises(ValueError, match="not finite"):
        measure(make_features(9), make_features(9).log())


def test_other_refusals():
    with pytest.raises(ValueError, match="3 and 9 pictures; expected at least 4"):
        precision_recall(make_features(3), make_features(9), 3)
    with pytest.raises(ValueError, match="`num_neighbours` is 0"):
        precision_recall(make_features(5), make_features(9), 0)
    with pytest.raises(ValueError, match="fewer than two different pictures"):
        kernel_distance(make_features(3), make_features(3), torch.tensor([[3, 0, 0]]), torch.ones(1, 3))
