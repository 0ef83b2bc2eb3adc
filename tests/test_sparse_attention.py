"""Attention in blocks, and FlexAttention: equal to dense attention with the same mask, forward and gradients.

The masks themselves are held by `test_image_attention.py`; caches by `test_cache_dalle.py`.
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import ATTENTION_TYPES, build_prior
from torch.nn.attention.flex_attention import create_mask
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import DynamicCache, StaticCache

from hf_dalle import sparse_attention
from hf_dalle.image_attention import image_attention_mask, stream_attention_mask
from hf_dalle.sparse_attention import (
    attend_in_blocks,
    choose_start_mask,
    flex_attention_mask,
    is_faster_in_blocks,
    plan_image_blocks,
)


SPARSE_TYPES = ATTENTION_TYPES[1:]
TOLERANCE = {"atol": 3e-5, "rtol": 3e-5}
GRID, TEXT = 16, 12  # of a model large enough to choose blocks
each_type = pytest.mark.parametrize("attention_type", SPARSE_TYPES)
each_way = pytest.mark.parametrize("use_copies", [False, True], ids=["two parts", "copies"])


def draw_states(batch_size, num_heads, num_states, head_dim=4, dtype=torch.float64):
    """Query, key and value as projections give them, and a gradient of the output."""
    generator = torch.Generator().manual_seed(0)
    shape = (batch_size, num_states, num_heads, head_dim)
    query, key, value, grad = (
        torch.randn(shape, generator=generator, dtype=dtype).transpose(1, 2).requires_grad_() for _ in range(4)
    )
    return (query, key, value), grad.detach()


def attend_densely(query, key, value, attention_type, text_length, grid_size, kernel_size):
    num_states, head_dim = query.shape[2:]
    mask = stream_attention_mask(attention_type, text_length, grid_size, kernel_size)[:num_states, :num_states]
    scores = (query @ key.mT / head_dim**0.5).masked_fill(~mask, -torch.inf)
    return scores.softmax(-1) @ value


def attend_with_copies(*states_and_sizes):
    """The way of other devices, and of dropout, on this one: with a dropout that drops nothing."""
    return attend_in_blocks(*states_and_sizes, dropout=1e-300)


def assert_equal_to_dense(states, grad, sizes, use_copies=False, **tolerance):
    blocked = (attend_with_copies if use_copies else attend_in_blocks)(*states, *sizes)
    dense = attend_densely(*states, *sizes)
    torch.testing.assert_close(blocked, dense, **tolerance)
    grads = [torch.autograd.grad(output, states, grad) for output in (blocked, dense)]
    torch.testing.assert_close(*grads, **tolerance)


# ------------------------------------------------------------------------------------------------------ exact


@settings(max_examples=150, deadline=None)
@given(
    attention_type=st.sampled_from(ATTENTION_TYPES),
    batch_size=st.integers(1, 3),
    num_heads=st.integers(1, 2),
    text_length=st.integers(1, 9),
    grid_size=st.integers(1, 9),
    kernel_size=st.integers(0, 6).map(lambda half: 2 * half + 1),
    share=st.floats(0, 1),
    use_copies=st.booleans(),
)
def test_blocks_are_dense_attention(
    attention_type, batch_size, num_heads, text_length, grid_size, kernel_size, share, use_copies
):
    """On any grid, text, batch and kernel, and on any start of the stream: forward and gradients."""
    num_states = max(1, round(share * (text_length + grid_size**2)))
    states, grad = draw_states(batch_size, num_heads, num_states)
    sizes = (attention_type, text_length, grid_size, kernel_size)
    assert_equal_to_dense(states, grad, sizes, use_copies, atol=1e-12, rtol=1e-10)


@each_type
@each_way
@pytest.mark.parametrize("num_missing", [0, 5])
def test_blocks_are_dense_attention_where_a_window_is_longer_than_a_kernels_block(
    attention_type, use_copies, num_missing
):
    grid_size, text_length = 28, 530
    states, grad = draw_states(1, 1, text_length + grid_size**2 - num_missing, dtype=torch.float32)
    sizes = (attention_type, text_length, grid_size, 41)
    if attention_type == "conv":
        assert max(blocks.num_keys for blocks in plan_image_blocks("conv", grid_size, 41, grid_size**2)) > 512
    assert_equal_to_dense(states, grad, sizes, use_copies, **TOLERANCE)


@each_type
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 0.05), (torch.float16, 0.01)])
def test_half_precision(attention_type, dtype, tolerance):
    states, _ = draw_states(2, 2, 10 + 64, head_dim=8, dtype=torch.float32)
    output = attend_in_blocks(*(part.to(dtype) for part in states), attention_type, 10, 8, 3)
    assert output.dtype == dtype
    dense = attend_densely(*states, attention_type, 10, 8, 3)
    torch.testing.assert_close(output.float(), dense, atol=tolerance, rtol=tolerance)


@each_type
@each_way
def test_gradients_are_those_of_finite_differences(attention_type, use_copies):
    states, _ = draw_states(1, 1, 2 + 25, head_dim=2)
    attend = attend_with_copies if use_copies else attend_in_blocks
    assert torch.autograd.gradcheck(lambda *inputs: attend(*inputs, attention_type, 2, 5, 3), states)


def test_scale_is_honoured():
    (query, key, value), _ = draw_states(1, 1, 2 + 9)
    scaled = attend_in_blocks(query, key, value, "row", 2, 3, 3, scale=0.1)
    torch.testing.assert_close(scaled, attend_in_blocks(query * 0.2, key, value, "row", 2, 3, 3))


@each_type
def test_dropout_drops_each_weight_with_its_probability(attention_type):
    """With one-hot values the output is the weights: each is dropped, or divided by the share that is kept."""
    text_length, grid_size, dropout = 3, 5, 0.3
    num_states = text_length + grid_size**2
    (query, key, _), _ = draw_states(2, 2, num_states, head_dim=num_states)
    value = torch.eye(num_states, dtype=torch.float64).expand_as(query)
    sizes = (attention_type, text_length, grid_size, 3)
    weights = attend_densely(query, key, value, *sizes)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        draws = torch.stack([attend_in_blocks(query, key, value, *sizes, dropout=dropout) for _ in range(50)])
    is_kept = draws > 0
    torch.testing.assert_close(draws, torch.where(is_kept, weights / (1 - dropout), 0.0))
    is_kept = is_kept[:, weights > 0].double()
    deviation = (dropout * (1 - dropout) / len(draws)) ** 0.5
    assert (is_kept.mean(0) - (1 - dropout)).abs().max() < 6 * deviation
    assert abs(is_kept.mean() - (1 - dropout)) < 6 * deviation / is_kept.shape[1] ** 0.5


# ----------------------------------------------------------------------------------------- the plan, and its cost


@given(
    attention_type=st.sampled_from(SPARSE_TYPES),
    grid_size=st.integers(1, 9),
    kernel_size=st.integers(0, 6).map(lambda half: 2 * half + 1),
    share=st.floats(0, 1),
    num_copied_keys=st.sampled_from([0, 1, 300]),
)
def test_plan_has_each_query_once_and_what_it_sees(attention_type, grid_size, kernel_size, share, num_copied_keys):
    num_states = round(share * grid_size**2)
    mask = image_attention_mask(attention_type, grid_size, kernel_size)[:num_states, :num_states]
    states = torch.arange(num_states)
    if attention_type == "column":
        states = (states % grid_size).argsort(stable=True)
    queries = []
    for blocks in plan_image_blocks(attention_type, grid_size, kernel_size, num_states, num_copied_keys):
        chosen = zip(blocks.select_queries(states[None]), blocks.select_keys(states[None, :, None]), strict=True)
        for block, window in chosen:
            queries += block[0].tolist()
            window = window[0, :, 0]
            assert mask[block[0]].sum() == mask[block[0][:, None], window].sum()
    assert sorted(queries) == list(range(num_states))


@pytest.mark.parametrize(
    ("text_length", "grid_size", "is_faster"),
    [(1, 1, False), (5, 4, False), (32, 8, False), (64, 16, True), (256, 32, True)],
)
@each_type
def test_blocks_are_chosen_by_size(attention_type, text_length, grid_size, is_faster):
    sizes = (attention_type, text_length, grid_size, 11)
    assert is_faster_in_blocks(*sizes, text_length + grid_size**2) == is_faster
    assert not is_faster_in_blocks(*sizes, text_length)  # only text: causal


def test_cost_grows_with_the_grid_and_not_with_its_square():
    def count_scores(attention_type, grid_size):
        plan = plan_image_blocks(attention_type, grid_size, 11, grid_size**2)
        return sum(blocks.num_blocks * blocks.num_queries * blocks.num_keys for blocks in plan)

    for attention_type, windows in {"row": 3, "column": 1, "conv": 9}.items():
        for grid_size in (16, 32, 64):
            assert count_scores(attention_type, grid_size) <= windows * grid_size**3


# ------------------------------------------------------------------------------------------------- in the model


class LargestTensor(TorchDispatchMode):
    """Notes the number of elements of the largest tensor that any operator gives."""

    num_elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        output = func(*args, **(kwargs or {}))
        sizes = [leaf.numel() for leaf in tree_leaves(output) if isinstance(leaf, torch.Tensor)]
        self.num_elements = max([self.num_elements, *sizes])
        return output


def build_large_prior(*attention_types, **kwargs):
    types = list(attention_types or ATTENTION_TYPES)
    return build_prior(image_grid_size=GRID, attention_types=types, initializer_range=0.1, **kwargs)


def draw_ids(prior, num_states=TEXT + GRID**2, batch_size=2):
    config, generator = prior.config, torch.Generator().manual_seed(1)
    text_ids = torch.randint(config.text_vocab_size, (batch_size, TEXT), generator=generator)
    image_tokens = torch.randint(config.image_vocab_size, (batch_size, GRID**2), generator=generator)
    return prior.join_stream(text_ids, None, image_tokens)["input_ids"][:, :num_states]


@each_type
@pytest.mark.parametrize("num_ids", [TEXT + GRID**2 + 1, TEXT + GRID**2 - 37])
def test_model_in_blocks_is_the_eager_one(attention_type, num_ids):
    prior = build_large_prior("full", attention_type)
    ids = draw_ids(prior, num_ids)
    assert is_faster_in_blocks(attention_type, TEXT, GRID, 3, num_ids - 1)
    losses, grads = [], []
    for attn_implementation in ("sdpa", "eager"):
        prior.set_attn_implementation(attn_implementation)
        losses.append(prior(ids, labels=ids).loss)
        grads.append(torch.autograd.grad(losses[-1], list(prior.parameters())))
    torch.testing.assert_close(*losses, **TOLERANCE)
    torch.testing.assert_close(*grads, **TOLERANCE)


def test_no_tensor_is_as_large_as_a_mask():
    """Neither full layers nor sparse ones hold anything of the size states x states, forward or backward."""
    prior = build_large_prior()
    ids = draw_ids(prior, batch_size=1)
    largest = {}
    for attn_implementation in ("sdpa", "eager"):
        prior.set_attn_implementation(attn_implementation)
        with LargestTensor() as mode:
            prior.model(ids, use_cache=False).last_hidden_state.sum().backward()
        largest[attn_implementation] = mode.num_elements
    assert largest["sdpa"] <= ids.shape[1] * prior.config.intermediate_size < ids.shape[1] ** 2 <= largest["eager"]


@pytest.mark.parametrize("kind", ["own", "dynamic", "static"])
@pytest.mark.parametrize("num_states", [TEXT, TEXT + 200])
def test_prefill_in_blocks_fills_the_cache(kind, num_states):
    prior = build_large_prior()
    ids = draw_ids(prior, num_states + 2)
    caches = {"own": None, "dynamic": DynamicCache(config=prior.config)}
    caches["static"] = StaticCache(config=prior.config, max_cache_len=prior.config.stream_length)
    with torch.no_grad():
        start = prior(ids[:, :num_states], past_key_values=caches[kind], use_cache=True)
        steps = [
            prior(ids[:, state : state + 1], past_key_values=start.past_key_values)
            for state in range(num_states, num_states + 2)
        ]
        prior.set_attn_implementation("eager")
        whole = prior(ids).logits
    logits = torch.cat([start.logits, *(step.logits for step in steps)], dim=1)
    torch.testing.assert_close(logits, whole, **TOLERANCE)


def test_training_with_dropout_and_in_bfloat16():
    prior = build_large_prior(attention_dropout=0.5).train()
    ids = draw_ids(prior)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        first, second = prior(ids, labels=ids).loss, prior(ids, labels=ids).loss
    assert not first.equal(second)
    prior.eval()
    with torch.autocast("cpu", torch.bfloat16):
        loss = prior(ids, labels=ids).loss
    loss.backward()
    torch.testing.assert_close(loss, prior(ids, labels=ids).loss, atol=0.05, rtol=0.02)
    assert all(parameter.grad.isfinite().all() for parameter in prior.parameters())


@pytest.mark.slow
def test_training_compiles_into_one_graph():
    prior = build_large_prior()
    ids = draw_ids(prior)
    compiled = torch.compile(prior.model, backend="aot_eager", fullgraph=True)
    states = [model(ids, use_cache=False).last_hidden_state for model in (compiled, prior.model)]
    torch.testing.assert_close(*states, **TOLERANCE)
    grads = [torch.autograd.grad((state**3).sum(), list(prior.model.parameters())) for state in states]
    torch.testing.assert_close(*grads, atol=1e-3, rtol=1e-4)


# ------------------------------------------------------------------------------------------------ FlexAttention


@settings(max_examples=30, deadline=None)
@given(
    attention_type=st.sampled_from(ATTENTION_TYPES),
    text_length=st.integers(1, 9),
    grid_size=st.integers(1, 7),
    kernel_size=st.integers(0, 4).map(lambda half: 2 * half + 1),
    share=st.floats(0, 1),
)
def test_flex_mask_is_the_mask(attention_type, text_length, grid_size, kernel_size, share):
    num_states = max(1, round(share * (text_length + grid_size**2)))
    sizes = (attention_type, text_length, grid_size, kernel_size)
    mask = flex_attention_mask(*sizes, num_states)
    assert mask.shape == (1, 1, num_states, num_states)
    seen = create_mask(mask.mask_mod, None, None, num_states, num_states, device="cpu")[0, 0]
    assert seen.equal(stream_attention_mask(*sizes)[:num_states, :num_states])
    assert flex_attention_mask(*sizes, num_states) is mask


def test_flex_mask_skips_blocks():
    dense, sparse = (flex_attention_mask(kind, 256, 32, 11, 1280) for kind in ("full", "column"))
    row = flex_attention_mask("row", 256, 32, 11, 1280)
    assert row.sparsity() > dense.sparsity() and sparse.sparsity() >= dense.sparsity()


def assert_flex_is_eager(num_states):
    prior = build_large_prior()
    ids = draw_ids(prior)
    with torch.no_grad():
        prior.set_attn_implementation("eager")
        eager = prior(ids).logits
        prior.set_attn_implementation("flex_attention")
        start = prior(ids[:, :num_states], use_cache=True)
        rest = prior(ids[:, num_states:], past_key_values=start.past_key_values)
    torch.testing.assert_close(torch.cat([start.logits, rest.logits], dim=1), eager, **TOLERANCE)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex_is_eager_and_goes_on_from_a_cache():
    with torch.compiler.set_stance("force_eager"):
        assert_flex_is_eager(TEXT + 50)


@pytest.mark.slow
def test_compiled_flex_is_eager():
    assert_flex_is_eager(TEXT + 200)


def test_training_under_flex_on_a_cpu_is_refused():
    prior = build_large_prior()
    prior.set_attn_implementation("flex_attention")
    ids = draw_ids(prior)
    with pytest.raises(ValueError, match="no backward pass on a device of type 'cpu', only on cuda.*='sdpa'.*no_grad"):
        prior(ids, labels=ids)
    prior.requires_grad_(False).model.layers[0].self_attn.q_proj.requires_grad_(True)  # as with an adapter
    with pytest.raises(ValueError, match="no backward pass on a device of type 'cpu'"):
        prior(ids, labels=ids)


def test_flex_on_a_device_that_it_does_not_know_is_refused():
    states = torch.empty(1, 14, 8, device="meta")
    with pytest.raises(ValueError, match="does not run on a device of type 'meta', only on cpu, cuda.*='sdpa'"):
        choose_start_mask("flex_attention", "row", 5, 3, 3, states)


def test_only_the_kernels_own_name_is_private():
    """The kernel that gives its normalizers, which a new version of torch may rename: then this fails first."""
    query, key, value = draw_states(1, 2, 7)[0]
    output, normalizer = sparse_attention._attend(query, key, value, None, None)
    assert output.shape == query.shape and normalizer.shape == query.shape[:3]
    scores = (query @ key.mT / 2).masked_fill(torch.ones(7, 7, dtype=torch.bool).triu(1), -torch.inf)
    torch.testing.assert_close(normalizer.double(), scores.logsumexp(-1), atol=1e-6, rtol=1e-6)
