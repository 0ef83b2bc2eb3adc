"""Fidelity through the frame: blur and resizing, distances in closed form, processes, kills, refusals, words.

The network of most tests gives a picture's mean colour, so that what must come out is known.
"""

import json
import math
import time

import numpy as np
import pytest
import torch
from evaluation import features, fidelity_report
from evaluation.features import FeatureNetwork, blur, crop_to_side, load_network
from evaluation.fidelity import Settings, check, compare_models
from evaluation.frame import Evaluation
from evaluation.processes import make_accelerator
from evaluation.settings import EvaluationArguments
from PIL import Image, ImageFilter
from tiny import build_pipeline
from tiny_data import write_parquet
from tiny_evaluation import make_settings
from tiny_processes import finish, fork, make_ranks, wait_until

from hf_dalle.distribution_metrics import frechet_distance


NUM_ROWS = 24
FEW = {"num_resamples": 4, "num_splits": 2, "use_few_pictures": True, "num_sizes": 0, "num_subsets": 2}


def draw_flat(colours, side=8):
    return [Image.new("RGB", (side, side), tuple(int(value) for value in colour)) for colour in colours]


COLOURS = np.random.default_rng(0).integers(40, 100, (NUM_ROWS, 3))
MADE = {"shifted": COLOURS + [10, 0, 20], "wider": 2 * COLOURS, "same": COLOURS}


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """Rows of flat pictures, and three folders of somebody's pictures of them."""
    folder = tmp_path_factory.mktemp("home")
    captions = [f"colour {number}" for number in range(NUM_ROWS)]
    rows = [{"image": image, "captions": [text]} for image, text in zip(draw_flat(COLOURS), captions, strict=True)]
    write_parquet(folder / "data" / "validation.parquet", rows)
    write_parquet(folder / "data" / "train.parquet", rows[:4])
    for name, colours in MADE.items():
        write_pictures(folder / name, draw_flat(colours))
    return folder


def write_pictures(folder, pictures):
    folder.mkdir()
    for number, picture in enumerate(pictures):
        picture.save(folder / f"validation-{number:06d}.png")


def make_evaluation(home, output_dir, names=tuple(MADE), **settings):
    models = [{"name": name, "images": str(home / name)} for name in names]
    given = make_settings(home, output_dir, models=models, num_captions=None, **settings)
    return Evaluation(EvaluationArguments(**given), make_accelerator())


def mean_colour(pictures):
    """Features 3, and logits of 3 classes, which tell the strongest colour."""
    colours = pictures.float().mean((2, 3))
    return colours, colours / 10


def make_network(forward=mean_colour):
    return FeatureNetwork("Colours", "mean colours", "colours", forward)


@pytest.fixture(scope="module")
def figures(home, tmp_path_factory):
    evaluation = make_evaluation(home, tmp_path_factory.mktemp("run"))
    settings = Settings(radii=[0, 2], **{**FEW, "num_sizes": 3})
    return compare_models(evaluation, settings, make_network())


# ----------------------------------------------------------------------------------------------------------- pictures


def convolve(picture, radius):
    """A Gaussian's weighted mean around each pixel, by its definition in two dimensions, edges going on."""
    reach = math.ceil(4 * radius)
    weights = {
        (dy, dx): math.exp(-(dy * dy + dx * dx) / (2 * radius**2))
        for dy in range(-reach, reach + 1)
        for dx in range(-reach, reach + 1)
    }
    height, width = picture.shape
    blurred = np.zeros_like(picture, dtype=float)
    for (dy, dx), weight in weights.items():
        rows = np.clip(np.arange(height) + dy, 0, height - 1)
        columns = np.clip(np.arange(width) + dx, 0, width - 1)
        blurred += weight * picture[rows][:, columns]
    return blurred / sum(weights.values())


def make_noise(side=24):
    return torch.randint(0, 256, (2, 3, side, side), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


@pytest.mark.parametrize("radius", [0.5, 1, 4])
def test_blur_is_the_convolution(radius):
    noise = make_noise()
    wanted = np.stack([[convolve(plane, radius) for plane in picture] for picture in noise.numpy()])
    assert np.abs(blur(noise, radius).numpy() - wanted).max() <= 0.5 + 1e-3  # rounded to whole levels


@pytest.mark.parametrize("radius", [1, 2, 4, 8])
def test_blur_is_near_pillows(radius):
    noise = make_noise(64)[0]
    pillows = Image.fromarray(noise.permute(1, 2, 0).numpy()).filter(ImageFilter.GaussianBlur(radius))
    difference = np.abs(blur(noise[None], radius)[0].permute(1, 2, 0).numpy().astype(float) - np.array(pillows))
    assert difference.mean() < 1.5 and noise.float().std() > 70  # Pillow's is three boxes


def test_no_blur_and_a_flat_picture():
    noise = make_noise()
    assert blur(noise, 0) is noise
    flat = torch.full((1, 3, 9, 9), 77, dtype=torch.uint8)
    assert torch.equal(blur(flat, 8), flat)


def test_centre_square_and_side():
    picture = Image.fromarray(make_noise(24)[0].permute(1, 2, 0).numpy()).crop((0, 0, 24, 16))
    assert torch.equal(crop_to_side(picture, None), torch.from_numpy(np.array(picture)).permute(2, 0, 1))
    square = picture.crop((4, 0, 20, 16))
    assert torch.equal(crop_to_side(picture, 16), torch.from_numpy(np.array(square)).permute(2, 0, 1))
    reduced = np.array(square.resize((8, 8), Image.Resampling.BICUBIC))
    assert torch.equal(crop_to_side(picture, 8), torch.from_numpy(reduced).permute(2, 0, 1))
    # antialiased: a fine checkerboard becomes grey, and not one of its colours
    board = Image.fromarray(((np.indices((32, 32)).sum(0) % 2) * 255).astype(np.uint8)).convert("RGB")
    assert crop_to_side(board, 8).float().sub(127.5).abs().max() < 20


# ----------------------------------------------------------------------------------------------------- known figures


def test_frechet_distances_of_known_pictures(figures):
    variance, mean = np.cov(COLOURS.T).trace(), COLOURS.mean(0)
    wanted = {"shifted": 10**2 + 20**2, "wider": variance + (mean**2).sum(), "same": 0}
    for name, value in wanted.items():
        for radius in ("0", "2"):  # a flat picture stays what it is
            assert figures["models"][name][radius]["all"]["fd"]["value"] == pytest.approx(value, rel=1e-6, abs=1e-3)


def test_the_other_figures_of_known_pictures(figures):
    same, wider = (figures["models"][name]["0"]["all"] for name in ("same", "wider"))
    assert same["precision"]["value"] == same["recall"]["value"] == 1
    assert same["kd"]["value"] < 0 < wider["kd"]["value"]  # unbiased: of equal sets it is below zero
    probabilities = torch.softmax(torch.from_numpy(COLOURS).double() / 10, 1)
    assert 1 < same["is"]["value"] < torch.special.entr(probabilities.mean(0)).sum().exp()
    # in parts that chance chooses, for each set of its own: so not the same number, but near
    assert figures["real"]["0"]["value"] == same["is"]["value"]


def test_intervals_stand_around_the_figure(figures):
    for radii in figures["models"].values():
        for entry in radii["0"]["all"].values():
            assert entry["low"] <= entry["value"] + 1e-9 and entry["high"] >= entry["value"] - 1e-9
    # repeated rows: a resample of equal sets is not at zero any more
    assert figures["models"]["same"]["0"]["all"]["fd"]["bias"] > 0


def test_sizes_end_at_the_whole(figures):
    for name, each in figures["sizes"].items():
        assert each["sizes"][-1] == NUM_ROWS and len(each["sizes"]) == 3
        assert each["values"][-1] == pytest.approx(figures["models"][name]["0"]["all"]["fd"]["value"], abs=1e-3)


def test_the_second_curve_leaves_real_pictures_out(home, tmp_path):
    kept = np.arange(NUM_ROWS) % 3 > 0
    evaluation = make_evaluation(home, tmp_path / "run")
    figures = compare_models(evaluation, Settings(radii=[0], **FEW), make_network(), kept)
    real, drawn = torch.tensor(COLOURS).double(), torch.tensor(MADE["wider"]).double()
    curves = figures["models"]["wider"]["0"]
    assert curves["no_overlap"]["fd"]["value"] == pytest.approx(frechet_distance(real[kept], drawn), rel=1e-6)
    assert curves["all"]["fd"]["value"] == pytest.approx(frechet_distance(real, drawn), rel=1e-6)
    assert figures["num_kept"] == kept.sum() and "is" not in curves["no_overlap"]
    assert "16 of 24 real pictures" in fidelity_report.describe(figures)


def test_parts_smaller_than_the_classes_are_said(home, tmp_path):
    evaluation = make_evaluation(home, tmp_path / "run", names=["same"])
    compare_models(evaluation, Settings(radii=[0], **{**FEW, "num_splits": 12}), make_network())
    assert "IS-Colours is of parts of 2 pictures, fewer than the network's 3 classes" in evaluation.notes[-1]


# --------------------------------------------------------------------------------------------- processes and kills


def run_slowly(home, output_dir, seconds):
    """Writes `figures-RANK.json`; each batch of pictures takes a while."""

    def forward(pictures):
        time.sleep(seconds)
        return mean_colour(pictures)

    features.SHARD_SIZE = 2
    evaluation = make_evaluation(home, output_dir)
    settings = Settings(radii=[0, 1], **{**FEW, "num_sizes": 2})
    figures = compare_models(evaluation, settings, make_network(forward))
    (output_dir / f"figures-{evaluation.process_index}.json").write_text(json.dumps(figures, allow_nan=False))


def read_figures(folder):
    return json.loads((folder / "figures-0.json").read_text())


def test_processes_and_kills_change_no_number(home, tmp_path, monkeypatch):
    alone, killed = tmp_path / "alone", tmp_path / "killed"
    one_thread = {"OMP_NUM_THREADS": "1"}
    monkeypatch.setattr(features, "SHARD_SIZE", features.SHARD_SIZE)  # is put back
    run_slowly(home, alone, 0.0)
    second = fork(run_slowly, home, killed, 0.1, output=tmp_path / "killed.txt", environment=one_thread)
    wait_until(lambda: len(list(killed.glob("work/features/*/*.npz"))) > 4, second)
    second.kill()
    finish(second)
    stored = {path: path.stat().st_mtime_ns for path in killed.glob("work/features/*/*.npz")}
    assert 4 < len(stored) < 4 * 2 * NUM_ROWS / 2 and not (killed / "figures-0.json").exists()
    ranks = [
        fork(
            run_slowly, home, killed, 0.0, output=tmp_path / f"{rank['RANK']}.txt", environment={**rank, **one_thread}
        )
        for rank in make_ranks(2)
    ]
    assert finish(*ranks) == [0, 0], "\n".join(path.read_text() for path in tmp_path.glob("*.txt"))
    assert read_figures(killed) == read_figures(alone)
    assert all(path.stat().st_mtime_ns == then for path, then in stored.items())  # what was done is not done again


# ------------------------------------------------------------------------------------------------------------ networks


def test_figures_are_named_by_their_network():
    assert [make_network().name(metric) for metric in ("FD", "KD", "IS")] == ["FD-Colours", "KD-Colours", "IS-Colours"]
    reference = FeatureNetwork("", "the reference", "x", mean_colour)
    assert [reference.name(metric) for metric in ("FD", "KD", "IS")] == ["FID", "KID", "IS"]


def test_efficientnet_gives_the_judges_features():
    from judge import extract_features, load_judge

    network = load_network("efficientnet-lite0", None)
    pictures = make_noise(224)
    given, logits = network(pictures)
    assert (network.num_features, network.num_classes, network.suffix) == (1280, 1000, "EffLite0")
    judged = extract_features(load_judge(), list(pictures.float() / 255), 224)
    assert torch.allclose(given, judged, atol=1e-4) and logits.shape == (2, 1000)


def test_a_clip_of_transformers(tmp_path):
    from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel

    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = CLIPConfig(
        text_config={**vision, "vocab_size": 9},
        vision_config={**vision, "image_size": 16, "patch_size": 8},
        projection_dim=6,
    )
    model = CLIPModel(config).eval()
    model.save_pretrained(tmp_path / "tiny-clip")
    size = {"size": {"shortest_edge": 16}, "crop_size": {"height": 16, "width": 16}}
    processor = CLIPImageProcessorPil(**size)
    processor.save_pretrained(tmp_path / "tiny-clip")
    network = load_network("transformers", str(tmp_path / "tiny-clip"))
    pictures = make_noise(24)
    with torch.no_grad():
        inputs = processor([Image.fromarray(p.permute(1, 2, 0).numpy()) for p in pictures], return_tensors="pt")
        wanted = model.visual_projection(model.vision_model(inputs["pixel_values"]).pooler_output)
    given, logits = network(pictures)
    assert torch.allclose(given, wanted, atol=1e-5) and logits is None
    assert network.name("FD") == "FD-tiny-clip" and network.num_features == 6
    CLIPImageProcessorPil(**size, do_normalize=False).save_pretrained(tmp_path / "tiny-clip")
    assert load_network("transformers", str(tmp_path / "tiny-clip")).digest != network.digest  # other features


def test_networks_that_are_not_there(tmp_path):
    with pytest.raises(OSError, match="nowhere, which transformers cannot load"):
        load_network("transformers", str(tmp_path / "nowhere"))
    with pytest.raises(OSError, match="which is not a file"):
        load_network("inception", str(tmp_path / "weights.pth"))
    with pytest.raises(ValueError, match="`network: inception` needs `weights`"):
        load_network("inception", None)
    with pytest.raises(ValueError, match="leave `weights` out"):
        load_network("efficientnet-lite0", "x.pth")


def test_weights_of_no_inception_are_refused(tmp_path):
    pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3", exc_type=ImportError)
    torch.save({"x": torch.zeros(1)}, tmp_path / "wrong.pth")
    with pytest.raises(ValueError, match="holds no weights of torch-fidelity's Inception"):
        load_network("inception", str(tmp_path / "wrong.pth"))


# ---------------------------------------------------------------------------------------------------------- refusals


def test_too_few_pictures_are_refused_before_anything_is_drawn(home, tmp_path):
    evaluation = make_evaluation(home, tmp_path / "run")
    with pytest.raises(ValueError, match="24 real pictures for 1280 features: their covariance is singular"):
        check(evaluation, Settings())
    check(evaluation, Settings(use_few_pictures=True))
    with pytest.raises(ValueError, match="IS of 30 parts need 30"):
        check(evaluation, Settings(use_few_pictures=True, num_splits=30))
    with pytest.raises(ValueError, match="24 neighbours and IS of 10 parts need 25"):
        check(evaluation, Settings(use_few_pictures=True, num_neighbours=24))


def test_pictures_of_another_side_are_refused_or_made_alike(home, tmp_path):
    write_pictures(tmp_path / "large", draw_flat(COLOURS, side=16))
    models = [{"name": "large", "images": str(tmp_path / "large")}]
    given = make_settings(home, tmp_path / "run", models=models, num_captions=None)
    evaluation = Evaluation(EvaluationArguments(**given), make_accelerator())
    with pytest.raises(ValueError, match="the real pictures 8 x 8; large 16 x 16"):
        check(evaluation, Settings(use_few_pictures=True))
    check(evaluation, Settings(use_few_pictures=True, side=16))
    assert "24 of 24 of the real pictures are smaller than the side 16" in evaluation.notes[-1]
    figures = compare_models(evaluation, Settings(side=8, radii=[0], **FEW), make_network())
    assert figures["models"]["large"]["0"]["all"]["fd"]["value"] == pytest.approx(0, abs=1e-3)


def test_the_side_of_what_is_not_drawn_yet_must_be_set(home, tmp_path):
    build_pipeline().save_pretrained(tmp_path / "checkpoint")
    models = [{"name": "ours", "pipeline": str(tmp_path / "checkpoint")}]
    given = make_settings(home, tmp_path / "run", models=models, num_captions=None)
    evaluation = Evaluation(EvaluationArguments(**given), make_accelerator())
    with pytest.raises(ValueError, match="how large ours draws is seen only afterwards"):
        check(evaluation, Settings(use_few_pictures=True))
    check(evaluation, Settings(use_few_pictures=True, side=8))


def test_grey_pictures_against_coloured_ones_are_said(home, tmp_path):
    write_pictures(tmp_path / "grey", [picture.convert("L") for picture in draw_flat(COLOURS)])
    models = [{"name": "grey", "images": str(tmp_path / "grey")}]
    given = make_settings(home, tmp_path / "run", models=models, num_captions=None)
    evaluation = Evaluation(EvaluationArguments(**given), make_accelerator())
    check(evaluation, Settings(use_few_pictures=True))
    assert evaluation.notes == ["fidelity: grey are 0 % of the real pictures, 100 % of grey; distances include it."]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"radii": [2.0, 1.0]}, "`radii` is"),
        ({"radii": [-1.0]}, "`radii` is"),
        ({"radii": []}, "`radii` is"),
        ({"num_splits": 0}, "`num_splits` is 0"),
        ({"subset_size": 1}, "`subset_size` is 1"),
        ({"num_sizes": 1}, "`num_sizes` is 1"),
        ({"num_resamples": 1}, "`num_resamples` is 1"),
        ({"side": 4}, "`side` from 8"),
    ],
)
def test_settings_out_of_range(settings, words):
    with pytest.raises(ValueError, match=words):
        Settings(**settings)


# -------------------------------------------------------------------------------------------------------------- report


def test_the_report_says_what_is_compared(figures, tmp_path):
    assert fidelity_report.plot(figures, tmp_path) == {
        "fidelity": "fidelity.png",
        "fidelity_sizes": "fidelity_sizes.png",
    }
    for name in ("fidelity.png", "fidelity_sizes.png"):
        assert Image.open(tmp_path / name).width > 300
    text = fidelity_report.describe(figures)
    assert text.startswith("## Fidelity\n") and "FD-Colours (lower is better)" in text and "FID" not in text
    assert "| the real pictures |" in text and "limit of the line" in text
    json.dumps(figures, allow_nan=False)
    results = fidelity_report.list_results(figures)
    assert len(results) == 3 * 5 and {result["model"] for result in results} == {*MADE}
    assert (
        results[0]["metric_name"] == "FD-Colours (24 real, 24 drawn pictures)" and results[0]["split"] == "validation"
    )


def test_few_pictures_are_said_in_the_report(figures):
    few = {**figures, "num_features": NUM_ROWS}
    assert "covariances are singular" in fidelity_report.describe(few)
    assert "covariances are singular" not in fidelity_report.describe(figures)
