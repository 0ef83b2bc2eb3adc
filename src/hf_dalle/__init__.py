"""DALL-E for Hugging Face users: its discrete VAE, its prior, and a pipeline that draws pictures from captions.

Here are the exports, and the one call that makes Hugging Face's loaders know the classes.
"""

from .autoencoder_dalle_discrete_vae import DalleDiscreteVAE
from .autoencoder_dalle_dvae import DalleDVAE
from .autoencoder_dalle_vqgan import DalleVQGAN
from .configuration_dalle_prior import DallePriorConfig
from .configuration_family_prior import DalleFamilyPriorConfig
from .hub import register_classes
from .image_processing_dalle import DalleImageProcessor
from .image_tower import DalleImageTower, DalleImageTowerConfig
from .modeling_dalle_prior import DallePriorForCausalLM, DallePriorModel
from .modeling_family_prior import DalleFamilyPriorForCausalLM, DalleFamilyPriorModel
from .pipeline_dalle import DALLEPipeline, DALLEPipelineOutput
from .processing_dalle import DalleProcessor
from .tokenization_dalle import encode_captions, train_tokenizer


__version__ = "0.1.0"

__all__ = [
    "DALLEPipeline",
    "DALLEPipelineOutput",
    "DalleDVAE",
    "DalleDiscreteVAE",
    "DalleFamilyPriorConfig",
    "DalleFamilyPriorForCausalLM",
    "DalleFamilyPriorModel",
    "DalleImageProcessor",
    "DalleImageTower",
    "DalleImageTowerConfig",
    "DallePriorConfig",
    "DallePriorForCausalLM",
    "DallePriorModel",
    "DalleProcessor",
    "DalleVQGAN",
    "encode_captions",
    "train_tokenizer",
]

register_classes()
