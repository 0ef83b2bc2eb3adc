"""Blocks of code in Markdown files, and whether the commands in them are ones that the real parsers take.

Nothing is run here but parsers, and files are only looked for. Which pages are held to it is the tests'.
"""

import contextlib
import importlib
import io
import re
import shlex
import sys
from pathlib import Path

import pytest

from hf_dalle import cli


ROOT = Path(__file__).resolve().parents[1]
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", flags=re.DOTALL | re.MULTILINE)


def list_blocks(text: str, language: str) -> list[str]:
    """The blocks of one language, in order."""
    return [code for name, code in BLOCK.findall(text) if name == language]


def list_commands(code: str) -> list[list[str]]:
    """The commands of a bash block: continued lines joined, comments gone, `&&` cut."""
    commands = []
    for line in code.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        while "&&" in words:
            commands.append(words[: words.index("&&")])
            words = words[words.index("&&") + 1 :]
        commands.append(words)
    return [command for command in commands if command]


def strip_launcher(command: list[str]) -> list[str]:
    """A script and its arguments, without environment, interpreter or launcher; else the command."""
    command = command[next(index for index, word in enumerate(command) if "=" not in word or word.startswith("-")) :]
    if command[0].split("/")[-1] in ("python", "accelerate", "torchrun"):
        if command[1] == "-m":
            return [command[2].replace(".", "/") + ".py", *command[3:]]
        return command[next(index for index, word in enumerate(command) if word.endswith(".py")) :]
    return command


def check_command(command: list[str]) -> None:
    """Fails where a program, script, target or extra does not exist, or a parser does not take the arguments."""
    for index, word in enumerate(command):
        if word in ("--config_file", "--accelerate_config"):
            assert (ROOT / command[index + 1]).is_file(), command
    command = command[: command.index("[--option")] if "[--option" in command else command
    program, *arguments = strip_launcher(command)
    name = program.split("/")[-1]
    if name == "pip":
        check_install(arguments)
    elif name == "make":
        targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
        assert {word for word in arguments if "=" not in word} <= targets, command
    elif name == "source":
        assert arguments == [".venv/bin/activate"]
    elif name == "hf-dalle":
        run_parser(cli._build_parser().parse_args, arguments)
    else:
        assert program.endswith(".py") and (ROOT / program).is_file(), f"{command} is no program that is known here"
        if "CONFIG.yaml" not in arguments:
            check_script(program, arguments)


def check_script(program: str, arguments: list[str]) -> None:
    """Parses a script's arguments as the script does."""
    arguments = [str(ROOT / word) if word.endswith(".yaml") else word for word in arguments]
    with pytest.MonkeyPatch.context() as patch:
        for room in ("training", "benchmarks"):
            patch.syspath_prepend(str(ROOT / room))
        name = program.removesuffix(".py").replace("/", ".")
        module = importlib.import_module(name if program.startswith("conversion/") else name.split(".", 1)[1])
        settings = importlib.import_module("settings_file")
        if program == "training/train.py":
            dry_run = importlib.import_module("dry_run")
            arguments = dry_run.read_machines(arguments)[1] if dry_run.is_asked(arguments) else arguments
            run_parser(importlib.import_module("arguments").parse_arguments, arguments)
        elif program == "training/evaluate.py":
            kind = settings.read_yaml(Path(arguments[0])).get("evaluation")
            source = {
                "concepts": "evaluate_concepts.ConceptArguments",
                "pictures": "evaluation.run.EvaluationArguments",
            }
            place, name = source[kind].rsplit(".", 1)
            settings.parse_settings(arguments, getattr(importlib.import_module(place), name), "evaluate.py")
        elif program in ("training/draw_gallery.py", "training/dvae_study.py"):
            kind = module.GalleryArguments if "gallery" in program else module.StudyArguments
            settings.parse_settings(arguments, kind, module.__name__)
        elif hasattr(module, "parse") or hasattr(module, "parse_arguments"):
            run_parser(getattr(module, "parse", None) or module.parse_arguments, arguments)
        elif program == "training/train_tokenizer.py":  # reads its options, and then finds no captions
            with pytest.raises(OSError):
                module.main(["--train_data", "nowhere.parquet", *arguments[2:]])
            assert arguments[0] == "--train_data"
        else:
            assert not arguments, f"nothing here can parse the arguments of {program}"


def check_install(arguments: list[str]) -> None:
    """Of `pip install` of this repository: the extras exist."""
    extras = set(re.findall(r'^    "(\w+)": \[', (ROOT / "setup.py").read_text(), flags=re.MULTILINE))
    extras |= set(re.findall(r'^extras\["(\w+)"\]', (ROOT / "setup.py").read_text(), flags=re.MULTILINE))
    assert arguments[0] == "install"
    for word in arguments[1:]:
        for names in re.findall(r"\[([^]]+)\]", word):
            assert set(names.split(",")) <= extras, names


def run_parser(parse, arguments: list[str]) -> None:
    """A parser that must take the arguments, or print the help that they ask for."""
    printed = io.StringIO()
    try:
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
            parse(arguments)
    except SystemExit as stopped:
        assert stopped.code in (0, None) and {"--help", "-h"} & set(arguments), printed.getvalue()


if __name__ == "__main__":
    for path in sys.argv[1:]:
        for block in list_blocks(Path(path).read_text(), "bash"):
            for words in list_commands(block):
                check_command(words)
