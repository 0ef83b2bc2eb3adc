"""`DalleCache`: rings against masks, cached against uncached states however the stream is fed, sizes, refusals."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import ATTENTION_TYPES, build_prior
from transformers import DynamicCache, StaticCache

from hf_dalle import DallePriorConfig
from hf_dalle.cache_dalle import DalleCache, cache_bytes, cache_bytes_read, open_windows, ring_layout
from hf_dalle.image_attention import image_attention_offsets


grids = {"grid_size": st.integers(1, 5), "kernel_size": st.sampled_from([1, 3, 5, 11])}


def build_shaped_prior(grid_size=4, kernel_size=3, text_length=3, **kwargs):
    sizes = {"image_grid_size": grid_size, "conv_kernel_size": kernel_size, "text_length": text_length}
    return build_prior(text_vocab_size=9, hidden_size=16, **sizes, **kwargs)


def draw_ids(prior, num_rows, seed=0):
    """Whole streams, text to last image state."""
    config, generator = prior.config, torch.Generator().manual_seed(seed)
    text = torch.randint(9, (num_rows, config.text_length), generator=generator)
    image = torch.randint(config.image_vocab_size, (num_rows, config.num_image_tokens), generator=generator)
    return prior.join_stream(text, image_tokens=image)["input_ids"][:, :-1]


def assert_same(prior, ids, states, first=0):
    with torch.no_grad():
        expected = prior.model(ids, use_cache=False).last_hidden_state[:, first:]
    torch.testing.assert_close(states, expected[:, : states.shape[1]], atol=2e-5, rtol=1e-4)


@torch.no_grad()
def feed(prior, cache, *chunks):
    return torch.cat([prior.model(ids, past_key_values=cache).last_hidden_state for ids in chunks], dim=1)


# ------------------------------------------------------------------------------------------------------- the rings


def test_rings_of_the_papers_grid():
    assert ring_layout("full", 32)[:2] == (1, 1024)
    assert ring_layout("row", 32)[:2] == (1, 33)
    assert ring_layout("column", 32)[:2] == (32, 32)
    assert ring_layout("conv", 32)[:2] == (1, 166)
    assert [ring_layout(name, 32).is_masked for name in ATTENTION_TYPES] == [False, False, False, True]


@settings(max_examples=100, deadline=None)
@given(st.sampled_from(ATTENTION_TYPES), *grids.values())
def test_a_ring_holds_what_the_mask_shows(attention_type, grid_size, kernel_size):
    layout = ring_layout(attention_type, grid_size, kernel_size)
    offsets, slots = image_attention_offsets(attention_type, grid_size, kernel_size), {}
    for state in range(grid_size**2):
        ring, place, num_filled = layout.locate(state)
        slot = ring * layout.ring_length + place
        assert layout.slots(state, state + 1, torch.device("cpu")).tolist() == [slot]
        slots[slot] = state
        read = {
            (place - other) % layout.ring_length: slots[ring * layout.ring_length + other]
            for other in range(num_filled)
        }
        seen = {read[step] for step in layout.steps if step in read}
        assert seen == {state - offset for offset in offsets if offset <= state}
        assert layout.is_masked or seen == set(read.values())
    assert len(slots) <= layout.num_slots <= grid_size**2


# ------------------------------------------------------------------------------------------------- cached = uncached


@settings(max_examples=15, deadline=None)
@given(
    *grids.values(),
    st.integers(1, 5),
    st.integers(1, 3),
    st.lists(st.integers(1, 60), max_size=4),
    st.sampled_from(["eager", "sdpa"]),
)
def test_states_are_the_same_however_they_are_fed(grid_size, kernel_size, text_length, num_rows, cuts, implementation):
    prior = build_shaped_prior(grid_size, kernel_size, text_length, attn_implementation=implementation)
    ids = draw_ids(prior, num_rows)
    cuts = sorted({cut for cut in cuts if cut < ids.shape[1]})
    one_at_a_time = [*cuts, *range(max(cuts, default=text_length), ids.shape[1])]
    for splits in (cuts, one_at_a_time):
        cache = DalleCache(prior.config)
        assert_same(prior, ids, feed(prior, cache, *filter(torch.numel, ids.tensor_split(splits, dim=1))))
        assert cache.get_seq_length() == ids.shape[1]


@settings(max_examples=12, deadline=None)
@given(*grids.values(), st.integers(1, 4), st.integers(1, 3), st.integers(1, 3), st.integers(0, 40), st.booleans())
def test_images_share_their_prompts_text(
    grid_size, kernel_size, text_length, num_prompts, num_images, prefix, is_static
):
    prior = build_shaped_prior(grid_size, kernel_size, text_length)
    ids = draw_ids(prior, num_prompts * num_images)
    start = min(text_length + prefix, ids.shape[1])
    ids[:, :start] = ids[::num_images, :start].repeat_interleave(num_images, dim=0)
    cache = DalleCache(prior.config, num_images_per_prompt=num_images)
    feed(prior, cache, ids[::num_images, :start])
    if is_static:
        prior.compile(backend="eager", disable=True)
    for position in range(start, ids.shape[1]):
        assert_same(prior, ids, feed(prior, cache, ids[:, position : position + 1]), position)
    assert cache.layers[0].text_keys.shape[0] == num_prompts and len(cache.layers[0].keys) == len(ids)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_dtypes(dtype):
    prior = build_shaped_prior().to(dtype)
    ids, cache = draw_ids(prior, 2), DalleCache(prior.config)
    states = feed(prior, cache, ids[:, :5], *ids[:, 5:].split(1, dim=1))
    expected = prior.model(ids, use_cache=False).last_hidden_state
    tolerance = 1e-5 if dtype == torch.float64 else 0.2
    torch.testing.assert_close(states, expected, atol=tolerance, rtol=tolerance)
    assert cache.layers[0].keys.dtype == dtype


def test_weights_can_be_had_of_one_state_too():
    prior = build_shaped_prior(attn_implementation="eager")
    ids = draw_ids(prior, 2)
    expected = prior.model(ids, output_attentions=True).attentions
    cache = DalleCache(prior.config)
    feed(prior, cache, ids[:, :-1])
    with torch.no_grad():
        output = prior.model(ids[:, -1:], past_key_values=cache, output_attentions=True)
    for found, right in zip(output.attentions, expected, strict=True):
        torch.testing.assert_close(found[:, :, 0], right[:, :, -1], atol=1e-5, rtol=1e-4)


def test_gradients_of_the_newest_states_are_right():
    prior = build_shaped_prior()
    ids = draw_ids(prior, 2)
    gradients = []
    for make in (DalleCache, lambda config: DynamicCache(config=config)):
        cache = make(prior.config)
        feed(prior, cache, ids[:, :-1])
        prior.zero_grad()
        prior.model(ids[:, -1:], past_key_values=cache).last_hidden_state.pow(3).sum().backward()
        gradients.append([p.grad.clone() for p in prior.model.layers.parameters()])
    for found, right in zip(*gradients, strict=True):
        torch.testing.assert_close(found, right, atol=1e-4, rtol=1e-4)


# --------------------------------------------------------------------------------------------------- what a Cache does


def test_reset_keeps_the_buffers_and_another_batch_makes_others():
    prior = build_shaped_prior()
    ids, cache = draw_ids(prior, 3), DalleCache(prior.config)
    with torch.inference_mode():
        prior.model(ids, past_key_values=cache)
    addresses = [layer.keys.data_ptr() for layer in cache.layers]
    cache.reset()
    assert cache.get_seq_length() == 0
    assert_same(prior, ids, feed(prior, cache, ids[:, :4], *ids[:, 4:].split(1, dim=1)))
    assert [layer.keys.data_ptr() for layer in cache.layers] == addresses
    for num_rows, num_images in ((2, 1), (1, 3)):
        cache.reset()
        cache.num_images_per_prompt = num_images
        feed(prior, cache, ids[:num_rows, :4])
        assert len(cache.layers[0].text_keys) == num_rows and len(cache.layers[0].keys) == num_rows * num_images
    with pytest.raises(ValueError, match="`reset\\(\\)` it first"):
        cache.num_images_per_prompt = 2


@pytest.mark.parametrize("num_images", [1, 2])
@pytest.mark.parametrize("length", [2, 9, 19])
def test_rows_are_reordered_selected_and_repeated(num_images, length):
    prior = build_shaped_prior(grid_size=5)
    ids = draw_ids(prior, 4)
    ids[:, :length] = ids[::num_images, :length].repeat_interleave(num_images, dim=0)
    prompts = ids[::num_images]
    for do, rows in (
        (lambda cache: cache.reorder_cache(torch.tensor([2, 0, 0, 3])), [2, 0, 0, 3]),
        (lambda cache: cache.batch_select_indices(torch.tensor([3, 1])), [3, 1]),
        (lambda cache: cache.batch_select_indices(torch.tensor([True, False, False, True])), [0, 3]),
        (lambda cache: cache.batch_repeat_interleave(3), [row for row in range(4) for _ in range(3)]),
    ):
        cache = DalleCache(prior.config, num_images)
        do(cache)  # nothing is in it yet
        cache.num_images_per_prompt = num_images
        feed(prior, cache, prompts[:, :length])
        do(cache)
        if length < prior.config.text_length and cache.num_images_per_prompt > 1:
            continue  # text goes on to be fed once a prompt
        expected = ids[rows]
        states = feed(prior, cache, *expected[:, length:].split(1, dim=1))
        assert_same(prior, expected, states, length)


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 19), st.integers(1, 19))
def test_crop_is_right_or_refused(length, num_removed):
    prior = build_shaped_prior()
    ids, cache = draw_ids(prior, 2), DalleCache(prior.config)
    feed(prior, cache, *ids[:, :length].split([min(3, length)] + [1] * (length - 3), dim=1))
    try:
        cache.crop(-num_removed)
    except ValueError as error:
        assert "cannot go back" in str(error) and cache.get_seq_length() == length
        assert num_removed > length or length > 3 + 5, "the smallest ring, the row layer's of 5, has lost nothing yet"
    else:
        assert cache.get_seq_length() == length - num_removed
        states = feed(prior, cache, *ids[:, length - num_removed :].split(1, dim=1))
        assert_same(prior, ids, states, ids.shape[1] - states.shape[1])
    assert not cache.is_croppable
    with pytest.raises(ValueError, match="as a negative one, not 2"):
        cache.crop(2)


# ------------------------------------------------------------------------------------------------------------- sizes


@pytest.mark.parametrize("num_prompts, num_images", [(1, 1), (2, 6)])
def test_bytes_are_those_of_the_buffers(num_prompts, num_images):
    prior = build_shaped_prior(grid_size=6, kernel_size=5).to(torch.bfloat16)
    cache = DalleCache(prior.config, num_images // num_prompts)
    assert cache.nbytes == 0
    ids = draw_ids(prior, num_images)
    feed(prior, cache, ids[:num_prompts, :4])
    assert cache.nbytes == cache_bytes(prior.config, num_prompts, num_images, torch.bfloat16)
    for state in range(1, 36):
        with torch.no_grad():
            windows = open_windows(cache, 1)
        num_read = sum(
            part.nbytes
            for window in windows
            for part in (
                window.text_keys,
                window.text_values,
                window.keys[:, :, window.ring],
                window.values[:, :, window.ring],
            )
        )
        assert num_read == cache_bytes_read(prior.config, state, num_prompts, num_images, torch.bfloat16)


def test_the_papers_layout_holds_and_reads_less_than_dense():
    sizes = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16}
    paper, dense = DallePriorConfig(**sizes), DallePriorConfig(**sizes, attention_types=["full"] * 24)
    assert cache_bytes(dense) == 24 * 2 * 1280 * 1024 * 4
    assert cache_bytes(paper) / cache_bytes(dense) < 0.45
    assert cache_bytes_read(paper, 1023) / cache_bytes_read(dense, 1023) < 0.25
    read, read_densely = (sum(cache_bytes_read(config, state) for state in range(1024)) for config in (paper, dense))
    assert read / read_densely < 0.40


# ---------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("other", "words"),
    [
        ({"grid_size": 5}, "image_grid_size 5, not 4"),
        ({"text_length": 4}, "text_length 4, not 3"),
        ({"kernel_size": 5}, "conv_kernel_size 5, not 3"),
        ({"attention_types": ["row"] * 4}, "attention_types"),
        ({"num_attention_heads": 4}, "num_attention_heads 4, not 2"),
    ],
)
def test_a_cache_of_another_model_is_refused(other, words):
    prior, cache = build_shaped_prior(), DalleCache(build_shaped_prior(**other).config)
    with pytest.raises(ValueError, match=words):
        prior(draw_ids(prior, 1), past_key_values=cache)
    assert cache.get_seq_length() == 0


@pytest.mark.parametrize(
    "make",
    [
        DalleCache,
        lambda config: DynamicCache(config=config),
        lambda config: StaticCache(config=config, max_cache_len=19),
    ],
)
def test_a_cache_of_another_batch_or_of_other_heads_is_refused(make):
    prior, other = build_shaped_prior(), build_shaped_prior(num_attention_heads=4)
    ids = draw_ids(prior, 2)
    for length in (2, 5):
        cache = make(prior.config)
        feed(prior, cache, ids[:, :length])
        with pytest.raises(ValueError, match="holds 2 rows, .* have 1, "):
            feed(prior, cache, ids[:1, length : length + 1])
        with pytest.raises(ValueError, match="of another model|2 heads and 8 channels .* have 2, 4 and 4"):
            feed(other, cache, ids[:, length : length + 1])


@pytest.mark.parametrize("num_states", [1, 2])
def test_a_cache_of_another_dtype_is_refused(num_states):
    prior = build_shaped_prior()
    ids, cache = draw_ids(prior, 2), DalleCache(prior.config)
    feed(prior, cache, ids[:, :5])
    with pytest.raises(ValueError, match="holds torch.float32 on cpu, the new states are torch.float64"):
        feed(prior.double(), cache, ids[:, 5 : 5 + num_states])
