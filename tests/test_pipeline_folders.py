"""A `DALLEPipeline` saved and loaded in every way draws the same tokens; a broken folder says which file."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import accelerate
import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from diffusers import DiffusionPipeline
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny import build_dvae, build_pipeline, build_prior, build_reranker, build_tokenizer

from hf_dalle import DALLEPipeline


SRC = Path(__file__).parent.parent / "src"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The tiny pipeline, saved; tests that change it copy it first."""
    folder = tmp_path_factory.mktemp("saved") / "pipeline"
    build_pipeline().save_pretrained(folder)
    return folder


def draw(pipe, **kwargs):
    pipe.set_progress_bar_config(disable=True)
    kwargs = {"num_images_per_prompt": 2, "output_type": "latent", **kwargs}
    return pipe("a red fox", generator=torch.Generator().manual_seed(0), **kwargs).images


@pytest.mark.parametrize("pipeline_class", [DALLEPipeline, DiffusionPipeline])
def test_save_and_load_draw_the_same(folder, pipeline_class):
    pipe = pipeline_class.from_pretrained(folder)
    assert type(pipe) is DALLEPipeline
    assert torch.equal(draw(pipe), draw(build_pipeline()))
    assert torch.equal(draw(pipe, output_type="pt"), draw(build_pipeline(), output_type="pt"))


def test_a_fresh_process_loads_it_by_diffusers_alone(folder):
    script = f"""
import diffusers, torch, hf_dalle
pipe = diffusers.DiffusionPipeline.from_pretrained({str(folder)!r})
arguments = {{"num_images_per_prompt": 2, "generator": torch.Generator().manual_seed(0), "output_type": "latent"}}
print(type(pipe).__name__, pipe("a red fox", **arguments).images.tolist())
"""
    process = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(SRC)}
    )
    assert process.stdout.strip() == f"DALLEPipeline {draw(build_pipeline()).tolist()}", process.stderr


def test_model_index_names_the_package_and_no_place(folder, tmp_path):
    DALLEPipeline.from_pretrained(folder).save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert {name: value for name, value in index.items() if isinstance(value, list) and value[0]} == {
        "prior": ["hf_dalle", "DallePriorForCausalLM"],
        "dvae": ["hf_dalle", "DalleDVAE"],
        "image_processor": ["hf_dalle", "DalleImageProcessor"],
        "tokenizer": ["transformers", "TokenizersBackend"],
    }
    assert index["_class_name"] == "DALLEPipeline"
    assert "_name_or_path" not in index
    assert (tmp_path / "prior" / "model.safetensors").is_file()
    assert (tmp_path / "dvae" / "diffusion_pytorch_model.safetensors").is_file()
    assert not [path for path in tmp_path.rglob("*") if path.suffix in (".bin", ".pt", ".ckpt")]


def test_no_file_names_the_place_that_it_was_loaded_from(tmp_path):
    first, second = tmp_path / "first-place", tmp_path / "second-place"
    build_pipeline(**build_reranker()).save_pretrained(first)
    DALLEPipeline.from_pretrained(first).save_pretrained(second)
    files = {path.relative_to(second) for path in second.rglob("*") if path.is_file()}
    assert files == {path.relative_to(first) for path in first.rglob("*") if path.is_file()}
    for name in files:
        content = (second / name).read_bytes()
        assert str(tmp_path).encode() not in content and b"first-place" not in content, name


def test_optional_parts_and_settings_are_saved(tmp_path):
    pipe = build_pipeline(**build_reranker())
    pipe.prior.generation_config.update(guidance_scale=2.5, top_k=7)
    pipe.save_pretrained(tmp_path)
    loaded = DALLEPipeline.from_pretrained(tmp_path)
    arguments = {"num_images_per_prompt": 3, "output_type": "pt"}
    assert torch.equal(draw(loaded, **arguments), draw(pipe, **arguments))
    assert loaded.guidance_scale == 2.5
    without = DALLEPipeline.from_pretrained(tmp_path, reranker=None, reranker_processor=None)
    assert without.reranker is None and not torch.equal(draw(without, **arguments), draw(pipe, **arguments))


def test_parts_given_take_the_place_of_saved_ones(folder):
    other = build_prior(seed=1)
    loaded = DALLEPipeline.from_pretrained(folder, prior=other)
    assert loaded.prior is other
    assert torch.equal(draw(loaded), draw(build_pipeline(prior=other)))
    with pytest.raises(ValueError, match="model_max_length` is 9"):
        DALLEPipeline.from_pretrained(folder, tokenizer=build_tokenizer(text_length=9))


def test_parts_given_need_not_be_in_the_folder(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "pipeline")
    shutil.rmtree(tmp_path / "pipeline" / "prior")
    loaded = DALLEPipeline.from_pretrained(tmp_path / "pipeline", prior=build_prior(seed=1, caption_dropout=0.1))
    assert torch.equal(draw(loaded), draw(build_pipeline(prior=build_prior(seed=1))))


def test_parts_that_do_not_fit_are_refused_at_load(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "pipeline")
    build_prior(image_vocab_size=32).save_pretrained(tmp_path / "pipeline" / "prior")
    with pytest.raises(ValueError, match="vocab_size` is 16.*image_vocab_size` is 32"):
        DALLEPipeline.from_pretrained(tmp_path / "pipeline")


# ----------------------------------------------------------------------------------------------------- broken folders


@pytest.mark.parametrize(
    "name",
    [
        "model_index.json",
        "prior/config.json",
        "prior/model.safetensors",
        "dvae/config.json",
        "dvae/diffusion_pytorch_model.safetensors",
        "tokenizer/tokenizer.json",
        "tokenizer/tokenizer_config.json",
        "image_processor/preprocessor_config.json",
        "prior",
        "tokenizer",
    ],
)
def test_a_missing_or_cut_file_is_named(folder, tmp_path, name):
    broken = tmp_path / "pipeline"
    shutil.copytree(folder, broken)
    path = broken / name
    if path.is_file():
        for length in (path.stat().st_size - 1 if path.suffix == ".safetensors" else path.stat().st_size // 2, 0):
            path.write_bytes(path.read_bytes()[:length])
            with pytest.raises(OSError, match=str(path)):
                DALLEPipeline.from_pretrained(broken)
        path.unlink()
    else:
        shutil.rmtree(path)
    with pytest.raises(OSError, match=f"{broken / name.split('/')[0]}.* is missing"):
        DALLEPipeline.from_pretrained(broken)


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("prior/model.safetensors", "model.embed_tokens.weight"),
        ("dvae/diffusion_pytorch_model.safetensors", "encoder.conv_in.weight"),
    ],
)
@pytest.mark.parametrize("pipeline_class", [DALLEPipeline, DiffusionPipeline])
def test_missing_weights_are_named(folder, tmp_path, name, key, pipeline_class):
    broken = tmp_path / "pipeline"
    shutil.copytree(folder, broken)
    weights = load_file(broken / name)
    del weights[key]
    save_file(weights, broken / name, {"format": "pt"})
    with pytest.raises(OSError, match=f"{(broken / name).parent} .*{key}"):
        pipeline_class.from_pretrained(broken)


def test_no_such_place_is_an_error(tmp_path):
    with pytest.raises((OSError, ValueError), match="nowhere"):
        DALLEPipeline.from_pretrained(str(tmp_path / "nowhere"))
    with pytest.raises(OSError, match="someone/nowhere"):
        DALLEPipeline.from_pretrained("someone/nowhere")


# ------------------------------------------------------------------------------------------------ precision and places


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_dtype(folder, dtype):
    pipe = DALLEPipeline.from_pretrained(folder, dtype=dtype)
    assert pipe.prior.dtype == pipe.dvae.dtype == dtype
    picture = Image.new("RGB", (16, 16), "red")
    images = draw(pipe, output_type="np", guidance_scale=2.0, image=picture, num_prefix_rows=1)
    assert images.dtype == "float32" and images.shape == (2, 16, 16, 3)
    assert torch.equal(draw(build_pipeline().to(dtype)), draw(pipe))


def test_variant(tmp_path):
    half = build_pipeline().to(torch.float16)
    half.save_pretrained(tmp_path, variant="fp16")
    assert (tmp_path / "prior" / "model.fp16.safetensors").is_file()
    assert (tmp_path / "dvae" / "diffusion_pytorch_model.fp16.safetensors").is_file()
    loaded = DALLEPipeline.from_pretrained(tmp_path, variant="fp16", dtype=torch.float16)
    assert torch.equal(draw(loaded), draw(half))


@pytest.mark.parametrize("device_map", ["cpu", "balanced"])
def test_device_map(folder, device_map):
    assert torch.equal(draw(DALLEPipeline.from_pretrained(folder, device_map=device_map)), draw(build_pipeline()))


class Recorder(ModelHook):
    """What model offloading hooks into: a call that does not pass here would find the weights elsewhere."""

    def __init__(self):
        self.num_calls = 0

    def pre_forward(self, module, *args, **kwargs):
        self.num_calls += 1
        return args, kwargs


def test_every_use_of_a_part_passes_its_hook():
    pipe = build_pipeline(**build_reranker())
    recorders = {name: Recorder() for name in ("prior", "dvae", "reranker")}
    for name, recorder in recorders.items():
        add_hook_to_module(getattr(pipe, name), recorder)
    picture = Image.new("RGB", (16, 16), "red")
    draw(pipe, output_type="pil", image=picture, num_prefix_rows=1)
    # 12 cells; encode and decode; one prompt's pictures
    assert {name: recorder.num_calls for name, recorder in recorders.items()} == {
        "prior": 12,
        "dvae": 2,
        "reranker": 1,
    }


def test_model_offload():
    pipe = build_pipeline(**build_reranker())
    expected = draw(pipe, output_type="pt")
    pipe.enable_model_cpu_offload(device="cpu")  # the hooks of an accelerator, on the only device here
    for _ in range(2):
        hooks = pipe._all_hooks
        assert torch.equal(draw(pipe, output_type="pt"), expected)
        assert len(pipe._all_hooks) == 3 and not set(pipe._all_hooks) & set(hooks), (
            "freed and set anew after each call"
        )


@pytest.mark.parametrize("quantizer", ["gumbel", "nearest"])
def test_sequential_offload(quantizer):
    """The weights are on the meta device but inside a module's own forward."""
    pipe = build_pipeline(dvae=build_dvae(quantizer=quantizer, codebook_dim=6))
    arguments = {"output_type": "pt", "image": Image.new("RGB", (16, 16), "red"), "num_prefix_rows": 1}
    expected = draw(pipe, **arguments)
    for part in (pipe.prior, pipe.dvae):
        accelerate.cpu_offload(part, "cpu")
        assert {parameter.device.type for parameter in part.parameters()} == {"meta"}
    assert torch.equal(draw(pipe, **arguments), expected)
