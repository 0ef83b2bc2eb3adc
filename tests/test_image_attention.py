"""The attention masks: as pictures on the paper's 4 x 4 grid, and against the paper's definition on any grid."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hf_dalle.image_attention import (
    ATTENTION_TYPES,
    image_attention_mask,
    image_attention_offsets,
    image_attention_window,
    stream_attention_mask,
)


# One line a state, one digit for each state that it may (1) or may not (0) attend to.
ROW = """
1000 0000 0000 0000
1100 0000 0000 0000
1110 0000 0000 0000
1111 0000 0000 0000
1111 1000 0000 0000
0111 1100 0000 0000
0011 1110 0000 0000
0001 1111 0000 0000
0000 1111 1000 0000
0000 0111 1100 0000
0000 0011 1110 0000
0000 0001 1111 0000
0000 0000 1111 1000
0000 0000 0111 1100
0000 0000 0011 1110
0000 0000 0001 1111
"""
COLUMN = """
1000 0000 0000 0000
0100 0000 0000 0000
0010 0000 0000 0000
0001 0000 0000 0000
1000 1000 0000 0000
0100 0100 0000 0000
0010 0010 0000 0000
0001 0001 0000 0000
1000 1000 1000 0000
0100 0100 0100 0000
0010 0010 0010 0000
0001 0001 0001 0000
1000 1000 1000 1000
0100 0100 0100 0100
0010 0010 0010 0010
0001 0001 0001 0001
"""
CONV = """
1000 0000 0000 0000
1100 0000 0000 0000
0110 0000 0000 0000
1011 0000 0000 0000
1101 1000 0000 0000
1110 1100 0000 0000
0111 0110 0000 0000
0011 1011 0000 0000
0001 1101 1000 0000
0000 1110 1100 0000
0000 0111 0110 0000
0000 0011 1011 0000
0000 0001 1101 1000
0000 0000 1110 1100
0000 0000 0111 0110
0000 0000 0011 1011
"""
STREAM_OF_3_TEXT_STATES_AND_A_2_X_2_GRID_BY_COLUMN = """
100 0000
110 0000
111 0000
111 1000
111 0100
111 1010
111 0101
"""

grid_sizes = st.integers(1, 7)
kernel_sizes = st.integers(0, 5).map(lambda half: 2 * half + 1)
each_type = st.sampled_from(ATTENTION_TYPES)


def draw_picture(mask):
    return ["".join(str(int(cell)) for cell in row) for row in mask.tolist()]


def read_picture(text):
    return [line.replace(" ", "") for line in text.split("\n") if line]


@pytest.mark.parametrize(("attention_type", "picture"), [("row", ROW), ("column", COLUMN), ("conv", CONV)])
def test_picture_on_the_papers_grid(attention_type, picture):
    assert draw_picture(image_attention_mask(attention_type, 4, 3)) == read_picture(picture)


def test_picture_of_a_stream():
    mask = stream_attention_mask("column", 3, 2)
    assert draw_picture(mask) == read_picture(STREAM_OF_3_TEXT_STATES_AND_A_2_X_2_GRID_BY_COLUMN)


def attends_by_definition(attention_type, state, key, width, kernel_size):
    """The definition, cell by cell: `state` and `key` are raster indices."""
    if key > state:
        return False
    if attention_type == "row":
        return state - width <= key
    if attention_type == "column":
        return state % width == key % width
    if attention_type == "conv":
        reach = kernel_size // 2
        for rows_up in range(reach + 1):
            for columns_left in range(-reach, reach + 1):
                if state - (rows_up * width + columns_left) == key:
                    return True
        return False
    return True


@given(each_type, grid_sizes, kernel_sizes)
def test_mask_is_the_definition_on_any_grid(attention_type, grid_size, kernel_size):
    mask = image_attention_mask(attention_type, grid_size, kernel_size)
    num_states = grid_size**2
    assert mask.dtype == torch.bool and mask.shape == (num_states, num_states)
    assert mask.tolist() == [
        [attends_by_definition(attention_type, state, key, grid_size, kernel_size) for key in range(num_states)]
        for state in range(num_states)
    ]


@given(each_type, grid_sizes, kernel_sizes, st.data())
def test_window_is_any_part_of_the_mask_along_its_diagonal(attention_type, grid_size, kernel_size, data):
    mask = image_attention_mask(attention_type, grid_size, kernel_size)
    num_keys = data.draw(st.integers(1, len(mask)))
    num_queries = data.draw(st.integers(0, num_keys))
    window = image_attention_window(attention_type, grid_size, kernel_size, num_queries, num_keys)
    first = data.draw(st.integers(0, len(mask) - num_keys))
    stop = first + num_keys
    assert window.equal(mask[stop - num_queries : stop, first:stop])


@given(each_type, st.integers(1, 9), grid_sizes, kernel_sizes)
def test_stream_is_causal_text_and_an_image_that_sees_all_text(attention_type, text_length, grid_size, kernel_size):
    mask = stream_attention_mask(attention_type, text_length, grid_size, kernel_size)
    assert mask.shape == (text_length + grid_size**2,) * 2
    for state in range(text_length):
        assert mask[state].tolist() == [key <= state for key in range(len(mask))]
    assert mask[text_length:, :text_length].all()
    assert mask[text_length:, text_length:].equal(image_attention_mask(attention_type, grid_size, kernel_size))


def test_offsets_of_the_paper():
    assert image_attention_offsets("row", 4) == (0, 1, 2, 3, 4)
    assert image_attention_offsets("column", 4) == (0, 4, 8, 12)
    assert image_attention_offsets("conv", 4, 3) == (0, 1, 3, 4, 5)
    conv = image_attention_offsets("conv", 32, 11)
    assert len(conv) == 61 and conv[-1] == 165


def test_masks_are_made_once():
    assert image_attention_mask("row", 4) is image_attention_mask("row", 4)
    assert stream_attention_mask("row", 3, 4) is stream_attention_mask("row", 3, 4)


def test_masks_first_made_in_inference_mode_serve_training_too():
    with torch.inference_mode():
        masks = image_attention_mask("row", 8), stream_attention_mask("row", 11, 8)  # sizes of this test alone
    assert not any(mask.is_inference() for mask in masks)


def test_unknown_type_is_named_beside_the_valid_ones():
    with pytest.raises(ValueError, match="'diagonal'.*full, row, column, conv"):
        image_attention_mask("diagonal", 4)


@pytest.mark.parametrize("kernel_size", [-1, 0, 2, 10])
def test_even_kernel_is_refused(kernel_size):
    with pytest.raises(ValueError, match=f"odd number, got {kernel_size}"):
        image_attention_mask("conv", 4, kernel_size)
