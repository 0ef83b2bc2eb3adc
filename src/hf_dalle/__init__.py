"""DALL-E for Hugging Face users: its discrete VAE, its prior, and a pipeline that draws pictures from captions.

Here are the exports, and the one call that makes Hugging Face's loaders know the classes.
"""

from .autoencoder_dalle_dvae import DalleDVAE
from .configuration_dalle_prior import DallePriorConfig
from .hub import register_classes
from .image_processing_dalle import DalleImageProcessor
from .modeling_dalle_prior import DallePriorForCausalLM, DallePriorModel
from .pipeline_dalle import DALLEPipeline, DALLEPipelineOutput
from .processing_dalle import DalleProcessor
from .tokenization_dalle import encode_captions, train_tokenizer


__version__ = "0.1.0"

__all__ = [
    "DALLEPipeline",
    "DALLEPipelineOutput",
    "DalleDVAE",
    "DalleImageProcessor",
    "DallePriorConfig",
    "DallePriorForCausalLM",
    "DallePriorModel",
    "DalleProcessor",
    "encode_captions",
    "train_tokenizer",
]

register_classes()
