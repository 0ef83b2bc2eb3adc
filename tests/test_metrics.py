"""Figures of merit on numbers worked out by hand, and ranks against references that are really taken away."""

import math

import pytest
import torch

from hf_dalle.losses import dvae_loss
from hf_dalle.metrics import (
    bits_per_dim,
    bootstrap,
    codes_used,
    fit_ridge_probe,
    group_means,
    perplexity,
    pixel_bits_per_dim,
    psnr,
    rank_concepts,
)


def test_psnr_is_a_figure_a_picture():
    pixels = torch.full((3, 3, 4, 4), 0.5)
    reconstructions = pixels + torch.tensor([0.1, 0.01, 0.0])[:, None, None, None]
    torch.testing.assert_close(psnr(pixels, reconstructions), torch.tensor([20.0, 40.0, 100.0]), atol=1e-3, rtol=0)


def test_bits_a_dimension():
    # a token of 256 codes that says nothing of itself, for a square of 4 x 4 pixels: 8 bits over 48 numbers
    assert bits_per_dim(math.log(256), 3 * 4 * 4) == pytest.approx(8 / 48)


@pytest.mark.parametrize(("mu", "log_b", "eps"), [(0.3, -1.0, 0.1), (-1.2, 0.5, 0.02)])
def test_pixel_bits_are_of_a_density_over_0_to_255(mu, log_b, eps):
    # the density of pixel values, exp(-nats), has an integral of 1 less what phi leaves outside of 0 to 255
    pixels = torch.linspace(0, 1, 100_001, dtype=torch.float64)
    densities = []
    for part in pixels.view(-1, 1, 1, 1).split(20_000):
        maps = torch.full((1, 1, 1, 1), mu), torch.full((1, 1, 1, 1), log_b)
        for pixel in part[::100]:
            nll = dvae_loss(pixel[None], *maps, torch.zeros(1, 2, 1, 1), 0.0, eps).nll.item()
            densities.append(2 ** -pixel_bits_per_dim(nll, 1, eps))
    mass = sum(densities) / len(densities) * 255
    edges = torch.tensor([eps, 1 - eps], dtype=torch.float64).logit()
    laplace = torch.distributions.Laplace(torch.tensor(mu).double(), torch.tensor(log_b).double().exp())
    assert mass == pytest.approx((laplace.cdf(edges[1]) - laplace.cdf(edges[0])).item(), rel=5e-3)


def test_codes_used_is_a_share():
    assert codes_used(torch.tensor([3, 0, 1, 0])) == 0.5 and codes_used(torch.zeros(4)) == 0


def test_perplexity_counts_the_codes_in_use():
    assert perplexity(torch.tensor([5, 5, 5, 5, 0, 0])) == pytest.approx(4)
    assert perplexity(torch.tensor([7, 0])) == pytest.approx(1)
    half = math.exp(-0.75 * math.log(0.75) - 0.25 * math.log(0.25))
    assert perplexity(torch.tensor([3.0, 1.0])) == pytest.approx(half)
    assert perplexity(torch.zeros(4)) == 0


def test_group_means_and_an_empty_group():
    values = torch.tensor([[1.0, 0.0], [3.0, 2.0], [5.0, 5.0]])
    means, sizes = group_means(values, torch.tensor([0, 0, 2]), 3)
    assert means.tolist() == [[2, 1], [0, 0], [5, 5]] and sizes.tolist() == [2, 0, 1]


def test_ranks_of_planted_features():
    references = torch.eye(4)[[0, 0, 1, 2]]  # of a fourth concept there is no picture
    features = torch.tensor([[9.0, 1, 0, 0], [9, 1, 0, 0], [9, 1, 0, 0], [0, 2, 2, 0]])
    ranks = rank_concepts(features, torch.tensor([0, 1, 2, 1]), references, torch.tensor([0, 0, 1, 2]), 4)
    assert ranks.tolist() == [1, 2, 3, 2]  # of two that are equally near the wrong one comes first


def test_its_own_reference_is_left_out():
    # Concept 0 has a picture along x and one along y: to itself a picture along x is near, to the other it is not.
    references, concepts = torch.eye(3)[[0, 1, 2]] + 0.1, torch.tensor([0, 0, 1])
    query = references[:1]
    assert rank_concepts(query, torch.tensor([0]), references, concepts, 2).tolist() == [1]
    rival = torch.tensor([[0.9, 0.0, 0.3]])
    references, concepts = torch.cat([references, rival]), torch.tensor([0, 0, 1, 1])
    assert rank_concepts(query, torch.tensor([0]), references, concepts, 2).tolist() == [1]
    assert rank_concepts(query, torch.tensor([0]), references, concepts, 2, torch.tensor([0])).tolist() == [2]


@pytest.mark.parametrize("seed", range(5))
def test_leaving_out_is_as_if_the_reference_were_not_there(seed):
    generator = torch.Generator().manual_seed(seed)
    references = torch.randn(30, 6, generator=generator, dtype=torch.float64)
    concepts = torch.arange(30) % 10
    features = references + 0.5 * torch.randn(30, 6, generator=generator, dtype=torch.float64)
    ranks = rank_concepts(features, concepts, references, concepts, 10, own=torch.arange(30))
    without_own = rank_concepts(features, concepts, references, concepts, 10)
    assert (ranks != without_own).any()
    for row in range(30):
        rest = torch.arange(30) != row
        one = rank_concepts(features[row, None], concepts[row, None], references[rest], concepts[rest], 10)
        assert one.item() == ranks[row]


def test_a_concept_of_its_own_reference_alone_cannot_be_ranked():
    references, concepts = torch.eye(2), torch.tensor([0, 1])
    with pytest.raises(ValueError, match="1 pictures cannot be ranked"):
        rank_concepts(references, concepts, references, concepts, 2, own=torch.tensor([0, -1]))


def test_ridge_probe_is_the_minimum_of_its_loss_and_shifts_with_the_features():
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(40, 5, generator=generator, dtype=torch.float64)
    labels = torch.arange(40) % 3
    weight, bias = fit_ridge_probe(features, labels, 3, penalty=0.2)
    parameters = [weight.clone().requires_grad_(), bias.clone().requires_grad_()]
    targets = torch.nn.functional.one_hot(labels, 3).double()
    loss = (features @ parameters[0] + parameters[1] - targets).square().sum() + 0.2 * 40 * parameters[
        0
    ].square().sum()
    loss.backward()
    assert all(parameter.grad.abs().max() < 1e-9 for parameter in parameters)
    shifted_weight, shifted_bias = fit_ridge_probe(features + 7, labels, 3, penalty=0.2)
    torch.testing.assert_close(shifted_weight, weight)
    torch.testing.assert_close((features + 7) @ shifted_weight + shifted_bias, features @ weight + bias)


def test_ridge_probe_tells_planted_classes():
    labels = torch.arange(60) % 3
    features = 3 * torch.eye(8)[labels] + 0.3 * torch.randn(60, 8, generator=torch.Generator().manual_seed(0))
    weight, bias = fit_ridge_probe(features, labels, 3)
    assert torch.equal((features @ weight + bias).argmax(1), labels)


def test_bootstrap_is_seeded_and_as_wide_as_the_binomial():
    values = torch.arange(300) % 3 == 0
    figure = bootstrap(values, seed=1)
    assert figure == bootstrap(values, seed=1) != bootstrap(values, seed=2)
    assert figure["value"] == pytest.approx(1 / 3)
    width = 2 * 1.96 * math.sqrt(1 / 3 * 2 / 3 / 300)
    assert figure["high"] - figure["low"] == pytest.approx(width, rel=0.1)
    assert bootstrap(torch.ones(5)) == {"value": 1, "low": 1, "high": 1}
    with pytest.raises(ValueError, match="no values"):
        bootstrap(torch.tensor([]))
