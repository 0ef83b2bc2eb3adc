"""Whatever a file holds in the place of what a family expects: an error with words, never another, nothing endless.

Hostile pickles and damaged files are test_safe_load.py's.
"""

import json

import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny_checkpoints import (
    HPARAMS,
    VQGAN_SIZES,
    build,
    name_dalle_pytorch,
    name_mindalle,
    name_rudalle,
    save_dalle_pytorch,
    save_vqgan,
)

from conversion.convert import main
from conversion.families import caption_tokenizers, dalle_pytorch, mindalle, openai_dvae, rudalle, vqgan
from conversion.settings import describe, expect_dict, read_yaml
from hf_dalle import DalleVQGAN


TENSORS = st.lists(st.integers(0, 3), max_size=5).map(torch.zeros)
LEAVES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**70), 2**70),
    st.floats(),
    st.text(max_size=5),
    st.binary(max_size=5),
    TENSORS,
)
KEYS = st.one_of(st.text(max_size=5), st.integers(0, 9), st.sampled_from(["state_dict", "weights", "hparams", "0"]))


def nest(children):
    members = st.lists(children, max_size=3)
    return st.one_of(members, members.map(tuple), st.dictionaries(KEYS, children, max_size=3))


NESTS = st.recursive(LEAVES, nest, max_leaves=6)
MINDALLE = {"stage1": {"hparams": {"resolution": 16}}, "stage2": {"hparams": {"n_heads": 2}}}


def expect_words(read, *args):
    """Runs it; what it raises must be of the promised kinds and say something."""
    try:
        read(*args).check()
    except (ValueError, OSError) as error:
        assert len(str(error)) > 20, error


def replace(content, path, value):
    """A copy of dicts in dicts with another value at one place."""
    if not path:
        return value
    return {**content, path[0]: replace(content[path[0]], path[1:], value)}


hostile = settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@hostile
@given(
    value=NESTS, place=st.sampled_from([(), *((name,) for name in ("hparams", "weights", "vae_params", "version"))])
)
def test_dalle_pytorch_s_content(value, place, tmp_path):
    folder = save_dalle_pytorch(tmp_path / "source")
    content = torch.load(folder / "dalle.pt", weights_only=True)
    torch.save(replace(content, place, value), folder / "dalle.pt")
    expect_words(dalle_pytorch.read_source, folder)


@hostile
@given(value=NESTS, name=st.sampled_from([*HPARAMS, "share_input_output_emb", "sandwich_norm"]))
def test_dalle_pytorch_s_settings(value, name, tmp_path):
    expect_words(dalle_pytorch.read_source, save_dalle_pytorch(tmp_path / "source", hparams={name: value}))


@hostile
@given(value=NESTS, name=st.sampled_from([*name_dalle_pytorch(), "transformer.pos_emb", "vae.encoder.0.0.weight"]))
def test_dalle_pytorch_s_weights(value, name, tmp_path):
    weights = {**name_dalle_pytorch(), name: value}
    expect_words(dalle_pytorch.read_source, save_dalle_pytorch(tmp_path / "source", weights))


@hostile
@given(value=NESTS, name=st.sampled_from(["image_size", "normalization"]))
def test_dalle_pytorch_s_image_model(value, name, tmp_path):
    settings = {"image_size": 8, "num_layers": 1, name: value}
    expect_words(dalle_pytorch.read_source, save_dalle_pytorch(tmp_path / "source", vae_params=settings))


@pytest.fixture(autouse=True, scope="module")
def narrow_rudalle():
    """Its width here is not a published one."""
    rudalle.HEADS_OF_WIDTH[24] = 2
    yield
    del rudalle.HEADS_OF_WIDTH[24]


def save_rudalle(folder, prior, image_model):
    folder.mkdir(exist_ok=True)
    torch.save(prior, folder / "pytorch_model.bin")
    torch.save(image_model, folder / "vae.ckpt")
    (folder / "bpe.model").write_text("")
    return folder


@hostile
@given(value=NESTS, name=st.sampled_from([None, *name_rudalle(), *(f"transformer.{n}_mask" for n in ("conv", "row"))]))
def test_rudalle_s_prior(value, name, tmp_path):
    prior = value if name is None else {**name_rudalle(num_layers=1), name: value}
    expect_words(rudalle.read_source, save_rudalle(tmp_path / "source", prior, {}), "v2")


@hostile
@given(value=NESTS, is_inside=st.booleans())
def test_rudalle_s_image_model(value, is_inside, tmp_path):
    image_model = {"state_dict": value} if is_inside else value
    source = save_rudalle(tmp_path / "source", name_rudalle(num_layers=1), image_model)
    expect_words(rudalle.read_source, source, "v3")


@pytest.fixture(scope="module")
def mindalle_source(tmp_path_factory):
    """A folder of minDALL-E that converts."""
    folder = tmp_path_factory.mktemp("mindalle")
    save_vqgan(folder / "stage1_last.ckpt", build(DalleVQGAN, **VQGAN_SIZES, attention_levels=[1]))
    torch.save({"state_dict": name_mindalle()}, folder / "stage2_last.ckpt")
    (folder / "config.yaml").write_text(yaml.safe_dump(MINDALLE))
    (folder / "tokenizer").mkdir()
    words = {"[UNK]": 0, "a</w>": 1, "b": 2}
    (folder / "tokenizer" / "bpe-16k-vocab.json").write_text(json.dumps(words))
    (folder / "tokenizer" / "bpe-16k-merges.txt").write_text("#version: 0.2\n")
    mindalle.read_source(folder).check()
    return folder


@hostile
@given(value=NESTS, stage=st.sampled_from(["stage1", "stage2"]), is_inside=st.booleans())
def test_mindalle_s_stages(value, stage, is_inside, mindalle_source):
    path = mindalle_source / f"{stage}_last.ckpt"
    saved = path.read_bytes()
    torch.save({"state_dict": value} if is_inside else value, path)
    expect_words(mindalle.read_source, mindalle_source)
    path.write_bytes(saved)


PLAIN = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(-(2**70), 2**70), st.floats(), st.text(max_size=5), st.dates()),
    lambda parts: st.one_of(st.lists(parts, max_size=3), st.dictionaries(st.text(max_size=5), parts, max_size=3)),
    max_leaves=5,
)
PLACES = [
    (),
    *((stage,) for stage in MINDALLE),
    *((stage, "hparams") for stage in MINDALLE),
    ("stage1", "hparams", "resolution"),
    ("stage2", "hparams", "n_heads"),
]


@hostile
@given(value=PLAIN, place=st.sampled_from(PLACES))
def test_mindalle_s_settings(value, place, mindalle_source):
    (mindalle_source / "config.yaml").write_text(yaml.safe_dump(replace(MINDALLE, place, value)), encoding="utf-8")
    expect_words(mindalle.read_source, mindalle_source)
    (mindalle_source / "config.yaml").write_text(yaml.safe_dump(MINDALLE))


@hostile
@given(value=NESTS, name=st.sampled_from([None, "state_dict", "encoder.down.0.block.0.conv2.weight"]))
def test_a_vqgan_s_content(value, name, tmp_path):
    torch.save(value if name is None else {name: value}, tmp_path / "last.ckpt")
    expect_words(vqgan.read_source, tmp_path)


@hostile
@given(value=NESTS)
def test_openai_s_content(value, tmp_path):
    for side in ("encoder", "decoder"):
        torch.save(value, tmp_path / f"{side}.pkl")
    expect_words(openai_dvae.read_source, tmp_path)


# --------------------------------------------------------------------------------------- what a review found, by name


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"w": torch.ones(2)}, r"stage2_last.ckpt is no checkpoint of minDALL-E: it lacks `state_dict`"),
        ([1], r"The content of .*stage2_last.ckpt is a list; expected names"),
    ],
)
def test_mindalle_s_checkpoints_say_what_they_lack(mindalle_source, tmp_path, capsys, content, words):
    path = mindalle_source / "stage2_last.ckpt"
    saved = path.read_bytes()
    torch.save(content, path)
    with pytest.raises(ValueError, match=words):
        mindalle.read_source(mindalle_source)
    assert main(["mindalle", str(mindalle_source), str(tmp_path / "out")]) == 1
    assert capsys.readouterr().err.startswith("error: ")
    path.write_bytes(saved)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"hparams": [1]}, "`hparams` of .*dalle.pt is a list; expected names"),
        ({"version": 1.6}, "version is 1.6; expected one like 1.6.6"),
        ({"vae_params": "none"}, "`vae_params` of .* is 'none'"),
    ],
)
def test_dalle_pytorch_s_content_says_what_is_wrong(tmp_path, change, words):
    folder = save_dalle_pytorch(tmp_path / "source")
    torch.save({**torch.load(folder / "dalle.pt", weights_only=True), **change}, folder / "dalle.pt")
    with pytest.raises(ValueError, match=words):
        dalle_pytorch.read_source(folder)


@pytest.mark.parametrize(
    ("hparams", "words"),
    [
        ({"dim": "16"}, "`dim` of `hparams` is '16'; expected a whole number from 1"),
        ({"heads": True}, "`heads` of `hparams` is True"),
        ({"depth": 10**9}, "`depth` of `hparams` is 1000000000, but the weights"),
        ({"text_seq_len": 2**80}, "`text_seq_len` of `hparams` is 12"),
        ({"stable": "yes"}, "`stable` of `hparams` is 'yes'; expected True or False"),
        ({"attn_types": "full"}, "`attn_types` of `hparams` is 'full'; expected a list of names"),
        ({"loss_img_weight": -1}, "`loss_img_weight` of `hparams` is -1; expected a number from 0"),
        ({"reversible": ((), ())}, "`reversible` is a tuple, which is not converted"),
    ],
)
def test_settings_of_a_wrong_kind_are_named(tmp_path, hparams, words):
    with pytest.raises(ValueError, match=words):
        dalle_pytorch.read_source(save_dalle_pytorch(tmp_path / "source", hparams=hparams))


def test_words_never_hold_what_a_file_nests():
    nested = ()
    for _ in range(100):
        nested = (nested, nested)
    assert describe(nested) == "a tuple" and describe(1 << 5000) == "a number of 5001 bits"
    assert len(describe("x" * 10**6)) < 100
    with pytest.raises(ValueError, match="it is a tuple; expected names"):
        expect_dict(nested, "it")


@pytest.mark.parametrize(
    "text", ["a: [", "a: 2001-99-99", "[" * 5000, "? [a]\n: b", "\x00", "!!python/object:os.x {}"]
)
def test_yaml_that_cannot_be_read_is_refused(tmp_path, text):
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(ValueError, match="is not a YAML file that can be read"):
        read_yaml(tmp_path / "config.yaml")


def test_tokenizers_that_cannot_be_read_are_refused(tmp_path):
    (tmp_path / "words.json").write_text('{"model": {}}')
    with pytest.raises(ValueError, match="words.json holds no tokenizer that can be read"):
        caption_tokenizers.read_json_tokenizer(tmp_path / "words.json", 8)
    (tmp_path / "vocab.json").write_text("[]")
    with pytest.raises(ValueError, match="vocab.json holds no tokenizer that can be read"):
        caption_tokenizers.read_char_bpe(tmp_path / "vocab.json", tmp_path / "vocab.json", 8)
    for content, error in ((b"\x1f\x8b\x08\x00", OSError), (b"nothing", OSError), (b"", ValueError)):
        (tmp_path / "bpe_simple_vocab_16e6.txt.gz").write_bytes(content)
        with pytest.raises(error):
            caption_tokenizers.read_clip_bpe(tmp_path / "bpe_simple_vocab_16e6.txt.gz", 8)
    for text in ("", "1", "0 0", "1 0\n55296 4\n1 0 2 3", "1 0\n-5 4\n1 0 2 3"):
        (tmp_path / "bpe.model").write_text(text)
        with pytest.raises(ValueError, match="bpe.model"):
            caption_tokenizers.read_youtokentome(tmp_path / "bpe.model", 8)
    (tmp_path / "deep.json").write_text("[" * 100_000)
    assert not caption_tokenizers.is_json_tokenizer(tmp_path / "deep.json")
