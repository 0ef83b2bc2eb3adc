"""transformers' `generate()` on the prior: the grid's number of tokens, from captions and prefixes, with any cache."""

import json

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny import ATTENTION_TYPES, build_prior, build_tokenizer
from transformers import CompileConfig, DynamicCache

from hf_dalle.cache_dalle import DalleCache
from hf_dalle.sampling import draw_image_tokens


TEXT, IMAGE = 12, 16


def draw_caption(batch_size=2):
    attention_mask = torch.ones(batch_size, TEXT, dtype=torch.long)
    attention_mask[0, 4:] = 0
    text_ids = torch.randint(2, 300, (batch_size, TEXT), generator=torch.Generator().manual_seed(0))
    text_ids[:, 0] = 0
    return {"input_ids": text_ids.where(attention_mask == 1, 1), "attention_mask": attention_mask}


def read_image_tokens(prior, ids):
    tokens = ids[:, TEXT + 1 :] - prior.config.image_token_offset
    assert ((tokens >= 0) & (tokens < 16)).all()
    return tokens


@pytest.mark.parametrize("attention_type", ATTENTION_TYPES)
def test_greedy_tokens_are_the_same_with_any_cache(attention_type):
    prior = build_prior(attention_types=[attention_type] * 2)
    caption = draw_caption()
    ids = prior.generate(**caption, do_sample=False, use_cache=False)
    assert ids.shape == (2, TEXT + 1 + IMAGE)
    for options in (
        {},
        {"cache_implementation": "static"},
        {"past_key_values": DynamicCache(config=prior.config)},
        {"prefill_chunk_size": 5},
        {"prefill_chunk_size": 5, "cache_implementation": "static"},
    ):
        assert prior.generate(**caption, do_sample=False, **options).equal(ids), options


def test_the_default_cache_is_our_own_except_where_states_are_taken_back():
    prior, caption, kinds = build_prior(), draw_caption(batch_size=1), []
    prior.register_forward_pre_hook(
        lambda module, args, kwargs: kinds.append(type(kwargs["past_key_values"])), with_kwargs=True
    )
    ids = prior.generate(**caption, do_sample=False)
    assert set(kinds) == {DalleCache}
    kinds.clear()
    start = prior.generate(**caption, do_sample=False, prompt_lookup_num_tokens=3, max_new_tokens=IMAGE - 4)
    assert start.equal(ids[:, :-4]) and set(kinds) == {DynamicCache}
    guess = {"prompt_lookup_num_tokens": 3, "max_new_tokens": IMAGE - 4}
    try:  # one that was asked for goes back where it holds all that will be seen, or says that it cannot
        again = prior.generate(**caption, do_sample=False, past_key_values=DalleCache(prior.config), **guess)
        assert again.equal(start)
    except ValueError as error:
        assert "cannot go back" in str(error)
    for options in ({"past_key_values": DalleCache(prior.config)}, {"cache_implementation": "dynamic"}):
        assert prior.generate(**caption, do_sample=False, **options).equal(ids)
    output = prior.generate(**caption, do_sample=False, return_dict_in_generate=True)
    assert output.past_key_values.get_seq_length() == TEXT + IMAGE and output.sequences.equal(ids)


def test_compiled_steps_generate_the_same():
    prior, caption = build_prior(), draw_caption()
    options = {"do_sample": False, "num_beams": 3, "num_return_sequences": 2}
    ids = prior.generate(**caption, **options)
    prior.compile(backend="eager")
    assert prior.generate(**caption, **options).equal(ids) and prior.model.run_layer.is_static


@pytest.mark.slow
def test_greedy_tokens_are_the_same_compiled():
    prior = build_prior(attention_types=["row", "conv"])
    ids = prior.generate(**draw_caption(), do_sample=False)
    compile_config = CompileConfig(mode=None)
    compile_config._compile_all_devices = True  # as on an accelerator, where a static cache is compiled for
    options = {"cache_implementation": "static", "compile_config": compile_config}
    assert prior.generate(**draw_caption(), do_sample=False, **options).equal(ids)
    assert hasattr(prior, "_compiled_call")


def test_greedy_tokens_are_the_likeliest_at_each_step():
    prior = build_prior()
    caption = draw_caption()
    ids = prior.generate(**caption, do_sample=False)
    stream = prior.join_stream(caption["input_ids"], caption["attention_mask"])["input_ids"]
    assert ids[:, : TEXT + 1].equal(stream)
    for _ in range(IMAGE):
        token = prior(stream).image_logits[:, -1:].argmax(-1)
        stream = torch.cat([stream, token + prior.config.image_token_offset], dim=1)
    assert ids.equal(stream)


def test_output_of_the_tokenizer_just_works():
    prior, tokenizer = build_prior(), build_tokenizer()
    inputs = tokenizer(["a red fox", "a blue bird"], padding="max_length", max_length=TEXT, return_tensors="pt")
    tokens = read_image_tokens(prior, prior.generate(**inputs))
    assert tokens.shape == (2, IMAGE)


def test_the_tokenizers_pad_counts_for_nothing():
    prior = build_prior()
    caption = draw_caption()
    other = {**caption, "input_ids": caption["input_ids"].where(caption["attention_mask"] == 1, 99)}
    for options in ({}, {"cache_implementation": "static"}, {"use_cache": False}):
        ids = prior.generate(**caption, do_sample=False, **options)
        assert prior.generate(**other, do_sample=False, **options).equal(ids)


@pytest.mark.parametrize("num_prefix_tokens", [1, 8, 15])
def test_image_prefix_is_kept_and_filled_up(num_prefix_tokens):
    prior = build_prior()
    caption = draw_caption()
    whole = prior.generate(**caption, do_sample=False)
    prefix = read_image_tokens(prior, whole)[:, :num_prefix_tokens]
    stream = prior.join_stream(caption["input_ids"], caption["attention_mask"], prefix)
    assert prior.generate(**stream, do_sample=False).equal(whole)
    assert prior.generate(stream["input_ids"], do_sample=False).equal(whole)
    other = prior.join_stream(caption["input_ids"], caption["attention_mask"], (prefix + 1) % 16)
    assert read_image_tokens(prior, prior.generate(**other))[:, :num_prefix_tokens].equal((prefix + 1) % 16)


# ------------------------------------------------------------------------------------------------------ guidance


def draw_greedily(prior, caption, negative, prefix=None, num_images=1):
    """Our own loop at a guidance scale of 3."""
    generators = [torch.Generator()] * len(caption["input_ids"]) * num_images
    drawing = draw_image_tokens(
        prior,
        caption["input_ids"],
        caption["attention_mask"],
        generators=generators,
        num_images_per_prompt=num_images,
        image_prefix=prefix,
        guidance_scale=3.0,
        negative_text_ids=negative["input_ids"],
        negative_attention_mask=negative["attention_mask"],
        top_k=1,
    )
    *_, (_, tokens) = drawing
    return tokens


def encode(*captions):
    return build_tokenizer()(list(captions), padding="max_length", max_length=TEXT, return_tensors="pt")


@pytest.mark.parametrize("attention_types", [list(ATTENTION_TYPES), ["full"] * 2], ids="-".join)
def test_guidance_leads_away_from_no_caption(attention_types):
    prior = build_prior(attention_types=attention_types)
    caption = draw_caption()
    expected = draw_greedily(prior, caption, encode("", ""))
    for options in ({}, {"cache_implementation": "static"}, {"use_cache": False}):
        ids = prior.generate(**caption, do_sample=False, guidance_scale=3.0, **options)
        assert read_image_tokens(prior, ids).equal(expected), options
    assert not read_image_tokens(prior, prior.generate(**caption, do_sample=False)).equal(expected)
    # as our checkpoints keep it
    prior.generation_config.update(guidance_scale=3.0)
    assert read_image_tokens(prior, prior.generate(**caption, do_sample=False)).equal(expected)
    unguided = prior.generate(**caption, do_sample=False, guidance_scale=1.0)
    assert not read_image_tokens(prior, unguided).equal(expected)


def test_guidance_keeps_the_image_prefix_and_repeats_for_each_image():
    prior = build_prior()
    caption, prefix = draw_caption(), torch.tensor([[3, 1, 4, 1, 5], [9, 2, 6, 5, 3]])
    expected = draw_greedily(prior, caption, encode("", ""), prefix, num_images=3)
    stream = prior.join_stream(caption["input_ids"], caption["attention_mask"], prefix)
    options = {"guidance_scale": 3.0, "top_k": 1, "num_return_sequences": 3}
    assert read_image_tokens(prior, prior.generate(**stream, **options)).equal(expected)


def test_guidance_leads_away_from_a_negative_prompt():
    prior = build_prior()
    caption, negative = draw_caption(), encode("a blue bird", "a red fox")
    ids = prior.generate(
        **caption,
        do_sample=False,
        guidance_scale=3.0,
        negative_prompt_ids=negative["input_ids"],
        negative_prompt_attention_mask=negative["attention_mask"],
    )
    assert read_image_tokens(prior, ids).equal(draw_greedily(prior, caption, negative))
    assert not read_image_tokens(prior, ids).equal(draw_greedily(prior, caption, encode("", "")))


def test_guidance_of_beams_is_refused():
    with pytest.raises(ValueError, match="Beams cannot be guided"):
        build_prior().generate(**draw_caption(), num_beams=2, guidance_scale=3.0)


# ------------------------------------------------------------------------------------------- samples and settings


def test_samples_follow_the_whole_distribution():
    prior = build_prior(initializer_range=0.02)  # nearly uniform over 16 tokens
    caption = {name: values[:1] for name, values in draw_caption().items()}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        ids = prior.generate(**caption, num_return_sequences=64)
    assert ids.shape == (64, TEXT + 1 + IMAGE)
    counts = read_image_tokens(prior, ids).flatten().bincount(minlength=16)
    assert (counts > 30).all()  # of 64 expected


def test_beams():
    prior = build_prior()
    caption = draw_caption()
    greedy = prior.generate(**caption, do_sample=False)
    beams = prior.generate(**caption, do_sample=False, num_beams=3)
    assert read_image_tokens(prior, beams).shape == (2, IMAGE)

    def compute_log_likelihood(ids):
        log_probs = prior(ids[:, :-1]).image_logits.log_softmax(-1)
        return log_probs.gather(-1, read_image_tokens(prior, ids)[..., None]).sum(dim=(1, 2))

    assert (compute_log_likelihood(beams) >= compute_log_likelihood(greedy) - 1e-4).all()


def test_saved_defaults_sample_from_everything(tmp_path):
    prior = build_prior()
    prior.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "generation_config.json").read_text())
    expected = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "max_length": TEXT + 1 + IMAGE}
    assert {name: saved[name] for name in expected} == expected
    loaded = type(prior).from_pretrained(tmp_path)
    assert {name: getattr(loaded.generation_config, name) for name in expected} == expected


def test_a_model_with_lora_generates():
    prior = build_prior()
    ids = prior.generate(**draw_caption(), do_sample=False)
    model = get_peft_model(prior, LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))
    assert model.generate(**draw_caption(), do_sample=False).equal(ids)  # a new adapter changes nothing


def test_past_the_grid_is_refused():
    prior = build_prior()
    with pytest.raises(ValueError, match="28 states .* but 29 are asked for: the image is complete"):
        prior.generate(**draw_caption(), max_new_tokens=IMAGE + 1)
    image = prior.join_stream(draw_caption()["input_ids"], None, torch.zeros(2, IMAGE, dtype=torch.long))
    with pytest.raises(ValueError, match="Input length of input_ids is 29"):
        prior.generate(**image)


def test_an_input_that_is_no_caption_is_refused():
    prior = build_prior()
    caption = draw_caption()
    with pytest.raises(ValueError, match="needs `input_ids`"):
        prior.generate()
    with pytest.raises(ValueError, match="needs `input_ids`"):
        prior.generate(caption["input_ids"][0])
    with pytest.raises(ValueError, match=r"12 columns each .*, got the shapes \(2, 11\)"):
        prior.generate(caption["input_ids"][:, :-1])
    with pytest.raises(ValueError, match="padding_side='right'"):
        prior.generate(caption["input_ids"], attention_mask=caption["attention_mask"].flip(1))
    with pytest.raises(ValueError, match="start-of-image, 312"):
        prior.generate(torch.cat([caption["input_ids"], caption["input_ids"]], dim=1))


@pytest.mark.parametrize("paged", ["generate_batch", "cache_implementation"])
def test_continuous_batching_is_refused(paged):
    prior = build_prior()
    with pytest.raises(ValueError, match="row, column or conv attention"):
        if paged == "generate_batch":
            prior.generate_batch([draw_caption()["input_ids"][0].tolist()])
        else:
            prior.generate(draw_caption()["input_ids"], cache_implementation="paged")
