"""What the CUDA kernel is called with, and its gradients, as far as a machine without a GPU shows.

The extension module is played by `FakeExtension`; programs are lowered for CUDA and not run.
"""

import re
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

import flashmoe_jax as fm
from flashmoe_jax import _ffi, api, fused_cuda, runtime
from tests.conftest import MeshMaker

GIB = 2**30


class FakeExtension:
    """`flashmoe_jax._cuda` on a machine with one GPU, recording what it is asked."""

    NVSHMEM_BUILT_FOR = (3, 3, 24)

    def __init__(self) -> None:
        self.reserved: list[tuple[dict[str, Any], int, int, list[int]]] = []
        self.failed: list[str] = []
        self.started: list[tuple[int, int, int]] = []
        self.free = 8 * GIB

    def limits(self) -> dict[str, int]:
        return {"num_experts": 512, "experts_per_token": 16, "num_pes": 64, "row_bytes": 16}

    def gpu_count(self) -> int:
        return 1

    def handlers(self) -> dict[str, Any]:
        return {}

    def CallSizes(self, **sizes: Any) -> dict[str, Any]:
        return sizes

    def required_memory(self, sizes: dict[str, Any], gpu: int) -> tuple[int, int, int]:
        return GIB, GIB, 2 * sizes["max_rows"]

    def free_and_total_memory(self, gpu: int) -> tuple[int, int]:
        return self.free, 16 * GIB

    def reserve(self, sizes: dict[str, Any], gpu: int, rank: int, processes: list[int]) -> int:
        self.reserved.append((sizes, gpu, rank, processes))
        return len(self.reserved) - 1

    def failures(self) -> list[str]:
        return self.failed

    def reset(self) -> None:
        self.failed = []

    def load_nvshmem(self, path: str) -> tuple[int, int, int]:
        return (3, 8, 0)

    def nvshmem_unique_id(self) -> bytes:
        return bytes(range(128))

    def start_nvshmem(self, unique_id: bytes, rank: int, count: int, gpu: int) -> None:
        assert unique_id == bytes(range(128))
        self.started.append((rank, count, gpu))


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeExtension]:
    """Makes this process believe that it computes on a GPU."""
    extension = FakeExtension()
    monkeypatch.setattr(_ffi, "_cuda_extension", lambda: extension)
    monkeypatch.setattr(_ffi, "why_not_several_gpus", lambda: None)
    monkeypatch.setattr(api, "_platform", lambda mesh: "gpu")
    monkeypatch.setattr(runtime, "_reserved", {})
    monkeypatch.setattr(runtime, "_started", False)
    _ffi.register_cuda.cache_clear()
    api._moe.clear_cache()
    yield extension
    _ffi.register_cuda.cache_clear()
    api._moe.clear_cache()


def make_config(**options: Any) -> fm.MoEConfig:
    sizes = {"num_experts": 8, "experts_per_token": 2, "hidden_size": 16, "intermediate_size": 24}
    return fm.MoEConfig(**{**sizes, **options})


def make_inputs(config: fm.MoEConfig, dtype: Any = jnp.float32) -> tuple[Any, fm.MoEParams]:
    params = fm.init_params(jax.random.key(0), config)
    cast = jax.tree.map(lambda leaf: leaf.astype(dtype), params)
    x = jax.random.normal(jax.random.key(1), (8, 4, config.hidden_size), dtype)
    return x, cast


def given_routing(config: fm.MoEConfig) -> fm.Routing:
    slots = (8, 4, config.experts_per_token)
    return fm.Routing(jnp.zeros(slots, jnp.int32), jnp.ones(slots))


def lowered(
    config: fm.MoEConfig,
    *arguments: Any,
    dtype: Any = jnp.float32,
    grad: bool = False,
    **options: Any,
) -> str:
    """The program of a layer, or of its gradients, for CUDA."""
    x, params = make_inputs(config, dtype)

    def loss(x: jax.Array, params: fm.MoEParams) -> jax.Array:
        y, aux = fm.moe(x, params, config, *arguments, implementation="fused", **options)
        return y.sum() + aux.z_loss + aux.load_balance_loss

    function: Callable[..., Any] = jax.value_and_grad(loss, (0, 1)) if grad else loss
    return jax.jit(function).trace(x, params).lower(lowering_platforms=("cuda",)).as_text()


def kernel_calls(program: str) -> list[str]:
    return [line for line in program.splitlines() if "@flashmoe_" in line]


def types(call: str) -> tuple[list[str], list[str]]:
    """The types of a call's operands and results."""
    signature = call.rpartition(" : (")[2]
    operands, results = signature.split(") -> (")
    return re.findall(r"tensor<(\w+)>", operands), re.findall(r"tensor<(\w+)>", results)


@pytest.mark.usefixtures("cuda")
def test_operands_with_the_routing_of_the_caller() -> None:
    config = make_config()
    (call,) = kernel_calls(lowered(config, given_routing(config), dtype=jnp.bfloat16))
    operands, results = types(call)
    weights = ["8x16x24xbf16", "8x16x24xbf16", "8x24x16xbf16", "0xbf16", "0xbf16", "0xbf16"]
    assert operands == ["32x16xbf16", *weights, "32x2xi32", "32x2xf32"]
    assert results == ["32x16xbf16", "1xi32"]
    assert "routes = false" in call
    assert "check_weights = true" in call


@pytest.mark.usefixtures("cuda")
def test_operands_with_the_gate_in_the_kernel() -> None:
    router = fm.RouterConfig(score="sigmoid", scaling_factor=2.5, selection_bias=True)
    config = make_config(gated=False, use_bias=True, activation="gelu", router=router)
    mask = jnp.ones((8, 4), bool)
    (call,) = kernel_calls(lowered(config, dtype=jnp.float16, mask=mask))
    operands, results = types(call)
    weights = ["0xf16", "8x16x24xf16", "8x24x16xf16", "0xf16", "8x24xf16", "8x16xf16"]
    assert operands == ["32x16xf16", *weights, "16x8xf32", "8xf32", "32xui8"]
    assert results == ["32x16xf16", "1xi32", "32x8xf32", "32x2xi32", "32x2xf32"]
    for attribute in (
        "routes = true",
        "softmax = false",
        "renormalize = true",
        "scaling_factor = 2.500000e+00 : f64",
        "activation = 1 : i64",
        "check_weights = false",
    ):
        assert attribute in call


@pytest.mark.usefixtures("cuda")
def test_the_router_stays_in_jax_with_jitter() -> None:
    config = make_config(router=fm.RouterConfig(jitter=0.1))
    (call,) = kernel_calls(lowered(config, key=jax.random.key(2)))
    assert "routes = false" in call
    (call,) = kernel_calls(lowered(config))
    assert "routes = true" in call


@pytest.mark.usefixtures("cuda")
@pytest.mark.parametrize("sizes", [{}, {"expert": 4}, {"data": 2, "expert": 2}])
@pytest.mark.parametrize("given", [False, True])
def test_gradients_lower(
    make_mesh: MeshMaker, monkeypatch: pytest.MonkeyPatch, sizes: dict[str, int], given: bool
) -> None:
    monkeypatch.setattr(runtime, "reserve", lambda *_: 5)
    config = make_config()
    mesh = make_mesh(**sizes) if sizes else None
    arguments = [given_routing(config)] if given else []
    program = lowered(config, *arguments, mesh=mesh, grad=True)
    calls = kernel_calls(program)
    assert calls, "the forward pass is the kernel's"
    assert all("reservation = 5 : i64" in call for call in calls)
    meets = bool(sizes)
    assert ('_xla_stream_annotation = "collective"' in program) == meets


def play_kernel(monkeypatch: pytest.MonkeyPatch, config: fm.MoEConfig) -> None:
    """Lets the XLA implementation compute what the kernel would, so that gradients have values."""

    def kernel(
        target: str, results: list[Any], attributes: dict[str, Any], operands: tuple[jax.Array, ...]
    ) -> list[jax.Array]:
        x, gate, up, down, _, _, _, *routing = operands
        params = fm.MoEParams(routing[0], None, gate, up, down)
        call = local_calls[-1]
        if not attributes["routes"]:
            y, dropped = fused_cuda.xla_local(x, *routing, params, call)
            return [y, dropped[None]]
        mask = routing[2].astype(bool) if routing[2].size else None
        made = fm.route(x, params, config, mask=mask)
        y, dropped = fused_cuda.xla_local(x, made.indices, made.weights, params, call)
        return [y, dropped[None], made.logits, made.indices, made.weights]

    local_calls: list[Any] = []

    def reserve(call: Any, *_: Any) -> int:
        local_calls.append(call)
        return 0

    monkeypatch.setattr(fused_cuda, "custom_call", kernel)
    monkeypatch.setattr(runtime, "reserve", reserve)


@pytest.mark.usefixtures("cuda")
@pytest.mark.parametrize("case", ["gate", "masked", "given", "capacity"])
@pytest.mark.parametrize("pes", [1, 4])
def test_gradients_are_those_of_xla(
    make_mesh: MeshMaker, monkeypatch: pytest.MonkeyPatch, case: str, pes: int
) -> None:
    config = make_config(capacity_factor=1.0 if case == "capacity" else None)
    play_kernel(monkeypatch, config)
    x, params = make_inputs(config)
    mask = jnp.arange(32).reshape(8, 4) % 3 > 0 if case == "masked" else None
    mesh = make_mesh(expert=pes) if pes > 1 else None

    def loss(x: jax.Array, params: fm.MoEParams, implementation: Any) -> jax.Array:
        routing = fm.route(x, params, config) if case == "given" else None
        y, aux = fm.moe(
            x, params, config, routing, mesh=mesh, mask=mask, implementation=implementation
        )
        losses = 0.1 * aux.z_loss + 0.1 * aux.load_balance_loss
        return (y * jnp.cos(jnp.arange(y.size).reshape(y.shape))).sum() + losses

    fused, xla = (
        jax.jit(jax.value_and_grad(loss, (0, 1)), static_argnums=2)(x, params, implementation)
        for implementation in ("fused", "xla")
    )
    assert any(np.any(leaf) for leaf in jax.tree.leaves(xla[1]))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), fused, xla)


@pytest.mark.usefixtures("cuda")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"hidden_size": 18},
            r"hidden_size that is a multiple of 4 in float32, and this one is 18",
        ),
        ({"intermediate_size": 30}, r"intermediate_size that is a multiple of 4 in float32"),
        ({"num_experts": 520}, r"at most 512 as num_experts, and this one is 520"),
        ({"num_experts": 64, "experts_per_token": 17}, r"at most 16 as experts_per_token"),
    ],
)
def test_sizes_that_the_kernel_does_not_take(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        lowered(make_config(**options))


@pytest.mark.usefixtures("cuda")
def test_auto_takes_xla_where_the_kernel_does_not_take_the_sizes() -> None:
    api._warn_once.cache_clear()
    config = make_config(hidden_size=18)
    x, params = make_inputs(config)
    with pytest.warns(
        UserWarning, match="'xla' instead of 'fused': the CUDA kernel takes a hidden"
    ):
        y, _ = fm.moe(x, params, config)
    expected, _ = fm.moe(x, params, config, implementation="xla")
    np.testing.assert_array_equal(y, expected)


def test_a_group_without_nvshmem(
    make_mesh: MeshMaker, cuda: FakeExtension, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_ffi, "why_not_several_gpus", lambda: "the test says no")
    with pytest.raises(ValueError, match="'fused' is not available: the test says no"):
        lowered(make_config(), mesh=make_mesh(expert=4))
    assert kernel_calls(lowered(make_config(), mesh=make_mesh(data=4, expert=1)))
    assert len(cuda.reserved) == 1


def test_one_reservation_for_calls_of_the_same_sizes(cuda: FakeExtension) -> None:
    for _ in range(2):
        lowered(make_config())
    lowered(make_config(activation="relu"))
    assert len(cuda.reserved) == 1
    sizes, gpu, rank, processes = cuda.reserved[0]
    assert sizes == {
        "num_pes": 1,
        "tokens": 32,
        "hidden": 16,
        "intermediate": 24,
        "num_experts": 8,
        "experts_per_token": 2,
        "capacity": -1,
        "max_rows": 64,
        "dtype": "float32",
        "exact": True,
    }
    assert (gpu, rank, processes) == (jax.local_devices()[0].local_hardware_id or 0, 0, [])
    lowered(make_config(capacity_factor=1.0))
    with jax.default_matmul_precision("tensorfloat32"):
        lowered(make_config())
    assert [(sizes["capacity"], sizes["exact"]) for sizes, *_ in cuda.reserved[1:]] == [
        (8, True),
        (-1, False),
    ]


def test_memory_that_does_not_fit(cuda: FakeExtension) -> None:
    cuda.free = GIB
    message = (
        r"take 2.0 GiB .* 64 rows.*1.0 of the 16.0 GiB of GPU .*XLA_PYTHON_CLIENT_MEM_FRACTION"
    )
    with pytest.raises(ValueError, match=message):
        lowered(make_config(max_received_rows=32))
    assert not cuda.reserved


class Device:
    def __init__(self, process_index: int) -> None:
        self.process_index = process_index
        self.local_hardware_id = process_index % 4


@pytest.mark.parametrize(
    ("process", "axis", "rank", "group"),
    [(0, 1, 0, (0, 2, 5)), (5, 1, 2, (0, 2, 5)), (3, 1, 1, (1, 3, 4)), (3, 0, 1, (2, 3))],
)
def test_place_in_an_expert_group(
    monkeypatch: pytest.MonkeyPatch, process: int, axis: int, rank: int, group: tuple[int, ...]
) -> None:
    devices = np.array([[Device(p) for p in row] for row in ((0, 2, 5), (1, 3, 4))])
    monkeypatch.setattr(jax, "process_index", lambda: process)
    place = runtime._place_in_group(devices, axis)
    assert place == runtime._Place(process % 4, rank, group)


def test_two_gpus_of_one_process_in_a_group(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jax, "process_index", lambda: 0)
    devices = np.array([Device(0), Device(0)])
    with pytest.raises(ValueError, match="2 devices of the mesh belong to process 0"):
        runtime._place_in_group(devices, 0)


def test_a_group_of_an_abstract_mesh(make_mesh: MeshMaker, cuda: FakeExtension) -> None:
    mesh = make_mesh(expert=4)
    with pytest.raises(ValueError, match="the mesh of this call is abstract; pass mesh="):
        lowered(make_config(), mesh=mesh.abstract_mesh)
    monopolised = Mesh(mesh.devices, mesh.axis_names)
    with pytest.raises(ValueError, match="4 devices of the mesh belong to process 0"):
        lowered(make_config(), mesh=monopolised)
    with (
        jax.set_mesh(mesh),
        pytest.raises(ValueError, match="4 devices of the mesh belong to process 0"),
    ):
        lowered(make_config())
    assert not cuda.reserved


def test_nvshmem_starts_once(cuda: FakeExtension) -> None:
    runtime.start()
    runtime.start()
    assert [(rank, count) for rank, count, _ in cuda.started] == [(0, 1)]


def test_a_failed_call_is_reported_until_reset(cuda: FakeExtension) -> None:
    runtime.check()
    cuda.failed = ["PE 1: no counts from PE 0", "PE 0: rows missing"]
    with pytest.raises(runtime.CallError, match=r"PE 1: no counts from PE 0; PE 0: rows missing"):
        runtime.check()
    runtime.reset()
    runtime.check()


def test_why_the_kernel_does_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_ffi, "_cuda_extension", lambda: ImportError("libcudart is missing"))
    reason = _ffi.unavailable_reason("gpu")
    assert reason is not None
    assert "flashmoe_jax._cuda could not be loaded (libcudart is missing)" in reason
    extension = FakeExtension()
    monkeypatch.setattr(_ffi, "_cuda_extension", lambda: extension)
    assert _ffi.unavailable_reason("cuda") is None
    monkeypatch.setattr(extension, "gpu_count", lambda: 0)
    assert _ffi.unavailable_reason("cuda") == "CUDA finds no GPU"

    def unreadable() -> int:
        raise RuntimeError("the driver is too old")

    monkeypatch.setattr(extension, "gpu_count", unreadable)
    assert _ffi.unavailable_reason("cuda") == "CUDA finds no GPU (the driver is too old)"


def test_why_the_kernel_does_not_span_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    extension = FakeExtension()
    monkeypatch.setattr(_ffi, "_cuda_extension", lambda: extension)
    gpu = type("Gpu", (), {"platform": "gpu"})()
    monkeypatch.setattr(jax, "local_devices", lambda: [gpu, gpu])
    reason = _ffi.why_not_several_gpus()
    assert reason is not None
    assert reason.startswith("this process has 2 GPUs, and the CUDA kernel spans several GPUs only")
    monkeypatch.setattr(jax, "local_devices", lambda: [gpu])
    assert _ffi.why_not_several_gpus() is None

    def too_old(path: str) -> tuple[int, int, int]:
        raise RuntimeError("NVSHMEM 3.1.0 was found")

    monkeypatch.setattr(extension, "load_nvshmem", too_old)
    assert _ffi.why_not_several_gpus() == "NVSHMEM 3.1.0 was found"
