"""Distorted pictures: still pictures, of the same thing; how far by the strength, and the same again by the seed."""

import pytest
import torch
from augmentation import distort
from hypothesis import given, settings
from hypothesis import strategies as st


def make_pictures(number=64, side=16):
    """A dark square in the middle of white."""
    pictures = torch.ones(number, 3, side, side)
    pictures[:, :, side // 4 : -side // 4, side // 4 : -side // 4] = torch.tensor([0.1, 0.3, 0.6])[:, None, None]
    return pictures


def distort_by(seed, pictures, strength):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return distort(pictures, strength)


@settings(deadline=None)
@given(st.integers(0, 10**6), st.floats(0, 3), st.integers(1, 4), st.integers(4, 20), st.integers(4, 20))
def test_they_are_pictures_of_the_same_size(seed, strength, number, height, width):
    pictures = torch.rand(number, 3, height, width, generator=torch.Generator().manual_seed(seed))
    before = pictures.clone()
    seen = distort_by(seed, pictures, strength)
    assert seen.shape == pictures.shape and seen.dtype == pictures.dtype and torch.equal(pictures, before)
    assert seen.min() >= 0 and seen.max() <= 1
    assert torch.equal(seen, distort_by(seed, pictures, strength))


def test_no_strength_changes_nothing_and_more_changes_more():
    pictures = make_pictures()
    assert torch.equal(distort_by(0, pictures, 0), pictures)
    changes = [(distort_by(0, pictures, strength) - pictures).abs().mean().item() for strength in (0.01, 0.3, 1)]
    assert 0 < changes[0] < 0.02 < changes[1] < changes[2] < 0.3


def test_what_comes_in_at_the_edges_is_white_and_some_squares_are_grey():
    seen = distort_by(0, torch.ones(400, 3, 16, 16), 1.0)
    is_covered = (seen < 1).flatten(1).any(1)
    assert is_covered.float().mean().item() == pytest.approx(0.3, abs=0.07)
    for picture in seen[is_covered]:
        rows, columns = (picture[0] < 1).nonzero().unbind(1)
        assert len(rows) == 16 and rows.max() - rows.min() == columns.max() - columns.min() == 3  # a quarter of 16
        assert len(picture[:, rows, columns].unique()) == 1


def test_a_share_loses_its_colours():
    seen = distort_by(0, make_pictures(400), 1.0)
    centre = seen[:, :, 8, 8]
    is_grey = (centre.amax(1) - centre.amin(1)) < 1e-6  # those covered there are grey as well
    assert 0.06 < is_grey.float().mean() < 0.2
    coloured = centre[~is_grey]
    assert (coloured.argmax(1) == 2).float().mean() > 0.9 and coloured.std(0).min() > 0.02


def test_the_thing_moves_turns_and_grows():
    seen = 1 - distort_by(1, make_pictures(200, 32), 1.0).amin(1)
    places = torch.arange(32.0) - 15.5
    mass = seen.sum((1, 2))
    centres = [(seen.sum(axis) * places).sum(1) / mass for axis in (1, 2)]
    for centre in centres:
        assert centre.abs().median() < 2 < centre.abs().max() < 8  # at most 6 % of 32 pixels, and what is covered
        assert centre.mean().abs() < 0.6
    assert mass.std() / mass.mean() > 0.1
