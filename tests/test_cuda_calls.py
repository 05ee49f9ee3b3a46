"""What the CUDA kernel is called with, and its gradients, as far as a machine without a GPU shows.

The extension module is played by `FakeExtension`; programs are lowered for CUDA and not run.
"""

import functools
import re
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, PartitionSpec

import flashmoe_jax as fm
from flashmoe_jax import _ffi, api, fused_cuda, runtime
from flashmoe_jax.cuda_call import KernelCall
from tests.conftest import MeshMaker
from tests.fake_cuda import GIB, FakeExtension, FakeGpu

PROCESS_GROUPS = runtime.process_groups


def groups_of_devices(mesh: Mesh, axis: str) -> np.ndarray:
    ids = np.vectorize(lambda device: device.id, otypes=[np.int32])(mesh.devices)
    by_group = np.moveaxis(ids, mesh.axis_names.index(axis), -1)
    return by_group.reshape(-1, by_group.shape[-1])


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeExtension]:
    """Makes this process believe that it computes on a GPU."""
    extension = FakeExtension()
    monkeypatch.setattr(_ffi, "_cuda_extension", lambda: extension)
    monkeypatch.setattr(_ffi, "gpus", lambda: [FakeGpu()])
    monkeypatch.setattr(_ffi, "why_not_several_gpus", lambda: None)
    monkeypatch.setattr(api, "_platform", lambda mesh: "gpu")
    monkeypatch.setattr(runtime, "_started", True)
    # What the mesh of eight devices would be if each were a process.
    monkeypatch.setattr(runtime, "process_groups", groups_of_devices)
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
    implementation: api.Implementation = "fused",
    **options: Any,
) -> str:
    """The program of a layer, or of its gradients, for CUDA."""
    x, params = make_inputs(config, dtype)

    def loss(x: jax.Array, params: fm.MoEParams) -> jax.Array:
        y, aux = fm.moe(x, params, config, *arguments, implementation=implementation, **options)
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
def test_gradients_lower(make_mesh: MeshMaker, sizes: dict[str, int], given: bool) -> None:
    config = make_config()
    mesh = make_mesh(**sizes) if sizes else None
    arguments = [given_routing(config)] if given else []
    program = lowered(config, *arguments, mesh=mesh, grad=True)
    calls = kernel_calls(program)
    assert calls, "the forward pass is the kernel's"
    # Before jax 0.11.1 the stream has no name.
    meets = bool(sizes) and jax.__version_info__ >= (0, 11, 1)
    assert ('_xla_stream_annotation = "collective"' in program) == meets


def play_kernel(monkeypatch: pytest.MonkeyPatch, config: fm.MoEConfig) -> None:
    """Lets the XLA implementation compute what the kernel would, so that gradients have values."""

    def run(kernel: KernelCall, results: tuple[Any, ...], *operands: jax.Array) -> list[jax.Array]:
        x, gate, up, down, _, _, _, *routing = operands
        params = fm.MoEParams(routing[0], None, gate, up, down)
        if not kernel.routes:
            y, dropped = fused_cuda.xla_local(x, *routing, params, kernel.call)
            return [y, dropped[None]]
        mask = routing[2].astype(bool) if routing[2].size else None
        made = fm.route(x, params, config, mask=mask)
        y, dropped = fused_cuda.xla_local(x, made.indices, made.weights, params, kernel.call)
        # The kernel computes the logits of all tokens.
        logits = jnp.matmul(x, params.router, precision=jax.lax.Precision.HIGHEST)
        return [y, dropped[None], logits, made.indices, made.weights]

    monkeypatch.setattr(fused_cuda, "call_kernel", run)


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
    # The same operations in float32, which XLA fuses otherwise in another program.
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), fused, xla)


@pytest.mark.usefixtures("cuda")
@pytest.mark.parametrize("given", [False, True], ids=["mask", "given"])
def test_gradients_where_masked_tokens_hold_nan(
    monkeypatch: pytest.MonkeyPatch, given: bool
) -> None:
    config = make_config()
    play_kernel(monkeypatch, config)
    x, params = make_inputs(config)
    mask = np.arange(32).reshape(8, 4) % 3 > 0
    routing = fm.route(x, params, config, mask=mask) if given else None

    @functools.partial(jax.value_and_grad, argnums=(0, 1))
    def loss(x: jax.Array, params: fm.MoEParams) -> jax.Array:
        y, aux = fm.moe(
            x,
            params,
            config,
            routing,
            mask=None if given else mask,
            implementation="fused",
        )
        return (y * jnp.cos(jnp.arange(y.size).reshape(y.shape))).sum() + aux.z_loss

    got = loss(jnp.where(mask[..., None], x, np.nan), params)
    jax.tree.map(np.testing.assert_array_equal, got, loss(x, params))
    assert not np.asarray(got[1][0])[~mask].any()


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
def test_auto_takes_the_kernel_on_one_gpu(make_mesh: MeshMaker) -> None:
    config = make_config()
    for mesh in (None, make_mesh(data=4, expert=1)):
        assert kernel_calls(lowered(config, mesh=mesh, implementation="auto"))


@pytest.mark.usefixtures("cuda")
@pytest.mark.parametrize("spans", [True, False])
def test_auto_does_not_take_the_kernel_where_there_are_several_gpus(
    make_mesh: MeshMaker, monkeypatch: pytest.MonkeyPatch, spans: bool
) -> None:
    api._warn_once.cache_clear()
    config = make_config()
    x, params = make_inputs(config)
    mesh = make_mesh(expert=4) if spans else None
    if not spans:
        monkeypatch.setattr(_ffi, "gpus", lambda: [FakeGpu(), FakeGpu()])
    with pytest.warns(
        UserWarning, match="'xla' instead of 'fused': the CUDA kernel has been proven on one GPU"
    ):
        y, _ = fm.moe(x, params, config, mesh=mesh)
    expected, _ = fm.moe(x, params, config, mesh=mesh, implementation="xla")
    np.testing.assert_array_equal(y, expected)


def test_a_group_without_nvshmem(
    make_mesh: MeshMaker, monkeypatch: pytest.MonkeyPatch, cuda: FakeExtension
) -> None:
    mesh = make_mesh(expert=4)
    monkeypatch.setattr(runtime, "_started", False)
    monkeypatch.setattr(jax, "process_count", lambda: 4)
    with pytest.raises(ValueError, match=r"NVSHMEM has not been started; call .*runtime.start"):
        lowered(make_config(), mesh=mesh)
    monkeypatch.setattr(_ffi, "why_not_several_gpus", lambda: "the test says no")
    with pytest.raises(ValueError, match="'fused' is not available: the test says no"):
        lowered(make_config(), mesh=mesh)
    assert kernel_calls(lowered(make_config(), mesh=make_mesh(data=4, expert=1)))
    assert not cuda.started


def attribute(call: str, name: str) -> str:
    (value,) = re.findall(rf"\b{name} = (dense<.*?>|array<.*?>|[-\w.]+)", call)
    return value


@pytest.mark.usefixtures("cuda")
def test_what_the_memory_of_a_call_depends_on() -> None:
    def sizes(**options: Any) -> list[str]:
        (call,) = kernel_calls(lowered(make_config(**options)))
        names = ("num_pes", "num_experts", "experts_per_token", "capacity", "max_rows", "exact")
        return [attribute(call, name) for name in names]

    assert sizes() == ["1", "8", "2", "-1", "64", "true"]
    assert sizes(capacity_factor=1.0) == ["1", "8", "2", "8", "64", "true"]
    assert sizes(max_received_rows=32) == ["1", "8", "2", "-1", "32", "true"]
    with jax.default_matmul_precision("tensorfloat32"):
        assert sizes()[-1] == "false"


def test_memory_that_could_never_fit(cuda: FakeExtension) -> None:
    cuda.total = GIB
    message = r"take 2.0 GiB .* 64 rows.*GPU 0 has 1.0 GiB.*max_received_rows \(now 32"
    with pytest.raises(ValueError, match=message):
        lowered(make_config(max_received_rows=32))
    assert cuda.sizes[-1] == {
        "num_pes": 1,
        "tokens": 32,
        "hidden": 16,
        "intermediate": 24,
        "num_experts": 8,
        "experts_per_token": 2,
        "capacity": -1,
        "max_rows": 32,
        "dtype": "float32",
        "exact": True,
    }


def test_memory_beside_that_of_xla(cuda: FakeExtension, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = FakeGpu(14 * GIB)
    gpu.local_hardware_id = 3
    monkeypatch.setattr(_ffi, "gpus", lambda: [gpu])
    assert kernel_calls(lowered(make_config()))
    gpu.pool_bytes += 1
    message = (
        r"take 2.0 GiB .*GPU 3 has 16.0 GiB, of which XLA holds 14.0 GiB; "
        r"a lower XLA_PYTHON_CLIENT_MEM_FRACTION leaves more. Set MoEConfig.max_received_rows"
    )
    api._moe.clear_cache()
    with pytest.raises(ValueError, match=message):
        lowered(make_config())
    cuda.total = GIB
    with pytest.raises(ValueError, match=r"GPU 3 has 1.0 GiB. Set MoEConfig"):
        lowered(make_config())


Layers = Callable[[jax.Array], jax.Array]


def tags(layers: Layers, x: jax.Array) -> list[str]:
    program = jax.jit(layers).trace(x).lower(lowering_platforms=("cuda",)).as_text()
    return [attribute(call, "tag") for call in kernel_calls(program)]


@pytest.mark.usefixtures("cuda")
@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
def test_calls_of_a_program_have_different_tags(make_mesh: MeshMaker, axis_type: AxisType) -> None:
    config = make_config()
    x, params = make_inputs(config)
    mesh = make_mesh(axis_type, expert=4)

    def layer(x: jax.Array) -> jax.Array:
        return fm.moe(x, params, config, mesh=mesh, implementation="fused")[0]

    def model(x: jax.Array) -> jax.Array:
        return layer(layer(x) + layer(x))

    def gradient(x: jax.Array) -> jax.Array:
        return jax.grad(lambda x: jax.checkpoint(lambda x: jnp.sin(model(x)))(x).sum())(x)

    def loop(x: jax.Array) -> jax.Array:
        return jax.lax.scan(lambda x, _: (model(x), None), x, None, length=5)[0]

    for program in (model, gradient, loop):
        found = tags(program, x)
        assert len(set(found)) == len(found) >= 3
        # As another process would have them, which has traced other things before.
        api._moe.clear_cache()
        jax.eval_shape(layer, x)
        assert tags(program, x) == found

    def model_of_that_name(x: jax.Array) -> jax.Array:
        return model(x)

    assert not set(tags(model, x)) & set(tags(model_of_that_name, x))


@pytest.mark.usefixtures("cuda")
def test_local_calls_have_different_tags(make_mesh: MeshMaker) -> None:
    config = make_config()
    x, params = make_inputs(config)
    specs = api.partition_specs(config, "expert")
    tokens = PartitionSpec("expert")

    @functools.partial(
        jax.shard_map, mesh=make_mesh(expert=4), in_specs=(tokens, specs), out_specs=tokens
    )
    def model(x: jax.Array, params: fm.MoEParams) -> jax.Array:
        for _ in range(3):
            x, _ = fm.moe_local(x, params, config, expert_axis="expert", implementation="fused")
        return x

    assert len(set(tags(lambda x: model(x, params), x))) == 3


@pytest.mark.usefixtures("cuda")
def test_the_expert_groups_of_a_call(make_mesh: MeshMaker) -> None:
    def groups(**sizes: int) -> str:
        (call,) = kernel_calls(lowered(make_config(), mesh=make_mesh(**sizes)))
        return attribute(call, "groups")

    assert groups(expert=4) == "dense<[0, 1, 2, 3]>"
    assert groups(data=2, expert=4) == "dense<[0, 1, 2, 3, 4, 5, 6, 7]>"
    assert groups(expert=4, data=2) == "dense<[0, 2, 4, 6, 1, 3, 5, 7]>"
    assert groups(data=8, expert=1) == "dense<>"


@pytest.mark.usefixtures("cuda")
def test_tracing_alone_needs_no_devices(
    make_mesh: MeshMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> Any:
        raise AssertionError("the groups were asked for")

    monkeypatch.setattr(runtime, "process_groups", refuse)
    config = make_config()
    x, params = make_inputs(config)
    layer = functools.partial(
        fm.moe, config=config, mesh=make_mesh(expert=4), implementation="fused"
    )
    y, _ = jax.eval_shape(layer, x, params)
    assert y.shape == x.shape
    assert "flashmoe_forward" in str(jax.make_jaxpr(layer)(x, params))


@pytest.mark.usefixtures("cuda")
def test_without_jit() -> None:
    config = make_config()
    x, params = make_inputs(config)
    # It gets as far as a CPU can.
    with (
        jax.disable_jit(),
        pytest.raises(NotImplementedError, match="'flashmoe_forward' not found for platform cpu"),
    ):
        fm.moe(x, params, config, implementation="fused")


@pytest.mark.usefixtures("cuda")
def test_vmap_over_the_kernel() -> None:
    config = make_config()
    x, params = make_inputs(config)
    with pytest.raises(NotImplementedError, match="vmap over flashmoe_jax"):
        jax.vmap(lambda x: fm.moe(x, params, config, implementation="fused")[0])(x)


class Device:
    def __init__(self, process_index: int) -> None:
        self.process_index = process_index


class FakeMesh:
    """A mesh of devices of several processes."""

    axis_names = ("data", "expert")

    def __init__(self, processes: list[list[int]]) -> None:
        self.devices = np.array([[Device(p) for p in row] for row in processes])


def test_expert_groups_of_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jax, "process_count", lambda: 6)
    mesh = FakeMesh([[0, 2, 5], [1, 3, 4]])
    np.testing.assert_array_equal(runtime.process_groups(mesh, "expert"), [[0, 2, 5], [1, 3, 4]])
    np.testing.assert_array_equal(runtime.process_groups(mesh, "data"), [[0, 1], [2, 3], [5, 4]])


@pytest.mark.parametrize(
    ("processes", "message"),
    [
        ([[0, 1], [1, 2]], "2 devices of the mesh belong to process 1"),
        ([[0, 1]], "0 devices of the mesh belong to process 2"),
    ],
)
def test_meshes_that_do_not_hold_every_process_once(
    monkeypatch: pytest.MonkeyPatch, processes: list[list[int]], message: str
) -> None:
    monkeypatch.setattr(jax, "process_count", lambda: 3)
    with pytest.raises(ValueError, match=message):
        runtime.process_groups(FakeMesh(processes), "expert")


def test_where_the_devices_of_a_mesh_come_from(
    make_mesh: MeshMaker, monkeypatch: pytest.MonkeyPatch, cuda: FakeExtension
) -> None:
    seen = []

    def see(mesh: Any, axis: str) -> np.ndarray:
        seen.append(mesh)
        return groups_of_devices(mesh, axis) if isinstance(mesh, Mesh) else real(mesh, axis)

    real = PROCESS_GROUPS
    monkeypatch.setattr(runtime, "process_groups", see)
    mesh = make_mesh(expert=4)
    with pytest.raises(ValueError, match="the mesh of this call is abstract; pass mesh="):
        lowered(make_config(), mesh=mesh.abstract_mesh)
    lowered(make_config(), mesh=mesh)
    with jax.set_mesh(mesh):
        lowered(make_config())
    assert seen[1:] == [mesh, mesh]


def test_one_process_needs_no_nvshmem(cuda: FakeExtension, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime, "_started", False)
    monkeypatch.setattr(_ffi, "why_not_several_gpus", lambda: "NVSHMEM is missing")
    runtime.start()
    assert not cuda.started
    assert runtime.why_not_several_gpus() == "NVSHMEM is missing"
    monkeypatch.setattr(_ffi, "why_not_several_gpus", lambda: None)
    reason = runtime.why_not_several_gpus()
    assert reason is not None
    assert reason.startswith("this program has one process, and the CUDA kernel spans several")


def test_a_failed_call_is_reported_until_reset(cuda: FakeExtension) -> None:
    runtime.check()
    cuda.failed = ["PE 1: no counts from PE 0", "PE 0: rows missing"]
    with pytest.raises(runtime.CallError, match=r"PE 1: no counts from PE 0; PE 0: rows missing"):
        runtime.check()
    runtime.reset()
    runtime.check()


def test_without_the_module_there_is_nothing_to_check_or_reset(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(_ffi, "_cuda_extension", lambda: ImportError("libcudart is missing"))
    runtime.check()
    runtime.reset()


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


@pytest.fixture
def empty_cache() -> Iterator[None]:
    _ffi.load_nvshmem.cache_clear()
    yield
    _ffi.load_nvshmem.cache_clear()


@pytest.mark.usefixtures("empty_cache")
def test_why_the_kernel_does_not_span_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    extension = FakeExtension()
    monkeypatch.setattr(_ffi, "_cuda_extension", lambda: extension)
    assert _ffi.why_not_several_gpus().startswith("this process has 0 GPUs, and the CUDA kernel")
    gpus = [FakeGpu(), FakeGpu()]
    monkeypatch.setattr(jax, "local_devices", lambda backend: {"cuda": gpus}[backend])
    assert _ffi.why_not_several_gpus().startswith("this process has 2 GPUs, and the CUDA kernel")
    del gpus[1]

    def too_old(path: str) -> tuple[int, int, int]:
        raise RuntimeError("NVSHMEM 3.1.0 was found")

    with monkeypatch.context() as patch:
        patch.setattr(extension, "load_nvshmem", too_old)
        assert _ffi.why_not_several_gpus() == "NVSHMEM 3.1.0 was found"
    assert _ffi.why_not_several_gpus() is None
    # A library that has been loaded is not asked for again, whatever traces.
    monkeypatch.setattr(extension, "load_nvshmem", too_old)
    assert _ffi.why_not_several_gpus() is None
