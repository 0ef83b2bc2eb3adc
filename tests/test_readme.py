"""The README keeps its word, in both languages: its Python runs, its commands parse, what it links to is there."""

import re
import shlex

import pytest
from PIL import Image
from written_commands import ROOT, check_command, list_blocks, list_commands

from hf_dalle import cli


README = (ROOT / "README.md").read_text(encoding="utf-8")
KOREAN = (ROOT / "README.ko.md").read_text(encoding="utf-8")
MAX_LINES = 90  # two screens


def test_it_is_short_and_nothing_is_left_to_fill_in():
    for text in (README, KOREAN):
        assert len(text.splitlines()) <= MAX_LINES and "@@" not in text


def test_the_python_runs(monkeypatch):
    monkeypatch.chdir(ROOT)
    names = {}
    for code in list_blocks(README, "python"):
        exec(compile(code, "README.md", "exec"), names)
    assert [image.size for image in names["images"]] == [(96, 96)] * 4
    assert isinstance(names["completed"], Image.Image)


def test_the_commands_parse(monkeypatch):
    monkeypatch.chdir(ROOT)
    for code in list_blocks(README, "bash"):
        for command in list_commands(code):
            check_command(command)


def test_the_drawing_command_runs(monkeypatch, tmp_path):
    lines = [line for code in list_blocks(README, "bash") for line in code.splitlines()]
    (draw,) = [shlex.split(line, comments=True) for line in lines if line.startswith("hf-dalle draw")]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "checkpoints").symlink_to(ROOT / "checkpoints")
    assert cli.main(draw[1:]) == 0
    assert Image.open(tmp_path / "apple.png").size == (3 * 96, 3 * 96)


def test_training_goes_by_the_steps_of_the_documentation():
    """docs/train.md says the same commands, and a test of it that they fit together."""
    (steps,) = (code for code in list_blocks(README, "bash") if "prepare_emoji" in code)
    documented = list_blocks((ROOT / "docs" / "train.md").read_text(encoding="utf-8"), "bash")
    assert list_commands(steps) in [list_commands(code) for code in documented]


@pytest.mark.parametrize("text", [README, KOREAN], ids=["english", "korean"])
def test_links_lead_somewhere(text):
    for target in re.findall(r"\]\((?!https?:)([^)#\s]*)", text):
        assert (ROOT / target).exists(), target


def test_both_languages_say_the_same():
    """The same code but for comments, links and headings, in the same order."""

    def strip_comments(text):
        return [re.sub(r" *#.*", "", code) for code in re.findall(r"```(?:python|bash)\n(.*?)```", text, re.DOTALL)]

    def list_links(text):
        return re.findall(r"\]\(([^)]*)\)", text.split("\n", 2)[2])

    assert strip_comments(README) == strip_comments(KOREAN)
    assert [line.count("#") for line in README.splitlines() if re.match("#+ ", line)] == [
        line.count("#") for line in KOREAN.splitlines() if re.match("#+ ", line)
    ]
    assert list_links(README) == list_links(KOREAN)
    folders = r"^(\S+/) +"
    assert re.findall(folders, README, flags=re.MULTILINE) == re.findall(folders, KOREAN, flags=re.MULTILINE)
