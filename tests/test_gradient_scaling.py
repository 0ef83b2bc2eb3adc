"""Gradient scales: what float16 loses without them, what it keeps with them, their rules, one decision everywhere."""

import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_streams import build_small_prior, draw_inputs
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from hf_dalle.gradient_scaling import GlobalGradientScaler, GradientScaler, ResblockGradientScaler
from hf_dalle.optimization import BoundedAdamW


BLOCKS = [f"model.layers.{i}.{part}" for i in range(4) for part in ("self_attn", "mlp")]
OUTSIDE = ["model.norm.weight"]


def build(*attention_types, **kwargs):
    return build_small_prior(*attention_types, initializer_range=0.1, **kwargs).train()


def compute_loss(prior, seed=0, batch_size=2):
    ids = prior.join_stream(*draw_inputs(seed=seed, batch_size=batch_size))["input_ids"]
    return prior(input_ids=ids, labels=ids).loss


def collect(prior):
    return {name: parameter.grad.clone() for name, parameter in prior.named_parameters()}


def list_block(grads, block):
    layer, part = block.rsplit(".", 1)
    norm = {"self_attn": "input_layernorm", "mlp": "post_attention_layernorm"}[part]
    return {name: grad for name, grad in grads.items() if name.startswith((f"{block}.", f"{layer}.{norm}."))}


def relative_error(grads, expected):
    difference = sum((grads[name] - expected[name]).square().sum() for name in expected)
    return (difference / sum(grad.square().sum() for grad in expected.values())).sqrt().item()


def compute_gradients(prior, factor=1.0):
    """In float32, without a scaler."""
    prior.zero_grad()
    (compute_loss(prior) * factor).backward()
    return collect(prior)


# ------------------------------------------------------------------------------------------------------ gradients


@pytest.mark.parametrize("use_checkpointing", [False, True])
def test_scales_of_powers_of_two_change_nothing_in_float32(use_checkpointing):
    expected = compute_gradients(build())
    prior = build()
    scaler = ResblockGradientScaler(prior, dtype=None)
    scaler.scales.update({block: 2.0 ** (7 + i) for i, block in enumerate(BLOCKS)})
    if use_checkpointing:
        prior.gradient_checkpointing_enable({"use_reentrant": False})
    scaler.scale_loss(compute_loss(prior)).backward()
    for i, block in enumerate(BLOCKS):  # in the backward pass they are scaled, each block's by its own
        for name, grad in list_block(collect(prior), block).items():
            assert torch.equal(grad, expected[name] * 2.0 ** (7 + i))
            assert scaler.scale_of(prior.get_parameter(name)) == 2.0 ** (7 + i)
    assert scaler.scale_of(prior.lm_head.weight) == scaler.scale_of(prior.model.norm.weight) == 1.0
    assert scaler.unscale() is True
    grads = collect(prior)
    assert all(torch.equal(grads[name], expected[name]) for name in expected) and len(expected) == len(grads)


@pytest.mark.parametrize("use_checkpointing", [False, True])
def test_gradients_that_underflow_in_float16_come_out_right_with_scales(use_checkpointing):
    factor = 2.0**-20  # as a large batch or a deep model has them: below 6e-8 they are zeros in float16
    expected = compute_gradients(build(), factor)
    grads = {}
    for scale in (1.0, 2.0**13):
        prior = build()
        if use_checkpointing:
            prior.gradient_checkpointing_enable({"use_reentrant": False})
        scaler = ResblockGradientScaler(prior)
        scaler.scales.update(dict.fromkeys(BLOCKS, scale))
        scaler.scale_loss(compute_loss(prior) * factor).backward()
        assert scaler.unscale()
        grads[scale] = collect(prior)
    for block in BLOCKS:
        block_grads = list_block(expected, block)
        assert len(block_grads) in (6, 10) and all(grad.any() for grad in block_grads.values() if grad.ndim == 2)
        assert relative_error(grads[1.0], block_grads) > 0.5
        assert relative_error(grads[2.0**13], block_grads) < 0.01
    matrices = [name for name in expected if name.endswith(("fc1.weight", "v_proj.weight"))]
    assert sum(grads[1.0][name].count_nonzero().item() == 0 for name in matrices) > len(matrices) / 2
    outside = [name for name in expected if ".layers." not in name]
    assert relative_error(grads[2.0**13], {name: expected[name] for name in outside}) < 0.01


def test_branches_compute_in_float16_and_all_else_in_float32():
    prior, dtypes, grads = build(), {}, {}

    def note(name):
        def hook(module, args, output):
            output = output[0] if isinstance(output, tuple) else output
            dtypes[name] = output.dtype
            output.register_hook(lambda grad: grads.update({name: grad.dtype}))

        return hook

    # Before the scaler's: these see what a module's forward gives.
    layer = prior.model.layers[1]
    parts = {"embeddings": prior.model.dropout, "norm": layer.input_layernorm, "query": layer.self_attn.q_proj}
    parts |= {"fc1": layer.mlp.fc1, "attention": layer.self_attn, "mlp": layer.mlp, "layer": layer}
    parts |= {"states": prior.model.norm}
    for name, part in parts.items():
        part.register_forward_hook(note(name))
    scaler = ResblockGradientScaler(prior)
    ids = prior.join_stream(*draw_inputs())["input_ids"]
    output = prior(input_ids=ids, labels=ids)
    output.loss.backward()
    assert output.text_logits.dtype == output.image_logits.dtype == torch.float32
    halves = {"query", "fc1"}
    for seen in (dtypes, grads):
        assert {name for name, dtype in seen.items() if dtype == torch.float16} == halves
        assert {name for name, dtype in seen.items() if dtype == torch.float32} == parts.keys() - halves
    assert all(parameter.grad.dtype == torch.float32 for parameter in prior.parameters()) and scaler.unscale()


@pytest.mark.parametrize("attn_implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("kind", [ResblockGradientScaler, GlobalGradientScaler])
def test_float16_is_near_float32_for_each_implementation(kind, attn_implementation):
    prior = build()
    prior.set_attn_implementation(attn_implementation)
    expected = compute_gradients(prior)
    scaler = kind(prior)
    prior.zero_grad()
    scaler.scale_loss(compute_loss(prior)).backward()
    assert scaler.unscale()
    assert 0 < relative_error(collect(prior), expected) < 0.01


@pytest.mark.parametrize("kind", [ResblockGradientScaler, GlobalGradientScaler])
def test_accumulated_gradients_are_unscaled_once(kind):
    prior = build()
    halves = [compute_loss(prior, seed) / 2 for seed in (0, 1)]
    sum(halves).backward()
    expected = collect(prior)
    prior.zero_grad()
    scaler = kind(prior, dtype=None)
    for seed in (0, 1):
        scaler.scale_loss(compute_loss(prior, seed) / 2).backward()
    assert scaler.unscale()
    assert relative_error(collect(prior), expected) < 1e-6


def test_a_block_that_overflows_spoils_no_other_and_lowers_its_own_scale_only():
    expected = compute_gradients(build())
    prior, sick = build(), "model.layers.2.mlp"
    scaler = ResblockGradientScaler(prior)
    scaler.scales[sick] = 2.0**24
    before = dict(scaler.scales)
    compute_loss(prior).backward()
    grads = collect(prior)
    assert not all(torch.isfinite(grad).all() for grad in list_block(grads, sick).values())
    others = {name: grad for name, grad in grads.items() if name not in list_block(grads, sick)}
    assert all(torch.isfinite(grad).all() for grad in others.values())
    behind = list_block(expected, "model.layers.3.self_attn")  # the backward pass came here first
    assert relative_error({name: grad / 2.0**13 for name, grad in grads.items()}, behind) < 0.01
    assert scaler.unscale() is False
    scaler.update()
    assert scaler.scales == {**before, sick: 2.0**24 / math.sqrt(2)}
    prior.zero_grad()
    scaler.scales[sick] = 2.0**13
    compute_loss(prior).backward()
    assert scaler.unscale() is True
    scaler.update()
    assert scaler.scales == pytest.approx(dict.fromkeys(BLOCKS, 2.0**13.001))


@pytest.mark.parametrize("name", ["model.embed_tokens.weight", "model.norm.bias"])
@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_a_gradient_outside_the_blocks_skips_the_update_and_lowers_nothing(name, value):
    prior = build()
    scaler = ResblockGradientScaler(prior)
    compute_loss(prior).backward()
    prior.get_parameter(name).grad.flatten()[3] = value
    assert scaler.unscale() is False
    scaler.update()
    assert set(scaler.scales.values()) == {2.0**13}


def test_frozen_blocks_are_watched_where_gradients_leave_them():
    """As with adapters: one matrix trains, so that what overflows elsewhere shows in no parameter's gradient."""
    prior, frozen, mixed = build(), "model.layers.3.mlp", "model.layers.1.self_attn"
    prior.requires_grad_(False)
    prior.model.layers[1].self_attn.q_proj.weight.requires_grad_(True)
    scaler = ResblockGradientScaler(prior)
    before = dict(scaler.scales)
    compute_loss(prior).backward()
    assert scaler.unscale() is True
    scaler.update()
    scaler.load_state_dict({"scales": before, "num_since_backoff": dict.fromkeys(BLOCKS, 125)})
    scaler.scales[frozen] = 2.0**24
    prior.zero_grad()
    compute_loss(prior).backward()
    assert torch.isfinite(prior.get_parameter(f"{mixed}.q_proj.weight").grad).all()
    assert scaler.unscale() is False
    scaler.update()
    assert scaler.scales == {**before, frozen: 2.0**24 / math.sqrt(2)}
    compute_loss(prior).backward()
    scaler.scales[frozen] = 2.0**13
    prior.zero_grad()
    compute_loss(prior).backward()
    assert scaler.unscale() is False  # what was seen since the last update counts, as with accumulated gradients
    scaler.update()
    compute_loss(prior).backward()
    assert scaler.unscale() is True


# ---------------------------------------------------------------------------------------------------------- rules


def set_gradients(model, sick):
    """Gradients of 1, with an inf in the parameters of these blocks (`None`: outside)."""
    parameters = dict(model.named_parameters())
    names = {name for block in sick for name in (list_block(parameters, block) if block else OUTSIDE)}
    for name, parameter in parameters.items():
        parameter.grad = torch.ones_like(parameter)
        if name in names:
            parameter.grad.flatten()[-1] = math.inf


runs = st.lists(
    st.tuples(st.sets(st.sampled_from(["a", "b", None])), st.sampled_from([1, 2, 60, 124, 125, 126])), max_size=4
)


@settings(max_examples=15, deadline=None)
@given(st.floats(7, 24), runs)
def test_rules_against_a_literal_simulation(log_scale, runs):
    """Each step as the paper tells it."""
    model = build("full", hidden_size=4, num_attention_heads=1).model
    scaler = ResblockGradientScaler(model)
    names = {"a": "layers.0.self_attn", "b": "layers.0.mlp", None: None}
    scales = {"a": 2.0**log_scale, "b": 2.0**13}
    scaler.scales.update({names[key]: scale for key, scale in scales.items()})
    last_backoff = {"a": None, "b": None}
    updates = [sick for sick, count in runs for _ in range(count)]
    for step, sick in enumerate(updates):
        for name, parameter in model.named_parameters():
            is_attention = name.startswith(("layers.0.self_attn.", "layers.0.input_layernorm."))
            key = "a" if is_attention else "b" if name.startswith("layers.0.") else None
            parameter.grad = torch.full_like(parameter, math.nan if key in sick else 1.0)
        assert scaler.unscale() is (not sick)
        scaler.update()
        for key in scales:
            if not sick:
                scales[key] = min(scales[key] * 2 ** (1 / 1000), 2.0**24)
            elif key in sick and (last_backoff[key] is None or step - last_backoff[key] >= 125):
                scales[key] = max(scales[key] / math.sqrt(2), 2.0**7)
                last_backoff[key] = step
        assert scaler.scales == pytest.approx({names[key]: scale for key, scale in scales.items()}, rel=1e-12)


def test_rules_as_a_table():
    model = build("full")
    scaler = ResblockGradientScaler(model)
    first, second = scaler.scales
    assert scaler.scales == {first: 8192.0, second: 8192.0}

    def do(sick, count=1):
        for _ in range(count):
            set_gradients(model, sick)
            scaler.unscale()
            scaler.update()
        return [math.log2(scale) for scale in scaler.scales.values()]

    assert do([], 1000) == pytest.approx([14, 14])
    assert do([first]) == pytest.approx([13.5, 14])  # lowered, and the other not raised: the update is skipped
    assert do([first], 124) == pytest.approx([13.5, 14])  # not twice within 125 updates
    assert do([first]) == pytest.approx([13, 14])
    assert do([], 125) == pytest.approx([13.125, 14.125])
    assert do([first, second, None]) == pytest.approx([12.625, 13.625])
    scaler.scales.update({first: 2.0**7 * 1.1, second: 2.0**24 / 1.0001})
    assert do([], 125) == [pytest.approx(7.1375 + 0.125, abs=1e-3), 24]
    assert do([first]) == [7, 24]


def test_the_global_scale_goes_as_that_of_torch():
    weight = torch.nn.Linear(1, 1, bias=False)
    scaler, theirs = GlobalGradientScaler(weight), torch.amp.GradScaler("cpu")
    optimizer = torch.optim.SGD(weight.parameters(), lr=0.0)
    flags = [True] * 10 + [False] + [True] * 2000 + [False, False, True]
    for is_finite in flags:
        scale = theirs.scale(torch.ones(())).item()
        assert scaler.scale == scaler.scale_of(weight.weight) == scale
        weight.weight.grad = torch.full((1, 1), scale if is_finite else math.inf)
        theirs.step(optimizer)  # which unscales
        theirs.update()
        if is_finite:
            weight.weight.grad.fill_(scale)
        assert scaler.unscale() is is_finite
        assert not is_finite or weight.weight.grad.item() == 1.0
        scaler.update()
    assert scaler.scale == 2.0**14


# ------------------------------------------------------------------------------------------------- state, the model


@pytest.mark.parametrize("kind", [ResblockGradientScaler, GlobalGradientScaler])
def test_state_goes_on(kind, tmp_path):
    def run(scaler, start, end):
        for step in range(start, end):
            set_gradients(scaler.model, [BLOCKS[1]] if step % 20 == 0 else [])
            scaler.unscale()
            scaler.update()
        return scaler.state_dict()

    whole = run(kind(build("full")), 0, 50)
    torch.save(run(kind(build("full")), 0, 30), tmp_path / "state.pt")
    resumed = kind(build("full"))
    resumed.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert run(resumed, 30, 50) == whole != kind(build("full")).state_dict()
    before = resumed.state_dict()
    resumed.load_state_dict(GradientScaler(build("full")).state_dict())  # of a run without scales
    assert resumed.state_dict() == before


def test_a_state_of_others_is_refused():
    small, prior = build("full"), build()
    scaler = ResblockGradientScaler(prior)
    for other in (GlobalGradientScaler(build()), ResblockGradientScaler(small)):
        with pytest.raises(ValueError, match="This state is of other gradient scales: .*, not "):
            scaler.load_state_dict(other.state_dict())
    with pytest.raises(ValueError, match="Call `unscale\\(\\)`"):
        scaler.update()
    with pytest.raises(ValueError, match="use one global gradient scale"):
        ResblockGradientScaler(torch.nn.Linear(2, 2))
    for kind in (ResblockGradientScaler, GlobalGradientScaler):
        with pytest.raises(ValueError, match="torch.bfloat16; float16 training keeps its weights in float32"):
            kind(build().bfloat16())


@pytest.mark.parametrize("kind", [ResblockGradientScaler, GlobalGradientScaler])
def test_a_model_that_is_evaluated_copied_or_let_go_is_the_plain_one(kind):
    prior = build()
    expected, plain = compute_gradients(prior), compute_loss(prior.eval())
    prior.zero_grad()
    scaler = kind(prior)
    assert torch.equal(compute_loss(prior), plain)
    text_ids, attention_mask, _ = draw_inputs()
    stream = prior.join_stream(text_ids, attention_mask)
    assert prior.generate(**stream, do_sample=False).shape == (2, 22)
    copied = copy.deepcopy(prior).train()
    with torch.no_grad():
        prior.model.embed_tokens.weight.zero_()
    assert compute_loss(copied).item() == pytest.approx(plain.item(), rel=1e-3)
    prior.load_state_dict(copied.state_dict())
    scaler.remove()
    assert "forward" not in vars(prior) and "forward" not in vars(prior.model.layers[0].mlp)
    compute_loss(prior.train()).backward()
    assert all(torch.equal(grad, expected[name]) for name, grad in collect(prior).items())


def test_the_null_scaler_does_nothing():
    prior = build()
    scaler = GradientScaler(prior)
    loss = compute_loss(prior)
    assert scaler.scale_loss(loss) is loss and not scaler.is_scaling and scaler.state_dict() == {}
    loss.backward()
    expected = collect(prior)
    assert scaler.unscale() is True and scaler.scale_of(prior.lm_head.weight) == 1.0
    scaler.update()
    assert all(torch.equal(grad, expected[name]) for name, grad in collect(prior).items())


# -------------------------------------------------------------------------------------------------- two processes


def run_process(rank, folder):
    torch.distributed.init_process_group("gloo", f"file://{folder}/rendezvous", rank=rank, world_size=2)
    results = {}
    for name in ("ddp", "fsdp"):
        prior = build()
        scaler = ResblockGradientScaler(prior)
        if name == "ddp":
            model = DistributedDataParallel(prior)
        else:
            for layer in prior.model.layers:
                fully_shard(layer)
            model = fully_shard(prior)
        ids = prior.join_stream(*draw_inputs())["input_ids"][rank : rank + 1]
        scaler.scale_loss(model(input_ids=ids, labels=ids).loss).backward()
        results[name, "is_finite"] = scaler.unscale()
        grads = {key: parameter.grad for key, parameter in prior.named_parameters()}
        results[name, "grads"] = {key: getattr(grad, "full_tensor", grad.clone)() for key, grad in grads.items()}
        scaler.update()
        BoundedAdamW(prior.parameters(), 1e-5, lr=0.1).step()  # some second moments are larger
        weights = {key: parameter.detach() for key, parameter in prior.named_parameters()}
        results[name, "weights"] = {key: getattr(w, "full_tensor", w.clone)() for key, w in weights.items()}
        # What only one process knows of: of a sharded gradient, one row.
        results[name, "scales"] = []
        for key in ("model.layers.2.mlp.fc1.bias", "model.norm.bias"):
            if rank == 1:
                grad = prior.get_parameter(key).grad
                getattr(grad, "to_local", lambda grad=grad: grad)()[-1] = math.nan
            assert scaler.unscale() is False
            scaler.update()
            results[name, "scales"].append(dict(scaler.scales))
            prior.get_parameter(key).grad.zero_()
    torch.save(results, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def test_two_processes_decide_alike_average_and_shard(tmp_path):
    torch.multiprocessing.spawn(run_process, (str(tmp_path),), nprocs=2)
    results = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    prior = build()
    ids = prior.join_stream(*draw_inputs())["input_ids"]
    (sum(prior(input_ids=row[None], labels=row[None]).loss for row in ids) / 2).backward()
    expected = collect(prior)
    grown = 2.0**13 * 2 ** (1 / 1000)
    for name in ("ddp", "fsdp"):
        for result in results:
            assert result[name, "is_finite"]
            assert relative_error(result[name, "grads"], expected) < 0.01
            updated = build()
            for key, parameter in updated.named_parameters():
                parameter.grad = result[name, "grads"][key]
            optimizer = BoundedAdamW(updated.parameters(), 1e-5, lr=0.1)
            optimizer.step()
            assert max(state["exp_avg_sq"].max() for state in optimizer.state.values()) == torch.tensor(1e-5)
            for key, parameter in updated.named_parameters():
                torch.testing.assert_close(result[name, "weights"][key], parameter.detach())
            lowered = {**dict.fromkeys(BLOCKS, grown), "model.layers.2.mlp": grown / math.sqrt(2)}
            assert result[name, "scales"] == [pytest.approx(lowered)] * 2
