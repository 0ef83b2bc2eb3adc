"""A codebook taken from the data: in use where a random one is not, as sharp as asked for, in an unchanged model.

And codes that fell out of use, which come back.
"""

import math

import pytest
import torch
from initialize_dvae import cell_features, initialize_from_data, revive_codes
from tiny import build_dvae

from hf_dalle.logit_laplace import map_pixels
from hf_dalle.losses import kl_to_uniform


MODEL = {"patch_size": 4, "encoder_block_out_channels": (16,), "decoder_block_out_channels": (16,)}


@pytest.fixture(scope="module")
def pixel_values():
    """128 pictures of 4 x 4 flat patches, whose colours are of 40 kinds."""
    generator = torch.Generator().manual_seed(0)
    colours = torch.rand(40, 3, generator=generator)
    patches = colours[torch.randint(40, (128, 4, 4), generator=generator)].movedim(-1, 1)
    return patches.repeat_interleave(4, dim=2).repeat_interleave(4, dim=3)


def count_codes(dvae, pixel_values):
    """Perplexity of the tokens."""
    shares = torch.bincount(dvae.encode(pixel_values).tokens.flatten(), minlength=dvae.config.vocab_size)
    return torch.special.entr(shares / shares.sum()).sum().exp().item()


@pytest.mark.parametrize("quantizer", ["gumbel", "nearest"])
def test_codes_are_in_use(pixel_values, quantizer):
    random, dvae = (build_dvae(quantizer=quantizer, codebook_dim=8, vocab_size=64, **MODEL) for _ in range(2))
    names = {name: value.shape for name, value in dvae.state_dict().items()}
    initialize_from_data(dvae, pixel_values, kl_per_token=3.0)
    assert count_codes(dvae, pixel_values) > 40 and count_codes(random, pixel_values) < 20
    assert {name: value.shape for name, value in dvae.state_dict().items()} == names
    assert dvae.config == random.config
    changed = {name for name, value in dvae.state_dict().items() if not torch.equal(value, random.state_dict()[name])}
    codebook = {"gumbel": {"encoder.conv_out.weight", "encoder.conv_out.bias", "decoder.conv_in.weight"},
                "nearest": {"codebook.codes", "codebook.ema_sum"}}[quantizer]  # fmt: skip
    assert changed == codebook | {"decoder.conv_out.bias"}


@pytest.mark.parametrize("kl_per_token", [0.5, 2.0, 4.0])
def test_the_kl_asked_for_is_the_kl_got(pixel_values, kl_per_token):
    dvae = build_dvae(vocab_size=64, **MODEL)
    initialize_from_data(dvae, pixel_values, kl_per_token)
    kl = kl_to_uniform(dvae.encode(pixel_values).logits).mean() / 16
    assert kl.item() == pytest.approx(kl_per_token, abs=0.02)


def test_codes_are_the_clusters_of_the_encoders_features(pixel_values):
    """Logits are minus the scaled squared distances to the centres, up to what is equal for all codes."""
    dvae = build_dvae(vocab_size=32, **MODEL)
    initialize_from_data(dvae, pixel_values, 3.0)
    caught = []
    dvae.encoder.conv_out.register_forward_hook(lambda module, inputs, output: caught.append((inputs[0], output)))
    dvae.encode(pixel_values[:4])
    features, logits = (part.movedim(1, -1).flatten(0, 2) for part in caught[0])
    weight, bias = dvae.encoder.conv_out.weight[:, :, 0, 0], dvae.encoder.conv_out.bias
    scale = (weight.square().sum(1) / (-4 * bias)).mean()  # |2 s c|^2 / 4 s |c|^2
    distances = torch.cdist(features, weight / (2 * scale)).square()
    difference = logits + scale * distances
    assert (difference - difference[:, :1]).abs().max() < 1e-3 * logits.abs().max()


def test_the_decoder_begins_at_the_mean(pixel_values):
    dvae = build_dvae(vocab_size=32, **MODEL)
    initialize_from_data(dvae, pixel_values, 3.0)
    torch.nn.init.zeros_(dvae.decoder.conv_out.weight)  # what is left is the bias
    decoded = dvae.decode(dvae.encode(pixel_values[:2]).tokens)
    logits = torch.logit(map_pixels(pixel_values))
    mean = logits.mean(dim=(0, 2, 3))
    log_b = (logits - mean[:, None, None]).abs().mean(dim=(0, 2, 3)).log()
    for channel in range(3):
        torch.testing.assert_close(decoded.mu[:, channel], mean[channel].expand(2, 16, 16))
        torch.testing.assert_close(decoded.log_b[:, channel], log_b[channel].expand(2, 16, 16))


def test_the_same_seed_gives_the_same_codes(pixel_values):
    models = [build_dvae(vocab_size=32, **MODEL) for _ in range(3)]
    for model, seed in zip(models, (0, 0, 1), strict=True):
        initialize_from_data(model, pixel_values, 3.0, seed)
    weights = [model.encoder.conv_out.weight for model in models]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])


def test_unused_codes_come_back_as_cells_of_the_pictures(pixel_values):
    dvae = build_dvae(quantizer="nearest", codebook_dim=8, vocab_size=64, **MODEL)
    codebook, old = dvae.codebook, dvae.codebook.codes.clone()
    codebook.ema_count[:] = 3.0
    codebook.ema_count[[5, 40]] = 0.1  # of a mean near 2.9
    assert revive_codes(dvae, pixel_values, min_share=0.01) == 0 and torch.equal(codebook.codes, old)
    assert revive_codes(dvae, pixel_values, min_share=0.1) == 2
    kept = torch.ones(64, dtype=bool).index_fill(0, torch.tensor([5, 40]), False)
    assert torch.equal(codebook.codes[kept], old[kept]) and codebook.ema_count[kept].eq(3).all()
    distances = torch.cdist(codebook.codes[[5, 40]], cell_features(dvae, pixel_values))
    assert distances.min(dim=1).values.max() < 1e-4
    torch.testing.assert_close(codebook.ema_sum[[5, 40]] / codebook.ema_count[[5, 40], None], codebook.codes[[5, 40]])
    assert (codebook.ema_count[[5, 40]] > 1).all()  # enough not to be moved again at once
    assert {5, 40} <= set(dvae.encode(pixel_values).tokens.unique().tolist())


def test_more_unused_codes_than_cells(pixel_values):
    dvae = build_dvae(quantizer="nearest", codebook_dim=8, vocab_size=64, **MODEL)
    dvae.codebook.ema_count[:50] = 0.0
    assert revive_codes(dvae, pixel_values[:2], min_share=0.5) == 32  # 2 pictures of 4 x 4 cells


def test_what_cannot_be_done_is_refused(pixel_values):
    dvae = build_dvae(vocab_size=64, **MODEL)
    with pytest.raises(ValueError, match="48 cells are too few for 64 codes"):
        initialize_from_data(dvae, pixel_values[:3], 3.0)
    with pytest.raises(ValueError, match="Only [0-9]+ cells differ"):
        initialize_from_data(dvae, torch.ones(8, 3, 16, 16), 3.0)
    for kl_per_token in (0, -1, math.log(64), math.nan):
        with pytest.raises(ValueError, match=r"between 0 and ln K = 4.16"):
            initialize_from_data(dvae, pixel_values, kl_per_token)
