"""The benchmarks at tiny sizes: they run and print ratios, their contenders compute what they say, their bytes hold.

How fast anything is, is not tested.
"""

import json

import decode
import dvae
import memory
import peers
import pytest
import roofs
import timing
import torch
import train_loop
import train_step
from tiny import build_prior

from hf_dalle import DallePriorConfig


def read_table(text: str) -> dict[str, list[str]]:
    """The cells of each markdown row after its first."""
    rows = [
        [cell.strip() for cell in line.strip("| ").split("|")] for line in text.splitlines() if line.startswith("|")
    ]
    return {first: cells for first, *cells in rows}


def test_contenders_take_turns():
    calls = []
    contenders = {name: lambda name=name: calls.append(name) for name in "ab"}
    seconds = timing.time_in_turns(contenders, num_rounds=3, num_warmups=1)
    assert "".join(calls) == "ab" * 4
    assert {name: len(values) for name, values in seconds.items()} == {"a": 3, "b": 3}
    assert min(map(min, seconds.values())) >= 0


def test_ratios_are_of_the_same_round():
    # A machine that is ten times slower in one round: the ratio of medians would be 1, of means 1.9.
    assert timing.median_ratio([1.0, 20.0, 2.0], [0.5, 10.0, 1.0]) == 2.0


def test_figures_become_a_table():
    table = timing.format_figures([timing.Figure("a", 0.756, 0.75, "b"), timing.Figure("c", "1 to 2")])
    assert table.splitlines()[2:] == ["| a | 0.76 | 0.75 | b |", "| c | 1 to 2 |  |  |"]
    sizes = [timing.format_bytes(number) for number in (12, 1240, 3.5e6, 1.236e9, 2e12)]
    assert sizes == ["12 B", "1.24 kB", "3.5 MB", "1.24 GB", "2,000 GB"]


def test_rates_are_positive():
    assert timing.measure_bandwidth(2**20, num_rounds=1) > 0


@pytest.mark.parametrize("num_rows", [1, 3])
def test_roofs_multiply_every_matrix_of_an_image_token(num_rows):
    prior = build_prior()
    shapes = []
    for name, run in roofs.list_products(prior, num_rows).items():
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], with_flops=True) as profile:
            run()
        shapes.append(sum(event.flops for event in profile.events() if event.flops))
        assert name in decode.PRODUCTS
    weights = sum(weight.numel() for weight in prior.model.layers.parameters() if weight.ndim == 2)
    weights += prior.config.hidden_size * prior.config.image_vocab_size
    assert shapes[0] == shapes[1] == 2 * num_rows * weights


def test_the_cached_llama_draws_what_llama_would():
    config = DallePriorConfig.from_preset("emoji-mini", **decode.QUICK_SIZES, attention_types=None)
    llama = peers.build_llama(config)
    input_ids = torch.randint(config.vocab_size, (1, 12))
    with torch.random.fork_rng(devices=[]):
        torch.random.set_rng_state(torch.Generator().manual_seed(0).get_state())
        drawn = peers.draw_with_llama(llama, input_ids, num_images=2)
        tokens = torch.cat([next(drawn) for _ in range(5)], dim=1)
        torch.random.set_rng_state(torch.Generator().manual_seed(0).get_state())
        stream = input_ids.repeat(2, 1)
        with torch.no_grad():
            for _ in range(5):
                probabilities = llama(stream).logits[:, -1].softmax(dim=-1)
                stream = torch.cat([stream, probabilities.multinomial(1)], dim=1)
    assert tokens.equal(stream[:, 12:])


def test_llama_has_as_many_weights_as_the_prior():
    config = DallePriorConfig(**decode.SIZES)
    with torch.device("meta"):
        counts = [
            sum(weight.numel() for weight in layers.parameters())
            for layers in (peers.build_llama(config).model.layers, decode.DallePriorForCausalLM(config).model.layers)
        ]
    assert counts[0] == pytest.approx(counts[1], rel=0.002)


def test_decode_prints_ratios(capsys):
    decode.main(["--quick", "--checkpoint", "nowhere"])
    table = read_table(capsys.readouterr().out)
    for title in ("dense, 1 image", "paper, 1 image", "dense, 4 images", "paper, 4 images"):
        for peer in ("roof", "Llama's"):
            assert float(table[f"{title}: time / {peer}"][0]) > 0
    # row, column, row, conv on 8 text states and an 8 x 8 grid, where a kernel of 11 reaches 45 states back
    read = {"row": 8 + 9, "column": 8 + 8, "conv": 8 + 46}
    assert table["paper: cache bytes / dense"][0] == f"{(2 * 17 + 72 + 54) / (4 * 72):.2f}"
    last = (2 * read["row"] + read["column"] + read["conv"]) / (4 * 72)
    assert table["paper: cache bytes read a token, last state / dense"][0] == f"{last:.2f}"
    assert float(table["paper: last token / first image token"][0]) > 0


def test_decode_refuses_a_stretch_longer_than_the_image():
    with pytest.raises(SystemExit):
        decode.parse_arguments(["--image_grid_size", "4", "--num_tokens", "8"])


def test_dvae_prints_what_convolutions_take(capsys):
    dvae.main(["--quick", "--num_rounds", "1"])
    printed = capsys.readouterr().out
    table = read_table(printed)
    assert {"encode, seconds", "decode, seconds"} <= set(table)
    assert "encode, time / OpenAI's" in table or "DALL-E==0.1" in printed


def test_dvae_collects_each_convolution():
    model = dvae.build_dvae(is_quick=True)
    with torch.no_grad():
        repeats = dvae.collect_convolutions(model, lambda: model.encode(torch.rand(1, 3, 16, 16)))
        assert len(repeats) == sum(isinstance(part, torch.nn.Conv2d) for part in model.encoder.modules())
        assert repeats[-1]().shape == (1, 512, 2, 2)


def test_the_names_of_openais_weights():
    keys = [
        peers._openai_key(name) for name in ("conv_in.weight", "groups.1.0.shortcut.bias", "groups.3.1.conv_4.weight")
    ]
    assert keys == ["blocks.input.w", "blocks.group_2.block_1.id_path.b", "blocks.group_4.block_2.res_path.conv_4.w"]


def test_the_dvae_equals_openais():
    pytest.importorskip("dall_e")
    model = dvae.build_dvae(is_quick=True)
    encode, decode_theirs = peers.build_openai_dvae(model)
    pixels, tokens = torch.rand(2, 3, 16, 16), torch.randint(512, (2, 2, 2))
    with torch.no_grad():
        torch.testing.assert_close(model.encode(pixels).logits, encode(pixels), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(model.decode(tokens).sample, decode_theirs(tokens), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "options",
    [
        ["--batch_size=2"],
        ["--attn_implementation=eager", "--optimizer=muon", "--num_images=3"],
        ["--mixed_precision=bf16", "--optimizer=sgd", "--batch_size=3"],
        ["--dtype=bfloat16"],
    ],
)
@pytest.mark.parametrize("preset", ["12b", "emoji-mini"])
def test_bytes_are_known_before(preset, options):
    args = memory.parse_arguments([preset, *options])
    config = memory.shrink_config(memory.load_config(preset))
    predicted = memory.predict_bytes(config, args)
    # Measured after predicting: nothing of the trace must be left in the caches of masks.
    assert memory.measure_bytes(config, args) == predicted
    assert predicted["activations, checkpointing"] < predicted["activations"]


def test_memory_of_the_paper_is_printed_without_holding_it(capsys, tmp_path):
    memory.main(["emoji-mini"])
    table = read_table(capsys.readouterr().out)
    assert len(table["weights"]) == 2 and len(set(table["weights"])) == 1  # of the second table, at a small size
    config = DallePriorConfig.from_preset("12b")
    predicted = memory.predict_bytes(config, memory.parse_arguments(["12b"]))
    matrices = 12 * config.num_hidden_layers * config.hidden_size**2 + 2 * config.vocab_size * config.hidden_size
    assert predicted["weights"] == pytest.approx(4 * matrices, rel=0.001)
    assert predicted["optimizer"] == pytest.approx(2 * predicted["weights"], rel=1e-6)
    (tmp_path / "prior").mkdir()
    (tmp_path / "prior" / "config.json").write_text(json.dumps({**config.to_dict(), "num_hidden_layers": 64}))
    assert memory.load_config(str(tmp_path)).to_dict() == config.to_dict()
    with pytest.raises(ValueError, match="Unknown preset"):
        memory.load_config("13b")


def test_train_step_prints_ratios(capsys):
    train_step.main(["--quick", "--num_rounds", "1", "--no_peer"])
    assert " / ours" in capsys.readouterr().out


def test_train_loop_prints_ratios(capsys):
    with torch.random.fork_rng(devices=[]):
        train_loop.main(["--quick", "--num_rounds", "1", "--batch_size", "2"])
    table = read_table(capsys.readouterr().out)
    ratios = [float(cells[0]) for name, cells in table.items() if name.startswith("the loop")]
    assert len(ratios) == 2 and min(ratios) > 0.5
    assert all(float(table[name][0]) > 0 for name in table if name.endswith("a second a worker"))


def test_the_bare_step_is_an_update_like_the_loops():
    prior = build_prior()
    ids = torch.zeros(2, prior.config.stream_length + 1, dtype=torch.long)
    ids[:, prior.config.text_length :] = prior.config.image_token_offset
    step = train_loop.make_bare_step(prior, "no")
    copy = next(cell.cell_contents for cell in step.__closure__ if isinstance(cell.cell_contents, torch.nn.Module))
    optimizer = torch.optim.AdamW(prior.train().parameters(), lr=1e-4)
    for _ in range(2):
        step(ids)
        prior(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert all(torch.equal(mine, other) for mine, other in zip(copy.parameters(), prior.parameters(), strict=True))
