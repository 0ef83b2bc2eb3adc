"""The pieces of publishing, without a push: what is sent, which card, what a refusal is told as."""

import os
import shutil
import types

import pytest
from diffusers import DiffusionPipeline
from finetune_prior import add_adapter
from huggingface_hub.utils import hf_raise_for_status, httpx
from PIL import Image
from tiny import build_pipeline

from hf_dalle import DALLEPipeline
from hf_dalle.publishing import _kind_of_weights, in_one_line, list_files, read_card


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A pipeline's folder with a card and its picture; beside it one that is nobody's business."""
    folder = tmp_path_factory.mktemp("checkpoints") / "emoji-mini"
    build_pipeline().save_pretrained(folder)
    (folder / "README.md").write_text("# emoji-mini\n\n![Drawn](samples.png)\n")
    for name in ("samples.png", "../secret.png"):
        Image.new("RGB", (4, 4), "red").save(folder / name)
    return folder


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("prior/model.safetensors", "prior/model"),
        ("prior/model-00001-of-00002.safetensors", "prior/model"),
        ("prior/model.safetensors.index.json", "prior/model"),
        ("prior/model.fp16.safetensors", "prior/model.fp16"),
        ("prior/model.fp16-00002-of-00002.safetensors", "prior/model.fp16"),
        ("prior/model.safetensors.index.fp16.json", "prior/model.fp16"),
        ("dvae/diffusion_pytorch_model.safetensors", "dvae/diffusion_pytorch_model"),
        ("prior/config.json", None),
        ("README.md", None),
    ],
)
def test_kinds_of_weights(name, kind):
    assert _kind_of_weights(name) == kind


def test_files_of_a_folder(tmp_path):
    for name in ("a.txt", "b/c.txt", ".hidden", ".git/config", "b/.secret", "logs/x/y"):
        (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / name).write_text(name)
    assert list_files(tmp_path, ignore=["logs/*"]) == {
        "a.txt": tmp_path / "a.txt",
        "b/c.txt": tmp_path / "b" / "c.txt",
    }


def test_a_folder_without_a_card_has_none(tmp_path, folder):
    assert read_card(tmp_path, "me/x") == {}
    os.symlink(folder.parent / "secret.png", tmp_path / "linked.png")
    (tmp_path / "README.md").write_text("![Linked](linked.png)")
    assert set(read_card(tmp_path, "me/x")) == {"README.md"}, "a link out of the folder is not followed"


def test_the_code_of_a_card_loads_what_is_published(tmp_path):
    code = 'clip = CLIPPipeline.from_pretrained("a/b")\npipe = DiffusionPipeline.from_pretrained("old")\n'
    code += 'other = DALLEPipeline.from_pretrained("another")'
    (tmp_path / "README.md").write_text(code)
    assert read_card(tmp_path, "me/x")["README.md"].decode() == code.replace('"old"', '"me/x"')
    adapter = 'pipe = DALLEPipeline.from_pretrained("base")\npipe.load_lora_weights("me/style")'
    (tmp_path / "README.md").write_text(adapter)
    assert read_card(tmp_path, "me/x")["README.md"].decode() == adapter
    (tmp_path / "README.md").write_bytes("größer".encode("latin-1"))
    with pytest.raises(ValueError, match=r"The README\.md of .* is not UTF-8"):
        read_card(tmp_path, "me/x")


@pytest.mark.parametrize("loader", [DALLEPipeline, DiffusionPipeline])
def test_the_folder_that_was_loaded_from_stays_that_one(folder, tmp_path, monkeypatch, loader):
    (tmp_path / "me").mkdir()
    shutil.copytree(folder, tmp_path / "me" / "pipe")
    monkeypatch.chdir(tmp_path)
    pipe = loader.from_pretrained("me/pipe")
    monkeypatch.chdir(folder)
    assert set(pipe._find_card("me/new", None)) == {"README.md", "samples.png"}
    pipe.save_pretrained(tmp_path / "again")
    assert str(tmp_path) not in (tmp_path / "again" / "model_index.json").read_text()


def test_adapters_are_refused_before_a_repository_is_made():
    pipe = build_pipeline()
    add_adapter(
        pipe.prior, types.SimpleNamespace(lora_rank=2, lora_alpha=2, lora_dropout=0.0, lora_target_modules=None)
    )
    with pytest.raises(ValueError, match="There are adapters: save them by `save_lora_weights`"):
        pipe.push_to_hub("me/adapted")  # there is no Hub here: to ask it would be another error


@pytest.mark.parametrize(
    ("status", "advice"),
    [(400, "does not take it"), (413, "does not take it"), (422, "does not take it")]
    + [(status, "as a whole or not at all; the same push completes it") for status in (408, 409, 429, 500, 503)],
)
def test_what_to_do_about_a_refusal(status, advice):
    response = httpx.Response(status, request=httpx.Request("POST", "http://127.0.0.1/commit"))
    with pytest.raises(OSError, match=advice) as caught, in_one_line("me/x"):
        hf_raise_for_status(response)
    assert "\n" not in str(caught.value)
