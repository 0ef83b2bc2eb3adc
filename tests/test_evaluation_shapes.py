"""The measurement `shapes`: figures of pictures whose truth is known, chance against its closed form, refusals."""

import io
import json

import evaluate
import numpy as np
import prepare_shapes
import pytest
from evaluation import shapes
from evaluation.scene_checker import Verdict, judge
from hypothesis import given, settings
from PIL import Image
from scenes import draw_layout, place_scene
from test_prepare_shapes import scenes
from tiny import build_pipeline
from tiny_data import write_parquet
from tiny_evaluation import make_evaluation, make_settings, read_report, write_config
from tiny_processes import finish, fork, make_ranks, run_script
from tiny_training import ROOT

from hf_dalle.data import load_rows


SPLITS = ["train", "validation", "test_pairs", "test_triples"]
NUM_ROWS = {"train": 20, "validation": 8, "test_pairs": 8, "test_triples": 6}


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """Data; a folder of its own pictures, another in which every second row shows another scene; a checkpoint."""
    home = tmp_path_factory.mktemp("home")
    prepare_shapes.prepare(home / "data", NUM_ROWS, size=48)
    for name in ("right", "half"):
        (home / name).mkdir()
    for split in SPLITS:
        for number, row in enumerate(load_rows(str(home / "data"), split=split)):
            image = Image.open(io.BytesIO(row["image"]["bytes"]))
            image.save(home / "right" / f"{split}-{number:06d}.png")
            if number % 2:
                scene = prepare_shapes.read_scene(row)
                size = "small" if scene.thing.size == "large" else "large"
                spoiled = scene._replace(thing=scene.thing._replace(size=size))
                image = draw_layout(place_scene(spoiled, np.random.default_rng(number)), 48)
            image.save(home / "half" / f"{split}-{number:06d}.png")
    build_pipeline().save_pretrained(home / "checkpoint")
    return home


def list_models(home, *names):
    given = [{"name": name, "images": str(home / name)} for name in ("right", "half")]
    given.append({"name": "ours", "pipeline": str(home / "checkpoint")})
    return [model for model in given if model["name"] in (names or ("right", "half", "ours"))]


def make(home, output_dir, *names, **given):
    given = {"splits": SPLITS, "num_captions": None, "models": list_models(home, *names), "batch_size": 8, **given}
    return make_evaluation(home, output_dir, **given)


def test_the_whole_run(home, tmp_path):
    given = {"splits": SPLITS, "num_captions": None, "models": list_models(home), "batch_size": 8}
    config = write_config(
        make_settings(home, tmp_path / "run", **given, measure={"shapes": {"num_chances": 3, "num_shown": 2}})
    )
    evaluate.main([str(config)])
    report = read_report(tmp_path / "run")
    figures = report["measurements"]["shapes"]["figures"]
    for split in SPLITS:
        assert figures["real"][split]["all"]["right"]["value"] == 1
        assert figures["models"]["right"]["drawn"][split]["all"]["right"]["value"] == 1
        half = figures["models"]["half"]["drawn"][split]["all"]
        assert half["right"]["value"] == half["size"]["value"] == 0.5 and half["num_pictures"] == NUM_ROWS[split]
        assert half["colour"]["value"] == half["shape"]["value"] == half["count"]["value"] == 1
        assert figures["models"]["ours"]["drawn"][split]["all"]["right"]["value"] == 0  # random weights
        assert "reconstructions" in figures["models"]["ours"] and "reconstructions" not in figures["models"]["half"]
    assert "relation" not in figures["real"]["test_pairs"]["one"] and "one" not in figures["real"]["test_triples"]
    text = (tmp_path / "run" / "report.md").read_text()
    assert "| real pictures | 100.0 [" in text and "| half, drawn | 50.0 [" in text
    assert "| half, `test_triples` | 100.0 | 100.0 | 100.0 | 50.0 | 100.0 |" in text
    for name in (f"shapes-{number}.png" for number in (1, 2, 3)):
        with Image.open(tmp_path / "run" / name) as grid:
            assert min(grid.size) > 200 and f"({name})" in text
    assert {"shapes-1", "shapes-2", "shapes-3"} <= {*report["pictures"]}
    results = {(r["model"], r["split"], r["metric_name"]): r["value"] for r in report["results"]}
    assert results["half", "test_triples", "pictures with everything right, of two"] == 0.5
    assert {split for _, split, _ in results} == {"validation", "test_pairs", "test_triples"}


@pytest.mark.slow
def test_two_processes_find_what_one_finds(home, tmp_path):
    found = []
    for name, ranks in (("one", [{}]), ("two", make_ranks(2))):
        given = {"splits": SPLITS, "num_captions": 5, "models": list_models(home, "half", "ours"), "batch_size": 4}
        config = write_config(
            make_settings(home, tmp_path / name, **given, measure={"shapes": {"num_chances": 2, "num_shown": 1}})
        )
        argv = [str(ROOT / "training" / "evaluate.py"), str(config)]
        processes = [
            fork(run_script, argv, output=tmp_path / f"{name}.txt", environment={**rank, "OMP_NUM_THREADS": "1"})
            for rank in ranks
        ]
        assert finish(*processes) == [0] * len(ranks), (tmp_path / f"{name}.txt").read_text()
        found.append(read_report(tmp_path / name)["measurements"])
    assert found[0] == found[1]


def test_stored_verdicts_are_taken_and_those_of_another_checker_are_not(home, tmp_path, monkeypatch):
    evaluation = make(home, tmp_path / "run", "half")
    evaluation.folder.mkdir(parents=True)
    before = shapes.measure(evaluation, shapes.Settings(num_chances=1, num_shown=1))
    monkeypatch.setattr(shapes, "read_picture", lambda image: [])  # would find nothing right
    assert shapes.measure(evaluation, shapes.Settings(num_chances=1, num_shown=1)) == before
    monkeypatch.setattr(shapes, "_digest_checker", lambda: "another")
    after = shapes.measure(evaluation, shapes.Settings(num_chances=1, num_shown=1))
    assert after["real"]["train"]["all"]["right"]["value"] == 0
    assert any("The checker finds 0.0% of the real pictures right" in note for note in evaluation.notes)
    assert json.dumps(after, allow_nan=False)


@settings(max_examples=60, deadline=None)
@given(one=scenes, other=scenes)
def test_a_scene_shown_is_judged_right_by_itself_alone(one, other):
    assert judge(shapes.list_shown(one), one).is_right
    is_same = other == one or (one.relation is not None and other == one.turned())
    assert judge(shapes.list_shown(one), other).is_right == is_same


def test_chance_is_what_counting_says(home, tmp_path):
    evaluation = make(home, tmp_path / "run", "right", splits=["train"])
    wanted = shapes.read_scenes(evaluation)
    index = list(zip(evaluation.rows.splits, (scene.kind for scene in wanted), strict=True))
    verdicts, places = shapes._judge_chance(evaluation, shapes.Settings(num_chances=400), wanted, index, None)
    figures = shapes.sum_up(verdicts, places)["train"]
    for kind, share in (("one", 1 / 80), ("count", 1 / 80 / 3)):  # sizes x colours x shapes; three counts
        num = figures[kind]["num_pictures"]
        assert figures[kind]["right"]["value"] == pytest.approx(share, abs=4 * (share * (1 - share) / num) ** 0.5)
    # a training picture: so many of them are right for a caption as have its scene
    training = [wanted[0], wanted[1], wanted[0], wanted[1]]
    verdicts, _ = shapes._judge_chance(evaluation, shapes.Settings(num_chances=400), wanted[:1], index[:1], training)
    assert (verdicts != 0).all(1).mean() == pytest.approx(0.5, abs=0.1)


def test_shares_by_split_and_kind():
    verdicts = [Verdict(True, True, True, True, None), Verdict(True, False, True, True, None)]
    verdicts += [Verdict(True, True, True, True, False), Verdict(True, True, True, True, True)]
    index = [("a", "one"), ("a", "one"), ("a", "two"), ("b", "two")]
    figures = shapes.sum_up(shapes.encode_verdicts(verdicts), index)
    assert {
        split: {kind: one["right"]["value"] for kind, one in kinds.items()} for split, kinds in figures.items()
    } == {
        "a": {"one": 0.5, "two": 0.0, "all": pytest.approx(1 / 3)},
        "b": {"two": 1.0, "all": 1.0},
    }
    assert figures["a"]["all"]["colour"]["value"] == pytest.approx(2 / 3)
    assert figures["a"]["all"]["relation"]["value"] == 0 and "relation" not in figures["a"]["one"]


@pytest.mark.parametrize(("right", "low", "high"), [(0, 0, 0.2775), (8, 0.4902, 0.9433), (10, 0.7225, 1)])
def test_interval_is_wilsons(right, low, high):
    figure = shapes.interval(right, 10)
    assert (figure["value"], figure["low"], figure["high"]) == pytest.approx((right / 10, low, high), abs=1e-4)
    # its definition: the shares from which what was seen is 1.96 standard deviations away
    for share in (bound for bound in (figure["low"], figure["high"]) if 1e-9 < bound < 1 - 1e-9):
        assert abs(right / 10 - share) == pytest.approx(1.959964 * (share * (1 - share) / 10) ** 0.5)


def test_what_would_mislead_is_refused(home, tmp_path):
    with pytest.raises(ValueError, match="`num_shown` is 0"):
        shapes.Settings(num_shown=0)
    evaluation = make(home, tmp_path / "run", "right")
    shapes.check(evaluation, shapes.Settings())
    with pytest.raises(OSError, match="learn"):
        shapes.check(evaluation, shapes.Settings(train_split="learn"))
    write_parquet(tmp_path / "data" / "train.parquet", [{"image": Image.new("RGB", (8, 8)), "captions": ["a"]}] * 2)
    plain = make(home, tmp_path / "plain", "ours", data_dir=str(tmp_path / "data"), splits=["train"])
    with pytest.raises(ValueError, match="lacks count, size_1"):
        shapes.check(plain, shapes.Settings())
    wide = tmp_path / "wide"
    wide.mkdir()
    for path in (home / "right").iterdir():
        Image.new("RGB", (48, 24)).save(wide / path.name)
    evaluation = make(home, tmp_path / "wide-run", models=[{"name": "wide", "images": str(wide)}])
    with pytest.raises(ValueError, match="of wide are 48 x 24"):
        shapes.check(evaluation, shapes.Settings())
