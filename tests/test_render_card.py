"""training/render_card.py: what it writes, which facts it refuses, and that every committed card is its work.

The report is that of `tiny_report.py`.
"""

import json
import re

import pytest
import render_card
import yaml
from PIL import Image
from tiny_report import CARDS, ROOT, make_facts, make_report, render


def write_folder(folder):
    folder.mkdir(parents=True)
    report = make_report()
    (folder / "report.json").write_text(json.dumps(report))
    (folder / "facts.yaml").write_text(yaml.safe_dump(make_facts()))
    for name in report["pictures"].values():
        Image.new("RGB", (4, 4)).save(folder / name)
    return folder


def test_the_command_writes_the_card_beside_the_report_and_into_the_checkpoint(tmp_path):
    folder, checkpoint = write_folder(tmp_path / "card"), tmp_path / "checkpoint"
    checkpoint.mkdir()
    render_card.main([str(folder), "--checkpoint", str(checkpoint)])
    assert (folder / "README.md").read_text() == str(render(make_report(), make_facts()))
    for name in ("README.md", *make_report()["pictures"].values()):
        assert (checkpoint / name).read_bytes() == (folder / name).read_bytes()
    before = (folder / "README.md").read_bytes()
    render_card.main([str(folder)])
    assert (folder / "README.md").read_bytes() == before


def test_the_command_says_what_is_missing_before_it_writes(tmp_path):
    folder = write_folder(tmp_path / "card")
    (folder / "nearest.png").unlink()
    with pytest.raises(OSError, match=r"shows nearest\.png, which is not in .* run evaluate\.py"):
        render_card.main([str(folder)])
    (folder / "report.json").write_text("{")
    with pytest.raises(ValueError, match=r"report\.json is not valid JSON"):
        render_card.main([str(folder)])
    (folder / "report.json").unlink()
    with pytest.raises(OSError, match=r"There is no .*report\.json: make it with evaluate\.py"):
        render_card.main([str(folder)])
    with pytest.raises(OSError, match="--checkpoint .* is not a folder"):
        render_card.main([str(folder), "--checkpoint", str(tmp_path / "none")])
    assert not (folder / "README.md").exists()


def test_facts_that_lack_something_are_refused_by_name(tmp_path):
    path, facts = tmp_path / "facts.yaml", make_facts()
    with pytest.raises(OSError, match=r"There is no .*facts\.yaml: write it after model_cards/emoji-mini/facts\.yaml"):
        render_card.read_facts(path)
    del facts["biases"], facts["data_sets"][1]["license_url"]
    facts["limits"] = []
    facts["experiments"]["rows"].append(["one cell"])
    path.write_text(yaml.safe_dump(facts))
    with pytest.raises(ValueError, match="is not complete") as caught:
        render_card.read_facts(path)
    told = ("`biases`", "`limits`", "`license_url` of data set 2 (Twemoji)", "2 cells in row 2")
    assert all(words in str(caught.value) for words in told)
    for text in ("- a list", "a: [", "words"):
        path.write_text(text)
        with pytest.raises(ValueError, match=r"facts\.yaml (is not valid YAML|must hold)"):
            render_card.read_facts(path)


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("data_set", "emoji", "`data_set` must be `key: value` lines; got 'emoji'"),
        ("data_set", {"id": "emoji"}, "lacks `name` of `data_set`"),
        ("data_sets", ["Noto"], "row 1 of `data_sets` must be `key: value` lines; got 'Noto'"),
        ("data_sets", {"name": "Noto"}, "`data_sets` must be a list"),
        ("tags", "emoji", "`tags` must be a list; got 'emoji'"),
        ("experiments", ["a"], "`experiments` must be `key: value` lines"),
        ("experiments", {"columns": ["a"], "rows": [3]}, "row 1 of `experiments` must be a list; got 3"),
        ("experiments", {"columns": ["a"], "rows": 3}, "`rows` of `experiments` must be a list; got 3"),
    ],
)
def test_facts_of_a_wrong_shape_are_refused_by_name(tmp_path, name, value, words):
    (tmp_path / "facts.yaml").write_text(yaml.safe_dump({**make_facts(), name: value}))
    with pytest.raises(ValueError, match=re.escape(words)):
        render_card.read_facts(tmp_path / "facts.yaml")


@pytest.mark.parametrize("facts", [{"data_set": "emoji"}, {"data_set": {"id": "x"}}, {"data_sets": ["Noto"]}])
def test_facts_that_do_not_fit_are_one_line(facts):
    with pytest.raises(ValueError, match="The card cannot be rendered by") as caught:
        render(make_report(), facts)
    assert "\n" not in str(caught.value)


def test_facts_get_at_nothing_but_values():
    with pytest.raises(ValueError, match=r"cannot be rendered by .* unsafe"):
        render(make_report(), {"summary": "{{ ''.__class__.__mro__ }}"})


def test_every_committed_card_is_what_rendering_gives():
    assert (folders := [path for path in CARDS.iterdir() if path.is_dir()])
    for folder in folders:
        facts = render_card.read_facts(folder / "facts.yaml")
        reports = [folder / "report.json", *(folder / each["report"] for each in facts.get("evaluations", []))]
        if not any(report.is_file() for report in reports):
            assert not (folder / "README.md").exists(), f"{folder} has a card, but no report that it comes from"
            continue
        card = render_card.render_folder(folder)
        assert (folder / "README.md").read_text() == str(card), f"run training/render_card.py {folder} again"
        for name in ("README.md", *render_card.list_pictures(card)):
            assert (ROOT / facts["model_id"] / name).read_bytes() == (folder / name).read_bytes(), name
