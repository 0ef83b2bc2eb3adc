"""The drawing loop against an independent one without a cache, its filters by their definitions, and its seeds."""

import copy
import gc
import math
import pickle
import weakref

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import ATTENTION_TYPES, CAPTIONS, build_prior, build_tokenizer
from transformers import GenerationConfig
from transformers.utils import logging

from hf_dalle import sampling
from hf_dalle.cache_dalle import cache_bytes
from hf_dalle.sampling import (
    choose_tokens,
    draw_image_tokens,
    drop_kept,
    filter_logits,
    kept_bytes,
    resolve_settings,
    spawn_generators,
)
from hf_dalle.tokenization_dalle import encode_captions


NUM_CELLS, NUM_CODES = 16, 16
LAYOUTS = [[name] * 2 for name in ATTENTION_TYPES] + [list(ATTENTION_TYPES)]


@pytest.fixture(scope="module")
def prior():
    return build_prior()


def encode(*captions):
    encoded = encode_captions(build_tokenizer(), list(captions), 12)
    return encoded["input_ids"], encoded["attention_mask"]


def seeds(*numbers):
    return [torch.Generator().manual_seed(number) for number in numbers]


def draw(prior, texts, generators, **kwargs):
    """All cells at once: B * n x N."""
    *_, (_, tokens) = draw_image_tokens(prior, *texts, generators=generators, **kwargs)
    return tokens


def plain_distribution(logits, temperature, top_k, top_p):
    """The distribution that is drawn from, written out for one row of logits."""
    scaled = [float(x) / temperature for x in logits]
    weights = [math.exp(x - max(scaled)) for x in scaled]
    by_likelihood = sorted(range(len(weights)), key=lambda token: (-scaled[token], token))
    if top_k:
        by_likelihood = by_likelihood[:top_k]
    total, share, kept = sum(weights[token] for token in by_likelihood), 0.0, []
    for token in by_likelihood:
        if share >= top_p:
            break
        kept.append(token)
        share += weights[token] / total
    return {token: weights[token] / sum(weights[token] for token in kept) for token in sorted(kept)}


@torch.no_grad()
def plain_draw(prior, texts, generator, prefix=(), negative=None, guidance_scale=1.0, **filters):
    """One image, drawn from whole forward passes without a cache."""
    filters = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, **filters}
    uniforms = torch.rand(NUM_CELLS, dtype=torch.float64, generator=generator)
    tokens = list(prefix)
    while len(tokens) < NUM_CELLS:
        drawn = torch.tensor([tokens], dtype=torch.long)
        logits = prior(**prior.join_stream(*texts, drawn)).image_logits[0, -1].double()
        if guidance_scale > 1:
            uncond = prior(**prior.join_stream(*negative, drawn)).image_logits[0, -1].double()
            logits = uncond + guidance_scale * (logits - uncond)
        distribution = plain_distribution(logits, **filters)
        cumulative = np.cumsum(list(distribution.values()))
        tokens.append(list(distribution)[np.argmax(cumulative > uniforms[len(tokens)].item())])
    return tokens


# ------------------------------------------------------------------------------------------------ the loop is exact


@pytest.mark.parametrize("attention_types", LAYOUTS, ids="-".join)
@pytest.mark.parametrize("filters", [{}, {"top_k": 1}, {"temperature": 0.7, "top_k": 9, "top_p": 0.9}], ids=str)
def test_equals_a_loop_without_cache(attention_types, filters):
    prior = build_prior(attention_types=attention_types)
    tokens = draw(prior, encode(*CAPTIONS[:2]), seeds(0, 1, 2, 3), num_images_per_prompt=2, **filters)
    for row, seed in enumerate(range(4)):
        expected = plain_draw(prior, encode(CAPTIONS[row // 2]), seeds(seed)[0], **filters)
        assert tokens[row].tolist() == expected


@pytest.mark.parametrize("attention_types", LAYOUTS, ids="-".join)
def test_greedy_equals_generate(attention_types):
    prior = build_prior(attention_types=attention_types)
    text_ids, mask = encode(*CAPTIONS)
    generated = prior.generate(text_ids, attention_mask=mask, do_sample=False)
    tokens = draw(prior, (text_ids, mask), seeds(*range(4)), top_k=1)
    assert torch.equal(tokens, generated[:, -NUM_CELLS:] - prior.config.image_token_offset)


@pytest.mark.parametrize("attn_implementation", ["eager", "sdpa"])
def test_guidance_is_the_formula(attn_implementation):
    prior = build_prior(attn_implementation=attn_implementation)
    texts, negative = encode(*CAPTIONS[:2]), encode("", CAPTIONS[2])
    tokens = draw(
        prior,
        texts,
        seeds(0, 1, 2, 3),
        num_images_per_prompt=2,
        guidance_scale=3.0,
        negative_text_ids=negative[0],
        negative_attention_mask=negative[1],
        top_p=0.95,
    )
    for row in range(4):
        one = [part[row // 2 : row // 2 + 1] for part in (*texts, *negative)]
        expected = plain_draw(prior, one[:2], seeds(row)[0], negative=one[2:], guidance_scale=3.0, top_p=0.95)
        assert tokens[row].tolist() == expected
    unguided = draw(prior, texts, seeds(0, 1, 2, 3), num_images_per_prompt=2, top_p=0.95)
    assert not torch.equal(tokens, unguided)


def test_the_text_is_read_once_a_prompt(prior):
    shapes = []
    handle = prior.register_forward_pre_hook(
        lambda module, args, kwargs: shapes.append(tuple(args[0].shape)), with_kwargs=True
    )
    texts, negative = encode(*CAPTIONS[:2]), encode("", "")
    draw(prior, texts, seeds(*range(6)), num_images_per_prompt=3)
    assert shapes == [(2, 13)] + [(6, 1)] * (NUM_CELLS - 1)
    shapes.clear()
    prefix = torch.zeros(2, 5, dtype=torch.long)
    guided = {"guidance_scale": 2.0, "negative_text_ids": negative[0], "negative_attention_mask": negative[1]}
    draw(prior, texts, seeds(*range(6)), num_images_per_prompt=3, image_prefix=prefix, **guided)
    assert shapes == [(4, 18)] + [(12, 1)] * (NUM_CELLS - 6)
    shapes.clear()
    prefix = torch.zeros(6, 5, dtype=torch.long)  # one an image
    draw(prior, texts, seeds(*range(6)), num_images_per_prompt=3, image_prefix=prefix, **guided)
    assert shapes == [(4, 12), (12, 6)] + [(12, 1)] * (NUM_CELLS - 6)
    handle.remove()


def test_a_picture_does_not_depend_on_its_batch(prior):
    together = draw(prior, encode(*CAPTIONS), seeds(*range(8)), num_images_per_prompt=2)
    for row in range(8):
        alone = draw(prior, encode(CAPTIONS[row // 2]), seeds(row))
        assert torch.equal(together[row], alone[0])
    assert len(set(map(tuple, together.tolist()))) == 8


def test_dtypes_draw_tokens(prior):
    for dtype in (torch.bfloat16, torch.float64):
        tokens = draw(build_prior().to(dtype), encode(CAPTIONS[0]), seeds(0))
        assert tokens.min() >= 0 and tokens.max() < NUM_CODES
    assert torch.equal(tokens, draw(prior, encode(CAPTIONS[0]), seeds(0))), "float64 draws what float32 draws"


def test_logits_of_halves_are_drawn_from_in_float64():
    prior, texts = build_prior(initializer_range=0.05, image_vocab_size=4096).bfloat16(), encode(CAPTIONS[0])
    _, tokens = next(draw_image_tokens(prior, *texts, generators=seeds(*range(500)), num_images_per_prompt=500))
    with torch.no_grad():
        logits = prior(**prior.join_stream(*texts), logits_to_keep=1).image_logits[0, -1]
    cumulative = np.cumsum(logits.double().softmax(-1).numpy())
    for row, generator in enumerate(seeds(*range(500))):
        uniform = torch.rand(NUM_CELLS, dtype=torch.float64, generator=generator)[0].item()
        assert tokens[row, 0] == np.argmax(cumulative > uniform * cumulative[-1])


def test_overflowing_logits_are_an_error_by_the_end_of_the_row():
    prior, cells = build_prior(), []
    with torch.no_grad():
        prior.model.norm.weight.fill_(torch.inf)
    with pytest.raises(ValueError, match="up to cell 3 are not finite"):
        cells.extend(cell for cell, _ in draw_image_tokens(prior, *encode(CAPTIONS[0]), generators=seeds(0)))
    assert cells == [0, 1, 2] and kept_bytes(prior) == 0


# ------------------------------------------------------------------------------------------- buffers and compilation


def test_buffers_are_made_once_and_freed_with_the_prior():
    prior, texts = build_prior(), encode(*CAPTIONS[:2])
    assert kept_bytes(prior) == 0
    first = draw(prior, texts, seeds(0, 1, 2, 3), num_images_per_prompt=2)
    assert kept_bytes(prior) == cache_bytes(prior.config, 2, 4)
    kept = sampling._kept_caches[prior]
    addresses = [layer.keys.data_ptr() for layer in kept.layers]
    assert torch.equal(draw(prior, texts, seeds(0, 1, 2, 3), num_images_per_prompt=2), first)
    assert sampling._kept_caches[prior] is kept and [layer.keys.data_ptr() for layer in kept.layers] == addresses
    draw(prior, encode(CAPTIONS[0]), seeds(0))
    assert kept_bytes(prior) == cache_bytes(prior.config, 1, 1)
    draw(prior.double(), encode(CAPTIONS[0]), seeds(0))
    assert kept_bytes(prior) == cache_bytes(prior.config, 1, 1, torch.float64)
    copy.deepcopy(prior), pickle.dumps(prior)
    drop_kept(prior)
    assert kept_bytes(prior) == 0
    draw(prior, texts, seeds(0, 1))
    dead = weakref.ref(sampling._kept_caches[prior])
    del prior, kept
    gc.collect()
    assert dead() is None


def test_drawings_at_the_same_time_do_not_share_buffers(prior):
    texts = [encode(caption) for caption in CAPTIONS[:2]]
    expected = [draw(prior, text, seeds(index)) for index, text in enumerate(texts)]
    drawings = [draw_image_tokens(prior, *text, generators=seeds(index)) for index, text in enumerate(texts)]
    *_, ((_, one), (_, other)) = zip(*drawings, strict=True)
    assert torch.equal(one, expected[0]) and torch.equal(other, expected[1])
    drawing = draw_image_tokens(prior, *texts[0], generators=seeds(0))
    next(drawing)
    drop_kept(prior)
    del drawing  # half way
    assert kept_bytes(prior) == cache_bytes(prior.config)
    assert torch.equal(draw(prior, texts[0], seeds(0)), expected[0])


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled_draws_the_same_tokens(backend):
    prior, texts, negative = build_prior(), encode(*CAPTIONS[:2]), encode("", "")
    guided = {"guidance_scale": 2.0, "negative_text_ids": negative[0], "negative_attention_mask": negative[1]}
    cases = [{}, guided, {"image_prefix": torch.arange(10).view(2, 5)}]
    calls = [(prior, texts, seeds(0, 1, 2, 3)) for _ in cases]
    expected = [draw(*call, num_images_per_prompt=2, **case) for call, case in zip(calls, cases, strict=True)]
    prior.compile(backend=backend)
    for case, tokens in zip(cases, expected, strict=True):
        assert torch.equal(draw(prior, texts, seeds(0, 1, 2, 3), num_images_per_prompt=2, **case), tokens)
    assert prior.model.run_layer.is_static, "it did not fall back"
    copied = pickle.loads(pickle.dumps(copy.deepcopy(prior)))
    assert copied.model.run_layer.options == {"backend": backend}


def test_where_compiling_fails_there_is_one_warning_and_the_same_picture(caplog):
    def fail(graph, inputs):
        raise RuntimeError("no compiler")

    prior, texts = build_prior(), encode(CAPTIONS[0])
    expected = draw(prior, texts, seeds(0))
    prior.compile(backend=fail)
    logger = logging.get_logger("hf_dalle.generation_dalle_prior")
    logger.addHandler(caplog.handler)
    propagate, logger.propagate = logger.propagate, False
    try:
        assert torch.equal(draw(prior, texts, seeds(0)), expected)
        assert torch.equal(draw(prior, texts, seeds(0)), expected)
    finally:
        logger.removeHandler(caplog.handler)
        logger.propagate = propagate
    warnings = [record.getMessage() for record in caplog.records if "Compiling failed" in record.getMessage()]
    assert len(warnings) == 1 and "no compiler" in warnings[0]
    assert copy.deepcopy(prior).model.run_layer.is_static, "a copy tries again"


# ------------------------------------------------------------------------------------------ prefixes and interventions


def test_a_prefix_is_kept_and_does_not_shift_the_noise(prior):
    texts = encode(*CAPTIONS[:2])
    whole = draw(prior, texts, seeds(0, 1))
    for length in (1, 4, 15):
        again = draw(prior, texts, seeds(0, 1), image_prefix=whole[:, :length])
        assert torch.equal(again, whole)
    prefix = torch.arange(8).view(2, 4)
    tokens = draw(prior, texts, seeds(0, 1, 2, 3), num_images_per_prompt=2, image_prefix=prefix)
    assert torch.equal(tokens[:, :4], prefix.repeat_interleave(2, dim=0))
    for row in range(4):
        one = encode(CAPTIONS[row // 2])
        assert tokens[row].tolist() == plain_draw(prior, one, seeds(row)[0], prefix=prefix[row // 2].tolist())


def test_a_prefix_an_image(prior):
    texts, negative = encode(*CAPTIONS[:2]), encode("", "")
    guided = {"guidance_scale": 2.0, "negative_text_ids": negative[0], "negative_attention_mask": negative[1]}
    for kwargs in ({}, guided):
        whole = draw(prior, texts, seeds(0, 1, 2, 3), num_images_per_prompt=2, **kwargs)
        prefix = whole[:, :5]
        again = draw(prior, texts, seeds(0, 1, 2, 3), num_images_per_prompt=2, image_prefix=prefix, **kwargs)
        assert torch.equal(again, whole)


def test_yields_after_each_cell_and_goes_on_from_changed_tokens(prior):
    texts, cells, has_grad = encode(CAPTIONS[0]), [], []
    handle = prior.register_forward_pre_hook(lambda *args: has_grad.append(torch.is_grad_enabled()))
    for cell, tokens in draw_image_tokens(prior, *texts, generators=seeds(0)):
        cells.append(cell)
        assert (tokens[:, : cell + 1] >= 0).all() and (tokens[:, cell + 1 :] == -1).all()
        assert torch.is_grad_enabled()
        if cell == 2:
            tokens[:, 2] = (tokens[:, 2] + 5) % NUM_CODES
    handle.remove()
    assert cells == list(range(NUM_CELLS)) and not any(has_grad)
    expected = plain_draw(prior, texts, seeds(0)[0], prefix=tokens[0, :3].tolist())
    assert tokens[0].tolist() == expected != draw(prior, texts, seeds(0))[0].tolist()


@pytest.mark.parametrize(
    ("kwargs", "words"),
    [
        ({"generators": []}, "0 `generators` for 1"),
        ({"guidance_scale": 2.0}, "negative_text_ids"),
        ({"guidance_scale": 0.5}, "`guidance_scale` is 0.5"),
        ({"temperature": 0.0}, "`temperature` is 0.0"),
        ({"top_p": 0.0}, "`top_p` is 0.0"),
        ({"image_prefix": torch.zeros(1, 16, dtype=torch.long)}, "1 x 16.*fewer than the grid's 16"),
        ({"image_prefix": torch.zeros(3, 4, dtype=torch.long)}, "3 x 4"),
        ({"image_prefix": torch.full((1, 4), 16)}, r"\[0, 16\)"),
    ],
)
def test_what_does_not_fit_is_refused_before_drawing(prior, kwargs, words):
    with pytest.raises(ValueError, match=words):
        draw_image_tokens(prior, *encode(CAPTIONS[0]), **{"generators": seeds(0), **kwargs})


# ------------------------------------------------------------------------------------------------------------- seeds


def test_children_do_not_depend_on_how_many_there_are():
    def numbers(generators):
        return [torch.rand(3, generator=child).tolist() for child in generators]

    four = numbers(spawn_generators(torch.Generator().manual_seed(7), 4))
    assert numbers(spawn_generators(torch.Generator().manual_seed(7), 1)) == four[:1]
    source = torch.Generator().manual_seed(7)
    assert numbers(spawn_generators(source, 2)) + numbers(spawn_generators(source, 2)) == four
    assert numbers(spawn_generators(seeds(7, 8), 2))[0] == four[0], "one generator an image"
    assert len({tuple(row) for row in four}) == 4


def test_without_a_generator_torchs_own_counts():
    with torch.random.fork_rng():
        children = []
        for _ in range(2):
            torch.manual_seed(5)
            children.append([child.initial_seed() for child in spawn_generators(None, 3)])
    assert children[0] == children[1] and len(set(children[0])) == 3


@pytest.mark.parametrize("generator", [0, [None], [torch.Generator(), 3], seeds(0, 1, 2)])
def test_wrong_generators_are_refused(generator):
    with pytest.raises(ValueError, match="`generator`"):
        spawn_generators(generator, 2 if isinstance(generator, list) and len(generator) > 1 else 1)


# ------------------------------------------------------------------------------------------- filters and the draw


logits_lists = st.lists(st.floats(-8, 8, width=32), min_size=1, max_size=12)


@settings(max_examples=300, deadline=None)
@given(logits_lists, st.floats(0.1, 4), st.integers(0, 14), st.floats(0.01, 1))
def test_filters_by_definition(logits, temperature, top_k, top_p):
    expected = plain_distribution(logits, temperature, top_k, top_p)
    filtered = filter_logits(torch.tensor([logits], dtype=torch.float64), temperature, top_k, top_p)
    probabilities = filtered.softmax(-1)[0]
    # Sums of the same numbers in another order may differ in the last bit, and with it the last token kept.
    shares = np.cumsum(sorted(plain_distribution(logits, temperature, top_k, 1.0).values(), reverse=True))
    if np.abs(shares - top_p).min() > 1e-12:
        assert {i for i, p in enumerate(probabilities) if p > 0} == set(expected)
        for token, probability in expected.items():
            assert probabilities[token].item() == pytest.approx(probability, abs=1e-12)


def test_filters_break_ties_by_the_lowest_ids():
    assert filter_logits(torch.zeros(1, 4), top_k=2).tolist() == [[0, 0, -torch.inf, -torch.inf]]
    assert filter_logits(torch.zeros(1, 4), top_p=0.5).tolist() == [[0, 0, -torch.inf, -torch.inf]]
    assert filter_logits(torch.zeros(1, 4), top_k=9).tolist() == [[0, 0, 0, 0]]
    assert filter_logits(torch.zeros(1, 8192), top_k=8).isfinite().nonzero()[:, 1].tolist() == list(range(8))


def test_draw_inverts_the_cumulative_distribution():
    table = torch.tensor([0.0, 0.1, 0.4, 0.0, 0.3, 0.2, 0.0], dtype=torch.float64)
    uniforms = (torch.arange(1000, dtype=torch.float64) + 0.5) / 1000
    tokens = choose_tokens(table.log().expand(1000, -1), uniforms)
    assert torch.equal(tokens, tokens.sort().values)
    assert tokens.bincount(minlength=7).tolist() == [0, 100, 400, 0, 300, 200, 0]


@settings(max_examples=200, deadline=None)
@given(logits_lists, st.lists(st.booleans(), min_size=12, max_size=12))
def test_draw_never_leaves_what_is_kept(logits, removed):
    row = torch.tensor(logits, dtype=torch.float64)
    row[torch.tensor(removed[: len(logits)])] = -torch.inf
    kept = (row > -torch.inf).nonzero().flatten().tolist()
    if kept:
        ends = torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64)
        assert choose_tokens(row.expand(2, -1), ends).tolist() == [kept[0], kept[-1]]


def test_first_cells_follow_the_priors_distribution(prior):
    texts = encode(CAPTIONS[0])
    with torch.no_grad():
        probabilities = prior(**prior.join_stream(*texts)).image_logits[0, -1].softmax(-1)
    generators = spawn_generators(torch.Generator().manual_seed(0), 4000)
    _, tokens = next(draw_image_tokens(prior, *texts, generators=generators, num_images_per_prompt=4000))
    frequencies = tokens[:, 0].bincount(minlength=NUM_CODES) / 4000
    # Half the expected sum of |difference| is near 0.5 * sqrt(2 / pi * K / n) = 0.025.
    assert (frequencies - probabilities).abs().sum() / 2 < 0.04


def test_settings_come_from_the_call_then_the_checkpoint_then_the_paper():
    paper = {"guidance_scale": 1.0, "temperature": 1.0, "top_k": 0, "top_p": 1.0}
    assert resolve_settings(GenerationConfig(top_k=0)) == paper
    saved = GenerationConfig(guidance_scale=3.0, temperature=0.9, top_k=64, top_p=0.95)
    assert resolve_settings(saved) == {"guidance_scale": 3.0, "temperature": 0.9, "top_k": 64, "top_p": 0.95}
    assert resolve_settings(saved, 1.0, None, 0) == {**resolve_settings(saved), "guidance_scale": 1.0, "top_k": 0}


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("temperature", [0, -1.0, math.inf, math.nan, "1"]),
        ("top_k", [-1, 0.5, "4"]),
        ("top_p", [0.0, 1.01, -0.1, math.nan, [1]]),
        ("guidance_scale", [0.0, -2, math.nan, "3"]),
    ],
)
def test_settings_outside_their_range_are_refused(name, values):
    for value in values:
        with pytest.raises(ValueError, match=f"`{name}` is "):
            resolve_settings(GenerationConfig(top_k=0), **{name: value})
