"""The prior of DALL-E's reimplementations: masks, token shift, rotary angles, caches, streams, and its pipeline.

That it computes what the originals do is shown in tests/parity.
"""

import math

import pytest
import torch
from tiny import build_dvae, build_pipeline, build_prior, build_tokenizer
from transformers import AutoModelForCausalLM, DynamicCache

from hf_dalle import DalleFamilyPriorConfig, DalleFamilyPriorForCausalLM, DALLEPipeline
from hf_dalle.bordered_attention import bordered_attention_mask, bordered_layout
from hf_dalle.cache_dalle import DalleCache, cache_bytes
from hf_dalle.grid_rotary import rotary_table, rotate
from hf_dalle.sampling import draw_image_tokens, spawn_generators
from hf_dalle.token_shift import DalleShiftCache, ShiftedCells, count_shift_bytes, shift_tokens


DALLE_PYTORCH = {
    **{"start_token_id": 0, "attention_types": ["full", "axial_row", "column", "conv_like"], "hidden_act": "geglu"},
    **{"conv_kernel_size": 3, "use_rotary_embedding": True, "use_token_shift": True, "use_sandwich_norm": True},
    **{"use_max_norm": True, "head_dim": 14},
}
RUDALLE = {
    **{"attention_types": ["row", "column", "row", "conv_bordered"], "use_sandwich_norm": True, "use_head_norm": True},
    **{"conv_kernel_size": 3, "hidden_act": "gelu_pytorch_tanh", "attention_output_limit": 65504.0, "bos_token_id": 2},
}
RUDALLE_V2 = {
    **RUDALLE,
    **{"attention_types": ["row", "column", "row", "conv_wrapped"], "start_token_id": 2, "use_early_masks": True},
}
MINDALLE = {"use_position_pads": False}
KINDS = {"dalle-pytorch": DALLE_PYTORCH, "rudalle": RUDALLE, "rudalle-v2": RUDALLE_V2, "mindalle": MINDALLE}
each_kind = pytest.mark.parametrize("options", KINDS.values(), ids=KINDS)


def build_family_prior(seed=0, **options) -> DalleFamilyPriorForCausalLM:
    sizes = {
        **{"hidden_size": 34, "num_hidden_layers": 4, "num_attention_heads": 2, "text_vocab_size": 300},
        **{"text_length": 12, "image_vocab_size": 16, "image_grid_size": 4, "initializer_range": 0.3},
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return DalleFamilyPriorForCausalLM(DalleFamilyPriorConfig(**{**sizes, **options})).eval()


def draw_text(num_rows=2):
    text = torch.randint(1, 300, (num_rows, 12), generator=torch.Generator().manual_seed(1))
    attention_mask = torch.ones_like(text)
    attention_mask[0, 5:] = 0
    return text, attention_mask


# -------------------------------------------------------------------------------------------------------------- masks


@pytest.mark.parametrize(
    ("attention_type", "kernel_size", "cell", "picture"),
    [
        ("axial_row", 1, (2, 2), ["....", "....", "###.", "...."]),
        ("axial_row", 1, (2, 0), ["....", "....", "#...", "...."]),
        ("conv_like", 3, (2, 2), ["###.", "###.", "###.", "...."]),
        ("conv_like", 3, (2, 1), ["##..", "##..", "##..", "...."]),  # cut at the left border
        ("conv_like", 3, (1, 3), [".###", ".###", "....", "...."]),
        ("conv_bordered", 3, (2, 2), ["....", ".###", ".##.", "...."]),
        ("conv_bordered", 3, (2, 0), ["....", "##..", "#...", "...."]),
        ("conv_bordered", 3, (2, 3), ["....", "..##", "..##", "...."]),  # and at the right one
        ("conv_bordered", 5, (3, 1), ["....", "####", "####", "##.."]),
        ("conv_wrapped", 3, (2, 2), ["....", ".###", ".##.", "...."]),
        ("conv_wrapped", 3, (2, 0), ["....", "##.#", "#...", "...."]),  # from the right border
        ("conv_wrapped", 3, (2, 3), ["....", "#.##", "#.##", "...."]),
        ("conv_wrapped", 3, (3, 2), [".###", "....", ".###", ".##."]),  # the last row sees the first
    ],
)
def test_masks_are_these_pictures(attention_type, kernel_size, cell, picture):
    row = bordered_attention_mask(attention_type, 4, kernel_size)[4 * cell[0] + cell[1]]
    assert ["".join(".#"[seen] for seen in line) for line in row.view(4, 4).int().tolist()] == picture


@pytest.mark.parametrize(
    ("attention_type", "length"), [("axial_row", 8), ("conv_like", 19), ("conv_bordered", 10), ("conv_wrapped", 64)]
)
def test_a_ring_shows_each_cell_what_its_mask_says(attention_type, length):
    mask, layout = bordered_attention_mask(attention_type, 8, 3), bordered_layout(attention_type, 8, 3)
    assert layout.num_slots == length
    places = {}
    for cell in range(64):
        ring, place, num_filled = layout.locate(cell)
        places[place] = cell
        assert ring == 0 and layout.slots(cell, cell + 1, torch.device("cpu")).tolist() == [place]
        is_hidden = layout.hidden_places(cell, torch.device("cpu"))
        seen = {places[number] for number in (~is_hidden).nonzero()[:, 0].tolist()}
        assert seen == set(mask[cell].nonzero()[:, 0].tolist()) and num_filled == len(places)


# ------------------------------------------------------------------------------------------- token shift and rotations


def test_token_shift_is_its_definition():
    config = DalleFamilyPriorConfig(text_length=5, start_token_id=0, image_grid_size=3)
    states = torch.randn(2, 6 + 9, 10, generator=torch.Generator().manual_seed(0))
    shifted = shift_tokens(states, 0, config)
    for position in range(15):
        expected = states[:, position].clone()
        if position < 6:
            expected[:, :5] = states[:, position - 1, :5] if position else 0
        else:
            row, column = divmod(position - 6, 3)
            expected[:, :3] = states[:, position - 3, :3] if row else 0
            expected[:, 3:6] = states[:, position - 1, 3:6] if column else 0
        assert shifted[:, position].equal(expected)
    cells, pieces = ShiftedCells(), [(0, 6), (6, 7), (7, 11), (11, 15)]  # the text alone, then the image in pieces
    parts = [shift_tokens(states[:, start:stop], start, config, cells) for start, stop in pieces]
    assert torch.cat(parts, dim=1).equal(shifted)


def test_rotary_angles_are_those_of_place_row_and_column():
    cosine, sine = rotary_table(3, 4, 20)
    assert cosine.shape == (3 + 16, 18)
    words = [10000 ** (-2 * number / 6) for number in range(3)]
    pixels = [math.pi * (1 + 2 * number) for number in range(3)]
    cell = 3 + 4 * 2 + 1  # row 2, column 1
    angles = [8192 * word for word in words] + [pixel * (-1 + 2 * 2 / 3) for pixel in pixels]
    angles += [pixel * (-1 + 2 / 3) for pixel in pixels]
    angles = torch.tensor(angles).repeat_interleave(2)
    torch.testing.assert_close(cosine[cell], angles.cos(), atol=2e-3, rtol=0)  # 8192 has 10 bits after the point
    torch.testing.assert_close(sine[1, :6], torch.tensor(words).sin().repeat_interleave(2))
    outside = (-10 * torch.tensor(pixels * 2)).cos().repeat_interleave(2)
    torch.testing.assert_close(cosine[2, 6:], outside, atol=1e-4, rtol=0)
    states = torch.randn(2, 5, 20)
    turned = rotate(states, cosine[:5], sine[:5])
    pairs, expected = torch.view_as_complex(states[..., :18].unflatten(-1, (9, 2))), torch.complex(cosine, sine)
    expected = torch.view_as_real(pairs * expected[:5, ::2]).flatten(-2)
    torch.testing.assert_close(turned[..., :18], expected)
    assert turned[..., 18:].equal(states[..., 18:])


# ------------------------------------------------------------------------------------------------- streams and caches


@each_kind
@pytest.mark.parametrize("prefix_rows", [None, 2, 6], ids=["no-prefix", "a-prompt", "an-image"])
def test_what_is_drawn_from_a_cache_is_the_likeliest_of_the_whole_stream(options, prefix_rows):
    prior, (text, attention_mask) = build_family_prior(**options), draw_text()
    prefix = None
    if prefix_rows:
        prefix = torch.randint(16, (prefix_rows, 6), generator=torch.Generator().manual_seed(2))
    settings = {"generators": spawn_generators(None, 6), "num_images_per_prompt": 3, "top_k": 1}
    negative = {"guidance_scale": 2.0, "negative_text_ids": text.flip(0), "negative_attention_mask": attention_mask}
    for guidance in ({}, negative):
        drawing = draw_image_tokens(prior, text, attention_mask, image_prefix=prefix, **settings, **guidance)
        *_, (_, tokens) = drawing
        logits = []
        for ids in (text, text.flip(0)):
            rows = [part.repeat_interleave(3, dim=0) for part in (ids, attention_mask)]
            stream = prior.join_stream(*rows, tokens)["input_ids"]
            with torch.no_grad():
                logits.append(prior(stream[:, :-1], use_cache=False).image_logits)
        guided = logits[1] + 2.0 * (logits[0] - logits[1]) if guidance else logits[0]
        start = 0 if prefix is None else 6
        assert guided.argmax(dim=2)[:, start:].equal(tokens[:, start:])
        assert prefix is None or tokens[:, :6].equal(prefix.repeat_interleave(6 // prefix_rows, dim=0))


@each_kind
def test_states_in_pieces_have_the_logits_of_the_whole(options):
    prior, (text, attention_mask) = build_family_prior(**options), draw_text()
    image = torch.randint(16, (2, 16), generator=torch.Generator().manual_seed(3))
    stream = prior.join_stream(text, attention_mask, image)["input_ids"][:, :-1]
    start = prior.config.num_text_states
    caches = [prior.new_cache()]
    if not prior.config.use_token_shift:
        caches.append(DynamicCache(config=prior.config))
    with torch.no_grad():
        whole = prior(stream, use_cache=False).image_logits
        for cache in caches:
            bounds = [0, start + 2, start + 3, start + 9, start + 10, stream.shape[1]]
            parts = [
                prior(stream[:, first:last], past_key_values=cache, use_cache=True).image_logits
                for first, last in zip(bounds[:-1], bounds[1:], strict=True)
            ]
            torch.testing.assert_close(torch.cat(parts, dim=1), whole, atol=1e-5, rtol=1e-5)


@each_kind
def test_gradients_reach_every_weight_and_losses_are_their_means(options):
    prior, (text, attention_mask) = build_family_prior(**options).train(), draw_text()
    stream = prior.join_stream(text, attention_mask, torch.randint(16, (2, 16)))["input_ids"]
    output = prior(stream, labels=stream)
    output.loss.backward()
    assert all(parameter.grad is not None for parameter in prior.parameters())
    config = prior.config
    assert output.text_logits.shape == (2, config.num_text_states - 1, config.image_token_offset)
    assert output.image_logits.shape == (2, 16, 16)
    log_probs = output.image_logits.log_softmax(dim=2)
    picked = log_probs.gather(2, (stream[:, -16:] - config.image_token_offset)[..., None])
    torch.testing.assert_close(output.image_loss, -picked.mean())
    torch.testing.assert_close(output.loss, output.text_loss / 8 + output.image_loss * 7 / 8)


def test_the_stream_has_start_pads_of_their_position_and_image_ids():
    prior = build_family_prior(**DALLE_PYTORCH)
    text, attention_mask = torch.full((1, 12), 7), torch.ones(1, 12, dtype=torch.long)
    text[0, 2], attention_mask[0, 10:] = 0, 0  # id 0 is a pad wherever it stands
    stream = prior.join_stream(text, attention_mask, torch.tensor([[3, 4]]))["input_ids"][0].tolist()
    assert stream == [0, 7, 7, 302, *[7] * 7, 310, 311, 312 + 3, 312 + 4]
    stream = build_family_prior(**MINDALLE).join_stream(text, attention_mask, torch.tensor([[3, 4]]))["input_ids"]
    assert stream[0].tolist() == [*text[0].tolist(), 303, 304]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"text_ids": torch.ones(1, 11, dtype=torch.long)}, "12 columns"),
        ({"attention_mask": torch.tensor([[0] + [1] * 11])}, "right only"),
        ({"text_ids": torch.full((1, 12), 300)}, r"Text ids must be in \[0, 300\)"),
        ({"image_tokens": torch.full((1, 2), 16)}, r"Image tokens must be in \[0, 16\)"),
        ({"image_tokens": torch.ones(1, 17, dtype=torch.long)}, "at most 16"),
    ],
)
def test_a_stream_that_cannot_be_is_refused(change, words):
    parts = {"text_ids": torch.ones(1, 12, dtype=torch.long), "attention_mask": torch.ones(1, 12, dtype=torch.long)}
    with pytest.raises(ValueError, match=words):
        build_family_prior().join_stream(**{**parts, **change})


def test_what_the_prior_cannot_do_is_refused():
    prior, (text, attention_mask) = build_family_prior(**DALLE_PYTORCH), draw_text()
    stream = prior.join_stream(text, attention_mask, torch.zeros(2, 16, dtype=torch.long))["input_ids"]
    with torch.no_grad():
        with pytest.raises(ValueError, match="the image is complete"):
            prior(stream)
        with pytest.raises(ValueError, match="read at once"):
            prior(stream[:, :5])
        with pytest.raises(ValueError, match="new_cache"):
            prior(stream[:, :14], past_key_values=DalleCache(prior.config), use_cache=True)
        with pytest.raises(ValueError, match="not `generate`"):
            prior.generate(stream[:, :13])
        cache = prior.new_cache()
        prior(stream[:, :14], past_key_values=cache, use_cache=True)
    for method, argument in (("crop", -1), ("reorder_cache", torch.tensor([0])), ("batch_repeat_interleave", 2)):
        with pytest.raises(ValueError, match="token shift"):
            getattr(cache, method)(argument)
    with pytest.raises(ValueError, match="'sparse'"):
        build_family_prior(attention_types=["sparse"] * 4)
    with pytest.raises(ValueError, match="`num_attention_heads` must be at least 1, got 0"):
        DalleFamilyPriorConfig(num_attention_heads=0)


def test_the_cache_has_the_bytes_that_are_counted_before():
    prior, (text, attention_mask) = build_family_prior(**DALLE_PYTORCH), draw_text()
    config, cache = prior.config, prior.new_cache()
    cache.num_images_per_prompt = 3
    stream = prior.join_stream(text, attention_mask)["input_ids"]
    with torch.no_grad():
        prior(stream, past_key_values=cache, use_cache=True)
        prior(torch.full((6, 1), config.image_token_offset), past_key_values=cache, use_cache=True)
    assert isinstance(cache, DalleShiftCache)
    counted = cache_bytes(config, num_prompts=2, num_images=6) + 6 * count_shift_bytes(config, torch.float32)
    assert cache.nbytes == counted
    assert count_shift_bytes(build_prior().config, torch.float32) == 0


# ------------------------------------------------------------------------------------------------------- the pipeline


def build_family_pipeline(options):
    tokenizer = build_tokenizer()
    if "bos_token_id" not in options:  # this one puts start-of-text first, which these priors do not expect
        tokenizer.backend_tokenizer.post_processor = None
        tokenizer.bos_token = None
    prior = build_family_prior(caption_dropout=0.1, **{**options, "bos_token_id": tokenizer.bos_token_id})
    return build_pipeline(prior=prior, tokenizer=tokenizer, dvae=build_dvae())


@each_kind
def test_a_pipeline_saves_loads_and_draws_the_same(options, tmp_path):
    pipe = build_family_pipeline(options)
    pipe.prior.generation_config.update(top_k=5)
    arguments = {"prompt": ["a red fox", "a blue bird"], "num_images_per_prompt": 2, "output_type": "latent"}
    drawn = pipe(**arguments, generator=torch.Generator().manual_seed(0)).images
    pipe.save_pretrained(tmp_path)
    loaded = DALLEPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    assert type(loaded.prior) is DalleFamilyPriorForCausalLM and loaded.prior.generation_config.top_k == 5
    assert loaded(**arguments, generator=torch.Generator().manual_seed(0)).images.equal(drawn)
    assert type(AutoModelForCausalLM.from_pretrained(tmp_path / "prior")) is DalleFamilyPriorForCausalLM
    guided = loaded("a red fox", "a blue bird", guidance_scale=3.0, max_batch_size=1, num_images_per_prompt=2)
    continued = loaded("a red fox", image=guided.images[0], num_prefix_rows=2, output_type="latent").images
    kept = loaded.dvae.encode(loaded.image_processor(guided.images[0])["pixel_values"]).tokens[:, :2]
    assert continued[:, :2].equal(kept)
