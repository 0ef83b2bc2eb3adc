"""What tests of people's votes share: pictures of two models, a study, a server in a process of its own."""

import json
import os
import re
import signal
import time
from contextlib import contextmanager

import vote
from evaluation.votes import Study
from PIL import Image
from tiny_processes import finish, fork, wait_until


MODELS = ("ours", "theirs")
COLOURS = {"ours": "red", "theirs": "blue"}
CAPTION = "a <b>bold</b> & \u00fcber caption, no. {}"


def make_study(num_captions=4, num_voters=5, **changes):
    captions = {f"row-{i}": CAPTION.format(i) for i in range(num_captions)}
    return Study(**{"name": "tiny", "models": MODELS, "captions": captions, "num_voters": num_voters, **changes})


def make_vote(row="row-0", voter="a", realism="ours", match="ours", left="ours", seconds=4.0):
    return {"row": row, "voter": voter, "left": left, "realism": realism, "match": match, "seconds": seconds}


def write_pictures(folder, num_captions=4, sides=(16, 12)):
    """Two folders of pictures, the one red, the other blue and smaller; the first has the captions."""
    for name, side in zip(MODELS, sides, strict=True):
        (folder / name).mkdir(parents=True)
        for index in range(num_captions):
            Image.new("RGB", (side, side), COLOURS[name]).save(folder / name / f"row-{index}.png")
    lines = [
        json.dumps({"file_name": f"row-{index}.png", "id": f"row-{index}", "caption": CAPTION.format(index)})
        for index in range(num_captions)
    ]
    (folder / MODELS[0] / "metadata.jsonl").write_text("\n".join(lines) + "\n")
    return [folder / name for name in MODELS]


def run_server(arguments):
    """`vote.py serve` in the new process."""
    vote.main(arguments)


def start_server(folder, *options):
    """Starts a server of the two folders; gives the process and its address."""
    log = folder / f"server-{time.monotonic_ns()}.txt"
    log.touch()
    arguments = ["serve", *(str(folder / name) for name in MODELS), "--votes", str(folder / "votes.jsonl"), *options]
    process = fork(run_server, arguments, output=log, preload="evaluation.vote_page")
    wait_until(lambda: "Open on http" in log.read_text(), process, timeout=600)
    return process, re.search(r"Open on (http://\S+)", log.read_text())[1]


@contextmanager
def serve(folder, *options):
    """The address of a server that ends, as by Ctrl-C, with the block."""
    process, url = start_server(folder, *options)
    try:
        yield url
    finally:
        os.kill(process.pid, signal.SIGINT)
        finish(process, timeout=60)
