"""A converted folder on the Hub: loaded by diffusers itself, pushed with its card, loaded again by name."""

import json

import torch
from hub_server import HubServer, client_environment, run_client
from huggingface_hub import ModelCard
from tiny_checkpoints import save_dalle_pytorch

from conversion.convert import convert
from hf_dalle import DALLEPipeline


CLIENT = """
import json, sys, torch, hf_dalle
from diffusers import DiffusionPipeline

def draw(pipe):
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    return [type(pipe).__name__, type(pipe.prior).__name__, type(pipe.dvae).__name__,
            pipe("w1 w2", generator=generator, output_type="latent", guidance_scale=2.0).images.tolist()]

pipe = DiffusionPipeline.from_pretrained(sys.argv[1])
pipe.push_to_hub("me/converted")
print(json.dumps([draw(pipe), draw(DiffusionPipeline.from_pretrained("me/converted"))]))
"""


def test_a_converted_folder_is_pushed_with_its_card_and_loads_by_name(tmp_path):
    convert("dalle-pytorch", save_dalle_pytorch(tmp_path / "source"), tmp_path / "out", do_verify=True)
    with HubServer() as hub:
        environment = client_environment(hub, tmp_path / "home", HF_HUB_DISABLE_XET="1")
        loaded, again = json.loads(run_client(CLIENT, environment, tmp_path / "out"))
        files = hub.files("me/converted")
    pipe = DALLEPipeline.from_pretrained(tmp_path / "out")
    generator = torch.Generator().manual_seed(0)
    drawn = pipe("w1 w2", generator=generator, output_type="latent", guidance_scale=2.0).images.tolist()
    assert loaded == again == ["DALLEPipeline", "DalleFamilyPriorForCausalLM", "DalleDiscreteVAE", drawn]
    card = ModelCard(files["README.md"].decode())
    assert "# A DALLE-pytorch checkpoint, for Hugging Face" in card.text and "## Parity" in card.text
    assert card.data.license == "other" and card.data.library_name == "diffusers" and "converted" in card.data.tags
    assert "weights that are not the source's, rounded once | 0 | 0 |" in card.text
