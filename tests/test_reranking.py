"""The best of many: the candidates of `num_images_per_prompt`, ranked; what is kept of them, what is refused."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from tiny import CAPTIONS, build_pipeline, build_reranker

from hf_dalle.cli import main
from hf_dalle.reranking import BestImages, expect_best_of, order_images


NUM_CANDIDATES, NUM_KEPT = 7, 3
PROMPTS = CAPTIONS[:2]


@pytest.fixture(scope="module")
def pipe():
    return build_pipeline(**build_reranker())


def seed(number=0):
    return torch.Generator().manual_seed(number)


def call(pipe, prompt=PROMPTS, **kwargs):
    defaults = {"num_images_per_prompt": NUM_KEPT, "num_candidates": NUM_CANDIDATES, "generator": seed()}
    return pipe(prompt, **{**defaults, "output_type": "pt", **kwargs})


def assert_same(output, expected):
    torch.testing.assert_close(output.images, expected.images)
    torch.testing.assert_close(output.scores, expected.scores)
    assert output.nsfw_content_detected == expected.nsfw_content_detected


# ------------------------------------------------------------------------------------------------------- candidates


def take_best(output):
    """The first pictures of each prompt out of all candidates, which come best first."""
    rows = torch.arange(len(output.images)).view(len(PROMPTS), -1)[:, :NUM_KEPT].flatten()
    flags = output.nsfw_content_detected
    flags = [flags[row] for row in rows] if flags is not None else None
    return type(output)(images=output.images[rows], scores=output.scores[rows], nsfw_content_detected=flags)


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"guidance_scale": 2.0, "temperature": 0.9},
        {"image": [Image.new("RGB", (16, 16), colour) for colour in ("red", "blue")], "num_prefix_rows": 2},
        {"latents": torch.arange(2 * NUM_CANDIDATES * 6).view(-1, 6) % 16},
    ],
    ids=["plain", "guidance", "images", "latents"],
)
def test_the_best_of_the_candidates_that_the_same_seed_draws(pipe, arguments):
    everything = call(pipe, num_images_per_prompt=NUM_CANDIDATES, num_candidates=None, **arguments)
    expected = take_best(everything)
    assert len({picture.numpy().tobytes() for picture in everything.images}) > NUM_CANDIDATES
    assert not torch.equal(expected.scores, everything.scores[: len(expected.scores)])
    for max_batch_size in (None, 1, 3, NUM_CANDIDATES, 10):
        assert_same(call(pipe, max_batch_size=max_batch_size, **arguments), expected)


def test_one_generator_a_candidate(pipe):
    everything = call(pipe, generator=[seed(number) for number in range(14)], num_images_per_prompt=NUM_CANDIDATES)
    output = call(pipe, generator=[seed(number) for number in range(14)])
    assert_same(output, take_best(everything))
    with pytest.raises(ValueError, match="6 generators for 14 images"):
        call(pipe, generator=[seed(number) for number in range(2 * NUM_KEPT)])


def test_one_generator_a_prompt(pipe):
    """So a caption's best picture does not hang on what else is drawn with it."""
    both = call(pipe, generator=[seed(3), seed(4)])
    for row, prompt in enumerate(PROMPTS):
        for generator in (seed(3 + row), [seed(3 + row)]):
            alone = call(pipe, prompt, generator=generator)
            torch.testing.assert_close(alone.images, both.images[row * NUM_KEPT : (row + 1) * NUM_KEPT])


def flag_half(images):
    """A safety checker that blackens about half of all pictures, the same ones in any batch."""
    is_flagged = (images.mean((1, 2, 3)) * 1000).astype(int) % 2 == 1
    return images * ~is_flagged[:, None, None, None], is_flagged.tolist()


def test_flagged_candidates_are_returned_only_where_others_are_too_few():
    pipe = build_pipeline(**build_reranker(), safety_checker=flag_half)
    everything = call(pipe, num_images_per_prompt=NUM_CANDIDATES)
    flags = torch.tensor(everything.nsfw_content_detected).view(len(PROMPTS), -1)
    assert 0 < flags.sum() < flags.numel() and torch.equal(flags, flags.sort(dim=1).values)
    for max_batch_size in (None, 2):
        assert_same(call(pipe, max_batch_size=max_batch_size), take_best(everything))
    assert (everything.images[flags.flatten()] == 0).all()


def test_few_pictures_are_in_memory_at_a_time(pipe, monkeypatch):
    num_decoded, sizes = [], []
    decode = type(pipe).decode_tokens

    def count_decoded(self, tokens, *args):
        num_decoded.append(len(tokens))
        return decode(self, tokens, *args)

    def count_kept(self, images, *args):
        sizes.append(len(images) + (len(self.images) if self.images is not None else 0))
        add(self, images, *args)

    add = BestImages.add
    monkeypatch.setattr(type(pipe), "decode_tokens", count_decoded)
    monkeypatch.setattr(BestImages, "add", count_kept)
    output = call(pipe, num_candidates=50, max_batch_size=8)
    assert len(output.images) == len(PROMPTS) * NUM_KEPT
    assert sum(num_decoded) == 100 and max(num_decoded) == 8 and max(sizes) == 8 + NUM_KEPT


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_candidates": 2}, "`num_candidates` is 2; expected a whole number from 3"),
        ({"num_candidates": 7.5}, "`num_candidates` is 7.5; expected a whole number"),
        ({"output_type": "latent"}, "`num_candidates` ranks pictures, but `output_type='latent'`"),
        ({"latents": torch.zeros(6, 4, dtype=torch.int64)}, "14 x k or 14 x rows x 4; got \\(6, 4\\)"),
    ],
)
def test_what_cannot_be_ranked_is_refused_before_drawing(pipe, changes, words):
    calls = []
    handle = pipe.prior.register_forward_pre_hook(lambda *args: calls.append(args))
    with pytest.raises(ValueError, match=words):
        call(pipe, **changes)
    handle.remove()
    assert calls == []


def test_candidates_need_a_reranker():
    for num_candidates in (NUM_KEPT, NUM_CANDIDATES):
        with pytest.raises(ValueError, match="`num_candidates` needs a reranker .* `reranker` and `reranker_proc"):
            call(build_pipeline(), num_candidates=num_candidates)


def test_offload_and_the_command(pipe, tmp_path, monkeypatch, capsys):
    pipe.save_pretrained(tmp_path / "saved")
    loaded = type(pipe).from_pretrained(tmp_path / "saved")
    loaded.set_progress_bar_config(disable=True)
    loaded.enable_model_cpu_offload(device="cpu")
    assert_same(call(loaded, max_batch_size=4), call(pipe))
    monkeypatch.chdir(tmp_path)
    options = ["--checkpoint", "saved", "--device", "cpu", "--seed", "0", "--num_images", "1", "--num_candidates", "7"]
    assert main(["draw", PROMPTS[0], *options]) == 0
    assert "1 of 'a red fox', the best of 7, seed 0" in capsys.readouterr().out
    best = pipe(PROMPTS[0], num_candidates=7, generator=seed()).images[0]
    assert np.array_equal(np.asarray(Image.open("dalle.png")), np.asarray(best))
    build_pipeline().save_pretrained("bare")
    assert main(["draw", PROMPTS[0], *options, "--checkpoint", "bare"]) == 2
    assert "`num_candidates` needs a reranker" in capsys.readouterr().err


# ----------------------------------------------------------------------------------------------------------- ranks


SCORES = st.lists(st.integers(0, 5), min_size=1, max_size=12)


@settings(deadline=None)
@given(SCORES, st.data())
def test_the_best_do_not_depend_on_how_they_are_met(scores, data):
    num_kept = data.draw(st.integers(1, len(scores)))
    flags = torch.tensor(data.draw(st.lists(st.booleans(), min_size=len(scores), max_size=len(scores))))
    cuts = data.draw(st.lists(st.integers(1, len(scores)), max_size=4))
    bounds = sorted({0, *cuts, len(scores)})
    images, scores = torch.arange(len(scores)).view(-1, 1, 1, 1), torch.tensor(scores).float()
    best = BestImages(num_kept)
    for start, end in itertools.pairwise(bounds):
        best.add(images[start:end], scores[start:end], flags[start:end])
    rows = sorted(range(len(scores)), key=lambda row: (flags[row].item(), -scores[row].item(), row))
    assert best.images.flatten().tolist() == rows[:num_kept] == order_images(scores, flags)[:num_kept].tolist()
    assert torch.equal(best.scores, scores[rows[:num_kept]])
    assert torch.equal(best.is_flagged, flags[rows[:num_kept]])


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 4), st.floats(0, 1)), min_size=1, max_size=8))
def test_the_best_of_n_is_the_mean_over_all_subsets(pictures):
    scores, qualities = (torch.tensor(column, dtype=torch.float64) for column in zip(*pictures, strict=True))
    order = order_images(scores)
    for num_drawn in range(1, len(pictures) + 1):
        values = []
        for subset in itertools.combinations(range(len(pictures)), num_drawn):
            best = subset[order_images(scores[list(subset)])[0]]
            values.append(qualities[best].item())
        expected = sum(values) / len(values)
        assert expect_best_of(num_drawn, qualities[order]).item() == pytest.approx(expected, abs=1e-12)


def test_the_best_of_n_at_many():
    qualities = torch.rand(3, 512, generator=seed(), dtype=torch.float64)
    torch.testing.assert_close(expect_best_of(1, qualities), qualities.mean(1))
    torch.testing.assert_close(expect_best_of(512, qualities), qualities[:, 0])
    for num_drawn in (2, 32, 511):
        torch.testing.assert_close(expect_best_of(num_drawn, torch.ones(512)), torch.tensor(1.0).double())
        # that of the last rank which can be a best one: it and all that are worse
        worst = torch.zeros(512)
        worst[512 - num_drawn] = 1.0
        assert expect_best_of(num_drawn, worst).item() == pytest.approx(1 / math.comb(512, num_drawn), rel=1e-9)
    for num_drawn in (0, 513):
        with pytest.raises(ValueError, match=f"The best of {num_drawn} needs as many pictures; there are 512"):
            expect_best_of(num_drawn, qualities)
