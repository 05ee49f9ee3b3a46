// What the emulated bodies of kernels/device call. Each hook acts for the emulated thread (fiber)
// that calls it; emulator.h says how to launch a kernel and what is checked.
#pragma once

#include <cstddef>
#include <cstdint>

namespace flashmoe::emulator {

// Identity.
int thread_index();
int block_index();
int block_count();
int block_threads();
std::byte* shared_memory();

// Barriers of a CTA; warp-wide convergence and exchange, by all 32 lanes.
void barrier_sync(int barrier, int threads);
void warp_sync();
uint32_t shuffle(uint32_t value, int source);
uint32_t ballot(bool predicate);
uint32_t match_any(uint32_t value);

// Atomic accesses of 4 or 8 bytes, and fences.
enum class Order { kRelaxed, kAcquire, kRelease, kAcquireRelease };
enum class Scope { kGpu, kSystem };
uint64_t atomic_load(const void* address, size_t bytes, Order order, Scope scope);
void atomic_store(void* address, size_t bytes, uint64_t value, Order order, Scope scope);
uint64_t atomic_add(void* address, size_t bytes, uint64_t value, Order order, Scope scope);
uint64_t atomic_compare_exchange(void* address, size_t bytes, uint64_t expected, uint64_t value,
                                 Order order, Scope scope);
void fence(Scope scope);
void fence_proxy_async();

// Time, which is virtual: it goes on with the steps of the scheduler, and faster while all wait.
uint64_t nanoseconds();
void sleep(uint32_t nanoseconds);

// mbarriers. `barrier` points to 8 bytes of shared memory.
void mbarrier_init(void* barrier, uint32_t arrivals);
void fence_mbarrier_init();
void mbarrier_invalidate(void* barrier);
void mbarrier_arrive(void* barrier, uint32_t expected_bytes);
bool mbarrier_test(void* barrier, uint32_t parity);
void mbarrier_wait(void* barrier, uint32_t parity);

// cp.async.
void async_copy_16(void* shared, const void* global, uint32_t bytes);
void async_copy_arrive(void* barrier);

// TMA. Sizes are in elements, innermost dimension first; strides in bytes, of dimensions 1 and 2.
struct TensorMap {
  const void* base;
  uint32_t element_bytes;
  uint64_t size[3];
  uint64_t stride[2];
  uint32_t box[3];  // box[0] * element_bytes is 128
};
void tma_load(void* shared, const TensorMap* map, void* barrier, int32_t x, int32_t y, int32_t z);

// NVSHMEM. Addresses are those of the objects in the caller's own symmetric memory. By one lane for
// all; `alike`: they all ask for the same.
void put_signal(void* target, const void* source, size_t bytes, uint64_t* signal, uint64_t value,
                bool add, int pe, bool alike);
// What the puts brought that have updated the signal is visible from here on.
void acquire_puts(const uint64_t* signal);
void quiet();

// Tensor cores.
enum class MmaType { kBFloat16, kFloat16, kTf32 };
// mma.sync: m16n8k16 for the 16-bit types, m16n8k8 for tf32. Registers of this lane; d += a b.
void mma_sync(MmaType type, float d[4], const uint32_t a[4], const uint32_t b[2]);
// ldmatrix of four 8x8 matrices of 16-bit elements; lane i gives the address of row i % 8 of
// matrix i / 8.
void ldmatrix(uint32_t r[4], const void* row, bool transpose);
// wgmma of m64 x columns x k16 with both operands in shared memory. The accumulators of this
// thread, columns / 2 of them, must not be read or written by it until wgmma_wait says so.
void wgmma(MmaType type, float* accumulators, int columns, uint64_t a_descriptor,
           uint64_t b_descriptor, bool a_transposed, bool b_transposed, bool accumulate);
void wgmma_fence();
void wgmma_commit();
void wgmma_wait(int pending_groups);
// A wgmma descriptor names shared memory by a 14-bit field, address / 16: an offset in the CTA's.
uint32_t shared_offset(const void* shared);

}  // namespace flashmoe::emulator
