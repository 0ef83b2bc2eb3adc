"""Many candidates: the same pictures in any chunks, chunks that fit into memory, and what a callback sees of them."""

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
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from tiny import CAPTIONS, build_dvae, build_pipeline, build_reranker

from hf_dalle.cache_dalle import cache_bytes
from hf_dalle.candidates import (
    SHARE_OF_FREE_MEMORY,
    count_fitting,
    explain_out_of_memory,
    measure_free_memory,
    measure_group_memory,
    split_candidates,
)
from hf_dalle.cli import main
from hf_dalle.sampling import kept_bytes


GRID, NUM_CELLS, NUM_CODES = 4, 16, 16
PROMPTS, NUM_EACH = CAPTIONS[:3], 3
NUM_IMAGES = len(PROMPTS) * NUM_EACH


@pytest.fixture(scope="module")
def pipe():
    return build_pipeline()


def draw(pipe, prompt=PROMPTS, **kwargs):
    """Draws three pictures each of three prompts; what is given replaces that."""
    defaults = {"num_images_per_prompt": NUM_EACH, "generator": torch.Generator().manual_seed(0)}
    return pipe(prompt, **{**defaults, "output_type": "latent", **kwargs}).images


def random_pictures(num_images):
    pixels = np.random.default_rng(0).integers(0, 256, (num_images, 16, 16, 3), dtype=np.uint8)
    return [Image.fromarray(picture) for picture in pixels]


# ------------------------------------------------------------------------------------------------------------- chunks


@given(num_prompts=st.integers(1, 9), num_each=st.integers(1, 9), max_batch_size=st.integers(1, 90))
def test_chunks_hold_each_image_once_and_split_prompts_only_where_they_must(num_prompts, num_each, max_batch_size):
    chunks = split_candidates(num_prompts, num_each, max_batch_size)
    images = list(range(num_prompts * num_each))
    assert [image for chunk in chunks for image in images[chunk.images]] == images
    for chunk in chunks:
        prompts = list(range(num_prompts))[chunk.prompts]
        assert 1 <= chunk.num_images == len(prompts) * chunk.num_images_per_prompt <= max_batch_size
        assert [image // num_each for image in images[chunk.images]] == [
            prompt for prompt in prompts for _ in range(chunk.num_images_per_prompt)
        ]
    num_prefills = sum(chunk.prompts.stop - chunk.prompts.start for chunk in chunks)
    assert num_prefills == num_prompts * math.ceil(num_each / max_batch_size)
    assert chunks[0].num_images == max(chunk.num_images for chunk in chunks)


EACH_OTHER = torch.arange(NUM_IMAGES * 6).view(NUM_IMAGES, 6) % NUM_CODES


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"generator": [torch.Generator().manual_seed(number) for number in range(NUM_IMAGES)]},
        {"guidance_scale": 3.0, "negative_prompt": [CAPTIONS[3], "", "a"], "temperature": 0.9, "top_k": 9},
        {"image": random_pictures(3), "num_prefix_rows": 2},
        {"image": random_pictures(1), "num_prefix_rows": 1, "guidance_scale": 2.0},
        {"latents": EACH_OTHER},
        {"latents": EACH_OTHER[:, :4].view(-1, 1, 4), "guidance_scale": 2.0, "top_p": 0.9},
    ],
    ids=["plain", "generators", "guidance", "images", "image-guidance", "latents", "latents-guidance"],
)
def test_the_same_pictures_in_any_chunks(pipe, arguments):
    sources = arguments.get("generator", [])
    states = [source.get_state() for source in sources]

    def draw_again(**kwargs):
        for source, state in zip(sources, states, strict=True):
            source.set_state(state)
        return draw(pipe, **arguments, **kwargs)

    whole = draw_again()
    num_cells = pipe.num_timesteps
    assert len({tuple(tokens.flatten().tolist()) for tokens in whole}) == NUM_IMAGES
    for max_batch_size, num_chunks in {1: 9, 2: 6, 4: 3, 6: 2, 10**9: 1}.items():
        assert torch.equal(draw_again(max_batch_size=max_batch_size), whole), max_batch_size
        assert pipe.num_timesteps == num_chunks * num_cells


@pytest.mark.parametrize(
    ("arguments", "num_rows"),
    [
        ({}, {1: 9, 2: 6, 3: 3, 6: 3, None: 3}),
        ({"guidance_scale": 2.0}, {2: 12, 3: 6, None: 6}),
        ({"image": random_pictures(3), "num_prefix_rows": 2}, {2: 6, 3: 3, None: 3}),
    ],
    ids=["plain", "guidance", "images"],
)
def test_prompts_are_read_as_seldom_as_chunks_allow(pipe, arguments, num_rows):
    read = []

    def count(module, args, kwargs):
        input_ids = args[0] if args else kwargs["input_ids"]
        read.append(len(input_ids) if input_ids.shape[1] > 1 else 0)

    handle = pipe.prior.register_forward_pre_hook(count, with_kwargs=True)
    for max_batch_size, expected in num_rows.items():
        read.clear()
        draw(pipe, max_batch_size=max_batch_size, **arguments)
        assert sum(read) == expected, max_batch_size
    handle.remove()


def test_pictures_are_decoded_and_ranked_in_chunks(pipe):
    sizes = []
    handle = pipe.dvae.decoder.register_forward_pre_hook(lambda module, args: sizes.append(len(args[0])))
    whole = draw(pipe, output_type="pt")
    for max_batch_size in (1, 2, 4, 9):
        sizes.clear()
        torch.testing.assert_close(draw(pipe, output_type="pt", max_batch_size=max_batch_size), whole)
        assert max(sizes) == max_batch_size and sum(sizes) == NUM_IMAGES
    handle.remove()
    ranked = build_pipeline(**build_reranker())
    sizes.clear()
    ranked.reranker.register_forward_pre_hook(
        lambda module, args, kwargs: sizes.append(len(kwargs["pixel_values"])), with_kwargs=True
    )
    outputs = [
        ranked(PROMPTS, num_images_per_prompt=3, generator=torch.Generator().manual_seed(0), max_batch_size=size)
        for size in (None, 2)
    ]
    assert sizes == [3, 3, 3, 2, 1, 2, 1, 2, 1]
    torch.testing.assert_close(outputs[0].scores, outputs[1].scores)
    for one, other in zip(outputs[0].images, outputs[1].images, strict=True):
        assert np.abs(np.asarray(one, dtype=int) - np.asarray(other)).max() <= 1


@pytest.mark.parametrize("max_batch_size", [0, -1, 1.5, "4"])
def test_chunk_sizes_that_are_none_are_refused(pipe, max_batch_size):
    calls = []
    handle = pipe.prior.register_forward_pre_hook(lambda *args: calls.append(args))
    with pytest.raises(ValueError, match=f"`max_batch_size` is {max_batch_size!r}; expected a whole number from 1"):
        draw(pipe, max_batch_size=max_batch_size)
    with pytest.raises(ValueError, match=f"`max_batch_size` is {max_batch_size!r}; expected a whole number from 1"):
        pipe.decode_tokens(torch.zeros(1, pipe.prior.config.num_image_tokens, dtype=torch.int64), max_batch_size)
    handle.remove()
    assert calls == []


# ------------------------------------------------------------------------- callbacks, interrupts, the bar over chunks


def test_the_callback_sees_all_pictures_at_each_step_of_each_chunk(pipe):
    seen = []
    latents = EACH_OTHER[:, :4]
    whole = draw(pipe, latents=latents)
    tokens = draw(
        pipe,
        latents=latents,
        max_batch_size=4,
        callback_on_step_end=lambda called, step, cell, tensors: seen.append((step, cell, tensors["latents"])),
    )
    assert torch.equal(tokens, whole) and pipe.num_timesteps == 36
    assert [(step, cell) for step, cell, _ in seen] == [(step, 4 + step % 12) for step in range(36)]
    for step, cell, shown in seen:
        first = step // 12 * 3
        expected = whole.flatten(1).clone()
        expected[first + 3 :, 4:] = -1
        expected[first : first + 3, cell + 1 :] = -1
        assert torch.equal(shown.flatten(1), expected)


def test_a_callbacks_changes_are_the_same_in_any_chunks(pipe):
    def set_all(called, step, cell, tensors):
        if cell == 5:
            tensors["latents"][:, 1, 1] = 2
        return tensors

    def set_one(called, step, cell, tensors):
        if cell == 5:
            tensors["latents"][7, 1, 1] = (tensors["latents"][7, 1, 1] + 1) % NUM_CODES
        return tensors

    plain = draw(pipe)
    for callback in (set_all, set_one):
        whole = draw(pipe, callback_on_step_end=callback)
        assert not torch.equal(whole, plain)
        for max_batch_size in (2, 6):
            chunked = draw(pipe, callback_on_step_end=callback, max_batch_size=max_batch_size)
            assert torch.equal(chunked, whole), (callback, max_batch_size)


@pytest.mark.parametrize("row", [0, 4, 8])  # drawn already, being drawn, to be drawn
def test_a_callback_may_not_change_another_cell_of_any_picture(pipe, row):
    def callback(called, step, cell, tensors):
        if step == NUM_CELLS + 6:
            tensors["latents"][row, 0, 0] = (tensors["latents"][row, 0, 0] + 1) % NUM_CODES
        return tensors

    with pytest.raises(ValueError, match="cell 6 only"):
        draw(pipe, callback_on_step_end=callback, max_batch_size=3)


def test_an_interrupt_ends_all_chunks(pipe):
    steps = []

    def callback(called, step, cell, tensors):
        steps.append(step)
        called._interrupt = step == 12 + 3
        return tensors

    whole = draw(pipe, latents=EACH_OTHER[:, :4]).flatten(1)
    tokens = draw(pipe, latents=EACH_OTHER[:, :4], callback_on_step_end=callback, max_batch_size=3).flatten(1)
    assert steps == list(range(16)) and pipe.interrupt and pipe.num_timesteps == 36
    assert torch.equal(tokens[:3], whole[:3]) and torch.equal(tokens[3:6, :8], whole[3:6, :8])
    assert torch.equal(tokens[6:, :4], EACH_OTHER[6:, :4])
    assert len(torch.cat([tokens[3:6, 8:].flatten(), tokens[6:, 4:].flatten()]).unique()) == 1


def test_the_bar_counts_the_tokens_of_all_chunks(pipe, capsys):
    pipe.set_progress_bar_config(mininterval=0)
    try:
        draw(pipe, latents=EACH_OTHER, max_batch_size=2)
        assert "60/60" in capsys.readouterr().err
    finally:
        pipe.set_progress_bar_config(disable=True)


# -------------------------------------------------------------------------------------------------- pictures so far


def test_pictures_so_far_are_those_of_an_interrupt_here(pipe):
    shown = {}

    def callback(called, step, cell, tensors):
        if (cell + 1) % GRID == 0:
            shown[step] = called.decode_partial(tensors["latents"], output_type="pt")
        return tensors

    whole = draw(pipe, output_type="pt", callback_on_step_end=callback, max_batch_size=6)
    assert list(shown) == [3, 7, 11, 15, 19, 23, 27, 31]
    torch.testing.assert_close(shown[31], whole)
    for interrupted in (7, 19):

        def stop(called, step, cell, tensors, interrupted=interrupted):
            called._interrupt = step == interrupted

        expected = draw(pipe, output_type="pt", callback_on_step_end=stop, max_batch_size=6)
        torch.testing.assert_close(shown[interrupted], expected)
        assert not torch.allclose(shown[interrupted], whole)


def test_pictures_so_far_are_decoded_on_demand_only(pipe):
    calls = []
    handles = [
        module.register_forward_pre_hook(lambda *args: calls.append(args))
        for module in (pipe.dvae.encoder, pipe.dvae.decoder)
    ]
    rows = []

    def show_rows(called, step, cell, tensors):
        assert calls == []
        if cell == 7:
            rows.extend(called.decode_partial(tensors["latents"][:1]))
            assert len(calls) == 2  # the grey picture's token, and one decoding
            calls.clear()

    draw(pipe, callback_on_step_end=show_rows)
    for handle in handles:
        handle.remove()
    assert calls == [] and [picture.size for picture in rows] == [(16, 16)]


def test_what_is_not_drawn_is_grey(pipe):
    tokens = torch.arange(NUM_CELLS).view(1, GRID, GRID)
    partial = tokens.clone()
    partial[0, 2:] = -1
    grey = pipe.dvae.encode(torch.full((1, 3, 16, 16), 0.5)).tokens.flatten().tolist()
    filled = tokens.clone()
    filled[0, 2:] = max(sorted(set(grey)), key=grey.count)
    pictures = pipe.decode_partial(partial, output_type="pt")
    assert torch.equal(pictures, pipe.dvae.decode(filled).sample) and not pictures.requires_grad
    assert torch.equal(pipe.decode_partial(tokens, output_type="pt"), pipe.dvae.decode(tokens).sample)
    assert pipe.decode_partial(partial, output_type="np").shape == (1, 16, 16, 3)


@pytest.mark.parametrize(
    ("latents", "words"),
    [
        (torch.zeros(1, 16, dtype=torch.long), r"B x 4 x 4 tokens; got \(1, 16\)"),
        (torch.zeros(1, 2, 4, dtype=torch.long), r"got \(1, 2, 4\)"),
        (torch.full((1, 4, 4), 16), r"\[0, 16\)"),
        (torch.zeros(1, 4, 4), "torch.float32"),
    ],
)
def test_pictures_so_far_of_no_tokens_are_refused(pipe, latents, words):
    with pytest.raises(ValueError, match=words):
        pipe.decode_partial(latents)


# ------------------------------------------------------------------------------------------------------------- memory


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
    assert torch.equal(draw(pipe), whole) and pipe.num_timesteps == NUM_CELLS


def test_buffers_are_kept_for_the_next_call_but_not_after_chunks(pipe):
    draw(pipe)
    assert kept_bytes(pipe.prior) == cache_bytes(pipe.prior.config, len(PROMPTS), NUM_IMAGES)
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
