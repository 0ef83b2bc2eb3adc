"""PNG files that say what they were drawn from: what is written is read back, and draws the same picture again."""

import contextlib
import dataclasses
import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from tiny import build_pipeline, build_reranker

import hf_dalle
from hf_dalle import DALLEPipeline
from hf_dalle.provenance import KEY, TEXT_KEY, Provenance, describe_drawing, read_provenance, save_png


CHECKPOINT = Path(__file__).parent.parent / "checkpoints" / "emoji-mini"
PLAIN = {
    **{"prompt": "a red fox", "seed": 3, "guidance_scale": 2.0, "temperature": 1.0, "top_k": 0, "top_p": 1.0},
    **{"adapters": [], "dtype": "float32", "version": "0.1.0"},
}
PICTURE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8))


@pytest.fixture(scope="module")
def pipe():
    return build_pipeline()


def round_trip(provenance, image=PICTURE):
    file = io.BytesIO()
    save_png(image, file, provenance)
    return read_provenance(io.BytesIO(file.getvalue()))


def is_same(image, other):
    return np.array_equal(np.asarray(image), np.asarray(other))


# ------------------------------------------------------------------------------------------------------- drawing again


@pytest.mark.parametrize(
    "call",
    [
        {},
        {"num_images_per_prompt": 3},
        {"guidance_scale": 3.0, "negative_prompt": "a blue bird", "temperature": 0.7, "num_images_per_prompt": 2},
        {"top_k": 5, "top_p": 0.9, "image": PICTURE, "num_prefix_rows": 2, "num_images_per_prompt": 3},
    ],
    ids=lambda call: " ".join(call) or "plain",
)
def test_what_a_file_says_draws_its_picture_again(pipe, tmp_path, call):
    images = pipe("a red fox", generator=torch.Generator().manual_seed(5), **call).images
    for index, image in enumerate(images):
        save_png(image, tmp_path / f"{index}.png", describe_drawing(pipe, "a red fox", 5, index=index, **call))
    for index in range(len(images)):
        found = read_provenance(tmp_path / f"{index}.png")
        again = build_pipeline()(**found.to_arguments()).images[found.index]
        assert is_same(again, Image.open(tmp_path / f"{index}.png")) and is_same(again, images[index])
    if len(images) > 1:  # or any picture would do
        assert not is_same(images[0], images[1])


def test_the_best_of_many_candidates(tmp_path):
    pipe = build_pipeline(**build_reranker())
    call = {"num_images_per_prompt": 2, "num_candidates": 5, "image": PICTURE, "num_prefix_rows": 1}
    images = pipe("a red fox", generator=torch.Generator().manual_seed(5), **call).images
    found = round_trip(describe_drawing(pipe, "a red fox", 5, index=1, **call), images[1])
    assert is_same(pipe(**found.to_arguments()).images[found.index], images[1])
    assert (found.num_candidates, found.num_images_per_prompt) == (5, 2)


def test_pictures_with_a_seed_each_are_calls_of_their_own(pipe):
    seeds = [7, 8, 9]
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    images = pipe("a red fox", num_images_per_prompt=3, generator=generators).images
    for seed, image in zip(seeds, images, strict=True):
        found = round_trip(describe_drawing(pipe, "a red fox", seed), image)
        assert is_same(pipe(**found.to_arguments()).images[found.index], image)


def test_the_checkpoint_in_this_repository():
    pipe = DALLEPipeline.from_pretrained(CHECKPOINT)
    pipe.set_progress_bar_config(disable=True)
    prompt = "a noto style emoji of red apple"
    image = pipe(prompt, generator=torch.Generator().manual_seed(1)).images[0]
    found = round_trip(describe_drawing(pipe, prompt, 1), image)
    own = pipe.prior.generation_config  # settings that were not given are the checkpoint's own, in numbers
    assert (found.guidance_scale, found.temperature) == (own.guidance_scale, own.temperature)
    assert (found.model, found.dtype, found.version) == ("emoji-mini", "float32", hf_dalle.__version__)
    own.guidance_scale, own.temperature = own.guidance_scale + 1, 2.0  # and stay so
    assert is_same(pipe(**found.to_arguments()).images[0], image)


# ------------------------------------------------------------------------------------------------- what a file says


def test_model_and_revision(tmp_path, pipe):
    assert describe_drawing(pipe, "a red fox", 0).model is None
    commit = "0123456789abcdef0123456789abcdef01234567"
    folder = tmp_path / "a secret place" / "models--me--fox" / "snapshots" / commit
    pipe.save_pretrained(folder)
    loaded = DALLEPipeline.from_pretrained(folder, dtype=torch.bfloat16)
    found = describe_drawing(loaded, "a red fox", 0)
    assert (found.model, found.revision, found.dtype) == (commit, commit, "bfloat16")
    assert "secret" not in json.dumps(dataclasses.asdict(found)) + found.to_text()
    loaded.register_to_config(_name_or_path="me/fox")  # as diffusers does for a repository
    assert describe_drawing(loaded, "a red fox", 0).model == "me/fox"


def test_adapters_are_named(pipe, tmp_path):
    peft = pytest.importorskip("peft")
    loaded = build_pipeline()
    loaded.prior.add_adapter(peft.LoraConfig(r=2, target_modules=["q_proj"]), adapter_name="ink")
    assert describe_drawing(loaded, "a red fox", 0).adapters == ["ink"]


def test_text_for_people_is_that_of_other_programs(pipe):
    call = {"negative_prompt": "a blue bird", "guidance_scale": 2.0, "num_images_per_prompt": 4}
    file = io.BytesIO()
    save_png(PICTURE, file, describe_drawing(pipe, "a red fox", 3, index=1, **call))
    text = Image.open(file).text
    assert set(text) == {TEXT_KEY, KEY} == {"parameters", "hf_dalle"}
    assert text[TEXT_KEY].splitlines() == [
        "a red fox",
        "Negative prompt: a blue bird",
        "Seed: 3, Image: 2 of 4, CFG scale: 2.0, Temperature: 1.0, Top k: 0, Top p: 1.0,"
        f" Version: hf-dalle {hf_dalle.__version__}",
    ]
    assert json.loads(text[KEY])["prompt"] == "a red fox"


def test_without_provenance_there_is_no_text(tmp_path, pipe):
    plain, carrying = tmp_path / "plain.png", tmp_path / "carrying.png"
    save_png(PICTURE, carrying, Provenance(**PLAIN))
    save_png(Image.open(carrying), plain)  # nor what the picture brought along
    for path, has_text in ((plain, False), (carrying, True)):
        data = path.read_bytes()
        assert any(kind in data for kind in (b"tEXt", b"iTXt", b"zTXt", b"eXIf")) == has_text
        assert (b"red fox" in data) == has_text and is_same(Image.open(path), PICTURE)
    assert read_provenance(plain) is None and read_provenance(carrying) == Provenance(**PLAIN)
    image = pipe("a red fox").images[0]
    image.save(plain)
    assert image.info == {} and read_provenance(plain) is None


texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)


@settings(max_examples=150, deadline=None)
@given(
    prompt=texts,
    negative_prompt=st.none() | texts,
    seed=st.integers(0, 2**63 - 1),
    number=st.integers(1, 9).flatmap(lambda n: st.tuples(st.just(n), st.none() | st.integers(0, n - 1))),
    temperature=st.floats(1e-9, 1e9),
    prefix_tokens=st.none() | st.lists(st.lists(st.integers(0, 8191), min_size=4, max_size=4), min_size=1, max_size=3),
)
def test_whatever_is_written_is_read_back(number, **values):
    num_images_per_prompt, index = number
    given = PLAIN | values | {"num_images_per_prompt": num_images_per_prompt, "index": index}
    assert round_trip(Provenance(**given)) == Provenance(**given)


def test_captions_of_other_scripts_are_utf8(tmp_path):
    save_png(PICTURE, tmp_path / "fox.png", Provenance(**PLAIN | {"prompt": "빨간 여우 🦊"}))
    data = (tmp_path / "fox.png").read_bytes()
    assert b"iTXt" in data and "빨간 여우 🦊".encode() in data
    assert read_provenance(tmp_path / "fox.png").prompt == "빨간 여우 🦊"


# ------------------------------------------------------------------------------------------------------ what is wrong


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"seed": -1}, "`seed` is -1"),
        ({"seed": 1.5}, "`seed` is 1.5; expected int"),
        ({"seed": 2**63}, "2**63"),
        ({"prompt": None}, "`prompt` is None; expected str"),
        ({"top_k": True}, "`top_k` is True"),
        ({"index": 1}, "`index` is 1, of 1 pictures"),
        ({"prefix_tokens": [[1, 2], [3]]}, "one length"),
        ({"prefix_tokens": [1, 2]}, "rows"),
        ({"prefix_tokens": [["1"]]}, "rows"),
        ({"prefix_tokens": [[-1]]}, "rows"),
    ],
    ids=str,
)
def test_values_that_cannot_be(change, words):
    with pytest.raises(ValueError) as error:
        Provenance(**PLAIN | change)
    assert words in str(error.value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "damaged"),
        ("[1]", "no JSON object"),
        ("[" * 100000, "damaged"),
        (json.dumps(PLAIN | {"sampler": "new"}), "'sampler' is unknown"),
        (json.dumps({"prompt": "a red fox"}), "missing"),
        (json.dumps(PLAIN | {"seed": "3"}), "`seed` is '3'"),
    ],
    ids=["no JSON", "a list", "nested", "of a later version", "incomplete", "a wrong type"],
)
def test_damaged_text_is_named(tmp_path, text, words):
    info = PngInfo()
    info.add_text(KEY, text)
    PICTURE.save(tmp_path / "fox.png", pnginfo=info)
    with pytest.raises(ValueError) as error:
        read_provenance(tmp_path / "fox.png")
    assert "fox.png" in str(error.value) and words in str(error.value)


def test_files_that_are_no_whole_png(tmp_path):
    PICTURE.save(tmp_path / "fox.jpg")
    with pytest.raises(OSError, match="fox.jpg is no PNG"):
        read_provenance(tmp_path / "fox.jpg")
    with pytest.raises(OSError, match=r"nowhere\.png"):
        read_provenance(tmp_path / "nowhere.png")
    save_png(PICTURE, tmp_path / "fox.png", Provenance(**PLAIN))
    data = (tmp_path / "fox.png").read_bytes()
    for length in range(0, len(data), 7):
        (tmp_path / "cut.png").write_bytes(data[:length])
        with contextlib.suppress(OSError, ValueError):
            assert read_provenance(tmp_path / "cut.png") in (None, Provenance(**PLAIN))
