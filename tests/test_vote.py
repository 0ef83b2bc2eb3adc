"""`vote.py`: which pictures are put before people, what is refused before the page opens, what `count` writes."""

import importlib.util
import json

import numpy as np
import pytest
import vote
from evaluation.vote_counts import count_votes
from evaluation.votes import NEITHER, VoteFile
from PIL import Image
from tiny_evaluation import build_home, make_evaluation, make_settings, write_config
from tiny_votes import CAPTION, COLOURS, MODELS, make_study, make_vote, write_pictures


def open_pairs(*arguments):
    return vote.open_pairs(vote.parse(["serve", *map(str, arguments), "--votes", "unused"]))


def test_two_folders_are_paired_by_row(tmp_path):
    folders = write_pictures(tmp_path, num_captions=3)
    pairs = open_pairs(*folders)
    study = pairs.make_study("tiny", 5)
    assert study.models == MODELS and study.captions == {f"row-{i}": CAPTION.format(i) for i in range(3)}
    for row in study.captions:
        for name in MODELS:
            picture = pairs.read(row, name)
            assert picture.getpixel((0, 0)) == Image.new("RGB", (1, 1), COLOURS[name]).getpixel((0, 0))
    # the captions may be the other folder's, or a file's; then the rows are those of the file
    swapped = open_pairs(*folders[::-1]).make_study("tiny", 5)
    assert swapped.models == MODELS[::-1] and swapped.captions == study.captions
    captions = tmp_path / "captions.jsonl"
    captions.write_text('{"id": "row-2", "caption": "two"}\n\n{"id": "row-0", "caption": "none"}\n')
    given = open_pairs(*folders, "--captions", captions, "--models", "A", "B").make_study("tiny", 3)
    assert given.models == ("A", "B") and given.captions == {"row-2": "two", "row-0": "none"}


def test_pictures_of_other_captions_are_told(tmp_path, caplog):
    first, second = write_pictures(tmp_path)
    assert not open_pairs(first, second).stores[MODELS[0]].missing() and not caplog.records
    lines = [{"file_name": f"row-{i}.png", "id": f"row-{i}", "caption": "something else"} for i in range(4)]
    (second / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    open_pairs(first, second)
    assert f"{MODELS[1]}: 4 pictures were made from another caption than the row's" in caplog.text


def test_the_fingerprint_is_of_the_pictures(tmp_path):
    first, second = write_pictures(tmp_path)
    before = open_pairs(first, second).fingerprint
    assert open_pairs(first, second).fingerprint == before != open_pairs(second, first).fingerprint
    Image.new("RGB", (12, 12), "navy").save(second / "row-1.png")
    assert open_pairs(first, second).fingerprint != before


def test_captions_are_chosen_by_the_seed(tmp_path):
    folders = write_pictures(tmp_path, num_captions=12)
    chosen = [
        tuple(open_pairs(*folders, "--num_captions", 5, "--seed", seed).make_study("tiny", 5).captions)
        for seed in (0, 0, 1, 2)
    ]
    assert chosen[0] == chosen[1] and len(set(chosen)) == 3 and all(len(set(rows)) == 5 for rows in chosen)
    assert len(open_pairs(*folders, "--num_captions", 13).index_of) == 12


def test_two_models_of_an_evaluation(tmp_path):
    """A pipeline's drawn pictures beside somebody's folder, on the rows of the YAML."""
    home = build_home(tmp_path / "home")
    folder = tmp_path / "theirs"
    folder.mkdir()
    models = [{"name": "ours", "pipeline": str(home / "checkpoint")}, {"name": "theirs", "images": str(folder)}]
    settings = make_settings(home, tmp_path / "out", num_captions=3, models=models[:1])
    evaluation = make_evaluation(home, tmp_path / "out", num_captions=3, models=models[:1])
    model = evaluation.models["ours"]
    config = write_config({**settings, "models": models})
    for name in evaluation.rows.ids:
        Image.new("RGB", (8, 8), "blue").save(folder / f"{name}.png")
    with pytest.raises(OSError, match="let evaluate.py draw all pictures first"):
        open_pairs(config)
    evaluation.draw(model)
    pairs = open_pairs(config)
    assert pairs.make_study("tiny", 5).captions == dict(
        zip(evaluation.rows.ids, evaluation.rows.captions, strict=True)
    )
    row = evaluation.rows.ids[1]
    assert np.array_equal(pairs.read(row, "ours"), model.store.read(1))
    assert pairs.read(row, "theirs").getpixel((0, 0)) == (0, 0, 255)
    assert open_pairs(config, "--models", "theirs", "ours").make_study("tiny", 5).models == ("theirs", "ours")
    with pytest.raises(ValueError, match="--models A B; it has ours, theirs"):
        open_pairs(config, "--models", "ours", "other")


def test_what_cannot_be_shown_is_refused(tmp_path):
    first, second = write_pictures(tmp_path)

    def refuse(*arguments):
        with pytest.raises((ValueError, OSError)) as error:
            open_pairs(*arguments)
        return str(error.value)

    assert "different names" in refuse(first, first)
    assert "the same pictures" in refuse(first, first, "--models", "a", "b")
    assert "metadata.jsonl" in refuse(second, second, "--models", "a", "b")
    assert "is not a folder" in refuse(first, tmp_path / "nowhere")
    assert "got 3" in refuse(first, second, second)
    (tmp_path / "captions.jsonl").write_text('{"id": "row-0"}\n')
    assert "`id` and `caption`" in refuse(first, second, "--captions", tmp_path / "captions.jsonl")
    (tmp_path / "captions.jsonl").write_text('{"id": "row-0", "caption": "a"}\n' * 2)
    assert "1 different ids" in refuse(first, second, "--captions", tmp_path / "captions.jsonl")
    (second / "row-2.png").rename(tmp_path / "away.png")
    assert "no picture for 1 of 4 rows, as row-2" in refuse(first, second)
    (second / "row-2.png").write_bytes(b"broken")
    assert "row-2" in refuse(first, second)


def test_serving_needs_gradio(tmp_path):
    if importlib.util.find_spec("gradio"):
        pytest.skip("gradio is installed here; tests/test_vote_page.py serves")
    with pytest.raises(OSError, match="pip install"):
        vote.main(["serve", *map(str, write_pictures(tmp_path)), "--votes", str(tmp_path / "votes.jsonl")])
    assert not (tmp_path / "votes.jsonl").exists()


def test_count_writes_table_figures_and_chart(tmp_path, capsys):
    file = VoteFile(tmp_path / "votes.jsonl", make_study())
    answers = [("ours", "ours")] * 3 + [("theirs", NEITHER)] * 2
    votes = [make_vote(f"row-{i}", f"voter-{n}", *pair) for i in range(4) for n, pair in enumerate(answers)]
    for line in votes:
        file.append(line)
    with (tmp_path / "votes.jsonl").open("a") as cut:
        cut.write('{"row": "row-0", "vo')
    vote.main(["count", str(tmp_path / "votes.jsonl"), "--output_dir", str(tmp_path / "out")])
    text = (tmp_path / "out" / "votes.md").read_text()
    assert capsys.readouterr().out.strip() == text.strip()
    assert "4 of 4 captions" in text and "| ours | 100.0 % [51.0, 100.0] | 100.0 % [51.0, 100.0] |" in text
    assert "1 lines of the file were cut" in text and "| voter-0 | 4 | 4.0 |" in text
    figures = json.loads((tmp_path / "out" / "votes.json").read_text())
    assert figures == json.loads(json.dumps({**count_votes(make_study(), votes), "num_cut": 1}))
    chart = np.asarray(Image.open(tmp_path / "out" / "votes.png").convert("RGB"))
    assert chart.shape[0] > 300 and len(np.unique(chart.reshape(-1, 3), axis=0)) > 10


@pytest.mark.parametrize(
    "arguments", [["count"], ["serve", "a", "b"], [], ["serve", "a", "--votes", "v", "--num_voters", "0"]]
)
def test_a_wrong_command_line_is_explained(arguments, capsys):
    with pytest.raises(SystemExit):
        vote.parse(arguments)
    assert "usage: vote.py" in capsys.readouterr().err
