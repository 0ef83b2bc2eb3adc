"""`DalleProcessor`: the ids and pixels of the pipeline in one call, from either kind of folder, by `AutoProcessor`."""

import json
import logging

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import CAPTIONS, build_pipeline
from transformers import AutoImageProcessor, AutoProcessor, AutoTokenizer, BatchFeature

from hf_dalle import DalleProcessor, encode_captions


@pytest.fixture(scope="module")
def pipe():
    return build_pipeline()


@pytest.fixture(scope="module")
def processor(pipe):
    return DalleProcessor(pipe.image_processor, pipe.tokenizer)


@pytest.fixture(scope="module")
def folders(pipe, processor, tmp_path_factory):
    folder = tmp_path_factory.mktemp("folders")
    pipe.save_pretrained(folder / "pipeline")
    processor.save_pretrained(folder / "processor")
    return folder


def test_text_and_pictures_are_those_of_the_parts(pipe, processor):
    pictures = [Image.new("RGB", (30, 20), colour) for colour in ("red", "blue", "white")]
    features = processor(text=CAPTIONS, images=pictures)
    assert type(features) is BatchFeature
    encoded = encode_captions(pipe.tokenizer, CAPTIONS, 12)
    assert set(features) == {"input_ids", "attention_mask", "pixel_values"} == set(processor.model_input_names)
    assert torch.equal(features["input_ids"], encoded["input_ids"]) and features["input_ids"].shape == (4, 12)
    assert torch.equal(features["attention_mask"], encoded["attention_mask"])
    assert torch.equal(features["pixel_values"], pipe.image_processor(pictures)["pixel_values"])


def test_one_caption_or_one_picture_alone(pipe, processor):
    text = processor(text="a red fox")
    assert set(text) == {"input_ids", "attention_mask"} and text["input_ids"].shape == (1, 12)
    picture = processor(Image.new("RGB", (16, 16), "red"))
    assert set(picture) == {"pixel_values"} and picture["pixel_values"].shape == (1, 3, 16, 16)
    tokens = pipe.prior.generate(**text)
    assert tokens.shape == (1, 12 + 1 + 16), "what it returns is what the prior takes"


def test_decoding(processor):
    ids = processor(text=["a red fox", "two green apples"])["input_ids"]
    assert processor.batch_decode(ids, skip_special_tokens=True) == ["a red fox", "two green apples"]
    assert processor.decode(ids[0], skip_special_tokens=True) == "a red fox"


def test_arguments_of_the_tokenizer_and_numpy(pipe, processor):
    features = processor(
        text=["a red fox", "a"], images=np.zeros((8, 8, 3), np.uint8), padding=True, return_tensors="np"
    )
    assert all(type(value) is np.ndarray for value in features.values())
    expected = pipe.tokenizer(["a red fox", "a"], padding=True, return_tensors="np")
    assert np.array_equal(features["input_ids"], expected["input_ids"]) and features["input_ids"].shape[1] < 12
    assert processor(text="a red fox on a table", max_length=4)["input_ids"].shape == (1, 4)


def test_a_caption_that_is_cut_is_quoted(processor, caplog):
    with caplog.at_level(logging.WARNING):
        assert processor(text="a red fox " * 9)["attention_mask"].sum() == 12
    assert any("was cut to 12" in record.message for record in caplog.records)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({}, "got neither"),
        ({"text": []}, "no captions"),
        ({"text": [3]}, "must be a string"),
        ({"text": [], "padding": True}, "no captions"),
        ({"text": [3], "max_length": 4}, "must be a string"),
        ({"images": Image.new("F", (4, 4))}, "no range of its own"),
        ({"text": "a", "return_tensors": "tf"}, "'tf'; tensors come as 'pt' or 'np'"),
    ],
)
def test_what_cannot_be_read_is_refused(processor, arguments, words):
    with pytest.raises(ValueError, match=words):
        processor(**arguments)


@pytest.mark.parametrize("kind", ["processor", "pipeline"])
@pytest.mark.parametrize("loader", [AutoProcessor, DalleProcessor])
def test_both_kinds_of_folder_load(processor, folders, kind, loader):
    loaded = loader.from_pretrained(folders / kind)
    assert type(loaded) is DalleProcessor
    arguments = {"text": CAPTIONS, "images": Image.new("RGB", (9, 5), "blue")}
    expected, got = processor(**arguments), loaded(**arguments)
    assert all(torch.equal(got[name], expected[name]) for name in expected)


def test_a_pipeline_inside_a_folder_loads(processor, folders):
    loaded = DalleProcessor.from_pretrained(folders, subfolder="pipeline")
    assert loaded(text=CAPTIONS)["input_ids"].tolist() == processor(text=CAPTIONS)["input_ids"].tolist()


def test_the_pipelines_file_is_the_processors_own(folders, processor):
    names = {path.name for path in (folders / "processor").iterdir()}
    assert names == {"processor_config.json", "tokenizer.json", "tokenizer_config.json"}
    saved = json.loads((folders / "pipeline" / "processor_config.json").read_text())
    assert saved == json.loads((folders / "processor" / "processor_config.json").read_text())
    assert AutoImageProcessor.from_pretrained(folders / "pipeline").size.height == 16
    assert len(AutoTokenizer.from_pretrained(folders / "processor")) == 300


def test_a_folder_without_a_file_is_an_error(folders, tmp_path):
    with pytest.raises(OSError, match=str(tmp_path)):
        DalleProcessor.from_pretrained(tmp_path)
