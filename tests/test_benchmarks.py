"""The harness of the benchmarks: that its numbers mean what they say. No times are judged."""

import dataclasses
import itertools
import json
import math
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flashmoe_jax as fm
from benchmarks import (
    check,
    cli,
    comparisons,
    inputs,
    measure,
    opponents,
    oracle,
    platform,
    report,
    results,
    suites,
    targets,
    timing,
    traces,
    traffic,
)
from benchmarks.cases import Case, Direction, Group, Semantics
from benchmarks.request import Options, Request, Setting
from benchmarks.shapes import MODELS, Shape
from flashmoe_jax import profiling

ROOT = Path(__file__).resolve().parent.parent

TINY = Shape(name="tiny", hidden=16, intermediate=24, num_experts=8, experts_per_token=2)
OPTIONS = Options(budget=0.1, least=2, most=2)


def tiny_case(direction: Direction = "forward", *names: str, **changes: Any) -> Case:
    case = Case(
        shape=TINY, tokens=48, num_pes=4, dtype="float32", direction=direction, opponents=names
    )
    return dataclasses.replace(case, **changes)


def group_of(*cases: Case) -> Group:
    return Group(name="test", cases=cases, ceiling=False)


# Counting


HAND = Case(
    shape=Shape(name="hand", hidden=4, intermediate=6, num_experts=4, experts_per_token=2),
    tokens=4,
    num_pes=2,
    dtype="bfloat16",
    direction="forward",
    capacity_factor=1.0,
    opponents=(),
)
# PE 0 has tokens 0 and 1, and experts 0 and 1.
HAND_INDICES = np.array([[0, 1], [0, 2], [0, 3], [2, 0]])


def test_flops_of_kept_rows_are_those_computed_by_hand() -> None:
    # 7 rows, 3 products of 2 * 4 * 6 operations; backward has two more products for each.
    assert HAND.useful_flops(7) == 7 * 3 * 48
    training = dataclasses.replace(HAND, direction="forward+backward")
    assert training.useful_flops(7) == 3 * 7 * 3 * 48
    ungated = dataclasses.replace(HAND, shape=dataclasses.replace(HAND.shape, gated=False))
    assert ungated.useful_flops(7) == 7 * 2 * 48


@pytest.mark.parametrize(
    ("semantics", "capacity", "kept"),
    [
        ("dropless", None, [[1, 1], [1, 1], [1, 1], [1, 1]]),
        ("capacity", 2, [[1, 1], [1, 1], [0, 1], [1, 0]]),
        ("capacity per source", 1, [[1, 1], [0, 1], [1, 1], [1, 0]]),
    ],
)
def test_kept_rows_are_those_found_by_hand(
    semantics: Semantics, capacity: int | None, kept: list[list[int]]
) -> None:
    assert HAND.capacity(semantics) == capacity
    assert oracle.kept_rows(HAND_INDICES, HAND, semantics).tolist() == np.array(kept, bool).tolist()


def test_bytes_between_pes_are_those_counted_by_hand() -> None:
    keep = oracle.kept_rows(HAND_INDICES, HAND, "dropless")
    # Token 1 sends to expert 2; tokens 2 and 3 send to expert 0.
    assert oracle.rows_between_pes(HAND_INDICES, keep, HAND).tolist() == [[3, 1], [2, 2]]
    assert traffic.rows_leaving(HAND_INDICES, HAND, "dropless") == 3
    assert traffic.rows_leaving(HAND_INDICES, HAND, "capacity") == 1
    # A row has 4 elements of 2 bytes; it travels with 8 bytes of origin, and each PE sends the
    # other one its counts for 4 experts, of 4 bytes.
    assert traffic.least_bytes(3, HAND) == 3 * (8 + 8)
    assert traffic.fused_bytes(3, HAND) == 3 * (8 + 8 + 8) + 2 * 16
    training = dataclasses.replace(HAND, direction="forward+backward")
    assert traffic.least_bytes(3, training) == 2 * 3 * (8 + 8)
    # Backward adds a weight to each row, and its gradient.
    assert traffic.fused_bytes(3, training) == 2 * (3 * 24 + 32) + 3 * 8


@pytest.mark.parametrize("load", suites.LOADS)
@pytest.mark.parametrize("semantics", ["dropless", "capacity"])
def test_the_plan_and_the_routing_agree_on_the_rows_between_pes(
    load: Any, semantics: Semantics
) -> None:
    case = tiny_case(load=load)
    indices = inputs.inputs(case).indices
    planned = traffic.rows_by_plan(indices, case, semantics)
    if planned is None:
        pytest.skip("an installed wheel has no introspection module; `make venv` builds it")
    keep = oracle.kept_rows(indices, case, semantics)
    np.testing.assert_array_equal(planned, oracle.rows_between_pes(indices, keep, case))


def test_bytes_of_collectives_are_those_counted_by_hand() -> None:
    program = """
      %a = f32[8,4]{1,0} all-gather(%x), channel_id=1, dimensions={0}
      %b = bf16[2,4]{1,0} reduce-scatter(%y), channel_id=2, to_apply=%sum
      %c = (f32[3]{0}, s32[]) all-reduce(%z, %w), channel_id=3, to_apply=%sum
      ROOT %d = (f32[4]{0}, f32[4]{0}, f32[4]{0}, /*index=3*/f32[4]{0}) all-to-all(%v), channel_id=4
      %e = f32[4,4]{1,0} add(%a, %all-gather.1)
    """
    gathered, scattered, reduced, exchanged = 128 * 3, 16 * 3 * 4, 2 * 16 * 3, 64 * 3
    assert traffic.collective_bytes(program, 4) == gathered + scattered + reduced + exchanged
    assert traffic.collective_bytes("%a = (f32[2], f32[8]) all-gather-start(%x)", 4) is None


# The oracle and the check


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("semantics", ["dropless", "capacity"])
def test_oracle_agrees_with_derivatives_of_the_dense_layer(
    gated: bool, semantics: Semantics
) -> None:
    case = tiny_case("forward+backward", shape=dataclasses.replace(TINY, gated=gated))
    given = inputs.inputs(case)
    config = fm.MoEConfig(
        num_experts=8,
        experts_per_token=2,
        hidden_size=16,
        intermediate_size=24,
        gated=gated,
        capacity_factor=None if semantics == "dropless" else case.capacity_factor,
    )
    p: Any = given.parameters
    params = fm.MoEParams(router=p.router, selection_bias=None, gate=p.gate, up=p.up, down=p.down)

    def layer(x: jax.Array, params: fm.MoEParams) -> jax.Array:
        return fm.moe(x, params, config, implementation="dense")[0]

    y, pull_back = jax.vjp(layer, jnp.asarray(given.x), jax.tree.map(jnp.asarray, params))
    dx, gradients = pull_back(jnp.asarray(given.cotangent))
    got = {"y": y, "d_x": dx, "d_router": gradients.router}
    got |= {"d_up": gradients.up, "d_down": gradients.down}
    if gated:
        got["d_gate"] = gradients.gate
    keep = oracle.kept_rows(given.indices, case, semantics)
    assert keep.all() == (semantics == "dropless")
    want = oracle.expected(case, given, keep)
    found = check.check(case, {name: np.asarray(value) for name, value in got.items()}, want)
    assert [str(one) for one in found if not one.passed] == []


@pytest.mark.parametrize("load", suites.LOADS)
def test_tokens_choose_the_experts_that_the_inputs_say(load: Any) -> None:
    case = tiny_case(load=load, dtype="bfloat16")
    given = inputs.inputs(case)
    p: Any = given.parameters
    params = fm.MoEParams(router=p.router, selection_bias=None, gate=p.gate, up=p.up, down=p.down)
    routing = fm.route(jnp.asarray(given.x), params, opponents.config(case, "dropless"))
    np.testing.assert_array_equal(routing.indices, given.indices)
    share = np.bincount(given.indices.reshape(-1), minlength=8).max() / case.rows
    low, high = {"uniform": (0.125, 0.3), "zipf": (0.25, 0.5), "hot": (0.45, 0.5)}[load]
    assert low <= share <= high


def doubled(outputs: dict[str, np.ndarray]) -> None:
    outputs["y"] = 2 * outputs["y"]


def row_dropped(outputs: dict[str, np.ndarray]) -> None:
    outputs["y"] = outputs["y"].copy()
    outputs["y"][3] *= 0.5


def expert_missing(outputs: dict[str, np.ndarray]) -> None:
    outputs["d_up"] = outputs["d_up"].copy()
    outputs["d_up"][5] = 0


def not_a_number(outputs: dict[str, np.ndarray]) -> None:
    outputs["d_x"] = outputs["d_x"].copy()
    outputs["d_x"][0, 0] = np.nan


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("fault", [doubled, row_dropped, expert_missing, not_a_number])
def test_a_planted_wrong_opponent_is_refused(
    monkeypatch: pytest.MonkeyPatch,
    fault: Callable[[dict[str, np.ndarray]], None],
    dtype: Any,
) -> None:
    right = opponents.OPPONENTS["ragged-dot"]

    def build(case: Case) -> Any:
        program = right.build(case)
        results_of = program.results

        def wrong_results(outputs: Any) -> dict[str, np.ndarray]:
            found = results_of(outputs)
            fault(found)
            return found

        monkeypatch.setattr(program, "results", wrong_results)
        return program

    wrong = dataclasses.replace(right, name="wrong", build=build)
    monkeypatch.setitem(opponents.OPPONENTS, "wrong", wrong)
    case = tiny_case("forward+backward", "ragged-dot", "wrong", dtype=dtype)
    (result,) = measure.measure_group(group_of(case), OPTIONS).cases
    assert result.status == "refused"
    assert "wrong" in result.reason
    assert [run.status for run in result.runs] == ["not measured", "refused"]
    assert all(run.timing is None for run in result.runs)


def test_an_opponent_that_fails_does_not_hide_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    def build(case: Case) -> Any:
        raise RuntimeError("planted")

    failing = dataclasses.replace(opponents.OPPONENTS["xla"], name="failing", build=build)
    monkeypatch.setitem(opponents.OPPONENTS, "failing", failing)
    case = tiny_case("forward", "failing", "ragged-dot")
    (result,) = measure.measure_group(group_of(case), OPTIONS).cases
    assert [run.status for run in result.runs] == ["failed", "measured"]
    assert result.runs[0].reason == "RuntimeError: planted"


# Timing


def test_schedule_interleaves_and_keeps_to_the_budget() -> None:
    repetitions = timing.Repetitions(budget=3.0, least=2, most=10)
    order = timing.schedule([0.1, 0.2, 5.0], repetitions)
    # A second for each: 10 of the first, 5 of the second, and the fewest allowed of the last.
    assert [order.count(which) for which in range(3)] == [10, 5, 2]
    # Between two samples of the slower ones there are always some of the fastest.
    for which, apart in ((1, 2), (2, 5)):
        places = [i for i, other in enumerate(order) if other == which]
        between = [order[a:b].count(0) for a, b in itertools.pairwise(places)]
        assert all(abs(count - apart) <= 1 for count in between)


def test_short_calls_are_timed_several_at_once() -> None:
    count = 0

    def call() -> None:
        nonlocal count
        count += 1

    one = timing.Timed(call, estimate=0.004)
    (found,) = timing.interleave([one], timing.schedule([1.0], timing.Repetitions(0.0, 4, 4)))
    assert found.calls_per_sample == 3
    assert count == 12
    assert len(found.seconds) == 4


# A whole run


def test_a_group_of_all_opponents_is_measured() -> None:
    names = [name for name in suites.ALL if not name.startswith("torch")]
    case = tiny_case("forward+backward", *names, num_pes=8)
    group = Group(name="test", cases=(case,), ceiling=False, floor=True)
    found = measure.measure_group(group, OPTIONS)
    (result,) = found.cases
    assert {run.opponent: run.reason for run in result.runs if run.status != "measured"} == {}
    for run in result.runs:
        assert run.timing is not None
        assert len(run.timing.seconds) == 2
        assert min(run.timing.seconds) > 0
        assert len(run.checks) == 6
        assert all(one.passed for one in run.checks)
        assert run.useful_flops == case.useful_flops(run.kept_rows)
        one_device = opponents.OPPONENTS[run.opponent].one_device
        assert (run.moved_bytes is None) == one_device
        if run.moved_bytes is not None:
            assert run.least_bytes is not None
            assert run.moved_bytes >= run.least_bytes > 0
        is_ours = opponents.OPPONENTS[run.opponent].family == "fused"
        traced = ["forward", "backward"] if is_ours else []
        assert [call.direction for call in run.traced] == traced
        assert all(call.seconds > 0 and call.busy_cores > 0 for call in run.traced)
        assert run.timeline is None  # this group does not ask for it
    assert [probe.name for probe in found.probes] == [
        "dispatch only",
        "router only",
        "reading the chosen experts",
    ]
    assert found.foreign_load is None or 0 <= found.foreign_load <= 1


def test_a_case_that_needs_more_devices_is_skipped() -> None:
    case = tiny_case("forward", "xla", num_pes=16, tokens=64)
    case = dataclasses.replace(case, shape=dataclasses.replace(TINY, num_experts=16))
    (result,) = measure.measure_group(group_of(case), OPTIONS).cases
    assert result.status == "skipped"
    assert "16 devices" in result.reason


def test_the_command_writes_results_that_can_be_read(tmp_path: Path) -> None:
    output = tmp_path / "out.json"
    what = ["--suite", "smoke", "--filter", "forward u", "--repetitions", "2", "--memory"]
    what += ["--opponent", "fused", "--opponent", "fused-capacity", "--opponent", "xla"]
    command = [sys.executable, "-m", "benchmarks", "--output", str(output), *what]
    finished = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr
    text = output.read_text()
    assert str(tmp_path) not in text
    data = json.loads(text)
    assert data["command"] == shlex.join(["python", "-m", "benchmarks", *what])
    assert {"date", "commit", "machine", "versions", "environment", "groups"} <= data.keys()
    assert "jaxlib" in data["versions"]
    assert "device_count=8" in data["environment"]["XLA_FLAGS"]
    found = results.load(output)
    assert json.loads(json.dumps(dataclasses.asdict(found))) == data
    (group,) = found.groups
    (result,) = group.cases
    assert [run.opponent for run in result.runs] == ["fused", "fused-capacity", "xla"]
    for run in result.runs:
        assert run.memory is not None
        assert run.memory.growth_bytes > 0
        assert (run.memory.layout_bytes is None) == (run.opponent == "xla")
        assert (run.timeline is None) == (run.opponent != "fused")
        if run.timeline is not None:
            # The last of several calls, whole: every PE enters once, and nothing is out of order.
            records = traces.to_trace(run.timeline).records
            entered = records[records["phase"] == profiling.PHASES.index("enter")]
            assert sorted(entered["pe"].tolist()) == list(range(result.case.num_pes))
            assert (records["begin"] <= records["ready"]).all()
            assert (records["ready"] <= records["end"]).all()
            assert records["end"].max() > 0 == records["begin"].min()
    assert len(found.targets) == len(targets.TARGETS)
    share = group.share_of_ceiling(result.case, result.runs[0])
    assert share is not None
    assert 0 < share < 1
    assert (tmp_path / "out-ceiling.png").stat().st_size > 0
    assert (tmp_path / "out-timeline-smoke.png").stat().st_size > 0
    assert "fused-capacity" in finished.stdout
    assert "Where the operator's time goes" in finished.stdout


def test_a_group_in_which_the_process_dies_is_reported_and_the_next_is_measured(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    groups = [dataclasses.replace(group_of(tiny_case()), name=name) for name in "abc"]
    setting = Setting(machine=results_of("").machine, versions={}, environment={})
    asked = []

    def die_in_b(command: list[str], *, input: str, **_: Any) -> subprocess.CompletedProcess[str]:
        request = results.decode(Request, json.loads(input))
        asked.append([group.name for group in request.groups])
        answers: list[Any] = [setting]
        answers += [
            results.GroupResult(name=group.name, cases=())
            for group in request.groups
            if group.name != "b"
        ][:1]
        lines = [json.dumps(dataclasses.asdict(answer)) for answer in answers]
        Path(command[-1]).write_text("\n".join(lines))
        return subprocess.CompletedProcess(command, -11 if "b" in asked[-1] else 0)

    monkeypatch.setattr(subprocess, "run", die_in_b)
    _, found = cli.measure_groups(groups, OPTIONS, {})
    assert asked == [["a", "b", "c"], ["c"]]
    assert [group.name for group in found] == ["a", "b", "c"]
    assert [case.status for case in found[1].cases] == ["skipped"]
    assert "status -11" in found[1].cases[0].reason


def test_results_of_another_schema_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "old.json"
    path.write_text('{"schema": 0}')
    with pytest.raises(ValueError, match="schema 0"):
        results.load(path)


# What is compared


def timed(seconds: float) -> results.Timing:
    spread = (0.9 * seconds, seconds, 1.1 * seconds)
    return results.Timing(seconds=spread, calls_per_sample=1, cores_busy=2.0)


def result_of(case: Case, busiest: int = 0, **seconds: float) -> results.CaseResult:
    runs = (
        results.Run(
            opponent=name.replace("_", "-"),
            semantics="dropless",
            status="measured",
            kept_rows=case.rows,
            useful_flops=case.useful_flops(case.rows),
            timing=timed(value),
        )
        for name, value in seconds.items()
    )
    return results.CaseResult(
        case=case, status="measured", busiest_pe_rows=busiest, runs=tuple(runs)
    )


def results_of(
    name: str, *cases: results.CaseResult, ceiling: float = 1.0, features: tuple[str, ...] = ()
) -> results.Results:
    probe = results.Probe(
        name="product", kind="ceiling", dtype="float32", flops=1000, timing=timed(1000 / ceiling)
    )
    return results.Results(
        command="",
        date="2026-01-01T00:00:00+00:00",
        commit="abc",
        machine=results.Machine(
            platform="cpu",
            processor="A Processor",
            devices=8,
            cores=2,
            memory_bytes=2**34,
            features=features,
        ),
        versions={},
        environment={},
        warnings=(),
        options={},
        groups=(results.GroupResult(name=name, cases=cases, probes=(probe,)),),
    )


def verdicts(found: results.Results) -> dict[str, tuple[str, float]]:
    return {
        target.statement: (target.verdict, round(target.measured, 6))
        for target in targets.evaluate(found)
        if target.measured is not None
    }


def test_speedups_are_over_the_fastest_opponent() -> None:
    case = suites.reference()
    found = results_of(
        "forward",
        result_of(
            case, fused=1.0, fused_capacity=1.0, xla_capacity=3.0, xla_all_to_all=1.6, xla=20
        ),
        ceiling=case.useful_flops(case.rows) / 0.8,
    )
    assert verdicts(found) == {
        "forward: over the best XLA path with a capacity": ("MISSED", 1.6),
        "forward: over the best dropless path": ("met", 20.0),
        "forward: share of the ceiling": ("met", 0.8),
    }
    (target,) = (t for t in targets.evaluate(found) if t.measured == pytest.approx(1.6))
    assert "xla-all-to-all" in target.detail
    # Quartiles of (0.9, 1, 1.1) times the median are 0.95 and 1.05 of it.
    assert target.low == pytest.approx(1.6 * 0.95 / 1.05)
    assert target.high == pytest.approx(1.6 * 1.05 / 0.95)


@pytest.mark.parametrize("has_bf16", [True, False])
def test_bf16_targets_are_those_of_the_processor(has_bf16: bool) -> None:
    group = suites.sixteen_bits("bfloat16")[0]
    found = results_of(
        group.name,
        result_of(group.cases[0], fused=1.0, fused_capacity=1.0, xla_capacity=1.5),
        result_of(group.cases[1], fused=2.0, fused_capacity=1.4),
        features=(targets.BF16_INSTRUCTIONS,) if has_bf16 else (),
    )
    with_bf16 = {
        "bfloat16 forward: over the best XLA path with a capacity, in bfloat16": ("met", 1.5),
        "bfloat16 forward: over our own float32": ("MISSED", 1.4),
    }
    without = {"bfloat16 forward: time over that of our own float32": ("met", round(1 / 1.4, 6))}
    assert verdicts(found) == (with_bf16 if has_bf16 else without)


def test_uneven_loads_are_judged_by_the_busiest_pe() -> None:
    uniform, zipf, hot = suites.routing().cases
    found = results_of(
        "routing",
        result_of(uniform, 500, fused=1.0),
        result_of(zipf, 1000, fused=2.2),
        result_of(hot, 2000, fused=5.0),
    )
    pe = "routing: growth of the time over that of the work of the busiest PE"
    # 4096 rows on 2 cores: 2048 for each, more than any PE has.
    assert verdicts(found) == {
        f"zipf {pe}": ("met", 1.1),
        f"hot {pe}": ("MISSED", 1.25),
        f"zipf {pe} or core": ("MISSED", 2.2),
        f"hot {pe} or core": ("MISSED", 5.0),
    }


def test_cost_is_linear_if_a_token_costs_the_same() -> None:
    group = suites.tokens(*suites.MANY_TOKENS)
    found = results_of(
        group.name,
        *(
            result_of(case, fused=case.tokens * cost, fused_capacity=case.tokens * 1e-3)
            for case, cost in zip(group.cases, (1.05e-3, 1e-3, 1.2e-3), strict=True)
        ),
    )
    name = "2048 to 32768 tokens, {}: change of the time for a token"
    assert verdicts(found) == {
        name.format("fused"): ("MISSED", 0.2),
        name.format("fused-capacity"): ("met", 0.0),
    }


def test_times_of_different_groups_are_not_compared() -> None:
    assert verdicts(results_of("elsewhere", result_of(suites.reference(), fused=1, xla=9))) == {}


@pytest.mark.parametrize("suite", ["reference", "full"])
def test_every_target_can_be_measured_by_the_suite(suite: str) -> None:
    groups = suites.SUITES[suite]()
    names = {group.name: {case.name: case for case in group.cases} for group in groups}

    def cases_of(measure_: Any) -> list[tuple[str, Case]]:
        if isinstance(measure_, comparisons.Speedup):
            return list(measure_.where)
        fields = [getattr(measure_, f.name) for f in dataclasses.fields(measure_)]
        flat = [item for field in fields for item in (field if type(field) is tuple else (field,))]
        return [(measure_.group, item) for item in flat if isinstance(item, Case)]

    for target in targets.TARGETS:
        wanted = cases_of(target.measure)
        assert wanted
        for group, case in wanted:
            assert case == names[group][case.name]


def test_suites_name_what_exists_and_do_not_alternate_between_too_many_heaps() -> None:
    for suite in suites.SUITES.values():
        groups = suite()
        assert len({group.name for group in groups}) == len(groups)
        for group in groups:
            assert suites.heaps(group) <= suites.IDLE_HEAPS, group.name
            assert len({case.name for case in group.cases}) == len(group.cases)
            for case in group.cases:
                assert set(case.opponents) <= opponents.OPPONENTS.keys()
                assert case.tokens % case.num_pes == 0
                assert case.shape.num_experts % case.num_pes == 0


def test_cases_are_selected_by_pattern() -> None:
    groups = suites.select(suites.full(), ["^PEs: .* P4 ", "^ungated.*backward"])
    assert [(group.name, len(group.cases)) for group in groups] == [("PEs", 1), ("ungated", 1)]
    assert suites.select(suites.quick(), ["no such case"]) == ()
    (group,) = suites.select(suites.quick(), ["^forward: "], ["fused", "dense"])
    assert group.cases[0].opponents == ("fused", "dense")


def test_models_have_their_published_sizes() -> None:
    sizes = {m.name: (m.hidden, m.intermediate, m.num_experts, m.experts_per_token) for m in MODELS}
    assert sizes["mixtral-8x7b"] == (4096, 14336, 8, 2)
    assert sizes["deepseek-v3"] == (7168, 2048, 256, 8)
    narrow = MODELS[0].narrowed(16)
    assert (narrow.name, narrow.hidden, narrow.intermediate) == ("mixtral-8x7b@1/16", 256, 896)
    with pytest.raises(ValueError, match="do not divide by 5"):
        MODELS[0].narrowed(5)


# The surroundings


def test_variables_that_pin_blas_are_removed_loudly() -> None:
    given = {
        "OPENBLAS_CORETYPE": "Haswell",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=2 --xla_cpu_enable_fast_math=true",
        "HOME": "/home",
    }
    child, warnings = platform.child_environment(given)
    assert child == {
        "XLA_FLAGS": "--xla_cpu_enable_fast_math=true --xla_force_host_platform_device_count=8",
        "JAX_ENABLE_COMPILATION_CACHE": "false",
        "HOME": "/home",
    }
    assert len(warnings) == 2
    assert "OPENBLAS_CORETYPE=Haswell" in warnings[0]
    assert "fast_math" in warnings[1]
    assert platform.child_environment({"HOME": "/home"})[1] == ()


@pytest.mark.parametrize(
    ("processor", "name"),
    [
        ("Intel(R) Xeon(R) Platinum 8480+ CPU @ 2.00GHz", "intel-xeon-platinum-8480"),
        ("NVIDIA H100 80GB HBM3", "nvidia-h100-80gb-hbm3"),
    ],
)
def test_file_names_come_from_the_processor(processor: str, name: str) -> None:
    assert platform.file_name(processor) == name


def test_the_document_is_updated_between_its_markers(tmp_path: Path) -> None:
    document = tmp_path / "docs" / "performance.md"
    picture = tmp_path / "results" / "a-processor-2026-01-01-tokens.png"
    found = results_of("forward", result_of(suites.reference(), fused=1.0, xla=20.0))
    found = dataclasses.replace(found, targets=targets.evaluate(found))
    with pytest.raises(ValueError, match="needs one line"):
        report.update_document(document, found, [picture])
    document.parent.mkdir()
    document.write_text(f"Before.\n\n{report.BEGIN}\nold\n{report.END}\n\nAfter.\n")
    for _ in range(2):
        report.update_document(document, found, [picture])
    text = document.read_text()
    assert text.startswith(f"Before.\n\n{report.BEGIN}\n")
    assert text.endswith(f"{report.END}\n\nAfter.\n")
    assert "old" not in text
    assert "![tokens](../results/a-processor-2026-01-01-tokens.png)" in text
    assert "| fused" in text
    assert "| MISSED" not in text


def test_losses_and_doubts_are_shown() -> None:
    found = results_of("forward", result_of(suites.reference(), fused=1.0, xla=0.5))
    (group,) = found.groups
    busy = dataclasses.replace(group, foreign_load=0.4)
    text = report.to_markdown(dataclasses.replace(found, groups=(busy,), warnings=("a doubt",)))
    assert "xla takes 0.50 of the time" in text
    assert "**WARNING: a doubt.**" in text
    assert "Other processes used the machine (40% during 'forward')" in text
    quiet = dataclasses.replace(group, foreign_load=0.01)
    assert "Other processes" not in report.to_markdown(dataclasses.replace(found, groups=(quiet,)))


def test_nan_never_passes() -> None:
    one = results.Check(result="y", signal=math.nan, peak=0.0, signal_bound=1.0, peak_bound=1.0)
    assert not one.passed
