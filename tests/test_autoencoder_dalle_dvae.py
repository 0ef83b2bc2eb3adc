"""The dVAE: quantizers against brute force, shortcuts against the long way, the released shape against FLAVA."""

import json

import pytest
import torch
import torch.nn.functional as F
from accelerate import cpu_offload
from accelerate.utils import convert_outputs_to_fp32
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tiny import build_dvae
from transformers import FlavaImageCodebook, FlavaImageCodebookConfig

from hf_dalle import DalleDVAE
from hf_dalle.autoencoder_dalle_dvae import gumbel_softmax
from hf_dalle.logit_laplace import map_pixels


@pytest.fixture
def pixels():
    return torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("quantizer", ["gumbel", "nearest"])
@pytest.mark.parametrize("patch_size", [1, 2])
def test_shapes(pixels, quantizer, patch_size):
    dvae = build_dvae(quantizer=quantizer, codebook_dim=6, patch_size=patch_size)
    side = 4 // patch_size
    encoded = dvae.encode(pixels)
    assert encoded.logits.shape == (2, 16, side, side) and encoded.tokens.shape == (2, side, side)
    decoded = dvae.decode(encoded.tokens)
    for maps in (decoded.sample, decoded.mu, decoded.log_b):
        assert maps.shape == pixels.shape
    assert decoded.sample.min() >= 0 and decoded.sample.max() <= 1
    assert dvae(pixels, temperature=0.5).sample.shape == pixels.shape
    assert dvae.downsampling_factor == 4 * patch_size and dvae.image_grid_size == 16 // dvae.downsampling_factor
    assert dvae.encode(pixels, return_dict=False)[1].equal(encoded.tokens)


@pytest.mark.parametrize("eps", [0.1, 0.2])
def test_the_picture_is_the_inverse_map_of_the_location(pixels, eps):
    dvae = build_dvae(logit_laplace_eps=eps)
    decoded = dvae.decode(dvae.encode(pixels).tokens)
    torch.testing.assert_close(decoded.sample, ((decoded.mu.sigmoid() - eps) / (1 - 2 * eps)).clamp(0, 1))
    torch.testing.assert_close(dvae.encode(pixels).logits, dvae.encoder((1 - 2 * eps) * pixels + eps))


def test_initial_weights_keep_the_variance():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        dvae = DalleDVAE(64, 16, (64, 64, 64), (64, 64, 64))
    for name, parameter in dvae.named_parameters():
        if name.endswith("bias"):
            assert (parameter == 0).all(), name
        else:
            assert abs(parameter.std() * parameter[0].numel() ** 0.5 - 1) < 0.2, name


@pytest.mark.parametrize("quantizer", ["gumbel", "nearest"])
def test_tokens_decode_as_their_one_hot_vectors(pixels, quantizer):
    dvae = build_dvae(quantizer=quantizer, codebook_dim=6)
    tokens = dvae.encode(pixels).tokens
    one_hot = F.one_hot(tokens, 16).movedim(-1, 1).float()
    torch.testing.assert_close(dvae.decode(tokens).mu, dvae.decode(one_hot).mu)


def test_decoder_equals_the_paper_order_of_upsampling(pixels):
    """Upsample, then the whole block, as the paper writes it."""
    dvae = build_dvae(decoder_block_out_channels=(16, 12, 8), layers_per_block=2)
    tokens = dvae.encode(pixels).tokens
    hidden_states = dvae.decoder.conv_in(F.one_hot(tokens, 16).movedim(-1, 1).float())
    for index, group in enumerate(dvae.decoder.groups):
        if index > 0:
            hidden_states = F.interpolate(hidden_states, scale_factor=2, mode="nearest")
        for block in group:
            residual = hidden_states
            for convolution in (block.conv_1, block.conv_2, block.conv_3, block.conv_4):
                residual = convolution(F.relu(residual))
            hidden_states = block.shortcut(hidden_states) + block.residual_scale * residual
    maps = dvae.decoder.conv_out(F.relu(hidden_states))
    decoded = dvae.decode(tokens)
    torch.testing.assert_close(torch.cat([decoded.mu, decoded.log_b], dim=1), maps)


def test_residual_scale_is_one_over_the_square_of_the_number_of_blocks():
    dvae = build_dvae(layers_per_block=2)
    scales = {
        block.residual_scale for part in (dvae.encoder, dvae.decoder) for group in part.groups for block in group
    }
    assert scales == {1 / 36}


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**31))
def test_gumbel_softmax_at_zero_temperature_is_the_argmax_of_the_noisy_logits(seed):
    logits = torch.randn(2, 7, 3, 3, generator=torch.Generator().manual_seed(seed))
    hard = gumbel_softmax(logits, 1e-6, torch.Generator().manual_seed(seed + 1))
    noise = -torch.empty_like(logits).exponential_(generator=torch.Generator().manual_seed(seed + 1)).log()
    noisy, order = (logits + noise).sort(dim=1, descending=True)
    is_clear = noisy[:, :1] - noisy[:, 1:2] > 1e-4  # at a tie two codes share the weight
    assert is_clear.float().mean() > 0.5
    expected = F.one_hot(order[:, 0], 7).movedim(-1, 1).float()
    torch.testing.assert_close(hard * is_clear, expected * is_clear)


def test_gumbel_noise_samples_the_categorical():
    logits = torch.tensor([0.0, 1.0, -1.0, 2.0])[None, :, None, None].expand(1, 4, 200, 200)
    drawn = gumbel_softmax(logits, 1e-4, torch.Generator().manual_seed(0)).mean(dim=(0, 2, 3))
    torch.testing.assert_close(drawn, logits[0, :, 0, 0].softmax(0), atol=0.01, rtol=0)


def test_forward_follows_confident_logits(pixels):
    """With logits far apart the relaxed pass at a small temperature is the pass through the tokens."""
    dvae = build_dvae()
    with torch.no_grad():
        dvae.encoder.conv_out.weight.mul_(1e4)
    output = dvae(pixels, temperature=1e-3, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(output.mu, dvae.decode(output.tokens).mu, atol=1e-4, rtol=1e-4)
    again = dvae(pixels, temperature=1e-3, generator=torch.Generator().manual_seed(0))
    assert again.mu.equal(output.mu)


def test_nearest_is_brute_force(pixels):
    dvae = build_dvae(quantizer="nearest", codebook_dim=6)
    encoded = dvae.encoder(map_pixels(pixels))
    output = dvae.encode(pixels)
    for b in range(2):
        for row in range(4):
            for column in range(4):
                distances = (dvae.codebook.codes - encoded[b, :, row, column]).square().sum(1)
                torch.testing.assert_close(output.logits[b, :, row, column], -distances, atol=1e-4, rtol=1e-4)
                assert output.tokens[b, row, column] == distances.argmin()


@pytest.mark.parametrize("commitment_cost", [0.25, 0.5])
def test_nearest_straight_through_gradient_and_commitment(pixels, commitment_cost):
    dvae = build_dvae(quantizer="nearest", codebook_dim=6, commitment_cost=commitment_cost)
    encoded = []  # what the encoder gives, in the graph
    dvae.encoder.register_forward_hook(lambda module, inputs, output: encoded.append(output))
    output = dvae(pixels)
    torch.testing.assert_close(output.mu, dvae.decode(output.tokens).mu, atol=1e-5, rtol=1e-5)
    difference = encoded[0] - dvae.codebook.embed(output.tokens)
    assert output.commitment_loss.item() == pytest.approx(
        commitment_cost * difference.square().mean().item(), rel=1e-5
    )
    (gradient,) = torch.autograd.grad(output.commitment_loss, encoded[0], retain_graph=True)
    torch.testing.assert_close(gradient, commitment_cost * 2 * difference.detach() / difference.numel())
    # straight-through: the gradient of the decoder's input is the encoder's, as if nothing were between them
    codes = dvae.codebook.embed(output.tokens).requires_grad_()
    decoder_gradient = torch.autograd.grad(dvae.decoder(codes)[0].square().sum(), codes)[0]
    (encoder_gradient,) = torch.autograd.grad(output.mu.square().sum(), encoded[0])
    torch.testing.assert_close(encoder_gradient, decoder_gradient, atol=1e-4, rtol=1e-4)


def test_codebook_update_is_the_moving_average():
    dvae = build_dvae(quantizer="nearest", codebook_dim=2, codebook_decay=0.9)
    codebook = dvae.codebook
    codebook.codes.copy_(torch.arange(32.0).view(16, 2))
    codebook.ema_sum.copy_(codebook.codes)
    codebook.ema_count[5], codebook.ema_sum[5] = 0, 0  # a code that nothing has used for long
    vectors = torch.tensor([[0.0, 1.0], [0.5, 1.5], [4.0, 5.0]])  # the first two nearest to code 0, the last to code 2
    codebook.update(vectors.T[None, :, None, :], torch.tensor([[[0, 0, 2]]]))
    counts = torch.tensor([0.9 + 0.1 * 2, 0.9, 0.9 + 0.1])
    sums = 0.9 * torch.arange(6.0).view(3, 2) + 0.1 * torch.tensor([[0.5, 2.5], [0.0, 0.0], [4.0, 5.0]])
    torch.testing.assert_close(codebook.codes[:3], sums / counts[:, None], rtol=1e-3, atol=1e-4)
    assert codebook.codes.isfinite().all()
    before = codebook.codes.clone()
    dvae.eval()(torch.rand(1, 3, 16, 16))
    assert codebook.codes.equal(before)
    dvae.train()(torch.rand(1, 3, 16, 16))
    assert not codebook.codes.equal(before)


@pytest.mark.parametrize("quantizer", ["gumbel", "nearest"])
def test_save_and_load(pixels, quantizer, tmp_path):
    dvae = build_dvae(quantizer=quantizer, codebook_dim=6, patch_size=2)
    dvae.save_pretrained(tmp_path)
    loaded = DalleDVAE.from_pretrained(tmp_path)
    assert not loaded.training
    assert loaded.encode(pixels).logits.equal(dvae.encode(pixels).logits)
    tokens = dvae.encode(pixels).tokens
    assert loaded.decode(tokens).sample.equal(dvae.decode(tokens).sample)
    loaded.save_pretrained(tmp_path / "again")  # the same config: no place that it was loaded from
    assert (tmp_path / "again" / "config.json").read_text() == (tmp_path / "config.json").read_text()
    assert json.loads((tmp_path / "config.json").read_text())["quantizer"] == quantizer


@pytest.mark.parametrize("quantizer", ["gumbel", "nearest"])
def test_weights_that_a_file_lacks_are_refused(quantizer, tmp_path):
    build_dvae(quantizer=quantizer, codebook_dim=6).save_pretrained(tmp_path)
    path = tmp_path / "diffusion_pytorch_model.safetensors"
    weights = load_file(path)
    for name in ("decoder.conv_in.bias", "codebook.codes" if quantizer == "nearest" else "encoder.conv_out.weight"):
        save_file({key: value for key, value in weights.items() if key != name}, path)
        for options in ({}, {"low_cpu_mem_usage": False}):
            with pytest.raises(OSError, match=f"{tmp_path} lacks weights of this model: {name}"):
                DalleDVAE.from_pretrained(tmp_path, **options)
    save_file({**weights, "decoder.conv_in.bias": torch.zeros(9)}, path)
    with pytest.raises(ValueError, match="decoder.conv_in.bias expected shape"):
        DalleDVAE.from_pretrained(tmp_path)
    save_file(weights, path)
    _, info = DalleDVAE.from_pretrained(tmp_path, output_loading_info=True)
    assert info["missing_keys"] == []


@pytest.mark.parametrize("quantizer", ["gumbel", "nearest"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_halves(pixels, quantizer, dtype, tmp_path):
    build_dvae(quantizer=quantizer, codebook_dim=6).save_pretrained(tmp_path)
    whole, half = DalleDVAE.from_pretrained(tmp_path), DalleDVAE.from_pretrained(tmp_path, dtype=dtype)
    assert half.dtype == dtype
    tokens = whole.encode(pixels).tokens
    assert (half.encode(pixels.to(dtype)).tokens == tokens).float().mean() > 0.8
    decoded = half.decode(tokens)
    assert decoded.sample.dtype == dtype
    torch.testing.assert_close(decoded.sample.float(), whole.decode(tokens).sample, atol=0.03, rtol=0)
    output = half(pixels.to(dtype), temperature=1e-5)  # logits / temperature would leave float16
    assert output.mu.dtype == dtype and output.mu.isfinite().all()


@pytest.mark.parametrize("quantizer", ["gumbel", "nearest"])
def test_offloaded_weights_come_when_they_are_called(pixels, quantizer):
    dvae = build_dvae(quantizer=quantizer, codebook_dim=6)
    tokens = dvae.encode(pixels).tokens
    sample = dvae.decode(tokens).sample
    cpu_offload(dvae, execution_device="cpu")
    assert {parameter.device.type for parameter in dvae.parameters()} == {"meta"}
    assert dvae.encode(pixels).tokens.equal(tokens)
    assert dvae.decode(tokens).sample.equal(sample)
    assert dvae(pixels).mu.isfinite().all()


def test_mixed_precision_training(pixels):
    """As `accelerator.prepare` wraps a model: autocast inside, the output made anew in float32."""
    dvae = build_dvae().train()
    with torch.autocast("cpu", torch.bfloat16):
        assert dvae(pixels).mu.dtype == torch.bfloat16
        output = convert_outputs_to_fp32(dvae.forward)(pixels)
    assert output.mu.dtype == output.logits.dtype == torch.float32 and output.tokens.dtype == torch.int64
    assert list(output) == ["sample", "mu", "log_b", "logits", "tokens", "commitment_loss"]
    output.mu.square().mean().backward()


@pytest.mark.parametrize("quantizer", ["gumbel", "nearest"])
def test_gradient_checkpointing_changes_nothing(pixels, quantizer):
    gradients, num_calls = [], []
    for is_checkpointed in (False, True):
        widths = {"encoder_block_out_channels": (64, 64, 64), "decoder_block_out_channels": (64, 64, 64)}
        dvae = build_dvae(quantizer=quantizer, codebook_dim=6, **widths)
        if is_checkpointed:
            dvae.enable_gradient_checkpointing()
        calls = []
        dvae.encoder.groups[1][0].conv_1.register_forward_hook(lambda *args, calls=calls: calls.append(args))
        output = dvae(pixels, generator=torch.Generator().manual_seed(0))
        (output.mu.square().mean() + output.log_b.mean() + output.commitment_loss).backward()
        gradients.append({name: parameter.grad for name, parameter in dvae.named_parameters()})
        num_calls.append(len(calls))
    assert num_calls == [1, 2]  # forward, and again in backward
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, msg=name)
        assert gradient.abs().sum() > 0, name


def test_released_openai_shape_equals_flava():
    """K = 8192, 256 x 256: every token and logit of transformers' codebook with the same weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        flava = FlavaImageCodebook(FlavaImageCodebookConfig()).eval()
        for parameter in flava.parameters():  # random biases too: a bias that is lost must be seen
            torch.nn.init.normal_(parameter, std=0.02 if parameter.ndim == 1 else parameter[0].numel() ** -0.5)
        dvae = DalleDVAE().eval()
    source, target = flava.state_dict(), {}
    for name in dvae.encoder.state_dict():
        key = name.replace("conv_in.", "blocks.input.").replace("conv_out.", "blocks.output.conv.")
        if name.startswith("groups."):
            _, group, block, layer, kind = name.split(".")
            path = "id_path" if layer == "shortcut" else f"res_path.path.{layer}"
            key = f"blocks.group_{int(group) + 1}.group.block_{int(block) + 1}.{path}.{kind}"
        target[name] = source.pop(key)
    assert not source
    dvae.encoder.load_state_dict(target)
    pixels = torch.rand(1, 3, 256, 256, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        output = dvae.encode(pixels)
        logits = flava.blocks(map_pixels(pixels))
        # in our order of memory its convolutions are the same calls as ours
        same_order = map_pixels(pixels).contiguous(memory_format=torch.channels_last)
        tokens = flava.get_codebook_indices(same_order)
        assert output.logits.equal(flava.blocks(same_order)) and output.tokens.equal(tokens)
    assert output.logits.shape == (1, 8192, 32, 32)
    torch.testing.assert_close(output.logits, logits, atol=1e-5, rtol=0)
    assert output.tokens.unique().numel() > 1


def test_default_decoder_has_the_released_shape():
    with torch.device("meta"):
        decoder = DalleDVAE().decoder.state_dict()
    assert decoder["conv_in.weight"].shape == (128, 8192, 1, 1)
    assert decoder["groups.0.0.conv_1.weight"].shape == (512, 128, 1, 1)
    assert decoder["groups.0.0.conv_2.weight"].shape == (512, 512, 3, 3)
    assert decoder["groups.3.1.conv_4.weight"].shape == (256, 64, 3, 3)
    assert decoder["conv_out.weight"].shape == (6, 256, 1, 1)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"quantizer": "soft"}, "'gumbel' or 'nearest'"),
        ({"quantizer": "nearest"}, "codebook_dim"),
        ({"sample_size": 18}, "18.*downsampling of 4"),
        ({"encoder_block_out_channels": (8, 8)}, "one length"),
        ({"decoder_block_out_channels": (8, 8, 6)}, "multiples of 4"),
        ({"patch_size": 0}, "start at 1"),
        ({"layers_per_block": 0}, "start at 1"),
        ({"vocab_size": 0}, "start at 1"),
        ({"decoder_in_channels": 0}, "start at 1"),
        ({"sample_size": 0}, "`sample_size` is 0"),
        ({"encoder_block_out_channels": (), "decoder_block_out_channels": ()}, "one length"),
        ({"logit_laplace_eps": 0.5}, r"\(0, 0.5\)"),
    ],
)
def test_configurations_that_do_not_fit_are_refused(config, message):
    with pytest.raises(ValueError, match=message):
        build_dvae(**config)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda dvae: dvae.encode(torch.rand(1, 3, 18, 16)), r"downsampling of 4; got \(1, 3, 18, 16\)"),
        (lambda dvae: dvae.encode(torch.rand(1, 3, 16, 6)), r"downsampling of 4; got \(1, 3, 16, 6\)"),
        (lambda dvae: dvae.encode(torch.zeros(1, 3, 16, 16, dtype=torch.uint8)), "floats .* torch.uint8"),
        (lambda dvae: dvae.encode(torch.rand(3, 16, 16)), r"B x 3 x H x W.*\(3, 16, 16\)"),
        (lambda dvae: dvae.encode(torch.rand(1, 1, 16, 16)), r"B x 3 x H x W.*\(1, 1, 16, 16\)"),
        (lambda dvae: dvae.encode(torch.full((1, 3, 16, 16), -1.0)), r"in \[0, 1\].*got -1 to -1"),
        (lambda dvae: dvae.encode(torch.full((1, 3, 16, 16), 255.0)), r"in \[0, 1\].*got 255 to 255"),
        (lambda dvae: dvae.encode(torch.full((1, 3, 16, 16), torch.nan)), r"in \[0, 1\].*got nan"),
        (lambda dvae: dvae.decode(torch.full((1, 4, 4), 16)), r"\[0, 16\); got 16 to 16"),
        (lambda dvae: dvae.decode(torch.full((1, 4, 4), -1)), r"\[0, 16\); got -1"),
        (lambda dvae: dvae.decode(torch.zeros(4, 4, dtype=torch.long)), r"tokens .*got \(4, 4\)"),
        (lambda dvae: dvae.decode(torch.zeros(1, 4, 4)), "torch.float32"),
        (lambda dvae: dvae.decode(torch.zeros(1, 4, 4, dtype=torch.uint8)), "torch.uint8"),
        (lambda dvae: dvae.decode(torch.rand(1, 3, 4, 4)), "one-hot"),
        (lambda dvae: dvae(torch.rand(1, 3, 16, 16), temperature=0.0), "above 0"),
    ],
)
def test_input_that_does_not_fit_is_refused(call, words):
    with pytest.raises(ValueError, match=words):
        call(build_dvae())
