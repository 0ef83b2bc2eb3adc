"""The objectives of both stages against plain computations."""

import math

import pytest
import torch

from hf_dalle.logit_laplace import logit_laplace_log_prob, map_pixels
from hf_dalle.losses import dvae_loss, kl_to_uniform, pixel_loss, prior_loss


def test_dvae_loss_is_the_elb_over_the_pixel_channels():
    pixels, mu, log_b = torch.rand(2, 3, 8, 8), torch.randn(2, 3, 8, 8), 0.3 * torch.randn(2, 3, 8, 8)
    logits = torch.randn(2, 5, 2, 2)
    parts = dvae_loss(pixels, mu, log_b, logits, beta=6.6)
    nll = sum(-logit_laplace_log_prob(map_pixels(pixels[i]), mu[i], log_b[i]).sum() for i in range(2)) / 2
    kl = 0.0
    for image in logits:
        for row in range(2):
            for column in range(2):
                q = image[:, row, column].softmax(0)
                kl += sum(p.item() * math.log(p.item() * 5) for p in q) / 2
    assert parts.nll.item() == pytest.approx(nll.item(), rel=1e-5)
    assert parts.kl.item() == pytest.approx(kl, rel=1e-5)
    assert parts.loss.item() == pytest.approx((nll.item() + 6.6 * kl) / (3 * 8 * 8), rel=1e-5)


def test_a_floor_under_log_b_is_a_clamp():
    pixels, mu, logits = torch.rand(2, 3, 8, 8), torch.randn(2, 3, 8, 8), torch.randn(2, 5, 2, 2)
    log_b = torch.linspace(-6, 2, mu.numel()).view_as(mu).requires_grad_()
    parts = dvae_loss(pixels, mu, log_b, logits, beta=1.0, min_log_b=-2.0)
    assert parts.loss.equal(dvae_loss(pixels, mu, log_b.detach().clamp(min=-2.0), logits, beta=1.0).loss)
    parts.loss.backward()
    assert (log_b.grad != 0).equal(log_b >= -2.0)


def test_prior_losses_of_halves_are_computed_in_float32():
    logits, labels = 8 * torch.randn(4, 50, 16).bfloat16(), torch.randint(16, (4, 50))
    assert prior_loss(logits, labels, logits, labels) == prior_loss(logits.float(), labels, logits.float(), labels)


def test_losses_of_halves_are_computed_in_float32():
    pixels, mu, log_b = torch.rand(1, 3, 8, 8), torch.randn(1, 3, 8, 8).half(), torch.randn(1, 3, 8, 8).half()
    logits = torch.randn(1, 5, 2, 2).half()
    parts = dvae_loss(pixels.half(), mu, log_b, logits, beta=1.0)
    expected = dvae_loss(pixels.half().float(), mu.float(), log_b.float(), logits.float(), beta=1.0)
    assert parts == expected and parts.loss.dtype == torch.float32


def test_kl_to_uniform_at_its_two_ends():
    assert kl_to_uniform(torch.zeros(1, 7, 3, 3)).item() == pytest.approx(0, abs=1e-5)
    one_hot = torch.zeros(1, 7, 3, 3)
    one_hot[:, 2] = 1e4
    assert kl_to_uniform(one_hot).item() == pytest.approx(9 * math.log(7), rel=1e-6)


def test_pixel_loss_is_the_weighted_sum_of_mean_errors():
    pixels, sample = torch.tensor([0.0, 0.5, 1.0, 1.0]), torch.tensor([0.5, 0.5, 1.0, 0.0])
    shape = (1, 1, 2, 2)
    losses = [
        pixel_loss(pixels.view(shape), sample.view(shape), *weights).item() for weights in ((1, 0), (0, 1), (2, 3))
    ]
    assert losses == pytest.approx([1.5 / 4, 1.25 / 4, 2 * 1.5 / 4 + 3 * 1.25 / 4])


def test_kl_of_the_nearest_quantizer_is_the_constant():
    pixels, maps = torch.rand(2, 3, 8, 8), torch.zeros(2, 3, 8, 8)
    parts = dvae_loss(pixels, maps, maps, torch.randn(2, 5, 2, 2), beta=1.0, quantizer="nearest")
    assert parts.kl.item() == pytest.approx(4 * math.log(5), rel=1e-6)


def test_prior_loss_weighs_and_normalises_each_kind_by_its_own_count():
    text_logits, image_logits = torch.randn(2, 3, 6), torch.randn(2, 5, 4)
    text_labels, image_labels = torch.randint(6, (2, 3)), torch.randint(4, (2, 5))
    text_labels[0] = -100
    loss, text_loss, image_loss = prior_loss(text_logits, text_labels, image_logits, image_labels, 1 / 8)
    text = [-text_logits[1, t].log_softmax(0)[text_labels[1, t]] for t in range(3)]
    image = [-image_logits[b, i].log_softmax(0)[image_labels[b, i]] for b in range(2) for i in range(5)]
    assert text_loss.item() == pytest.approx(sum(text).item() / 3, rel=1e-5)
    assert image_loss.item() == pytest.approx(sum(image).item() / 10, rel=1e-5)
    assert loss.item() == pytest.approx(text_loss.item() / 8 + image_loss.item() * 7 / 8, rel=1e-5)


def test_prior_loss_without_one_kind_and_without_any():
    image_logits, image_labels = torch.randn(1, 5, 4), torch.randint(4, (1, 5))
    loss, text_loss, image_loss = prior_loss(None, None, image_logits, image_labels)
    assert text_loss is None and loss.item() == pytest.approx(image_loss.item() * 7 / 8)
    with pytest.raises(ValueError, match="nothing to predict"):
        prior_loss(None, None, image_logits, torch.full((1, 5), -100))
