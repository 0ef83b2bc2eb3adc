"""PowerSGD: two gloo processes against the definition written out for one, error feedback, checkpoints, bytes."""

import math
import tempfile
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from tiny import build_prior
from tiny_ranks import run_ranks
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

from hf_dalle import DallePriorConfig, DallePriorForCausalLM
from hf_dalle.power_sgd import PowerSGD, SummedErrors, choose_rank, count_bytes, list_compressible


NUM_PROCESSES, NUM_STEPS, RANK = 2, 5, 3
SMALL_BUCKETS = 0.001  # MB: several buckets, most of several parameters


# ------------------------------------------------------------------------------------------- what each process does


class CountedBytes(TorchDispatchMode):
    """Adds up the bytes that all-reduces are given, whoever calls them."""

    def __init__(self):
        super().__init__()
        self.num_bytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.c10d.allreduce_.default:
            self.num_bytes += sum(tensor.numel() * tensor.element_size() for tensor in args[0])
        return function(*args, **(kwargs or {}))


def build_model(dtype=torch.float32):
    """A matrix wider than high, a square, one higher than wide; an embedding and a bias, which are not compressed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layers = [nn.Embedding(7, 12), nn.Linear(12, 20), nn.Tanh(), nn.Linear(20, 20), nn.Linear(20, 9, bias=False)]
        return nn.Sequential(*layers).to(dtype)


def compute_loss(model, rank, step, part=0):
    """Of other rows on each process, at each update, in each part of a batch."""
    rows = torch.arange(5) * (rank + 1) + step * 3 + part
    return (model(rows % 7).float() - rows[:, None] / 10).square().mean()


def find_gradients(model, rank, step, num_parts=1):
    """This process's own gradients by name, without communication."""
    loss = sum(compute_loss(model, rank, step, part) for part in range(num_parts)) / num_parts
    names, parameters = zip(*model.named_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))


class Run:
    """A model under DDP with its hook, trained by plain steps; keeps what went in and what came out."""

    def __init__(self, rank, factor_rank=RANK, dtype=torch.float32, **kwargs):
        self.rank, self.model, self.rows, self.num_steps = rank, build_model(dtype), [], 0
        self.ddp = DistributedDataParallel(self.model, bucket_cap_mb=SMALL_BUCKETS)
        parameters = {
            name: value for name, value in self.model.named_parameters() if value.ndim == 2 and name[0] > "0"
        }
        self.hook = PowerSGD(parameters, factor_rank, seed=4, **kwargs)
        self.hook.register(self.ddp)

    def step(self, num_parts=1, scale=1.0, spoil=None):
        row = {"own": find_gradients(self.model, self.rank, self.num_steps, num_parts)}
        self.model.zero_grad()
        for part in range(num_parts):
            self.ddp.require_backward_grad_sync = part == num_parts - 1  # as no_sync() sets it
            loss = compute_loss(self.ddp, self.rank, self.num_steps, part) / num_parts * scale
            if spoil is not None:
                loss = loss + spoil(self.model)
            loss.backward()
        row["applied"] = {name: value.grad.clone() for name, value in self.model.named_parameters()}
        row["errors"] = {name: value.clone() for name, value in self.hook.state_dict()["errors"].items()}
        self.rows.append(row)
        self.num_steps += 1
        with torch.no_grad():
            for value in self.model.parameters():
                value -= 0.1 * value.grad / scale

    def weights(self):
        return {name: value.detach().clone() for name, value in self.model.named_parameters()}


def train(rank):
    run = Run(rank)
    for step in range(NUM_STEPS):
        run.step(num_parts=1 + step % 2)
    return {"rows": run.rows, "weights": run.weights()}


def train_halves(rank):
    run = Run(rank, dtype=torch.bfloat16)
    for _ in range(NUM_STEPS):
        run.step()
    return {"rows": run.rows}


def train_at_full_rank(rank):
    run = Run(rank, factor_rank=100)
    run.step()
    plain = DistributedDataParallel(build_model())
    compute_loss(plain, rank, 0).backward()
    return {"row": run.rows[0], "plain": {name: value.grad for name, value in plain.module.named_parameters()}}


def scale_gradients(rank):
    """As a gradient scaler does, by a power of two, which changes no digit."""
    run, plain = Run(rank, scale_of=lambda parameter: torch.tensor(1024.0)), Run(rank)
    for _ in range(2):
        run.step(scale=1024.0)
        plain.step()
    return {"row": run.rows[1], "plain": plain.rows[1]}


def overflow(rank):
    """The gradient of one matrix is infinite on the second process, at the second update."""
    run = Run(rank)
    run.step()
    run.step(spoil=lambda model: model[4].weight[0, 0] * (math.inf if rank == 1 else 0))
    return {"rows": run.rows}


def resume(rank):
    """Three updates, a checkpoint, two more: by the same run, from own buffers, from the sum."""
    run = Run(rank)
    for _ in range(3):
        run.step()
    weights, own, summed = run.weights(), run.hook.state_dict(), SummedErrors(run.hook).state_dict()
    own = {**own, "errors": {name: value.clone() for name, value in own["errors"].items()}}
    run.step(), run.step()
    found = {"own": own, "summed": summed, "whole": run.weights()}
    for kind in ("own", "summed"):
        other = Run(rank)
        other.model.load_state_dict(weights)
        other.num_steps = 3
        target = other.hook if kind == "own" else SummedErrors(other.hook)
        target.load_state_dict(found[kind])
        found[f"started_{kind}"] = {name: value.clone() for name, value in other.hook.state_dict()["errors"].items()}
        other.step(), other.step()
        found[f"resumed_{kind}"] = other.weights()
    return found


def train_prior(rank):
    """The real model: bytes of an update with and without compression, weights after it."""
    found = {}
    for factor_rank in (None, 4):
        prior = build_prior().train()
        ddp = DistributedDataParallel(prior, bucket_cap_mb=0.05)
        if factor_rank is not None:
            PowerSGD(list_compressible(prior, factor_rank), factor_rank).register(ddp)
        ids = torch.arange(29)[None] * (1 + rank) % 12
        text, image = ids[:, :12], ids[:, 13:]
        stream = prior.join_stream(text, torch.ones_like(text), image)["input_ids"]
        ddp(input_ids=stream, labels=stream).loss.backward()  # the first bucketing, which the second pass changes
        with CountedBytes() as counted:
            ddp(input_ids=stream, labels=stream).loss.backward()
        found[factor_rank] = {
            "counted": counted.num_bytes,
            "formula": count_bytes(prior, factor_rank),
            "gradients": {name: value.grad.clone() for name, value in prior.named_parameters()},
        }
    return found


def refuse(rank):
    model, words = build_model(), {}
    makers = {
        "no DDP": (model, model),
        "unused": (DistributedDataParallel(model, find_unused_parameters=True), model),
        "frozen": (DistributedDataParallel(build_model()), model),
    }
    for name, (ddp, owner) in makers.items():
        try:
            PowerSGD(list_compressible(owner, 2), 2).register(ddp)
        except ValueError as error:
            words[name] = str(error)
    return words


STORIES = (train, train_halves, train_at_full_rank, scale_gradients, overflow, resume, train_prior, refuse)


def work(folder):
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    torch.save({story.__name__: story(rank) for story in STORIES}, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def found():
    """What each story gives, a list over the two processes."""
    with tempfile.TemporaryDirectory() as folder:
        run_ranks(work, folder, num_processes=NUM_PROCESSES)
        both = [torch.load(Path(folder, f"{rank}.pt"), weights_only=True) for rank in range(NUM_PROCESSES)]
    return {story.__name__: [one[story.__name__] for one in both] for story in STORIES}


def assert_close(given, expected, **kwargs):
    assert given.keys() == expected.keys()
    for name in given:
        torch.testing.assert_close(given[name], expected[name], msg=partial("{}: {}".format, name), **kwargs)


def assert_equal(given, expected):
    assert_close(given, expected, rtol=0, atol=0)


# ---------------------------------------------------------------------------------------------------- the definition


def average_by_definition(matrices, errors, q):
    """
    The paper's steps for one parameter, in float64, on a list over processes; gives the mean that is applied and the
    new errors. Modified Gram-Schmidt gives the span that Householder's QR gives.
    """
    wholes = [matrix.double() + error for matrix, error in zip(matrices, errors, strict=True)]
    is_tall = wholes[0].shape[0] > wholes[0].shape[1]
    wide = [whole.t() if is_tall else whole for whole in wholes]
    p = sum(whole @ q for whole in wide) / len(wide)
    for row in range(p.shape[1]):
        p[row, row] += 1e-6
    for column in range(p.shape[1]):
        for _ in range(2):  # twice is enough
            for earlier in range(column):
                p[:, column] -= (p[:, earlier] @ p[:, column]) * p[:, earlier]
        p[:, column] /= p[:, column].norm()
    new_q = sum(whole.t() @ p for whole in wide) / len(wide)
    applied = p @ new_q.t()
    applied = applied.t() if is_tall else applied
    return applied, [whole - applied for whole in wholes]


def test_two_processes_give_what_the_definition_gives(found):
    both = [one["rows"] for one in found["train"]]
    names = both[0][0]["errors"].keys()
    assert names == {"1.weight", "3.weight", "4.weight"}
    parameters = {name: value for name, value in build_model().named_parameters() if name in names}
    qs = {matrix.name: matrix.q.double() for matrix in PowerSGD(parameters, RANK, 4)._matrices.values()}
    errors = {name: [0.0, 0.0] for name in names}
    for rows in zip(*both, strict=True):
        for name in rows[0]["own"]:
            gradients = [row["own"][name] for row in rows]
            if name in names:
                applied, errors[name] = average_by_definition(gradients, errors[name], qs[name])
                for row, error in zip(rows, errors[name], strict=True):
                    torch.testing.assert_close(row["errors"][name].double(), error, rtol=1e-4, atol=1e-6)
                assert (applied - sum(gradients) / 2).abs().max() > 1e-4  # it is compressed
            else:
                applied = sum(gradients).double() / 2
            for row in rows:
                torch.testing.assert_close(row["applied"][name].double(), applied, rtol=1e-4, atol=1e-6)


def test_both_processes_keep_the_same_weights(found):
    assert_equal(found["train"][0]["weights"], found["train"][1]["weights"])
    first, second = (one["rows"][-1]["own"] for one in found["train"])
    assert not torch.equal(first["1.weight"], second["1.weight"])


@pytest.mark.parametrize("story", ["train", "train_halves"])
def test_what_is_not_sent_now_is_sent_later(found, story):
    """Sum of what was applied on both + what is left in the buffers = sum of all gradients."""
    both = [one["rows"] for one in found[story]]
    for name in both[0][0]["errors"]:
        given = sum(row["own"][name].double() for rows in both for row in rows)
        applied = sum(row["applied"][name].double() for rows in both for row in rows)
        left = sum(rows[-1]["errors"][name].double() for rows in both)
        assert left.abs().max() > 1e-4
        torch.testing.assert_close(applied + left, given, rtol=1e-5, atol=1e-6)


def test_bfloat16_gradients_are_the_same_on_both(found):
    first, second = (one["rows"][-1]["applied"] for one in found["train_halves"])
    assert_equal(first, second)
    assert {value.dtype for value in first.values()} == {torch.bfloat16}


def test_full_rank_is_the_plain_mean(found):
    for one in found["train_at_full_rank"]:
        assert_close(one["row"]["applied"], one["plain"], rtol=1e-5, atol=1e-5)
        assert max(error.abs().max() for error in one["row"]["errors"].values()) < 1


def test_q_is_of_the_seed_and_the_name_only():
    def draw(names, seed):
        parameters = {name: nn.Parameter(torch.empty(6, 10)) for name in names}
        return {m.name: m.q for m in PowerSGD(parameters, 4, seed)._matrices.values()}

    first, again, other = draw(["a", "b"], 0), draw(["c", "b", "a"], 0), draw(["a"], 1)
    assert torch.equal(first["a"], again["a"]) and torch.equal(first["b"], again["b"])
    assert not torch.equal(first["a"], first["b"]) and not torch.equal(first["a"], other["a"])
    q = PowerSGD({"a": nn.Parameter(torch.empty(400, 300))}, 200)._matrices.popitem()[1].q
    assert q.shape == (400, 200) and abs(q.mean()) < 0.02 and abs(q.std() - 1) < 0.02  # the longer side; a Gaussian


# ------------------------------------------------------------------------------------------------ scales, overflows


def test_errors_are_of_unscaled_gradients(found):
    for one in found["scale_gradients"]:
        assert_equal(one["row"]["errors"], one["plain"]["errors"])
        applied = {name: value / 1024 for name, value in one["row"]["applied"].items()}
        assert_equal(applied, one["plain"]["applied"])


def test_a_gradient_that_overflows_on_one_process_is_nan_on_both_and_spoils_no_buffer(found):
    first, second = (one["rows"] for one in found["overflow"])
    for _, row in (first, second):
        assert row["applied"]["4.weight"].isnan().all()
        assert all(value.isfinite().all() for name, value in row["applied"].items() if name != "4.weight")
    assert_equal({"kept": second[1]["errors"]["4.weight"]}, {"kept": second[0]["errors"]["4.weight"]})
    whole = first[0]["errors"]["4.weight"] + first[1]["own"]["4.weight"]
    assert_close({"kept": first[1]["errors"]["4.weight"]}, {"kept": whole})


# ------------------------------------------------------------------------------------------------------- checkpoints


def test_own_buffers_resume_bit_for_bit(found):
    for one in found["resume"]:
        assert_equal(one["resumed_own"], one["whole"])
    first, second = (one["own"]["errors"]["1.weight"] for one in found["resume"])
    assert not torch.equal(first, second)


def test_the_sum_of_the_buffers_resumes_to_rounding(found):
    first, second = found["resume"]
    assert_equal(first["summed"]["errors"], second["summed"]["errors"])
    for name, value in first["summed"]["errors"].items():
        torch.testing.assert_close(value, first["own"]["errors"][name] + second["own"]["errors"][name])
    for one in found["resume"]:
        assert_equal(one["started_summed"], {name: value / 2 for name, value in one["summed"]["errors"].items()})
        assert_close(one["resumed_summed"], one["whole"], rtol=1e-5, atol=1e-5)


def test_buffers_of_another_run_are_refused():
    def build(rank=2, seed=0, name="a", width=8):
        return PowerSGD({name: nn.Parameter(torch.empty(6, width))}, rank, seed)

    state = build().state_dict()
    build().load_state_dict(state)
    for other, words in ((build(rank=3), "rank 2"), (build(seed=1), "seed 0"), (build(name="b"), "a, b"),
                         (build(width=9), "other parameters.*: a")):  # fmt: skip
        with pytest.raises(ValueError, match=words):
            other.load_state_dict(state)


def test_what_it_cannot_serve_is_refused(found):
    for words in found["refuse"]:
        assert words.keys() == {"no DDP", "unused", "frozen"}
        assert "but the model is a Sequential: start two processes" in words["no DDP"]
        assert "find_unused_parameters=False" in words["unused"]
        assert "does not train: 1.weight" in words["frozen"]


# ------------------------------------------------------------------------------------------------ what it compresses


def test_bytes_of_an_update_are_those_of_the_formula(found):
    for one in found["train_prior"]:
        for row in one.values():
            assert row["counted"] == row["formula"]
        assert one[4]["formula"] < 0.6 * one[None]["formula"]
    first, second = found["train_prior"]
    assert_equal(first[4]["gradients"], second[4]["gradients"])
    plain = ("model.embed_tokens.weight", "lm_head.weight", "model.norm.weight", "model.layers.0.mlp.fc1.bias")
    assert_close(*({name: one["gradients"][name] for name in plain} for one in (first[None], first[4])))


def build_meta_prior(**kwargs):
    with torch.device("meta"):
        return DallePriorForCausalLM(DallePriorConfig(**kwargs))


def test_only_matrices_of_the_layers_are_compressed():
    for is_tied in (False, True):
        prior = build_meta_prior(hidden_size=64, num_hidden_layers=2, num_attention_heads=2,
                                 tie_word_embeddings=is_tied)  # fmt: skip
        layers = {name for name, value in prior.named_parameters() if ".layers." in name and value.ndim == 2}
        assert len(layers) == 12 and list_compressible(prior, 8).keys() == layers
        prior.model.layers[0].requires_grad_(False)
        assert len(list_compressible(prior, 8)) == 6
        assert list_compressible(prior, 32).keys() == {name for name in layers if "layers.1.mlp" in name}
        assert list_compressible(prior, 64) == {}


@given(rank=st.integers(1, 70), rows=st.integers(1, 80), columns=st.integers(1, 80))
def test_never_more_bytes_than_without(rank, rows, columns):
    model = nn.Linear(columns, rows)
    assert count_bytes(model, rank) <= count_bytes(model) == 4 * rows * (columns + 1)
    matrix = 4 * min(rank * (rows + columns), rows * columns)
    assert count_bytes(model, rank) == matrix + 4 * rows


@pytest.mark.parametrize("width, rank", [(1920, 512), (2688, 640), (3968, 896)])
def test_ranks_of_the_paper(width, rank):
    assert choose_rank(width) == rank


def test_rate_of_a_layer():
    """1 - 3 r / (2 d) of a layer's matrices; the paper's eight shards, of rank r / 8 each, save 1 - 5 r / (8 d)."""
    config = {"hidden_size": 3968, "num_attention_heads": 62, "num_hidden_layers": 1}
    layer = build_meta_prior(**config).model.layers[0]
    matrices = 4 * sum(value.numel() for value in layer.parameters() if value.ndim == 2)
    saved = count_bytes(layer) - count_bytes(layer, 896)
    assert saved / matrices == pytest.approx(1 - 3 * 896 / (2 * 3968))
