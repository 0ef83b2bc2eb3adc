"""The shapes model that this repository ships: small, whole, and drawing what captions say, by the checker."""

from pathlib import Path

import pytest
import torch
from evaluation.scene_checker import judge, read_picture
from scenes import Scene, Thing

from hf_dalle import DALLEPipeline


FOLDER = Path(__file__).parents[1] / "checkpoints" / "shapes"
SCENES = {
    "a large red circle": Scene(Thing("large", "red", "circle")),
    "a small blue square": Scene(Thing("small", "blue", "square")),
    "there are three big yellow squares": Scene(Thing("large", "yellow", "square"), count=3),
    "two little black stars": Scene(Thing("small", "black", "star"), count=2),
    "a big purple circle above a small red square": Scene(
        Thing("large", "purple", "circle"), 1, "above", Thing("small", "red", "square")
    ),
    "a large green star left of a large blue circle": Scene(
        Thing("large", "green", "star"), 1, "left of", Thing("large", "blue", "circle")
    ),
}


@pytest.fixture(scope="module")
def pipe():
    pipeline = DALLEPipeline.from_pretrained(FOLDER)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def test_sizes(pipe):
    assert sum(path.stat().st_size for path in FOLDER.rglob("*") if path.is_file()) < 8e6
    assert pipe.dvae.config.sample_size == 60 and pipe.dvae.image_grid_size == 12


def test_most_pictures_show_what_the_caption_says(pipe):
    """Right by chance would be one picture in hundreds."""
    generators = [torch.Generator().manual_seed(seed) for seed in range(2 * len(SCENES))]
    pictures = pipe(list(SCENES), num_images_per_prompt=2, generator=generators).images
    wanted = [scene for scene in SCENES.values() for _ in range(2)]
    right = [judge(read_picture(picture), scene).is_right for picture, scene in zip(pictures, wanted, strict=True)]
    assert sum(right) >= 8, right
