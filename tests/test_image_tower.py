"""The reranker's ResNet: transformers' own but for the features' form, and saved so that it loads again."""

import pytest
import torch
from tiny import build_tower_config
from transformers import AutoConfig, AutoModel, ResNetConfig, ResNetModel

from hf_dalle import DalleImageTower, DalleImageTowerConfig


PIXELS = torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def tower():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return DalleImageTower(build_tower_config()).eval()


def test_features_are_those_of_resnet_as_vectors(tower):
    names = ("embedding_size", "hidden_sizes", "depths", "layer_type")
    plain = ResNetModel(ResNetConfig(**{name: getattr(tower.config, name) for name in names})).eval()
    plain.load_state_dict(tower.state_dict())
    expected, output = plain(PIXELS), tower(PIXELS)
    assert output.pooler_output.shape == (3, tower.config.hidden_size) and expected.pooler_output.ndim == 4
    torch.testing.assert_close(output.pooler_output, expected.pooler_output.flatten(1))
    torch.testing.assert_close(output.last_hidden_state, expected.last_hidden_state)
    hidden, pooled = tower(PIXELS, return_dict=False)
    assert torch.equal(pooled, output.pooler_output) and torch.equal(hidden, output.last_hidden_state)


def test_the_auto_classes_load_what_it_saves(tower, tmp_path):
    tower.save_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    assert type(config) is DalleImageTowerConfig and (config.image_size, config.hidden_size) == (16, 8)
    again = AutoModel.from_pretrained(tmp_path)
    assert type(again) is DalleImageTower
    assert torch.equal(again(PIXELS).pooler_output, tower(PIXELS).pooler_output)
