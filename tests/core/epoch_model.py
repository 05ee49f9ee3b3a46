"""A model of the epochs of a group of PEs, and the search through all of its states.

What one PE does in an epoch: publish its count row, plan once every row is here, dispatch, serve
(its experts, once all rows have arrived), combine (once all results are back), finish. Dispatch,
experts and combine of a PE run side by side. A put is in flight until it lands, with its signal,
at any later moment and in any order with the others; so it does no harm that the model issues all
puts of a step at once. What is to be shown:

* A count row is not overwritten before its reader has finished the epoch it belongs to, and rows
  and results land only in the epoch of the reader that they belong to. Data can land from the
  moment a put is issued on, so this is checked when it is issued and when it lands; between the two
  the reader's epoch only grows.
* Nobody reads data that is not of its epoch, and nobody takes a peer for one in another call.
* There is always somebody who can go on.

Which epoch it is matters only relative to the others, so epochs are counted from the lowest one
that is not finished, rounded down to an even number. That makes the number of states finite: the
search is through any number of epochs, not the first few.
"""

import functools
from collections import deque
from collections.abc import Callable, Iterator
from typing import NamedTuple, TypeVar

from flashmoe_jax import introspect

T = TypeVar("T")

TAG = 7
NEVER = -1
"""The epoch of data that nobody has put yet, or of an epoch that everybody has finished."""

Traffic = tuple[tuple[bool, ...], ...]
"""[P][P]: whether a source has rows for the experts of an owner."""


def _judge_counted(seen: int, tag: int, epoch: int) -> introspect.Counted:
    return introspect.judge_counted(seen, tag=tag, epoch=epoch)


class Rules(NamedTuple):
    """The protocol to explore: by default the right one."""

    parity: Callable[[int], int] = introspect.parity  # which matrix an epoch's counts go to
    judge: Callable[[int, int, int], introspect.Counted] = _judge_counted
    zeroed: tuple[str, ...] = ("arrived", "came_back")  # when an epoch is finished
    publish_after_finish: bool = True  # or as soon as the plan is made
    await_every_count: bool = True  # or only those of the PEs that send rows here
    dispatch_first: bool = True  # or only once the own experts are served
    tag_of_pe: tuple[int, ...] | None = None  # tags of the call that each PE is in


class Put(NamedTuple):
    """Data in flight, and its signal."""

    kind: str  # "counts", "rows" or "results"
    source: int
    target: int
    epoch: int


class Pe(NamedTuple):
    """What a PE has done of the epoch that it is in."""

    epoch: int
    published: int  # last epoch whose counts it has put
    planned: bool = False
    dispatched: bool = False
    served: bool = False
    combined: bool = False


class Heap(NamedTuple):
    """Which epochs the data in a PE's heap are of, and its signals."""

    counts: tuple[tuple[int | None, ...], ...]  # [parity][source]; None in a new heap
    recv: tuple[int, ...]  # [source]
    returned: tuple[int, ...]  # [owner]
    arrived: int = 0
    came_back: int = 0


class State(NamedTuple):
    pes: tuple[Pe, ...]
    heaps: tuple[Heap, ...]
    flight: frozenset[Put]


class Violation(Exception):
    """The protocol does what it must not do."""


class Outcome(NamedTuple):
    """What a search found."""

    states: int
    max_lead: int  # most epochs that one PE was ahead of another
    violation: str | None
    trace: list[str]  # the steps that lead to the violation


class Model:
    """The steps of a group of PEs.

    Args:
        traffic: Who has rows for whom, in odd and in even epochs: [epoch % 2].
        rules: The protocol.
        origin: The even epoch that the model's epoch 0 stands for, modulo 2**32.
    """

    def __init__(self, traffic: tuple[Traffic, Traffic], rules: Rules, origin: int = 0) -> None:
        self.traffic = traffic
        self.rules = rules
        self.origin = origin
        self.num_pes = len(traffic[0])
        # Both are asked the same questions all the time.
        self._parity = functools.cache(lambda epoch: rules.parity((origin + epoch) % 2**32))
        self._judge = functools.cache(self._judge_epochs)

    def first_state(self) -> State:
        none = (NEVER,) * self.num_pes
        heap = Heap(counts=((None,) * self.num_pes,) * 2, recv=none, returned=none)
        return State(
            (Pe(epoch=1, published=0),) * self.num_pes, (heap,) * self.num_pes, frozenset()
        )

    def steps(self, state: State) -> Iterator[tuple[str, State]]:
        """Everything that can happen next.

        Raises:
            Violation: It must not happen.
        """
        for p in range(self.num_pes):
            yield from self._steps_of(state, p)
        for put in sorted(state.flight):  # so that every search goes the same way
            yield f"{put} lands", self._land(state, put)

    def _steps_of(self, state: State, p: int) -> Iterator[tuple[str, State]]:
        me, heap = state.pes[p], state.heaps[p]
        epoch, everyone = me.epoch, range(self.num_pes)
        traffic = self.traffic[epoch % 2]
        sources = [q for q in everyone if traffic[q][p]]
        owners = [q for q in everyone if traffic[p][q]]

        early = not self.rules.publish_after_finish and me.planned
        if me.published < epoch + early:
            new = me._replace(published=me.published + 1)
            puts = [Put("counts", p, q, new.published) for q in everyone]
            yield f"PE {p} publishes {new.published}", self._issue(state, p, new, puts)
        if me.published >= epoch and not me.planned:
            awaited = everyone if self.rules.await_every_count else sources
            matrix = heap.counts[self._parity(epoch)]
            # Every word is judged, also beside one that is not here yet: a PE may look at any of
            # them at any time.
            are_here = [self._judge(matrix[q], q, epoch, p) for q in awaited]
            if all(are_here):
                yield f"PE {p} plans {epoch}", self._issue(state, p, me._replace(planned=True), [])
        if not me.planned:
            return
        if not me.dispatched and (me.served or self.rules.dispatch_first):
            puts = [Put("rows", p, q, epoch) for q in owners]
            new = me._replace(dispatched=True)
            yield f"PE {p} dispatches {epoch}", self._issue(state, p, new, puts)
        if not me.served and heap.arrived == len(sources):
            self._check_read(p, epoch, "rows", [heap.recv[q] for q in sources])
            puts = [Put("results", p, q, epoch) for q in sources]
            new = me._replace(served=True)
            yield f"PE {p} serves {epoch}", self._issue(state, p, new, puts)
        if not me.combined and heap.came_back == len(owners):
            self._check_read(p, epoch, "results", [heap.returned[q] for q in owners])
            yield f"PE {p} combines {epoch}", self._issue(state, p, me._replace(combined=True), [])
        if me.dispatched and me.served and me.combined:
            yield f"PE {p} finishes {epoch}", self._finish(state, p)

    def _judge_epochs(self, seen: int | None, q: int, epoch: int, p: int) -> bool:
        """Whether PE p, waiting in `epoch`, takes counts of `seen` for those it waits for."""
        tags = self.rules.tag_of_pe or (TAG,) * self.num_pes
        word = 0
        if seen is not None:
            word = introspect.counted_word(tags[q], (self.origin + seen) % 2**32)
        judged = self.rules.judge(word, tags[p], (self.origin + epoch) % 2**32)
        if judged is introspect.Counted.OTHER_CALL:
            raise Violation(f"PE {p} in epoch {epoch} takes PE {q} for one in another call")
        return judged is introspect.Counted.HERE

    @staticmethod
    def _check_read(p: int, epoch: int, what: str, found: list[int]) -> None:
        if any(e != epoch for e in found):
            raise Violation(f"PE {p} in epoch {epoch} reads {what} of epochs {found}")

    def _check_write(self, state: State, put: Put) -> None:
        reader = state.pes[put.target].epoch
        if put.kind != "counts":
            if reader != put.epoch:
                raise Violation(f"{put} while the target is in epoch {reader}")
            return
        there = state.heaps[put.target].counts[self._parity(put.epoch)][put.source]
        if there is not None and there >= reader:
            raise Violation(f"{put} overwrites counts of {there}, target is in epoch {reader}")

    def _issue(self, state: State, p: int, new: Pe, puts: list[Put]) -> State:
        for put in puts:
            self._check_write(state, put)
        pes = _replace(state.pes, p, new)
        return State(pes, state.heaps, state.flight.union(puts))

    def _land(self, state: State, put: Put) -> State:
        self._check_write(state, put)
        heap = state.heaps[put.target]
        if put.kind == "counts":
            i = self._parity(put.epoch)
            row = _replace(heap.counts[i], put.source, put.epoch)
            heap = heap._replace(counts=_replace(heap.counts, i, row))
        elif put.kind == "rows":
            recv = _replace(heap.recv, put.source, put.epoch)
            heap = heap._replace(recv=recv, arrived=heap.arrived + 1)
        else:
            returned = _replace(heap.returned, put.source, put.epoch)
            heap = heap._replace(returned=returned, came_back=heap.came_back + 1)
        heaps = _replace(state.heaps, put.target, heap)
        return State(state.pes, heaps, state.flight - {put})

    def _finish(self, state: State, p: int) -> State:
        me, heap = state.pes[p], state.heaps[p]
        if "arrived" in self.rules.zeroed:
            heap = heap._replace(arrived=0)
        if "came_back" in self.rules.zeroed:
            heap = heap._replace(came_back=0)
        pes = _replace(state.pes, p, Pe(me.epoch + 1, me.published))
        return State(pes, _replace(state.heaps, p, heap), state.flight)


def explore(model: Model, max_states: int = 500_000) -> Outcome:
    """Searches all states, breadth first, until one is wrong.

    A state in which nobody can go on is wrong too: no PE is ever done with its last epoch.
    """
    first = model.first_state()
    came_from: dict[State, tuple[State, str] | None] = {first: None}
    to_do = deque([first])
    max_lead = 0
    while to_do:
        state = to_do.popleft()
        epochs = [pe.epoch for pe in state.pes]
        max_lead = max(max_lead, max(epochs) - min(epochs))
        try:
            nexts = list(model.steps(state))
            if not nexts:
                raise Violation(f"nobody can go on in {state}")
        except Violation as violation:
            return Outcome(len(came_from), max_lead, str(violation), _trace(came_from, state))
        for name, following in nexts:
            following = _from_lowest(following)
            if following not in came_from:
                came_from[following] = (state, name)
                to_do.append(following)
        if len(came_from) > max_states:
            raise RuntimeError(f"more than {max_states} states")
    return Outcome(len(came_from), max_lead, None, [])


def _from_lowest(state: State) -> State:
    """Counts epochs from the lowest unfinished one, rounded down to an even number."""
    base = min(pe.epoch for pe in state.pes) // 2 * 2
    if base == 0:
        return state
    pes = tuple(
        pe._replace(epoch=pe.epoch - base, published=pe.published - base) for pe in state.pes
    )
    heaps = tuple(
        heap._replace(
            counts=tuple(
                tuple(None if e is None else e - base for e in row) for row in heap.counts
            ),
            recv=tuple(max(e - base, NEVER) for e in heap.recv),
            returned=tuple(max(e - base, NEVER) for e in heap.returned),
        )
        for heap in state.heaps
    )
    flight = frozenset(put._replace(epoch=put.epoch - base) for put in state.flight)
    return State(pes, heaps, flight)


def _trace(came_from: dict[State, tuple[State, str] | None], state: State) -> list[str]:
    names = []
    while (step := came_from[state]) is not None:
        state, name = step
        names.append(name)
    return names[::-1]


def _replace(values: tuple[T, ...], i: int, value: T) -> tuple[T, ...]:
    return (*values[:i], value, *values[i + 1 :])
