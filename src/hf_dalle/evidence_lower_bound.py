"""The evidence lower bound on ln p(x, y) of a picture x and its caption y under dVAE and prior (paper, section 2).

ln p(x, y) >= E_q[ln p(x | z)] + H(q) + ln p(y) + E_q[ln p(z | y)] with z drawn from the encoder's q(z | x); each part
is a function here. The training losses of the two stages are `losses.py`'s, the report `training/evaluation/elb.py`'s.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from diffusers.utils import BaseOutput

from .autoencoder_dalle_dvae import DalleDVAE, DalleDVAEDecoderOutput
from .logit_laplace import logit_laplace_log_prob, map_pixels
from .modeling_dalle_prior import DallePriorForCausalLM
from .modeling_family_prior import DalleFamilyPriorForCausalLM
from .sampling import choose_tokens, spawn_generators, to_float64


@dataclass
class EvidenceLowerBound(BaseOutput):
    """
    The parts of the bound for B pictures with S samples of their tokens each, float64 on the CPU, in nats.

    Pixels count as continuous numbers in [0, 255], see [`picture_log_prob`]: the bound is on a density, and is no
    length of a code.

    Args:
        picture (`torch.Tensor`): B x S, ln p(x | z) of each sample.
        tokens (`torch.Tensor`): B x S, ln p(z | y) of each sample.
        entropy (`torch.Tensor`): B, H(q) in closed form, summed over cells; 0 where the nearest code is taken.
        text (`torch.Tensor`): B, ln p(y); 0 without a caption.
        argmax_picture (`torch.Tensor`): B, ln p(x | z) of the likeliest code of each cell.
        argmax_tokens (`torch.Tensor`): B, their ln p(z | y).
        num_dims (`int`): 3 H W.
    """

    picture: torch.Tensor
    tokens: torch.Tensor
    entropy: torch.Tensor
    text: torch.Tensor
    argmax_picture: torch.Tensor
    argmax_tokens: torch.Tensor
    num_dims: int

    @property
    def bound(self) -> torch.Tensor:
        """B, an unbiased estimate of the bound on ln p(x, y); without `text` it is one on ln p(x | y)."""
        return self.objective(1.0)

    def objective(self, beta: float) -> torch.Tensor:
        """B, what training with this weight of the KL divergence maximises; a bound at `beta` = 1 only."""
        return self.picture.mean(1) + beta * (self.tokens.mean(1) + self.entropy + self.text)

    @property
    def argmax_bound(self) -> torch.Tensor:
        """B, the bound of the one-hot posterior at the likeliest codes, whose entropy is 0; there are no samples."""
        return self.argmax_picture + self.argmax_tokens + self.text

    @property
    def sample_error(self) -> torch.Tensor:
        """B, the standard error of `bound` that comes from having S samples only; NaN where there is one."""
        return standard_error(self.picture + self.tokens)


def standard_error(values: torch.Tensor) -> torch.Tensor:
    """Of the mean over the last dimension of ... x S values: their deviation (by S - 1) / sqrt(S); NaN for one."""
    if values.shape[-1] < 2:
        return torch.full_like(values[..., 0], torch.nan)
    return values.std(-1, correction=1) / math.sqrt(values.shape[-1])


@torch.no_grad()
def evidence_lower_bound(
    dvae: DalleDVAE,
    prior: DallePriorForCausalLM | DalleFamilyPriorForCausalLM | None,
    pixel_values: torch.Tensor,
    text_ids: torch.Tensor | None = None,
    attention_mask: torch.Tensor | None = None,
    generator: torch.Generator | Sequence[torch.Generator] | None = None,
    num_samples: int = 8,
    log_b: float | None = None,
    min_log_b: float | None = None,
    max_batch_size: int | None = None,
) -> EvidenceLowerBound:
    """
    The joint bound of the paper's section 2 at beta = 1, its expectations over q estimated by samples.

    Each picture is computed by itself, its samples side by side: on one machine its figures are the same, bit for bit,
    whatever batch it comes in.

    Args:
        dvae ([`DalleDVAE`]): with the logit-Laplace likelihood, and either quantizer.
        prior ([`DallePriorForCausalLM`] or [`DalleFamilyPriorForCausalLM`], *optional*):
            Over the dVAE's tokens. `None` is that of stage 1, uniform over the codes, and the bound one on ln p(x).
        pixel_values (`torch.Tensor`): B x 3 x H x W in [0, 1], as [`DalleImageProcessor`] gives them.
        text_ids, attention_mask (`torch.LongTensor`, *optional*):
            B x T, as the tokenizer gives them, without BPE dropout; none without a prior. The text's part is the
            likelihood of this one segmentation, pads counted: a lower bound on that of the caption, which has others.
        generator (`torch.Generator` or list of them, *optional*): one for all pictures, or one a picture.
        num_samples (`int`): S. Where q is one-hot all samples are the same one, and it is computed once.
        log_b, min_log_b (`float`, *optional*): see [`picture_log_prob`].
        max_batch_size (`int`, *optional*): how many samples of a picture are computed at once; by default all.

    Raises:
        ValueError: for models that do not fit each other or have no likelihood, or are in training mode.
    """
    check_models(dvae, prior)
    num_needed = 0 if prior is None else len(pixel_values)
    counts = [len(pixel_values), *(0 if part is None else len(part) for part in (text_ids, attention_mask))]
    if not counts[0] or counts[1:] != [num_needed, num_needed]:
        raise ValueError(
            f"There are {counts[0]} pictures, {counts[1]} captions and {counts[2]} masks: with a prior a picture has"
            " one each, without a prior none."
        )
    if num_samples < 1:
        raise ValueError(f"`num_samples` is {num_samples}; expected a number from 1.")
    if max_batch_size is not None and max_batch_size < 1:
        raise ValueError(f"`max_batch_size` is {max_batch_size}; expected a number from 1.")
    parts, is_one_hot = [], dvae.config.quantizer == "nearest"
    for row, child in enumerate(spawn_generators(generator, len(pixel_values))):
        picture = pixel_values[row : row + 1].to(dvae.device)
        log_probs = posterior_log_probs(dvae, picture)
        # 1 + S streams of one caption, the likeliest codes first; 1 where each sample is these
        codes = sample_posterior(log_probs, 0 if is_one_hot else num_samples, child)
        codes = torch.cat([log_probs.argmax(1), codes])
        likelihoods = []
        for some in codes.split(max_batch_size or len(codes)):
            if prior is None:
                uniform = -math.log(dvae.config.vocab_size) * some[0].numel()
                text, tokens = (torch.full((len(some),), value, dtype=torch.float64) for value in (0.0, uniform))
            else:
                caption = (text_ids[row : row + 1], attention_mask[row : row + 1])
                text, tokens = stream_log_prob(prior, join_streams(prior, *caption, some))
            likelihoods.append(torch.stack([picture_log_prob(dvae, picture, some, log_b, min_log_b), tokens, text]))
        pixels, tokens, text = torch.cat(likelihoods, dim=1)
        samples = slice(0, 1) if is_one_hot else slice(1, None)
        expected = [part[samples].expand(num_samples) for part in (pixels, tokens)]
        parts.append([*expected, posterior_entropy(log_probs)[0].cpu(), text[0], pixels[0], tokens[0]])
    columns = [torch.stack(column) for column in zip(*parts, strict=True)]
    return EvidenceLowerBound(*columns, num_dims=pixel_values[0].numel())


def check_models(dvae: DalleDVAE, prior: torch.nn.Module | None) -> None:
    """Raises `ValueError` where a dVAE and a prior have no bound together."""
    if not isinstance(dvae, DalleDVAE):
        raise ValueError(
            f"A {type(dvae).__name__} has no likelihood of pixels, and so no bound: it takes a `DalleDVAE`."
        )
    if dvae.training or (prior is not None and prior.training):
        raise ValueError("The bound is that of fixed models: call `.eval()` on the dVAE and the prior first.")
    if prior is None:
        return
    sizes = (dvae.config.vocab_size, dvae.image_grid_size)
    wanted = (prior.config.image_vocab_size, prior.config.image_grid_size)
    if sizes != wanted:
        raise ValueError(
            f"The dVAE has {sizes[0]} codes on a grid of {sizes[1]}, but the prior is over {wanted[0]} on {wanted[1]}."
        )


def posterior_log_probs(dvae: DalleDVAE, pixel_values: torch.Tensor) -> torch.Tensor:
    """B x K x h x w, ln q(z | x) of each cell's codes in float64: with "nearest" 0 at the nearest code, else -inf."""
    encoded = dvae.encode(pixel_values.to(dvae.dtype))
    logits = to_float64(encoded.logits)
    if dvae.config.quantizer == "nearest":
        one_hot = torch.full_like(logits, -torch.inf)
        return one_hot.scatter_(1, encoded.tokens[:, None].to(logits.device), 0.0)
    return logits.log_softmax(1)


def posterior_entropy(log_probs: torch.Tensor) -> torch.Tensor:
    """B, the entropy of independent categoricals, ln q as B x K x h x w, summed over cells, in nats."""
    return torch.special.entr(log_probs.exp()).flatten(1).sum(1)


def sample_posterior(log_probs: torch.Tensor, num_samples: int, generator: torch.Generator) -> torch.Tensor:
    """S x h x w codes of one picture, whose ln q is 1 x K x h x w in float64."""
    grid = log_probs.shape[2:]
    cells = log_probs[0].flatten(1).T  # 1 x K x h x w -> h w x K
    # All of a picture's numbers at once, on the CPU: they are the same on any device.
    uniforms = torch.rand(num_samples, len(cells), dtype=torch.float64, generator=generator).to(cells.device)
    chosen = [choose_tokens(cells, numbers) for numbers in uniforms]
    return torch.stack(chosen).unflatten(1, grid) if chosen else cells.new_empty(0, *grid, dtype=torch.int64)


def picture_log_prob(
    dvae: DalleDVAE,
    pixel_values: torch.Tensor,
    codes: torch.Tensor,
    log_b: float | None = None,
    min_log_b: float | None = None,
) -> torch.Tensor:
    """
    ln p(x | z) of each row of codes, as a density of pixels in [0, 255]: the logit-Laplace f of mapped pixels gives
    `ln f(phi(x)) + ln((1 - 2 eps) / 255)` a channel, summed. What f gives to colours outside [0, 255] is lost, so that
    its mass inside is below 1.

    Args:
        dvae ([`DalleDVAE`]): the decoder.
        pixel_values (`torch.Tensor`): 1 or B x 3 x H x W in [0, 1].
        codes (`torch.LongTensor`): B x h x w.
        log_b (`float`, *optional*):
            A density of one constant scale around the picture that is shown, for a decoder that pixel errors trained,
            whose likelihood nothing did; [`logit_errors`] has the likeliest.
        min_log_b (`float`, *optional*):
            A floor under the decoder's ln b. `None` is the decoder as it stands. A run with `min_log_b` trained the
            density with this floor: below it nothing trained ln b.

    Returns:
        `torch.Tensor`: B, float64, in nats.
    """
    if log_b is not None and min_log_b is not None:
        raise ValueError("`log_b` and `min_log_b` exclude each other: a constant needs no floor.")
    eps = dvae.config.logit_laplace_eps
    decoded = dvae.decode(codes.to(dvae.device))
    mu, scale = to_float64(decoded.mu), to_float64(decoded.log_b)
    if log_b is not None:
        mu, scale = _shown_logits(dvae, decoded), torch.full_like(scale, log_b)
    elif min_log_b is not None:
        scale = scale.clamp(min=min_log_b)
    log_prob = logit_laplace_log_prob(map_pixels(pixel_values.to(mu), eps), mu, scale)
    return (log_prob + math.log((1 - 2 * eps) / 255)).flatten(1).sum(1).cpu()


@torch.no_grad()
def logit_errors(dvae: DalleDVAE, pixel_values: torch.Tensor) -> torch.Tensor:
    """
    B, of pictures B x 3 x H x W in [0, 1] the mean |logit(phi(x)) - logit(phi(shown))|, in float64, where `shown` is
    what the decoder makes of their argmax codes.

    The ln of its mean over pictures, other ones than are measured, is the likeliest `log_b` of [`picture_log_prob`] at
    these codes.
    """
    pixel_values = pixel_values.to(dvae.device, dvae.dtype)
    shown = _shown_logits(dvae, dvae.decode(dvae.encode(pixel_values).tokens))
    mapped = map_pixels(pixel_values.to(shown), dvae.config.logit_laplace_eps)
    return (mapped.logit() - shown).abs().flatten(1).mean(1).cpu()


def _shown_logits(dvae: DalleDVAE, decoded: DalleDVAEDecoderOutput) -> torch.Tensor:
    """mu where the decoder's colours lie in [0, 1], else that of the nearest colour there: all that is ever seen."""
    return map_pixels(to_float64(decoded.sample), dvae.config.logit_laplace_eps).logit()


def join_streams(
    prior: torch.nn.Module, text_ids: torch.Tensor, attention_mask: torch.Tensor, codes: torch.Tensor
) -> torch.Tensor:
    """B whole streams, as ids of the joint vocabulary, of codes B x h x w and one caption (1 x T) or B."""
    text = (part.to(prior.device).expand(len(codes), -1) for part in (text_ids, attention_mask))
    return prior.join_stream(*text, codes.flatten(1).to(prior.device))["input_ids"]


def stream_log_prob(prior: torch.nn.Module, input_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """
    ln p(y) and ln p(z | y) of whole streams.

    A text state's distribution is over text ids and the pads of all positions, as in training, an image state's over
    image tokens. Pads are predicted, and count; start-of-image is certain; the first id is given. That is
    start-of-text, but for family priors that have none: there y is what follows the caption's first id.

    Args:
        prior ([`DallePriorForCausalLM`] or [`DalleFamilyPriorForCausalLM`]): the model.
        input_ids (`torch.LongTensor`): B x ids, whole streams as `join_stream` gives them.

    Returns:
        `tuple`: two tensors of B, float64, in nats.
    """
    config = prior.config
    output = prior(input_ids=input_ids, labels=input_ids, use_cache=False)
    num_text = config.num_text_states - 1  # the first id is given
    text = _label_log_probs(output.text_logits[:, :num_text], input_ids[:, 1 : num_text + 1])
    labels = input_ids[:, -config.num_image_tokens :] - config.image_token_offset
    return text, _label_log_probs(output.image_logits, labels)


def _label_log_probs(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Sums of B x t x classes logits' ln p of B x t labels; a row at a time, for the memory that float64 takes."""
    sums = []
    for row, row_labels in zip(logits, labels, strict=True):
        row = to_float64(row)
        chosen = row.gather(1, row_labels[:, None].to(row.device))[:, 0] - row.logsumexp(1)
        sums.append(chosen.sum())
    return torch.stack(sums).cpu()
