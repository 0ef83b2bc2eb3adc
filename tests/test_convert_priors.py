"""The converters of priors on weights under the originals' names, made here: what is found, refused and left out.

That the converted priors compute what the originals do is shown in tests/parity.
"""

import json
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tiny_checkpoints import (
    GRID,
    HPARAMS,
    NUM_CODES,
    NUM_WORDS,
    TEXT_LENGTH,
    draw,
    name_dalle_pytorch,
    name_rudalle,
    save_dalle_pytorch,
    save_words,
    write_youtokentome,
)
from tokenizers import Tokenizer, normalizers

from conversion.captions import make_captions
from conversion.convert import convert
from conversion.families import caption_tokenizers, dalle_pytorch, mindalle, prior_check, rudalle
from conversion.folders import build_on_meta, write_folder
from hf_dalle import DalleFamilyPriorForCausalLM, DALLEPipeline


@pytest.mark.parametrize("sandwich", [False, True])
def test_a_scale_is_folded_into_what_stands_before_it(tmp_path, sandwich):
    weights = name_dalle_pytorch(sandwich)
    source = save_dalle_pytorch(tmp_path / "source", weights)
    report = convert("dalle-pytorch", source, tmp_path / "out", do_verify=True)
    assert f"inferred: sandwich_norm = {sandwich}, by the names of the weights" in report
    pipe = DALLEPipeline.from_pretrained(tmp_path / "out")
    layer, place = pipe.prior.model.layers[1], "transformer.layers.layers.1.0."
    scale = weights[f"{place}scale"].flatten()
    out, norm_out = weights[f"{place}fn.fn.fn.fn.fn.to_out.0.weight"], weights.get(f"{place}fn.norm_out.weight")
    if sandwich:
        assert layer.attention_output_norm.weight.equal(scale * norm_out) and layer.self_attn.o_proj.weight.equal(out)
    else:
        assert layer.self_attn.o_proj.weight.equal(scale[:, None] * out)
    config = pipe.prior.config
    assert config.attention_types == ["full", "axial_row"] and config.use_token_shift
    assert (config.intermediate_size, config.image_vocab_size, config.num_text_states) == (64, NUM_CODES, 6)
    assert pipe("w1 w2", output_type="latent").images.shape == (1, GRID, GRID)
    record = json.loads((tmp_path / "out" / "conversion.json").read_text())
    assert record["parts"]["prior"]["dropped_keys"] == {} and record["verification"]["checks"]
    assert set(record["parts"]["prior"]["dropped_beside"]) == {"epoch"}


@pytest.mark.parametrize(
    ("hparams", "content", "words"),
    [
        ({"reversible": True}, {}, "`reversible` is True"),
        ({"shared_attn_ids": (0, 0)}, {}, "`shared_attn_ids`"),
        ({"shared_ff_ids": (0, 1, 0)}, {}, "`shared_ff_ids`"),
        ({"attn_types": ("full", "sparse")}, {}, "'sparse'"),
        ({"shift_tokens": False}, {}, "`shift_tokens` is False in `hparams`, but the weights say True"),
        ({"rotary_emb": True}, {}, "`rotary_emb` is True"),
        ({"dim": "gone"}, {}, "lacks dim"),
        ({"depth": 1}, {}, "`depth` of `hparams` is 1"),
        ({"dim_head": 8}, {}, "qkv_proj"),
        ({}, {"version": "0.14.3"}, "version is 0.14;"),
        ({}, {"num_words": 19}, "19 ids, but the checkpoint was trained with 20"),
    ],
)
def test_what_would_become_another_model_is_refused(tmp_path, hparams, content, words):
    source = save_dalle_pytorch(tmp_path / "source", hparams=hparams, **content)
    with pytest.raises(ValueError, match=words):
        convert("dalle-pytorch", source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_keys_that_are_too_many_or_missing_are_named(tmp_path):
    weights = name_dalle_pytorch()
    weights["transformer.layers.layers.0.0.fn.gate"] = draw(3)
    del weights["transformer.layers.layers.1.1.fn.norm.bias"]
    with pytest.raises(ValueError, match=r"lacks: .*norm\.bias.*nothing uses: transformer.layers.layers.0.0.fn.gate"):
        convert("dalle-pytorch", save_dalle_pytorch(tmp_path / "source", weights), tmp_path / "out")


def test_a_checkpoint_without_version_is_known_by_token_shift(tmp_path):
    convert("dalle-pytorch", save_dalle_pytorch(tmp_path / "source", version=None), tmp_path / "out")
    plain = {name.replace("fn.fn.fn.fn.net", "fn.fn.net"): weight for name, weight in name_dalle_pytorch().items()}
    (tmp_path / "source").rename(tmp_path / "shifted")
    with pytest.raises(ValueError, match="version is missing"):
        convert("dalle-pytorch", save_dalle_pytorch(tmp_path / "source", plain, version=None), tmp_path / "plain")


@pytest.mark.parametrize(
    ("version", "kind"), [(None, "bordered"), ("1.1.6", "bordered"), ("1.4.2", "bordered"), ("1.5.0", "like")]
)
def test_conv_like_is_what_the_version_made_of_it(version, kind):
    hparams = {**HPARAMS, "attn_types": ["conv_like", "full"]}
    config, inferred = dalle_pytorch.find_config(
        hparams, name_dalle_pytorch(), GRID, dalle_pytorch.read_version(version)
    )
    assert config.attention_types == [f"conv_{kind}", "full"]
    assert any("centred on the cell" in line for line in inferred) == (kind == "bordered")


def test_a_pipeline_of_dalle_pytorch_draws_without_a_caption_and_with_guidance(tmp_path, caplog):
    convert("dalle-pytorch", save_dalle_pytorch(tmp_path / "source"), tmp_path / "out")
    pipe = DALLEPipeline.from_pretrained(tmp_path / "out")
    assert pipe.prior.config.caption_dropout is None
    caplog.set_level("WARNING")
    empty = pipe("", output_type="latent", top_k=1).images
    text = pipe.encode_prompt("")
    assert text["attention_mask"].sum() == 0
    stream = pipe.prior.join_stream(text["text_ids"], text["attention_mask"])["input_ids"][0].tolist()
    assert stream == [0, *range(NUM_WORDS, NUM_WORDS + TEXT_LENGTH)]  # the original's text of zeros
    assert pipe("w1 w2", guidance_scale=1.0, output_type="latent", top_k=1).images.shape == empty.shape
    pipe("w1 w2", guidance_scale=3.0, output_type="latent")
    assert not any("caption dropout" in record.getMessage() for record in caplog.records)


def test_the_tokenizer_must_be_one_and_there(tmp_path):
    source = save_dalle_pytorch(tmp_path / "source")
    (source / "vocab.txt").write_text("[PAD]\n")
    with pytest.raises(OSError, match="2 tokenizers"):
        convert("dalle-pytorch", source, tmp_path / "out")
    (source / "vocab.txt").unlink()
    (source / "words.json").write_text("{}")
    with pytest.raises(OSError, match="no caption tokenizer of 20 ids"):
        convert("dalle-pytorch", source, tmp_path / "out")


def test_other_rotary_angles_are_refused(tmp_path):
    weights = {name: weight for name, weight in name_dalle_pytorch().items() if "pos_emb" not in name}
    weights["transformer.pos_emb"] = torch.zeros(1, TEXT_LENGTH + 1 + GRID**2, 6)
    with pytest.raises(ValueError, match="rotary angles"):
        convert(
            "dalle-pytorch", save_dalle_pytorch(tmp_path / "source", weights, {"rotary_emb": True}), tmp_path / "out"
        )


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_verification_without_the_original_compares_with_itself(tmp_path, monkeypatch, dtype):
    monkeypatch.setitem(sys.modules, "dalle_pytorch", None)
    convert("dalle-pytorch", save_dalle_pytorch(tmp_path / "source"), tmp_path / "out", do_verify=True, dtype=dtype)
    found = json.loads((tmp_path / "out" / "conversion.json").read_text())["verification"]
    assert found["against"] == "itself (dalle-pytorch is not there to compare with)"
    checks = {check["what"]: (check["value"], check["limit"]) for check in found["checks"]}
    against = "image model, against itself (dalle-pytorch is not installed)"
    assert set(checks) == {
        "weights that are not the source's, rounded once",
        f"captions of {len(make_captions())} whose ids are not those of the tokenizer before it was saved",
        "logits that are not finite",
        "largest difference of logits, cached and uncached",
        f"greedy image tokens of {GRID**2} that differ",
        f"{against}: values that are not finite",
        f"{against}: largest difference of pixels from tokens and from one-hot vectors",
    }
    assert all(limit <= 1e-3 for _, limit in checks.values())  # in 16 bits too: both sides are unrounded


def test_verification_finds_what_was_written_wrongly(tmp_path):
    """A weight one bit off, other ids, an image model that gives no numbers: each in a file that is there."""
    conversion = dalle_pytorch.read_source(save_dalle_pytorch(tmp_path / "source"))
    conversion.dtype = torch.float16
    (tmp_path / "out").mkdir()
    write_folder(tmp_path / "out", conversion)
    place = tmp_path / "out" / "prior" / "model.safetensors"
    weights = load_file(place)
    weights["model.norm.weight"].view(torch.int16)[0] ^= 1
    save_file(weights, place, {"format": "pt"})
    tokenizer = (tmp_path / "out" / "tokenizer" / "tokenizer.json").read_text()
    swapped = tokenizer.replace('"w1": 1,', '"w1": 2,').replace('"w2": 2,', '"w2": 1,')
    (tmp_path / "out" / "tokenizer" / "tokenizer.json").write_text(swapped)
    place = tmp_path / "out" / "dvae" / "diffusion_pytorch_model.safetensors"
    weights = load_file(place)
    weights["decoder.conv_out.bias"] *= torch.nan
    save_file(weights, place, {"format": "pt"})
    original = prior_check.Original("nothing", encode=lambda caption: [7] * TEXT_LENGTH)
    for compared in (prior_check.Original("nothing"), original):
        checks = {c.what: c.value for c in prior_check.verify_pipeline(tmp_path / "out", conversion, compared).checks}
        assert checks["weights that are not the source's, rounded once"] == 1
        assert next(value for what, value in checks.items() if what.endswith("values that are not finite")) > 0
        assert checks["logits that are not finite"] == 0
    assert next(value for what, value in checks.items() if what.endswith("whose ids differ")) > 300


def test_a_wrong_fold_does_not_pass_the_original_s_logits(tmp_path, monkeypatch):
    """Verification compares: an original that computes anything else fails the conversion, and leaves nothing."""

    def verify(folder, conversion):
        def compute(text_ids, image_tokens):
            num_ids = NUM_WORDS + TEXT_LENGTH
            return torch.zeros(1, TEXT_LENGTH, num_ids), torch.zeros(1, GRID**2, NUM_CODES)

        return prior_check.verify_pipeline(folder, conversion, prior_check.Original("nothing", compute=compute))

    monkeypatch.setattr(dalle_pytorch, "verify", verify)
    with pytest.raises(ValueError, match="not equal to nothing: largest difference of text logits"):
        convert("dalle-pytorch", save_dalle_pytorch(tmp_path / "source"), tmp_path / "out", do_verify=True)
    assert not (tmp_path / "out").exists()


# ---------------------------------------------------------------------------------------------- ruDALL-E and minDALL-E


@pytest.fixture
def rudalle_source(tmp_path, monkeypatch):
    """A folder with an empty image model and tokenizer, and of a prior 24 wide what it is told."""
    monkeypatch.setitem(rudalle.HEADS_OF_WIDTH, 24, 2)
    folder = tmp_path / "source"
    folder.mkdir()
    (folder / "bpe.model").write_text("")
    (folder / "vae.ckpt").write_text("")

    def save(weights, name="pytorch_model.bin"):
        for path in folder.glob("*.bin"):
            path.unlink()
        torch.save(weights, folder / name)
        return folder

    return save


@pytest.mark.parametrize("form", rudalle.FORMS)
def test_rudalle_s_masks_tell_the_form_and_nothing_else_does(rudalle_source, tmp_path, form):
    grid = 12  # wider than the conv window: on a smaller grid both forms have one mask
    weights = name_rudalle(grid=grid)
    bare = rudalle_source(weights)
    with pytest.raises(ValueError, match="does not tell its form: add `--form v2` or `--form v3`.*Emojich .* are v2"):
        rudalle.read_source(bare)
    with pytest.raises(OSError, match="vae.ckpt cannot be read"):  # so far without a word on the form
        rudalle.read_source(bare, form)
    names_other = rudalle_source(weights, f"pytorch_model_v{5 - int(form[1])}.bin")
    with pytest.raises(ValueError, match=f"names another form than `--form {form}`"):
        rudalle.read_source(names_other, form)
    mask = rudalle.family_attention_mask(rudalle.MASKS[form]["conv"], TEXT_LENGTH, grid, rudalle.CONV_KERNEL_SIZE)
    masked = rudalle_source({**weights, "transformer.conv_mask": mask.float()})
    for word in (None, form):
        with pytest.raises(OSError, match="vae.ckpt cannot be read"):
            rudalle.read_source(masked, word)
    with pytest.raises(ValueError, match=f"is of the {form} form, by the mask of its conv layer, and not v"):
        rudalle.read_source(masked, next(other for other in rudalle.FORMS if other != form))
    mask = mask.clone()
    mask[-1, TEXT_LENGTH] ^= True
    with pytest.raises(ValueError, match="mask of neither form"):
        rudalle.read_source(rudalle_source({**weights, "transformer.conv_mask": mask}), form)
    row = rudalle_source({**weights, "transformer.row_mask": torch.ones_like(mask)})
    with pytest.raises(ValueError, match=f"row_mask is not the mask of ruDALL-E's {form} form"):
        rudalle.read_source(row, form)


def test_a_width_that_is_not_known_is_refused(tmp_path):
    with pytest.raises(ValueError, match="24 wide; the number of its heads is known for 768, 2048, 3840"):
        rudalle.find_config(name_rudalle(), "v3")


@pytest.mark.parametrize(
    ("width", "num_layers", "num_heads", "num_parameters"), [(2048, 24, 16, 1.3e9), (3840, 64, 60, 12e9)]
)
@pytest.mark.parametrize("form", rudalle.FORMS)
def test_the_published_rudalle_s_are_known_by_their_shapes(width, num_layers, num_heads, num_parameters, form):
    weights = name_rudalle(
        num_layers, width, 32, 16384, 128, 8192, make=lambda *shape: torch.empty(shape, device="meta")
    )
    weights["transformer.layers.0.before_first_addition_layernorm.weight"] = torch.empty(width, device="meta")
    config, _ = rudalle.find_config(weights, form)
    assert (config.hidden_size, config.num_hidden_layers) == (width, num_layers)
    assert (config.num_attention_heads, config.num_hidden_layers) == (num_heads, num_layers)
    assert (config.text_vocab_size, config.text_length, config.image_vocab_size) == (16384, 128, 8192)
    assert config.num_image_tokens == 1024 and config.use_sandwich_norm and config.bos_token_id == 2
    assert (config.num_text_states, config.num_shared_states) == ((129, 128) if form == "v2" else (128, 128))
    model = build_on_meta(DalleFamilyPriorForCausalLM, config)
    assert sum(parameter.numel() for parameter in model.parameters()) == pytest.approx(num_parameters, rel=0.1)


def test_rudalle_s_layers():
    kinds = [rudalle.find_attention_type(layer, 24, "v3") for layer in range(24)]
    assert kinds[:6] == ["row", "column", "row", "row", "row", "column"] and kinds[-1] == "conv_bordered"
    assert rudalle.find_attention_type(23, 24, "v2") == "conv_wrapped"


def test_mindalle_s_folder_must_be_whole(tmp_path):
    (tmp_path / "config.yaml").write_text("stage2: {hparams: {n_heads: 2, mlp_bias: false}}")
    with pytest.raises(OSError, match=r"lacks stage1_last.ckpt, .*bpe-16k-merges.txt"):
        convert("mindalle", tmp_path, tmp_path / "out")
    with pytest.raises(ValueError, match="mlp_bias"):
        mindalle.find_config({}, mindalle.read_settings(tmp_path / "config.yaml"))


# --------------------------------------------------------------------------------------------------------- tokenizers


@settings(max_examples=300, deadline=None)
@given(st.text("ΣΣΣΑας\u0301\u0345\u00ad\u200dʰªⅧⓐ'.:· 1İẞ", max_size=20))
def test_lower_case_is_python_s(text):
    assert normalizers.Sequence(caption_tokenizers.lower()).normalize_str(text) == text.lower()


@pytest.mark.parametrize("count", [0, 1, 2, 3, 40])
def test_a_sigma_ends_a_word_behind_any_number_of_marks(count):
    marks = "\u0301" * count
    lowered = normalizers.Sequence(caption_tokenizers.lower()).normalize_str(f"Α{marks}Σ{marks} Α{marks}Σ{marks}Α")
    assert lowered == f"α{marks}ς{marks} α{marks}σ{marks}α"


def test_youtokentome_merges_words_and_fuses_what_it_does_not_know(tmp_path):
    write_youtokentome(tmp_path / "bpe.model")
    plain = caption_tokenizers.read_youtokentome(tmp_path / "bpe.model", 8)
    assert plain("ab  bab\u2581xyc", verbose=False)["input_ids"] == [10, 4, 6, 9, 4, 1, 7]
    assert plain("")["input_ids"] == [] and plain("<PAD>")["input_ids"] == [4, 1]
    ended = caption_tokenizers.read_youtokentome(tmp_path / "bpe.model", 8, do_lower_case=True, do_add_ends=True)
    assert ended(" AB ")["input_ids"] == [2, 10, 3] and ended.bos_token_id == 2 and ended.pad_token_id == 0


@pytest.mark.parametrize(
    ("merges", "words"),
    [
        (((5, 6, 9), (6, 7, 10), (9, 7, 11), (5, 10, 12)), "1 pieces in two ways, as 'abc'"),
        (((5, 77, 9),), "no model"),
    ],
)
def test_youtokentome_files_that_cannot_be_held_are_refused(tmp_path, merges, words):
    write_youtokentome(tmp_path / "bpe.model", merges)
    with pytest.raises(ValueError, match=words):
        caption_tokenizers.read_youtokentome(tmp_path / "bpe.model", 8)


def test_a_tokenizer_that_cuts_by_itself_is_refused(tmp_path):
    save_words(tmp_path)
    tokenizer = Tokenizer.from_file(str(tmp_path / "words.json"))
    tokenizer.enable_truncation(3)
    tokenizer.save(str(tmp_path / "words.json"))
    with pytest.raises(ValueError, match="cuts or pads"):
        caption_tokenizers.read_json_tokenizer(tmp_path / "words.json", TEXT_LENGTH)


def test_a_file_that_is_not_clip_s_is_refused(tmp_path):
    (tmp_path / "bpe_simple_vocab_16e6.txt").write_text("header\na b\n")
    with pytest.raises(ValueError, match="48894 merges"):
        caption_tokenizers.read_clip_bpe(tmp_path / "bpe_simple_vocab_16e6.txt", 8)
