"""What lets Hugging Face's loaders find this package's classes by name.

`register_classes()` is called once, at import of `hf_dalle`; calling it again changes nothing. How a pipeline gets to
the Hub is `publishing.py`'s, its card `model_card.py`'s.
"""

import diffusers
from diffusers.pipelines import pipeline_loading_utils, pipeline_utils
from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoModelForCausalLM, AutoProcessor
from transformers.utils import logging

from .configuration_dalle_prior import DallePriorConfig
from .configuration_family_prior import DalleFamilyPriorConfig
from .image_processing_dalle import DalleImageProcessor
from .image_tower import DalleImageTower, DalleImageTowerConfig
from .modeling_dalle_prior import DallePriorForCausalLM, DallePriorModel
from .modeling_family_prior import DalleFamilyPriorForCausalLM, DalleFamilyPriorModel
from .pipeline_dalle import DALLEPipeline
from .processing_dalle import DalleProcessor


logger = logging.get_logger(__name__)

SUPPORTED_DIFFUSERS = "0.42"  # the release whose private tables are known; setup.py pins the same one
GENERATION_FILE = "prior/generation_config.json"


def register_classes() -> None:
    """Registers the classes with transformers' Auto classes, and with diffusers' pipeline loading."""
    AutoConfig.register(DallePriorConfig.model_type, DallePriorConfig, exist_ok=True)
    AutoModel.register(DallePriorConfig, DallePriorModel, exist_ok=True)
    AutoModelForCausalLM.register(DallePriorConfig, DallePriorForCausalLM, exist_ok=True)
    AutoConfig.register(DalleFamilyPriorConfig.model_type, DalleFamilyPriorConfig, exist_ok=True)
    AutoModel.register(DalleFamilyPriorConfig, DalleFamilyPriorModel, exist_ok=True)
    AutoModelForCausalLM.register(DalleFamilyPriorConfig, DalleFamilyPriorForCausalLM, exist_ok=True)
    AutoConfig.register(DalleImageTowerConfig.model_type, DalleImageTowerConfig, exist_ok=True)
    AutoModel.register(DalleImageTowerConfig, DalleImageTower, exist_ok=True)
    AutoImageProcessor.register(DallePriorConfig, image_processor_classes={"pil": DalleImageProcessor}, exist_ok=True)
    AutoProcessor.register(DallePriorConfig, DalleProcessor, exist_ok=True)
    _register_with_diffusers()


def _register_with_diffusers() -> None:
    # Diffusers has no public registry for other packages. With its tables filled, model_index.json names components
    # ["hf_dalle", "Class"], which load by repo id and through `DiffusionPipeline`. Without, it would name the file
    # that a class lives in, which then could never move, and a repo id would not load.
    loadable = getattr(pipeline_loading_utils, "LOADABLE_CLASSES", None)
    importable = getattr(pipeline_loading_utils, "ALL_IMPORTABLE_CLASSES", None)
    downloaded = getattr(pipeline_utils, "TRANSFORMERS_COMPONENT_AUX_FILES", None)
    is_known = diffusers.__version__.split(".")[:2] == SUPPORTED_DIFFUSERS.split(".")
    has_tables = isinstance(loadable, dict) and isinstance(importable, dict) and isinstance(downloaded, list)
    if not (is_known and has_tables):
        logger.warning_once(
            f"diffusers {diffusers.__version__} is installed, but hf_dalle knows {SUPPORTED_DIFFUSERS} only: saving"
            " and loading a `DALLEPipeline` will not work, but building one from its parts will. To repair it:"
            f" pip install 'diffusers=={SUPPORTED_DIFFUSERS}.*'"
        )
        return
    classes = [
        *("DallePriorForCausalLM", "DalleFamilyPriorForCausalLM", "DalleImageProcessor"),
        *("DalleDVAE", "DalleDiscreteVAE", "DalleVQGAN"),
    ]
    methods = {name: ["save_pretrained", "from_pretrained"] for name in classes}
    loadable["hf_dalle"] = methods
    importable.update(methods)
    diffusers.DALLEPipeline = DALLEPipeline
    # Of a model's folder diffusers downloads the weights and config.json alone: by repo id, the checkpoint's own
    # guidance and temperature would be lost, and nothing would say so.
    if GENERATION_FILE not in downloaded:
        pipeline_utils.TRANSFORMERS_COMPONENT_AUX_FILES = [*downloaded, GENERATION_FILE]
