"""The checkpoint that this repository ships: small, whole, and drawing different pictures for different captions."""

import json
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline

from hf_dalle import DALLEPipeline, DallePriorConfig
from hf_dalle.reranking import score_images


FOLDER = Path(__file__).parents[1] / "checkpoints" / "emoji-mini"
CAPTIONS = [
    "a glossy 3d style emoji of hedgehog",
    "a noto style emoji of red apple",
    "an outlined openmoji style emoji of house",
    "a flat fluent style emoji of octopus",
]


@pytest.fixture(scope="module")
def pipe():
    pipeline = DALLEPipeline.from_pretrained(FOLDER)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def test_sizes(pipe):
    assert sum(path.stat().st_size for path in FOLDER.rglob("*") if path.is_file()) < 28e6
    assert 5e6 < sum(parameter.numel() for parameter in pipe.prior.parameters()) < 10e6
    assert pipe.dvae.config.sample_size == 96 and pipe.dvae.image_grid_size == 12


def test_the_preset_of_its_name_has_its_sizes(pipe):
    preset = DallePriorConfig.from_preset("emoji-mini")
    for name in ("hidden_size", "num_hidden_layers", "num_attention_heads", "text_length", "text_vocab_size"):
        assert getattr(preset, name) == getattr(pipe.prior.config, name)
    for name in ("image_grid_size", "image_vocab_size", "attention_types"):
        assert getattr(preset, name) == getattr(pipe.prior.config, name)


def test_it_loads_as_float32_by_either_class(pipe):
    plain = DiffusionPipeline.from_pretrained(FOLDER)
    assert type(plain) is DALLEPipeline
    for part in (pipe.prior, pipe.dvae, pipe.reranker, plain.prior, plain.dvae, plain.reranker):
        assert {parameter.dtype for parameter in part.parameters()} == {torch.float32}


@pytest.mark.parametrize("folder", sorted(FOLDER.parent.iterdir()), ids=lambda folder: folder.name)
def test_no_file_names_a_place(folder):
    for path in folder.rglob("*.json"):
        text = path.read_text()
        assert "_name_or_path" not in json.loads(text) and '"/' not in text.replace('"/"', ""), path


def test_different_captions_draw_different_pictures(pipe):
    """From one seed, so that only the caption differs."""
    draw = {
        caption: pipe(caption, generator=torch.Generator().manual_seed(0), output_type="latent").images[0]
        for caption in CAPTIONS
    }
    for one in CAPTIONS:
        for other in CAPTIONS:
            if one < other:
                assert (draw[one] != draw[other]).float().mean() > 0.3, (one, other)


def test_the_reranker_tells_the_pictures_of_other_captions(pipe):
    """Of sixteen pictures a caption's own four are found; by chance one of them would be."""
    generators = [torch.Generator().manual_seed(seed) for seed in range(4 * len(CAPTIONS))]
    pictures = pipe(CAPTIONS, num_images_per_prompt=4, generator=generators).images
    firsts = 0
    for index, caption in enumerate(CAPTIONS):
        scores = score_images(pipe.reranker, pipe.reranker_processor, caption, pictures)
        firsts += sum(place // 4 == index for place in scores.argsort(descending=True)[:4].tolist())
    assert firsts >= 10, firsts


def test_the_best_candidates_come_first(pipe):
    output = pipe(CAPTIONS[0], num_candidates=6, num_images_per_prompt=3, generator=torch.Generator().manual_seed(0))
    assert len(output.images) == 3 and output.scores.tolist() == sorted(output.scores.tolist(), reverse=True)


def test_colours_follow_the_caption(pipe):
    """Mean ink of eight pictures each: a red heart lacks less red than a green one, and so on."""
    means = {}
    for caption in ("red heart", "green heart", "blue heart"):
        drawn = pipe(
            f"a glossy 3d style emoji of {caption}",
            num_images_per_prompt=8,
            generator=torch.Generator().manual_seed(0),
            output_type="pt",
        ).images
        means[caption] = (1 - drawn).mean(dim=(0, 2, 3))  # ink, as what is missing from white
    red, green, blue = (means[f"{name} heart"] for name in ("red", "green", "blue"))
    assert red[0] / red.sum() < green[0] / green.sum() and red[0] / red.sum() < blue[0] / blue.sum()
    assert green[1] / green.sum() < red[1] / red.sum()
    assert blue[2] / blue.sum() < red[2] / red.sum()
