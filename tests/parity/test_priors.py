"""Converted priors and caption tokenizers against the originals' own code: DALLE-pytorch, ruDALL-E, minDALL-E."""

import json
import logging
import os
import re
from contextlib import contextmanager

import pytest
import torch
from originals import find_older, load_reference, run_original
from tokenizers import Tokenizer, models, pre_tokenizers

from conversion.captions import make_captions
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


# The first version, which writes none into its files, and the last whose conv_like is centred on the cell.
OLDER = {
    "1.0.0": {
        "plain": describe(),
        "sparse": describe(WIDE, depth=5, attn_types=SPARSE, shift_tokens=True),  # without, nothing tells it from 0.x
        "openai": DALLE_PYTORCH["openai"],
        "vqgan": describe({"n_embed": 20, "kind": "nearest"}, "VQGanVAE", attn_types=SPARSE[:2], shift_tokens=True),
    },
    "1.4.2": {
        "sparse": DALLE_PYTORCH["sparse"],
        "sparse-rotary-shift": DALLE_PYTORCH["sparse-rotary-shift"],
        "everything": DALLE_PYTORCH["everything"],
        "vqgan-gumbel": DALLE_PYTORCH["vqgan-gumbel"],
    },
}


def save_words(folder, cases):
    """A caption tokenizer of 50 words beside each checkpoint."""
    words = {f"w{number}" if number else "[UNK]": number for number in range(SIZES["num_text_tokens"])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    for name in cases:
        tokenizer.save(str(folder / name / "tokenizer.json"))
    return folder


def write_captions(text):
    """Captions of that tokenizer with these ids; its pads, 0, stand at the end."""
    rows = [row[: row.nonzero()[-1] + 1].tolist() for row in text]
    return [" ".join(f"w{number}" if number else "unknown" for number in row) for row in rows]


@pytest.fixture(scope="module")
def dalle_pytorch(tmp_path_factory):
    """A folder a case, with the checkpoint, the reference, and the tokenizer."""
    folder = run_original("dalle_pytorch_priors", tmp_path_factory.mktemp("dalle_pytorch"), **DALLE_PYTORCH)
    return save_words(folder, DALLE_PYTORCH)


@pytest.fixture(scope="module", params=OLDER)
def older(tmp_path_factory, request):
    """The same of another version, and which."""
    place, packages = tmp_path_factory.mktemp("older"), find_older(request.param)
    folder = run_original("dalle_pytorch_priors", place, packages, **OLDER[request.param])
    return save_words(folder, OLDER[request.param]), request.param


@pytest.mark.parametrize("name", DALLE_PYTORCH)
def test_dalle_pytorch(dalle_pytorch, tmp_path, name):
    check_dalle_pytorch(dalle_pytorch / name, tmp_path / "out")


def test_older_versions_of_dalle_pytorch(older, tmp_path):
    folder, version = older
    for name in OLDER[version]:
        if (version, name) == ("1.0.0", "plain"):
            with pytest.raises(ValueError, match="version is missing"):
                convert("dalle-pytorch", folder / name, tmp_path / name)
            continue
        report = check_dalle_pytorch(folder / name, tmp_path / name)
        told = "no version in the checkpoint" if version == "1.0.0" else "the checkpoint's version"
        assert any(f"as before DALLE-pytorch 1.5: {told}" in line for line in report) == (
            "conv" in str(OLDER[version][name])
        )


def check_dalle_pytorch(source, output):
    """Converts a checkpoint, compares it with its reference, and gives what the conversion said."""
    report = convert("dalle-pytorch", source, output)
    assert any("sandwich_norm" in line for line in report)
    pipe, reference = DALLEPipeline.from_pretrained(output), load_reference(source)
    pipe.set_progress_bar_config(disable=True)
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
    captions, greedy = write_captions(reference["text"]), {"top_k": 1, "output_type": "latent"}
    assert pipe(captions, **greedy).images.flatten(1).equal(reference["greedy"])
    if "guided" in reference:  # without a word of warning, as the original: its null condition is a text of pads
        with no_warning():
            guided = pipe(captions, guidance_scale=3.0, **greedy).images.flatten(1)
        assert guided.equal(reference["guided"]) and not guided.equal(reference["greedy"])
    return report


@contextmanager
def no_warning():
    """Fails where the pipeline warns."""
    messages, handler = [], logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())
    logger = logging.getLogger("hf_dalle")
    logger.addHandler(handler)
    yield
    logger.removeHandler(handler)
    assert messages == []


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


def read_rudalle(file, length):
    return caption_tokenizers.read_youtokentome(file, length, do_lower_case=True, do_add_ends=True)


READERS = {
    "clip": ("bpe_simple_vocab_16e6.txt", caption_tokenizers.read_clip_bpe),
    "json": ("bpe.json", caption_tokenizers.read_json_tokenizer),
    "bert": ("vocab.txt", caption_tokenizers.read_bert_vocabulary),
    "youtokentome": ("bpe.model", caption_tokenizers.read_youtokentome),
    "rudalle": ("bpe.model", read_rudalle),
}


@pytest.fixture(scope="module")
def caption_ids(tmp_path_factory):
    return run_original("caption_ids", tmp_path_factory.mktemp("caption_ids"), captions=make_captions())


@pytest.mark.parametrize("name", READERS)
def test_caption_ids(caption_ids, tmp_path, name):
    file, read = READERS[name]
    read(caption_ids / name / file, 4096).save_pretrained(tmp_path)
    tokenizer = type(read(caption_ids / name / file, 4096)).from_pretrained(tmp_path)  # what is saved is what counts
    expected, wrong = json.loads((caption_ids / name / "ids").read_text()), []
    for caption, ids in zip(make_captions(), expected, strict=True):
        found = tokenizer(caption, verbose=False)["input_ids"]
        if name == "rudalle":  # at the length of the published priors
            found = encode_captions(tokenizer, caption, 128)["input_ids"][0].tolist()
        wrong += [(caption, ids, found)] if found != ids else []
    assert wrong == [] and len(expected) > 300


# ---------------------------------------------------------------------------------------------------------- ruDALL-E

RUDALLE_MODEL = {
    **{"num_layers": 6, "hidden_size": 48, "num_attention_heads": 4, "text_seq_length": 24},
    **{"image_tokens_per_dim": 4, "vocab_size": 424, "image_vocab_size": 20, "cogview_sandwich_layernorm": True},
}


def describe_rudalle(has_masks, form="v3", **model):
    model = {**RUDALLE_MODEL, **model}
    ddconfig = {
        **{"ch": 32, "out_ch": 3, "ch_mult": [1, 1], "num_res_blocks": 1, "in_channels": 3, "attn_resolutions": [4]},
        **{"resolution": 2 * model["image_tokens_per_dim"], "z_channels": 16, "double_z": False, "dropout": 0.0},
    }
    vqgan = {"ddconfig": ddconfig, "n_embed": model["image_vocab_size"], "embed_dim": 16}
    return {"model": {**model, "hf_version": form}, "vqgan": vqgan, "has_masks": has_masks}


RUDALLE = {
    "masks": describe_rudalle(True),
    "bare": describe_rudalle(False, num_layers=4, cogview_sandwich_layernorm=False),
    # wider than half the conv window: these tell their form by their masks
    "wide": describe_rudalle(True, num_layers=4, image_tokens_per_dim=12),
    "wide-v2": describe_rudalle(True, "v2", num_layers=4, image_tokens_per_dim=12),
    "bare-v2": describe_rudalle(False, "v2", num_layers=4, image_tokens_per_dim=12),  # as Emojich's file
    "small-v2": describe_rudalle(False, "v2", cogview_sandwich_layernorm=False),
}


@pytest.fixture(scope="module")
def rudalle_originals(tmp_path_factory):
    return run_original(
        "rudalle_priors", tmp_path_factory.mktemp("rudalle"), captions=make_captions(100), cases=RUDALLE
    )


@pytest.mark.parametrize("name", RUDALLE)
def test_rudalle(rudalle_originals, tmp_path, monkeypatch, name):
    monkeypatch.setitem(rudalle.HEADS_OF_WIDTH, RUDALLE_MODEL["hidden_size"], RUDALLE_MODEL["num_attention_heads"])
    source, form = rudalle_originals / name, RUDALLE[name]["model"]["hf_version"]
    report = convert("rudalle", source, tmp_path / "out", form=None if "wide" in name else form)
    assert any(f"inferred: the {form} form, by" in line for line in report)
    pipe, reference = DALLEPipeline.from_pretrained(tmp_path / "out"), load_reference(source)
    config = pipe.prior.config
    ids = encode_captions(pipe.tokenizer, make_captions(100), config.text_length)["input_ids"]
    assert ids.tolist() == json.loads((source / "reference.json").read_text())
    logits = reference["logits"][:, : config.stream_length]
    text_logits, image_logits = logits.tensor_split([config.num_text_states - 1], dim=1)
    text_logits, image_logits = (
        text_logits[..., : config.image_token_offset],
        image_logits[..., config.image_token_offset :],
    )
    stream = check_prior(pipe.prior, reference, (reference["text"] != 0).long(), text_logits, image_logits)
    if form == "v2":  # v3's counts the first image token among the text
        with torch.no_grad():
            loss = pipe.prior(stream, labels=stream).loss
        torch.testing.assert_close(loss, reference["loss"], atol=TOLERANCE, rtol=0)
    check_pictures(pipe, reference, reference["pixels"])
    one = pipe("красная лиса", generator=torch.Generator().manual_seed(0), output_type="pt").images
    assert one.shape[-1] == 2 * config.image_grid_size and pipe.prior.generation_config.top_p == rudalle.TOP_P


def test_the_published_sizes_are_those_of_rudalle_s_code(rudalle_originals):
    models = json.loads((rudalle_originals / "models.json").read_text())
    assert {model["hidden_size"]: model["num_attention_heads"] for model in models.values()} == rudalle.HEADS_OF_WIDTH
    forms = {name: model["form"] for name, model in models.items() if name != "dummy"}
    assert forms == {"Malevich": "v3", "Malevich_v2": "v2", "Emojich": "v2", "Surrealist_XL": "v3", "Kandinsky": "v3"}


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
    convert("mindalle", source, tmp_path / "out")
    pipe, reference = DALLEPipeline.from_pretrained(tmp_path / "out"), load_reference(source)
    encoded = encode_captions(pipe.tokenizer, make_captions(), pipe.prior.config.text_length)
    assert encoded["input_ids"].tolist() == json.loads((source / "reference.json").read_text())
    attention_mask = torch.ones_like(reference["text"])
    attention_mask[:, -1] = 0  # pads are tokens like any other
    check_prior(pipe.prior, reference, attention_mask, reference["text_logits"], reference["image_logits"])
    check_pictures(pipe, reference, reference["pixels"])
    assert pipe("a red fox", output_type="pt").images.shape == (1, 3, 8, 8)


# ----------------------------------------------------------------------------------------------------------- --verify

LAYER = "model.layers.0"
VAE_WEIGHTS = [f"decoder.upsamplers.{number}.weight" for number in (1, 2)]
VERIFIED = {  # a family, its case, what else the command gets; what is exchanged, and what must find it
    "all": ("dalle-pytorch", "everything", {}),
    "half": ("dalle-pytorch", "everything", {"dtype": "float16"}),
    "plain": ("dalle-pytorch", "plain", {}),
    "openai": ("dalle-pytorch", "openai", {}),
    "vqgan": ("dalle-pytorch", "vqgan-gumbel", {}),
    "v2": ("rudalle", "bare-v2", {"form": "v2"}),
    "v3": ("rudalle", "wide", {"dtype": "bfloat16"}),
    "other form": ("rudalle", "bare-v2", {"form": "v3"}),  # each form is consistent in itself: only the user knows
    "mindalle": ("mindalle", "gelu", {}),
    "half mindalle": ("mindalle", "quick-gelu", {"dtype": "float16"}),
}
EXCHANGED = {
    "norms": ("dalle-pytorch", "plain", ["prior", f"{LAYER}.input_layernorm.weight", "model.norm.weight"]),
    "vae": ("dalle-pytorch", "plain", ["dvae", *VAE_WEIGHTS]),
    "row": ("rudalle", "wide", ["prior", f"{LAYER}.mlp.fc1.weight", "model.layers.1.mlp.fc1.weight"]),
}


@pytest.fixture(scope="module")
def verified(dalle_pytorch, rudalle_originals, tmp_path_factory):
    folders, clone = {"dalle-pytorch": dalle_pytorch, "rudalle": rudalle_originals}, os.environ.get(CLONE_VARIABLE)
    if clone:
        place = tmp_path_factory.mktemp("mindalle")
        options = {"clone": clone, "captions": make_captions(), "cases": MINDALLE}
        folders["mindalle"] = run_original("mindalle_priors", place, **options)
    cases = {
        name: {"family": family, "source": str(folders[family] / case), **options}
        for name, (family, case, options) in VERIFIED.items()
        if family in folders
    }
    for name, (family, case, exchanged) in EXCHANGED.items():
        cases[name] = {"family": family, "source": str(folders[family] / case), "exchanged": exchanged}
    heads = {RUDALLE_MODEL["hidden_size"]: RUDALLE_MODEL["num_attention_heads"]}
    return run_original("verify", tmp_path_factory.mktemp("verified"), clone=clone, heads=heads, cases=cases)


@pytest.mark.parametrize("name", VERIFIED)
def test_verification_compares_with_the_original(verified, name):
    errors = json.loads((verified / "errors.json").read_text())
    if VERIFIED[name][0] == "mindalle" and not os.environ.get(CLONE_VARIABLE):
        pytest.skip(f"set {CLONE_VARIABLE}")
    assert name not in errors
    found = json.loads((verified / name / "conversion.json").read_text())["verification"]
    against = {
        "dalle-pytorch": "dalle-pytorch 1.6.6",
        "rudalle": "rudalle 1.1.3",
        "mindalle": "minDALL-E of the clone",
    }
    assert found["against"] == against[VERIFIED[name][0]]
    whats = [check["what"] for check in found["checks"]]
    for part in ("rounded once", "ids differ", "text logits", "image logits", "greedy image tokens", "cached"):
        assert any(part in what for what in whats), part
    pictures = [what for what in whats if what.startswith("image model, against ")]
    assert any("pixels" in what for what in pictures) and "itself" not in pictures[0]
    assert all(check["value"] <= check["limit"] <= 1e-3 for check in found["checks"])


@pytest.mark.parametrize("name", EXCHANGED)
def test_verification_finds_two_weights_exchanged(verified, name):
    error = json.loads((verified / "errors.json").read_text())[name]
    assert re.search("image model, against dalle-pytorch's .*pixels" if name == "vae" else "image logits", error)
    assert "rounded once" not in error and not (verified / name).exists()
