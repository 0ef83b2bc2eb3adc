"""Tiny priors with a caption of five positions, and streams for them: what the tests of the prior's forward share."""

import torch
from tiny import ATTENTION_TYPES, build_prior


SMALL = {"text_length": 5, "text_vocab_size": 20}
TEXT, IMAGE, CLASSES = 5, 16, 16  # text states, image states, image classes of a prior built with SMALL


def build_small_prior(*attention_types, **kwargs):
    return build_prior(attention_types=list(attention_types or ATTENTION_TYPES), **{**SMALL, **kwargs})


def draw_inputs(batch_size=2, seed=0):
    """Captions of 2, 3, ... tokens after start-of-text, the tokenizer's pad behind them, and whole images."""
    generator = torch.Generator().manual_seed(seed)
    text_ids = torch.randint(2, 20, (batch_size, TEXT), generator=generator)
    text_ids[:, 0] = 0
    lengths = torch.arange(batch_size)[:, None] % 3 + 3
    attention_mask = (torch.arange(TEXT) < lengths).long()
    image_tokens = torch.randint(CLASSES, (batch_size, IMAGE), generator=generator)
    return text_ids.where(attention_mask == 1, 1), attention_mask, image_tokens


def draw_stream(prior, **kwargs):
    """The input ids of all states, without the last token that is a target only."""
    return prior.join_stream(*draw_inputs(**kwargs))["input_ids"][:, :-1]
