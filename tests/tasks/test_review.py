"""The review of a constitution: labels follow, nothing is lost, and who decided changes nothing."""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from review_world import clustered_attempt, clustering, clusters_of

from constitutions.constitution import Constitution, load, load_draft, principle_id
from constitutions.errors import UserError
from constitutions.review import Decision, decisions_between
from tasks.clustering.support import tail_of
from tasks.clustering.wordings import with_wordings
from tasks.record.record import Attempt, Record
from tasks.record.slot import Slot
from tasks.review import (
    BY,
    NOTE,
    ReviewDecision,
    ReviewSettings,
    read_verdict,
    recorded_verdict,
    review,
    review_stage,
)
from tasks.rows import Labelled, Rejected

WARN, ASK, JOKE = (principle_id(text) for text in ("warn of risks", "ask back", "tell a joke"))
DROP = ReviewDecision(decisions=(Decision(id=JOKE, action="drop"),), by="ann", note="not funny")
ALL = ReviewDecision(
    decisions=(
        Decision(id=WARN, action="reword", text="warn of dangers"),
        Decision(id=ASK, action="merge", into=WARN),
        Decision(id=JOKE, action="drop"),
    ),
    added=("be brief",),
)


@pytest.fixture
def slot(workplace: Path) -> Slot:
    return Slot(Record("an-experiment", workplace / ".staple"), 1, seed=7)


@pytest.fixture
def clustered(slot: Slot) -> Attempt:
    return clustered_attempt(slot)


def run(slot: Slot, clustered: Attempt, verdict: ReviewDecision) -> Attempt:
    return review_stage(slot, ReviewSettings(enabled=True), clustered, verdict)


def test_approved_as_it_is_changes_nothing() -> None:
    labelled, constitution = clustering()
    done = review(labelled, constitution, ReviewDecision(by="ann"))
    assert (done.labelled, done.rejected, done.constitution) == (labelled, [], constitution)


def test_labels_follow_the_decisions() -> None:
    labelled, constitution = clustering()
    done = review(labelled, constitution, ALL)
    rows = {(row.prompt_id, row.sample): row for row in done.labelled}
    assert {row.label for row in done.labelled} == {"warn of dangers", "alert people"}
    assert {row.cluster for row in done.labelled} == {0}
    assert done.constitution.texts == ("warn of dangers", "be brief")
    assert all(row.replaced == (row.label != row.principle) for row in done.labelled)
    assert rows["0", 0].principle == "warn of risks"  # what the policy said stays on record
    assert {(r.reason, r.detail) for r in done.rejected} == {
        ("principle dropped in review", "tell a joke")
    }


def test_a_label_outside_the_constitution_is_not_overruled() -> None:
    """The log-probability test kept "alert people" for itself, in the cluster of "warn of risks"."""
    labelled, constitution = clustering()
    (outside,) = [row for row in labelled if row.label == "alert people"]
    done = review(labelled, constitution, ALL)
    (kept,) = [row for row in done.labelled if row.prompt_id == outside.prompt_id]
    assert (kept.label, kept.replaced, kept.cluster) == ("alert people", False, 0)
    gone = ReviewDecision(decisions=(Decision(id=WARN, action="drop"),))
    assert outside.prompt_id not in {
        r.prompt_id for r in review(labelled, constitution, gone).labelled
    }


def with_tail() -> tuple[list[Labelled], Constitution]:
    """The clustering whose last principle is outside of the constitution, in two clusters."""
    labelled, constitution = clustering()
    last = len(constitution.principles) - 1
    rows = [
        replace(r, label=r.principle, replaced=False, cluster=last + number % 2)
        if r.cluster == last
        else r
        for number, r in enumerate(labelled)
    ]
    there = [row for row in rows if row.cluster >= last]
    tail = tail_of(there, sum(row.weight for row in rows))
    kept = constitution.principles[:last]
    return rows, constitution.model_copy(update={"principles": kept, "tail": tail})


def test_the_tail_keeps_its_words_until_it_is_dropped_in_one_decision() -> None:
    labelled, constitution = with_tail()
    size = len(constitution.principles)
    tail = [row for row in labelled if row.cluster >= size]
    assert tail
    approved = review(labelled, constitution, ReviewDecision())
    assert (approved.labelled, approved.rejected) == (labelled, [])
    assert approved.constitution == constitution

    dropped = review(labelled, constitution, ReviewDecision(drop_tail=True))
    assert dropped.constitution.tail is None
    assert dropped.constitution.texts == constitution.texts
    assert [r.detail for r in dropped.rejected] == [f"the tail: {row.label}" for row in tail]
    assert len(dropped.labelled) + len(dropped.rejected) == len(labelled)
    assert all(row.cluster < size for row in dropped.labelled)


@pytest.mark.parametrize("drop_tail", [False, True])
def test_a_principle_of_the_tail_that_a_person_adds_is_no_longer_of_the_tail(
    drop_tail: bool,
) -> None:
    labelled, constitution = with_tail()
    size = len(constitution.principles)
    words = next(row.label for row in labelled if row.cluster >= size)
    theirs = {row.prompt_id for row in labelled if row.label == words}
    done = review(labelled, constitution, ReviewDecision(added=(words,), drop_tail=drop_tail))
    (number,) = [n for n, text in enumerate(done.constitution.texts) if text == words]
    assert done.constitution.principles[number].support == len(theirs)
    assert {row.prompt_id for row in done.labelled if row.cluster == number} == theirs
    others = {row.label for row in labelled if row.cluster >= size} - {words}
    left = done.constitution.tail
    assert (left.principles if left else 0) == (0 if drop_tail else len(others))


def test_the_tail_stays_behind_a_constitution_that_shrinks() -> None:
    labelled, constitution = with_tail()
    merged, whole = constitution.principles[1], constitution.principles[0]
    decision = Decision(id=merged.id, action="merge", into=whole.id)
    done = review(labelled, constitution, ReviewDecision(decisions=(decision,)))
    size = len(done.constitution.principles)
    tail = [row for row in done.labelled if row.cluster >= size]
    assert [row.principle for row in tail] == [row.label for row in tail]
    assert min(row.cluster for row in tail) == size
    assert done.constitution.tail == constitution.tail


def test_every_wording_goes_where_its_trajectories_go() -> None:
    labelled, constitution = with_tail()
    words = next(row.label for row in labelled if row.cluster >= len(constitution.principles))
    whole, part = constitution.principles
    merge = Decision(id=part.id, action="merge", into=whole.id)
    for verdict in (
        ReviewDecision(decisions=(merge,), added=(words,)),
        ReviewDecision(decisions=(merge,)),
        ReviewDecision(decisions=(merge,), drop_tail=True),
        ReviewDecision(decisions=(Decision(id=part.id, action="drop"),)),
        ReviewDecision(decisions=(Decision(id=whole.id, action="reword", text="be careful"),)),
    ):
        listed = constitution.model_copy(update={"principles": (whole, part)})
        done = review(labelled, listed, verdict, clusters_of(labelled, constitution))
        expected = {(row.cluster, row.principle) for row in done.labelled}
        assert {(row.cluster, row.principle) for row in done.clusters} == expected
        texts = dict(enumerate(done.constitution.texts))
        own = [row for row in done.clusters if row.cluster in texts]
        assert own and all(row.representative == texts[row.cluster] for row in own)


def test_a_reviewed_constitution_has_all_the_wordings_that_its_file_does_not_list(
    slot: Slot,
) -> None:
    attempt = clustered_attempt(slot, listed=1)
    file = load(attempt.path("constitution.yaml"))
    assert max(p.wordings for p in file.principles) == 3
    assert all(len(p.members) == 1 for p in file.principles)
    _, whole = clustering("an-experiment")
    members = {p.id: set(p.members) for p in whole.principles}
    assert {p.id: set(p.members) for p in with_wordings(attempt).principles} == members

    merge = ReviewDecision(decisions=(Decision(id=ASK, action="merge", into=WARN),))
    merged = run(slot, attempt, merge)
    (warn,) = [p for p in with_wordings(merged).principles if p.id == WARN]
    assert set(warn.members) == members[WARN] | members[ASK] and warn.wordings == 4
    (warn,) = [p for p in load(merged.path("constitution.yaml")).principles if p.id == WARN]
    assert warn.wordings == 4 and warn.members == ("warn of risks", "ask back")


def test_a_merged_principle_stays_merged_in_a_file_that_lists_few_wordings(slot: Slot) -> None:
    """It is known by its text, which the file lists whatever else it leaves out."""
    attempt = clustered_attempt(slot, listed=1)
    merge = Decision(id=ASK, action="merge", into=WARN)
    reviewed = run(slot, attempt, ReviewDecision(decisions=(merge,)))
    old, shown = (load(a.path("constitution.yaml")) for a in (attempt, reviewed))
    again = load_draft(reviewed.path("constitution.yaml"))
    assert decisions_between(old, again, shown) == ([merge], [])


def test_the_decision_on_the_tail_is_recorded(slot: Slot, clustered: Attempt) -> None:
    plain = run(slot, clustered, ReviewDecision())
    dropped = run(slot, clustered, ReviewDecision(drop_tail=True))
    assert dropped.run_id != plain.run_id
    assert read_verdict(dropped) == ReviewDecision(drop_tail=True)
    assert read_verdict(plain) == ReviewDecision()


@pytest.mark.parametrize("verdict", [ReviewDecision(), DROP, ALL], ids=["approve", "drop", "all"])
def test_rows_weights_numbers_and_figures_agree(verdict: ReviewDecision) -> None:
    labelled, constitution = clustering()
    done = review(labelled, constitution, verdict)
    before = [(row.prompt_id, row.sample) for row in labelled]
    after = [(row.prompt_id, row.sample) for row in done.labelled]
    gone = [(row.prompt_id, row.sample) for row in done.rejected]
    assert sorted(after + gone) == sorted(before)
    assert after == [row for row in before if row in set(after)]  # in the same order
    weights: defaultdict[str, float] = defaultdict(float)
    for row in done.labelled:
        weights[row.prompt_id] += row.weight
    assert all(math.isclose(weight, 1.0) for weight in weights.values())
    for number, principle in enumerate(done.constitution.principles):
        carried = [r for r in done.labelled if r.cluster == number and r.label == principle.text]
        assert principle.support == len(carried)
        share = sum(r.weight for r in carried) / sum(weights.values())
        assert principle.share == pytest.approx(share, abs=1e-6)
        assert principle.example in {r.prompt_id for r in carried} | (
            {""} if not carried else set()
        )


def test_weights_grow_in_proportion_and_only_where_something_was_lost() -> None:
    labelled, constitution = clustering()
    before = {(r.prompt_id, r.sample): r.weight for r in labelled}
    done = review(labelled, constitution, DROP)
    lost = {r.prompt_id for r in done.rejected}
    assert lost == {"0", "3"}
    assert done.counts["prompts_lost"] == 1  # prompt 3 had nothing else
    for row in done.labelled:
        was = before[row.prompt_id, row.sample]
        assert row.weight == (was / 0.8 if row.prompt_id in lost else was)


def test_nothing_left_to_train_on_is_refused() -> None:
    labelled, constitution = clustering()
    drops = tuple(Decision(id=p.id, action="drop") for p in constitution.principles)
    with pytest.raises(UserError, match="every principle is dropped"):
        review(labelled, constitution, ReviewDecision(decisions=drops))
    with pytest.raises(UserError, match="leaves no trajectory to train on"):
        review(labelled, constitution, ReviewDecision(decisions=drops, added=("be brief",)))


def test_the_stage_records_what_was_decided(slot: Slot, clustered: Attempt) -> None:
    done = run(slot, clustered, ALL)
    labelled, constitution = clustering()
    expected = review(labelled, constitution, ALL)
    assert done.read("labelled", Labelled) == expected.labelled
    assert done.read("rejected", Rejected) == expected.rejected
    assert load(done.path("constitution.yaml")) == expected.constitution
    written = yaml.safe_load(done.path("review.yaml").read_text("utf-8"))
    assert written["changes"] == [
        "added: be brief",
        "dropped: tell a joke",
        "reworded: warn of risks → warn of dangers",
        "merged: ask back → warn of dangers",
    ]
    assert done.metrics["review/rejected"] == len(expected.rejected)
    assert done.metrics["constitution_size"] == 2


def test_the_verdict_is_found_again(slot: Slot, clustered: Attempt) -> None:
    assert recorded_verdict(slot.record, 1, clustered) is None
    run(slot, clustered, ReviewDecision(by="ann"))
    run(slot, clustered, DROP)
    assert recorded_verdict(slot.record, 1, clustered) == DROP
    other = clustered_attempt(slot, note="clustered anew")
    assert recorded_verdict(slot.record, 1, other) is None
    run(slot, other, ReviewDecision(by="bob"))
    assert recorded_verdict(slot.record, 1, clustered) == DROP  # that very constitution again


def test_who_decided_is_recorded_and_changes_no_digest(slot: Slot, clustered: Attempt) -> None:
    first = run(slot, clustered, DROP)
    again = run(slot, clustered, DROP.model_copy(update={"by": "bob", "note": "agreed"}))
    assert (again.run_id, again.digest, again.reused) == (first.run_id, first.digest, True)
    tags = slot.record.client.get_run(first.run_id).data.tags
    assert (tags[BY], tags[NOTE]) == ("bob", "agreed")
    assert read_verdict(again).by == "bob"
    forced = replace(slot, mode=lambda _: "force")
    assert run(forced, clustered, DROP).digest == first.digest
    assert run(slot, clustered, ALL).digest != first.digest


def test_the_same_decisions_in_other_words_are_not_computed_again(
    slot: Slot, clustered: Attempt
) -> None:
    first = run(slot, clustered, DROP)
    wordy = ReviewDecision(
        decisions=(
            Decision(id=ASK, action="approve", text="left over", into=WARN),
            Decision(id=JOKE, action="drop", text="left over"),
        ),
        by="ann",
    )
    assert run(slot, clustered, wordy).run_id == first.run_id


def test_an_invalid_verdict_leaves_no_attempt(slot: Slot, clustered: Attempt) -> None:
    wrong = ReviewDecision(decisions=(Decision(id=WARN, action="merge", into=WARN),))
    with pytest.raises(UserError, match="merged into itself"):
        run(slot, clustered, wrong)
    assert slot.record.current("review", 1) is None
    assert isinstance(load(clustered.path("constitution.yaml")), Constitution)
