"""What people's votes say: captions won by majority with intervals, ties, agreement, and the paper's bar chart.

Counts what `votes.py` has kept; nothing here is random.
"""

import statistics
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence

import matplotlib.figure
from report_parts import make_table

from evaluation.votes import ANSWERS, NEITHER, Study
from hf_dalle.metrics import wilson_interval


NO_MAJORITY = "no majority"
# The paper, section 3.1: the share of 1,000 captions of MS-COCO that DALL-E won by majority of five against DF-GAN.
PAPER = {"realism": 0.900, "match": 0.933}
WORDS = {"realism": "more realistic", "match": "better match of the caption"}


def count_votes(study: Study, votes: Sequence[dict], exclude: Iterable[str] = ()) -> dict:
    """
    Counts the votes of a study.

    A caption's votes are the first `num_voters` of different voters; captions with fewer are not counted. Its majority
    is an answer of more than half of them.

    Args:
        study ([`Study`]), votes (`list[dict]`): as `read_votes` gives them.
        exclude (`Iterable[str]`, *optional*): voters whose votes do not count.

    Returns:
        `dict`: JSON. In `"questions"`, for each of `ANSWERS`: `"captions"`, by answer those won, as count, share and
        95 % interval; `"votes"`, by answer its share; `"histograms"`, by model how many captions gave it 0, 1, ...
        votes; `"agreement"`. And `"left"`, the share of votes for the picture on the left, and `"voters"`.

    Raises:
        ValueError: if a voter to exclude has not voted, or no caption has all its votes.
    """
    exclude = set(exclude)
    unknown = exclude - {vote["voter"] for vote in votes}
    if unknown:
        raise ValueError(f"There is no vote of voter {sorted(unknown)[0]!r}, who is to be excluded.")
    first = {}  # a voter's first vote on a row stands
    for vote in votes:
        if vote["voter"] not in exclude:
            first.setdefault((vote["row"], vote["voter"]), vote)
    of_row = defaultdict(list)
    for vote in first.values():
        of_row[vote["row"]].append(vote)
    complete = [of_row[row][: study.num_voters] for row in study.captions if len(of_row[row]) >= study.num_voters]
    if not complete:
        most = max(map(len, of_row.values()), default=0)
        raise ValueError(f"No caption has its {study.num_voters} votes yet; the most that one has are {most}.")
    counted = [vote for row in complete for vote in row]
    return {
        "study": study.name,
        "models": list(study.models),
        "num_voters": study.num_voters,
        "num_captions": len(study.captions),
        "num_complete": len(complete),
        "num_votes": len(first),
        "num_not_counted": len(first) - len(counted),
        "num_repeated": len([vote for vote in votes if vote["voter"] not in exclude]) - len(first),
        "excluded": sorted(exclude),
        "questions": {question: _count_question(study, complete, question) for question in ANSWERS},
        "left": _share(sum(vote["realism"] == vote["left"] for vote in counted), len(counted)),
        "voters": _describe_voters(of_row),
    }


def _count_question(study: Study, complete: list[list[dict]], question: str) -> dict:
    answers = [*study.models, *([NEITHER] if NEITHER in ANSWERS[question] else [])]
    tallies = [Counter(vote[question] for vote in row) for row in complete]
    won = Counter(find_majority(tally) for tally in tallies)
    table = [[tally[answer] for answer in answers] for tally in tallies]
    num_votes = sum(map(sum, table))
    return {
        "captions": {answer: _share(won[answer], len(complete)) for answer in [*answers, NO_MAJORITY]},
        "votes": {answer: sum(tally[answer] for tally in tallies) / num_votes for answer in answers},
        "histograms": {
            model: [sum(tally[model] == number for tally in tallies) for number in range(study.num_voters + 1)]
            for model in study.models
        },
        "agreement": measure_agreement(table) if study.num_voters > 1 else None,
    }


def find_majority(tally: Counter) -> str:
    """The answer of more than half of the votes, or `NO_MAJORITY`."""
    answer, number = tally.most_common(1)[0]
    return answer if 2 * number > tally.total() else NO_MAJORITY


def _share(count: int, total: int) -> dict:
    low, high = wilson_interval(count, total)
    return {"count": count, "share": count / total, "low": low, "high": high}


def measure_agreement(table: Sequence[Sequence[int]]) -> dict:
    """
    How far voters agree.

    Args:
        table (`Sequence[Sequence[int]]`): captions x answers, how many voters gave the answer; each row of the same
            sum, 2 or more.

    Returns:
        `dict`: `"pairs"`, the share of pairs of voters on a caption who gave the same answer, and `"fleiss_kappa"`,
        what of it is above chance: (pairs - chance) / (1 - chance), chance that of the answers' overall shares; `None`
        where all votes are one answer.
    """
    num_voters = sum(table[0])
    pairs = sum(sum(n * (n - 1) for n in row) for row in table) / (len(table) * num_voters * (num_voters - 1))
    chance = sum((sum(column) / (len(table) * num_voters)) ** 2 for column in zip(*table, strict=True))
    return {"pairs": pairs, "fleiss_kappa": None if chance == 1 else (pairs - chance) / (1 - chance)}


def _describe_voters(of_row: dict[str, list[dict]]) -> list[dict]:
    """Of each voter the votes, the median of their seconds, and how often another on the same caption agreed."""
    seconds, same = defaultdict(list), defaultdict(list)
    for row in of_row.values():
        for vote in row:
            seconds[vote["voter"]].append(vote["seconds"])
            for other in row:
                if other is not vote:
                    same[vote["voter"]] += [vote[question] == other[question] for question in ANSWERS]
    return [
        {
            "voter": voter,
            "num_votes": len(times),
            "median_seconds": statistics.median(times),
            "agreement": statistics.fmean(same[voter]) if same[voter] else None,
        }
        for voter, times in sorted(seconds.items(), key=lambda item: (-len(item[1]), item[0]))
    ]


# --------------------------------------------------------------------------------------------------------- the report


def describe(figures: dict) -> str:
    """The counts in Markdown, with the chart as `votes.png`."""
    first, second = figures["models"]
    questions = [figures["questions"][question] for question in WORDS]
    rows = [
        [answer, *(_cell(question["captions"].get(answer)) for question in questions)]
        for answer in (first, second, NEITHER, NO_MAJORITY)
    ]
    for words, key in (("pairs of voters that agree", "pairs"), ("Fleiss' kappa", "fleiss_kappa")):
        rows.append([words, *(_agreement(question, key) for question in questions)])
    lines = [
        f"# {figures['study']}: people's votes",
        "",
        f"{first} against {second}: {figures['num_complete']:,} of {figures['num_captions']:,} captions have"
        f" {figures['num_voters']} votes of different voters. The majority is the answer of more than half of them; in"
        " brackets 95 % intervals of the share of captions (Wilson), which say nothing of other voters.",
        "",
        make_table(["", *WORDS.values()], rows),
        "",
        "![Captions won by majority](votes.png)",
        "",
        *_describe_rest(figures),
    ]
    return "\n".join(lines) + "\n"


def _describe_rest(figures: dict) -> list[str]:
    left = figures["left"]
    lines = [
        f"The picture on the left was called more realistic in {_cell(left)} of the votes; which one stands there is"
        " chosen at random for each voter and caption."
    ]
    if figures["num_not_counted"]:
        lines.append(f"{figures['num_not_counted']} votes more are on captions without all votes, or beyond them.")
    if figures["excluded"]:
        lines.append(f"Left out: the votes of {', '.join(figures['excluded'])}.")
    if figures.get("num_cut"):
        lines.append(f"{figures['num_cut']} lines of the file were cut by a crash and are no votes.")
    rows = []
    for voter in figures["voters"]:
        agreement = "" if voter["agreement"] is None else f"{100 * voter['agreement']:.0f} %"
        rows.append([voter["voter"], voter["num_votes"], f"{voter['median_seconds']:.1f}", agreement])
    return [*lines, "", make_table(["voter", "votes", "seconds, median", "agrees with others"], rows)]


def _cell(share: dict | None) -> str:
    if share is None:
        return ""
    return f"{100 * share['share']:.1f} % [{100 * share['low']:.1f}, {100 * share['high']:.1f}]"


def _agreement(question: dict, key: str) -> str:
    value = (question["agreement"] or {}).get(key)
    return "" if value is None else f"{value:.2f}"


def draw_chart(figures: dict) -> matplotlib.figure.Figure:
    """
    The paper's bar chart: for each question the share of captions that each model won by majority, with
    intervals, and what is left; beside it the paper's figures of DALL-E against DF-GAN.
    """
    first, second = figures["models"]
    bars = [
        (first, [first], "tab:blue"),
        (second, [second], "tab:orange"),
        ("neither, or no majority", [NEITHER, NO_MAJORITY], "lightgrey"),
    ]
    figure = matplotlib.figure.Figure(figsize=(7, 3.8), layout="constrained")
    axes = figure.subplots()
    width = 0.2
    for place, (label, answers, colour) in enumerate(bars):
        shares = [_sum_shares(figures, question, answers) for question in WORDS]
        centres = [number + (place - 1.5) * width for number in range(len(WORDS))]
        heights = [100 * share["share"] for share in shares]
        ends = [[100 * (share["share"] - share["low"]) for share in shares]]
        ends += [[100 * (share["high"] - share["share"]) for share in shares]]
        axes.bar(centres, heights, width, yerr=ends, capsize=3, color=colour, edgecolor="black", label=label)
        _write_shares(axes, centres, heights, [100 * share["high"] for share in shares])
    centres = [number + 1.5 * width for number in range(len(WORDS))]
    heights = [100 * PAPER[question] for question in WORDS]
    words = "the paper: DALL-E against DF-GAN,\n1,000 captions of MS-COCO"
    axes.bar(centres, heights, width, color="white", edgecolor="black", hatch="//", label=words)
    _write_shares(axes, centres, heights, heights)
    axes.set(ylim=(0, 112), yticks=range(0, 101, 20), ylabel="captions won by majority, %")
    axes.set_xticks(range(len(WORDS)), WORDS.values())
    axes.set_title(
        f"{figures['num_complete']:,} captions, {figures['num_voters']} voters each; 95 % intervals", fontsize=10
    )
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=2, fontsize=8, frameon=False)
    return figure


def _sum_shares(figures: dict, question: str, answers: list[str]) -> dict:
    captions = figures["questions"][question]["captions"]
    return _share(sum(captions[answer]["count"] for answer in answers if answer in captions), figures["num_complete"])


def _write_shares(axes, centres: list[float], heights: list[float], tops: list[float]) -> None:
    for centre, height, top in zip(centres, heights, tops, strict=True):
        axes.text(centre, top + 1.5, f"{height:.1f}", ha="center", fontsize=8)
