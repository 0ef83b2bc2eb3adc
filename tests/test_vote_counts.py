"""Counting people's votes: majorities, Wilson's interval, ties, agreement by a published table; report and chart."""

import itertools
import math
from collections import Counter
from fractions import Fraction

import numpy as np
import pytest
from evaluation.vote_counts import (
    NO_MAJORITY,
    PAPER,
    count_votes,
    describe,
    draw_chart,
    find_majority,
    measure_agreement,
)
from evaluation.votes import NEITHER
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_votes import make_study, make_vote

from hf_dalle.metrics import wilson_interval


def make_votes(table):
    """Votes of `{row: [(realism, match), ...]}`, each by another voter."""
    return [
        make_vote(row, f"voter-{number}", realism, match)
        for row, answers in table.items()
        for number, (realism, match) in enumerate(answers)
    ]


def test_a_study_worked_by_hand():
    ours, theirs = "ours", "theirs"
    votes = make_votes(
        {
            "row-0": [(ours, ours)] * 5,
            "row-1": [(ours, ours)] * 3 + [(theirs, NEITHER)] * 2,
            "row-2": [(ours, ours)] * 2 + [(theirs, theirs)] * 2 + [(theirs, NEITHER)],
            "row-3": [(theirs, NEITHER)] * 4,  # not complete
        }
    )
    figures = count_votes(make_study(5), votes)
    assert (figures["num_captions"], figures["num_complete"], figures["num_votes"]) == (5, 3, 19)
    assert (figures["num_not_counted"], figures["num_repeated"]) == (4, 0)
    realism, match = (figures["questions"][name] for name in ("realism", "match"))
    counts = {name: share["count"] for name, share in realism["captions"].items()}
    assert counts == {ours: 2, theirs: 1, NO_MAJORITY: 0}
    counts = {name: share["count"] for name, share in match["captions"].items()}
    assert counts == {ours: 2, theirs: 0, NEITHER: 0, NO_MAJORITY: 1}
    assert realism["votes"] == {ours: 10 / 15, theirs: 5 / 15}
    assert match["votes"] == {ours: 10 / 15, theirs: 2 / 15, NEITHER: 3 / 15}
    assert realism["histograms"] == {ours: [0, 0, 1, 1, 0, 1], theirs: [1, 0, 1, 1, 0, 0]}
    # pairs of 10 on each caption: 10; 3 + 1; 1 + 3
    assert realism["agreement"]["pairs"] == pytest.approx(18 / 30)
    chance = (10**2 + 5**2) / 15**2
    assert realism["agreement"]["fleiss_kappa"] == pytest.approx((18 / 30 - chance) / (1 - chance))
    assert match["agreement"]["pairs"] == pytest.approx((10 + 4 + 2) / 30)
    assert figures["left"]["share"] == 10 / 15  # `ours` stands on the left in all of them
    first = figures["voters"][0]
    assert first["voter"] == "voter-0" and first["num_votes"] == 4 and first["median_seconds"] == 4.0
    # of others' answers to both questions: rows 0 to 3
    assert first["agreement"] == pytest.approx((8 + 2 * 2 + 2 * 1 + 2 * 3) / (2 * (4 + 4 + 4 + 3)))


def test_only_the_first_votes_of_different_voters_count():
    votes = make_votes({"row-0": [("ours", "ours")] * 3 + [("theirs", "theirs")] * 4})
    figures = count_votes(make_study(num_voters=3), votes)
    assert figures["questions"]["realism"]["captions"]["ours"]["count"] == 1
    assert (figures["num_votes"], figures["num_not_counted"]) == (7, 4)
    # the same voter's lines again, as of files put together, change nothing
    again = [make_vote("row-0", "voter-0", "theirs", "theirs"), *reversed(votes[:3])]
    doubled = count_votes(make_study(num_voters=3), votes + again)
    assert doubled == {**figures, "num_repeated": 4}
    left_out = count_votes(make_study(num_voters=3), votes + again, exclude=["voter-0", "voter-1"])
    assert left_out["questions"]["realism"]["captions"]["theirs"]["count"] == 1
    assert left_out["excluded"] == ["voter-0", "voter-1"] and left_out["num_repeated"] == 1


def test_what_cannot_be_counted_is_said():
    votes = make_votes({"row-0": [("ours", "ours")] * 4})
    with pytest.raises(ValueError, match="No caption has its 5 votes yet; the most that one has are 4"):
        count_votes(make_study(), votes)
    with pytest.raises(ValueError, match="'somebody', who is to be excluded"):
        count_votes(make_study(), votes, exclude=["somebody"])
    single = count_votes(make_study(num_voters=1), votes)
    assert single["questions"]["match"]["agreement"] is None and "kappa |  |  |" in describe(single)


@pytest.mark.parametrize(
    ("tally", "winner"),
    [
        ({"ours": 3, "theirs": 2}, "ours"),
        ({"ours": 2, "theirs": 2, NEITHER: 1}, NO_MAJORITY),
        ({"ours": 2, "theirs": 1, NEITHER: 1}, NO_MAJORITY),
        ({NEITHER: 3, "ours": 2}, NEITHER),
        ({"ours": 1, "theirs": 1}, NO_MAJORITY),
    ],
)
def test_majorities(tally, winner):
    assert find_majority(Counter(tally)) == winner


@given(st.integers(1, 400).flatmap(lambda total: st.tuples(st.integers(0, total), st.just(total))))
def test_wilsons_ends_are_where_the_score_test_turns(count_and_total):
    """The ends solve (count/total - p)^2 = z^2 p (1 - p) / total, and the share lies between."""
    count, total = count_and_total
    low, high = wilson_interval(count, total)
    share = count / total
    assert 0 <= low <= share <= high <= 1
    for end in (low, high):
        assert (share - end) ** 2 == pytest.approx(1.959963984540054**2 * end * (1 - end) / total, abs=1e-12)
    assert (1 - high, 1 - low) == pytest.approx(wilson_interval(total - count, total), abs=1e-12)


def test_wilson_against_published_values():
    # Newcombe (1998), table I, method 3: 81 of 263, 15 of 148, 0 of 20, 1 of 29
    for count, total, low, high in (
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ):
        assert wilson_interval(count, total) == pytest.approx((low, high), abs=5e-5)


def test_wilson_covers():
    """Over all outcomes of 20 captions, the interval holds the true share about 95 % of the time."""
    covered = []
    for percent in range(2, 99):
        p = percent / 100
        chances = [math.comb(20, k) * p**k * (1 - p) ** (20 - k) for k in range(21)]
        intervals = [wilson_interval(k, 20) for k in range(21)]
        covered.append(sum(c for c, (low, high) in zip(chances, intervals, strict=True) if low <= p <= high))
    assert sum(covered) / len(covered) == pytest.approx(0.95, abs=0.01)


def test_fleiss_kappa_of_a_published_table():
    """Ten subjects, fourteen raters, five categories: the worked example of the article "Fleiss' kappa"."""
    table = [
        *([0, 0, 0, 0, 14], [0, 2, 6, 4, 2], [0, 0, 3, 5, 6], [0, 3, 9, 2, 0], [2, 2, 8, 1, 1]),
        *([7, 7, 0, 0, 0], [3, 2, 6, 3, 0], [2, 5, 3, 2, 2], [6, 5, 2, 1, 0], [0, 2, 2, 3, 7]),
    ]
    agreement = measure_agreement(table)
    assert agreement["pairs"] == pytest.approx(0.378, abs=5e-4)
    assert agreement["fleiss_kappa"] == pytest.approx(0.210, abs=5e-4)


@settings(max_examples=50)
@given(st.lists(st.lists(st.integers(0, 2), min_size=5, max_size=5), min_size=1, max_size=8))
def test_agreement_is_that_of_all_pairs(answers):
    table = [[row.count(answer) for answer in range(3)] for row in answers]
    agreement = measure_agreement(table)
    pairs = [a == b for row in answers for a, b in itertools.combinations(row, 2)]
    assert agreement["pairs"] == pytest.approx(sum(pairs) / len(pairs))
    everyone = [answer for row in answers for answer in row]
    chance = sum(Fraction(everyone.count(answer), len(everyone)) ** 2 for answer in range(3))
    if chance == 1:
        assert agreement["fleiss_kappa"] is None
    else:
        assert agreement["fleiss_kappa"] == pytest.approx((agreement["pairs"] - float(chance)) / float(1 - chance))


def test_agreement_by_chance_is_no_agreement():
    rng = np.random.default_rng(0)
    table = rng.multinomial(5, [0.5, 0.3, 0.2], size=4000)
    agreement = measure_agreement(table.tolist())
    assert agreement["fleiss_kappa"] == pytest.approx(0, abs=0.01)
    assert agreement["pairs"] == pytest.approx(0.38, abs=0.01)


def test_the_bars_and_their_intervals_are_the_shares():
    figures = count_votes(
        make_study(),
        make_votes({f"row-{i}": [("ours" if i else "theirs", NEITHER if i < 2 else "ours")] * 5 for i in range(4)}),
    )
    (axes,) = draw_chart(figures).axes
    heights = [round(bar.get_height(), 6) for bar in axes.patches]
    assert heights == [75, 50, 25, 0, 0, 50, 90, 93.3]  # ours, theirs, the rest, the paper; of both questions each
    assert PAPER == {"realism": 0.9, "match": 0.933}
    ends = [segment[:, 1].tolist() for lines in axes.collections for segment in lines.get_segments()]
    for (low, high), share in zip(ends, (3 / 4, 2 / 4, 1 / 4, 0, 0, 2 / 4), strict=True):
        assert (low / 100, high / 100) == pytest.approx(wilson_interval(round(4 * share), 4))
