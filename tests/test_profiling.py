"""The trace of the engine's tasks, its summary, and its pictures."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest
from conftest import MeshMaker
from jax.sharding import Mesh

import flashmoe_jax as fm
from flashmoe_jax import profiling

CONFIG = fm.MoEConfig(num_experts=8, experts_per_token=2, hidden_size=16, intermediate_size=24)
NUM_PES = 4
TOKENS = 96
SLOTS = TOKENS * CONFIG.experts_per_token


def phase(name: str) -> int:
    return profiling.PHASES.index(name)


@pytest.fixture(scope="module")
def mesh(make_mesh: MeshMaker) -> Mesh:
    return make_mesh(expert=NUM_PES)


@pytest.fixture(scope="module")
def recorded(mesh: Mesh) -> profiling.Trace:
    """Three training steps: three forward calls and three backward."""

    def loss(x: jax.Array, params: fm.MoEParams) -> jax.Array:
        return (fm.moe(x, params, CONFIG, mesh=mesh, implementation="fused")[0] ** 2).sum()

    x = jax.random.normal(jax.random.key(0), (TOKENS, CONFIG.hidden_size))
    step = jax.jit(jax.grad(loss, argnums=(0, 1)))
    params = fm.init_params(jax.random.key(1), CONFIG)
    jax.block_until_ready(step(x, params))
    with profiling.trace() as trace:
        for _ in range(3):
            jax.block_until_ready(step(x, params))
    # Neither before nor after:
    jax.block_until_ready(step(x, params))
    return trace


def of(trace: profiling.Trace, name: str, backward: int) -> np.ndarray:
    records = trace.records
    return records[(records["phase"] == phase(name)) & (records["backward"] == backward)]


@pytest.mark.smoke
def test_all_tasks_of_all_calls_are_there(recorded: profiling.Trace) -> None:
    assert recorded.lost == 0
    assert len(np.unique(recorded.records["call"])) == 6
    for backward in (0, 1):
        for name in ("enter", "route", "plan"):
            assert len(of(recorded, name, backward)) == 3 * NUM_PES
        for name in ("dispatch", "first", "second"):  # one column tile in each stage
            assert of(recorded, name, backward)["rows"].sum() == 3 * SLOTS
        assert of(recorded, "combine", backward)["rows"].sum() == 3 * TOKENS
    assert len(of(recorded, "weights", 0)) == 0
    assert of(recorded, "weights", 1)["rows"].sum() == 3 * SLOTS


def test_times_are_in_order(recorded: profiling.Trace) -> None:
    records = recorded.records
    assert (records["begin"] <= records["ready"]).all()
    assert (records["ready"] <= records["end"]).all()
    assert (np.diff(records["begin"]) >= 0).all()
    busy = records[records["phase"] != phase("enter")]
    for worker in np.unique(busy[["pe", "worker"]]):
        mine = busy[(busy["pe"] == worker["pe"]) & (busy["worker"] == worker["worker"])]
        assert (mine["begin"][1:] >= mine["end"][:-1]).all()


def test_waits_are_for_what_the_task_needs(recorded: profiling.Trace) -> None:
    for backward in (0, 1):
        first, second = of(recorded, "first", backward), of(recorded, "second", backward)
        dispatched, combined = of(recorded, "dispatch", backward), of(recorded, "combine", backward)
        for call in np.unique(first["call"]):
            for expert in range(CONFIG.num_experts):

                def mine(records: np.ndarray, call: int = call, expert: int = expert) -> np.ndarray:
                    return records[(records["call"] == call) & (records["expert"] == expert)]

                local = mine(first)
                assert (local["pe"] == expert // (CONFIG.num_experts // NUM_PES)).all()
                # An expert's rows all fit into one block, so its tile waits for every dispatch,
                # whose end is recorded a little after its last row has landed.
                assert (local["end"] >= mine(dispatched)["begin"].max()).all()
                assert (mine(second)["ready"] >= local["end"].min() - 1_000_000).all()
            last_begin = second[second["call"] == call]["ready"].min()
            assert (combined[combined["call"] == call]["ready"] >= last_begin).all()


def test_summary_says_where_the_time_went(recorded: profiling.Trace) -> None:
    forward, backward = recorded.summary().directions
    assert (forward.name, backward.name) == ("forward", "backward")
    for direction in (forward, backward):
        assert direction.calls == 3
        assert 0 < direction.entering_seconds < direction.seconds
        assert 0 <= direction.idle_share <= direction.worst_idle_share <= 1
        assert 0 < direction.busy_cores < NUM_PES * len(np.unique(recorded.records["worker"]))
        assert 0 <= direction.slowest_pe < NUM_PES
        assert 1 / 3 <= direction.slowest_pe_share <= 1
        assert 0 <= direction.overlap <= 1
        assert all(p.busy_seconds > 0 and p.waiting_seconds >= 0 for p in direction.phases)
    assert "weights" not in {p.phase for p in forward.phases}
    assert {p.phase for p in backward.phases} == set(profiling.PHASES)
    text = str(recorded.summary())
    assert "forward: 3 calls" in text
    assert "backward: 3 calls" in text


def trace_of(tasks: list[tuple[int, str, int, int, int]]) -> profiling.Trace:
    """A trace of one forward call: (PE, phase, begin, ready, end)."""
    trace = profiling.Trace()
    trace.records = np.zeros(len(tasks), trace.records.dtype)
    for record, (pe, name, begin, ready, end) in zip(trace.records, tasks, strict=True):
        record["pe"], record["phase"] = pe, phase(name)
        record["begin"], record["ready"], record["end"] = begin, ready, end
    return trace


def test_summary_of_a_known_trace() -> None:
    ms = 1_000_000
    trace = trace_of(
        [
            (0, "enter", 0, 1 * ms, 2 * ms),
            (1, "enter", 1 * ms, 1 * ms, 2 * ms),
            (0, "dispatch", 2 * ms, 2 * ms, 4 * ms),
            (1, "dispatch", 3 * ms, 3 * ms, 6 * ms),
            (0, "first", 4 * ms, 5 * ms, 12 * ms),
            (1, "first", 6 * ms, 6 * ms, 10 * ms),
        ]
    )
    (forward,) = trace.summary().directions
    assert forward.seconds == pytest.approx(12e-3)
    assert forward.entering_seconds == pytest.approx(2e-3)
    assert forward.idle_share == pytest.approx((0.1 + 0.3) / 2)
    assert forward.busy_cores == pytest.approx(0.9 + 0.7)
    assert forward.worst_idle_share == pytest.approx(0.3)
    assert forward.idlest_worker == (1, 0)
    assert (forward.slowest_pe, forward.slowest_pe_share) == (0, 1)
    assert forward.overlap == pytest.approx(1 / 4)  # dispatch from 2 to 6, computing from 5
    first = next(p for p in forward.phases if p.phase == "first")
    assert first.busy_seconds == pytest.approx(11e-3)
    assert first.waiting_seconds == pytest.approx(1e-3)


def test_perfetto_file(recorded: profiling.Trace, tmp_path: Path) -> None:
    recorded.save(tmp_path / "trace.json")
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    named = {e["tid"]: e["args"]["name"] for e in events if e["name"] == "thread_name"}
    assert len(named) == len(np.unique(recorded.records[["pe", "worker"]]))
    assert named[0].startswith("PE 0")
    tasks = [e for e in events if e["ph"] == "X" and not e["name"].startswith("wait")]
    assert len(tasks) == len(recorded.records)
    assert all(e["ts"] >= 0 and e["dur"] >= 0 and e["tid"] in named for e in tasks)
    waited = sum(e["dur"] for e in events if e["name"].startswith("wait"))
    records = recorded.records
    assert waited == pytest.approx((records["ready"] - records["begin"]).sum() / 1e3)


def test_timeline(recorded: profiling.Trace, tmp_path: Path) -> None:
    recorded.plot(tmp_path / "all.png")
    recorded.plot(tmp_path / "one.svg", call=int(recorded.records["call"][0]))
    assert (tmp_path / "all.png").read_bytes().startswith(b"\x89PNG")
    svg = (tmp_path / "one.svg").read_text()
    assert "<svg" in svg
    with pytest.raises(ValueError, match="call -5 was not recorded"):
        recorded.plot(tmp_path / "none.png", call=-5)


def test_nothing_recorded(tmp_path: Path) -> None:
    with profiling.trace() as trace:
        pass
    assert str(trace.summary()) == "no call was recorded"
    trace.save(tmp_path / "empty.json")
    assert json.loads((tmp_path / "empty.json").read_text()) == {"traceEvents": []}
    with pytest.raises(ValueError, match="no call was recorded"):
        trace.plot(tmp_path / "none.png")


def test_what_finds_no_room_is_counted() -> None:
    x = jax.random.normal(jax.random.key(0), (TOKENS, CONFIG.hidden_size))
    params = fm.init_params(jax.random.key(1), CONFIG)
    with profiling.trace(max_records=5) as trace:
        jax.block_until_ready(fm.moe(x, params, CONFIG, implementation="fused"))
    assert len(trace.records) == 5
    assert trace.lost > 0
    assert "raise max_records" in str(trace.summary())


def test_room_must_be_positive() -> None:
    with (
        pytest.raises(ValueError, match="max_records is 0; it must be at least 1"),
        profiling.trace(0),
    ):
        pass


def test_exception_in_the_block_ends_the_trace() -> None:
    with pytest.raises(RuntimeError, match="user's own"), profiling.trace():
        raise RuntimeError("user's own")
    x = jax.random.normal(jax.random.key(0), (TOKENS, CONFIG.hidden_size))
    params = fm.init_params(jax.random.key(1), CONFIG)
    with profiling.trace() as trace:
        pass
    jax.block_until_ready(fm.moe(x, params, CONFIG, implementation="fused"))
    assert len(trace.records) == 0
