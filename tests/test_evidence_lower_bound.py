"""The evidence lower bound against ln p(x, y) itself, summed over every z of models that have few."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_modeling_family_prior import KINDS, build_family_prior
from tiny import build_dvae, build_prior, build_tokenizer

from hf_dalle import encode_captions
from hf_dalle.evidence_lower_bound import (
    evidence_lower_bound,
    join_streams,
    logit_errors,
    picture_log_prob,
    posterior_entropy,
    posterior_log_probs,
    sample_posterior,
    standard_error,
    stream_log_prob,
)
from hf_dalle.logit_laplace import logit_laplace_log_prob
from hf_dalle.losses import dvae_loss


TEXT_IDS, TEXT_MASK = torch.tensor([[0, 2, 1, 1]]), torch.tensor([[1, 1, 0, 0]])


def build_models(grid_size=2, vocab_size=3, seed=0, **kwargs):
    """A dVAE of 2 x 2 pixels a cell, and a prior over its tokens with four text positions out of 5 ids."""
    sizes = {"encoder_block_out_channels": (8,), "decoder_block_out_channels": (8,), "patch_size": 2}
    dvae = build_dvae(seed, sample_size=2 * grid_size, vocab_size=vocab_size, **sizes, **kwargs)
    text = {"text_vocab_size": 5, "text_length": 4}
    prior = build_prior(seed, image_vocab_size=vocab_size, image_grid_size=grid_size, initializer_range=0.8, **text)
    return dvae, prior


def draw_picture(side=4, seed=0):
    levels = torch.randint(256, (1, 3, side, side), generator=torch.Generator().manual_seed(seed))
    return levels / 255


def list_codes(dvae):
    grid = (dvae.image_grid_size, dvae.image_grid_size)
    codes = itertools.product(range(dvae.config.vocab_size), repeat=grid[0] * grid[1])
    return torch.tensor(list(codes)).unflatten(1, grid)


@torch.no_grad()
def sum_exactly(dvae, prior, picture):
    """Every z, with ln p(x | z), ln p(z | y) and ln p(y), and ln p(x, y), their sum over z."""
    codes = list_codes(dvae)
    text, tokens = stream_log_prob(prior, join_streams(prior, TEXT_IDS, TEXT_MASK, codes))
    pixels = picture_log_prob(dvae, picture, codes)
    return codes, pixels, tokens, text, (pixels + tokens + text).logsumexp(0)


def chosen_log_probs(log_probs, codes):
    """ln q(z | x) of each z: 1 x K x h x w and B x h x w -> B."""
    return log_probs.expand(len(codes), -1, -1, -1).gather(1, codes[:, None]).flatten(1).sum(1)


def sharpen(dvae, factor):
    """Makes the encoder's logits so much larger."""
    with torch.no_grad():
        dvae.encoder.conv_out.weight *= factor
        dvae.encoder.conv_out.bias *= factor
    return dvae


# ------------------------------------------------------------------------------------------------- the bound, exactly


@given(st.integers(0, 10**6), st.sampled_from([0.0, 0.3, 2.0, 30.0]))
@settings(max_examples=25, deadline=None)
def test_bound_of_any_posterior_lies_below_by_its_divergence_from_the_true_one(seed, scale):
    dvae, prior = build_models(seed=seed % 3)
    codes, pixels, tokens, text, log_evidence = sum_exactly(dvae, prior, draw_picture(seed=seed % 5))
    logits = scale * torch.randn(1, 3, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    log_probs = logits.log_softmax(1)
    log_q = chosen_log_probs(log_probs, codes)
    assert log_q.logsumexp(0).item() == pytest.approx(0, abs=1e-9)
    bound = (log_q.exp() * (pixels + tokens)).sum() + posterior_entropy(log_probs)[0] + text[0]
    log_posterior = pixels + tokens + text - log_evidence
    divergence = (log_q.exp() * (log_q - log_posterior)).sum()
    assert divergence >= -1e-9
    assert (log_evidence - bound).item() == pytest.approx(divergence.item(), abs=1e-6)


def test_bound_is_tight_where_q_is_the_posterior():
    dvae, prior = build_models(grid_size=1, vocab_size=4)
    picture = draw_picture(side=2).double()
    codes, pixels, tokens, text, log_evidence = sum_exactly(dvae.double(), prior, picture)
    with torch.no_grad():  # the encoder is made to give exactly the posterior of this picture's one cell
        dvae.encoder.conv_out.weight.zero_()
        dvae.encoder.conv_out.bias.copy_(pixels + tokens)
    parts = evidence_lower_bound(dvae, prior, picture, TEXT_IDS, TEXT_MASK, torch.Generator(), 16)
    log_q = posterior_log_probs(dvae, picture)
    exact = (log_q[0, :, 0, 0].exp() * (pixels + tokens)).sum() + parts.entropy[0] + parts.text[0]
    assert exact.item() == pytest.approx(log_evidence.item(), abs=1e-6)
    assert parts.argmax_bound.item() == pytest.approx((log_evidence + log_q.max()).item(), abs=1e-6)


@pytest.mark.parametrize("factor", [0.0, 1.0, 3.0])
def test_estimate_is_unbiased_and_its_standard_error_is_right(factor):
    dvae, prior = build_models(seed=1)
    sharpen(dvae, factor)
    picture = draw_picture(seed=1)
    codes, pixels, tokens, text, log_evidence = sum_exactly(dvae, prior, picture)
    log_probs = posterior_log_probs(dvae, picture)
    q = chosen_log_probs(log_probs, codes).exp()
    exact = (q * (pixels + tokens)).sum() + posterior_entropy(log_probs)[0] + text[0]
    deviation = ((q * (pixels + tokens).square()).sum() - (q * (pixels + tokens)).sum().square()).sqrt()
    parts = evidence_lower_bound(dvae, prior, picture, TEXT_IDS, TEXT_MASK, torch.Generator().manual_seed(0), 2000)
    assert parts.bound.item() == pytest.approx(exact.item(), abs=4 * parts.sample_error.item() + 1e-6)
    assert parts.sample_error.item() == pytest.approx(deviation.item() / math.sqrt(2000), rel=0.15, abs=1e-6)
    assert parts.bound.item() < log_evidence.item()
    assert parts.argmax_bound.item() < log_evidence.item()


def test_parts_add_up_and_beta_weighs_all_but_the_picture():
    dvae, prior = build_models()
    parts = evidence_lower_bound(dvae, prior, draw_picture(), TEXT_IDS, TEXT_MASK, torch.Generator(), 5)
    expected = parts.picture.mean(1) + parts.tokens.mean(1) + parts.entropy + parts.text
    torch.testing.assert_close(parts.bound, expected)
    torch.testing.assert_close(parts.objective(6.6), expected + 5.6 * (expected - parts.picture.mean(1)))
    assert parts.num_dims == 48
    assert {part.dtype for part in parts.to_tuple()[:-1]} == {torch.float64}


@pytest.mark.parametrize("options", [{}, {"quantizer": "nearest", "codebook_dim": 4}])
def test_without_a_prior_it_is_stage_1s_bound(options):
    dvae, _ = build_models(seed=1, **options)
    picture = draw_picture(seed=1)
    parts = evidence_lower_bound(dvae, None, picture, generator=torch.Generator(), num_samples=2000)
    codes = list_codes(dvae)
    pixels, log_probs = picture_log_prob(dvae, picture, codes), posterior_log_probs(dvae, picture)
    q = chosen_log_probs(log_probs, codes).exp()
    with torch.no_grad():  # -ln p(x | z) on average over z, of mapped pixels, and the divergence, by the training loss
        encoded, nll = dvae.encode(picture), 0.0
        for code, weight in zip(codes, q.tolist(), strict=True):
            maps = dvae.decode(code[None])
            quantizer = dvae.config.quantizer
            loss = dvae_loss(picture, maps.mu, maps.log_b, encoded.logits, 1.0, quantizer=quantizer)
            nll += weight * loss.nll.item()
    exact = -nll - loss.kl.item() + 48 * math.log(0.8 / 255)
    assert parts.bound.item() == pytest.approx(exact, abs=4 * parts.sample_error.item() + 1e-3)
    assert parts.text.item() == 0 and parts.tokens[0, 0].item() == pytest.approx(-4 * math.log(3))
    assert parts.bound.item() < (pixels - 4 * math.log(3)).logsumexp(0).item()


def test_posterior_is_sampled_cell_by_cell():
    logits = torch.randn(1, 3, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    log_probs = logits.log_softmax(1)
    codes = sample_posterior(log_probs, 5_000, torch.Generator().manual_seed(0))
    shares = torch.nn.functional.one_hot(codes, 3).double().mean(0)  # 2 x 2 x 3
    torch.testing.assert_close(shares, log_probs[0].exp().movedim(0, -1), atol=0.03, rtol=0)
    joint = torch.bincount(codes[:, 0, 0] * 3 + codes[:, 1, 1], minlength=9).double() / len(codes)
    product = (log_probs[0, :, 0, 0].exp()[:, None] * log_probs[0, :, 1, 1].exp()).flatten()
    torch.testing.assert_close(joint, product, atol=0.03, rtol=0)


def test_nearest_codes_have_no_entropy_and_one_bound():
    dvae, prior = build_models(quantizer="nearest", codebook_dim=4)
    pictures = torch.cat([draw_picture(seed=seed) for seed in range(3)])
    text = (TEXT_IDS.expand(3, -1), TEXT_MASK.expand(3, -1))
    parts = evidence_lower_bound(dvae, prior, pictures, *text, torch.Generator(), 4)
    assert parts.picture.shape == parts.tokens.shape == (3, 4)
    assert parts.entropy.tolist() == [0, 0, 0]
    assert parts.bound.equal(parts.argmax_bound)
    assert parts.sample_error.tolist() == [0, 0, 0]
    for row in range(3):
        *_, log_evidence = sum_exactly(dvae, prior, pictures[row : row + 1])
        assert parts.bound[row] < log_evidence


# -------------------------------------------------------------------------------------------------------- likelihoods


def test_picture_likelihood_is_a_density_of_pixels_from_0_to_255():
    dvae, _ = build_models(grid_size=1)
    picture, codes = draw_picture(side=2), torch.tensor([[[1]]])
    decoded, eps, total = dvae.decode(codes), 0.1, 0.0
    for pixel, mu, log_b in zip(
        picture.flatten().tolist(), decoded.mu.flatten().tolist(), decoded.log_b.flatten().tolist(), strict=True
    ):
        level, scale = 255 * pixel, math.exp(log_b)
        mapped = (1 - 2 * eps) / 255 * level + eps
        density = math.exp(-abs(math.log(mapped / (1 - mapped)) - mu) / scale) / (2 * scale * mapped * (1 - mapped))
        total += math.log(density * (1 - 2 * eps) / 255)
    assert picture_log_prob(dvae, picture, codes).item() == pytest.approx(total, rel=1e-5)


def test_density_of_a_channel_sums_to_one_over_all_levels_and_to_less_inside_0_to_255():
    # phi maps the levels from -31.875 to 286.875 onto (0, 1).
    levels = torch.linspace(-31.8749, 286.8749, 400_001, dtype=torch.float64)
    mapped, mu, log_b = 0.8 / 255 * levels + 0.1, torch.tensor(1.2), torch.tensor(-0.5)
    density = (logit_laplace_log_prob(mapped, mu, log_b) + math.log(0.8 / 255)).exp()
    assert torch.trapezoid(density, levels).item() == pytest.approx(1, abs=1e-3)
    inside = (levels >= 0) & (levels <= 255)
    assert 0.5 < torch.trapezoid(density[inside], levels[inside]).item() < 1


def test_constant_scale_and_floor_take_the_decoders_place():
    dvae, _ = build_models()
    with torch.no_grad():
        dvae.decoder.conv_out.bias[0] = 3.0  # a colour beyond white
    picture, codes = draw_picture(), torch.randint(3, (2, 2, 2), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        maps = dvae.decode(codes)
    own = [picture_log_prob(dvae, picture, codes, **scale) for scale in ({}, {"log_b": -1.0}, {"min_log_b": 0.1})]
    shown = maps.mu.clamp(-math.log(9), math.log(9))  # logit(0.9): what lies beyond is shown as black and white
    assert not shown.equal(maps.mu)
    expected = [(maps.mu, maps.log_b), (shown, torch.tensor(-1.0)), (maps.mu, maps.log_b.clamp(min=0.1))]
    for found, (mu, scale) in zip(own, expected, strict=True):
        density = logit_laplace_log_prob(0.8 * picture.double() + 0.1, mu.double(), scale.double())
        torch.testing.assert_close(found, density.flatten(1).sum(1) + 48 * math.log(0.8 / 255))
    assert not own[0].equal(own[2])
    with pytest.raises(ValueError, match="exclude each other"):
        picture_log_prob(dvae, picture, codes, log_b=0.0, min_log_b=0.0)


@torch.no_grad()
def test_constant_of_the_mean_logit_error_is_the_likeliest():
    dvae, _ = build_models()
    pictures = torch.cat([draw_picture(seed=seed) for seed in range(6)])
    best = logit_errors(dvae, pictures).mean().log().item()
    codes = dvae.encode(pictures).tokens
    below, at, above = (
        picture_log_prob(dvae, pictures, codes, log_b=log_b).sum() for log_b in (best - 0.02, best, best + 0.02)
    )
    assert at > max(below, above)


@torch.no_grad()
def test_stream_likelihoods_sum_to_one_over_all_texts_and_over_all_grids():
    dvae, prior = build_models()
    _, tokens = stream_log_prob(prior, join_streams(prior, TEXT_IDS, TEXT_MASK, list_codes(dvae)))
    assert len(tokens) == 81
    assert tokens.exp().sum().item() == pytest.approx(1, abs=1e-5)
    # all that a text state can predict: 5 ids and 4 pads, at each of the 3 positions after start-of-text
    texts = torch.tensor([(0, *ids) for ids in itertools.product(range(9), repeat=3)])
    image = join_streams(prior, TEXT_IDS, TEXT_MASK, torch.zeros(1, 2, 2, dtype=torch.int64))[:, 4:]
    streams = torch.cat([texts, image.expand(len(texts), -1)], dim=1)
    text, _ = stream_log_prob(prior, streams)
    assert text.exp().sum().item() == pytest.approx(1, abs=1e-5)


def check_against_losses(prior, num_text_targets):
    tokenizer = build_tokenizer()
    encoded = encode_captions(tokenizer, ["a red fox", "two green apples on a table"], 12)
    codes = torch.randint(16, (2, 4, 4), generator=torch.Generator().manual_seed(0))
    input_ids = join_streams(prior, encoded["input_ids"], encoded["attention_mask"], codes)
    text, tokens = stream_log_prob(prior, input_ids)
    output = prior(input_ids=input_ids, labels=input_ids)
    assert tokens.sum().item() == pytest.approx(-output.image_loss.item() * 2 * 16, rel=1e-5)
    assert text.sum().item() == pytest.approx(-output.text_loss.item() * 2 * num_text_targets, rel=1e-5)


@torch.no_grad()
def test_stream_likelihoods_are_the_training_losses():
    check_against_losses(build_prior(), num_text_targets=11)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_priors_of_the_family_have_theirs(kind):
    options = KINDS[kind]
    prior = build_family_prior(**options)
    check_against_losses(prior, num_text_targets=11 + (options.get("start_token_id") is not None))
    encoded = encode_captions(build_tokenizer(), ["a red fox"], 12)
    pictures = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    text = (encoded["input_ids"], encoded["attention_mask"])
    parts = evidence_lower_bound(build_dvae(), prior, pictures, *text, torch.Generator(), 3)
    assert parts.bound.isfinite().all()


# ----------------------------------------------------------------------------------------------- batches, and refusals


def test_any_batch_gives_the_same_bits():
    dvae, prior = build_dvae(), build_prior()
    pictures = torch.rand(5, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    encoded = encode_captions(build_tokenizer(), ["a red fox"] * 3 + ["a blue bird", "two green apples"], 12)

    def measure(rows):
        generators = [torch.Generator().manual_seed(100 + row) for row in rows]
        text = (encoded["input_ids"][rows], encoded["attention_mask"][rows])
        return evidence_lower_bound(dvae, prior, pictures[rows], *text, generators, 4)

    whole, order = measure([0, 1, 2, 3, 4]), [3, 0, 4, 2, 1]
    split = [measure(rows) for rows in (order[:2], order[2:3], order[3:])]
    for name in ("picture", "tokens", "entropy", "text", "argmax_picture", "argmax_tokens"):
        assert torch.cat([part[name] for part in split]).equal(whole[name][order]), name
    assert not whole.picture[0].equal(whole.picture[1])


def test_samples_in_chunks_are_the_same_to_rounding():
    dvae, prior = build_dvae(), build_prior()
    picture = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    encoded = encode_captions(build_tokenizer(), ["a red fox"], 12)
    text = (encoded["input_ids"], encoded["attention_mask"])
    whole, chunks = (
        evidence_lower_bound(dvae, prior, picture, *text, torch.Generator().manual_seed(0), 6, max_batch_size=size)
        for size in (None, 4)
    )
    torch.testing.assert_close(chunks.to_tuple()[:-1], whole.to_tuple()[:-1], rtol=1e-5, atol=1e-4)


def test_standard_error_is_that_of_the_mean():
    values = torch.tensor([[1.0, 2.0, 6.0], [3.0, 3.0, 3.0]])
    assert standard_error(values).tolist() == pytest.approx([math.sqrt(7 / 3), 0])
    assert standard_error(values[:, :1]).isnan().all()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"dvae": build_dvae(sample_size=32)}, "grid of 8"),
        ({"dvae": build_dvae().train()}, "call `.eval\\(\\)`"),
        ({"dvae": torch.nn.Identity()}, "no likelihood of pixels"),
        ({"num_samples": 0}, "`num_samples` is 0"),
        ({"max_batch_size": 0}, "`max_batch_size` is 0"),
        ({"text_ids": torch.zeros(2, 12, dtype=torch.int64)}, "1 pictures, 2 captions"),
        ({"prior": None}, "without a prior none"),
        ({"text_ids": None, "attention_mask": None}, "0 captions"),
        ({"pixel_values": torch.rand(1, 3, 32, 32)}, "at most 16 tokens"),
    ],
)
def test_refusals(changes, words):
    arguments = {"dvae": build_dvae(), "prior": build_prior(), "pixel_values": torch.rand(1, 3, 16, 16)}
    arguments |= {"text_ids": torch.zeros(1, 12, dtype=torch.int64), "attention_mask": torch.ones(1, 12)}
    with pytest.raises(ValueError, match=words):
        evidence_lower_bound(**{**arguments, **changes})
