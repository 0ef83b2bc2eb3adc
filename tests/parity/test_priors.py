"""Converted priors and caption tokenizers against the originals' own code: DALLE-pytorch, ruDALL-E, minDALL-E."""

import json
import os

import pytest
import torch
from captions import make_captions
from originals import load_reference, run_original
from tokenizers import Tokenizer, models, pre_tokenizers

from conversion.convert import convert
from conversion.families import caption_tokenizers, rudalle
from hf_dalle import DALLEPipeline, encode_captions
from hf_dalle.sampling import draw_image_tokens, spawn_generators


pytestmark = pytest.mark.parity

TOLERANCE = 1e-4
CLONE_VARIABLE = "HF_DALLE_MINDALLE"


def draw_greedily(prior, text, attention_mask, **options):
    generators = spawn_generators(None, len(text))
    *_, (_, tokens) = draw_image_tokens(prior, text, attention_mask, generators=generators, top_k=1, **options)
    return tokens


def check_prior(prior, reference, attention_mask, text_logits, image_logits):
    """Logits at every position, and what is drawn from a cache against the original's uncached greedy tokens."""
    stream = prior.join_stream(reference["text"], attention_mask, reference["image"])["input_ids"]
    with torch.no_grad():
        output = prior(stream[:, :-1], use_cache=False)
    torch.testing.assert_close(output.text_logits, text_logits, atol=TOLERANCE, rtol=0)
    torch.testing.assert_close(output.image_logits, image_logits, atol=TOLERANCE, rtol=0)
    if "greedy" in reference:
        assert draw_greedily(prior, reference["text"], attention_mask).equal(reference["greedy"])
        assert len(reference["greedy"].unique()) > 2
    return stream


def check_pictures(pipe, reference, pixels):
    grid = reference["image"].unflatten(1, (pipe.prior.config.image_grid_size, -1))
    with torch.no_grad():
        torch.testing.assert_close(pipe.dvae.decode(grid).sample, pixels, atol=TOLERANCE, rtol=0)


# ------------------------------------------------------------------------------------------------------ DALLE-pytorch

SPARSE = ["full", "axial_row", "axial_col", "conv_like"]
SIZES = {"dim": 32, "depth": 2, "heads": 2, "dim_head": 16, "num_text_tokens": 50, "text_seq_len": 6}
OFF = {"rotary_emb": False, "shift_tokens": False}
VAE = {"image_size": 32, "num_tokens": 16, "codebook_dim": 8, "num_layers": 3, "num_resnet_blocks": 0, "hidden_dim": 8}
WIDE = {**VAE, "image_size": 64}  # a grid of 8, wider than the conv window
MOVED = {"rotary_emb": True, "shift_tokens": True}
EVERYTHING = {**MOVED, "sandwich_norm": True, "stable": True}


def describe(vae=VAE, vae_class="DiscreteVAE", **dalle):
    return {"dalle": {**SIZES, **OFF, **dalle}, "vae": vae, "vae_class": vae_class}


DALLE_PYTORCH = {
    "plain": describe(),
    "rotary": describe(rotary_emb=True, dim_head=22),
    "shift": describe(shift_tokens=True, dim=34),
    "sparse": describe(WIDE, depth=5, attn_types=SPARSE),
    "sparse-rotary-shift": describe({**WIDE, "num_resnet_blocks": 1}, depth=4, attn_types=SPARSE, **MOVED),
    "row-sandwich": describe(attn_types=["axial_row"], sandwich_norm=True),
    "column-stable": describe(attn_types=["axial_col"], stable=True),
    "conv-rotary": describe(WIDE, attn_types=["conv_like"], rotary_emb=True),
    "tied": describe(share_input_output_emb=True),
    "deep": describe(dim=16, depth=26, dim_head=8),  # layer scale of 0.1, 1e-5 and 1e-6
    "everything": describe(depth=4, attn_types=SPARSE[::-1], share_input_output_emb=True, **EVERYTHING),
    "openai": describe({"n_hid": 16, "n_init": 8, "vocab_size": 24}, "OpenAIDiscreteVAE", shift_tokens=True),
    "vqgan": describe({"n_embed": 20, "kind": "nearest"}, "VQGanVAE", attn_types=SPARSE[:2]),
    "vqgan-gumbel": describe({"n_embed": 20, "kind": "gumbel"}, "VQGanVAE", rotary_emb=True),
}


@pytest.fixture(scope="module")
def dalle_pytorch(tmp_path_factory):
    """A folder a case, with the checkpoint, the reference, and a caption tokenizer of 50 words."""
    folder = run_original("dalle_pytorch_priors", tmp_path_factory.mktemp("dalle_pytorch"), **DALLE_PYTORCH)
    words = {f"w{number}" if number else "[UNK]": number for number in range(SIZES["num_text_tokens"])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    for name in DALLE_PYTORCH:
        tokenizer.save(str(folder / name / "tokenizer.json"))
    return folder


@pytest.mark.parametrize("name", DALLE_PYTORCH)
def test_dalle_pytorch(dalle_pytorch, tmp_path, name):
    report = convert("dalle-pytorch", dalle_pytorch / name, tmp_path / "out", do_verify=name == "everything")
    assert any("sandwich_norm" in line for line in report)
    pipe, reference = DALLEPipeline.from_pretrained(tmp_path / "out"), load_reference(dalle_pytorch / name)
    attention_mask = torch.ones_like(reference["text"])
    attention_mask[1, 3:] = 0  # the third caption has the id 0 in the middle
    text_logits, image_logits = reference["logits"].tensor_split([SIZES["text_seq_len"]], dim=1)
    num_text_logits = pipe.prior.config.image_token_offset
    text_logits, image_logits = text_logits[..., :num_text_logits], image_logits[..., num_text_logits:]
    stream = check_prior(pipe.prior, reference, attention_mask, text_logits, image_logits)
    with torch.no_grad():
        loss = pipe.prior(stream, labels=stream).loss
    torch.testing.assert_close(loss, reference["loss"], atol=TOLERANCE, rtol=0)
    check_pictures(pipe, reference, reference["pixels"])
    if "guided" in reference:
        nothing = torch.zeros_like(attention_mask)
        negative = {"negative_text_ids": nothing + 1, "negative_attention_mask": nothing}
        drawn = draw_greedily(pipe.prior, reference["text"], attention_mask, guidance_scale=3.0, **negative)
        assert drawn.equal(reference["guided"])


def test_a_pipeline_of_dalle_pytorch_draws_in_any_batch_and_goes_on_from_a_picture(dalle_pytorch, tmp_path):
    convert("dalle-pytorch", dalle_pytorch / "everything", tmp_path / "out")
    pipe = DALLEPipeline.from_pretrained(tmp_path / "out")
    one = pipe("w1 w2", generator=torch.Generator().manual_seed(0), output_type="pt").images
    four = pipe("w1 w2", generator=torch.Generator().manual_seed(0), num_images_per_prompt=4, output_type="pt").images
    assert one.equal(four[:1])
    options = {"num_prefix_rows": 2, "output_type": "latent", "guidance_scale": 2.0}
    drawn = pipe(["w1", "w3 w4"], image=one[0], num_images_per_prompt=2, **options).images
    kept = pipe.dvae.encode(one).tokens[:, :2]
    assert drawn.shape == (4, 4, 4) and drawn[:, :2].equal(kept.expand(4, -1, -1))


READERS = {
    "clip": ("bpe_simple_vocab_16e6.txt", caption_tokenizers.read_clip_bpe),
    "json": ("bpe.json", caption_tokenizers.read_json_tokenizer),
    "bert": ("vocab.txt", caption_tokenizers.read_bert_vocabulary),
    "youtokentome": ("bpe.model", caption_tokenizers.read_youtokentome),
}


@pytest.fixture(scope="module")
def caption_ids(tmp_path_factory):
    return run_original("caption_ids", tmp_path_factory.mktemp("caption_ids"), captions=make_captions())


@pytest.mark.parametrize("name", READERS)
def test_caption_ids_of_dalle_pytorch(caption_ids, tmp_path, name):
    file, read = READERS[name]
    read(caption_ids / name / file, 4096).save_pretrained(tmp_path)
    tokenizer = type(read(caption_ids / name / file, 4096)).from_pretrained(tmp_path)  # what is saved is what counts
    expected = json.loads((caption_ids / name / "ids").read_text())
    wrong = [
        (caption, ids, found)
        for caption, ids in zip(make_captions(), expected, strict=True)
        if (found := tokenizer(caption, verbose=False)["input_ids"]) != ids
    ]
    assert wrong == []


# ---------------------------------------------------------------------------------------------------------- ruDALL-E

RUDALLE_MODEL = {
    **{"num_layers": 6, "hidden_size": 48, "num_attention_heads": 4, "text_seq_length": 24},
    **{"image_tokens_per_dim": 4, "vocab_size": 424, "image_vocab_size": 20, "cogview_sandwich_layernorm": True},
}


def describe_rudalle(has_masks, **model):
    model = {**RUDALLE_MODEL, **model}
    ddconfig = {
        **{"ch": 32, "out_ch": 3, "ch_mult": [1, 1], "num_res_blocks": 1, "in_channels": 3, "attn_resolutions": [4]},
        **{"resolution": 2 * model["image_tokens_per_dim"], "z_channels": 16, "double_z": False, "dropout": 0.0},
    }
    vqgan = {"ddconfig": ddconfig, "n_embed": model["image_vocab_size"], "embed_dim": 16}
    return {"model": model, "vqgan": vqgan, "has_masks": has_masks}


RUDALLE = {
    "masks": describe_rudalle(True),
    "bare": describe_rudalle(False, num_layers=4, cogview_sandwich_layernorm=False),
    "wide": describe_rudalle(True, num_layers=4, image_tokens_per_dim=8),  # wider than half the conv window
}


@pytest.fixture(scope="module")
def rudalle_originals(tmp_path_factory):
    return run_original(
        "rudalle_priors", tmp_path_factory.mktemp("rudalle"), captions=make_captions(100), cases=RUDALLE
    )


@pytest.mark.parametrize("name", RUDALLE)
def test_rudalle(rudalle_originals, tmp_path, monkeypatch, name):
    monkeypatch.setitem(rudalle.HEADS_OF_WIDTH, RUDALLE_MODEL["hidden_size"], RUDALLE_MODEL["num_attention_heads"])
    source = rudalle_originals / name
    report = convert("rudalle", source, tmp_path / "out", do_verify=True)
    assert any("v3 form" in line for line in report)
    pipe, reference = DALLEPipeline.from_pretrained(tmp_path / "out"), load_reference(source)
    config = pipe.prior.config
    ids = encode_captions(pipe.tokenizer, make_captions(100), config.text_length)["input_ids"]
    assert ids.tolist() == json.loads((source / "reference.json").read_text())
    text_logits, image_logits = reference["logits"][:, :-1].tensor_split([config.text_length - 1], dim=1)
    text_logits, image_logits = (
        text_logits[..., : config.image_token_offset],
        image_logits[..., config.image_token_offset :],
    )
    check_prior(pipe.prior, reference, (reference["text"] != 0).long(), text_logits, image_logits)
    check_pictures(pipe, reference, reference["pixels"])
    one = pipe("красная лиса", generator=torch.Generator().manual_seed(0), output_type="pt").images
    assert one.shape[-1] == 2 * config.image_grid_size and pipe.prior.generation_config.top_p == rudalle.TOP_P


# --------------------------------------------------------------------------------------------------------- minDALL-E


def describe_mindalle(**options):
    dropouts = {"embd_pdrop": 0.0, "resid_pdrop": 0.0, "attn_pdrop": 0.0}
    stage1 = {
        **{"double_z": False, "z_channels": 16, "resolution": 8, "in_channels": 3, "out_ch": 3, "ch": 32},
        **{"ch_mult": [1, 1], "num_res_blocks": 1, "attn_resolutions": [4], "pdrop": 0.0},
    }
    stage2 = {
        **{"embed_dim": 48, "n_layers": 3, "n_heads": 4, "n_dense_layers": 3, "ctx_len_img": 16, "ctx_len_txt": 12},
        **{"mlp_bias": True, "attn_bias": True, "gelu_use_approx": False, **dropouts, **options},
    }
    return {
        "stage1": {"type": "vqgan", "embed_dim": 16, "n_embed": 20, "hparams": stage1},
        "stage2": {"type": "transformer1d", "vocab_size_txt": 500, "vocab_size_img": 20, "hparams": stage2},
    }


MINDALLE = {"gelu": describe_mindalle(), "quick-gelu": describe_mindalle(gelu_use_approx=True)}


@pytest.fixture(scope="module")
def mindalle_originals(tmp_path_factory):
    clone = os.environ.get(CLONE_VARIABLE)
    if not clone:
        pytest.skip(f"minDALL-E is on no package index: set {CLONE_VARIABLE} to a clone of kakaobrain/minDALL-E")
    options = {"clone": clone, "captions": make_captions(), "cases": MINDALLE}
    return run_original("mindalle_priors", tmp_path_factory.mktemp("mindalle"), **options)


@pytest.mark.parametrize("name", MINDALLE)
def test_mindalle(mindalle_originals, tmp_path, name):
    source = mindalle_originals / name
    convert("mindalle", source, tmp_path / "out", do_verify=True)
    pipe, reference = DALLEPipeline.from_pretrained(tmp_path / "out"), load_reference(source)
    encoded = encode_captions(pipe.tokenizer, make_captions(), pipe.prior.config.text_length)
    assert encoded["input_ids"].tolist() == json.loads((source / "reference.json").read_text())
    attention_mask = torch.ones_like(reference["text"])
    attention_mask[:, -1] = 0  # pads are tokens like any other
    check_prior(pipe.prior, reference, attention_mask, reference["text_logits"], reference["image_logits"])
    check_pictures(pipe, reference, reference["pixels"])
    assert pipe("a red fox", output_type="pt").images.shape == (1, 3, 8, 8)
