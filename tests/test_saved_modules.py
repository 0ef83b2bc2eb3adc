"""Modules saved whole: their weights are found, what else they hold is listed, what could hide a weight is refused.

The files themselves are test_safe_load.py's.
"""

import pytest
import torch
from torch import nn

from conversion.restricted_pickle import Shell
from conversion.safe_load import list_tensors, load_checkpoint


MODULE_CLASSES = [
    *("torch.nn.modules.container.Sequential", "torch.nn.modules.linear.Linear"),
    "torch.nn.modules.activation.ReLU",
]


def save(content, path):
    torch.save(content, path)
    return path


def test_what_modules_hold_beside_their_weights_is_listed(tmp_path):
    module = nn.Sequential(nn.Linear(3, 4), nn.ReLU())
    module[0].scales = [1.0, {"of": (2.0,)}]
    content = load_checkpoint(save(module, tmp_path / "module.pkl"), MODULE_CLASSES).content
    attributes = set()
    assert set(list_tensors(content, attributes)) == {"0.weight", "0.bias"}
    assert {"training", "in_features", "scales", "inplace"} <= attributes
    assert not {"_parameters", "_buffers", "_modules"} & attributes


@pytest.mark.parametrize("wrap", [lambda x: x, lambda x: [1, {"of": (x,)}], lambda x: nn.Linear(2, 2)])
def test_a_tensor_beside_a_module_s_weights_is_refused(tmp_path, wrap):
    module = nn.Sequential(nn.Linear(3, 4), nn.ReLU())
    module[1].__dict__["hidden"] = wrap(torch.ones(2))
    content = load_checkpoint(save(module, tmp_path / "module.pkl"), MODULE_CLASSES).content
    with pytest.raises(ValueError, match=r"^1 is a 'torch.nn.modules.activation.ReLU' with a tensor in 'hidden'"):
        list_tensors(content)


def test_attributes_nested_in_themselves_end(tmp_path):
    module, shared, loop = nn.ReLU(), [], []
    for _ in range(60):
        shared = [shared, shared]
    loop.append(loop)
    module.many, module.loop = shared, loop
    content = load_checkpoint(save(module, tmp_path / "module.pkl"), MODULE_CLASSES).content
    assert list_tensors(content) == {}


@pytest.mark.parametrize(
    ("state", "words"),
    [
        ({"_parameters": [1]}, "whose `_parameters` is a list, no dict"),
        ({"_buffers": "no"}, "whose `_buffers` is a str, no dict"),
        ({"_parameters": {"w": None}, "_buffers": {}, "_modules": {"w": None}}, "two members of the name 'w'"),
        ({"_parameters": {}}, "without _parameters, _buffers, _modules: no module"),
        (None, "no module"),
        ([1], "no module"),
    ],
)
def test_shells_that_are_no_modules_are_refused(state, words):
    shell = Shell("torch.nn.modules.linear.Linear", ())
    shell.state = state
    with pytest.raises(ValueError, match=words):
        list_tensors({"part": shell})


def test_one_name_for_two_tensors_is_refused(tmp_path):
    twice = {"a.b": torch.ones(1), "a": {"b": torch.zeros(1)}}
    with pytest.raises(ValueError, match="a.b is there twice"):
        list_tensors(load_checkpoint(save(twice, tmp_path / "file.pt")).content)
