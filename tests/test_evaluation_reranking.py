"""The curve of reranking against brute force; the same whatever the blocks, processes and kills; what is refused."""

import itertools
import json

import numpy as np
import pytest
import torch
from evaluation import reranking
from evaluation.pictures import make_generator
from evaluation.rankers import ConceptJudge, digest_processor
from evaluation.reranking import Settings, check, describe, list_results, measure, plot
from judge import Judge, extract_features, load_judge, reference_features
from PIL import Image
from tiny import build_pipeline, build_reranker
from tiny_data import list_rows, write_parquet
from tiny_evaluation import build_home, make_evaluation, make_settings
from tiny_ranks import run_ranks

from hf_dalle.data import load_rows
from hf_dalle.reranking import score_images


NUM_CANDIDATES, NUM_CAPTIONS = 5, 3


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """Data, a checkpoint with a reranker, and another CLIP to judge by."""
    folder = build_home(tmp_path_factory.mktemp("reranking"), **build_reranker())
    for part in build_reranker(seed=1).values():
        part.save_pretrained(folder / "judge")
    build_pipeline().save_pretrained(folder / "bare")
    return folder


def make(home, output_dir, **settings):
    return make_evaluation(home, output_dir, **{"num_captions": NUM_CAPTIONS, **settings})


def settings_of(home, **settings):
    return Settings(**{"num_candidates": NUM_CANDIDATES, "judge": str(home / "judge"), "block_size": 2, **settings})


@pytest.fixture(scope="module")
def figures(home):
    return measure(make(home, home / "figures"), settings_of(home))


def test_the_curve_is_the_mean_over_all_subsets(home, figures):
    evaluation, pipe = make(home, home / "figures"), build_pipeline()
    parts, other = build_reranker(), build_reranker(seed=1)
    curves, real = {size: [] for size in (1, 2, 4, 5)}, []
    for row, caption in enumerate(evaluation.rows.captions):
        generators = [make_generator(0, evaluation.rows.ids[row], "candidate", number) for number in range(5)]
        pictures = pipe(caption, num_images_per_prompt=5, generator=generators).images
        scores = score_images(parts["reranker"], parts["reranker_processor"], caption, pictures)
        judged = score_images(other["reranker"], other["reranker_processor"], caption, pictures).double()
        for size, values in curves.items():
            best = [judged[max(chosen, key=scores.__getitem__)] for chosen in itertools.combinations(range(5), size)]
            values.append(np.mean(best))
        picture = evaluation.rows.picture(row)
        real.append(score_images(other["reranker"], other["reranker_processor"], caption, [picture]).item())
    found = figures["models"]["ours"]["splits"]["validation"]
    assert found["num_captions"] == NUM_CAPTIONS and figures["qualities"] == ["similarity"]
    assert list(found["similarity"]["curve"]) == ["1", "2", "4", "5"]
    for size, values in curves.items():
        assert found["similarity"]["curve"][str(size)]["value"] == pytest.approx(np.mean(values), abs=1e-4)
    assert figures["real"]["validation"]["similarity"]["value"] == pytest.approx(np.mean(real), abs=1e-4)
    start, closed = np.mean(curves[1]), found["similarity"]["gap_closed"]["5"]
    if np.mean(real) > start:
        share = (np.mean(curves[5]) - start) / (np.mean(real) - start)
        assert closed["value"] == pytest.approx(share, abs=1e-3)
        assert closed["low"] is None or closed["low"] <= closed["high"]
    else:
        assert closed is None
    best = found["similarity"]["best_possible"]
    assert all(best[size] >= point["value"] - 1e-9 for size, point in found["similarity"]["curve"].items())


def assert_same(figures, expected):
    """But for the last digits of scores, which a batch of another size may change."""
    one, other = (
        part["models"]["ours"]["splits"]["validation"]["similarity"]["curve"] for part in (figures, expected)
    )
    for size, point in one.items():
        assert point == pytest.approx(other[size], abs=1e-4)
    assert figures["real"]["validation"]["similarity"] == pytest.approx(expected["real"]["validation"]["similarity"])


def test_other_blocks_give_the_same(home, figures, tmp_path):
    assert_same(measure(make(home, tmp_path), settings_of(home, block_size=5)), figures)


def test_what_is_stored_is_not_drawn_again(home, figures, tmp_path, monkeypatch):
    drawn, draw_candidates = [], reranking.draw_candidates

    def stop_at_the_fourth(evaluation, model, caption, generators):
        if len(drawn) == 4:
            raise KeyboardInterrupt
        drawn.append(len(generators))
        return draw_candidates(evaluation, model, caption, generators)

    monkeypatch.setattr(reranking, "draw_candidates", stop_at_the_fourth)
    with pytest.raises(KeyboardInterrupt):
        measure(make(home, tmp_path), settings_of(home))
    assert drawn == [2, 2, 2, 2]

    def count(evaluation, model, caption, generators):
        drawn.append(len(generators))
        return draw_candidates(evaluation, model, caption, generators)

    monkeypatch.setattr(reranking, "draw_candidates", count)
    assert measure(make(home, tmp_path), settings_of(home)) == figures
    assert sum(drawn) == NUM_CANDIDATES * NUM_CAPTIONS
    # more candidates: only those that are new; other resamples, another baseline: none
    measure(make(home, tmp_path), settings_of(home, num_candidates=6, num_resamples=200, baseline="ours"))
    assert sum(drawn) == (NUM_CANDIDATES + 2) * NUM_CAPTIONS
    assert drawn[-NUM_CAPTIONS:] == [2] * NUM_CAPTIONS


def measure_in_rank(home, folder):
    evaluation = make(home, folder)
    figures = measure(evaluation, settings_of(home))
    if evaluation.is_main:
        (folder / "figures.json").write_text(json.dumps(figures))


def test_two_processes_measure_the_same(home, figures, tmp_path):
    run_ranks(measure_in_rank, home, tmp_path)
    assert json.loads((tmp_path / "figures.json").read_text()) == figures


def test_the_judge_of_concepts_is_that_of_the_card(home, tmp_path):
    """Of training rows, of others of their concepts, and of concepts that no training row has."""
    rows = [{**row, "hexcode": row["captions"][0].split()[0], "style": "plain"} for row in list_rows()]
    for split, name in (("train", "{}"), ("validation", "{}"), ("test_new", "new {}")):
        write_parquet(
            tmp_path / f"{split}.parquet", [{**row, "hexcode": name.format(row["hexcode"])} for row in rows[::2]]
        )
    network, train = load_judge(), load_rows(str(tmp_path))
    features = reference_features(network, train, 32, tmp_path / ".judge")  # where ConceptJudge finds them
    for split, num_captions in (("train", 3), ("validation", 2), ("test_new", None)):
        given = {"data_dir": str(tmp_path), "splits": [split], "num_captions": num_captions}
        evaluation = make(home, tmp_path / split, **given)
        judge, rows = ConceptJudge(evaluation, 32), evaluation.rows
        own = [row if split == "train" else -1 for _, row, _ in rows.places]
        plain = Judge(features, train["hexcode"][:], train["style"][:], without_probe=[row for row in own if row >= 0])
        real = extract_features(network, [rows.picture(row) for row in range(len(rows))], 32)
        ranks, is_right = plain.judge(real, rows.column("hexcode"), rows.column("style"), own=own, real=real)
        for row in range(min(3, len(rows))):
            pictures = [rows.picture(row), Image.new("RGB", (16, 16), "white")]
            judged = judge.judge(row, rows.captions[row], pictures)
            assert judged["recall@1"][0] == (ranks[row] <= 1) and judged["recall@5"][0] == (ranks[row] <= 5)
            assert judged["style"][0] == is_right[row] and judged["style"].shape == (2,)


def test_a_picture_of_several_captions_is_one_reference(home, tmp_path):
    """Otherwise it would be found by itself; and what its rows are called is part of what is stored."""
    rows = [{**row, "hexcode": row["captions"][0].split()[0], "style": "plain"} for row in list_rows()[:4]]
    for split, name in (("train", "{}"), ("test_new", "new {}")):
        named = [{**row, "hexcode": name.format(row["hexcode"])} for row in rows]
        write_parquet(tmp_path / "data" / f"{split}.parquet", named)
    given = {"data_dir": str(tmp_path / "data"), "splits": ["test_new"], "num_captions": None}
    first, every = (
        ConceptJudge(make(home, tmp_path / captions, captions=captions, **given), 32) for captions in ("first", "all")
    )
    assert len(every.own) == 2 * len(first.own) == 8 and {*every.own} == {*first.own} == {4, 5, 6, 7}
    one, other = first.judges["test_new"], every.judges["test_new"]
    assert torch.equal(one.references, other.references) and one.concepts == other.concepts
    write_parquet(tmp_path / "data" / "test_new.parquet", [{**row, "hexcode": "other"} for row in rows])
    renamed = ConceptJudge(make(home, tmp_path / "first", captions="first", **given), 32)
    assert renamed.key != first.key and renamed.fingerprint == first.fingerprint


def test_how_pictures_and_captions_are_prepared_is_part_of_the_key(home):
    processor = build_reranker()["reranker_processor"]
    before = digest_processor(processor)
    assert digest_processor(build_reranker(seed=1)["reranker_processor"]) == before
    processor.tokenizer.model_max_length -= 1  # captions are cut elsewhere
    assert digest_processor(processor) != before
    processor.tokenizer.model_max_length += 1
    processor.image_processor.do_normalize = not processor.image_processor.do_normalize
    assert digest_processor(processor) != before
    with pytest.raises(ValueError, match="has no image_processor"):  # what AutoProcessor gives for some models
        digest_processor(processor.tokenizer)


@pytest.mark.parametrize(
    ("changes", "given", "words"),
    [
        ({}, {"models": [{"name": "x", "pipeline": "{home}/bare"}]}, "x has no reranker: name one"),
        ({"reranker": "{home}/judge"}, {}, "is the reranker of ours: it would judge itself"),
        ({"judge": "{home}/data"}, {}, "is no CLIP-like model with a processor"),
        ({"baseline": "theirs"}, {}, "`baseline` is 'theirs'; expected one of ours"),
        ({"judge": "concepts"}, {"data_dir": "{home}/plain"}, "needs a column 'hexcode'"),
    ],
)
def test_what_cannot_be_measured_is_refused_before_drawing(home, tmp_path, changes, given, words):
    if not (home / "plain").exists():
        (home / "plain").mkdir()
        for split in ("train", "validation"):
            load_rows(str(home / "data"), split=split).remove_columns("hexcode").to_parquet(
                home / "plain" / f"{split}.parquet"
            )
    changes, given = (json.loads(json.dumps(part).replace("{home}", str(home))) for part in (changes, given))
    with pytest.raises((ValueError, OSError), match=words):
        check(make(home, tmp_path, **given), settings_of(home, **changes))


def test_settings_out_of_range_are_named():
    for name, value in {"num_candidates": 1, "block_size": 0, "num_resamples": 5}.items():
        with pytest.raises(ValueError, match=f"`{name}` is {value}; expected a whole number from"):
            Settings(**{name: value})
    assert Settings(num_candidates=48).sizes == [1, 2, 4, 8, 16, 32, 48]
    assert Settings(num_candidates=512).sizes[-2:] == [256, 512]
    assert [list(block) for block in Settings(num_candidates=5, block_size=2).blocks] == [[0, 1], [2, 3], [4]]


# -------------------------------------------------------------------------------------------------------- summaries


def make_figures(baseline=None):
    """Two models on 40 captions, the second one's scores are the quality itself."""
    rng = np.random.default_rng(0)
    qualities = {name: (rng.random((40, 8)) < share).astype(float) for name, share in (("ours", 0.2), ("other", 0.5))}
    candidates = {
        "ours": {"scores": rng.random((40, 8)) + qualities["ours"], "recall@5": qualities["ours"]},
        "other": {"scores": qualities["other"], "recall@5": qualities["other"]},
    }
    real = {"recall@5": np.ones(40)}
    settings = Settings(num_candidates=8, baseline=baseline)
    curves = reranking.summarise(candidates, real, settings, seed=0)
    figures = {
        "num_candidates": 8,
        "judge": "a network",
        "qualities": ["recall@5"],
        "baseline": baseline,
        "real": {"validation": {"recall@5": {"value": 1.0, "low": 1.0, "high": 1.0}}},
        "models": {
            name: {"reranker": "CLIPModel x", "splits": {"validation": {"num_captions": 40, **curves[name]}}}
            for name in candidates
        },
    }
    return figures, qualities


def test_shares_of_the_gap():
    figures, qualities = make_figures()
    ours, other = (figures["models"][name]["splits"]["validation"]["recall@5"] for name in ("ours", "other"))
    assert ours["gap_closed"]["1"]["value"] == 0 and ours["curve"]["1"]["value"] == pytest.approx(
        qualities["ours"].mean()
    )
    assert other["gap_closed"]["8"]["value"] == pytest.approx(
        (qualities["other"].max(1).mean() - qualities["other"].mean()) / (1 - qualities["other"].mean())
    )
    assert other["best_possible"] == pytest.approx({size: point["value"] for size, point in other["curve"].items()})
    shares = [share["value"] for share in ours["gap_closed"].values()]
    assert shares == sorted(shares) and 0.5 < shares[-1] < 1
    assert ours["gap_closed"]["8"]["low"] < shares[-1] < ours["gap_closed"]["8"]["high"]
    against = make_figures(baseline="ours")[0]["models"]["other"]["splits"]["validation"]["recall@5"]["gap_closed"][
        "1"
    ]
    start = qualities["ours"].mean()
    assert against["value"] == pytest.approx((qualities["other"].mean() - start) / (1 - start))
    values = torch.zeros(4, dtype=torch.float64)
    assert reranking.bootstrap_share(values, values + 1, values, 0, 100) is None


def test_a_gap_that_may_be_chance_has_a_share_without_an_interval():
    start, values = torch.zeros(40, dtype=torch.float64), torch.ones(40, dtype=torch.float64)
    alternating = torch.tensor([-1.0, 1.0] * 20, dtype=torch.float64)
    for gap, is_sure in ((1.0, True), (0.3, True), (0.2, False), (0.01, False)):
        share = reranking.bootstrap_share(gap * values / 2, start, alternating + gap, 0, 2000)
        # the gap's mean is normal, its deviation 1 / sqrt(40) = 0.16: 0.3 is 1.9 of them above none, 0.2 only 1.3
        assert share["value"] == pytest.approx(0.5) and (share["low"] is not None) == is_sure
        assert (share["high"] is not None) == is_sure
    words = reranking._describe_gap({"value": 0.5, "low": None, "high": None})
    assert words == "50% (the gap may be chance)" and reranking._describe_gap(None) == "no gap"


def test_the_report(tmp_path):
    figures, _ = make_figures(baseline="ours")
    text, names = describe(figures), plot(figures, tmp_path)
    assert names == {"reranking_validation": "reranking_validation.png"}
    assert min(Image.open(tmp_path / names["reranking_validation"]).size) > 300
    table = [line for line in text.splitlines() if line.startswith("|")]
    assert len(table) == 4 and len({line.count("|") for line in table}) == 1
    assert text.startswith("## Reranking") and "N = 1 of ours" in text and "(reranking_validation.png)" in text
    json.dumps(figures, allow_nan=False)
    results = list_results(figures)
    assert [result["model"] for result in results] == ["ours", "other"]
    assert results[1]["value"] == figures["models"]["other"]["splits"]["validation"]["recall@5"]["curve"]["8"]["value"]
    assert results[0]["metric_type"] == "recall@5" and "best of 8" in results[0]["metric_name"]


def test_the_entry_measures_it(home, figures, tmp_path):
    import evaluate
    from tiny_evaluation import read_report, write_config

    given = {"judge": str(home / "judge"), "num_candidates": NUM_CANDIDATES, "block_size": 2}
    settings = make_settings(home, tmp_path / "run", num_captions=NUM_CAPTIONS, measure={"reranking": given})
    evaluate.main([str(write_config(settings))])
    report = read_report(tmp_path / "run")
    assert report["measurements"]["reranking"]["figures"] == figures
    assert not (tmp_path / "run" / "pictures" / "ours").exists() or not list(
        (tmp_path / "run/pictures/ours").glob("*.png")
    )
    assert (tmp_path / "run" / "reranking_validation.png").is_file()
