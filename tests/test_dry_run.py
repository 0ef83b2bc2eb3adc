"""Dry runs: their formulas against what real runs of one and two processes take, their tables, what they refuse."""

import json
import subprocess
import sys
from pathlib import Path

import dry_run
import pytest
import torch
import train
from arguments import parse_arguments
from estimates import Machines, estimate, find_config
from tiny_training import (
    ROOT,
    build_prior_settings,
    build_untrained_home,
    dvae_settings,
    prior_settings,
    write_settings,
)

from hf_dalle import DallePriorConfig, DallePriorForCausalLM
from hf_dalle.power_sgd import PowerSGD, list_compressible
from hf_dalle.training_cost import count_flops, trace_flops


STEPS = {"max_train_steps": 3, "checkpointing_steps": 3, "checkpoints_total_limit": None}
MEASURED = ("weights", "gradients", "optimizer", "EMA", "activations")


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return build_untrained_home(tmp_path_factory.mktemp("dry"))


def launch(script, arguments, num_processes=1):
    command = [sys.executable]
    if num_processes > 1:
        command += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={num_processes}"]
    command += [str(ROOT / "tests" / script), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr


def measure(settings, num_processes=1):
    """What a real run takes, in processes of its own."""
    output = Path(settings["output_dir"]).with_suffix(".json")
    launch("measure_run.py", [output, write_settings(settings)], num_processes)
    return json.loads(output.read_text())


def plan(settings, machines=None):
    return estimate(parse_arguments([str(write_settings(settings))]), machines or Machines())


def check_checkpoint(predicted, folder, num_tensors):
    """Its files hold what was predicted, and of each tensor a name and a shape."""
    measured = sum(path.stat().st_size for path in (folder / "checkpoint-3").rglob("*") if path.is_file())
    assert predicted <= measured <= predicted + 50_000 + 3000 * num_tensors


@pytest.mark.parametrize("name", ["dvae", "prior", pytest.param("prior-fp16", marks=pytest.mark.slow)])
def test_one_process_takes_what_was_said(home, tmp_path, name):
    if name == "dvae":
        settings = dvae_settings(home / "data", tmp_path / "dvae", **STEPS)
    else:
        choices = {"mixed_precision": "fp16"} if "fp16" in name else {"mixed_precision": "bf16", "optimizer": "muon"}
        settings = build_prior_settings(home, tmp_path / name, **STEPS, **choices)
    predicted, measured = plan(settings), measure(settings)
    memory = predicted["memory a device, bytes"]
    assert {part: memory[part] for part in MEASURED} == {part: measured[part] for part in MEASURED}
    assert memory["sum"] == sum(number for part, number in memory.items() if part != "sum")
    assert predicted["bytes an update"] == {"a process sends": 0, "a machine sends to others": 0}
    assert predicted["data"]["rows found"] == 20 and predicted["data"]["pictures seen"] == (
        48 if name == "dvae" else 24
    )
    check_checkpoint(predicted["disk, bytes"]["a checkpoint"], tmp_path / name, num_tensors=4 * 60)
    weights = sum(
        path.stat().st_size for path in (tmp_path / name).glob("**/*.safetensors") if "check" not in str(path)
    )
    frozen = memory.get("dVAE", 0)
    assert (
        predicted["disk, bytes"]["finished model"]
        <= weights - frozen
        <= predicted["disk, bytes"]["finished model"] + 20_000
    )


@pytest.mark.slow
def test_two_processes_take_and_send_what_was_said(home, tmp_path):
    settings = build_prior_settings(home, tmp_path / "prior", **STEPS, gradient_accumulation_steps=2)
    predicted = plan(settings, Machines(num_processes=2, gpus_per_node=1))
    measured = measure(settings, num_processes=2)
    memory = predicted["memory a device, bytes"]
    assert {part: memory[part] for part in MEASURED} == {part: measured[part] for part in MEASURED}
    assert memory["buckets of gradients to send"] == measured["sent"]
    # a ring of two: each sends one half to be summed, and the other half's sum
    assert predicted["bytes an update"] == dict.fromkeys(predicted["bytes an update"], measured["sent"])
    assert predicted["an update"]["pictures"] == 8 * 2 * 2
    assert predicted["an update"]["text tokens"] == 32 * 8 and predicted["an update"]["image tokens"] == 32 * 16


@pytest.mark.slow
def test_shards_of_two_processes_take_and_send_what_was_said(home, tmp_path):
    settings = build_prior_settings(home, tmp_path / "prior")
    config, _, _ = find_config(parse_arguments([str(write_settings(settings))]))
    (tmp_path / "config.json").write_text(json.dumps(config.to_diff_dict()))
    launch("measure_shards.py", [tmp_path / "measured.json", tmp_path / "config.json"], num_processes=2)
    measured = json.loads((tmp_path / "measured.json").read_text())
    predicted = plan(settings, Machines(num_processes=2, sharding="fsdp2"))
    memory = predicted["memory a device, bytes"]
    assert (memory["weights"], memory["gradients"]) == (measured["weights"], measured["gradients"])
    assert memory["optimizer"] == pytest.approx(measured["optimizer"], rel=1e-3)  # counters are cut in the estimate
    # of two processes each sends half of what is gathered or scattered
    half = (measured["gathered"] + measured["scattered"]) / 2
    assert predicted["bytes an update"]["a process sends"] == half


def test_power_sgd_takes_and_sends_what_was_said(home, tmp_path):
    settings = build_prior_settings(home, tmp_path / "prior", power_sgd_rank=4)
    memory = plan(settings, Machines(num_processes=2))["memory a device, bytes"]
    config, _, _ = find_config(parse_arguments([str(write_settings(settings))]))
    prior = DallePriorForCausalLM(config)
    hook = PowerSGD(list_compressible(prior, 4), 4)
    matrices = hook._matrices.values()
    assert memory["PowerSGD's errors"] == sum(matrix.error.nbytes for matrix in matrices) > 0
    assert memory["PowerSGD's Q"] == sum(matrix.q.nbytes for matrix in matrices)
    sent = plan(settings, Machines(num_processes=2))["bytes an update"]["a process sends"]
    whole = plan({**settings, "power_sgd_rank": None}, Machines(num_processes=2))["bytes an update"]["a process sends"]
    saved = sum(matrix.error.nbytes - 4 * 4 * sum(matrix.error.shape) for matrix in matrices)
    assert whole - sent == saved
    with pytest.raises(ValueError, match="ddp"):
        plan(settings, Machines(num_processes=2, sharding="fsdp2"))


def test_operations_are_those_of_the_products():
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "text_length": 8}
    sizes |= {"text_vocab_size": 40, "image_grid_size": 4, "image_vocab_size": 16, "attention_types": ["full"] * 2}
    config = DallePriorConfig(**sizes)
    prior, ids = DallePriorForCausalLM(config), torch.zeros(1, config.stream_length, dtype=torch.long)
    prior.set_attn_implementation("eager")

    def update():
        output = prior(ids, use_cache=False)
        (output.text_logits.sum() + output.image_logits.sum()).backward()

    products, attention = count_flops(config)
    with torch.backends.mkldnn.flags(enabled=False):
        counted = trace_flops(update)
    # eager attention multiplies whole squares of states
    squares = 3 * 4 * config.hidden_size * config.num_hidden_layers * config.stream_length**2
    assert counted == products + squares and attention < squares


@pytest.mark.slow
def test_the_paper_on_1024_devices(tmp_path):
    sizes = {"hidden_size": 3968, "num_hidden_layers": 64, "num_attention_heads": 62}
    settings = prior_settings(tmp_path, tmp_path / "dvae", tmp_path / "tokenizer", tmp_path / "12b", model=sizes,
                              train_batch_size=1, tokens_column="image_tokens", max_train_steps=430_000)  # fmt: skip
    settings["gradient_checkpointing"] = True
    predicted = plan(settings, Machines(num_processes=1024, sharding="fsdp2", device_tflops=50.0))
    assert predicted["model"]["parameters"] == pytest.approx(12e9, rel=0.03)
    assert predicted["an update"] == {
        **{"pictures": 1024, "text tokens": 256 * 1024, "image tokens": 1024**2},
        "operations": pytest.approx(6 * 12e9 * 1280 * 1024 * 4 / 3, rel=0.1),
    }
    memory, whole = predicted["memory a device, bytes"], 4 * predicted["model"]["parameters"]
    assert memory["weights"] == memory["gradients"] == pytest.approx(whole / 1024, rel=0.05)
    assert memory["optimizer"] == pytest.approx(whole / 512, rel=0.05) and memory["sum"] < 16e9  # a V100
    assert predicted["bytes an update"]["a process sends"] == pytest.approx(3 * whole, rel=0.05)  # pads
    inside = plan({**settings, "mixed_precision": "bf16"}, Machines(1024, 8, "hsdp"))
    assert inside["bytes an update"]["a machine sends to others"] == pytest.approx(2 * whole, rel=0.01)  # in bf16 too
    assert inside["memory a device, bytes"]["weights"] == pytest.approx(whole / 8, rel=0.01)
    ddp = plan({**settings, "power_sgd_rank": 896}, Machines(1024))
    rate = 1 - 3 * 896 / (2 * 3968)
    assert ddp["bytes an update"]["a process sends"] == pytest.approx(2 * whole * (1 - rate), rel=0.05)


def test_the_script_prints_and_writes_nothing(home, tmp_path, capsys):
    settings = build_prior_settings(home, tmp_path / "prior", max_train_steps=10)
    path = write_settings(settings)
    train.main([str(path), "--dry_run", "--num_processes", "4", "--gpus_per_node=2", "--pictures_per_second", "16"])
    printed = capsys.readouterr().out
    for words in ("4 process(es), 2 machine(s), DDP", "rows found", "20", "seconds an update", "0.5"):
        assert words in printed
    assert not (tmp_path / "prior").exists()


def test_what_is_not_there_yet_is_said(tmp_path):
    settings = prior_settings(tmp_path / "none", tmp_path / "dvae", tmp_path / "tokenizer", tmp_path / "run")
    predicted = plan(settings)
    assert "not found" in next(iter(predicted["data"].values()))
    assert len([note for note in predicted["notes"].values() if "yet" in note]) == 2
    assert predicted["an update"]["image tokens"] == 8 * 32 * 32  # the paper's


def test_fine_tuning_counts_what_is_trained(home, tmp_path):
    pytest.importorskip("peft")
    start = {"init_from": str(ROOT / "checkpoints" / "emoji-mini"), "model": {}, "dvae": "", "tokenizer": ""}
    settings = {**build_prior_settings(home, tmp_path / "run"), **start, "lora_rank": 4}
    predicted = plan(settings)
    config = json.loads((ROOT / "checkpoints" / "emoji-mini" / "prior" / "config.json").read_text())
    width = config["hidden_size"]  # q, k, v, o; fc1 and fc2
    adapters = config["num_hidden_layers"] * 4 * (4 * 2 * width + 2 * 5 * width)
    assert predicted["model"]["of these trained"] == adapters
    assert predicted["memory a device, bytes"]["gradients"] == 4 * adapters
    with pytest.raises(ValueError, match="sharding ddp"):
        plan(settings, Machines(2, sharding="fsdp2"))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("one_gpu", (1, 1, "ddp")),
        ("one_node_ddp", (8, 8, "ddp")),
        ("one_node_fsdp2", (8, 8, "fsdp2")),
        ("many_nodes_fsdp2", (16, 8, "hsdp")),
    ],
)
def test_machines_of_an_accelerate_config(name, expected):
    path = ROOT / "training" / "accelerate" / f"{name}.yaml"
    machines, rest = dry_run.read_machines(["c.yaml", "--dry-run", "--accelerate_config", str(path), "--seed", "1"])
    assert (machines.num_processes, machines.gpus_per_node, machines.sharding) == expected
    assert rest == ["c.yaml", "--seed", "1"]
    machines, _ = dry_run.read_machines(
        ["--accelerate_config", str(path), "--num_processes", "32", "--gpus_per_node=4"]
    )
    assert (machines.num_processes, machines.num_machines) == (32, 8)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--num_processes", "0"], "above 0"),
        (["--num_processes", "12", "--gpus_per_node", "8"], "do not fill"),
        (["--device_tflops", "-1"], "above 0"),
        (["--accelerate_config", str(ROOT / "training" / "accelerate" / "deepspeed_zero.yaml")], "DEEPSPEED"),
    ],
)
def test_machines_that_are_none(options, words):
    with pytest.raises(ValueError, match=words):
        dry_run.read_machines(options)


def test_numbers_are_printed_for_people():
    shown = [dry_run._format(number, True) for number in (12, 1500, 3.46e6, 49.2e9, 218e9, 1.5e12)]
    assert shown == ["12", "1.50 kB", "3.46 MB", "49.2 GB", "218 GB", "1,500 GB"]
    assert [dry_run._format(number, False) for number in (12, 0.52, 1234567, "all")] == [
        "12",
        "0.52",
        "1,234,567",
        "all",
    ]
