"""The file of votes and the ballots: nothing confirmed is lost, nobody is asked twice, captions get their voters."""

import itertools
import json
import multiprocessing
import os
import signal
import stat
import threading
import time
from collections import Counter

import pytest
from evaluation.ballots import Ballots, load_key
from evaluation.votes import NEITHER, VoteFile, read_study, read_votes
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_votes import MODELS, make_study, make_vote


KEY = bytes(range(32))


# ------------------------------------------------------------------------------------------------------------ the file


def test_votes_are_read_as_they_were_written(tmp_path):
    study, path = make_study(), tmp_path / "new" / "votes.jsonl"
    file = VoteFile(path, study)
    votes = [make_vote(row, voter, match=NEITHER) for row in ("row-1", "row-0") for voter in "ba"]
    for vote in votes:
        assert file.append(vote)
    assert read_votes(path) == (study, votes, 0) and read_study(path) == study
    assert file.num_votes == {"row-0": 2, "row-1": 2} and file.rows_of["a"] == {"row-0", "row-1"}


def test_a_second_vote_of_a_voter_on_a_caption_is_not_written(tmp_path):
    path = tmp_path / "votes.jsonl"
    files = [VoteFile(path, make_study()) for _ in range(2)]  # as two servers would
    assert files[0].append(make_vote(realism="ours"))
    assert not files[1].append(make_vote(realism="theirs")) and not files[0].append(make_vote(realism="theirs"))
    assert files[1].append(make_vote(voter="b"))
    files[0].refresh()
    assert files[0].num_votes == {"row-0": 2}
    assert [vote["realism"] for vote in read_votes(path)[1]] == ["ours", "ours"]


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_whatever_a_crash_cut_the_whole_votes_stay_and_voting_goes_on(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("cut") / "votes.jsonl"
    study = make_study()
    votes = [make_vote(f"row-{i}", voter) for i in range(2) for voter in "ab"]
    file = VoteFile(path, study)
    for vote in votes:
        file.append(vote)
    file.close()
    content = path.read_bytes()
    cut = data.draw(st.integers(0, len(content)))
    path.write_bytes(content[:cut])
    num_whole = max(0, content[:cut].count(b"\n") - 1)

    again = VoteFile(path, study)
    last = make_vote("row-3", "c")
    assert again.append(last)
    # a vote of which only the line's end is missing is whole
    kept = read_votes(path)[1]
    assert kept[:num_whole] == votes[:num_whole] and kept[-1] == last
    assert kept[num_whole:-1] in ([], votes[num_whole : num_whole + 1])
    for vote in votes:
        assert again.append(vote) == (vote not in kept)
    assert sorted(map(str, read_votes(path)[1])) == sorted(map(str, [*votes, last]))
    assert again.num_votes == VoteFile(path, study).num_votes == Counter(vote["row"] for vote in [*votes, last])


def append_votes(path, voters):
    file = VoteFile(path, make_study())
    for voter in voters:
        for row in make_study().captions:
            file.append(make_vote(row, voter))


def test_processes_and_threads_vote_into_one_file(tmp_path):
    path = tmp_path / "votes.jsonl"
    context = multiprocessing.get_context("fork")
    groups = [[f"{group}-{i}" for i in range(10)] + ["same"] for group in range(3)]
    processes = [context.Process(target=append_votes, args=(path, voters)) for voters in groups]
    for process in processes:
        process.start()
    file = VoteFile(path, make_study())
    threads = [
        threading.Thread(target=lambda n=n: [file.append(make_vote("row-0", f"t{n}-{i}")) for i in range(10)])
        for n in range(4)
    ]
    for thread in threads:
        thread.start()
    for worker in [*processes, *threads]:
        worker.join()
    _, votes, num_cut = read_votes(path)
    assert num_cut == 0 and len(votes) == 3 * 10 * 4 + 4 + 4 * 10
    assert len({(vote["row"], vote["voter"]) for vote in votes}) == len(votes)


def confirm_votes(path, confirmed):
    file = VoteFile(path, make_study(1))
    with open(confirmed, "ab", buffering=0) as log:
        for number in itertools.count():
            file.append(make_vote(voter=f"{os.getpid()}-{number}"))
            log.write(f"{os.getpid()}-{number}\n".encode())


def test_a_process_that_is_killed_loses_no_vote_that_it_confirmed(tmp_path):
    context = multiprocessing.get_context("fork")
    path, confirmed = tmp_path / "votes.jsonl", tmp_path / "confirmed.txt"
    for number in range(3):
        process = context.Process(target=confirm_votes, args=(path, confirmed))
        process.start()
        while not confirmed.exists() or confirmed.read_bytes().count(b"\n") < 20 * (number + 1):
            assert process.is_alive()
            time.sleep(0.002)
        os.kill(process.pid, signal.SIGKILL)
        process.join()
    voters = [vote["voter"] for vote in read_votes(path)[1]]
    assert len(set(voters)) == len(voters) and set(confirmed.read_text().split()) <= set(voters)


def test_a_full_disk_is_said_and_the_vote_can_be_repeated(tmp_path):
    resource = pytest.importorskip("resource")
    path = tmp_path / "votes.jsonl"
    file = VoteFile(path, make_study())
    file.append(make_vote())
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 20, before[1]))
        with pytest.raises(OSError):
            file.append(make_vote(voter="b"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert read_votes(path)[1:] == ([make_vote()], 1)  # 20 bytes of it are there
    assert file.append(make_vote(voter="b")) and file.append(make_vote(voter="c"))
    assert [vote["voter"] for vote in read_votes(path)[1]] == ["a", "b", "c"]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_voters": 3}, r"num_voters \(5, now 3\)"),
        ({"models": ("ours", "others")}, "models"),
        ({"captions": {"row-0": "other"}}, "captions"),
        ({"fingerprint": "other"}, "fingerprint"),
    ],
)
def test_votes_of_another_study_are_not_mixed_in(tmp_path, changes, words):
    VoteFile(tmp_path / "votes.jsonl", make_study()).append(make_vote())
    before = (tmp_path / "votes.jsonl").read_bytes()
    with pytest.raises(ValueError, match=f"another study; different: .*{words}"):
        VoteFile(tmp_path / "votes.jsonl", make_study(**changes))
    assert (tmp_path / "votes.jsonl").read_bytes() == before


@pytest.mark.parametrize("content", [b"notes\n", b"n", b'{"name": "x"}\n', b"[1]\n", b'{"models": 3}\n', b"\xff\n"])
def test_a_file_that_holds_something_else_is_left_alone(tmp_path, content):
    path = tmp_path / "notes.txt"
    path.write_bytes(content)
    for act in (lambda: VoteFile(path, make_study()), lambda: read_votes(path)):
        with pytest.raises(ValueError, match="no file of votes"):
            act()
    assert path.read_bytes() == content


@pytest.mark.parametrize(
    "change",
    [{"realism": NEITHER}, {"match": "left"}, {"row": "row-9"}, {"seconds": "4"}, {"left": 1}, {"row": ["row-0"]}],
)
def test_a_line_that_is_no_vote_of_the_study_is_named(tmp_path, change):
    path = tmp_path / "votes.jsonl"
    VoteFile(path, make_study()).append(make_vote())
    with path.open("a") as file:
        file.write(json.dumps({**make_vote(), **change}) + "\n")
    with pytest.raises(ValueError, match="line 3: .* is no vote of the study 'tiny'"):
        read_votes(path)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_voters": 4}, "odd"),
        ({"num_voters": -1}, "odd"),
        ({"models": ("ours", "ours")}, "two models"),
        ({"models": ("ours", "neither")}, "two models"),
        ({"captions": {}}, "captions"),
    ],
)
def test_studies_that_cannot_be(changes, words):
    with pytest.raises(ValueError, match=words):
        make_study(**changes)


# --------------------------------------------------------------------------------------------------------- the ballots


def make_ballots(path, num_captions=4, num_voters=5, max_votes=50, **changes):
    study = make_study(num_captions, num_voters)
    return Ballots(study, VoteFile(path, study), changes.pop("key", KEY), max_votes, **changes)


@settings(max_examples=25, deadline=None)
@given(
    num_captions=st.integers(1, 6),
    num_voters=st.sampled_from([1, 3, 5]),
    max_votes=st.integers(1, 6),
    order=st.lists(st.integers(0, 6), max_size=80),
)
def test_each_caption_gets_its_voters_and_none_twice(tmp_path_factory, num_captions, num_voters, max_votes, order):
    path = tmp_path_factory.mktemp("ballots") / "votes.jsonl"
    ballots = make_ballots(path, num_captions, num_voters, max_votes)
    voters, open_ballots = [ballots.admit() for _ in range(7)], {}
    for number in order:  # in any order voters ask, and answer what is open before them
        voter = voters[number]
        if voter in open_ballots:
            assert ballots.answer(voter, open_ballots.pop(voter).token, realism="left", match="neither")
        else:
            ballot = ballots.ask(voter)
            if ballot is not None:
                open_ballots[voter] = ballot
    votes = read_votes(path)[1]
    of_row = Counter(vote["row"] for vote in votes)
    of_row.update(ballot.row for ballot in open_ballots.values())
    assert max(of_row.values(), default=0) <= num_voters
    assert len({(vote["row"], vote["voter"]) for vote in votes}) == len(votes)
    assert max(Counter(vote["voter"] for vote in votes).values(), default=0) <= max_votes
    for voter in voters:  # whoever gets nothing has had their share, or all is taken
        if voter not in open_ballots and ballots.ask(voter) is None:
            done, total = ballots.progress(voter)
            own = {vote["row"] for vote in votes if vote["voter"] == ballots._voter(voter)}
            assert done == len(own) and total == min(max_votes, num_captions)
            taken = all(of_row[row] >= num_voters for row in ballots.study.captions if row not in own)
            assert done == max_votes or taken
        else:
            ballots.leases.pop(ballots._voter(voter), None)


def test_with_enough_voters_every_caption_is_complete(tmp_path):
    ballots = make_ballots(tmp_path / "votes.jsonl", num_captions=6, num_voters=3, max_votes=4)
    for _ in range(8):  # 6 * 3 votes, at most 4 a voter
        voter = ballots.admit()
        while (ballot := ballots.ask(voter)) is not None:
            ballots.answer(voter, ballot.token, realism="right", match="left")
    assert ballots.file.num_votes == dict.fromkeys(ballots.study.captions, 3)


def test_captions_that_have_votes_come_first_and_beginners_differ(tmp_path):
    ballots = make_ballots(tmp_path / "votes.jsonl", num_captions=40)
    first = ballots.ask(ballots.admit())
    others = [ballots.ask(ballots.admit()) for _ in range(4)]
    assert {ballot.row for ballot in others} == {first.row}  # five voters for one caption
    next_five = {ballots.ask(ballots.admit()).row for _ in range(5)}
    assert len(next_five) == 1 and first.row not in next_five
    starts = {make_ballots(tmp_path / f"{i}.jsonl", 40).ask(ballots.admit()).row for i in range(12)}
    assert len(starts) > 6


def test_a_voter_keeps_the_open_caption_over_reloads_tabs_and_a_new_start(tmp_path):
    ballots = make_ballots(tmp_path / "votes.jsonl", num_captions=20)
    voter = ballots.admit()
    one, two = ballots.ask(voter), ballots.ask(voter)
    assert (one.row, one.left) == (two.row, two.left)
    again = make_ballots(tmp_path / "votes.jsonl", num_captions=20)
    assert again.is_voter(voter) and again.name == ballots.name and again.ask(voter).row == one.row
    assert again.answer(voter, one.token, realism="left", match="right")  # shown before the new start
    assert not again.answer(voter, two.token, realism="right", match="right")  # the other tab
    (vote,) = read_votes(tmp_path / "votes.jsonl")[1]
    assert vote["realism"] == one.left == vote["left"] and vote["match"] == one.right != one.left
    assert vote["voter"] in voter and again.ask(voter).row != one.row


def test_an_open_caption_goes_to_another_after_a_while_and_a_late_answer_counts(tmp_path):
    now = [1000.0]
    ballots = make_ballots(tmp_path / "votes.jsonl", 1, 1, lease_seconds=60, clock=lambda: now[0])
    slow, quick = ballots.admit(), ballots.admit()
    opened = ballots.ask(slow)
    assert ballots.ask(quick) is None
    now[0] += 61
    ballot = ballots.ask(quick)
    assert ballot is not None
    now[0] += 2.5
    assert ballots.answer(quick, ballot.token, realism="left", match="left")
    assert ballots.ask(slow) is None
    assert ballots.answer(slow, opened.token, realism="left", match="left")
    assert [vote["seconds"] for vote in read_votes(tmp_path / "votes.jsonl")[1]] == [2.5, 63.5]


def test_the_sides_are_even_and_follow_from_the_secret(tmp_path):
    ballots = make_ballots(tmp_path / "votes.jsonl", num_captions=1)
    sides = [ballots._order(f"voter-{i}", "row-0") for i in range(2000)]
    assert {*map(frozenset, sides)} == {frozenset(MODELS)}
    assert abs(sum(left == "ours" for left, _ in sides) - 1000) < 5 * 500**0.5  # 5 standard deviations
    other = make_ballots(tmp_path / "votes.jsonl", num_captions=1, key=bytes(32))
    assert sides != [other._order(f"voter-{i}", "row-0") for i in range(2000)]


def test_neither_voters_nor_ballots_can_be_made_up(tmp_path):
    ballots = make_ballots(tmp_path / "votes.jsonl")
    voter, other = ballots.admit(), ballots.admit()
    for token in ("", "x", voter[:-1] + "z", "\u00e9" * 60, voter + "0", None, 7, [voter]):
        assert not ballots.is_voter(token)
        with pytest.raises(ValueError, match="not known here"):
            ballots.ask(token)
    own = ballots.ask(voter).token
    forged = make_ballots(tmp_path / "votes.jsonl", key=bytes(32)).ask
    with pytest.raises(ValueError, match="not known here"):
        forged(voter)
    for ballot in ("", None, own[:-1] + "9", ballots.ask(other).token, voter):
        with pytest.raises(ValueError, match="not given to this voter"):
            ballots.answer(voter, ballot, realism="left", match="left")
    for answers in (
        {"realism": "neither", "match": "left"},
        {"realism": "left", "match": "ours"},
        {"realism": "left"},
        {"realism": "left", "match": "left", "more": "left"},
    ):
        with pytest.raises(ValueError, match="is not answered by"):
            ballots.answer(voter, own, **answers)
    assert read_votes(tmp_path / "votes.jsonl")[1] == []
    assert ballots.answer(voter, own, realism="left", match="left")


def test_a_token_tells_neither_model_nor_side(tmp_path):
    ballots = make_ballots(tmp_path / "votes.jsonl")
    for _ in range(10):
        ballot = ballots.ask(ballots.admit())
        assert not any(word in ballot.token for word in (*MODELS, "left", "right"))


def test_the_secret_is_made_once_for_its_owner_alone(tmp_path):
    path = tmp_path / "new" / "votes.key"
    key = load_key(path)
    assert len(key) == 32 and load_key(path) == key != load_key(tmp_path / "other.key")
    assert stat.S_IMODE(path.stat().st_mode) == 0o600 and [p.name for p in path.parent.iterdir()] == ["votes.key"]
    path.write_bytes(b"short")
    with pytest.raises(ValueError, match="32 bytes"):
        load_key(path)


def test_voters_at_once(tmp_path):
    ballots = make_ballots(tmp_path / "votes.jsonl", num_captions=6, num_voters=3)

    def vote():
        voter = ballots.admit()
        while (ballot := ballots.ask(voter)) is not None:
            ballots.answer(voter, ballot.token, realism="left", match="neither")

    threads = [threading.Thread(target=vote) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    votes = read_votes(tmp_path / "votes.jsonl")[1]
    assert Counter(vote["row"] for vote in votes) == dict.fromkeys(ballots.study.captions, 3)
    assert len({(vote["row"], vote["voter"]) for vote in votes}) == 18
