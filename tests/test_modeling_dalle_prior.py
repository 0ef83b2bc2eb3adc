"""The prior's forward pass, exact: masks, positions, caches, logits, pads, and what Hugging Face users do to a model.

Losses and training are in `test_training_dalle_prior.py`, generation in `test_generation_dalle_prior.py`.
"""

import pytest
import torch
import torch.nn.functional as F
from accelerate import cpu_offload
from safetensors.torch import load_file, save_file
from tiny import ATTENTION_TYPES
from tiny_streams import CLASSES, IMAGE, TEXT, build_small_prior, draw_inputs, draw_stream
from transformers import AutoModel, AutoModelForCausalLM, DynamicCache, StaticCache

from hf_dalle import DallePriorConfig, DallePriorForCausalLM, DallePriorModel
from hf_dalle.image_attention import stream_attention_mask


TOLERANCE = {"atol": 2e-5, "rtol": 2e-5}
each_type = pytest.mark.parametrize("attention_type", ATTENTION_TYPES)


# ------------------------------------------------------------------------------------------------ who sees whom


@each_type
def test_one_layer_sees_what_its_mask_allows(attention_type):
    prior = build_small_prior(attention_type)
    ids = draw_stream(prior, batch_size=1)
    embeds = prior.model.embed_tokens(ids).detach().requires_grad_()
    states = prior.model(inputs_embeds=embeds).last_hidden_state
    sees = torch.stack([torch.autograd.grad(state.sum(), embeds, retain_graph=True)[0][0] for state in states[0] ** 2])
    sees = sees.abs().sum(-1) > 0  # states x inputs
    assert sees.equal(stream_attention_mask(attention_type, TEXT, 4, 3))


def compute_plain_states(prior, ids):
    """The paper's network for one stream, head by head: pre-LN layers on tokens with their positions, a last norm."""
    model, config = prior.model, prior.config
    states = []
    for position, token in enumerate(ids.tolist()):
        place = model.text_position_embedding.weight[position] if position < TEXT else 0
        if position >= TEXT:
            row, column = divmod(position - TEXT, config.image_grid_size)
            place = model.image_row_embedding.weight[row] + model.image_column_embedding.weight[column]
        states.append(model.embed_tokens.weight[token] + place)
    states = torch.stack(states)
    head_dim = config.hidden_size // config.num_attention_heads
    for layer, attention_type in zip(model.layers, config.attention_types, strict=True):
        mask = stream_attention_mask(attention_type, TEXT, config.image_grid_size, config.conv_kernel_size)
        attention, normed, heads = layer.self_attn, layer.input_layernorm(states), []
        parts = [projection(normed) for projection in (attention.q_proj, attention.k_proj, attention.v_proj)]
        for query, key, value in zip(*(part.split(head_dim, dim=-1) for part in parts), strict=True):
            scores = (query @ key.T / head_dim**0.5).masked_fill(~mask, -torch.inf)
            heads.append(scores.softmax(-1) @ value)
        states = states + attention.o_proj(torch.cat(heads, dim=-1))
        mlp = layer.mlp
        states = states + mlp.fc2(F.gelu(mlp.fc1(layer.post_attention_layernorm(states))))
    return model.norm(states)


@pytest.mark.parametrize("attn_implementation", ["eager", "sdpa"])
def test_states_are_the_plain_computation(attn_implementation):
    prior = build_small_prior(attn_implementation=attn_implementation)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in prior.named_parameters():
            if name.endswith("bias") or "norm" in name:  # as after training: one that is lost must be seen
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
        ids = draw_stream(prior, batch_size=1)
        states = prior.model(ids).last_hidden_state[0]
        torch.testing.assert_close(states, compute_plain_states(prior, ids[0]), **TOLERANCE)


@each_type
def test_no_future_leak(attention_type):
    prior = build_small_prior(attention_type, attention_type)
    ids = draw_stream(prior, batch_size=1)
    with torch.no_grad():
        logits = prior(ids).logits
        for position in range(ids.shape[1]):
            changed = ids.clone()
            changed[0, position] = 3 if position < TEXT else prior.config.image_token_offset + 3
            changed_logits = prior(changed).logits
            assert changed_logits[:, :position].equal(logits[:, :position])
            if ids[0, position] != changed[0, position] and position != TEXT - 1:
                assert not changed_logits[:, position].equal(logits[:, position])


def test_eager_is_sdpa():
    prior = build_small_prior(*ATTENTION_TYPES)
    ids = draw_stream(prior)
    with torch.no_grad():
        sdpa = prior(ids).logits
        prior.set_attn_implementation("eager")
        eager = prior(ids, output_attentions=True, output_hidden_states=True)
    torch.testing.assert_close(eager.logits, sdpa, **TOLERANCE)
    assert len(eager.hidden_states) == 5
    for attention_type, weights in zip(ATTENTION_TYPES, eager.attentions, strict=True):
        assert (weights > 0).equal(stream_attention_mask(attention_type, TEXT, 4, 3).expand_as(weights))


# ------------------------------------------------------------------------------------------------------ caches


@each_type
@pytest.mark.parametrize("chunks", [[TEXT + 1] + [1] * 15, [1] * 21, [3, 2, 7, 9], [21]], ids=str)
@pytest.mark.parametrize("kind", ["dynamic", "static", "long static"])
def test_cached_logits_are_uncached_logits(attention_type, chunks, kind):
    prior = build_small_prior(attention_type, attention_type)
    text_ids, attention_mask, image_tokens = draw_inputs()
    ids = draw_stream(prior)
    ids[:, :TEXT] = text_ids  # so that the pads are replaced in every chunk
    if kind == "dynamic":
        cache = DynamicCache(config=prior.config)
    else:
        cache = StaticCache(config=prior.config, max_cache_len=21 if kind == "static" else 30)
    with torch.no_grad():
        whole = prior(ids, attention_mask=attention_mask).logits
        parts = [
            prior(chunk, attention_mask=attention_mask, past_key_values=cache).logits for chunk in ids.split(chunks, 1)
        ]
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, **TOLERANCE)


def test_cache_is_returned_where_it_is_of_use():
    prior = build_small_prior()
    stream = prior.join_stream(*draw_inputs())
    assert prior(draw_stream(prior)).past_key_values.get_seq_length() == 21
    assert prior(draw_stream(prior), use_cache=False).past_key_values is None
    assert prior(**stream, labels=stream["input_ids"]).past_key_values is None


def test_a_state_past_the_end_is_refused():
    prior = build_small_prior()
    ids = draw_stream(prior)
    with pytest.raises(ValueError, match="21 states .* but 22 are asked for"):
        prior(torch.cat([ids, ids[:, -1:]], dim=1))
    for cache in (DynamicCache(config=prior.config), StaticCache(config=prior.config, max_cache_len=30)):
        prior(ids, past_key_values=cache)
        with pytest.raises(ValueError, match="21 states .* but 22 are asked for"):
            prior(ids[:, -1:], past_key_values=cache)


@pytest.mark.slow
def test_decoding_compiles_into_one_graph():
    prior = build_small_prior()
    ids = draw_stream(prior)
    cache = StaticCache(config=prior.config, max_cache_len=21)
    decode = torch.compile(prior.model, backend="eager", fullgraph=True)
    with torch.no_grad():
        whole = prior.model(ids).last_hidden_state
        parts = [prior.model(ids[:, : TEXT + 1], past_key_values=cache).last_hidden_state]
        for cell in range(TEXT + 1, 21):
            parts.append(decode(ids[:, cell : cell + 1], past_key_values=cache).last_hidden_state)
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, **TOLERANCE)


# ------------------------------------------------------------------------------------------------------ logits


def test_text_logits_and_image_logits_are_never_crossed():
    prior = build_small_prior()
    config = prior.config
    output = prior(draw_stream(prior))
    assert output.text_logits.shape == (2, TEXT, 20 + TEXT)
    assert output.image_logits.shape == (2, IMAGE, CLASSES)
    possible = output.logits > torch.finfo(torch.float32).min
    text = torch.arange(config.vocab_size) < config.image_start_token_id
    start = torch.arange(config.vocab_size) == config.image_start_token_id
    image = torch.arange(config.vocab_size) >= config.image_token_offset
    assert possible.equal(torch.stack([text] * (TEXT - 1) + [start] + [image] * IMAGE).expand_as(possible))
    assert output.logits[:, : TEXT - 1, :25].equal(output.text_logits[:, :-1])
    assert output.logits[:, TEXT:, config.image_token_offset :].equal(output.image_logits)
    assert (output.logits[:, TEXT - 1, config.image_start_token_id] == 0).all()


@pytest.mark.parametrize("keep", [1, IMAGE - 1, IMAGE, IMAGE + 1, IMAGE + 3, 21, 30])
def test_logits_to_keep(keep):
    prior = build_small_prior()
    whole, kept = prior(draw_stream(prior)), prior(draw_stream(prior), logits_to_keep=keep)
    num_text_states = min(max(keep - IMAGE, 0), TEXT)
    torch.testing.assert_close(kept.logits, whole.logits[:, -keep:])
    torch.testing.assert_close(kept.text_logits, whole.text_logits[:, TEXT - num_text_states :])
    torch.testing.assert_close(kept.image_logits, whole.image_logits[:, -keep:])


def test_joint_logits_give_the_likelihood_of_caption_and_image():
    prior = build_small_prior()
    stream = prior.join_stream(*draw_inputs())
    ids = stream["input_ids"]
    with torch.no_grad():
        log_probs = prior(ids[:, :-1]).logits.log_softmax(-1)
        parts = prior(**stream, labels=ids)
    nll = -log_probs.gather(-1, ids[:, 1:, None]).sum(dim=(1, 2)).mean()
    torch.testing.assert_close(nll, parts.text_loss * (TEXT - 1) + parts.image_loss * IMAGE)


# -------------------------------------------------------------------------------------------------------- pads


def test_each_position_has_its_own_pad_and_the_tokenizers_pad_counts_for_nothing():
    prior = build_small_prior()
    text_ids, attention_mask, image_tokens = draw_inputs()
    joined = prior.join_stream(text_ids, attention_mask, image_tokens)["input_ids"][:, :-1]
    assert joined[0, :TEXT].tolist() == [*text_ids[0, :3].tolist(), 23, 24]
    raw = torch.cat([text_ids, joined[:, TEXT:]], dim=1)
    other = torch.cat([text_ids.where(attention_mask == 1, 7), joined[:, TEXT:]], dim=1)
    with torch.no_grad():
        logits = prior(joined).logits
        assert prior(raw, attention_mask=attention_mask).logits.equal(logits)
        assert prior(other, attention_mask=attention_mask.bool()).logits.equal(logits)
        embeds = prior.model.embed_tokens(other)
        assert prior(inputs_embeds=embeds, attention_mask=attention_mask).logits.equal(logits)
        states = AutoModel.from_config(prior.config)
        states.load_state_dict(prior.model.state_dict())
        states.eval()
        assert states(raw, attention_mask).last_hidden_state.equal(prior.model(joined).last_hidden_state)


def test_pads_are_attended_to():
    prior = build_small_prior()
    ids = draw_stream(prior, batch_size=1)
    logits = prior(ids).image_logits
    with torch.no_grad():
        prior.model.embed_tokens.weight[prior.config.pad_token_offset + 3] += torch.randn(32)
    assert (prior(ids).image_logits != logits).any(dim=-1).all()


def test_a_mask_that_does_not_cover_the_text_is_refused():
    prior = build_small_prior()
    ids = draw_stream(prior)
    with pytest.raises(ValueError, match=r"5 or more; got the shape \(2, 4\)"):
        prior(ids, attention_mask=torch.ones(2, 4))
    with pytest.raises(ValueError, match=r"must be 2-D"):
        prior(ids, attention_mask=torch.ones(2, 1, 21, 21))
    prior(ids[:, :3], attention_mask=torch.ones(2, 3))  # the text so far is enough


def test_ids_or_embeddings_not_both():
    prior = build_small_prior()
    with pytest.raises(ValueError, match="exactly one of"):
        prior()
    with pytest.raises(ValueError, match="exactly one of"):
        prior(draw_stream(prior), inputs_embeds=torch.zeros(2, 21, 32))


# ------------------------------------------------------------------------------------------------- join_stream


def test_join_stream():
    prior = build_small_prior()
    text_ids = torch.tensor([[0, 5, 6, 1, 1]])
    attention_mask = torch.tensor([[1, 1, 1, 0, 0]])
    stream = prior.join_stream(text_ids, attention_mask, torch.tensor([[0, 15]]))
    assert stream["input_ids"].tolist() == [[0, 5, 6, 23, 24, 25, 26, 41]]
    assert stream["attention_mask"].tolist() == [[1, 1, 1, 0, 0, 1, 1, 1]]
    # without an image it ends with start-of-image, and what was joined can be joined again
    start = prior.join_stream(stream["input_ids"][:, :TEXT])
    assert start["input_ids"].tolist() == [[0, 5, 6, 23, 24, 25]]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"text_ids": torch.zeros(2, 4, dtype=torch.long)}, r"5 columns each .* \(2, 4\)"),
        ({"text_ids": torch.zeros(5, dtype=torch.long)}, "5 columns each"),
        ({"attention_mask": torch.ones(2, 4)}, r"5 columns each .* \(2, 4\)"),
        ({"attention_mask": torch.tensor([[1] * 5, [0, 1, 1, 1, 1]])}, "padding_side='right'"),
        ({"attention_mask": torch.tensor([[1] * 5, [1, 1, 0, 1, 1]])}, "padding_side='right'"),
        ({"attention_mask": torch.zeros(2, 5)}, "padding_side='right'"),
        ({"text_ids": torch.full((2, 5), 20)}, r"Text ids must be in \[0, 20\), got 0 to 20"),
        ({"text_ids": torch.full((2, 5), -1)}, r"Text ids must be in \[0, 20\), got -1"),
        ({"image_tokens": torch.full((2, 3), 16)}, r"Image tokens must be in \[0, 16\), got 16 to 16"),
        ({"image_tokens": torch.full((2, 3), -1)}, r"Image tokens must be in \[0, 16\), got -1"),
        ({"image_tokens": torch.zeros(2, 17, dtype=torch.long)}, r"at most 16 tokens, got the shape \(2, 17\)"),
        ({"image_tokens": torch.zeros(1, 3, dtype=torch.long)}, r"2 rows, .* got the shape \(1, 3\)"),
        ({"image_tokens": torch.zeros(2, 4, 4, dtype=torch.long)}, r"got the shape \(2, 4, 4\)"),
    ],
)
def test_join_stream_refuses(change, words):
    inputs = {"text_ids": torch.zeros(2, TEXT, dtype=torch.long), **change}
    with pytest.raises(ValueError, match=words):
        build_small_prior().join_stream(**inputs)


# --------------------------------------------------------------------------------- what users do to a model


def test_save_and_load(tmp_path):
    prior = build_small_prior()
    prior.save_pretrained(tmp_path)
    ids = draw_stream(prior)
    for loader in (DallePriorForCausalLM, AutoModelForCausalLM):
        loaded = loader.from_pretrained(tmp_path)
        assert type(loaded) is DallePriorForCausalLM
        assert loaded(ids).logits.equal(prior(ids).logits)
    states = AutoModel.from_pretrained(tmp_path)
    assert type(states) is DallePriorModel
    assert states(ids).last_hidden_state.equal(prior.model(ids).last_hidden_state)


def test_tied_embeddings(tmp_path):
    prior = build_small_prior(tie_word_embeddings=True)
    assert prior.lm_head.weight is prior.model.embed_tokens.weight
    prior.save_pretrained(tmp_path)
    loaded = DallePriorForCausalLM.from_pretrained(tmp_path)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert loaded(draw_stream(prior)).logits.equal(prior(draw_stream(prior)).logits)
    untied = build_small_prior()
    assert untied.lm_head.weight is not untied.model.embed_tokens.weight


def test_weights_that_a_file_lacks_are_refused(tmp_path):
    build_small_prior().save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    weights = load_file(path)
    name = "model.layers.1.mlp.fc1.bias"
    lacking = {key: value for key, value in weights.items() if key != name}
    loaders = (DallePriorForCausalLM, AutoModelForCausalLM, AutoModel)
    for weights_there, words in (
        (lacking, f"no .*{name[6:]}"),
        ({**lacking, name: torch.zeros(3)}, r"\(3,\), not \(128,\)"),
    ):
        save_file(weights_there, path, metadata={"format": "pt"})
        for loader in loaders:
            with pytest.raises(OSError, match=f"{tmp_path} holds other weights: .*{words}"):
                loader.from_pretrained(tmp_path)
    _, info = AutoModelForCausalLM.from_pretrained(tmp_path, ignore_mismatched_sizes=True, output_loading_info=True)
    assert {key for key, *_ in info["mismatched_keys"]} == {name}
    save_file({key: value for key, value in weights.items() if key != "lm_head.weight"}, path, {"format": "pt"})
    with pytest.raises(OSError, match="no lm_head.weight"):
        DallePriorForCausalLM.from_pretrained(tmp_path)
    AutoModel.from_pretrained(tmp_path)  # has no head


def test_offloaded_weights_come_when_they_are_called():
    prior = build_small_prior()
    ids = draw_stream(prior)
    logits = prior(ids).logits
    cpu_offload(prior, execution_device="cpu")
    assert prior.lm_head.weight.device.type == "meta"
    assert prior(ids).logits.equal(logits)


@pytest.mark.parametrize(("preset", "num_parameters"), [("12b", 12_293_832_192), ("1.2b", 1_310_973_952)])
def test_parameter_count(preset, num_parameters):
    config = DallePriorConfig.from_preset(preset)
    with torch.device("meta"):
        prior = DallePriorForCausalLM(config)
    width, vocabulary = config.hidden_size, 16384 + 256 + 1 + 8192
    attention = 4 * (width * width + width)
    mlp = width * 4 * width + 4 * width + 4 * width * width + width
    layer = attention + mlp + 2 * 2 * width
    embeddings = (vocabulary + 256 + 32 + 32) * width
    total = embeddings + config.num_hidden_layers * layer + 2 * width + vocabulary * width
    assert sum(parameter.numel() for parameter in prior.parameters()) == total == num_parameters
