"""A machine with GPUs, played on one without: what JAX and the extension module say of them."""

from typing import Any

GIB = 2**30


class FakeGpu:
    """A GPU as JAX has it."""

    local_hardware_id = 0

    def __init__(self, pool_bytes: int | None = None) -> None:
        self.pool_bytes = pool_bytes

    def memory_stats(self) -> dict[str, int] | None:
        # The limit is that of a pool that may grow to the whole GPU.
        return self.pool_bytes and {"bytes_limit": 16 * GIB, "pool_bytes": self.pool_bytes}


class FakeExtension:
    """`flashmoe_jax._cuda` on a machine with one GPU, recording what it is asked."""

    NVSHMEM_BUILT_FOR = (3, 3, 24)

    def __init__(self) -> None:
        self.sizes: list[dict[str, Any]] = []
        self.failed: list[str] = []
        self.started: list[tuple[int, int, int]] = []
        self.total = 16 * GIB
        self.compute_capability = "9.0"
        self.pci_bus_id = "0000:01:00.0"
        self.without_atomics: tuple[str, ...] = ()

    def limits(self) -> dict[str, int]:
        return {"num_experts": 512, "experts_per_token": 16, "num_pes": 64, "row_bytes": 16}

    def gpu_count(self) -> int:
        return 1

    def handlers(self) -> dict[str, Any]:
        return {}

    def CallSizes(self, **sizes: Any) -> dict[str, Any]:
        self.sizes.append(sizes)
        return sizes

    def required_memory(self, sizes: dict[str, Any], gpu: int) -> tuple[int, int, int]:
        return GIB, GIB, 2 * sizes["max_rows"]

    def gpu(self, ordinal: int) -> dict[str, Any]:
        assert ordinal == 0
        return {"compute_capability": self.compute_capability, "pci_bus_id": self.pci_bus_id}

    def peer_atomics(self, gpu: int, pci_bus_id: str) -> bool:
        assert gpu == 0
        assert pci_bus_id != self.pci_bus_id
        return pci_bus_id not in self.without_atomics

    def free_and_total_memory(self, gpu: int) -> tuple[int, int]:
        return 0, self.total

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

    def nvshmem_reach(self) -> list[bool]:
        rank, count, _ = self.started[-1]
        return [pe <= rank for pe in range(count)]

    def set_nvshmem_reach(self, reach: list[bool]) -> None:
        self.reach = reach
