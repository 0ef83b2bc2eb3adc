"""What is on the Hub loads by name, in every way its page promises, from a real server; and offline from the cache.

One process loads everything, another one offline after the server has stopped: what they saw is judged by the tests.
"""

import json
import shutil

import pytest
import torch
from hub_server import HubServer, client_environment, run_client
from tiny import build_dvae, build_pipeline, build_prior


DRAW = """
import json, sys, torch, hf_dalle
from diffusers import DiffusionPipeline
from hf_dalle import DALLEPipeline

NAME = "me/emoji-mini"

def draw(pipe):
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    images = pipe("a red fox", num_images_per_prompt=2, generator=generator, output_type="latent").images
    return [type(pipe).__name__, pipe.guidance_scale, images.tolist()]

def draw_each():
    return {
        "DALLEPipeline": draw(DALLEPipeline.from_pretrained(NAME)),
        "DiffusionPipeline": draw(DiffusionPipeline.from_pretrained("me/twin")),
        "variant": draw(DALLEPipeline.from_pretrained("me/variants", variant="fp16", dtype=torch.float16)),
        "sharded": draw(DALLEPipeline.from_pretrained("me/sharded")),
        "branch": draw(DALLEPipeline.from_pretrained(NAME, revision="another")),
    }

def refusal(load):
    try:
        return str(load())
    except (OSError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
"""
ONLINE = """
from transformers import AutoConfig, AutoImageProcessor, AutoModelForCausalLM, AutoProcessor, AutoTokenizer
from huggingface_hub import list_repo_refs

first_commit = sys.argv[1]
seen = {
    **draw_each(),
    "commit": draw(DALLEPipeline.from_pretrained(NAME, revision=first_commit)),
    "private": draw(DALLEPipeline.from_pretrained("me/secret")),
    "refs": [ref.name for ref in list_repo_refs(NAME).branches],
}
prior = AutoModelForCausalLM.from_pretrained(NAME, subfolder="prior")
dvae = hf_dalle.DalleDVAE.from_pretrained(NAME, subfolder="dvae")
sharded = AutoModelForCausalLM.from_pretrained("me/sharded", subfolder="prior")
tokenizer = AutoTokenizer.from_pretrained(NAME, subfolder="tokenizer")
processor, image_processor = AutoProcessor.from_pretrained(NAME), AutoImageProcessor.from_pretrained(NAME)
seen |= {
    "AutoConfig": type(AutoConfig.from_pretrained(NAME, subfolder="prior")).__name__,
    "AutoModelForCausalLM": [type(prior).__name__, prior.generation_config.guidance_scale],
    "weights": [sum(v.double().sum().item() for v in part.state_dict().values()) for part in (prior, dvae, sharded)],
    "AutoTokenizer": tokenizer("a red fox").input_ids,
    "AutoImageProcessor": [type(image_processor).__name__, image_processor.size.height],
    "image_processor/": type(AutoImageProcessor.from_pretrained(NAME, subfolder="image_processor")).__name__,
    "AutoProcessor": [type(processor).__name__, processor(text="a red fox").input_ids.tolist()],
    "own AutoProcessor": type(AutoProcessor.from_pretrained("me/processor")).__name__,
    "wrong name": refusal(lambda: DALLEPipeline.from_pretrained("me/nowhere")),
    "wrong revision": refusal(lambda: DALLEPipeline.from_pretrained(NAME, revision="nowhere")),
    "wrong variant": refusal(lambda: DALLEPipeline.from_pretrained(NAME, variant="fp16")),
    "no token": refusal(lambda: DALLEPipeline.from_pretrained("me/hidden", token=False)),
}
print(json.dumps(seen))
"""
OFFLINE = """
from transformers import AutoModelForCausalLM, AutoProcessor

seen = {
    **draw_each(),
    "AutoModelForCausalLM": type(AutoModelForCausalLM.from_pretrained(NAME, subfolder="prior")).__name__,
    "AutoProcessor": type(AutoProcessor.from_pretrained(NAME)).__name__,
    "never loaded": refusal(lambda: DALLEPipeline.from_pretrained("me/hidden")),
}
print(json.dumps(seen))
"""
# The package is installed here, but this process cannot import it.
WITHOUT_PACKAGE = """
import json, sys, torch

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "hf_dalle":
            raise ModuleNotFoundError(name, name=name)

sys.meta_path.insert(0, Absent())
from diffusers import DiffusionPipeline
from transformers import AutoProcessor

def draw(pipe):
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    images = pipe("a red fox", num_images_per_prompt=2, generator=generator, output_type="latent").images
    return [type(pipe).__name__, pipe.guidance_scale, images.tolist()]

seen = {}
for way, place in {"repository": "me/code", "folder": sys.argv[1]}.items():
    try:
        DiffusionPipeline.from_pretrained(place)
    except ValueError as error:
        seen[f"{way}, not trusted"] = str(error)
    seen[way] = draw(DiffusionPipeline.from_pretrained(place, trust_remote_code=True))
seen["AutoProcessor"] = type(AutoProcessor.from_pretrained("me/code")).__name__
print(json.dumps(seen))
"""


def build(seed: int = 0):
    pipe = build_pipeline(seed)
    pipe.prior.generation_config.update(guidance_scale=2.5, top_k=7)  # other than a prior has without the file
    return pipe


def draw(pipe):
    generator = torch.Generator().manual_seed(0)
    images = pipe("a red fox", num_images_per_prompt=2, generator=generator, output_type="latent").images
    return ["DALLEPipeline", 2.5, images.tolist()]


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    build(seed=1).save_pretrained(folder / "another")
    build().save_pretrained(folder / "first")
    shutil.copytree(folder / "first", folder / "variants")
    build(seed=1).to(torch.float16).save_pretrained(folder / "variants", variant="fp16")
    build().save_pretrained(folder / "sharded", max_shard_size="10KB")
    assert len(list((folder / "sharded" / "prior").glob("model-0*.safetensors"))) > 9
    assert len(list((folder / "sharded" / "dvae").glob("*-0*.safetensors"))) > 1
    processor = folder / "processor"
    shutil.copytree(folder / "first" / "tokenizer", processor)
    shutil.copy(folder / "first" / "processor_config.json", processor)
    with HubServer() as hub:
        hub.first_commit = hub.add_folder("me/emoji-mini", folder / "another")
        hub.add_folder("me/emoji-mini", folder / "another", ref="another")
        hub.add_folder("me/emoji-mini", folder / "first")
        for name, source in {"twin": "first", "variants": "variants", "sharded": "sharded"}.items():
            hub.add_folder(f"me/{name}", folder / source)
        hub.add_folder("me/processor", processor)
        for name in ("secret", "hidden"):
            hub.add_folder(f"me/{name}", folder / "first", private=True)
        yield hub


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def online(server, home):
    return json.loads(run_client(DRAW + ONLINE, client_environment(server, home), server.first_commit))


@pytest.fixture(scope="module")
def offline(online, server, home):
    num_requests = len(server.requests)
    seen = json.loads(run_client(DRAW + OFFLINE, client_environment(server, home, HF_HUB_OFFLINE="1")))
    assert len(server.requests) == num_requests, "offline is offline"
    return seen


@pytest.mark.parametrize("way", ["DALLEPipeline", "DiffusionPipeline", "sharded", "private"])
def test_a_pipeline_by_name_draws_what_it_draws_from_its_folder(online, way):
    """Also with the checkpoint's own guidance: diffusers alone would not download the file that says it."""
    assert online[way] == draw(build())


@pytest.mark.parametrize("way", ["branch", "commit"])
def test_a_revision_is_another_model(online, way):
    assert online[way] == draw(build(seed=1)) != draw(build())
    assert online["refs"] == ["main", "another"]


def test_a_variant_is_the_weights_of_that_name(online):
    half = build(seed=1).to(torch.float16)
    assert online["variant"] == draw(half) != draw(build().to(torch.float16))


def test_parts_by_name(online):
    parts = build_prior(caption_dropout=0.1), build_dvae(), build_prior(caption_dropout=0.1)
    sums = [sum(value.double().sum().item() for value in part.state_dict().values()) for part in parts]
    assert online["weights"] == pytest.approx(sums, abs=1e-9)
    assert online["AutoConfig"] == "DallePriorConfig"
    assert online["AutoModelForCausalLM"] == ["DallePriorForCausalLM", 2.5]
    assert online["AutoTokenizer"] == build_pipeline().tokenizer("a red fox").input_ids
    assert online["AutoImageProcessor"] == ["DalleImageProcessor", 16]
    assert online["image_processor/"] == "DalleImageProcessor"


def test_auto_processor_needs_no_subfolder(online):
    ids = build_pipeline().tokenizer(["a red fox"], padding="max_length").input_ids
    assert online["AutoProcessor"] == ["DalleProcessor", ids]
    assert online["own AutoProcessor"] == "DalleProcessor"


@pytest.mark.parametrize(
    ("case", "words"),
    [
        ("wrong name", "me/nowhere"),
        ("wrong revision", "me/emoji-mini"),
        ("wrong variant", "fp16"),
        ("no token", "me/hidden"),
    ],
)
def test_what_is_not_there_is_an_error(online, case, words):
    assert online[case].split(":")[0].endswith("Error") and words in online[case]


def test_no_token_leaves_the_hub(online, server):
    """Weights are fetched from another host, as on the Hub: what is sent there carries no token."""
    assert {token for _, path, token in server.requests if path.startswith("/cdn/")} == {None}
    assert "hf_write" in {token for _, path, token in server.requests if path.startswith("/me/secret/")}


@pytest.mark.parametrize("way", ["DALLEPipeline", "DiffusionPipeline", "variant", "sharded", "branch"])
def test_offline_from_the_cache(online, offline, way):
    assert offline[way] == online[way]


def test_offline_parts_and_what_was_never_loaded(offline):
    assert offline["AutoModelForCausalLM"] == "DallePriorForCausalLM"
    assert offline["AutoProcessor"] == "DalleProcessor"
    assert offline["never loaded"].split(":")[0].endswith("Error") and "me/hidden" in offline["never loaded"]


@pytest.mark.slow
def test_code_that_comes_along_loads_where_the_package_is_not_installed(server, tmp_path):
    build().save_pretrained(tmp_path / "saved", do_save_code=True)
    server.add_folder("me/code", tmp_path / "saved")
    environment = client_environment(server, tmp_path / "home", PYTHONPATH="")
    seen = json.loads(run_client(WITHOUT_PACKAGE, environment, tmp_path / "saved"))
    assert seen["repository"] == seen["folder"] == draw(build())
    assert all("trust_remote_code=True" in seen[f"{way}, not trusted"] for way in ("repository", "folder"))
    assert seen["AutoProcessor"] == "DalleProcessor", "the Auto classes know the code that was loaded"
