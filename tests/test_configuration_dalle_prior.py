"""`DallePriorConfig`: the ids that follow from the sizes, the paper's layout, presets, and what it refuses."""

import pytest
from transformers import AutoConfig

from hf_dalle import DallePriorConfig


SMALL = {
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "text_length": 6,
    "text_vocab_size": 20,
    "image_grid_size": 4,
    "image_vocab_size": 16,
}


def test_joint_vocabulary_is_text_pads_start_of_image_and_image():
    config = DallePriorConfig(**SMALL)
    assert config.pad_token_offset == 20  # pads 20 to 25
    assert config.image_start_token_id == 26
    assert config.image_token_offset == 27  # image 27 to 42
    assert config.vocab_size == 43
    assert config.num_image_tokens == 16
    assert config.stream_length == 22
    assert (config.bos_token_id, config.pad_token_id, config.eos_token_id) == (0, None, None)


def test_defaults_are_the_papers_stream():
    config = DallePriorConfig()
    assert config.stream_length == 1280
    assert config.vocab_size == 16384 + 256 + 1 + 8192
    assert config.intermediate_size == 4 * config.hidden_size
    assert config.text_loss_weight == 1 / 8


def test_layout_of_the_64_layers_is_the_papers():
    types = DallePriorConfig.from_preset("12b").attention_types
    assert len(types) == 64
    for layer in range(1, 64):
        assert types[layer - 1] == ("column" if (layer - 2) % 4 == 0 else "row")
    assert types[63] == "conv"


@pytest.mark.parametrize(
    ("num_hidden_layers", "types"),
    [(1, ["conv"]), (2, ["row", "conv"]), (4, ["row", "column", "row", "conv"])],
)
def test_layout_of_few_layers(num_hidden_layers, types):
    config = DallePriorConfig(**{**SMALL, "num_hidden_layers": num_hidden_layers})
    assert config.attention_types == types


@pytest.mark.parametrize(
    ("name", "shape"), [("12b", (64, 62, 3968)), ("1.2b", (24, 32, 2048)), ("emoji-mini", (8, 4, 256))]
)
def test_presets(name, shape):
    config = DallePriorConfig.from_preset(name)
    assert (config.num_hidden_layers, config.num_attention_heads, config.hidden_size) == shape


def test_preset_of_the_demo_and_its_overrides():
    config = DallePriorConfig.from_preset("emoji-mini", attention_types=["full"] * 2, num_hidden_layers=2)
    assert (config.text_length, config.text_vocab_size) == (32, 3072)
    assert (config.image_grid_size, config.image_vocab_size) == (12, 1024)
    assert config.attention_types == ["full", "full"]


def test_save_and_load(tmp_path):
    config = DallePriorConfig(**SMALL, attention_types=["full", "row", "column", "conv"], caption_dropout=0.1)
    config.save_pretrained(tmp_path)
    for loaded in (DallePriorConfig.from_pretrained(tmp_path), AutoConfig.from_pretrained(tmp_path)):
        assert isinstance(loaded, DallePriorConfig)
        changed = {"transformers_version", "_name_or_path"}
        assert {k: v for k, v in loaded.to_dict().items() if k not in changed} == {
            k: v for k, v in config.to_dict().items() if k not in changed
        }


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"attention_types": ["row", "diagonal", "row", "conv"]}, "'diagonal'.*full, row, column, conv"),
        ({"attention_types": ["row"] * 3}, "each of the 4 layers, got 3"),
        ({"num_attention_heads": 5}, r"`num_attention_heads` \(5\) must divide `hidden_size` \(32\)"),
        ({"conv_kernel_size": 4}, "odd number, got 4"),
        ({"image_grid_size": 0}, "`image_grid_size` must be at least 1, got 0"),
        ({"text_length": -1}, "`text_length` must be at least 1, got -1"),
        ({"text_loss_weight": 1.5}, "`text_loss_weight` must be between 0 and 1, got 1.5"),
        ({"caption_dropout": -0.1}, "`caption_dropout` must be between 0 and 1, got -0.1"),
    ],
)
def test_bad_numbers_are_refused(change, words):
    with pytest.raises(ValueError, match=words):
        DallePriorConfig(**{**SMALL, **change})


def test_unknown_preset_is_named_beside_the_valid_ones():
    with pytest.raises(ValueError, match="'13b'.*12b, 1.2b, emoji-mini"):
        DallePriorConfig.from_preset("13b")
