"""The extension of the CUDA kernel, as far as a machine without a GPU shows it."""

import os
from types import ModuleType

import pytest

from flashmoe_jax import _ffi

pytestmark = pytest.mark.smoke


@pytest.fixture(scope="module")
def cuda() -> ModuleType:
    try:
        return _ffi.cuda_extension()
    except ImportError as error:
        if os.environ.get("FLASHMOE_CUDA") == "1":
            raise
        pytest.skip(f"the CUDA extension was not built ({error}); docs/development.md says how")


def sizes(cuda: ModuleType, **changes: object) -> object:
    return cuda.CallSizes(
        **{
            "num_pes": 1,
            "tokens": 8,
            "hidden": 64,
            "intermediate": 64,
            "num_experts": 4,
            "experts_per_token": 2,
            "capacity": -1,
            "max_rows": 16,
            "dtype": "bfloat16",
            "exact": True,
            **changes,
        }
    )


# In the order of the C++ enum Failure (kernels/cuda/workspace.h), from 1 on.
DESCRIPTIONS = (
    "expert index -7 (PE 3, token 5, slot 1) is out of range: allowed are 0 to 15",
    "an expert weight (PE 3, token 5, slot 1) is not finite",
    "PE 3: thread blocks missing at a barrier of this PE in phase plan: expected 21 arrivals",
    "PE 3: no counts from PE 2 in phase plan: expected epoch 9 of call site 4, seen epoch 7 of",
    "PE 3: another call is executed by PE 2 in phase plan: expected epoch 9 of call site 4",
    "PE 3: rows missing in phase expert for row block 2: expected 21 rows, seen 20",
    "PE 3: first-stage tiles missing in phase expert for row block 2, awaited from this PE itself",
    "PE 3: second-stage tiles missing in phase expert for the rows from 32 on, awaited from this",
    "PE 3: results missing in phase combine for token 2: expected 21 pieces, seen 20",
)


@pytest.mark.parametrize("failure", range(1, len(DESCRIPTIONS) + 1))
def test_what_is_said_of_a_failure(cuda: ModuleType, failure: int) -> None:
    expected, seen = 21, 20
    if failure in (1, 2):
        expected, seen = 5 * 4 + 1, 2**64 - 7
    if failure in (4, 5):
        expected, seen = (4 << 32) | 9, (8 << 32) | 7
    text = cuda.describe_failure(
        failure=failure,
        pe=3,
        awaited=2,
        expected=expected,
        seen=seen,
        num_experts=16,
        experts_per_token=4,
    )
    assert text.startswith(DESCRIPTIONS[failure - 1])


def test_failures_without_a_name(cuda: ModuleType) -> None:
    record = {"pe": 3, "awaited": 0, "expected": 0, "seen": 0}
    shape = {"num_experts": 16, "experts_per_token": 4}
    assert cuda.describe_failure(failure=0, **record, **shape) == "nothing failed"
    unknown = cuda.describe_failure(failure=len(DESCRIPTIONS) + 1, **record, **shape)
    assert unknown == f"PE 3: unknown failure {len(DESCRIPTIONS) + 1}"


def test_a_type_that_the_kernel_does_not_compute(cuda: ModuleType) -> None:
    with pytest.raises(ValueError, match="does not compute float64"):
        sizes(cuda, dtype="float64")


def test_an_nvshmem_that_is_not_there(cuda: ModuleType) -> None:
    message = r"could not be loaded \(/nowhere/libnvshmem_host.so.3: .*pip install nvidia-nvshmem"
    with pytest.raises(RuntimeError, match=message):
        cuda.load_nvshmem("/nowhere/libnvshmem_host.so.3")


def test_handlers(cuda: ModuleType) -> None:
    assert {target: sorted(stages) for target, stages in cuda.handlers().items()} == {
        "flashmoe_forward": ["execute", "initialize"]
    }
