"""The measurement `elb`: its figures against the bound of each row, errors, refusals, processes, going on."""

import dataclasses
import json
import math

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from evaluation import elb, pictures
from PIL import Image
from tiny import build_dvae, build_pipeline
from tiny_evaluation import build_home, make_evaluation
from tiny_ranks import run_ranks

from hf_dalle import DALLEPipeline, encode_captions
from hf_dalle.evidence_lower_bound import EvidenceLowerBound, evidence_lower_bound, logit_errors


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    folder = build_home(tmp_path_factory.mktemp("home"))
    nearest = build_dvae(quantizer="nearest", codebook_dim=4)
    build_pipeline(dvae=nearest).save_pretrained(folder / "nearest")
    for index in range(20):
        path = folder / "given" / f"validation-{index:06d}.png"
        path.parent.mkdir(exist_ok=True)
        Image.new("RGB", (16, 16), "red").save(path)
    return folder


def list_models(home):
    return [
        {"name": "ours", "pipeline": str(home / "checkpoint")},
        {"name": "nearest", "pipeline": str(home / "nearest")},
        {"name": "given", "images": str(home / "given")},
    ]


@torch.no_grad()
def compute_directly(evaluation, folder, **options):
    """The parts of each row by itself."""
    pipe = DALLEPipeline.from_pretrained(folder)
    rows, parts = evaluation.rows, []
    for row in range(len(rows)):
        text = encode_captions(pipe.tokenizer, rows.captions[row], pipe.prior.config.text_length)
        pixels = pipe.image_processor(rows.picture(row))["pixel_values"]
        generator = pictures.make_generator(evaluation.seed, rows.ids[row], "elb")
        given = (pixels, text["input_ids"], text["attention_mask"], generator)
        parts.append(evidence_lower_bound(pipe.dvae, pipe.prior, *given, **options))
    columns = zip(*(part.to_tuple()[:-1] for part in parts), strict=True)
    return EvidenceLowerBound(*map(torch.cat, columns), num_dims=parts[0].num_dims)


def test_figures_are_the_means_of_each_rows_bound(home, tmp_path):
    evaluation = make_evaluation(home, tmp_path / "run", models=list_models(home))
    settings = elb.Settings(num_samples=3, betas={"ours": 6.6})
    elb.check(evaluation, settings)
    figures = json.loads(json.dumps(elb.measure(evaluation, settings), allow_nan=False))
    parts = compute_directly(evaluation, home / "checkpoint", num_samples=3)
    found, bound = figures["models"]["ours"]["validation"], parts.bound
    assert found["num_pictures"] == 6 and found["num_dims"] == 768
    assert found["bound"] == pytest.approx(bound.mean().item(), rel=1e-12)
    assert found["bound"] == pytest.approx(sum(found["parts"].values()), rel=1e-9)
    assert found["picture_error"] == pytest.approx(bound.std().item() / math.sqrt(6), rel=1e-9)
    deviations = (parts.picture + parts.tokens).var(1) / 3
    assert found["sample_error"] == pytest.approx(deviations.sum().sqrt().item() / 6, rel=1e-9)
    assert found["argmax_bound"] == pytest.approx(parts.argmax_bound.mean().item(), rel=1e-12)
    assert found["objective"] == pytest.approx(parts.objective(6.6).mean().item(), rel=1e-12)
    assert found["bits_per_dim"] == pytest.approx(-bound.mean().item() / (768 * math.log(2)))
    given_caption = found["bits_per_dim"] + parts.text.mean().item() / (768 * math.log(2))
    assert found["bits_per_dim_given_caption"] == pytest.approx(given_caption)
    nearest = figures["models"]["nearest"]["validation"]
    assert nearest["bound"] == nearest["argmax_bound"] and nearest["sample_error"] == 0
    assert figures["skipped"] == {"given": "a folder of pictures has no likelihood"}
    assert not list((tmp_path / "run").glob("pictures/*/*.png")), "nothing is drawn for it"
    _check_words(figures, found, tmp_path)


def _check_words(figures, found, folder):
    text, results = elb.describe(figures), elb.list_results(figures)
    row = next(line for line in text.splitlines() if line.startswith("| ours | validation | 6 |"))
    assert f"{found['bound']:,.1f} +- {found['picture_error']:,.1f}" in row and f"{found['argmax_bound']:,.1f}" in row
    assert "beta = 6.6" in text and "no bound" in text
    assert "given is left out: a folder of pictures has no likelihood." in text
    assert [(entry["model"], entry["metric_type"]) for entry in results] == [
        (name, metric) for name in ("ours", "nearest") for metric in ("elb", "bits_per_dim")
    ]
    assert results[0]["value"] == found["bound"]
    assert elb.plot(figures, folder) == {"elb": "elb.png"}
    assert Image.open(folder / "elb.png").size[0] > 600


def test_a_run_that_lost_work_gives_the_same_figures_and_other_settings_take_none_of_it(home, tmp_path):
    settings = elb.Settings(num_samples=2)
    first = elb.measure(make_evaluation(home, tmp_path / "run", num_captions=None), settings)
    shards = sorted((tmp_path / "run" / "work" / "elb").rglob("*.npz"))
    assert len(shards) == 2  # 16 rows and 4
    shards[0].unlink()
    shards[1].write_bytes(shards[1].read_bytes()[:-40])  # cut, as by a machine that went down
    assert elb.measure(make_evaluation(home, tmp_path / "run", num_captions=None), settings) == first
    other = elb.measure(make_evaluation(home, tmp_path / "run", num_captions=None), elb.Settings(num_samples=3))
    assert other["models"]["ours"] != first["models"]["ours"]
    fewer = elb.measure(make_evaluation(home, tmp_path / "run", num_captions=None), elb.Settings(2, max_rows=5))
    assert fewer["models"]["ours"]["validation"]["num_pictures"] == 5
    assert elb.choose_measured(list(range(7, 27)), elb.Settings(2, max_rows=5)) == [7, 11, 15, 19, 23]


def measure_in_rank(home, output_dir, models):
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    evaluation = make_evaluation(home, output_dir, models=models, num_captions=None)
    figures = elb.measure(evaluation, elb.Settings(num_samples=2, scale="fitted", num_fit_pictures=20))
    if evaluation.is_main:
        assert evaluation.num_processes == 2
        (output_dir / "figures.json").write_text(json.dumps(figures))


def test_two_processes_give_the_figures_of_one(home, tmp_path):
    models = list_models(home)[:1]
    run_ranks(measure_in_rank, home, tmp_path / "two", models)
    one = make_evaluation(home, tmp_path / "one", models=models, num_captions=None)
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as many as each of the two has, for the last bits
    try:
        figures = elb.measure(one, elb.Settings(num_samples=2, scale="fitted", num_fit_pictures=20))
    finally:
        torch.set_num_threads(num_threads)
    assert json.loads((tmp_path / "two" / "figures.json").read_text()) == json.loads(json.dumps(figures))


@torch.no_grad()
def test_fitted_scale_is_of_the_fit_split_and_said(home, tmp_path):
    evaluation = make_evaluation(home, tmp_path / "run", splits=["validation"])
    settings = elb.Settings(num_samples=2, scale="fitted", num_fit_pictures=7)
    elb.check(evaluation, settings)
    figures = elb.measure(evaluation, settings)
    found = figures["models"]["ours"]["validation"]
    pipe, rows = DALLEPipeline.from_pretrained(home / "checkpoint"), elb.choose_fit_rows(evaluation, settings)
    assert len(rows) == 7 and set(rows.splits) == {"train"}
    pixels = pipe.image_processor([rows.picture(row) for row in range(7)])["pixel_values"]
    assert found["log_b"] == pytest.approx(logit_errors(pipe.dvae, pixels).mean().log().item(), abs=1e-5)
    parts = compute_directly(evaluation, home / "checkpoint", num_samples=2, log_b=found["log_b"])
    assert found["bound"] == pytest.approx(parts.bound.mean().item(), rel=1e-12)
    assert f"fitted to `train`: ours {found['log_b']:.3f}." in elb.describe(figures)


def test_a_floor_under_the_scale_is_said_and_a_scale_that_nothing_trained_warned_of(home, tmp_path):
    evaluation = make_evaluation(home, tmp_path / "run", num_captions=2)
    figures = elb.measure(evaluation, elb.Settings(num_samples=2, min_log_b=-1.0))
    parts = compute_directly(evaluation, home / "checkpoint", num_samples=2, min_log_b=-1.0)
    assert figures["models"]["ours"]["validation"]["bound"] == pytest.approx(parts.bound.mean().item(), rel=1e-12)
    assert "the decoder's, -1 at least" in elb.describe(figures)
    assert any("was its likelihood's scale trained?" in note for note in evaluation.notes)


def test_each_split_has_its_row(home, tmp_path):
    both = make_evaluation(home, tmp_path / "both", splits=["train", "validation"])
    alone = make_evaluation(home, tmp_path / "alone", splits=["validation"])
    settings = elb.Settings(num_samples=2)
    found, expected = elb.measure(both, settings), elb.measure(alone, settings)
    assert list(found["models"]["ours"]) == ["train", "validation"]
    assert found["models"]["ours"]["validation"] == expected["models"]["ours"]["validation"]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"num_samples": 1}, "`num_samples` is 1"),
        ({"max_rows": 0}, "`max_rows` is 0"),
        ({"betas": {"ours": -1}}, "`betas` gives -1 for ours"),
        ({"scale": "fitted", "min_log_b": -2.0}, "does nothing with `scale: fitted`"),
    ],
)
def test_settings_that_are_refused(settings, words):
    with pytest.raises(ValueError, match=words):
        elb.Settings(**settings)


def test_evaluations_that_are_refused(home, tmp_path):
    given = make_evaluation(home, tmp_path / "given", num_captions=None, models=list_models(home)[2:])
    with pytest.raises(ValueError, match="no model has a bound: given: a folder of pictures"):
        elb.check(given, elb.Settings())
    evaluation = make_evaluation(home, tmp_path / "run", models=list_models(home), num_captions=None)
    with pytest.raises(ValueError, match="`betas` names 'given'"):
        elb.check(evaluation, elb.Settings(betas={"given": 2.0}))
    with pytest.raises(ValueError, match="`fit_split` is 'validation', which is measured"):
        elb.check(evaluation, elb.Settings(scale="fitted", fit_split="validation"))
    with pytest.raises((ValueError, OSError), match="nowhere"):
        elb.check(evaluation, elb.Settings(scale="fitted", fit_split="nowhere"))


def test_one_picture_has_no_error_over_pictures():
    ones = torch.ones(1, 2, dtype=torch.float64)
    parts = EvidenceLowerBound(ones, ones, *(ones[:, 0] for _ in range(4)), num_dims=12)
    summary = elb.summarize(parts)
    assert summary["picture_error"] is None and summary["bound"] == 4
    figures = {"settings": dataclasses.asdict(elb.Settings()), "models": {"a": {"b": summary | {"split": "b"}}}}
    assert "| 4.0 (0) |" in elb.describe(figures | {"skipped": {}})
