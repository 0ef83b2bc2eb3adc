"""Checkpoints as files: whole under their names, verified before use, refused where they do not fit.

What a run makes of them, killed and going on, is in `test_loop.py` and `test_interruptions.py`.
"""

import json
import shutil
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from arguments import DVAEArguments
from checkpointing import Checkpoints, list_checkpoints
from hypothesis import given, settings
from hypothesis import strategies as st
from interruptions import Votes


class Counter:
    """Something with a state."""

    def __init__(self):
        self.value = torch.zeros(3)

    def state_dict(self):
        return {"value": self.value}

    def load_state_dict(self, state):
        self.value = state["value"] + 0


def build(folder, **changes):
    """Model, counters and checkpoints of a run of 8 pictures an update."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    args = DVAEArguments(output_dir=str(folder), train_data_dir="x", **changes)
    accelerator = Accelerator(cpu=True)
    model = torch.nn.Linear(2, 2)
    accelerator.prepare(model, torch.optim.AdamW(model.parameters()))
    counters = {"total": Counter()}, {"data": Counter()}
    return model, counters, Checkpoints(args, accelerator, Votes(accelerator), *counters)


def save(folder, *steps, **changes):
    """A run that wrote a checkpoint at each of these updates; its numbers say which."""
    model, (shared, each), checkpoints = build(folder, **changes)
    for step in steps:
        torch.nn.init.constant_(model.weight, step)
        shared["total"].value.fill_(step)
        each["data"].value.fill_(-step)
        checkpoints.save(step)


def load(folder, **changes):
    """The numbers that a run goes on with."""
    model, (shared, each), checkpoints = build(folder, **changes)
    found = checkpoints.find()
    checkpoints.load(found)
    return model.weight[0, 0].item(), shared["total"].value[0].item(), each["data"].value[0].item()


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoints") / "run"
    save(folder, 2, 4)
    return folder


@pytest.fixture
def copied(saved, tmp_path):
    return Path(shutil.copytree(saved, tmp_path / "run"))


def test_a_checkpoint_brings_back_everything_and_lists_its_files(saved):
    assert load(saved) == (4, 4, -4)
    manifest = json.loads((saved / "checkpoint-4" / "manifest.json").read_text())
    names = {str(path.relative_to(saved / "checkpoint-4")) for path in (saved / "checkpoint-4").rglob("*")}
    assert manifest["files"].keys() == names - {"manifest.json"} >= {"model.safetensors", "total.pt", "data_0.pt"}
    assert {key: manifest[key] for key in ("step", "num_processes", "num_pictures")} == {
        "step": 4,
        "num_processes": 1,
        "num_pictures": 8,
    }


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_a_damaged_one_is_passed_over_whatever_the_damage(saved, tmp_path_factory, data):
    folder = Path(shutil.copytree(saved, tmp_path_factory.mktemp("damage") / "run"))
    names = sorted(path.name for path in (folder / "checkpoint-4").iterdir())
    path = folder / "checkpoint-4" / data.draw(st.sampled_from(names))
    content = path.read_bytes()
    place = data.draw(st.integers(0, len(content) - 1))
    damage = data.draw(st.sampled_from(["cut", "flip", "longer", "gone"] if path.name != "manifest.json" else ["cut"]))
    if damage == "gone":
        path.unlink()
    else:
        flipped = content[:place] + bytes([content[place] ^ 1 << data.draw(st.integers(0, 7))]) + content[place + 1 :]
        path.write_bytes({"cut": content[:place], "flip": flipped, "longer": content + b"\0"}[damage])
    _, _, checkpoints = build(folder)
    assert checkpoints.find() == folder / "checkpoint-2"
    assert sorted(path.name for path in folder.iterdir()) == ["checkpoint-2", "damaged-checkpoint-4"]
    assert load(folder) == (2, 2, -2)


def test_what_is_passed_over_is_said(copied, caplog):
    path = copied / "checkpoint-4" / "optimizer.bin"
    size = path.stat().st_size
    path.write_bytes(path.read_bytes()[:100])
    assert load(copied) == (2, 2, -2)
    words = f"is damaged (optimizer.bin has 100 bytes, not {size}): passed over, and put aside as damaged-checkpoint-4"
    assert words in caplog.text
    save(copied, 4)  # the run gets there again
    assert load(copied) == (4, 4, -4) and (copied / "damaged-checkpoint-4").is_dir()


def test_a_named_one_that_is_damaged_is_refused_and_so_are_all(copied):
    for step in (2, 4):
        (copied / f"checkpoint-{step}" / "model.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match=r"checkpoint-4 is damaged \(model.safetensors has 0 bytes.*name another"):
        load(copied, resume_from_checkpoint=str(copied / "checkpoint-4"))
    with pytest.raises(ValueError, match="No checkpoint is whole: .*checkpoint-4 .*checkpoint-2 .*Delete them"):
        load(copied)
    assert len(list_checkpoints(copied)) == 2  # for whoever looks into it


def test_one_of_an_older_version_is_taken(copied):
    for name in ("manifest.json", "total.pt", "data_0.pt"):
        (copied / "checkpoint-4" / name).unlink()
    assert load(copied) == (4, 0, 0)
    (copied / "checkpoint-4" / "optimizer.bin").write_bytes(b"half")
    with pytest.raises(ValueError, match="checkpoint-4 is damaged, or of a run with another model"):
        load(copied)


def test_one_without_a_part_that_came_into_use_later(copied, caplog):
    manifest = json.loads((copied / "checkpoint-4" / "manifest.json").read_text())
    (copied / "checkpoint-4" / "total.pt").unlink()
    del manifest["files"]["total.pt"]
    (copied / "checkpoint-4" / "manifest.json").write_text(json.dumps(manifest))
    assert load(copied) == (4, 0, -4)
    assert "checkpoint-4 has no total.pt" in caplog.text


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"train_batch_size": 4}, "set `gradient_accumulation_steps: 2`"),
        ({"gradient_accumulation_steps": 2}, "this one has 16: .*set `gradient_accumulation_steps: 1`"),
        ({"train_batch_size": 3}, "whose product divides 8"),
        ({"train_batch_size": 16}, "whose product divides 8"),
    ],
)
def test_another_number_of_pictures_an_update_is_refused(saved, changes, words):
    with pytest.raises(ValueError, match=f"8 pictures an update.*{words}"):
        load(saved, **changes)


def test_the_same_number_in_another_way_goes_on(saved):
    assert load(saved, train_batch_size=2, gradient_accumulation_steps=4) == (4, 4, -4)


def test_the_oldest_are_deleted(tmp_path):
    save(tmp_path, 1, 2, 10, checkpoints_total_limit=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-10", "checkpoint-2"]


def test_one_that_cannot_be_deleted_stays(tmp_path, caplog):
    save(tmp_path, 1, 2)
    (tmp_path / ".checkpoint-1" / "in the way").mkdir(parents=True)
    save(tmp_path, 3, checkpoints_total_limit=2)
    assert "An older checkpoint could not be deleted" in caplog.text
    assert [path.name for path in list_checkpoints(tmp_path)] == ["checkpoint-1", "checkpoint-2", "checkpoint-3"]


def test_what_a_kill_left_is_taken_away(copied):
    shutil.copytree(copied / "checkpoint-4", copied / ".checkpoint-6")
    _, _, checkpoints = build(copied)
    assert checkpoints.find() == copied / "checkpoint-4"
    checkpoints.clean()
    assert not (copied / ".checkpoint-6").exists() and len(list_checkpoints(copied)) == 2


class Hostile:
    """Writes a file where it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.write_text, (self.path, "run")


def test_code_in_a_strangers_checkpoint_is_not_run(saved, tmp_path):
    folder = shutil.copytree(saved / "checkpoint-4", tmp_path / "checkpoint-4")
    (folder / "manifest.json").unlink()  # which a stranger could write to fit
    torch.save({"step": Hostile(tmp_path / "trace")}, folder / "custom_checkpoint_0.pkl")
    with pytest.raises(ValueError, match="is damaged, or of a run with"):
        load(tmp_path)
    assert not (tmp_path / "trace").exists()
