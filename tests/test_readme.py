"""The README keeps its word: its Python runs, its commands parse, the files that it names are there."""

import importlib
import re
import shlex
from pathlib import Path

import pytest
from PIL import Image

from hf_dalle import cli


ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```(\w*)\n(.*?)```", README, flags=re.DOTALL)


def test_nothing_is_left_to_fill_in():
    assert "@@" not in README


def test_the_python_runs(monkeypatch):
    monkeypatch.chdir(ROOT)
    names = {}
    for language, code in BLOCKS:
        if language == "python":
            exec(compile(code, "README.md", "exec"), names)
    assert [image.size for image in names["images"]] == [(96, 96)] * 4
    assert isinstance(names["completed"], Image.Image)
    assert names["tokens"].shape == (4, 12, 12) and len(names["pictures"]) == 4
    assert names["ids"].shape == (1, names["pipe"].prior.config.stream_length + 1)


def test_the_drawing_commands_run(monkeypatch, tmp_path, capsys):
    commands = [line for language, code in BLOCKS if language == "bash" for line in code.splitlines()]
    draws = [shlex.split(line, comments=True) for line in commands if line.startswith("hf-dalle draw")]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "checkpoints").symlink_to(ROOT / "checkpoints")
    for _, *arguments in draws:
        if "--help" in arguments:
            with pytest.raises(SystemExit) as stopped:
                cli.main(arguments)
            assert stopped.value.code == 0
        else:
            assert cli.main(arguments) == 0
    assert Image.open(tmp_path / "apple.png").size == (3 * 96, 3 * 96)


def test_the_training_commands_parse(monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(ROOT / "training"))
    arguments = importlib.import_module("arguments")
    precompute = importlib.import_module("precompute_image_tokens")
    joined = "\n".join(code for language, code in BLOCKS if language == "bash").replace("\\\n", " ")
    lines = [shlex.split(line, comments=True) for line in joined.splitlines()]
    configs = [line[-1] for line in lines if line[:2] == ["accelerate", "launch"] and "training/train.py" in line]
    assert len(configs) == 2
    stages = [arguments.parse_arguments([str(ROOT / config)]) for config in configs]
    (encoding,) = (line[2:] for line in lines if line[:2] == ["python", "training/precompute_image_tokens.py"])
    parsed = precompute.parse_arguments(encoding)
    # the steps fit together: what one writes the next reads
    dvae, prior = stages
    assert parsed.dvae == prior.dvae == dvae.output_dir and parsed.output_dir == prior.train_data_dir
    assert parsed.train_data_dir == dvae.train_data_dir


def test_the_file_tree_is_the_tree():
    (tree,) = (code for language, code in BLOCKS if language == "" and "src/hf_dalle/" in code)
    package = tree.split("training/")[0]
    named = set(re.findall(r"^  (\w+\.py)", package, flags=re.MULTILINE))
    assert named == {path.name for path in (ROOT / "src" / "hf_dalle").glob("*.py")} - {"__init__.py"}
    for folder, following in (("training", "benchmarks"), ("benchmarks", "model_cards")):
        scripts = set(re.findall(r"(\w+\.py)", tree.split(f"\n{folder}/")[1].split(f"\n{following}/")[0]))
        assert scripts == {path.name for path in (ROOT / folder).glob("*.py")}
    for folder in ("training/configs", "training/data", "checkpoints/emoji-mini", "tests"):
        assert (ROOT / folder).is_dir()
