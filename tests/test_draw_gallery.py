"""The gallery: every picture in it is what the pipeline gives, and the same settings give the same files."""

import json

import draw_gallery
import numpy as np
import pytest
import yaml
from draw_gallery import GAP, GalleryArguments, compose, wrap
from evaluation.pictures import make_generator
from PIL import Image, ImageFont
from tiny import build_pipeline
from tiny_data import list_rows, write_parquet

from hf_dalle import DALLEPipeline


PANELS = {"samples": ["red and blue", "a fox, of which more words are said than stand in a line"], "other": ["a fox"]}
SIDE = 16 + GAP


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gallery")
    build_pipeline().save_pretrained(folder / "checkpoint")
    write_parquet(folder / "data" / "validation.parquet", list_rows())
    return folder


def run(home, folder, *options, **settings):
    given = {"pipeline": str(home / "checkpoint"), "output_dir": str(folder), "panels": PANELS, "num_images": 3}
    path = folder.with_suffix(".yaml")
    path.write_text(yaml.safe_dump({**given, "data_dir": str(home / "data"), **settings}))
    draw_gallery.main([str(path), *options])
    return {path.stem: Image.open(path).convert("RGB") for path in sorted(folder.glob("*.png"))}


@pytest.fixture(scope="module")
def gallery(home, tmp_path_factory):
    rows = {"num_completed": 2, "num_prefix_rows": 1, "num_reconstructed": 4}
    return run(home, tmp_path_factory.mktemp("run") / "out", generation={"temperature": 0.7}, **rows)


def cut(panel, left, top, side=16):
    """The square of a panel that begins there."""
    return np.asarray(panel.crop((left, top, left + side, top + side)))


def list_generators(caption, num_images=3):
    return [make_generator(0, caption, number) for number in range(num_images)]


def test_pictures_of_captions_are_the_pipelines(home, gallery):
    pipe = DALLEPipeline.from_pretrained(home / "checkpoint")
    drawn = pipe("red and blue", num_images_per_prompt=3, temperature=0.7, generator=list_generators("red and blue"))
    for number, picture in enumerate(drawn.images):
        assert np.array_equal(cut(gallery["samples"], GAP + number * SIDE, GAP), np.asarray(picture))
    (alone,) = pipe("a fox", temperature=0.7, generator=list_generators("a fox")[1:2]).images  # in any batch
    assert np.array_equal(cut(gallery["other"], GAP + SIDE, GAP), np.asarray(alone))


def test_completed_pictures_keep_their_top(home, gallery):
    pipe, row = DALLEPipeline.from_pretrained(home / "checkpoint"), list_rows()[0]
    caption, panel = row["captions"][0], gallery["completed"]
    drawn = pipe(
        caption,
        image=row["image"],
        num_prefix_rows=1,
        num_images_per_prompt=3,
        temperature=0.7,
        generator=list_generators(caption),
    )
    whole, kept, *pictures = (cut(panel, GAP + number * SIDE, GAP) for number in range(5))
    assert np.array_equal(whole, np.asarray(row["image"]))
    assert np.array_equal(kept[:4], whole[:4]) and (kept[4:] == draw_gallery.GREY).all()
    assert all(np.array_equal(mine, np.asarray(other)) for mine, other in zip(pictures, drawn.images, strict=True))


def test_reconstructions_stand_below_their_pictures(home, gallery):
    pipe, panel = DALLEPipeline.from_pretrained(home / "checkpoint"), gallery["reconstructions"]
    for number, row in enumerate(list_rows()[::5]):  # 4 of 20, evenly
        tokens = pipe.dvae.encode(pipe.image_processor(row["image"])["pixel_values"]).tokens
        (decoded,) = pipe.image_processor.postprocess(pipe.dvae.decode(tokens).sample.detach(), output_type="pil")
        left = GAP + number * (SIDE + GAP)
        assert np.array_equal(cut(panel, left, GAP), np.asarray(row["image"]))
        assert np.array_equal(cut(panel, left, GAP + SIDE), np.asarray(decoded))


def test_the_same_settings_give_the_same_files_and_another_seed_others(home, tmp_path):
    first = run(home, tmp_path / "first", panels={"one": ["a fox"]})["one"]
    again = run(home, tmp_path / "again", panels={"one": ["a fox"], "two": ["a bird"]})["one"]
    other = run(home, tmp_path / "other", "--seed", "1", panels={"one": ["a fox"]})["one"]
    assert np.array_equal(first, again) and not np.array_equal(first, other)
    about = json.loads((tmp_path / "other" / "gallery.json").read_text())
    assert about["seed"] == 1 and about["captions"] == {"one": ["a fox"]}
    assert about["generation"] == {"guidance_scale": 1.0, "temperature": 1.0, "top_k": 0, "top_p": 1.0}
    larger = run(home, tmp_path / "larger", "--scale", "3", panels={"one": ["a fox"]})["one"]
    square = cut(larger, GAP, GAP, 48)
    assert np.array_equal(square[::3, ::3], cut(first, GAP, GAP)) and np.array_equal(
        square[1::3, 2::3], square[::3, ::3]
    )


def test_blocks_side_by_side_and_their_words_do_not_overlap():
    red, blue = (Image.new("RGB", (40, 40), colour) for colour in ("red", "blue"))
    words = ["one", "two of more words than fit", "three"]
    blocks = [draw_gallery.Block([[red, blue]], text) for text in words]
    panel = np.asarray(compose(blocks, num_columns=2))
    is_red, is_blue = ((panel == colour).all(-1) for colour in ((255, 0, 0), (0, 0, 255)))
    assert is_red.sum() == is_blue.sum() == 3 * 1600
    columns = np.flatnonzero((is_red | is_blue).any(0))
    assert columns[0] == GAP and columns[-1] == panel.shape[1] - 2 * GAP - 1
    assert (panel[-1] == 255).all(), "there is room for all lines"


def test_words_are_wrapped_to_the_width():
    font = ImageFont.load_default(size=12)
    lines = wrap("a glossy 3d style emoji of hedgehog", font, 80)
    assert " ".join(lines) == "a glossy 3d style emoji of hedgehog" and len(lines) > 1
    assert all(font.getlength(line) <= 80 for line in lines)
    assert wrap("Donaudampfschifffahrt", font, 10) == ["Donaudampfschifffahrt"]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"pipeline": ""}, "`pipeline` is missing"),
        ({"num_images": 0}, "`num_images` is 0"),
        ({"panels": {}}, "nothing to draw"),
        ({"panels": {"../a": ["a fox"]}}, "names a file"),
        ({"panels": {"completed": ["a fox"]}}, "names a file"),
        ({"panels": {"a": "a fox"}}, "expected a list of captions"),
        ({"num_reconstructed": 2}, "need one of `data_dir`"),
        ({"num_completed": 2, "data_dir": "data"}, "belong together"),
    ],
)
def test_settings_that_are_refused(changes, words):
    with pytest.raises(ValueError, match=words):
        GalleryArguments(**{"pipeline": "a", "output_dir": "b", "panels": PANELS, **changes})


def test_data_without_captions_is_refused(home, tmp_path):
    with pytest.raises(ValueError, match="no column 'words'"):
        run(home, tmp_path / "out", caption_column="words", num_reconstructed=2)
