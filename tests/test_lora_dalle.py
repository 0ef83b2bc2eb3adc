"""LoRA adapters in a pipeline: what they compute against plain sums of weights, fusing, files, and what is refused."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny import build_pipeline, build_prior

from hf_dalle import DALLEPipeline
from hf_dalle.lora_dalle import check_peft, collect_adapter
from hf_dalle.sampling import draw_image_tokens, spawn_generators


FILE = "pytorch_lora_weights.safetensors"
ADAPTERS = {  # both reach fc1
    "a": {"r": 3, "lora_alpha": 6, "target_modules": ["q_proj", "fc1"], "lora_dropout": 0.5},
    "b": {"r": 2, "lora_alpha": 2, "target_modules": ["o_proj", "fc1"]},
    "c": {
        "r": 4,
        "lora_alpha": 2,
        "target_modules": ["v_proj", "fc2"],
        "rank_pattern": {"fc2": 1},
        "use_rslora": True,
    },
}


def build_adapted_prior(seed=1, prior_settings=None, **settings):
    """A tiny prior with a random adapter that peft put in."""
    prior = build_prior(**(prior_settings or {}))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        prior.add_adapter(LoraConfig(init_lora_weights=False, **settings))
    return prior.eval()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder for each adapter."""
    folder = tmp_path_factory.mktemp("adapters")
    for seed, (name, settings) in enumerate(ADAPTERS.items()):
        DALLEPipeline.save_lora_weights(folder / name, prior_lora_layers=build_adapted_prior(seed, **settings))
    return folder


@pytest.fixture
def pipe():
    return build_pipeline()


def compute_logits(prior):
    stream = prior.join_stream(torch.arange(12)[None], None, torch.arange(16)[None])
    with torch.no_grad():
        return prior(stream["input_ids"][:, :-1]).logits


def compute_change(folder, name):
    """What an adapter adds to each weight, from its file alone."""
    weights, settings = load_file(folder / name / FILE), ADAPTERS[name]
    changes = {}
    for key in weights:
        if ".lora_B." in key:
            down, up = weights[key.replace("lora_B", "lora_A")], weights[key]
            rank = len(down) ** 0.5 if settings.get("use_rslora") else len(down)
            layer = key.removeprefix("prior.").removesuffix(".lora_B.weight")
            changes[f"{layer}.weight"] = settings["lora_alpha"] / rank * up @ down
    return changes


def build_changed_prior(folder, **weights):
    prior = build_prior()
    state = {name: value.clone() for name, value in prior.state_dict().items()}
    for name, weight in weights.items():
        for key, change in compute_change(folder, name).items():
            state[key] += weight * change
    prior.load_state_dict(state)
    return prior


def assert_same_weights(prior, other):
    ours, theirs = dict(prior.named_parameters()), dict(other.named_parameters())
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        assert torch.equal(ours[name], value) and ours[name].requires_grad == value.requires_grad, name


# ------------------------------------------------------------------------------------------------ what is computed


@pytest.mark.parametrize("name", ADAPTERS)
@pytest.mark.parametrize("adapter_name", [None, "model"])  # which the names of the prior's own weights hold
def test_an_adapter_adds_its_product_to_the_weights(pipe, folder, name, adapter_name):
    base = compute_logits(pipe.prior)
    pipe.load_lora_weights(folder / name, adapter_name=adapter_name)
    assert pipe.get_active_adapters() == [adapter_name or "default_0"]
    logits = compute_logits(pipe.prior)
    assert (logits - base).abs().max() > 1
    torch.testing.assert_close(logits, compute_logits(build_changed_prior(folder, **{name: 1.0})), rtol=0, atol=1e-4)
    assert torch.equal(logits, compute_logits(pipe.prior))  # its dropout is off


def test_what_loads_is_bit_for_bit_what_was_saved(pipe, folder):
    for seed, (name, settings) in enumerate(ADAPTERS.items()):
        pipe.load_lora_weights(str(folder / name))
        assert torch.equal(compute_logits(pipe.prior), compute_logits(build_adapted_prior(seed, **settings)))


def test_two_adapters_add_up_by_their_weights(pipe, folder):
    for name in ("a", "b"):
        pipe.load_lora_weights(folder / name, adapter_name=name)
    assert pipe.get_list_adapters() == {"prior": ["a", "b"]} and pipe.get_active_adapters() == ["b"]
    pipe.set_adapters(["a", "b"], adapter_weights=[0.5, -0.25])
    assert pipe.get_active_adapters() == ["a", "b"]
    expected = compute_logits(build_changed_prior(folder, a=0.5, b=-0.25))
    torch.testing.assert_close(compute_logits(pipe.prior), expected, rtol=0, atol=1e-4)
    pipe.set_adapters("a")
    expected = compute_logits(build_changed_prior(folder, a=1.0))
    torch.testing.assert_close(compute_logits(pipe.prior), expected, rtol=0, atol=1e-4)


def test_unloading_gives_back_the_prior_bit_for_bit(pipe, folder):
    pipe.prior.model.embed_tokens.weight.requires_grad_(False)  # as someone left it
    for name in ("a", "b"):
        pipe.load_lora_weights(folder / name)
    pipe.unload_lora_weights()
    expected = build_prior()
    expected.model.embed_tokens.weight.requires_grad_(False)
    assert_same_weights(pipe.prior, expected)
    assert pipe.get_list_adapters() == {} and pipe.get_active_adapters() == []
    pipe.load_lora_weights(folder / "a", adapter_name="default_0")


def test_disabled_adapters_compute_nothing(pipe, folder):
    base = compute_logits(pipe.prior)
    pipe.load_lora_weights(folder / "a")
    adapted = compute_logits(pipe.prior)
    pipe.disable_lora()
    assert torch.equal(compute_logits(pipe.prior), base)
    pipe.enable_lora()
    assert torch.equal(compute_logits(pipe.prior), adapted)


def test_an_adapter_that_is_loaded_while_others_are_disabled_acts_whole(pipe, folder):
    pipe.load_lora_weights(folder / "a")
    pipe.disable_lora()
    pipe.load_lora_weights(folder / "b")  # fc1 has a layer of both, o_proj of b alone
    expected = compute_logits(build_changed_prior(folder, b=1.0))
    torch.testing.assert_close(compute_logits(pipe.prior), expected, rtol=0, atol=1e-4)


def test_deleting_adapters(pipe, folder):
    for name in ("a", "b"):
        pipe.load_lora_weights(folder / name, adapter_name=name)
    pipe.delete_adapters("b")
    assert pipe.get_list_adapters() == {"prior": ["a"]}
    pipe.set_adapters("a")
    expected = compute_logits(build_changed_prior(folder, a=1.0))
    torch.testing.assert_close(compute_logits(pipe.prior), expected, rtol=0, atol=1e-4)
    pipe.delete_adapters(["a"])
    assert_same_weights(pipe.prior, build_prior())


@pytest.mark.parametrize("scale", [1.0, 0.5, 0.0])
def test_fused_is_unfused(pipe, folder, scale):
    base = compute_logits(pipe.prior)
    for name in ("a", "b"):
        pipe.load_lora_weights(folder / name, adapter_name=name)
    pipe.set_adapters(["a", "b"], [0.5, 1.0])
    unfused = compute_logits(pipe.prior)
    pipe.fuse_lora(lora_scale=scale)
    assert pipe.num_fused_loras == 2 and pipe.fused_loras == {"a", "b"}
    expected = {1.0: unfused, 0.0: base}.get(scale, compute_logits(build_changed_prior(folder, a=0.25, b=0.5)))
    torch.testing.assert_close(compute_logits(pipe.prior), expected, rtol=0, atol=1e-4)
    pipe.unfuse_lora()
    assert pipe.num_fused_loras == 0
    torch.testing.assert_close(compute_logits(pipe.prior), unfused, rtol=0, atol=1e-4)


def test_fusing_one_of_two(pipe, folder):
    for name in ("a", "b"):
        pipe.load_lora_weights(folder / name, adapter_name=name)
    pipe.fuse_lora(lora_scale=0.5, adapter_names=["a"])  # b was the active one
    assert pipe.get_active_adapters() == ["a"] and pipe.fused_loras == {"a"}
    expected = compute_logits(build_changed_prior(folder, a=0.5))
    torch.testing.assert_close(compute_logits(pipe.prior), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("options", [{"safe_fusing": True}, {"components": ["unet"]}], ids=["numbers", "names"])
def test_fusing_that_fails_changes_nothing(pipe, folder, options):
    weights = load_file(folder / "a" / FILE)
    weights["prior.model.layers.2.mlp.fc1.lora_B.weight"][0, 0] = float("nan")  # two blocks are fused by then
    pipe.load_lora_weights(weights)
    layers = [module for module in pipe.prior.modules() if hasattr(module, "merged")]
    scalings = [dict(layer.scaling) for layer in layers]
    with pytest.raises(ValueError, match="NaN|unet"):
        pipe.fuse_lora(lora_scale=0.5, **options)
    assert [dict(layer.scaling) for layer in layers] == scalings
    assert pipe.num_fused_loras == 0 and not any(layer.merged for layer in layers)
    pipe.unload_lora_weights()
    torch.testing.assert_close(compute_logits(pipe.prior), compute_logits(build_prior()), rtol=0, atol=1e-4)


def test_a_fused_prior_is_saved_without_its_adapter(pipe, folder, tmp_path):
    pipe.load_lora_weights(folder / "a")
    with pytest.raises(ValueError, match="There are adapters: save them by `save_lora_weights`"):
        pipe.save_pretrained(tmp_path / "pipe")
    assert not (tmp_path / "pipe").exists()
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    pipe.save_pretrained(tmp_path / "pipe")
    loaded = DALLEPipeline.from_pretrained(tmp_path / "pipe")
    assert torch.equal(compute_logits(loaded.prior), compute_logits(pipe.prior))
    expected = compute_logits(build_changed_prior(folder, a=1.0))
    torch.testing.assert_close(compute_logits(loaded.prior), expected, rtol=0, atol=1e-4)


# -------------------------------------------------------------------------------------------------------- drawing


def test_guided_drawing_from_a_cache_is_that_of_whole_forward_passes(pipe, folder):
    pipe.load_lora_weights(folder / "a")
    text = pipe.encode_prompt(["a red fox", "a blue bird"], do_classifier_free_guidance=True)
    likeliest = {"guidance_scale": 3.0, "temperature": 1.0, "top_k": 1, "top_p": 1.0}
    *_, (_, tokens) = draw_image_tokens(pipe.prior, **text, **likeliest, generators=spawn_generators(None, 2))
    scores = []
    for prefix in ("", "negative_"):
        ids = pipe.prior.join_stream(text[f"{prefix}text_ids"], text[f"{prefix}attention_mask"], tokens)["input_ids"]
        with torch.no_grad():
            scores.append(pipe.prior(ids[:, :-1]).image_logits)
    guided = scores[1] + 3.0 * (scores[0] - scores[1])
    assert torch.equal(guided.argmax(-1), tokens)
    assert (scores[0] - scores[1]).abs().max() > 0.1


def test_a_pipeline_draws_other_pictures_with_an_adapter_and_the_same_ones_without(pipe, folder):
    def draw():
        drawn = pipe("a red fox", generator=torch.Generator().manual_seed(0), output_type="latent", guidance_scale=2.0)
        return drawn.images

    before = draw()
    pipe.load_lora_weights(folder / "a")
    adapted = draw()
    pipe.fuse_lora()
    fused = draw()
    pipe.unfuse_lora()
    pipe.unload_lora_weights()
    assert torch.equal(adapted, fused) and not torch.equal(adapted, before)
    pipe.prior = build_prior(caption_dropout=0.1)
    assert torch.equal(draw(), before)


# ---------------------------------------------------------------------------------------------------------- files


def test_the_file_is_as_diffusers_writes_it(folder):
    with safe_open(folder / "a" / FILE, "pt") as file:
        keys, metadata = set(file.keys()), json.loads(file.metadata()["lora_adapter_metadata"])
    layers = [f"prior.model.layers.{i}.{kind}" for i in range(4) for kind in ("self_attn.q_proj", "mlp.fc1")]
    assert keys == {f"{layer}.{matrix}.weight" for layer in layers for matrix in ("lora_A", "lora_B")}
    assert metadata["prior.r"] == 3 and metadata["prior.lora_alpha"] == 6
    assert metadata["prior.target_modules"] == ["fc1", "q_proj"]
    read = DALLEPipeline.lora_state_dict(folder / "a", return_lora_metadata=True)
    assert read[0].keys() == keys and read[1] == metadata


@pytest.mark.parametrize("kind", ["file", "weight_name", "subfolder", "weights"])
def test_ways_to_name_an_adapter(pipe, folder, tmp_path, kind):
    weights = load_file(folder / "b" / FILE)  # whose alpha is its rank, as weights alone load
    path = tmp_path / "styles" / "ink.safetensors"
    path.parent.mkdir()
    path.write_bytes((folder / "b" / FILE).read_bytes())
    if kind == "file":
        pipe.load_lora_weights(path)
    elif kind == "weight_name":
        pipe.load_lora_weights(path.parent, weight_name="ink.safetensors")
    elif kind == "subfolder":
        pipe.load_lora_weights(tmp_path, weight_name="ink.safetensors", subfolder="styles")
    else:
        pipe.load_lora_weights(weights)
    assert torch.equal(compute_logits(pipe.prior), compute_logits(build_adapted_prior(1, **ADAPTERS["b"])))


def test_saving_what_was_loaded_and_what_peft_gives(pipe, folder, tmp_path):
    pipe.load_lora_weights(folder / "c", adapter_name="ink")
    DALLEPipeline.save_lora_weights(tmp_path / "again", prior_lora_layers=pipe.prior, weight_name="x.safetensors")
    layers = get_peft_model_state_dict(pipe.prior, adapter_name="ink")
    metadata = collect_adapter(pipe.prior)[1]
    DALLEPipeline.save_lora_weights(tmp_path / "peft", layers, prior_lora_adapter_metadata=metadata)
    DALLEPipeline.save_lora_weights(tmp_path / "nothing", layers, is_main_process=False)
    assert not (tmp_path / "nothing").exists()
    expected = compute_logits(pipe.prior)
    for path in (tmp_path / "again" / "x.safetensors", tmp_path / "peft"):
        other = build_pipeline()
        other.load_lora_weights(path)
        assert torch.equal(compute_logits(other.prior), expected)


def test_an_adapter_takes_the_priors_dtype(pipe, folder):
    pipe.to(torch.bfloat16)
    pipe.load_lora_weights(folder / "a")
    assert {parameter.dtype for parameter in pipe.prior.parameters()} == {torch.bfloat16}
    assert compute_logits(pipe.prior).isfinite().all()


# -------------------------------------------------------------------------------------------------------- refused


def test_an_adapter_of_another_model_is_refused_with_its_shapes(folder):
    pipe = build_pipeline(prior=build_prior(hidden_size=64))
    words = (
        r"does not fit this prior: model.layers.0.mlp.fc1.lora_A.weight is of \(3, 32\), not \(3, 64\) \(and 15 more\)"
    )
    with pytest.raises(ValueError, match=words):
        pipe.load_lora_weights(folder / "a")
    assert_same_weights(pipe.prior, build_prior(hidden_size=64))
    pipe = build_pipeline(prior=build_prior(attention_types=["full"] * 3))
    with pytest.raises(ValueError, match=r"the prior has no linear layer model.layers.3.mlp.fc1 \(and 3 more\)"):
        pipe.load_lora_weights(folder / "a")


@pytest.mark.parametrize(
    ("weights", "words"),
    [
        ({}, "The adapter is empty"),
        ({"transformer.x.lora_A.weight": (3, 32), "transformer.x.lora_B.weight": (32, 3)}, "no linear layer transfo"),
        ({"prior.model.layers.0.mlp.fc1.lora_A.weight": (3, 32)}, "no plain LoRA weight of a pair"),
        ({"prior.model.layers.0.mlp.fc1.lora_magnitude_vector": (32,)}, "lora_magnitude_vector is no plain LoRA"),
        ({"prior.lm_head.lora_A.weight": (3, 32), "prior.lm_head.lora_B.weight": (329, 3)}, "no linear layer lm_head"),
    ],
)
def test_weights_that_are_no_adapter_of_a_prior_are_refused(pipe, weights, words):
    with pytest.raises(ValueError, match=words):
        pipe.load_lora_weights({name: torch.zeros(shape) for name, shape in weights.items()})


def test_files_that_cannot_be_read_are_named_in_one_line(pipe, folder, tmp_path):
    (tmp_path / FILE).write_bytes((folder / "a" / FILE).read_bytes()[:-8])
    save_file({}, tmp_path / "empty.safetensors")
    cases = [
        ({}, OSError, f"The adapter {FILE} of {tmp_path} cannot be loaded: "),
        ({"weight_name": "no.safetensors"}, OSError, f"The adapter no.safetensors of {tmp_path} cannot be loaded: "),
        ({"weight_name": "empty.safetensors"}, ValueError, f"The adapter of {tmp_path} is empty"),
        ({"weight_name": "old.bin"}, ValueError, "Adapters are read from .safetensors files only, not old.bin"),
    ]
    for options, kind, words in cases:
        with pytest.raises(kind) as error:
            pipe.load_lora_weights(tmp_path, **options)
        assert str(error.value).startswith(words) and "\n" not in str(error.value)
    with pytest.raises(OSError, match="of me/nothing cannot be loaded"):
        pipe.load_lora_weights("me/nothing", local_files_only=True, cache_dir=tmp_path)


def test_names_are_checked(pipe, folder):
    with pytest.raises(ValueError, match="There is no active adapter to fuse"):
        pipe.fuse_lora()
    for name in ("ink.1", "keys"):  # no key that torch takes
        with pytest.raises(ValueError, match=f"`adapter_name` is '{name}', which torch takes for no name"):
            pipe.load_lora_weights(folder / "a", adapter_name=name)
    assert_same_weights(pipe.prior, build_prior())
    pipe.load_lora_weights(folder / "a", adapter_name="ink")
    with pytest.raises(ValueError, match="There is an adapter 'ink' already"):
        pipe.load_lora_weights(folder / "b", adapter_name="ink")
    for change in (
        lambda: pipe.set_adapters(["ink", "oil"]),
        lambda: pipe.delete_adapters("oil"),
        lambda: pipe.fuse_lora(adapter_names=["oil"]),
    ):
        with pytest.raises(ValueError, match="There is no adapter 'oil'; loaded are: ink"):
            change()


def test_while_adapters_are_fused_nothing_changes_them(pipe, folder):
    pipe.load_lora_weights(folder / "a", adapter_name="ink")
    unfused = compute_logits(pipe.prior)
    pipe.fuse_lora()
    for change in (
        pipe.fuse_lora,
        pipe.disable_lora,
        lambda: pipe.load_lora_weights(folder / "b"),
        lambda: pipe.set_adapters("ink", 0.5),
        lambda: pipe.delete_adapters("ink"),
    ):
        with pytest.raises(ValueError, match="Adapters are fused.*`unfuse_lora` first"):
            change()
    pipe.unfuse_lora()
    torch.testing.assert_close(compute_logits(pipe.prior), unfused, rtol=0, atol=1e-4)


def test_what_cannot_be_saved_is_refused(pipe, folder, tmp_path):
    (tmp_path / "file").write_text("x")
    for layers, where, kind, words in (
        ({}, tmp_path, ValueError, "`prior_lora_layers` is empty"),
        (pipe.prior, tmp_path, ValueError, "active are: none"),
        ({"x": torch.zeros(1)}, tmp_path / "file", OSError, "which is a file"),
    ):
        with pytest.raises(kind, match=words):
            DALLEPipeline.save_lora_weights(where, prior_lora_layers=layers)
    for name in ("a", "b"):
        pipe.load_lora_weights(folder / name, adapter_name=name)
    pipe.set_adapters(["a", "b"])
    with pytest.raises(ValueError, match="active are: a, b"):
        DALLEPipeline.save_lora_weights(tmp_path, prior_lora_layers=pipe.prior)


def test_a_missing_peft_is_said(monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)  # as Python marks a module that cannot be imported
    with pytest.raises(OSError, match="pip install 'peft>=0.20'"):
        check_peft()


WITHOUT_PEFT = """
import sys

sys.modules["peft"] = None
sys.path.insert(0, sys.argv[1])
from tiny import build_pipeline

from hf_dalle import DALLEPipeline

build_pipeline().save_pretrained(sys.argv[2])
pipe = DALLEPipeline.from_pretrained(sys.argv[2])
assert len(pipe("a red fox").images) == 1
for change in (
    lambda: pipe.load_lora_weights("anything"),
    lambda: pipe.set_adapters("ink"),
    lambda: pipe.delete_adapters("ink"),
    lambda: pipe.fuse_lora(),
    lambda: pipe.unfuse_lora(),
    lambda: pipe.disable_lora(),
    lambda: pipe.unload_lora_weights(),
):
    try:
        change()
    except OSError as error:
        print(error)
"""


def test_a_pipeline_is_saved_and_draws_without_peft(tmp_path):
    command = [sys.executable, "-c", WITHOUT_PEFT, str(Path(__file__).parent), str(tmp_path / "pipe")]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, timeout=300)
    assert done.stdout.splitlines() == ["LoRA needs peft, which is not installed: pip install 'peft>=0.20'"] * 7
