"""What `DALLEPipeline` cannot draw from is refused with words, before anything is drawn."""

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import build_pipeline


@pytest.fixture(scope="module")
def pipe():
    return build_pipeline()


PICTURE = Image.new("RGB", (20, 16), "red")
ONE = torch.zeros(1, 4, dtype=torch.long)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"prompt": None}, "`prompt` must be a string.*None"),
        ({"prompt": 3}, "`prompt` must be a string"),
        ({"prompt": []}, "at least one"),
        ({"prompt": ["a fox", None]}, "`prompt` must be"),
        ({"prompt": b"a fox"}, "`prompt` must be"),
        ({"prompt": "a \ud800 fox"}, "not valid Unicode"),
        ({"negative_prompt": 3}, "`negative_prompt` must be"),
        ({"negative_prompt": ["a", "b"], "guidance_scale": 2.0}, "2 negative prompts for 1"),
        ({"num_images_per_prompt": 0}, "`num_images_per_prompt` is 0"),
        ({"num_images_per_prompt": 1.5}, "`num_images_per_prompt` is 1.5"),
        ({"output_type": "jpg"}, "'jpg'; expected 'pil', 'np', 'pt' or 'latent'"),
        ({"temperature": 0}, "`temperature` is 0"),
        ({"temperature": -0.5}, "`temperature` is -0.5"),
        ({"top_k": -1}, "`top_k` is -1"),
        ({"top_p": 0.0}, "`top_p` is 0.0"),
        ({"top_p": 1.5}, "`top_p` is 1.5"),
        ({"guidance_scale": 0.0}, "`guidance_scale` is 0.0"),
        ({"generator": 0}, "`generator` must be.*int"),
        ({"generator": [torch.Generator(), torch.Generator()]}, "2 generators for 1 images"),
        ({"callback_on_step_end_tensor_inputs": ["prompt_embeds"]}, "prompt_embeds.*latents"),
        ({"image": PICTURE}, "belong together"),
        ({"num_prefix_rows": 2}, "belong together"),
        ({"image": PICTURE, "num_prefix_rows": 0}, "`num_prefix_rows` is 0.*4 rows.*1 to 3"),
        ({"image": PICTURE, "num_prefix_rows": 4}, "`num_prefix_rows` is 4"),
        ({"image": PICTURE, "num_prefix_rows": -1}, "`num_prefix_rows` is -1"),
        ({"image": PICTURE, "num_prefix_rows": 1.5}, "`num_prefix_rows` is 1.5"),
        ({"image": [PICTURE] * 3, "num_prefix_rows": 2}, "3 pictures for 1 prompts"),
        ({"image": "fox.png", "num_prefix_rows": 2}, "builtins.str"),
        ({"image": Image.new("F", (8, 8)), "num_prefix_rows": 2}, "mode 'F'"),
        ({"image": np.zeros((3, 8, 8)), "num_prefix_rows": 2}, "height x width x channels"),
        ({"image": PICTURE, "num_prefix_rows": 2, "latents": ONE}, "Both `image` and `latents`"),
        ({"latents": [[0, 1]]}, "list"),
        ({"latents": torch.zeros(1, 4)}, "torch.float32"),
        ({"latents": torch.zeros(1, 4, dtype=torch.bool)}, "torch.bool"),
        ({"latents": ONE.repeat(2, 1)}, "1 x k or 1 x rows x 4"),
        ({"latents": torch.zeros(1, 2, 5, dtype=torch.long)}, r"\(1, 2, 5\)"),
        ({"latents": torch.zeros(4, dtype=torch.long)}, r"\(4,\)"),
        ({"latents": ONE[:, :0]}, "1 to 16 tokens"),
        ({"latents": torch.zeros(1, 17, dtype=torch.long)}, "1 to 16 tokens"),
        ({"latents": torch.zeros(1, 5, 4, dtype=torch.long)}, "1 to 16 tokens"),
        ({"latents": ONE + 16}, r"\[0, 16\)"),
        ({"latents": ONE - 1}, r"\[0, 16\)"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_refused(pipe, arguments, words):
    calls = []
    handle = pipe.prior.register_forward_pre_hook(lambda *args: calls.append(args))
    with pytest.raises(ValueError, match=words):
        pipe(**{"prompt": "a red fox", **arguments})
    handle.remove()
    assert calls == []


@pytest.mark.parametrize("prompt", ["", "  ", ["a red fox", ""]])
def test_the_empty_prompt_needs_caption_dropout(prompt):
    with pytest.raises(ValueError, match="caption dropout"):
        build_pipeline(caption_dropout=0.0)(prompt)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK"])
def test_pictures_of_other_modes_and_sizes_are_converted(pipe, mode):
    tokens = pipe("a red fox", image=PICTURE.convert(mode), num_prefix_rows=1, output_type="latent").images
    expected = pipe.image_processor.preprocess(PICTURE.convert(mode).convert("RGB")).pixel_values
    assert torch.equal(tokens[:, :1], pipe.dvae.encode(expected).tokens[:, :1])
