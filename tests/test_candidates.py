"""How many candidates fit into memory: what is free, what is predicted, what is said and done where it runs out."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from PIL import Image
from tiny import CAPTIONS, build_dvae, build_pipeline

from hf_dalle.cache_dalle import cache_bytes
from hf_dalle.candidates import (
    SHARE_OF_FREE_MEMORY,
    count_fitting,
    explain_out_of_memory,
    measure_free_memory,
    measure_group_memory,
)
from hf_dalle.cli import main
from hf_dalle.sampling import kept_bytes


@pytest.fixture(scope="module")
def pipe():
    return build_pipeline()


def draw(pipe, **kwargs):
    """Tokens of three pictures each of three prompts."""
    generator = torch.Generator().manual_seed(0)
    return pipe(CAPTIONS[:3], num_images_per_prompt=3, generator=generator, output_type="latent", **kwargs).images


def test_what_fits_is_a_share_of_free_memory():
    cpu, module = torch.device("cpu"), build_dvae()
    free = measure_free_memory(cpu)
    assert 0 < free <= psutil.virtual_memory().total
    expected = 1000 * SHARE_OF_FREE_MEMORY
    assert count_fitting(module, cpu, int(free / 1000)) == pytest.approx(expected, rel=0.2)  # others allocate too
    assert count_fitting(module, cpu, int(free * 2)) == 1
    assert count_fitting(module, cpu, int(free / 1000), kept_bytes=int(free)) == pytest.approx(2 * expected, rel=0.2)
    with torch.device("meta"):  # weights that are not on the device yet
        missing = torch.nn.Linear(1000, int(free / 2 / 4000), bias=False)
    assert count_fitting(missing, cpu, int(free / 1000)) == pytest.approx(expected / 2, rel=0.2)


def test_without_psutil_all_are_tried_at_once(pipe, monkeypatch):
    whole = draw(pipe)
    monkeypatch.setitem(sys.modules, "psutil", None)
    monkeypatch.setattr("hf_dalle.candidates.is_psutil_available", lambda: False)
    assert measure_free_memory(torch.device("cpu")) == math.inf
    assert torch.equal(draw(pipe), whole) and pipe.num_timesteps == pipe.prior.config.num_image_tokens


def test_buffers_are_kept_for_the_next_call_but_not_after_chunks(pipe):
    draw(pipe)
    assert kept_bytes(pipe.prior) == cache_bytes(pipe.prior.config, 3, 9)
    draw(pipe, max_batch_size=4)
    assert kept_bytes(pipe.prior) == 0


def write_group(folder: Path, limit: str, usage: int, idle: int, version: int = 2) -> None:
    names = ["memory.max", "memory.current", "inactive_file"]
    if version == 1:
        names = ["memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / names[0]).write_text(f"{limit}\n")
    (folder / names[1]).write_text(f"{usage}\n")
    (folder / "memory.stat").write_text(f"anon 5\n{names[2]} {idle}\nactive_file 7\n")


def test_limits_of_control_groups_count(tmp_path):
    version_2, version_1 = "0::/user/job\n", "5:devices:/\n4:memory:/docker/job\n0::/\n"
    assert measure_group_memory(version_2, tmp_path) == measure_group_memory(version_1, tmp_path) == math.inf
    write_group(tmp_path / "user/job", "max", 100, 0)
    assert measure_group_memory(version_2, tmp_path) == math.inf
    write_group(tmp_path / "user", "1000", 700, 50)  # the limit of all of a user's jobs
    assert measure_group_memory(version_2, tmp_path) == 350
    write_group(tmp_path / "user/job", "600", 400, 50)
    assert measure_group_memory(version_2, tmp_path) == 250
    write_group(tmp_path / "memory", "2000", 700, 50, version=1)  # a container's: its own group is the mount
    assert measure_group_memory(version_1, tmp_path) == 1350


def test_running_out_says_which_number_to_lower():
    for allocate in (lambda: torch.empty(10**15), lambda: np.empty(10**16)):
        words = "drawing 8 .* `max_batch_size` below 8"
        with pytest.raises(torch.OutOfMemoryError, match=words) as caught, explain_out_of_memory("drawing", 8):
            allocate()
        assert str(caught.value.__cause__) and str(caught.value.__cause__)[:40] in str(caught.value)
    words = "one picture at a time: lower `num_images_per_prompt`"
    with pytest.raises(torch.OutOfMemoryError, match=words), explain_out_of_memory("decoding", 1):
        torch.empty(10**15)
    with pytest.raises(RuntimeError, match="mat1 and mat2") as caught, explain_out_of_memory("drawing", 8):
        torch.ones(2, 3) @ torch.ones(2, 3)
    assert not isinstance(caught.value, torch.OutOfMemoryError)


def run(code, *arguments):
    """The last line that a process prints, and its errors; freed memory it gives back at once."""
    process = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        env={
            **os.environ,
            "MALLOC_MMAP_THRESHOLD_": "131072",
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(Path(__file__).parent),
        },
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0, process.stderr
    return json.loads(process.stdout.splitlines()[-1]), process.stderr


# A process that may take 150 MB more than it has when it begins to draw; 1500 pictures need 197 MB of cache.
LIMITED = """
import json, sys, psutil, torch
from tiny import build_pipeline, build_prior
from hf_dalle import cli

prior = build_prior(attention_types=["full"] * 16, hidden_size=64, intermediate_size=16)  # 131 kB of cache an image
pipe = build_pipeline(prior=prior)

def draw(num_images, **kwargs):
    generator, kwargs = torch.Generator().manual_seed(0), {"output_type": "latent", **kwargs}
    return pipe("a red fox", num_images_per_prompt=num_images, generator=generator, **kwargs).images

few = draw(8)
pipe.save_pretrained(sys.argv[1])
process = psutil.Process()
process.rlimit(psutil.RLIMIT_AS, (process.memory_info().vms + 150_000_000,) * 2)
seen = {}
try:
    draw(1500, max_batch_size=1500)
except torch.OutOfMemoryError as error:
    seen.update(words=str(error), cause=type(error.__cause__).__name__)
many = draw(1500)
seen.update(num_chunks=pipe.num_timesteps // 16, same=torch.equal(many[:8], few))
command = ["draw", "a red fox", "--checkpoint", sys.argv[1], "--device", "cpu", "--num_images", "1500"]
seen["code"] = cli.main([*command, "--max_batch_size", "1500"])
print(json.dumps(seen))
"""


@pytest.mark.skipif(not hasattr(psutil, "RLIMIT_AS"), reason="the system limits no process")
def test_a_process_short_of_memory_draws_in_chunks(tmp_path):
    seen, errors = run(LIMITED, str(tmp_path))
    words = "drawing 1500 pictures at once: set `max_batch_size` below 1500"
    assert words in seen["words"]
    assert "can't allocate memory" in seen["words"] and seen["cause"] == "RuntimeError"
    assert seen["num_chunks"] > 1 and seen["same"]
    line = errors.splitlines()[-1]
    assert seen["code"] == 2 and line.startswith("hf-dalle: error: Memory ran out") and words in line


def test_the_command_draws_in_chunks(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    build_pipeline().save_pretrained("saved")
    drawn = []
    for options in ([], ["--max_batch_size", "3"]):
        assert main(["draw", "a red fox", "--checkpoint", "saved", "--device", "cpu", "--seed", "3", *options]) == 0
        drawn.append(np.asarray(Image.open("dalle.png"), dtype=int))
    assert np.abs(drawn[0] - drawn[1]).max() <= 1
    assert main(["draw", "a red fox", "--checkpoint", "saved", "--max_batch_size", "0"]) == 2
    assert "`max_batch_size` is 0" in capsys.readouterr().err


# What a picture takes at its peak, in a process that gives freed memory back, beside what is predicted.
PEAKS = """
import json, psutil, torch
from pathlib import Path
from tiny import build_dvae, build_prior
from hf_dalle.candidates import count_decoding_bytes, count_drawing_bytes
from hf_dalle.sampling import draw_image_tokens, drop_kept, spawn_generators

def measure(work):
    drop_kept(prior)
    before = psutil.Process().memory_info().rss
    Path("/proc/self/clear_refs").write_text("5")
    work()
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024 - before

def draw_three(**kwargs):
    for step, _ in enumerate(draw_image_tokens(prior, ids, torch.ones_like(ids), generators=generators, **kwargs)):
        if step == 2:
            break

sizes = {"hidden_size": 256, "text_length": 64, "image_grid_size": 16, "image_vocab_size": 2048}
prior = build_prior(**sizes, attention_types=["full", "row", "column", "conv", "full", "full"])
text, shared = torch.randint(0, 300, (1, 64)), {"num_images_per_prompt": 64}
generators = spawn_generators(torch.Generator().manual_seed(0), 64)
dvae, tokens = build_dvae(sample_size=64, decoder_block_out_channels=(256, 192, 128)), torch.zeros(32, 16, 16)
ids, seen = text, {}
draw_three(**shared)  # what is made once
seen["shared"] = [measure(lambda: draw_three(**shared)), 64 * count_drawing_bytes(prior.config, prior.dtype, 1, 64)]
prefix = torch.zeros(64, 128, dtype=torch.long)
predicted = 64 * count_drawing_bytes(prior.config, prior.dtype, 1, 64, 128)
seen["prefix"] = [measure(lambda: draw_three(**shared, image_prefix=prefix)), predicted]
ids = text.expand(64, -1)
guided = {"guidance_scale": 2.0, "negative_text_ids": ids, "negative_attention_mask": torch.ones_like(ids)}
seen["guided"] = [measure(lambda: draw_three(**guided)), 64 * count_drawing_bytes(prior.config, prior.dtype, 2)]
with torch.no_grad():
    seen["decoded"] = [
        measure(lambda: dvae.decode(tokens.long())), 32 * count_decoding_bytes(dvae)
    ]
print(json.dumps(seen))
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the system measures no peaks")
def test_predicted_bytes_are_those_measured():
    for name, (measured, predicted) in run(PEAKS)[0].items():
        assert measured < predicted / SHARE_OF_FREE_MEMORY and predicted < 2 * measured, (name, measured, predicted)
