"""Machines: Accelerate's configuration files, launches that are not what was asked for, a sharded prior."""

import os
import shutil
import sys
from pathlib import Path

import loop
import pytest
import torch
import train
from accelerate import Accelerator
from accelerate.commands.config.config_args import ClusterConfig, load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.parallelism_config import ParallelismConfig
from accelerate.state import AcceleratorState, GradientState, PartialState
from accelerate.utils import (
    DeepSpeedPlugin,
    DistributedType,
    FullyShardedDataParallelPlugin,
    ProjectConfiguration,
    set_seed,
)
from accelerate.utils.launch import prepare_multi_gpu_env, prepare_simple_launcher_cmd_env
from arguments import DVAEArguments, PriorArguments, parse_arguments
from diffusers.training_utils import EMAModel
from machines import ShardedEMA, _check_deepspeed, _check_fsdp, check_launch, gather_model, is_sharded, make_power_sgd
from tiny import build_dvae, build_prior
from tiny_ranks import run_ranks
from tiny_training import (
    ROOT,
    losses,
    prior_settings,
    read_log,
    run,
    start,
    write_data,
    write_settings,
    write_tokenizer,
)
from train_prior import PriorStage

from hf_dalle import DALLEPipeline, DallePriorForCausalLM
from hf_dalle.modeling_dalle_prior import DallePriorLayer


FOLDER = ROOT / "training" / "accelerate"
FILES = sorted(path.name for path in FOLDER.glob("*.yaml"))


def build_arguments(kind=PriorArguments, **settings):
    folders = {"dvae": "d", "tokenizer": "t"} if kind is PriorArguments else {}
    return kind(output_dir="o", train_data_dir="t", **folders, **settings)


@pytest.fixture
def accelerator(monkeypatch):
    """One process on a CPU, which nothing was asked of."""
    for name in list(os.environ):
        if name.startswith(("ACCELERATE_", "FSDP_", "MASTER_", "WORLD_SIZE", "PARALLELISM_CONFIG_")):
            monkeypatch.delenv(name)
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    yield Accelerator(cpu=True)
    AcceleratorState._reset_state(reset_partial_state=True)


# --------------------------------------------------------------------------------------------- configuration files


def read_launch(name):
    """A file as `accelerate launch --config_file` reads it; gives its arguments."""
    arguments = launch_command_parser().parse_args(["--config_file", str(FOLDER / name), "train.py"])
    arguments.nondefault = []
    return _validate_launch_command(arguments)[0]


def test_there_is_a_file_for_each_machine():
    assert FILES == ["deepspeed_zero.yaml", "many_nodes_fsdp2.yaml", "one_gpu.yaml", "one_node_ddp.yaml",
                     "one_node_fsdp2.yaml"]  # fmt: skip


@pytest.mark.parametrize("name", FILES)
def test_configuration_files_are_accelerates(name):
    config = load_config_from_file(str(FOLDER / name))  # refuses unknown keys
    assert isinstance(config, ClusterConfig) and config.num_processes >= config.num_machines
    assert config.mixed_precision is None  # the run's settings say
    known = vars(read_launch(name))
    for prefix in ("fsdp", "deepspeed", "parallelism"):
        assert set(getattr(config, f"{prefix}_config")) <= known.keys()
    head = (FOLDER / name).read_text().split("\ncompute_environment")[0].splitlines()
    assert all(line.startswith("#") for line in head) and any("training/train.py CONFIG.yaml" in line for line in head)


def test_one_gpu_and_ddp(accelerator):
    arguments = read_launch("one_gpu.yaml")
    assert not (arguments.multi_gpu or arguments.use_fsdp or arguments.use_deepspeed or arguments.cpu)
    _, environment = prepare_simple_launcher_cmd_env(arguments)
    assert "MASTER_PORT" not in environment and environment["ACCELERATE_USE_CPU"] == "False"
    arguments = read_launch("one_node_ddp.yaml")
    assert arguments.multi_gpu and arguments.num_processes == 8
    assert "ACCELERATE_USE_FSDP" not in prepare_multi_gpu_env(arguments)


@pytest.mark.parametrize("name, sizes", [("one_node_fsdp2.yaml", None), ("many_nodes_fsdp2.yaml", (2, 8))])
def test_fsdp2(name, sizes, accelerator, monkeypatch):
    """The plugin that Accelerate builds from the file wraps the prior's layers and passes our own check."""
    arguments = read_launch(name)
    for key, value in prepare_multi_gpu_env(arguments).items():
        if key.startswith(("FSDP_", "PARALLELISM_CONFIG_")):
            monkeypatch.setenv(key, value)
    assert arguments.use_fsdp and arguments.fsdp_version == 2
    plugin = FullyShardedDataParallelPlugin()
    _check_fsdp(plugin, build_arguments())
    prior = build_prior()
    plugin.set_auto_wrap_policy(prior)
    assert plugin.auto_wrap_policy.keywords["transformer_layer_cls"] == {DallePriorLayer}
    assert plugin.reshard_after_forward is True and not plugin.activation_checkpointing
    assert plugin.state_dict_type.name == "SHARDED_STATE_DICT"
    assert arguments.use_parallelism_config == (sizes is not None)
    if sizes:
        config = ParallelismConfig()
        assert (config.dp_replicate_size, config.dp_shard_size) == sizes
        assert config.total_size == arguments.num_processes == arguments.num_machines * config.dp_shard_size


def test_deepspeed_zero():
    """Accelerate's plugin needs DeepSpeed, and once refused it stays so in this process: its fields are compared."""
    arguments, config = read_launch("deepspeed_zero.yaml"), load_config_from_file(str(FOLDER / "deepspeed_zero.yaml"))
    assert arguments.use_deepspeed and arguments.zero_stage == 2
    fields = {"offload_optimizer_device", "offload_param_device", "zero_stage", "gradient_accumulation_steps",
              "gradient_clipping", "zero3_init_flag"}  # fmt: skip
    assert config.deepspeed_config.keys() == fields <= DeepSpeedPlugin.__dataclass_fields__.keys()
    settings = {"gradient_clipping": arguments.gradient_clipping, "zero_optimization": {"stage": arguments.zero_stage}}
    _check_deepspeed(settings, build_arguments())  # clips where the prior's default does
    for wrong, words in ((build_arguments(max_grad_norm=1.0), "clips gradients at 4.0, but `max_grad_norm` is 1.0"),
                         (build_arguments(gradient_accumulation_steps=2), "`gradient_accumulation_steps` above 1"),
                         (build_arguments(mixed_precision="bf16"), "`use_ema: true` in bf16"),
                         (build_arguments(mixed_precision="fp16"), "fp16"),
                         (build_arguments(optimizer="muon"), "muon")):  # fmt: skip
        with pytest.raises(ValueError, match=words):
            _check_deepspeed(settings, wrong)
    with pytest.raises(ValueError, match="ZeRO stage 3"):
        _check_deepspeed({**settings, "zero_optimization": {"stage": 3}}, build_arguments())
    _check_deepspeed(settings, build_arguments(mixed_precision="bf16", use_ema=False))


# --------------------------------------------------------------------------------------------------------- launches


def test_what_was_asked_for_passes(accelerator, monkeypatch):
    check_launch(accelerator, build_arguments())
    monkeypatch.setenv("MASTER_PORT", "29500")  # a cluster's own, without Accelerate's launcher
    check_launch(accelerator, build_arguments())
    monkeypatch.setenv("WORLD_SIZE", "1")
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    check_launch(accelerator, build_arguments(mixed_precision="bf16"))


@pytest.mark.parametrize(
    "environment, words",
    [
        ({"WORLD_SIZE": "4"}, "asked for 4 processes, but only 1 takes part"),
        ({"ACCELERATE_MIXED_PRECISION": "no", "MASTER_PORT": "29500"}, "asked for several processes, but only 1"),
        ({"ACCELERATE_USE_FSDP": "true"}, "asked for FSDP, but Accelerate gives NO on cpu"),
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, "asked for DEEPSPEED, but Accelerate gives NO on cpu"),
        ({"ACCELERATE_MIXED_PRECISION": "bf16"}, "mixed precision bf16, but `mixed_precision` is no in the settings"),
    ],
)
def test_what_was_not_asked_for_is_refused(accelerator, monkeypatch, environment, words):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=words):
        check_launch(accelerator, build_arguments())


def test_settings_that_do_not_go_with_fsdp_are_refused(accelerator, monkeypatch):
    monkeypatch.setenv("FSDP_CPU_RAM_EFFICIENT_LOADING", "False")  # a plugin sets it, for transformers
    with pytest.raises(ValueError, match="FSDP 1"):
        _check_fsdp(FullyShardedDataParallelPlugin(fsdp_version=1), build_arguments())
    with pytest.raises(ValueError, match="from other weights"):
        _check_fsdp(FullyShardedDataParallelPlugin(fsdp_version=2), build_arguments())
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2, cpu_ram_efficient_loading=True)
    _check_fsdp(plugin, build_arguments())
    with pytest.raises(ValueError, match="FSDP is for the prior"):
        _check_fsdp(plugin, build_arguments(DVAEArguments))
    for settings in ({"optimizer": "muon"}, {"lora_rank": 4, "init_from": "x"}):
        with pytest.raises(ValueError, match="adamw` and without `lora_rank"):
            _check_fsdp(plugin, build_arguments(**settings))


ACCELERATE = (sys.executable, "-m", "accelerate.commands.launch")
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2")


@pytest.mark.slow  # what such launches leave in the environment is refused above
@pytest.mark.parametrize(
    "launcher, environment, words",
    [
        ((*ACCELERATE, "--cpu", "--num_processes", "2"), {}, "asked for several processes, but only 1 takes part"),
        (
            TORCHRUN,
            {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"},
            "asked for FSDP, but Accelerate gives MULTI_CPU",
        ),
    ],
    ids=["accelerate", "torchrun"],
)
def test_real_launches_say_so(tmp_path, monkeypatch, launcher, environment, words):
    """Before any work: the settings' data, dVAE and tokenizer are not even there."""
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    settings = {"stage": "prior", "output_dir": str(tmp_path / "run"), "train_data_dir": "nowhere",
                "dvae": "nowhere", "tokenizer": "nowhere", "report_to": "none"}  # fmt: skip
    process = start(settings, launcher=launcher)
    output, _ = process.communicate(timeout=600)
    assert process.returncode != 0 and words in output, output
    assert not (tmp_path / "run").exists()


# -------------------------------------------------------------------------------------------------- a sharded prior


def build_settings(home, output_dir, **settings):
    """A constant learning rate: the same updates however many are to come."""
    settings = {"max_train_steps": 6, "checkpointing_steps": 3, "logging_steps": 1, "learning_rate": 0.003,
                "lr_min_ratio": 1.0, "caption_dropout": 0.0, "validation_steps": 4, "validation_split": "validation",
                "validation_prompts": ["red and blue"], "num_validation_images": 1, **settings}  # fmt: skip
    return prior_settings(home / "data", home / "dvae", home / "tokenizer", output_dir, **settings)


class RememberingStage(PriorStage):
    """Keeps what the model computed at the last validation, which is of the weights that are saved."""

    def validate(self, model):
        self.logits = compute_logits(model)
        return super().validate(model)


def train_sharded(path, *options):
    """What train.py does where Accelerate gives FSDP2. On CPUs it silently gives DDP, so its state is set here."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    args = parse_arguments([str(path), *options])
    places = ProjectConfiguration(project_dir=args.output_dir)
    accelerator = Accelerator(cpu=True, mixed_precision=args.mixed_precision, project_config=places)
    accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2, auto_wrap_policy="transformer_based_wrap", state_dict_type="sharded_state_dict",
        reshard_after_forward=True, cpu_ram_efficient_loading=True,
    )  # fmt: skip
    if args.mixed_precision != "no":
        accelerator.state.fsdp_plugin.set_mixed_precision(args.mixed_precision)
    for state in (AcceleratorState, PartialState):
        state._shared_state["distributed_type"] = DistributedType.FSDP
    _check_fsdp(accelerator.state.fsdp_plugin, args)
    set_seed(args.seed, device_specific=True)
    stage = RememberingStage(args)
    Path(args.output_dir).mkdir(parents=True, exist_ok=True)
    loop.run(args, accelerator, stage)
    assert is_sharded(stage.model) and stage.model.is_gradient_checkpointing == args.gradient_checkpointing
    shares = [value.to_local().numel() / value.numel() for value in stage.model.parameters()]
    assert 0.4 < sum(shares) / len(shares) < 0.6
    torch.save(stage.logits, Path(args.output_dir, f"logits_{accelerator.process_index}.pt"))


def compute_logits(prior):
    with torch.no_grad():
        return prior(torch.arange(8)[None] % prior.config.text_vocab_size).text_logits


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    folder = tmp_path_factory.mktemp("machines")
    write_data(folder / "data")
    write_tokenizer(folder / "tokenizer")
    build_dvae().save_pretrained(folder / "dvae")
    return folder


def test_a_sharded_prior_trains_goes_on_and_loads(home, tmp_path):
    """FSDP2 on two gloo processes, through the real loop: the losses of one process, then plain from_pretrained."""
    one = run({**build_settings(home, tmp_path / "one"), "train_batch_size": 8})
    settings = build_settings(home, tmp_path / "two", train_batch_size=4, gradient_checkpointing=True)
    path = write_settings(settings)
    run_ranks(train_sharded, path, "--max_train_steps", "4")
    run_ranks(train_sharded, path)
    two = read_log(tmp_path / "two")
    assert [row["step"] for row in two] == [row["step"] for row in one] == list(range(1, 7))
    for name in ("loss", "grad_norm", "text_loss", "image_loss", "validation_loss"):
        assert losses(two, name) == pytest.approx(losses(one, name), abs=1e-5), name
    ours, theirs = (DALLEPipeline.from_pretrained(tmp_path / name).prior for name in ("two", "one"))
    assert type(ours) is DallePriorForCausalLM
    for rank in range(2):
        sharded = torch.load(tmp_path / "two" / f"logits_{rank}.pt", weights_only=True)
        torch.testing.assert_close(compute_logits(ours), sharded, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(compute_logits(ours), compute_logits(theirs), rtol=1e-4, atol=1e-4)
    assert ours.generation_config.to_dict() == theirs.generation_config.to_dict()


def test_a_sharded_prior_computes_in_bfloat16_as_a_whole_one(home, tmp_path):
    """By autocast: Accelerate's policy would round the residual stream, and the loss to steps of 1/64."""
    settings = {"max_train_steps": 2, "mixed_precision": "bf16", "validation_prompts": None}
    one = losses(run({**build_settings(home, tmp_path / "one", **settings), "train_batch_size": 8}))
    full = {**settings, "mixed_precision": "no", "train_batch_size": 8}
    full = losses(run(build_settings(home, tmp_path / "full", **full)))
    run_ranks(train_sharded, write_settings(build_settings(home, tmp_path / "two", **settings, train_batch_size=4)))
    two = losses(read_log(tmp_path / "two"))
    assert two == pytest.approx(one, abs=1e-4) and abs(two[2] - full[2]) > 2e-4


# --------------------------------------------------------------------------------------------------------- PowerSGD


def train_together(path, *options):
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    train.main([str(path), *options])


def test_power_sgd_goes_on_with_two_processes_and_with_three(home, tmp_path):
    """Bit for bit with as many processes, from each one's buffers; to rounding with others, from their sum."""
    settings = {"power_sgd_rank": 2, "checkpoints_total_limit": None, "validation_steps": 100,
                "validation_prompts": None}  # fmt: skip
    logs = {}
    for name, batch_size, num_processes in (("whole", 6, 2), ("same", 6, 2), ("other", 4, 3), ("plain", 6, 2)):
        folder = tmp_path / name
        path = write_settings(build_settings(home, folder, train_batch_size=batch_size, **settings))
        if name in ("same", "other"):
            shutil.copytree(tmp_path / "whole" / "checkpoint-3", folder / "checkpoint-3")
        off = ("--power_sgd_rank", "none") if name == "plain" else ()
        run_ranks(train_together, path, *off, num_processes=num_processes)
        logs[name] = losses(read_log(folder))
    assert {step: loss for step, loss in logs["whole"].items() if step > 3} == logs["same"]
    assert logs["other"] == pytest.approx(logs["same"], abs=1e-5)
    assert logs["plain"][1] == logs["whole"][1] and logs["plain"][6] != pytest.approx(logs["whole"][6], abs=1e-4)
    sums, first, second = (
        torch.load(tmp_path / "whole" / "checkpoint-3" / name, weights_only=True)["errors"]
        for name in ("power_sgd_sum.pt", "power_sgd_0.pt", "power_sgd_1.pt")
    )
    assert len(sums) == 12
    for name, total in sums.items():
        torch.testing.assert_close(total, first[name] + second[name])


class NoScaler:
    def scale_of(self, parameter):
        return 1.0


def test_power_sgd_without_ddp_is_refused():
    prior = build_prior()
    assert make_power_sgd(build_arguments(), prior, NoScaler()) is None
    assert make_power_sgd(build_arguments(DVAEArguments), prior, NoScaler()) is None
    for rank in (0, 4):
        with pytest.raises(ValueError, match="model is a DallePriorForCausalLM: start two processes"):
            make_power_sgd(build_arguments(power_sgd_rank=rank), prior, NoScaler())


def test_one_process_gathers_nothing(accelerator):
    prior = build_prior()
    assert gather_model(accelerator, prior) is prior


def test_average_of_whole_weights_is_that_of_diffusers():
    prior = build_prior()
    parameters = list(prior.parameters())
    ours, theirs = (kind(parameters, decay=0.9, foreach=True) for kind in (ShardedEMA, EMAModel))
    for _ in range(3):
        with torch.no_grad():
            for value in parameters:
                value.mul_(1.1)
        ours.step(parameters)
        theirs.step(parameters)
    ours.load_state_dict(ours.state_dict())
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    for mine, other in zip(ours.shadow_params, theirs.shadow_params, strict=True):
        assert torch.equal(mine, other)
    before = parameters[0].clone()
    ours.store(parameters)
    ours.copy_to(parameters)
    assert torch.equal(parameters[0], theirs.shadow_params[0])
    ours.restore(parameters)
    assert torch.equal(parameters[0], before)
