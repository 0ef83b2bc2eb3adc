"""The rules between state dicts: nothing is forgotten, used twice or of another shape, and what is read is exact."""

import pytest
import torch
from tiny import build_prior
from torch import nn

from conversion.key_map import KeyMap, list_parameters
from conversion.safe_load import list_tensors, load_checkpoint
from conversion.sizes import MAX_NUMBER, count_numbered, find_shape


@pytest.fixture
def source(tmp_path):
    tensors = {"qkv": torch.arange(18.0).view(9, 2), "scale": torch.tensor([2.0, 3.0]), "w": torch.ones(2, 4)}
    tensors |= {"b": torch.ones(2), "mask": torch.zeros(5)}
    torch.save(tensors, tmp_path / "file.pt")
    return list_tensors(load_checkpoint(tmp_path / "file.pt").content)


TARGET = {
    **{name: torch.Size([3, 2]) for name in ("q", "k", "v")},
    **{"out.weight": torch.Size([2, 4]), "out.bias": torch.Size([2])},
}


def make_map(source, *leave_out):
    keys = KeyMap(source, TARGET)
    if "qkv" not in leave_out:
        keys.add(("q", "k", "v"), "qkv", lambda qkv: qkv.chunk(3))
    if "out" not in leave_out:
        targets, sources = ("out.weight", "out.bias"), ("scale", "w", "b")
        keys.add(targets, sources, lambda scale, w, b: (scale[:, None] * w, scale * b))
    if "mask" not in leave_out:
        keys.drop("mask", "made anew")
    return keys


def test_sizes_are_those_of_weights_with_as_many_dimensions(source):
    assert find_shape(source, "qkv") == (9, 2)
    with pytest.raises(ValueError, match=r"scale is of shape \(2,\); expected 2 dimensions"):
        find_shape(source, "scale")
    with pytest.raises(ValueError, match="no weights 'other'.*Its names begin"):
        find_shape(source, "other")
    names = {f"layers.{number}.w": None for number in range(MAX_NUMBER + 1)}
    with pytest.raises(ValueError, match="count 1001 layers or blocks by"):
        count_numbered(names, r"layers\.(\d+)\.")


def test_what_is_read_is_what_the_rules_say(source):
    keys = make_map(source)
    keys.check()
    assert keys.read("k").equal(torch.arange(6.0, 12.0).view(3, 2)) and keys.read("k").is_contiguous()
    assert keys.read("out.weight").equal(torch.tensor([[2.0], [3.0]]).expand(2, 4))
    assert keys.read("out.bias").equal(torch.tensor([2.0, 3.0]))


@pytest.mark.parametrize(
    ("leave_out", "words"),
    [
        (("qkv",), r"keys that nothing uses: qkv; weights that nothing fills: k, q, v\."),
        (("out",), r"keys that nothing uses: b, scale, w; weights that nothing fills: out.bias, out.weight\."),
        (("mask",), r"keys that nothing uses: mask\."),
    ],
)
def test_what_is_forgotten_is_named(source, leave_out, words):
    with pytest.raises(ValueError, match=words):
        make_map(source, *leave_out).check()


@pytest.mark.parametrize(
    ("rule", "words"),
    [
        (("extra", "nowhere"), r"source lacks: nowhere; weights that the model has not: extra\."),
        (("q", "mask"), r"used twice: mask; weights that are filled twice: q\."),
        (("extra", "w"), r"used twice: w; weights that the model has not: extra\."),
    ],
)
def test_what_is_too_much_is_named(source, rule, words):
    keys = make_map(source)
    keys.add(*rule)
    with pytest.raises(ValueError, match=words):
        keys.check()


def test_shapes_are_checked_before_anything_is_read(source, tmp_path):
    keys = KeyMap(source, {**TARGET, "out.bias": torch.Size([3]), "extra": torch.Size([5])})
    keys.rules = [*make_map(source).rules]
    keys.add("extra", "mask", lambda mask: mask.view(2, 2))
    (tmp_path / "file.pt").unlink()
    words = r"out.bias is \(3,\), but becomes \(2,\) from scale, w, b.*mask .* cannot become"
    with pytest.raises(ValueError, match=words):
        keys.check()


def test_keys_are_dropped_by_their_beginning(source):
    keys = make_map(source, "mask")
    keys.drop_all("ma", "made anew")
    keys.check()
    assert keys.dropped == {"mask": "made anew"}


def test_tied_weights_are_listed_once():
    prior = build_prior()
    assert set(list_parameters(prior)) == set(prior.state_dict()) - set(prior.all_tied_weights_keys or {})
    assert list_parameters(nn.Linear(2, 3)) == {"weight": torch.Size([3, 2]), "bias": torch.Size([3])}
