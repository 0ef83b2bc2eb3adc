"""Training the prior: its losses against plain computations, gradients, initial weights, LoRA and the Trainer."""

import math

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny_streams import CLASSES, IMAGE, TEXT, build_small_prior, draw_inputs, draw_stream
from transformers import Trainer, TrainingArguments


# ------------------------------------------------------------------------------------------------------ losses


def compute_plain_losses(prior, text_ids, attention_mask, image_tokens, is_label=None):
    """Token by token, from the states and the head's weights; `is_label` (B x ids) is False where a label is -100."""
    config = prior.config
    text, caption, image = [], [], []
    for row in range(len(text_ids)):
        ids = [int(text_ids[row, t]) if attention_mask[row, t] else 20 + t for t in range(TEXT)]
        ids += [20 + TEXT] + [20 + TEXT + 1 + int(token) for token in image_tokens[row]]
        states = prior.model(torch.tensor([ids[:-1]])).last_hidden_state[0]
        for position, target in enumerate(ids[1:], start=1):
            if is_label is not None and not is_label[row, position]:
                continue
            scores = prior.lm_head.weight @ states[position - 1]
            if position < TEXT:
                text.append(-(scores[target] - scores[: 20 + TEXT].logsumexp(0)))
                if target < 20:
                    caption.append(text[-1])
            elif position > TEXT:
                image.append(-(scores[target] - scores[20 + TEXT + 1 : config.vocab_size].logsumexp(0)))
    return [torch.stack(values).mean() if values else None for values in (text, caption, image)]


def assert_losses(output, text, caption, image, weight=1 / 8):
    torch.testing.assert_close(output.text_loss, text)
    torch.testing.assert_close(output.caption_loss, caption)
    torch.testing.assert_close(output.image_loss, image)
    torch.testing.assert_close(output.loss, weight * text + (1 - weight) * image)


@pytest.mark.parametrize("weight", [1 / 8, 0.5])
def test_loss_is_the_plain_computation(weight):
    prior = build_small_prior(text_loss_weight=weight)
    inputs = draw_inputs(batch_size=3)
    stream = prior.join_stream(*inputs)
    assert_losses(prior(**stream, labels=stream["input_ids"]), *compute_plain_losses(prior, *inputs), weight)


def test_pads_are_replaced_in_input_and_labels():
    prior = build_small_prior()
    text_ids, attention_mask, image_tokens = inputs = draw_inputs(batch_size=3)
    stream = prior.join_stream(text_ids, None, image_tokens)["input_ids"]
    assert (stream == 1).any()  # the tokenizer's pads, not replaced yet
    output = prior(stream, attention_mask=attention_mask, labels=stream)
    assert_losses(output, *compute_plain_losses(prior, *inputs))


def test_labels_of_minus_100_are_left_out_and_stay_out_at_pads():
    prior = build_small_prior()
    inputs = draw_inputs(batch_size=3)
    stream = prior.join_stream(*inputs)
    is_label = torch.rand(stream["input_ids"].shape, generator=torch.Generator().manual_seed(0)) < 0.6
    is_label[0, :TEXT] = False  # a row with pads, as where training drops a caption
    is_label[1, :TEXT] = True  # another one
    assert (stream["attention_mask"][:2, :TEXT] == 0).any(dim=1).all()
    output = prior(**stream, labels=stream["input_ids"].where(is_label, -100))
    assert_losses(output, *compute_plain_losses(prior, *inputs, is_label))


def test_losses_of_an_absent_kind_are_none():
    prior = build_small_prior()
    stream = prior.join_stream(*draw_inputs())
    ids = stream["input_ids"]
    no_text = prior(**stream, labels=ids.masked_fill(torch.arange(ids.shape[1]) < TEXT, -100))
    assert no_text.text_loss is None and no_text.caption_loss is None
    torch.testing.assert_close(no_text.loss, 7 / 8 * no_text.image_loss)
    only_text = prior(ids[:, :TEXT], attention_mask=stream["attention_mask"], labels=ids[:, :TEXT])
    assert only_text.image_loss is None
    torch.testing.assert_close(only_text.loss, only_text.text_loss / 8)
    only_pads = prior(**stream, labels=ids.masked_fill(ids < 20, -100))
    assert only_pads.text_loss is not None and only_pads.caption_loss is None


def test_only_the_objective_has_a_gradient():
    prior = build_small_prior()
    stream = prior.join_stream(*draw_inputs())
    output = prior(**stream, labels=stream["input_ids"])
    assert output.loss.requires_grad and not output.caption_loss.requires_grad


def test_initial_loss_is_that_of_a_uniform_guess():
    prior = build_small_prior(initializer_range=0.02)
    stream = prior.join_stream(*draw_inputs(batch_size=16))
    output = prior(**stream, labels=stream["input_ids"])
    assert abs(output.text_loss - math.log(20 + TEXT)) < 0.05
    assert abs(output.image_loss - math.log(CLASSES)) < 0.05


# ---------------------------------------------------------------------------------------------------- training


def test_initial_weights():
    prior = build_small_prior(hidden_size=64, initializer_range=0.02)
    residual_std = 0.02 / math.sqrt(2 * 4)
    for name, parameter in prior.named_parameters():
        if name.endswith("bias"):
            assert (parameter == 0).all(), name
        elif "norm" in name:
            assert (parameter == 1).all(), name
        else:
            std = residual_std if "o_proj" in name or "fc2" in name else 0.02
            assert abs(parameter.std() / std - 1) < 0.2, name


def test_gradient_checkpointing_changes_nothing():
    gradients = []
    for is_checkpointed in (False, True):
        prior = build_small_prior().train()
        if is_checkpointed:
            prior.gradient_checkpointing_enable()
            assert all(layer.gradient_checkpointing for layer in prior.model.layers)
        stream = prior.join_stream(*draw_inputs())
        prior(**stream, labels=stream["input_ids"]).loss.backward()
        gradients.append({name: parameter.grad for name, parameter in prior.named_parameters()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, msg=name)
        assert gradient.abs().sum() > 0, name


def test_a_model_first_used_in_inference_mode_can_train():
    prior = build_small_prior(text_length=7)  # a size whose masks no other test has made
    text_ids = torch.zeros(1, 7, dtype=torch.long)
    with torch.inference_mode():
        prior(prior.join_stream(text_ids)["input_ids"])
    stream = prior.join_stream(text_ids, None, torch.zeros(1, IMAGE, dtype=torch.long))
    prior(**stream, labels=stream["input_ids"]).loss.backward()


@pytest.mark.parametrize("attn_implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("kind", ["embedding_dropout", "hidden_dropout", "attention_dropout"])
def test_dropout_acts_in_training_only(kind, attn_implementation):
    prior = build_small_prior(attn_implementation=attn_implementation, **{kind: 0.5})
    ids = draw_stream(prior)
    assert prior(ids).logits.equal(prior(ids).logits)
    prior.train()
    assert not prior(ids).logits.equal(prior(ids).logits)


def test_hidden_dropout_is_on_all_that_layers_add():
    prior = build_small_prior(hidden_dropout=1.0).train()
    states = prior.model(draw_stream(prior), output_hidden_states=True).hidden_states
    assert states[-1].equal(prior.model.norm(states[0]))


def test_bf16_is_finite():
    prior = build_small_prior().to(torch.bfloat16)
    stream = prior.join_stream(*draw_inputs())
    output = prior(**stream, labels=stream["input_ids"])
    assert output.image_logits.dtype == torch.bfloat16
    assert output.image_logits.isfinite().all() and output.text_logits.isfinite().all()
    assert output.loss.isfinite()
    assert prior(stream["input_ids"][:, :-1]).logits.isfinite().all()


def test_trainer_takes_the_same_step_in_one_batch_or_two(tmp_path):
    weights = []
    for num_batches in (1, 2):
        prior = build_small_prior()
        stream = prior.join_stream(*draw_inputs(batch_size=4))
        rows = [{"input_ids": ids, "labels": ids} for ids in stream["input_ids"]]
        options = {"max_steps": 1, "optim": "sgd", "learning_rate": 0.1, "max_grad_norm": 0.0, "use_cpu": True}
        arguments = TrainingArguments(
            tmp_path,
            per_device_train_batch_size=4 // num_batches,
            gradient_accumulation_steps=num_batches,
            report_to=[],
            save_strategy="no",
            disable_tqdm=True,
            **options,
        )
        Trainer(prior, arguments, train_dataset=rows).train()
        weights.append(prior.lm_head.weight)
    assert not weights[0].equal(build_small_prior().lm_head.weight)
    torch.testing.assert_close(weights[0], weights[1])


@pytest.mark.parametrize("target_modules", [["q_proj", "v_proj"], "all-linear"])
def test_lora_trains(target_modules):
    prior = build_small_prior().train()
    stream = prior.join_stream(*draw_inputs())
    model = get_peft_model(prior, LoraConfig(r=2, target_modules=target_modules, task_type="CAUSAL_LM"))
    wrapped = {name.split(".")[-1] for name, module in model.named_modules() if hasattr(module, "lora_A")}
    every = {"q_proj", "k_proj", "v_proj", "o_proj", "fc1", "fc2"}
    assert wrapped == (every if target_modules == "all-linear" else set(target_modules))
    optimizer = torch.optim.SGD((p for p in model.parameters() if p.requires_grad), lr=0.1)
    losses = []
    for _ in range(3):
        loss = model(**stream, labels=stream["input_ids"]).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[2] < losses[0]
