"""training/README.md keeps its word: its figures are the dry runs', its commands parse, what it names is there.

`python tests/test_training_readme.py` writes the figures of its table anew.
"""

import re
import shlex
import sys
from dataclasses import fields
from pathlib import Path

import pytest
from written_commands import check_command, list_blocks, list_commands, strip_launcher


ROOT = Path(__file__).parents[1]
PATH = ROOT / "training" / "README.md"
TEXT = PATH.read_text()
COMMANDS = [command for code in list_blocks(TEXT, "bash") for command in list_commands(code)]
ROWS = [row for row in TEXT.splitlines() if re.match(r"\| `\w[\w.]+\.yaml` \| (`--[^|]+)?\s*\|", row)]


def make_figures(row: str) -> str:
    """The row as a dry run fills it."""
    from arguments import parse_arguments
    from dry_run import _format, read_machines
    from estimates import estimate

    recipe, options = (cell.strip(" `") for cell in row.split("|")[1:3])
    options = options.replace("training/accelerate", str(ROOT / "training" / "accelerate"))
    options = options.replace("checkpoints/", f"{ROOT}/checkpoints/")
    machines, rest = read_machines([str(ROOT / "training" / "configs" / recipe), *shlex.split(options)])
    plan = estimate(parse_arguments(rest), machines)
    memory = plan["memory a device, bytes"]
    num_bytes = [
        memory["sum"],
        memory["activations"],
        plan["bytes an update"]["a process sends"],
        plan["disk, bytes"]["a checkpoint"],
    ]
    millions = plan["model"]["parameters"] / 1e6
    figures = [f"{millions:.1f} M" if millions < 1000 else f"{millions / 1000:.2f} B"]
    figures += [_format(number, True) for number in num_bytes]
    return f"{'|'.join(row.split('|')[:3])}| {' | '.join(figures)} |"


@pytest.mark.parametrize("row", [pytest.param(row, marks=() if "emoji" in row else pytest.mark.slow) for row in ROWS])
def test_the_figures_are_the_dry_runs(row, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)  # where no stage has been trained yet
    assert make_figures(row) == row


def test_every_setting_is_one():
    from arguments import STAGES

    known = {item.name for kind in STAGES.values() for item in fields(kind)}
    named = set(re.findall(r"`(\w+): [^`]+`", TEXT)) | set(re.findall(r"`(\w+_\w+)`", TEXT))
    figures = {name for name in named if name.startswith(("validation_", "train_perp", "_"))}
    figures |= {"pictures_per_second", "skipped_rows", "skipped_updates", "image_loss", "img2dataset"}
    model = {"quantizer", "guidance_scale", "from_pretrained", "reranker_processor", "vision_config", "model_type"}
    assert named - figures - model <= known, sorted(named - figures - model - known)


def test_every_figure_of_validation_is_logged():
    sources = "".join((ROOT / "training" / f"train_{stage}.py").read_text() for stage in ("dvae", "prior"))
    rows = TEXT.split("| figure at validation")[1].split("\n\n")[0]
    for name in re.findall(r"`(?:validation)?_?(\w+)`", rows):
        assert f'"{name}"' in sources or f'"validation_{name}"' in sources, name


def test_what_is_named_is_there():
    for name in set(re.findall(r"`(?:training/)?((?:configs|accelerate)/[\w.]+\.yaml)`", TEXT)):
        assert (ROOT / "training" / name).is_file(), name
    for name in set(re.findall(r"`(\w[\w.]*\.yaml)`", TEXT)) - {"CONFIG.yaml"}:
        folders = (ROOT / "training" / "configs", ROOT / "training" / "accelerate")
        assert any((folder / name).is_file() for folder in folders), name
    for name in set(re.findall(r"`((?:benchmarks/)?\w+\.py)`", TEXT)):
        assert (ROOT / name).is_file() or (ROOT / "training" / name).is_file(), name
    for link in set(re.findall(r"\]\((?!http)([^)#]+)", TEXT)):
        assert (PATH.parent / link).exists(), link


def test_the_commands_parse(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    seen = set()
    for command in COMMANDS:
        if any(word.startswith("training/") and word.endswith(".py") for word in command):
            check_command(command)
            seen.add(Path(strip_launcher(command)[0]).stem)
    assert seen >= {"train", "train_tokenizer", "precompute_image_tokens", "download_images", "filter_captions"}


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT / "training"))
    for row in ROWS:
        filled = make_figures(row)
        PATH.write_text(PATH.read_text().replace(row, filled))
