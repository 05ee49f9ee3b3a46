"""The rules of the epochs: one word at a time, and all interleavings of a small group."""

import itertools

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from flashmoe_jax import introspect
from flashmoe_jax.introspect import Counted

from .epoch_model import Model, Outcome, Rules, Traffic, explore

NEW_HEAP = 0  # the word in `counted` before anybody has published

uint32s = st.integers(0, 2**32 - 1) | st.sampled_from([0, 1, 2, 2**31, 2**32 - 2, 2**32 - 1])


# Words


@given(uint32s)
def test_parities_alternate_also_where_epochs_wrap(epoch: int) -> None:
    following = (epoch + 1) % 2**32
    assert introspect.parity(epoch) == epoch % 2
    assert introspect.parity(following) != introspect.parity(epoch)


@given(uint32s, uint32s)
def test_a_word_holds_its_tag_and_epoch(tag: int, epoch: int) -> None:
    word = introspect.counted_word(tag, epoch)
    assert 0 <= word < 2**64
    assert (introspect.tag_of(word), introspect.epoch_of(word)) == (tag, epoch)


@given(uint32s, uint32s)
def test_counts_of_this_epoch_and_call_are_here(tag: int, epoch: int) -> None:
    word = introspect.counted_word(tag, epoch)
    assert introspect.judge_counted(word, tag=tag, epoch=epoch) is Counted.HERE


@given(uint32s, uint32s, uint32s)
def test_counts_of_two_epochs_ago_are_not_yet_the_new_ones(
    tag: int, old_tag: int, epoch: int
) -> None:
    """The last word of equal parity, whatever call it was of, also across the wrap."""
    word = introspect.counted_word(old_tag, (epoch - 2) % 2**32)
    assert introspect.judge_counted(word, tag=tag, epoch=epoch) is Counted.NOT_YET


@given(uint32s, st.integers(1, 2**32 - 1))
def test_a_new_heap_has_no_counts_yet(tag: int, epoch: int) -> None:
    """The first epoch of a heap is 1: the word of epoch 0 of tag 0 is that of a new heap."""
    assert introspect.judge_counted(NEW_HEAP, tag=tag, epoch=epoch) is Counted.NOT_YET


@given(uint32s, uint32s, uint32s)
def test_this_epoch_of_another_call_is_an_error(tag: int, other: int, epoch: int) -> None:
    word = introspect.counted_word(other, epoch)
    assume(other != tag and word != NEW_HEAP)
    assert introspect.judge_counted(word, tag=tag, epoch=epoch) is Counted.OTHER_CALL


@given(uint32s, uint32s, uint32s, st.integers(-5, 5) | uint32s)
def test_any_other_epoch_is_an_error(tag: int, other: int, epoch: int, ahead: int) -> None:
    word = introspect.counted_word(other, (epoch + ahead) % 2**32)
    assume(ahead not in (0, -2, 2**32 - 2) and word != NEW_HEAP)
    assert introspect.judge_counted(word, tag=tag, epoch=epoch) is Counted.OTHER_CALL


# Interleavings


def every_traffic(num_pes: int) -> list[Traffic]:
    """Every choice of who has rows for whom."""
    rows = list(itertools.product((False, True), repeat=num_pes))
    return list(itertools.product(rows, repeat=num_pes))


def has_rows(kind: str, source: int, owner: int, num_pes: int) -> bool:
    if kind == "next":
        return owner == (source + 1) % num_pes
    return kind == "all" or (kind == "first" and owner == 0)


def traffic(num_pes: int, kind: str) -> Traffic:
    """Rows from everybody to all, to none, to the next PE, or to the first PE."""
    pes = range(num_pes)
    return tuple(tuple(has_rows(kind, p, q, num_pes) for q in pes) for p in pes)


def check_right(outcome: Outcome) -> None:
    assert outcome.violation is None, outcome.trace
    # Nobody is more than one epoch ahead: this is why two count matrices are enough.
    assert outcome.max_lead == 1


@pytest.mark.parametrize("odd", every_traffic(2), ids=str)
def test_two_pes_with_every_traffic(odd: Traffic) -> None:
    """Any number of epochs that alternate between two traffics.

    Since nobody is more than one epoch ahead, any two successive epochs are all that can meet.
    """
    for even in every_traffic(2):
        check_right(explore(Model((odd, even), Rules())))


@pytest.mark.parametrize(
    ("odd", "even"),
    [
        ("all", "all"),
        ("none", "none"),
        ("next", "next"),
        ("first", "first"),
        ("all", "none"),
        ("next", "first"),
    ],
)
def test_three_pes(odd: str, even: str) -> None:
    check_right(explore(Model((traffic(3, odd), traffic(3, even)), Rules())))


def test_epochs_may_wrap() -> None:
    """An executable that runs for days comes past 2**32 epochs."""
    both = traffic(2, "all"), traffic(2, "next")
    for origin in (2**32 - 2, 2**32 - 4, 2**31 - 2):
        check_right(explore(Model(both, Rules(), origin)))


# The search sees what it is there for: each rule is needed, and without it something goes wrong.


def has_come(seen: int, tag: int, epoch: int) -> Counted:
    """Judges counts without the knowledge that there are two matrices."""
    word = introspect.counted_word(tag, epoch)
    return Counted.HERE if seen == word else Counted.NOT_YET


KINDS = ["all", "none", "next", "first"]


def check_found(outcome: Outcome, expected: str) -> None:
    assert outcome.violation is not None
    assert expected in outcome.violation
    assert outcome.trace


@pytest.mark.parametrize("num_pes", [2, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_one_count_matrix_is_not_enough(kind: str, num_pes: int) -> None:
    rules = Rules(parity=lambda epoch: 0, judge=has_come)
    outcome = explore(Model((traffic(num_pes, kind),) * 2, rules))
    check_found(outcome, "overwrites counts")


@pytest.mark.parametrize("num_pes", [2, 3])
@pytest.mark.parametrize("kind", ["all", "next", "first"])
@pytest.mark.parametrize(
    ("zeroed", "expected"),
    [((), "reads"), (("arrived",), "reads results"), (("came_back",), "reads rows")],
)
def test_finish_has_to_zero_both_signals(
    zeroed: tuple[str, ...], expected: str, kind: str, num_pes: int
) -> None:
    outcome = explore(Model((traffic(num_pes, kind),) * 2, Rules(zeroed=zeroed)))
    check_found(outcome, expected)


@pytest.mark.parametrize("kind", KINDS)
def test_publishing_has_to_wait_for_finish(kind: str) -> None:
    rules = Rules(publish_after_finish=False)
    outcome = explore(Model((traffic(2, kind),) * 2, rules))
    check_found(outcome, "overwrites counts")


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("none", "overwrites counts"),
        ("next", "overwrites counts"),
        ("first", "while the target is in epoch"),
    ],
)
def test_counts_are_awaited_from_those_who_send_no_rows_too(kind: str, expected: str) -> None:
    outcome = explore(Model((traffic(2, kind),) * 2, Rules(await_every_count=False)))
    check_found(outcome, expected)


@pytest.mark.parametrize("num_pes", [2, 3])
@pytest.mark.parametrize("kind", ["all", "next", "first"])
def test_a_dispatch_that_waits_is_a_deadlock(kind: str, num_pes: int) -> None:
    """Everybody would wait for the rows of somebody who waits too."""
    outcome = explore(Model((traffic(num_pes, kind),) * 2, Rules(dispatch_first=False)))
    check_found(outcome, "nobody can go on")


@pytest.mark.parametrize("num_pes", [2, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_pes_in_different_calls_are_told_apart_before_rows_move(kind: str, num_pes: int) -> None:
    rules = Rules(tag_of_pe=(1, 2, 2)[:num_pes])
    outcome = explore(Model((traffic(num_pes, kind),) * 2, rules))
    check_found(outcome, "for one in another call")
    assert not any("plans" in step for step in outcome.trace)
