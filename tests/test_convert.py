"""The converters' way from a file to a folder: what is written, what is said, and that a failure leaves nothing."""

import json
import re
from pathlib import Path

import pytest
import torch
import yaml
from safetensors import safe_open
from tiny_checkpoints import VQGAN_SIZES, build, save_vqgan, save_whole_module

from conversion.cards import Check, Verification
from conversion.convert import FAMILIES, convert, find_family, main
from conversion.families import openai_dvae
from conversion.folders import write_folder
from hf_dalle import DalleDVAE, DalleVQGAN


DVAE_SIZES = {
    **{"sample_size": 256, "vocab_size": 24, "encoder_block_out_channels": [4, 8, 16, 32], "layers_per_block": 1},
    **{"decoder_block_out_channels": [32, 16, 8, 4], "decoder_in_channels": 6},
}


@pytest.fixture
def dvae_source(tmp_path):
    """encoder.pkl and decoder.pkl, and the model that they are."""
    dvae = build(DalleDVAE, **DVAE_SIZES)
    folder = tmp_path / "source"
    folder.mkdir()
    for side in ("encoder", "decoder"):
        names = {name: openai_dvae._name_original(name) for name in dvae.state_dict() if name.startswith(side)}
        weights = {names[name].removeprefix(f"{side}."): dvae.state_dict()[name] for name in names}
        save_whole_module(weights, folder / f"{side}.pkl")
    return folder, dvae


def test_a_dvae_comes_out_bit_for_bit(dvae_source, tmp_path, capsys):
    source, dvae = dvae_source
    assert main(["openai-dvae", str(source), str(tmp_path / "out" / "dvae")]) == 0
    words = capsys.readouterr().out
    assert "inferred: `sample_size` is 256: no weight shows it" in words and "is written" in words
    converted = DalleDVAE.from_pretrained(tmp_path / "out" / "dvae")
    assert {name: converted.config[name] for name in DVAE_SIZES} == DVAE_SIZES
    for name, weight in dvae.state_dict().items():
        assert converted.state_dict()[name].equal(weight), name
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["dvae"]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_shards_and_types(dvae_source, tmp_path, dtype):
    source, dvae = dvae_source
    convert("openai-dvae", source, tmp_path / "out", dtype=dtype, max_shard_bytes=10_000)
    index = json.loads((tmp_path / "out" / "diffusion_pytorch_model.safetensors.index.json").read_text())
    files = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    assert sorted(set(index["weight_map"].values())) == files and len(files) > 2
    for file in files:
        with safe_open(tmp_path / "out" / file, framework="pt") as opened:
            sizes = [opened.get_tensor(name).nbytes for name in opened.keys()]  # noqa: SIM118
            assert sum(sizes) <= 10_000 or len(sizes) == 1
    converted = DalleDVAE.from_pretrained(tmp_path / "out", torch_dtype=getattr(torch, dtype))
    for name, weight in dvae.state_dict().items():
        assert converted.state_dict()[name].equal(weight.to(getattr(torch, dtype))), name


@pytest.mark.parametrize(("factor", "words"), [(1e6, "not finite"), (1e-9, "become 0")])
def test_weights_that_do_not_fit_a_type_are_refused(dvae_source, tmp_path, factor, words):
    source, dvae = dvae_source
    with torch.no_grad():
        dvae.decoder.conv_out.weight.mul_(factor)
    decoder = {openai_dvae._name_original(name)[8:]: w for name, w in dvae.state_dict().items() if name[:3] == "dec"}
    save_whole_module(decoder, source / "decoder.pkl")
    with pytest.raises(ValueError, match=f"decoder.conv_out.weight .*{words}"):
        convert("openai-dvae", source, tmp_path / "out", dtype="float16")
    assert not (tmp_path / "out").exists()
    convert("openai-dvae", source, tmp_path / "out")


def test_verification_compares_with_flava_where_the_package_is_not(dvae_source, tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "dall_e", None)
    source, _ = dvae_source
    conversion = openai_dvae.read_source(source)
    conversion.parts[""].content.register_to_config(sample_size=32)
    (tmp_path / "out").mkdir()
    write_folder(tmp_path / "out", conversion)
    verification = openai_dvae.verify(tmp_path / "out", conversion)
    verification.raise_for_faults()
    assert "FLAVA" in verification.against and len(verification.checks) == 3


def test_verification_finds_two_weights_exchanged(dvae_source, tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "dall_e", None)
    conversion = openai_dvae.read_source(dvae_source[0])
    conversion.parts[""].content.register_to_config(sample_size=32)
    keys = conversion.parts[""].keys
    exchanged = {"encoder.groups.1.0.conv_2.weight": "encoder.groups.1.0.conv_3.weight"}
    exchanged |= {new: old for old, new in exchanged.items()}
    keys.rules = [
        rule._replace(targets=tuple(exchanged.get(name, name) for name in rule.targets)) for rule in keys.rules
    ]
    conversion.check()  # of equal shapes: only the numbers show it
    (tmp_path / "out").mkdir()
    write_folder(tmp_path / "out", conversion)
    with pytest.raises(ValueError, match="not equal to the codebook of transformers' FLAVA.*logits"):
        openai_dvae.verify(tmp_path / "out", conversion).raise_for_faults()


def test_a_figure_that_is_not_a_number_is_a_fault():
    with pytest.raises(ValueError, match="logits: nan, at most 0.1"):
        Verification("itself", [Check("logits", float("nan"), 0.1)]).raise_for_faults()


def test_the_card_says_whence_what_and_on_which_terms(dvae_source, tmp_path):
    source, _ = dvae_source
    convert("openai-dvae", source, tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    record = json.loads((tmp_path / "out" / "conversion.json").read_text())
    metadata = yaml.safe_load(card.split("---")[1])
    assert metadata["license"] == "other" and "indicate clearly that it was used" in card
    assert all(file["sha256"] in card for file in record["files"]) and len(record["files"]) == 2
    assert record["parts"]["model"]["class"] == "DalleDVAE" and record["parts"]["model"]["dropped_keys"] == {}
    assert {"training", "_backward_hooks"} <= set(record["parts"]["model"]["dropped_beside"])
    assert "attributes of the pickled modules, whose values are not looked at: `_" in card
    assert "Not measured on this checkpoint" in card and record["verification"] is None
    assert str(tmp_path) not in card + json.dumps(record)


def test_a_failure_leaves_nothing(dvae_source, tmp_path, capsys):
    source, _ = dvae_source
    (source / "decoder.pkl").unlink()
    assert main(["openai-dvae", str(source), str(tmp_path / "out")]) == 1
    assert re.match(r"error: .*decoder.pkl is missing", capsys.readouterr().err)
    full = tmp_path / "full"
    full.mkdir()
    (full / "mine.txt").write_text("mine")
    assert main(["openai-dvae", str(source), str(full)]) == 1
    assert "is there already" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["full", "source"]
    assert [path.name for path in full.iterdir()] == ["mine.txt"]


def test_a_form_is_rudalle_s_only(dvae_source, tmp_path, capsys):
    assert main(["openai-dvae", str(dvae_source[0]), str(tmp_path / "out"), "--form", "v2"]) == 1
    assert "`--form v2` is none of openai-dvae, which has one form only" in capsys.readouterr().err


def test_a_file_of_another_family_is_refused_with_its_names(tmp_path):
    torch.save({"state_dict": {"blocks.0.weight": torch.ones(2)}}, tmp_path / "file.ckpt")
    with pytest.raises(ValueError, match="0 levels `encoder.down`; .* Names: blocks.0.weight"):
        convert("vqgan", tmp_path / "file.ckpt", tmp_path / "out")


@pytest.mark.parametrize("quantizer", ["nearest", "gumbel"])
def test_a_vqgan_comes_out_bit_for_bit(tmp_path, quantizer):
    levels = [0, 1] if quantizer == "nearest" else [1]
    sizes = {**VQGAN_SIZES, "latent_channels": 12, "codebook_dim": 12 if quantizer == "gumbel" else 10}
    model = build(DalleVQGAN, **sizes, quantizer=quantizer, attention_levels=levels)
    (tmp_path / "source").mkdir()
    save_vqgan(tmp_path / "source" / "last.ckpt", model, **{"loss.discriminator.weight": torch.ones(3)})
    (tmp_path / "source" / "model.yaml").write_text("model: {params: {ddconfig: {resolution: 16}}}")
    report = convert("vqgan", tmp_path / "source", tmp_path / "out", do_verify=True)
    assert any(line.startswith("left out: the discriminator") for line in report)
    assert "left out: entries of the file beside the weights, which only training needs: `epoch`" in report
    converted = DalleVQGAN.from_pretrained(tmp_path / "out")
    assert {name: converted.config[name] for name in sizes} == sizes
    assert converted.config.attention_levels == levels and converted.config.quantizer == quantizer
    for name, weight in model.state_dict().items():
        assert converted.state_dict()[name].equal(weight), name
    card = (tmp_path / "out" / "README.md").read_text()
    assert "the configuration file's resolution" in card and ("Gumbel noise" in card) == (quantizer == "gumbel")


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"quantize.used": torch.arange(3)}, "keys that nothing uses: quantize.used"),
        ({"encoder.conv_in.weight": torch.ones(16, 3, 3, 3)}, r"conv_in.weight is \(32, 3, 3, 3\), but becomes"),
    ],
)
def test_a_vqgan_of_another_form_is_refused(tmp_path, more, words):
    save_vqgan(tmp_path / "file.ckpt", build(DalleVQGAN, **VQGAN_SIZES, attention_levels=[1]), **more)
    with pytest.raises(ValueError, match=words):
        convert("vqgan", tmp_path / "file.ckpt", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_has_its_two_functions(name):
    module = find_family(name)
    assert callable(module.read_source) and callable(module.verify)


def test_the_command_line_is_the_readme_s():
    readme = (Path(__file__).parents[1] / "conversion" / "README.md").read_text()
    assert set(re.findall(r"conversion\.convert ([\w-]+)", readme)) == {"FAMILY", *FAMILIES}
