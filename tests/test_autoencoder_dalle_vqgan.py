"""The family's other autoencoders: what they share with the dVAE, and that a pipeline draws with them.

That their numbers are the originals' is held in tests/parity.
"""

import pytest
import torch
import torch.nn.functional as F
from tiny import build_pipeline, build_prior

from hf_dalle import DalleDiscreteVAE, DALLEPipeline, DalleVQGAN
from hf_dalle.candidates import count_decoding_bytes


VQGAN = {"sample_size": 16, "vocab_size": 16, "block_out_channels": [8, 8, 16], "layers_per_block": 1}
VQGAN |= {"attention_levels": [2], "latent_channels": 6, "codebook_dim": 5, "norm_num_groups": 4}
DISCRETE_VAE = {"sample_size": 16, "vocab_size": 16, "num_layers": 2}
BUILDERS = {
    "vqgan-nearest": lambda **sizes: DalleVQGAN(**{**VQGAN, **sizes}),
    "vqgan-gumbel": lambda **sizes: DalleVQGAN(**{**VQGAN, "quantizer": "gumbel", **sizes}),
    "discrete-vae": lambda **sizes: DalleDiscreteVAE(**{**DISCRETE_VAE, **sizes}),
    "discrete-resnets": lambda **sizes: DalleDiscreteVAE(16, 16, 6, 8, 2, 2, None, None, **sizes),
}
each_model = pytest.mark.parametrize("name", BUILDERS)


def build(name, **sizes):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return BUILDERS[name](**sizes).eval()


@pytest.fixture
def pixels():
    return torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))


@each_model
@torch.no_grad()
def test_tokens_and_pictures(pixels, name):
    model = build(name)
    encoded = model.encode(pixels)
    assert encoded.logits.shape == (2, 16, 4, 4) and encoded.tokens.equal(encoded.logits.argmax(dim=1))
    sample = model.decode(encoded.tokens).sample
    assert sample.shape == pixels.shape and sample.min() >= 0 and sample.max() <= 1
    one_hot = F.one_hot(encoded.tokens, 16).movedim(-1, 1).float()
    torch.testing.assert_close(model.decode(one_hot).sample, sample)
    assert model(pixels).sample.equal(sample) and model.decode(encoded.tokens, return_dict=False)[0].equal(sample)
    assert model.encode(pixels, return_dict=False)[1].equal(encoded.tokens)
    assert model.downsampling_factor == model.image_grid_size == 4
    # other sides, as long as cells are whole
    assert model.decode(model.encode(torch.rand(1, 3, 8, 24)).tokens).sample.shape == (1, 3, 8, 24)


@torch.no_grad()
def test_the_nearest_code_is_the_nearest(pixels):
    model = build("vqgan-nearest")
    encoded = model.quant_conv(model.encoder(2 * pixels - 1))
    distances = (encoded[:, None] - model.quantize.embedding.weight[:, :, None, None]).square().sum(dim=2)
    output = model.encode(pixels)
    torch.testing.assert_close(output.logits, -distances, atol=1e-5, rtol=1e-5)
    assert output.tokens.equal(distances.argmin(dim=1))


@each_model
@torch.no_grad()
def test_saved_and_loaded(pixels, name, tmp_path):
    model = build(name)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert loaded.encode(pixels).logits.equal(model.encode(pixels).logits)
    assert str(tmp_path) not in loaded.to_json_string()


@each_model
@torch.no_grad()
def test_a_pipeline_draws_and_continues_with_it(name, tmp_path):
    pipeline = build_pipeline(dvae=build(name))
    pipeline.save_pretrained(tmp_path)
    loaded = DALLEPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    drawn = [
        pipe("a red fox", generator=torch.Generator().manual_seed(1), output_type="pt").images
        for pipe in (pipeline, loaded)
    ]
    assert drawn[0].equal(drawn[1]) and drawn[0].shape == (1, 3, 16, 16)
    top = loaded("a red fox", image=drawn[0], num_prefix_rows=2, output_type="latent").images[0, :2]
    assert top.equal(loaded.dvae.encode(drawn[0]).tokens[0, :2])


def test_the_memory_of_decoding_counts_the_widest_map():
    assert build("vqgan-nearest").widest_map == max(8 * 16**2, 16 * 8**2)  # level 1 begins with level 2's width
    assert build("discrete-vae").widest_map == 64 * 16**2
    assert count_decoding_bytes(build("vqgan-nearest")) == (6 * 2048 + 24 * 256) * 4


@each_model
@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda model: model.encode(torch.rand(1, 3, 18, 16)), "multiples of the downsampling of 4"),
        (lambda model: model.encode(torch.rand(1, 3, 16, 16) - 2), r"in \[0, 1\]"),
        (lambda model: model.decode(torch.full((1, 4, 4), 16)), r"\[0, 16\); got 16 to 16"),
        (lambda model: model.decode(torch.zeros(1, 4, 4)), "tokens"),
    ],
)
def test_input_that_does_not_fit_is_refused(name, call, words):
    with pytest.raises(ValueError, match=words):
        call(build(name))


@pytest.mark.parametrize(
    ("name", "sizes", "words"),
    [
        ("vqgan-nearest", {"quantizer": "noise"}, "'nearest' or 'gumbel'"),
        ("vqgan-nearest", {"block_out_channels": [8, 10]}, "multiples of `norm_num_groups`"),
        ("vqgan-nearest", {"block_out_channels": []}, "multiples of `norm_num_groups`"),
        ("vqgan-nearest", {"attention_levels": [3]}, "`attention_levels`"),
        ("vqgan-nearest", {"sample_size": 18}, "does not divide"),
        ("discrete-vae", {"sample_size": 18}, "does not divide"),
        ("discrete-vae", {"num_layers": 0}, "does not divide"),
        ("discrete-vae", {"pixel_mean": None}, "three numbers each, or none"),
        ("discrete-vae", {"pixel_mean": [0.5], "pixel_std": [0.5]}, "three numbers each, or none"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(name, sizes, words):
    with pytest.raises(ValueError, match=words):
        build(name, **sizes)


def test_a_pipeline_refuses_codes_that_its_prior_does_not_draw():
    with pytest.raises(ValueError, match="dvae.config.vocab_size"):
        build_pipeline(dvae=build("vqgan-nearest", vocab_size=20), prior=build_prior())
