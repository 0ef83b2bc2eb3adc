"""The converters of priors on weights under the originals' names, made here: what is found, refused and left out.

That the converted priors compute what the originals do is shown in tests/parity.
"""

import json

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers

from conversion.convert import convert
from conversion.families import caption_tokenizers, dalle_pytorch, mindalle, prior_check, rudalle
from conversion.families.dalle_pytorch_vae import _name_original
from hf_dalle import DalleDiscreteVAE, DALLEPipeline


WIDTH, NUM_WORDS, TEXT_LENGTH, NUM_CODES, GRID = 16, 20, 5, 12, 4
HPARAMS = {
    **{"num_text_tokens": NUM_WORDS, "text_seq_len": TEXT_LENGTH, "dim": WIDTH, "depth": 2, "heads": 2, "dim_head": 6},
    **{"reversible": False, "loss_img_weight": 7, "attn_types": ("full", "axial_row"), "stable": False},
    **{"shift_tokens": True, "rotary_emb": False, "shared_attn_ids": None, "shared_ff_ids": None},
}
VAE = {"image_size": 8, "num_layers": 1, "num_tokens": NUM_CODES, "codebook_dim": 6, "hidden_dim": 8}


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def name_dalle_pytorch(sandwich=False):
    """A state dict of DALLE-pytorch 1.6 with token shift."""
    num_text = NUM_WORDS + TEXT_LENGTH
    weights = {
        **{"text_emb.weight": draw(num_text, WIDTH), "image_emb.weight": draw(NUM_CODES, WIDTH)},
        **{"text_pos_emb.weight": draw(TEXT_LENGTH + 1, WIDTH)},
        **{"image_pos_emb.weights.0": draw(1, GRID, 1, WIDTH), "image_pos_emb.weights.1": draw(1, 1, GRID, WIDTH)},
        **{"to_logits.0.weight": draw(WIDTH), "to_logits.0.bias": draw(WIDTH)},
        **{"to_logits.1.weight": draw(num_text + NUM_CODES, WIDTH), "to_logits.1.bias": draw(num_text + NUM_CODES)},
    }
    inner = {
        0: {"to_qkv.weight": (36, WIDTH), "to_out.0.weight": (WIDTH, 12), "to_out.0.bias": (WIDTH,)},
        1: {"net.0.weight": (128, WIDTH), "net.0.bias": (128,), "net.3.weight": (WIDTH, 64), "net.3.bias": (WIDTH,)},
    }
    for layer in range(2):
        for kind, wrappers in ((0, "fn.fn.fn.fn.fn."), (1, "fn.fn.fn.fn.")):
            place = f"transformer.layers.layers.{layer}.{kind}."
            weights[f"{place}scale"] = draw(1, 1, WIDTH)
            for norm in ("norm", "norm_out") if sandwich else ("norm",):
                weights |= {f"{place}fn.{norm}.weight": draw(WIDTH), f"{place}fn.{norm}.bias": draw(WIDTH)}
            weights |= {f"{place}{wrappers}{name}": draw(*shape) for name, shape in inner[kind].items()}
    return weights


def save_words(folder, num_words=NUM_WORDS):
    words = {f"w{number}" if number else "[UNK]": number for number in range(num_words)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(folder / "words.json"))


@pytest.fixture
def save_dalle_pytorch(tmp_path):
    """Saves a checkpoint with changes, and gives its folder."""

    def save(weights=None, hparams=None, num_words=NUM_WORDS, **content):
        folder = tmp_path / "source"
        folder.mkdir()
        sizes = {"sample_size": 8, "vocab_size": NUM_CODES, "codebook_dim": 6, "hidden_channels": 8}
        vae = DalleDiscreteVAE(num_layers=1, num_resnet_blocks=0, **sizes)
        names = {name: f"vae.{_name_original(name, 1, 0)}" for name in vae.state_dict()}
        weights = dict(name_dalle_pytorch() if weights is None else weights)
        weights |= {names[name]: weight for name, weight in vae.state_dict().items()}
        hparams = {name: value for name, value in {**HPARAMS, **(hparams or {})}.items() if value != "gone"}
        content = {"version": "1.6.6", "vae_class_name": "DiscreteVAE", "epoch": 0, **content}
        torch.save({"hparams": hparams, "vae_params": VAE, "weights": weights, **content}, folder / "dalle.pt")
        save_words(folder, num_words)
        return folder

    return save


@pytest.mark.parametrize("sandwich", [False, True])
def test_a_scale_is_folded_into_what_stands_before_it(save_dalle_pytorch, tmp_path, sandwich):
    weights = name_dalle_pytorch(sandwich)
    source = save_dalle_pytorch(weights)
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
        ({"depth": 1}, {}, "model has not"),
        ({"dim_head": 8}, {}, "qkv_proj"),
        ({}, {"version": "0.14.3"}, "version is 0.14.3"),
        ({}, {"num_words": 19}, "19 ids, but the checkpoint was trained with 20"),
    ],
)
def test_what_would_become_another_model_is_refused(save_dalle_pytorch, tmp_path, hparams, content, words):
    source = save_dalle_pytorch(hparams=hparams, **content)
    with pytest.raises(ValueError, match=words):
        convert("dalle-pytorch", source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_keys_that_are_too_many_or_missing_are_named(save_dalle_pytorch, tmp_path):
    weights = name_dalle_pytorch()
    weights["transformer.layers.layers.0.0.fn.gate"] = draw(3)
    del weights["transformer.layers.layers.1.1.fn.norm.bias"]
    with pytest.raises(ValueError, match=r"lacks: .*norm\.bias.*nothing uses: transformer.layers.layers.0.0.fn.gate"):
        convert("dalle-pytorch", save_dalle_pytorch(weights), tmp_path / "out")


def test_a_checkpoint_without_version_is_known_by_token_shift(save_dalle_pytorch, tmp_path):
    convert("dalle-pytorch", save_dalle_pytorch(version=None), tmp_path / "out")
    plain = {name.replace("fn.fn.fn.fn.net", "fn.fn.net"): weight for name, weight in name_dalle_pytorch().items()}
    (tmp_path / "source").rename(tmp_path / "shifted")
    with pytest.raises(ValueError, match="version is None"):
        convert("dalle-pytorch", save_dalle_pytorch(plain, version=None), tmp_path / "plain")


def test_the_tokenizer_must_be_one_and_there(save_dalle_pytorch, tmp_path):
    source = save_dalle_pytorch()
    (source / "vocab.txt").write_text("[PAD]\n")
    with pytest.raises(OSError, match="2 tokenizers"):
        convert("dalle-pytorch", source, tmp_path / "out")
    (source / "vocab.txt").unlink()
    (source / "words.json").write_text("{}")
    with pytest.raises(OSError, match="no caption tokenizer of 20 ids"):
        convert("dalle-pytorch", source, tmp_path / "out")


def test_other_rotary_angles_are_refused(save_dalle_pytorch, tmp_path):
    weights = {name: weight for name, weight in name_dalle_pytorch().items() if "pos_emb" not in name}
    weights["transformer.pos_emb"] = torch.zeros(1, TEXT_LENGTH + 1 + GRID**2, 6)
    with pytest.raises(ValueError, match="rotary angles"):
        convert("dalle-pytorch", save_dalle_pytorch(weights, {"rotary_emb": True}), tmp_path / "out")


def test_a_wrong_fold_does_not_pass_the_original_s_logits(save_dalle_pytorch, tmp_path, monkeypatch):
    """Verification compares: an original that computes anything else fails the conversion, and leaves nothing."""

    def verify(folder, conversion):
        def compute(text_ids, image_tokens):
            num_ids = NUM_WORDS + TEXT_LENGTH
            return torch.zeros(1, TEXT_LENGTH, num_ids), torch.zeros(1, GRID**2, NUM_CODES)

        return prior_check.verify_pipeline(folder, conversion, "nothing", compute)

    monkeypatch.setattr(dalle_pytorch, "verify", verify)
    with pytest.raises(ValueError, match="not equal to nothing: largest difference of text logits"):
        convert("dalle-pytorch", save_dalle_pytorch(), tmp_path / "out", do_verify=True)
    assert not (tmp_path / "out").exists()


# ---------------------------------------------------------------------------------------------- ruDALL-E and minDALL-E


def name_rudalle(num_layers=4, **more):
    num_text = NUM_WORDS + TEXT_LENGTH
    shapes = {
        **{"text_embeddings.weight": (num_text, 24), "image_embeddings.weight": (NUM_CODES, 24)},
        **{"text_pos_embeddings.weight": (TEXT_LENGTH + 1, 24)},
        **{"image_row_embeddings.weight": (GRID, 24), "image_col_embeddings.weight": (GRID, 24)},
        **{"to_logits.0.weight": (24,), "to_logits.0.bias": (24,)},
        **{"to_logits.1.weight": (num_text + NUM_CODES, 24), "to_logits.1.bias": (num_text + NUM_CODES,)},
        **{"transformer.final_layernorm.weight": (24,), "transformer.final_layernorm.bias": (24,)},
    }
    for layer in range(num_layers):
        place = f"transformer.layers.{layer}."
        for name in ("input_layernorm", "post_attention_layernorm"):
            shapes |= {f"{place}{name}.weight": (24,), f"{place}{name}.bias": (24,)}
        for name, rows, columns in (
            *(("attention.query_key_value", 72, 24), ("attention.dense", 24, 24)),
            *(("mlp.dense_h_to_4h", 96, 24), ("mlp.dense_4h_to_h", 24, 96)),
        ):
            shapes |= {f"{place}{name}.weight": (rows, columns), f"{place}{name}.bias": (rows,)}
    return {**{name: draw(*shape) for name, shape in shapes.items()}, **more}


def test_rudalle_s_v2_form_and_unknown_widths_are_refused(tmp_path, monkeypatch):
    folder = tmp_path / "source"
    folder.mkdir()
    (folder / "bpe.model").write_text("")
    (folder / "vae.ckpt").write_text("")
    torch.save(name_rudalle(), folder / "pytorch_model_v2.bin")
    with pytest.raises(ValueError, match="v2 form"):
        convert("rudalle", folder, tmp_path / "out")
    (folder / "pytorch_model_v2.bin").rename(folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match="24 wide; the number of its heads is known for 768, 2048, 3840"):
        convert("rudalle", folder, tmp_path / "out")
    monkeypatch.setitem(rudalle.HEADS_OF_WIDTH, 24, 2)
    mask = torch.ones(TEXT_LENGTH + GRID**2, TEXT_LENGTH + GRID**2).tril()  # v3's on so small a grid
    mask[-1, TEXT_LENGTH] = 0
    torch.save(name_rudalle(**{"transformer.conv_mask": mask}), folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match="conv_mask is not the mask of ruDALL-E's v3 form"):
        convert("rudalle", folder, tmp_path / "out")


def test_rudalle_s_layers():
    kinds = [rudalle.find_attention_type(layer, 24) for layer in range(24)]
    assert kinds[:6] == ["row", "column", "row", "row", "row", "column"] and kinds[-1] == "conv_bordered"


def test_mindalle_s_folder_must_be_whole(tmp_path):
    (tmp_path / "config.yaml").write_text("stage2: {hparams: {n_heads: 2, mlp_bias: false}}")
    with pytest.raises(OSError, match=r"lacks stage1_last.ckpt, .*bpe-16k-merges.txt"):
        convert("mindalle", tmp_path, tmp_path / "out")
    with pytest.raises(ValueError, match="mlp_bias"):
        mindalle.find_config({}, mindalle.read_settings(tmp_path / "config.yaml"))


# --------------------------------------------------------------------------------------------------------- tokenizers


def write_youtokentome(path, merges=((5, 6, 9), (4, 9, 10))):
    characters = {"\u2581": 4, "a": 5, "b": 6, "c": 7, "d": 8}
    lines = [
        f"{len(characters)} {len(merges)}",
        *(f"{ord(character)} {number}" for character, number in characters.items()),
    ]
    lines += [" ".join(map(str, merge)) for merge in merges]
    path.write_text("\n".join([*lines, "1 0 2 3"]))


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
