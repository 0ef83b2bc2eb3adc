"""Converted image models against the originals' own code: OpenAI's dVAE, taming's VQGANs, DALLE-pytorch's VAE."""

import json

import pytest
import torch
from diffusers import VQModel
from originals import load_reference, run_original

from conversion.convert import convert
from conversion.families import openai_dvae
from conversion.families.dalle_pytorch_vae import map_image_model
from conversion.folders import Conversion, write_folder
from conversion.safe_load import list_tensors, load_checkpoint
from hf_dalle import DalleDiscreteVAE, DalleDVAE, DalleVQGAN


pytestmark = pytest.mark.parity


def _describe_vqgan(kind, ch_mult, attention, num_res_blocks):
    ddconfig = {
        **{"ch": 32, "out_ch": 3, "ch_mult": ch_mult, "num_res_blocks": num_res_blocks, "in_channels": 3},
        **{"attn_resolutions": attention, "resolution": 16, "z_channels": 24, "double_z": False, "dropout": 0.0},
    }
    embed_dim = 24 if kind == "gumbel" else 20
    return {"model": "vqgan", "kind": kind, "n_embed": 40, "embed_dim": embed_dim, "ddconfig": ddconfig}


def _describe_discrete_vae(num_resnet_blocks, **options):
    sizes = {"image_size": 16, "num_layers": 2, "num_tokens": 30, "codebook_dim": 12, "hidden_dim": 10}
    return {"model": "vae", "num_resnet_blocks": num_resnet_blocks, **sizes, **options}


DVAE_SIZES = {"model": "openai_dvae", "n_hid": 64, "n_init": 24, "vocab_size": 512, "size": 32}
UNEQUAL = [[0.4, 0.5, 0.6, 0.0], [0.6, 0.5, 0.4, 1.0]]
CASES = {
    "dvae-zip": {**DVAE_SIZES, "use_zip": True, "n_blk_per_group": 2},
    "dvae-legacy": {**DVAE_SIZES, "use_zip": False, "n_blk_per_group": 1},
    "vqgan-f16": _describe_vqgan("nearest", [1, 1, 2], [4], 2),  # its form: attention where the maps are smallest
    "vqgan-attention": _describe_vqgan("nearest", [1, 2, 2], [8, 4], 1),
    "vqgan-gumbel": _describe_vqgan("gumbel", [1, 2], [8], 2),
    "vae": _describe_discrete_vae(0),
    "vae-resnets": _describe_discrete_vae(2),
    "vae-plain": _describe_discrete_vae(1, normalization=None),
    "vae-unequal": _describe_discrete_vae(0, normalization=UNEQUAL),
}


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    """A folder a case, with the checkpoint and the reference."""
    return run_original("image_models", tmp_path_factory.mktemp("originals"), **CASES)


@pytest.mark.parametrize("name", [name for name in CASES if name.startswith("dvae")])
def test_openai_dvae(originals, tmp_path, name):
    convert("openai-dvae", originals / name, tmp_path / "converted")
    dvae, reference = DalleDVAE.from_pretrained(tmp_path / "converted"), load_reference(originals / name)
    with torch.no_grad():
        encoded = dvae.encode(reference["pixels"])
        decoded = dvae.decode(reference["tokens"])
    torch.testing.assert_close(encoded.logits, reference["logits"], atol=1e-5, rtol=1e-5)
    assert encoded.tokens.equal(reference["tokens"])
    maps = torch.cat([decoded.mu, decoded.log_b], dim=1)
    torch.testing.assert_close(maps, reference["maps"], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(decoded.sample, reference["sample"], atol=1e-6, rtol=0)


@pytest.mark.parametrize("name", [name for name in CASES if name.startswith("vqgan")])
def test_vqgan(originals, tmp_path, name):
    source, case = originals / name, CASES[name]
    convert("vqgan", source, tmp_path / "converted", do_verify=True)
    vqgan, reference = DalleVQGAN.from_pretrained(tmp_path / "converted"), load_reference(source)
    num_levels, attention = len(case["ddconfig"]["ch_mult"]), case["ddconfig"]["attn_resolutions"]
    assert vqgan.config.sample_size == 16 and vqgan.config.quantizer == case["kind"]
    assert vqgan.config.attention_levels == [level for level in range(num_levels) if 16 // 2**level in attention]
    with torch.no_grad():
        encoded = vqgan.encode(reference["pixels"])
        sample = vqgan.decode(reference["tokens"]).sample
    torch.testing.assert_close(encoded.logits, reference["logits"], atol=1e-4, rtol=1e-5)
    assert encoded.tokens.equal(reference["tokens"]) and encoded.tokens.unique().numel() > 2
    torch.testing.assert_close(sample, reference["sample"], atol=1e-5, rtol=0)
    record = json.loads((tmp_path / "converted" / "conversion.json").read_text())
    assert {key.split(".")[0] for key in record["parts"]["model"]["dropped_keys"]} == {"loss"}
    if case["kind"] == "nearest":
        assert_equal_to_diffusers(vqgan, reference)


def assert_equal_to_diffusers(vqgan, reference):
    """The weights are `VQModel`'s by name, and its decoder gives the same pictures."""
    config = vqgan.config
    levels = range(len(config.block_out_channels))
    has = [level in config.attention_levels for level in levels]
    model = VQModel(
        down_block_types=["AttnDownEncoderBlock2D" if attends else "DownEncoderBlock2D" for attends in has],
        up_block_types=["AttnUpDecoderBlock2D" if attends else "UpDecoderBlock2D" for attends in reversed(has)],
        block_out_channels=config.block_out_channels,
        layers_per_block=config.layers_per_block,
        latent_channels=config.latent_channels,
        num_vq_embeddings=config.vocab_size,
        vq_embed_dim=config.codebook_dim,
    )
    model.load_state_dict(vqgan.state_dict(), strict=True)
    with torch.no_grad():
        sample = model.decode(model.encode(2 * reference["pixels"] - 1).latents).sample
    torch.testing.assert_close((sample.clamp(-1, 1) + 1) / 2, reference["sample"], atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", [name for name in CASES if name.startswith("vae")])
def test_discrete_vae(originals, tmp_path, name):
    content = load_checkpoint(originals / name / "vae.pt").content
    part, inferred = map_image_model(list_tensors(content["weights"]), content["hparams"])
    conversion = Conversion({"": part}, openai_dvae.FACTS, [], inferred)
    conversion.check()
    write_folder(tmp_path, conversion)
    vae, reference = DalleDiscreteVAE.from_pretrained(tmp_path), load_reference(originals / name)
    with torch.no_grad():
        encoded = vae.encode(reference["pixels"])
        sample = vae.decode(reference["tokens"].unflatten(1, (4, 4))).sample
    torch.testing.assert_close(encoded.logits, reference["logits"], atol=1e-5, rtol=1e-5)
    assert encoded.tokens.flatten(1).equal(reference["tokens"])
    means, stds = CASES[name].get("normalization", [[0.5] * 3, [0.5] * 3]) or ([0.0] * 3, [1.0] * 3)
    means, stds = (torch.tensor(numbers[:3])[:, None, None] for numbers in (means, stds))
    expected = (reference["decoded"] * stds + means).clamp(0, 1)  # theirs stay normalised
    torch.testing.assert_close(sample, expected, atol=1e-6, rtol=0)
