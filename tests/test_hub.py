"""Hugging Face's loaders know the classes by name, and an unknown diffusers is left alone."""

import logging
import shutil

import diffusers
import pytest
import torch
from diffusers import DiffusionPipeline
from diffusers.pipelines import pipeline_loading_utils as tables
from tiny import build_pipeline
from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoModelForCausalLM, AutoTokenizer

import hf_dalle
from hf_dalle.hub import register_classes


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    build_pipeline().save_pretrained(folder)
    return folder


def test_auto_classes(folder):
    pipe = build_pipeline()
    assert isinstance(AutoConfig.from_pretrained(folder / "prior"), hf_dalle.DallePriorConfig)
    assert type(AutoModel.from_pretrained(folder / "prior")) is hf_dalle.DallePriorModel
    prior = AutoModelForCausalLM.from_pretrained(folder / "prior")
    assert type(prior) is hf_dalle.DallePriorForCausalLM
    for name, parameter in pipe.prior.named_parameters():
        assert torch.equal(prior.get_parameter(name), parameter)
    assert type(AutoImageProcessor.from_pretrained(folder / "image_processor")) is hf_dalle.DalleImageProcessor
    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    assert tokenizer("a red fox").input_ids == pipe.tokenizer("a red fox").input_ids


def test_every_export_exists():
    assert all(getattr(hf_dalle, name) is not None for name in hf_dalle.__all__)


def test_diffusers_knows_the_components_and_the_pipeline():
    """Guards the private tables: with another diffusers this shows whether `hub.py` still does its work."""
    methods = ["save_pretrained", "from_pretrained"]
    models = {"DallePriorForCausalLM", "DalleFamilyPriorForCausalLM", "DalleDVAE", "DalleDiscreteVAE", "DalleVQGAN"}
    assert set(tables.LOADABLE_CLASSES["hf_dalle"]) == {*models, "DalleImageProcessor"}
    for name, own_methods in tables.LOADABLE_CLASSES["hf_dalle"].items():
        assert own_methods == tables.ALL_IMPORTABLE_CLASSES[name] == methods
        assert all(callable(getattr(getattr(hf_dalle, name), method)) for method in methods)
    assert diffusers.DALLEPipeline is hf_dalle.DALLEPipeline
    # What diffusers asks of a repository's model_index.json before it downloads.
    index = {"prior": ["hf_dalle", "DallePriorForCausalLM"], "tokenizer": ["transformers", "TokenizersBackend"]}
    custom, folders = tables._get_custom_components_and_folders("someone/emoji", index, filenames=[])
    assert custom == {} and folders == list(index)


def test_registering_again_changes_nothing():
    before = {name: dict(classes) for name, classes in tables.LOADABLE_CLASSES.items()}
    register_classes()
    assert before == tables.LOADABLE_CLASSES


@pytest.mark.parametrize("pipeline_class", [hf_dalle.DALLEPipeline, DiffusionPipeline])
def test_loads_by_repository_name_from_the_cache(folder, tmp_path, pipeline_class):
    repository = tmp_path / "models--someone--emoji"
    shutil.copytree(folder, repository / "snapshots" / "0123abc")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0123abc")
    pipe = pipeline_class.from_pretrained("someone/emoji", cache_dir=tmp_path, local_files_only=True)
    assert type(pipe) is hf_dalle.DALLEPipeline


@pytest.mark.parametrize("change", ["version", "tables"])
def test_another_diffusers_is_left_alone_with_a_warning(monkeypatch, caplog, change):
    monkeypatch.delitem(tables.LOADABLE_CLASSES, "hf_dalle")
    monkeypatch.delattr(diffusers, "DALLEPipeline")
    if change == "version":
        monkeypatch.setattr(diffusers, "__version__", "0.43.0.dev0")
    else:
        monkeypatch.delattr(tables, "ALL_IMPORTABLE_CLASSES")
    with caplog.at_level(logging.WARNING):
        register_classes()
        register_classes()
    assert "hf_dalle" not in tables.LOADABLE_CLASSES and not hasattr(diffusers, "DALLEPipeline")
    warnings = [record.message for record in caplog.records if "pip install 'diffusers==0.42.*'" in record.message]
    assert len(warnings) == 1 and diffusers.__version__ in warnings[0]
