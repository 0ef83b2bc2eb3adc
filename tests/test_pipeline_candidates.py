"""Many candidates: the same pictures in any chunks, and what a callback sees of them.

How many fit into memory is `test_candidates.py`'s.
"""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from tiny import CAPTIONS, build_pipeline, build_reranker

from hf_dalle.candidates import (
    split_candidates,
)


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
