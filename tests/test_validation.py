"""What a validation says of both stages: bits a dimension, the dVAE's own figures, use of codes, by literal sums."""

import math

import pytest
import torch
from arguments import parse_arguments
from precompute_image_tokens import main as precompute
from tiny_training import build_prior_settings, build_untrained_home, dvae_settings, write_settings
from train_dvae import DVAEStage
from train_prior import PriorStage

from hf_dalle.logit_laplace import logit_laplace_log_prob, map_pixels


DIMS = 3 * 16 * 16


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return build_untrained_home(tmp_path_factory.mktemp("validation"))


def build_stage(kind, settings):
    stage = kind(parse_arguments([str(write_settings(settings))]))
    stage.model.eval()
    return stage


@torch.no_grad()
def read_pictures(stage, dvae):
    """The validation pictures, their tokens, and bits a dimension of their density over 0 ... 255 given the tokens."""
    rows = range(len(stage.validation_dataset))
    pixels = torch.stack([stage.validation_dataset.read_row(row)["pixel_values"] for row in rows])
    tokens = dvae.encode(pixels).tokens
    decoded = dvae.decode(tokens)
    density = logit_laplace_log_prob(map_pixels(pixels, 0.1), decoded.mu, decoded.log_b) + math.log(0.8 / 255)
    error = (decoded.sample - pixels).square().flatten(1).mean(1)
    return tokens, -density.mean().item() / math.log(2), (-10 * error.log10()).mean().item()


@torch.no_grad()
def test_the_priors_bits_are_tokens_and_pixels(home, tmp_path):
    stage = build_stage(PriorStage, build_prior_settings(home, tmp_path / "run", validation_split="validation"))
    head = stage.dvae.requires_grad_(False).decoder.conv_out  # taught red: less than the 8 bits that pixels have
    head.weight.zero_()
    head.bias.copy_(torch.tensor([2.2, -2.2, -2.2, 0, 0, 0]).repeat_interleave(16))
    values, pictures = stage.validate(stage.model)
    tokens, pixel_bits, psnr = read_pictures(stage, stage.dvae)
    token_bits = 16 * values["validation_image_loss"] / math.log(2) / DIMS
    assert values["validation_token_bits_per_dim"] == pytest.approx(token_bits)
    assert values["validation_pixel_bits_per_dim"] == pytest.approx(pixel_bits, rel=1e-4)
    assert values["validation_bits_per_dim"] == pytest.approx(token_bits + pixel_bits, rel=1e-4)
    assert values["validation_dvae_psnr"] == pytest.approx(psnr, rel=1e-4)
    counts = torch.bincount(tokens.flatten(), minlength=16)
    assert values["validation_codes_used"] == pytest.approx((counts > 0).float().mean().item())
    entropy = torch.special.entr(counts / counts.sum()).sum()
    assert values["validation_perplexity"] == pytest.approx(entropy.exp().item(), rel=1e-5)
    assert pictures == {}
    # Once a run: the frozen dVAE's figures are kept, the prior's are not.
    head.bias.zero_()
    stage.model.lm_head.weight.zero_()
    again, _ = stage.validate(stage.model)
    assert again["validation_dvae_psnr"] == values["validation_dvae_psnr"]
    uniform = 16 * math.log2(16) / DIMS
    assert again["validation_token_bits_per_dim"] == pytest.approx(uniform, rel=1e-5)


@torch.no_grad()
def test_a_likelihood_that_was_not_trained_is_left_out(home, tmp_path):
    stage = build_stage(PriorStage, build_prior_settings(home, tmp_path / "run", validation_split="validation"))
    stage.dvae.decoder.conv_out.bias[3 * 16 :] = -20.0  # ln b: pixels then cost thousands of bits
    values, _ = stage.validate(stage.model)
    assert "validation_dvae_psnr" in values
    assert not {"validation_pixel_bits_per_dim", "validation_bits_per_dim"} & values.keys()


@torch.no_grad()
def test_stored_tokens_give_the_priors_part(home, tmp_path):
    store = tmp_path / "tokens"
    options = ["--train_data_dir", str(home / "data"), "--splits", "train", "validation", "--output_dir", str(store)]
    precompute(["--dvae", str(home / "dvae"), *options])
    settings = build_prior_settings(home, tmp_path / "run", validation_split="validation")
    live = build_stage(PriorStage, settings)
    stored = build_stage(PriorStage, {**settings, "train_data_dir": str(store), "tokens_column": "image_tokens"})
    stored.model.load_state_dict(live.model.state_dict())
    expected, _ = live.validate(live.model)
    values, _ = stored.validate(stored.model)
    without = {"validation_dvae_psnr", "validation_pixel_bits_per_dim", "validation_bits_per_dim"}
    assert values == {name: pytest.approx(value) for name, value in expected.items() if name not in without}


@torch.no_grad()
def test_the_dvaes_bits_are_its_nats(home, tmp_path):
    settings = dvae_settings(home / "data", tmp_path / "run", validation_split="validation", min_log_b=None)
    stage = build_stage(DVAEStage, settings)
    values, pictures = stage.validate(stage.model)
    tokens, bits, psnr = read_pictures(stage, stage.model)
    assert values["validation_pixel_bits_per_dim"] == pytest.approx(bits, rel=1e-4)
    assert values["validation_nll"] == pytest.approx((bits + math.log2(0.8 / 255)) * math.log(2), rel=1e-4)
    assert values["validation_psnr"] == pytest.approx(psnr, rel=1e-4)
    assert values["validation_codes_used"] == pytest.approx(len(tokens.unique()) / 16)
    assert pictures["reconstructions"].size == (5 * 16, 2 * 16)
    stage.code_counts += 3
    other = build_stage(DVAEStage, settings)
    other.load_state_dict(stage.state_dict())
    assert other.code_counts.equal(stage.code_counts)
