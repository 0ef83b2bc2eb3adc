"""What `evaluation: pictures` found in a model's card and its model-index, as huggingface_hub reads it."""

import json
import re
import shutil

import evaluate
import pytest
import render_card
import yaml
from evaluation.run import MEASUREMENTS
from evaluation.settings import EvaluationArguments, ModelArguments, StageArguments
from hub_metadata import find_faults
from huggingface_hub import ModelCard
from huggingface_hub.repocard_data import model_index_to_eval_results
from tiny_evaluation import build_home, make_settings, read_report, write_config
from tiny_report import make_facts, make_report
from tiny_training import ROOT


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A card's folder with facts, and an evaluation of a tiny model below it."""
    folder = tmp_path_factory.mktemp("card")
    home = build_home(folder / "home")
    training = {}
    for stage in ("dvae", "prior"):
        path = folder / f"{stage}.yaml"
        path.write_text(
            yaml.safe_dump({"stage": stage, "train_batch_size": 4, "output_dir": "x", "train_data_dir": "y"})
        )
        (folder / stage).mkdir()
        (folder / stage / "metrics.jsonl").write_text('{"step": 10, "loss": 0.5, "pictures_per_second": 8.0}\n')
        training[stage] = {"config": str(path), "run": str(folder / stage), "num_processes": 2}
    models = [{"name": "tiny", "pipeline": str(home / "checkpoint"), "training": training}]
    settings = make_settings(home, folder / "evaluation", models=models, measure={"elb": {"num_samples": 2}})
    evaluate.main([str(write_config({**settings, "data_set_id": "halves", "data_set_name": "Halves"}))])
    return folder


def write_facts(folder, **facts):
    facts = {**make_facts(), "evaluations": [{"report": "evaluation/report.json", "model": "tiny"}], **facts}
    (folder / "facts.yaml").write_text(yaml.safe_dump(facts))


def list_measured(card):
    return [
        (result.metric_name, result.dataset_type, result.dataset_split, result.metric_value)
        for result in model_index_to_eval_results(card.data.to_dict()["model-index"])[1]
    ]


def test_figures_come_into_card_and_model_index(folder, tmp_path):
    report = read_report(folder / "evaluation")
    assert report["results"] and {result["model"] for result in report["results"]} == {"tiny"}
    shutil.copytree(folder / "evaluation", tmp_path / "evaluation")
    write_facts(tmp_path)
    (tmp_path / "report.json").write_text(json.dumps(make_report()))
    card = render_card.render_folder(tmp_path)
    assert find_faults(card.data.to_yaml()) == []
    expected = {
        (result["metric_name"], "halves", result["split"], round(result["value"], 4)) for result in report["results"]
    }
    measured = list_measured(ModelCard(str(card)))
    assert expected <= {*measured} and len(measured) > len(expected)
    for result in report["results"]:
        assert f"| {result['metric_name']} | validation | {result['value']:.4g} |" in card.text
    assert re.search(r"\*\*tiny\*\*, measured on [\d-]+ by `training/evaluate\.py`, seed 0: Halves\.", card.text)


def test_a_card_can_rest_on_the_evaluation_alone(folder):
    write_facts(folder)
    shown = next(iter(read_report(folder / "evaluation")["pictures"]))
    write_facts(folder, evaluations=[{"report": "evaluation/report.json", "model": "tiny", "pictures": [shown]}])
    render_card.main([str(folder), "--checkpoint", str(folder / "home" / "checkpoint")])
    card = ModelCard.load(folder / "home" / "checkpoint" / "README.md")
    assert "10 updates, 80 pictures seen" in card.text and "| prior | 4 layers, 32 wide" in card.text
    assert card.data.model_name == "tiny" and len(list_measured(card)) == len(
        read_report(folder / "evaluation")["results"]
    )
    (picture,) = render_card.list_pictures(card)
    assert picture.startswith("evaluation/") and (folder / "home" / "checkpoint" / picture).is_file()
    assert card.text.count("\n## Figures\n") == 1


def test_the_model_index_is_written_beside_the_report(folder):
    report = read_report(folder / "evaluation")
    index = yaml.safe_load((folder / "evaluation" / "model-index-tiny.yaml").read_text())
    name, results = model_index_to_eval_results(index["model-index"])
    assert name == "tiny" and [result.metric_name for result in results] == [
        result["metric_name"] for result in report["results"]
    ]


def test_what_the_evaluation_lacks_is_named(folder):
    for evaluations, words in (
        ([{"report": "evaluation/report.json"}], "`model` of evaluation 1"),
        ([{"report": "evaluation/report.json", "model": "other"}], "has no 'other'"),
        ([{"report": "evaluation/report.json", "model": "tiny", "pictures": ["none"]}], "has no 'none'"),
        ({"report": "evaluation/report.json"}, "`evaluations` must be a list"),
    ):
        write_facts(folder, evaluations=evaluations)
        with pytest.raises(ValueError, match=words):
            render_card.render_folder(folder)
    write_facts(folder, evaluations=[{"report": "nothing/report.json", "model": "tiny"}])
    with pytest.raises(OSError, match=r"There is no .*nothing/report\.json"):
        render_card.render_folder(folder)


def test_the_words_name_what_there_is():
    text = (ROOT / "training" / "evaluation" / "README.md").read_text()
    known = {
        name for kind in (EvaluationArguments, ModelArguments, StageArguments) for name in kind.__dataclass_fields__
    }
    known |= {"file_name", "id", "caption", "list_results", *MEASUREMENTS}
    assert {*re.findall(r"`(\w+_\w+)`", text)} <= known
    assert {*re.findall(r"^\| `(\w+)` \|", text, flags=re.MULTILINE)} == {*MEASUREMENTS}
    for name in re.findall(r"`(\w+\.(?:yaml|py))", text):
        places = ("training", "training/configs", "training/evaluation", "model_cards/emoji-mini")
        assert any((ROOT / place / name).is_file() for place in places), name
