"""`DALLEPipeline` draws what its parts draw, whatever the batch, and does what its arguments say."""

import logging

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import CAPTIONS, build_dvae, build_pipeline, build_prior, build_reranker

from hf_dalle import DALLEPipelineOutput
from hf_dalle.reranking import score_images
from hf_dalle.sampling import draw_image_tokens, spawn_generators
from hf_dalle.tokenization_dalle import encode_captions


GRID, NUM_CELLS, NUM_CODES = 4, 16, 16


@pytest.fixture(scope="module")
def pipe():
    return build_pipeline()


def seed(number=0):
    return torch.Generator().manual_seed(number)


def tokens_of(pipe, prompt, **kwargs):
    return pipe(prompt, output_type="latent", **{"generator": seed(), **kwargs}).images


def random_picture(number=0, size=16):
    return Image.fromarray(np.random.default_rng(number).integers(0, 256, (size, size, 3), dtype=np.uint8))


def encode(pipe, *captions):
    encoded = encode_captions(pipe.tokenizer, list(captions), 12)
    return {"text_ids": encoded["input_ids"], "attention_mask": encoded["attention_mask"]}


# ---------------------------------------------------------------------------------------------------- what comes out


def test_tokens_are_the_samplers_and_pictures_the_dvaes(pipe):
    drawing = draw_image_tokens(
        pipe.prior,
        **encode(pipe, *CAPTIONS[:2]),
        generators=spawn_generators(seed(), 4),
        num_images_per_prompt=2,
        temperature=0.8,
        top_k=9,
        top_p=0.9,
    )
    *_, (_, expected) = drawing
    kwargs = {"num_images_per_prompt": 2, "temperature": 0.8, "top_k": 9, "top_p": 0.9}
    tokens = tokens_of(pipe, CAPTIONS[:2], **kwargs)
    assert tokens.dtype == torch.int64 and torch.equal(tokens, expected.view(4, GRID, GRID))
    sample = pipe.dvae.decode(tokens).sample.detach()
    assert torch.equal(pipe(CAPTIONS[:2], generator=seed(), output_type="pt", **kwargs).images, sample)
    arrays = pipe(CAPTIONS[:2], generator=seed(), output_type="np", **kwargs).images
    assert isinstance(arrays, np.ndarray) and arrays.shape == (4, 16, 16, 3)
    np.testing.assert_array_equal(arrays, sample.permute(0, 2, 3, 1).numpy())
    output = pipe(CAPTIONS[:2], generator=seed(), **kwargs)
    assert isinstance(output, DALLEPipelineOutput) and output.scores is output.nsfw_content_detected is None
    for picture, array in zip(output.images, arrays, strict=True):
        assert isinstance(picture, Image.Image)
        np.testing.assert_array_equal(np.asarray(picture), (array * 255).round())
    pictures, scores, has_nsfw_concepts = pipe(CAPTIONS[:2], generator=seed(), return_dict=False, **kwargs)
    assert pictures == output.images and scores is None and has_nsfw_concepts is None


def test_a_seed_gives_its_picture_in_any_batch(pipe):
    four = tokens_of(pipe, CAPTIONS[0], num_images_per_prompt=4)
    assert torch.equal(tokens_of(pipe, CAPTIONS[0]), four[:1])
    assert len({tuple(tokens.flatten().tolist()) for tokens in four}) == 4
    both = tokens_of(pipe, CAPTIONS[:2], num_images_per_prompt=3, generator=[seed(number) for number in range(6)])
    for row in range(6):
        assert torch.equal(tokens_of(pipe, CAPTIONS[row // 3], generator=seed(row))[0], both[row])
    assert torch.equal(tokens_of(pipe, [CAPTIONS[0]], num_images_per_prompt=4), four)


def test_without_a_generator_pictures_differ(pipe):
    assert not torch.equal(tokens_of(pipe, "a red fox", generator=None), tokens_of(pipe, "a red fox", generator=None))


def test_captions_matter(pipe):
    tokens = tokens_of(pipe, CAPTIONS, generator=[seed() for _ in CAPTIONS])
    assert len({tuple(row.flatten().tolist()) for row in tokens}) == len(CAPTIONS)


def test_long_prompts_are_cut_with_a_warning(pipe, caplog):
    prompt = "a red fox " + "zq" * 40
    with caplog.at_level(logging.WARNING):
        tokens = tokens_of(pipe, prompt)
    assert "zq" in caplog.text and "lost" in caplog.text
    assert torch.equal(tokens, tokens_of(pipe, prompt + " and more"))


# --------------------------------------------------------------------------------------------------------- guidance


def test_guidance_uses_the_negative_prompt_or_none_at_all(pipe):
    kwargs = {"num_images_per_prompt": 2, "guidance_scale": 4.0}
    default = tokens_of(pipe, CAPTIONS[:2], **kwargs)
    assert torch.equal(tokens_of(pipe, CAPTIONS[:2], negative_prompt="", **kwargs), default)
    assert torch.equal(tokens_of(pipe, CAPTIONS[:2], negative_prompt=["", " "], **kwargs), default)
    negative = {f"negative_{name}": value for name, value in encode(pipe, *CAPTIONS[2:]).items()}
    drawing = draw_image_tokens(
        pipe.prior, **encode(pipe, *CAPTIONS[:2]), **negative, generators=spawn_generators(seed(), 4), **kwargs
    )
    *_, (_, expected) = drawing
    tokens = tokens_of(pipe, CAPTIONS[:2], negative_prompt=CAPTIONS[2:], **kwargs)
    assert torch.equal(tokens.flatten(1), expected)
    assert not torch.equal(tokens, default)
    assert pipe.guidance_scale == 4.0


def test_settings_default_to_the_checkpoints():
    pipe = build_pipeline()
    unguided = tokens_of(pipe, "a red fox")
    pipe.prior.generation_config.update(guidance_scale=3.0, temperature=0.5, top_k=6, top_p=0.8)
    own = tokens_of(pipe, "a red fox")
    assert pipe.guidance_scale == 3.0
    given = {"guidance_scale": 3.0, "temperature": 0.5, "top_k": 6, "top_p": 0.8}
    assert torch.equal(own, tokens_of(build_pipeline(), "a red fox", **given))
    paper = {"guidance_scale": 1.0, "temperature": 1.0, "top_k": 0, "top_p": 1.0}
    assert torch.equal(tokens_of(pipe, "a red fox", **paper), unguided)
    assert pipe.guidance_scale == 1.0


def test_guidance_without_caption_dropout_warns(pipe, caplog):
    with caplog.at_level(logging.WARNING):
        tokens_of(pipe, "a red fox", guidance_scale=2.0)
        tokens_of(build_pipeline(caption_dropout=0.0), "a red fox")
        assert caplog.text == ""
        tokens_of(build_pipeline(caption_dropout=0.0), "a red fox", guidance_scale=2.0)
        assert "trained without caption dropout" in caplog.text
        tokens_of(pipe, "a red fox", negative_prompt="a blue bird")
        assert "`negative_prompt` has no effect" in caplog.text


def test_the_empty_prompt_draws_without_a_caption(pipe):
    text_ids = torch.full((1, 12), pipe.tokenizer.bos_token_id)
    mask = torch.zeros(1, 12, dtype=torch.long)
    mask[0, 0] = 1
    *_, (_, expected) = draw_image_tokens(pipe.prior, text_ids, mask, generators=spawn_generators(seed(), 1))
    for prompt in ("", "  "):
        assert torch.equal(tokens_of(pipe, prompt).flatten(1), expected)


# --------------------------------------------------------------------------------- pictures and tokens to start from


def test_an_image_keeps_its_top_rows(pipe):
    pictures = [random_picture(0, 24), random_picture(1, 16)]
    pixel_values = pipe.image_processor.preprocess(pictures).pixel_values
    encoded = pipe.dvae.encode(pixel_values).tokens
    for num_rows in (1, 3):
        tokens = tokens_of(pipe, CAPTIONS[:2], image=pictures, num_prefix_rows=num_rows, num_images_per_prompt=2)
        assert torch.equal(tokens[:, :num_rows], encoded[:, :num_rows].repeat_interleave(2, dim=0))
        assert pipe.num_timesteps == NUM_CELLS - num_rows * GRID
    one = tokens_of(pipe, CAPTIONS[:2], image=pictures[0], num_prefix_rows=2)
    assert torch.equal(one[:, :2], encoded[:1, :2].expand(2, -1, -1))
    assert torch.equal(one, tokens_of(pipe, CAPTIONS[:2], image=pixel_values[0], num_prefix_rows=2))


def test_drawing_goes_on_from_latents(pipe):
    whole = tokens_of(pipe, CAPTIONS[:2], num_images_per_prompt=2)
    flat = whole.flatten(1)
    for latents in (flat[:, :1], flat[:, :7], flat[:, :15], whole[:, :2], whole[:, :2].int()):
        assert torch.equal(tokens_of(pipe, CAPTIONS[:2], num_images_per_prompt=2, latents=latents), whole)
    changed = (flat[:, :8] + 3) % NUM_CODES
    assert torch.equal(
        tokens_of(pipe, CAPTIONS[:2], num_images_per_prompt=2, latents=changed).flatten(1)[:, :8], changed
    )


def test_a_full_grid_is_only_decoded(pipe):
    calls = []
    handle = pipe.prior.register_forward_pre_hook(lambda *args: calls.append(args))
    latents = torch.arange(NUM_CELLS).repeat(2, 1)
    images = pipe(CAPTIONS[:2], latents=latents, output_type="pt").images
    handle.remove()
    assert torch.equal(images, pipe.dvae.decode(latents.view(2, GRID, GRID)).sample)
    assert calls == [] and pipe.num_timesteps == 0
    assert tokens_of(pipe, CAPTIONS[:2], latents=latents.int()).equal(latents.view(2, GRID, GRID))
    assert tokens_of(pipe, CAPTIONS[:2], latents=latents.int()).dtype == torch.int64


# ------------------------------------------------------------------------------------------- callbacks and interrupts


def test_the_callback_sees_each_step(pipe):
    seen = []

    def callback(called, step, cell, tensors):
        assert called is pipe and list(tensors) == ["latents"]
        seen.append((step, cell, tensors["latents"]))

    whole = tokens_of(pipe, "a red fox")
    tokens = tokens_of(pipe, "a red fox", latents=whole[:, :1], callback_on_step_end=callback)
    assert [(step, cell) for step, cell, _ in seen] == [(step, step + GRID) for step in range(12)]
    assert torch.equal(tokens, whole) and torch.equal(seen[-1][2], whole)
    for _, cell, latents in seen:
        flat = latents.flatten(1)
        assert torch.equal(flat[:, : cell + 1], whole.flatten(1)[:, : cell + 1]) and (flat[:, cell + 1 :] == -1).all()
    seen_keys = []
    tokens_of(
        pipe,
        "a red fox",
        callback_on_step_end=lambda called, step, cell, tensors: seen_keys.append(list(tensors)),
        callback_on_step_end_tensor_inputs=[],
    )
    assert seen_keys == [[]] * NUM_CELLS


def test_the_callback_may_change_the_token_just_drawn(pipe):
    def callback(called, step, cell, tensors):
        if cell == 5:
            tensors["latents"][0, 1, 1] = 2
        return tensors

    whole = tokens_of(pipe, "a red fox")
    changed = tokens_of(pipe, "a red fox", callback_on_step_end=callback)
    assert whole[0, 1, 1] != 2 == changed[0, 1, 1]
    prefix = changed.flatten(1)[:, :6]
    assert torch.equal(tokens_of(pipe, "a red fox", latents=prefix), changed)
    assert not torch.equal(changed.flatten(1)[:, 6:], whole.flatten(1)[:, 6:])


@pytest.mark.parametrize(
    "change",
    [lambda t: t.index_fill(1, torch.tensor([0]), 1), lambda t: t * 0 + 99, lambda t: t[:, :2], lambda t: -t - 2],
)
def test_the_callback_may_change_nothing_else(pipe, change):
    def callback(called, step, cell, tensors):
        return {"latents": change(tensors["latents"])} if cell == 6 else None

    with pytest.raises(ValueError, match="cell 6 only"):
        tokens_of(pipe, "a red fox", callback_on_step_end=callback)


@pytest.mark.parametrize("dvae_seed", [4, 10])  # a grey picture's tokens differ at its borders
def test_an_interrupted_picture_is_filled_with_grey(dvae_seed):
    def callback(called, step, cell, tensors):
        called._interrupt = step == 4
        return tensors

    pipe = build_pipeline(dvae=build_dvae(dvae_seed))
    encoded = []
    pipe.dvae.encoder.register_forward_pre_hook(lambda module, inputs: encoded.append(inputs[0]))
    whole = tokens_of(pipe, "a red fox", num_images_per_prompt=2)
    tokens = tokens_of(pipe, "a red fox", num_images_per_prompt=2, callback_on_step_end=callback)
    assert len(encoded) == 1 and (encoded[0] == 0.5).all()
    grey = pipe.dvae.encode(torch.full((1, 3, 16, 16), 0.5)).tokens.flatten().tolist()
    most_frequent = max(sorted(set(grey)), key=grey.count)
    assert pipe.interrupt and len(set(grey)) > 1
    assert torch.equal(tokens.flatten(1)[:, :5], whole.flatten(1)[:, :5])
    assert (tokens.flatten(1)[:, 5:] == most_frequent).all()
    assert torch.equal(tokens_of(pipe, "a red fox", num_images_per_prompt=2), whole), "the next call is not"
    assert not pipe.interrupt


def test_the_progress_bar_counts_image_tokens(pipe, capsys):
    pipe.set_progress_bar_config(mininterval=0)
    try:
        tokens_of(pipe, "a red fox", latents=torch.zeros(1, 4, dtype=torch.long))
        assert "12/12" in capsys.readouterr().err
        pipe.set_progress_bar_config(disable=True)
        tokens_of(pipe, "a red fox")
        assert capsys.readouterr().err == ""
    finally:
        pipe.set_progress_bar_config(disable=True)


# ------------------------------------------------------------------------------------------------ safety and reranking


def darken_first(images):
    """A safety checker that finds the first picture of a batch unsafe."""
    assert isinstance(images, np.ndarray) and images.dtype == np.float32
    return np.concatenate([images[:1] * 0, images[1:]]), [True] + [False] * (len(images) - 1)


def test_the_safety_checker_sees_and_changes_pictures(pipe):
    plain = pipe("a red fox", num_images_per_prompt=3, generator=seed(), output_type="pt").images
    checked = build_pipeline(safety_checker=darken_first)
    output = checked("a red fox", num_images_per_prompt=3, generator=seed(), output_type="pt")
    assert output.nsfw_content_detected == [True, False, False]
    assert (output.images[0] == 0).all() and torch.equal(output.images[1:], plain[1:])
    assert checked("a red fox", output_type="latent").nsfw_content_detected is None


def test_the_reranker_puts_each_prompts_best_first(pipe):
    reranked = build_pipeline(**build_reranker(), safety_checker=darken_first)
    pictures = build_pipeline(safety_checker=darken_first)(
        CAPTIONS[:2], num_images_per_prompt=5, generator=seed()
    ).images
    output = reranked(CAPTIONS[:2], num_images_per_prompt=5, generator=seed())
    assert output.scores.shape == (10,) and output.scores.dtype == torch.float32
    orders = []
    for prompt, rows in ((CAPTIONS[0], slice(0, 5)), (CAPTIONS[1], slice(5, 10))):
        drawn = [np.asarray(picture).tolist() for picture in pictures[rows]]
        orders.append([drawn.index(np.asarray(picture).tolist()) for picture in output.images[rows]])
        scores, num_safe = output.scores[rows], output.nsfw_content_detected[rows].count(False)
        assert output.nsfw_content_detected[rows] == [False] * num_safe + [True] * (5 - num_safe)  # flagged come last
        assert torch.equal(scores[:num_safe], scores[:num_safe].sort(descending=True).values)
        assert scores[0] > scores[num_safe - 1]
        alone = [
            score_images(reranked.reranker, reranked.reranker_processor, prompt, [picture])
            for picture in output.images[rows]
        ]
        torch.testing.assert_close(scores, torch.cat(alone), atol=1e-4, rtol=1e-4)
    assert [sorted(order) for order in orders] == [list(range(5))] * 2 and orders != [list(range(5))] * 2
    assert output.nsfw_content_detected == [not np.asarray(picture).any() for picture in output.images]
    assert sum(output.nsfw_content_detected) == 1


def test_scores_of_long_prompts_and_of_halves():
    parts, pictures = build_reranker(), [random_picture(0), random_picture(1)]
    prompt = CAPTIONS[2] + " zq" * 40  # longer than the reranker's text
    scores = score_images(parts["reranker"], parts["reranker_processor"], prompt, pictures)
    assert scores.shape == (2,) and not scores.requires_grad
    half = score_images(parts["reranker"].bfloat16(), parts["reranker_processor"], prompt, pictures)
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, scores, atol=0.1, rtol=0.05)


# ---------------------------------------------------------------------------------------------- parts that do not fit


@pytest.mark.parametrize(
    ("components", "numbers"),
    [
        (lambda: {"dvae": build_dvae(vocab_size=32)}, ["`dvae.config.vocab_size` is 32", "image_vocab_size` is 16"]),
        (lambda: {"prior": build_prior(image_grid_size=8)}, ["`dvae.image_grid_size` is 4", "image_grid_size` is 8"]),
        (lambda: {"prior": build_prior(text_length=9)}, ["model_max_length` is 12", "text_length` is 9"]),
        (lambda: {"prior": build_prior(text_vocab_size=270)}, ["`len(tokenizer)` is", "text_vocab_size` is 270"]),
        (lambda: {"prior": build_prior(bos_token_id=2)}, ["`tokenizer.bos_token_id` is 0", "bos_token_id` is 2"]),
        (lambda: {"dvae": build_dvae(sample_size=32)}, ["`dvae.image_grid_size` is 8", "image_grid_size` is 4"]),
        (
            lambda: {"dvae": build_dvae(sample_size=32, patch_size=2)},
            ["`image_processor.size` is 16", "sample_size` is 32"],
        ),
        (lambda: {"dvae": None}, ["needs all of"]),
        (lambda: {"reranker": build_reranker()["reranker"]}, ["`reranker` and `reranker_processor`"]),
        (lambda: {"reranker_processor": build_reranker()["reranker_processor"]}, ["belong together"]),
    ],
)
def test_parts_that_do_not_fit_are_refused(components, numbers):
    with pytest.raises(ValueError) as error:
        build_pipeline(**components())
    assert all(number in str(error.value) for number in numbers), error.value
