"""What the originals import and today's libraries lack: `import originals_setup` before any of them.

Stand-ins for what building a model with random weights and calling it never uses. Nothing of an original is changed.
"""

import sys
import types
from importlib.machinery import ModuleSpec

import huggingface_hub
import torch
import transformers  # before torchvision is stubbed, which it would take for the real one
from torch import nn


class Stub(types.ModuleType):
    """A module in which every public name is an empty class."""

    __path__ = []

    def __init__(self, name):
        super().__init__(name)
        self.__spec__ = ModuleSpec(name, None)

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {})


class LightningModule(nn.Module):
    """As much of PyTorch Lightning's as a model that is not trained needs."""

    @property
    def device(self):
        return next(self.parameters()).device

    def log(self, *_, **__):
        """Nothing is logged."""


def instantiate_from_config(config):
    """Taming's own, for the losses and schedules that a configuration names: none is used."""
    return nn.Module()


def add_mindalle(clone):
    """Makes `dalle.models` of a clone of minDALL-E importable."""
    sys.path.insert(0, clone)
    # Dataclasses with defaults that Python 3.11 refuses; config.yaml says everything in the tests.
    config = types.ModuleType("dalle.utils.config")
    config.get_base_config = None
    # What it imports for reranking and for training.
    sys.modules.update({"dalle.utils.config": config, "clip": Stub("clip")})


def install():
    huggingface_hub.cached_download = None
    transformers.top_k_top_p_filtering = None
    lightning = Stub("pytorch_lightning")
    lightning.LightningModule = LightningModule
    taming_main = types.ModuleType("taming.main")
    taming_main.instantiate_from_config = instantiate_from_config
    packages = types.ModuleType("pkg_resources")
    packages.get_distribution = lambda name: types.SimpleNamespace(version="1.10.0")
    sys.modules.update({"pytorch_lightning": lightning, "taming.main": taming_main, "pkg_resources": packages})
    for name in ("cv2", "matplotlib", "matplotlib.pyplot", "torchvision", "torchvision.transforms", "webdataset"):
        sys.modules[name] = Stub(name)
    for name in ("segmentation_models_pytorch", "pywt", "realesrgan", "pandas"):
        sys.modules[name] = Stub(name)
    sys.modules["torchvision"].__version__ = "0"
    torch.set_num_threads(1)


install()
