"""A newcomer's hour, from a clone with nothing but the README and the pages that it links to, as processes.

Draws, finishes a picture, trains a tiny model on 50 pictures of one's own, pushes it to a Hub, loads it by name, opens
the page on it. How the package gets into an environment is `test_packaging.py`'s.
"""

import os
import shlex
import shutil
import subprocess
import sys

import pytest
from hub_server import HubServer, client_environment, run_client
from PIL import Image
from tiny_data import COLOURS, draw_picture
from written_commands import ROOT, list_blocks, list_commands, strip_launcher


pytestmark = [pytest.mark.slow, pytest.mark.skipif(not (ROOT / ".git").exists(), reason="needs a clone to clone")]
# What the pages say but for the length of the training.
SHRINK = "--max_train_steps 4 --checkpointing_steps 4 --train_batch_size 4 --report_to none --mixed_precision no"
PUSH = """
from hf_dalle import DALLEPipeline

pipe = DALLEPipeline.from_pretrained("runs/mine")
print(pipe.push_to_hub("me/mine"))
"""
LOAD = """
import torch
from hf_dalle import DALLEPipeline

pipe = DALLEPipeline.from_pretrained("me/mine")
pipe("red and blue", generator=torch.Generator().manual_seed(0)).images[0].save("by_name.png")
pipe = DALLEPipeline.from_pretrained("runs/mine")
pipe("red and blue", generator=torch.Generator().manual_seed(0)).images[0].save("by_folder.png")
"""


def run(words, clone):
    """One command of a page, in the clone and with its package."""
    environment = {**os.environ, "PYTHONPATH": str(clone / "src"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, *words], cwd=clone, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, f"{words}\n{done.stdout}\n{done.stderr}"


def run_commands(code, clone):
    """The commands of a block, trainings shrunk."""
    for command in list_commands(code):
        program, *arguments = strip_launcher(command)
        if program.split("/")[-1] == "hf-dalle":
            run(["-c", "import sys; from hf_dalle.cli import main; sys.exit(main())", *arguments], clone)
        else:
            run([program, *arguments, *(SHRINK.split() if program.endswith("train.py") else ())], clone)


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    """What is committed, and 50 pictures whose names say what they show."""
    folder = tmp_path_factory.mktemp("newcomer") / "hf-dalle"
    subprocess.run(["git", "clone", "--quiet", "--depth", "1", f"file://{ROOT}", str(folder)], check=True)
    pictures = folder / "pictures" / "train"
    pictures.mkdir(parents=True)
    pairs = [(left, right) for left in COLOURS for right in COLOURS if left != right]
    for index in range(50):
        left, right = pairs[index % len(pairs)]
        draw_picture(left, right).resize((96, 96)).save(pictures / f"{left}_and_{right}-{index:02}.png")
    return folder


def find_block(page, language, word, clone):
    (code,) = (code for code in list_blocks((clone / page).read_text(encoding="utf-8"), language) if word in code)
    return code


def test_the_hour(clone):
    block = find_block("README.md", "bash", "hf-dalle draw", clone)
    (draw,) = (line for line in block.splitlines() if "hf-dalle draw" in line)
    run_commands(shlex.join(shlex.split(draw, comments=True)), clone)
    assert Image.open(clone / "apple.png").size == (288, 288)
    run(["-c", find_block("README.md", "python", "num_prefix_rows", clone) + '\ncompleted.save("whole.png")'], clone)
    assert Image.open(clone / "whole.png").size == (96, 96)

    run(["-c", find_block("docs/train.md", "python", "metadata.jsonl", clone)], clone)
    run_commands(find_block("docs/train.md", "bash", "train_tokenizer.py --train_data pictures", clone), clone)
    assert (clone / "fox.png").is_file()

    with HubServer() as hub:
        environment = client_environment(hub, clone / "home")
        for script in (PUSH, LOAD):
            run_client(f"import os; os.chdir({str(clone)!r})\n{script}", environment)
            shutil.rmtree(clone / "home", ignore_errors=True)
        assert {"model_index.json", "README.md", "prior/model.safetensors"} <= set(hub.files("me/mine"))
    assert Image.open(clone / "by_name.png").tobytes() == Image.open(clone / "by_folder.png").tobytes()


@pytest.mark.browser
def test_the_page_opens_on_it(clone, tmp_path):
    pytest.importorskip("gradio")
    from test_demo_page import draw, open_browser, open_page, read_files, serve

    if not (clone / "runs" / "mine" / "model_index.json").is_file():
        test_the_hour(clone)
    with serve(tmp_path, checkpoint=clone / "runs" / "mine") as url, open_browser() as browser:
        open_page(browser, url)
        draw(browser, "red and blue", seed=0)
        assert len(read_files(browser)) == 4
