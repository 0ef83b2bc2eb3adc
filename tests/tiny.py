"""Tiny real parts with random weights, for every test: tokenizer, dVAE, prior, pipeline, reranker.

Each builder seeds its weights, so that the same call gives the same part.
"""

import torch
from transformers import CLIPConfig, CLIPModel, CLIPProcessor, PreTrainedTokenizerFast
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from hf_dalle import (
    DalleDVAE,
    DalleImageProcessor,
    DalleImageTowerConfig,
    DALLEPipeline,
    DallePriorConfig,
    DallePriorForCausalLM,
)
from hf_dalle.image_attention import ATTENTION_TYPES
from hf_dalle.tokenization_dalle import train_tokenizer


CAPTIONS = ["a red fox", "a blue bird", "a glossy 3d style emoji of hedgehog", "two green apples on a table"]


def build_tokenizer(vocab_size: int = 300, text_length: int = 12) -> PreTrainedTokenizerFast:
    """A tokenizer trained on [`CAPTIONS`]."""
    return train_tokenizer(CAPTIONS * 2, vocab_size=vocab_size, text_length=text_length)


def build_dvae(seed: int = 0, **kwargs) -> DalleDVAE:
    """A gumbel dVAE of 16 x 16 pictures, 4 x 4 tokens out of 16; its biases are not 0: one that is lost is seen."""
    config = {
        "sample_size": 16,
        "vocab_size": 16,
        "encoder_block_out_channels": (8, 8, 8),
        "decoder_block_out_channels": (8, 8, 8),
        "decoder_in_channels": 8,
        "layers_per_block": 1,
        **kwargs,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        dvae = DalleDVAE(**config).eval()
        for name, parameter in dvae.named_parameters():
            if name.endswith("bias"):
                torch.nn.init.normal_(parameter, std=0.1)
        return dvae


def build_prior(seed: int = 0, initializer_range: float = 0.3, **kwargs) -> DallePriorForCausalLM:
    """A prior of four layers, one of each attention type, on 12 text positions and 4 x 4 image tokens out of 16."""
    config = {
        "hidden_size": 32,
        "num_hidden_layers": len(kwargs.get("attention_types", ATTENTION_TYPES)),
        "num_attention_heads": 2,
        "text_vocab_size": 300,
        "text_length": 12,
        "image_vocab_size": 16,
        "image_grid_size": 4,
        "attention_types": list(ATTENTION_TYPES),
        "conv_kernel_size": 3,
        "initializer_range": initializer_range,  # large enough for the prior to prefer some tokens
        **kwargs,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return DallePriorForCausalLM(DallePriorConfig(**config)).eval()


def build_pipeline(seed: int = 0, caption_dropout: float = 0.1, **components) -> DALLEPipeline:
    """A pipeline of the parts above; a component given by name takes the place of the built one."""
    parts = {
        "prior": build_prior(seed, caption_dropout=caption_dropout),
        "dvae": build_dvae(seed),
        "tokenizer": build_tokenizer(),
        "image_processor": DalleImageProcessor(size=16),
        **components,
    }
    pipeline = DALLEPipeline(**parts)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def build_tower_config() -> DalleImageTowerConfig:
    """A ResNet of two stages for pictures of 16 x 16."""
    return DalleImageTowerConfig(
        embedding_size=4, hidden_sizes=[4, 8], depths=[1, 2], layer_type="basic", image_size=16
    )


def build_reranker(seed: int = 0) -> dict[str, CLIPModel | CLIPProcessor]:
    """A CLIP and its processor, as the pipeline's `reranker` and `reranker_processor`."""
    layers = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {"vocab_size": 300, "max_position_embeddings": 12, "bos_token_id": 0, "pad_token_id": 1, "eos_token_id": 2}
    vision = {"image_size": 16, "patch_size": 8}
    config = CLIPConfig(text_config={**layers, **text}, vision_config={**layers, **vision}, projection_dim=8)
    image_processor = CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        reranker = CLIPModel(config).eval()
    return {"reranker": reranker, "reranker_processor": CLIPProcessor(image_processor, build_tokenizer())}
