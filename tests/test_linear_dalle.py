"""`DalleLinear` against `nn.Linear`: values, gradients, and where it stands aside."""

import importlib.util
import sys

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_dalle import linear_dalle
from hf_dalle.linear_dalle import DalleLinear, DallePriorHead, linear


def draw(*shape, seed=0, **kwargs):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), **kwargs)


def differentiate(function, *inputs, seed=3):
    inputs = [None if part is None else part.clone().requires_grad_() for part in inputs]
    output = function(*inputs)
    gradients = torch.autograd.grad(
        (output * draw(*output.shape, seed=seed)).sum(), [x for x in inputs if x is not None]
    )
    return output, *gradients


def is_onednn(output):
    return "OneDnn" in type(output.grad_fn).__name__


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(1, 5), min_size=0, max_size=3),
    st.integers(1, 70),
    st.integers(1, 70),
    st.booleans(),
    st.booleans(),
)
def test_values_and_gradients_are_those_of_f_linear(rows, num_in, num_out, use_bias, is_transposed):
    x, weight = draw(*rows, num_in), draw(num_out, num_in, seed=1)
    bias = draw(num_out, seed=2) if use_bias else None
    if is_transposed and len(rows) > 1:
        x = x.transpose(0, 1)
    expected = differentiate(F.linear, x, weight, bias)
    for found, right in zip(differentiate(linear, x, weight, bias), expected, strict=True):
        torch.testing.assert_close(found, right, atol=1e-4, rtol=1e-4)
        assert found.shape == right.shape
    with torch.no_grad():
        torch.testing.assert_close(linear(x, weight, bias), expected[0].detach(), atol=1e-4, rtol=1e-4)


def test_takes_its_own_path_and_only_where_it_is_exact():
    layer, x = DalleLinear(7, 5), draw(3, 7)
    assert is_onednn(layer(x)) == linear_dalle._HAS_ONEDNN
    with torch.backends.mkldnn.flags(enabled=False):
        assert not is_onednn(layer(x))
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16 and not is_onednn(layer(x))
    assert layer.double()(x.double()).dtype == torch.float64
    assert layer.bfloat16()(x.bfloat16()).dtype == torch.bfloat16
    assert linear(draw(0, 7), draw(5, 7)).shape == (0, 5)
    with pytest.raises(RuntimeError):
        linear(draw(3, 6), draw(5, 7))


def test_head_gives_some_of_its_rows():
    head, x = DallePriorHead(7, 10, bias=False), draw(2, 3, 7)
    text, image = head(x[:, :2], x[:, 2:], 4, 5)
    torch.testing.assert_close(text, F.linear(x[:, :2], head.weight[:4]))
    torch.testing.assert_close(image, F.linear(x[:, 2:], head.weight[5:]))
    (text.sum() + image.sum()).backward()
    torch.testing.assert_close(
        head.weight.grad[[0, 4, 9]], torch.stack([x[:, :2].sum((0, 1)), x[0, 0] * 0, x[:, 2].sum(0)])
    )


def test_frozen_weights_and_inputs_get_no_gradient():
    layer, x = DalleLinear(7, 5).requires_grad_(False), draw(2, 7, requires_grad=True)
    layer(x).sum().backward()
    torch.testing.assert_close(x.grad, layer.weight.sum(dim=0).expand(2, -1))
    assert layer.weight.grad is None and layer.bias.grad is None


def test_compiles_and_exports():
    layer, x = DalleLinear(7, 5), draw(3, 7)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), layer(x))
    found = differentiate(lambda x: compiled(x), x)
    for one, other in zip(found, differentiate(lambda x: layer(x), x), strict=True):
        torch.testing.assert_close(one, other)
    program = torch.export.export(layer, (x,))
    assert "aten.linear" in str(program.graph) and "hf_dalle" not in str(program.graph)


def test_a_second_copy_of_the_module_loads_and_leaves_the_first_its_operator():
    operator = torch.ops.hf_dalle.linear.default
    for _ in range(2):
        spec = importlib.util.spec_from_file_location("second_linear_dalle", linear_dalle.__file__)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    assert "second_linear_dalle" not in sys.modules
    compiled = torch.compile(module.linear, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(draw(2, 3), draw(4, 3)), F.linear(draw(2, 3), draw(4, 3)))
    assert torch.ops.hf_dalle.linear.default is operator and operator._schema.name == "hf_dalle::linear"
    compiled = torch.compile(linear_dalle.linear, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(draw(2, 3), draw(4, 3)), F.linear(draw(2, 3), draw(4, 3)))
