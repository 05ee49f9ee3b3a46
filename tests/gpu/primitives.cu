// The primitives of kernels/device and both tile engines on one Hopper GPU, against the pure
// functions that the emulator is made of and against sums in double.
//
// Prints a line for each check; exit code 1 if any failed.
#include <cuda.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <functional>
#include <string>
#include <vector>

#include "kernels/cuda/engine_sm80.h"
#include "kernels/cuda/engine_sm90.h"
#include "kernels/device/async_copy.h"
#include "kernels/device/barrier.h"
#include "kernels/device/element.h"
#include "kernels/device/identity.h"
#include "kernels/device/mbarrier.h"
#include "kernels/device/memory_order.h"
#include "kernels/device/mma.h"
#include "kernels/device/tma.h"
#include "kernels/device/warp.h"
#include "kernels/device/wgmma.h"
#include "kernels/emulator/tensor_core.h"
#include "tests/emulator/engine_products.h"

namespace flashmoe {
namespace {

using core::BFloat16;
using core::Float16;
using emulator::MmaType;
using testing::Random;

void require(cudaError_t status, const char* what) {
  if (status == cudaSuccess) return;
  std::printf("FAILED %s: %s\n", what, cudaGetErrorString(status));
  std::exit(1);
}

int failures = 0;

void report(const std::string& name, bool passed, const std::string& detail = "") {
  std::printf("%s %s%s%s\n", passed ? "passed" : "FAILED", name.c_str(), detail.empty() ? "" : ": ",
              detail.c_str());
  if (!passed) ++failures;
}

// An array in device memory.
template <typename T>
class DeviceArray {
 public:
  explicit DeviceArray(size_t count) : count_(count) {
    require(cudaMalloc(&data_, count * sizeof(T)), "cudaMalloc");
    require(cudaMemset(data_, 0xff, count * sizeof(T)), "cudaMemset");
  }
  explicit DeviceArray(const std::vector<T>& values) : DeviceArray(values.size()) {
    require(cudaMemcpy(data_, values.data(), count_ * sizeof(T), cudaMemcpyHostToDevice),
            "cudaMemcpy");
  }
  DeviceArray(const DeviceArray&) = delete;
  DeviceArray& operator=(const DeviceArray&) = delete;
  ~DeviceArray() { cudaFree(data_); }
  T* get() { return data_; }
  std::vector<T> values() const {
    std::vector<T> values(count_);
    require(cudaMemcpy(values.data(), data_, count_ * sizeof(T), cudaMemcpyDeviceToHost),
            "cudaMemcpy");
    return values;
  }

 private:
  size_t count_;
  T* data_ = nullptr;
};

// Runs a kernel on one CTA and waits for it.
template <typename... Parameters, typename... Arguments>
void launch(void (*kernel)(Parameters...), int threads, size_t shared_bytes,
            Arguments... arguments) {
  require(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                               static_cast<int>(shared_bytes)),
          "cudaFuncSetAttribute");
  kernel<<<1, threads, shared_bytes>>>(arguments...);
  require(cudaGetLastError(), "launch");
  require(cudaDeviceSynchronize(), "kernel");
}

// A whole number from -8 to 8, of which a few hundred products sum up exactly in any order.
template <typename Element>
uint32_t small_number(Random& random) {
  return cpu::from_float<Element>(static_cast<float>(random.between(-8, 8))).bits;
}

uint32_t small_numbers(MmaType type, Random& random) {
  if (type == MmaType::kTf32) {
    // With a tail of bits that a tf32 does not have.
    const auto x = static_cast<float>(random.between(-8, 8));
    return std::bit_cast<uint32_t>(x) | static_cast<uint32_t>(random.between(0, 0x1fff));
  }
  const auto half = [&] {
    return type == MmaType::kBFloat16 ? small_number<BFloat16>(random)
                                      : small_number<Float16>(random);
  };
  const uint32_t low = half();
  return low | half() << 16;
}

struct MmaRegisters {
  float d[4];
  uint32_t a[4];
  uint32_t b[2];
};

template <typename Element>
__global__ void mma_kernel(MmaRegisters* lanes) {
  MmaRegisters registers = lanes[device::lane_index()];
  device::mma<Element>(registers.d, registers.a, registers.b);
  lanes[device::lane_index()] = registers;
}

template <typename Element>
void check_mma(MmaType type, const char* name) {
  Random random(1);
  std::vector<MmaRegisters> lanes(32);
  emulator::WarpRegisters<float, 4> d;
  emulator::WarpRegisters<uint32_t, 4> a;
  emulator::WarpRegisters<uint32_t, 2> b;
  for (size_t lane = 0; lane < 32; ++lane) {
    for (size_t i = 0; i < 4; ++i) {
      lanes[lane].d[i] = d[lane][i] = static_cast<float>(random.between(-100, 100));
      lanes[lane].a[i] = a[lane][i] = small_numbers(type, random);
    }
    for (size_t i = 0; i < 2; ++i) lanes[lane].b[i] = b[lane][i] = small_numbers(type, random);
  }
  DeviceArray<MmaRegisters> device_lanes(lanes);
  launch(mma_kernel<Element>, 32, 0, device_lanes.get());
  emulator::mma_warp(type, d, a, b);
  bool equal = true;
  const auto results = device_lanes.values();
  for (size_t lane = 0; lane < 32; ++lane) {
    equal &= std::memcmp(results[lane].d, d[lane].data(), sizeof(float[4])) == 0;
  }
  report(std::string("mma ") + name, equal);
}

// Of 1 + 3/4 of its last bit the nearest float is the next one; that of the emulator is 1.
void check_that_mma_cuts() {
  std::vector<MmaRegisters> lanes(32);
  lanes[0].d[0] = 1.0f;
  lanes[0].a[0] = std::bit_cast<uint32_t>(0x1.8p-12f);
  lanes[0].b[0] = std::bit_cast<uint32_t>(0x1p-12f);
  DeviceArray<MmaRegisters> device_lanes(lanes);
  launch(mma_kernel<float>, 32, 0, device_lanes.get());
  report("mma tf32 cuts what does not fit a sum", device_lanes.values()[0].d[0] == 1.0f);
}

struct WarpAnswer {
  uint32_t shuffled, crossed, ballot, match;
  int64_t wide;
  int count, lowest, highest;
  bool any, all, elected;
};

__global__ void warp_kernel(const uint32_t* values, WarpAnswer* answers) {
  const int lane = device::lane_index();
  const uint32_t value = values[lane];
  answers[lane] = {
      .shuffled = device::shuffle(value, (7 * lane + 3) % device::kWarpSize),
      .crossed = device::shuffle_xor(value, 5),
      .ballot = device::ballot(value % 2 != 0),
      .match = device::match_any(value % 5),
      .wide = device::shuffle(-int64_t{value} * value, 31 - lane),
      .count = device::count_bits(value),
      .lowest = device::lowest_bit(value | 0x80000000u),
      .highest = device::highest_bit(value | 1u),
      .any = device::any(lane == 9),
      .all = device::all(lane != 9),
      .elected = device::elect(),
  };
}

void check_warp() {
  Random random(6);
  std::vector<uint32_t> values(32);
  for (uint32_t& x : values) x = static_cast<uint32_t>(random.bits() >> random.between(32, 63));
  DeviceArray<uint32_t> device_values(values);
  DeviceArray<WarpAnswer> device_answers(32);
  launch(warp_kernel, 32, 0, device_values.get(), device_answers.get());
  const auto answers = device_answers.values();
  uint32_t odd = 0;
  int elected = 0;
  bool shuffles = true, votes = true, bits = true;
  for (size_t lane = 0; lane < 32; ++lane) {
    odd |= (values[lane] % 2) << lane;
    elected += answers[lane].elected;
  }
  for (size_t lane = 0; lane < 32; ++lane) {
    const WarpAnswer& answer = answers[lane];
    const uint32_t value = values[lane];
    uint32_t same = 0;
    for (size_t other = 0; other < 32; ++other) {
      same |= uint32_t{values[other] % 5 == value % 5} << other;
    }
    shuffles &= answer.shuffled == values[(7 * lane + 3) % 32] &&
                answer.crossed == values[lane ^ 5] &&
                answer.wide == -int64_t{values[31 - lane]} * values[31 - lane];
    votes &= answer.ballot == odd && answer.match == same && answer.any && !answer.all;
    bits &= answer.count == std::popcount(value) &&
            answer.lowest == std::countr_zero(value | 0x80000000u) &&
            answer.highest == 31 - std::countl_zero(value | 1u);
  }
  report("shuffles", shuffles);
  report("votes and matches", votes);
  report("bits of a word", bits);
  report("elect", elected == 1, std::to_string(elected) + " lanes");
}

struct Converted {
  uint16_t bfloat16, float16;
  float precise, approximate, reciprocal;
};

__global__ void elements_kernel(const float* x, Converted* converted, float* from_bfloat16,
                                float* from_float16) {
  const int i = device::thread_index();
  converted[i] = {
      .bfloat16 = device::from_float<BFloat16>(x[i]).bits,
      .float16 = device::from_float<Float16>(x[i]).bits,
      .precise = device::exp_precise(x[i]),
      .approximate = device::exp_approx(x[i]),
      .reciprocal = device::reciprocal_approx(x[i]),
  };
  for (int bits = i; bits < 0x10000; bits += 1024) {
    from_bfloat16[bits] = device::to_float(BFloat16{static_cast<uint16_t>(bits)});
    from_float16[bits] = device::to_float(Float16{static_cast<uint16_t>(bits)});
  }
}

// Conversions are those of the CPU, and functions as exact as element.h says.
void check_elements() {
  Random random(7);
  std::vector<float> x(1024);
  for (float& value : x) value = static_cast<float>(80.0 * (2.0 * random.uniform() - 1.0));
  for (size_t i = 0; i < 64; ++i) {  // ties of both types
    x[i] = std::ldexp(static_cast<float>(2 * i + 1 + (i % 2 != 0 ? 4096 : 512)), -8);
  }
  DeviceArray<float> device_x(x);
  DeviceArray<Converted> device_converted(x.size());
  DeviceArray<float> device_bfloat16(0x10000);
  DeviceArray<float> device_float16(0x10000);
  launch(elements_kernel, 1024, 0, device_x.get(), device_converted.get(), device_bfloat16.get(),
         device_float16.get());
  const auto converted = device_converted.values();
  bool narrow = true, wide = true;
  double precise = 0, approximate = 0, reciprocal = 0;  // errors, relative to what is allowed
  for (size_t i = 0; i < x.size(); ++i) {
    const Converted& got = converted[i];
    narrow &= got.bfloat16 == cpu::from_float<BFloat16>(x[i]).bits &&
              got.float16 == cpu::from_float<Float16>(x[i]).bits;
    const double exact = std::exp(double{x[i]});
    const auto error = [](float value, double right) { return std::fabs(value / right - 1); };
    precise = std::max(precise, error(got.precise, exact) / 0x1p-22);
    const double allowed = 0x1p-21 * (1 + std::fabs(x[i]) / 4);
    approximate = std::max(approximate, error(got.approximate, exact) / allowed);
    reciprocal = std::max(reciprocal, error(got.reciprocal, 1 / double{x[i]}) / 0x1p-23);
  }
  const auto same = [](float a, float b) { return a == b || (std::isnan(a) && std::isnan(b)); };
  const auto from_bfloat16 = device_bfloat16.values();
  const auto from_float16 = device_float16.values();
  for (uint32_t bits = 0; bits < 0x10000; ++bits) {
    const auto word = static_cast<uint16_t>(bits);
    wide &= same(from_bfloat16[bits], cpu::to_float(BFloat16{word})) &&
            same(from_float16[bits], cpu::to_float(Float16{word}));
  }
  report("float to 16 bits", narrow);
  report("16 bits to float", wide);
  report("exp_precise", precise <= 1, std::to_string(precise) + " of what is allowed");
  report("exp_approx", approximate <= 1, std::to_string(approximate) + " of what is allowed");
  report("reciprocal_approx", reciprocal <= 1, std::to_string(reciprocal) + " of what is allowed");
}

__global__ void ldmatrix_kernel(const uint32_t* values, const int* offsets, uint32_t* registers) {
  auto* shared = reinterpret_cast<uint32_t*>(device::shared_memory());
  const int lane = device::lane_index();
  for (int i = lane; i < 1024; i += 32) shared[i] = values[i];
  device::warp_sync();
  const std::byte* row = device::shared_memory() + offsets[lane];
  uint32_t plain[4];
  uint32_t transposed[4];
  device::load_matrices<false>(plain, row);
  device::load_matrices<true>(transposed, row);
  for (int i = 0; i < 4; ++i) {
    registers[lane * 8 + i] = plain[i];
    registers[lane * 8 + 4 + i] = transposed[i];
  }
}

void check_ldmatrix() {
  Random random(2);
  std::vector<uint32_t> values(1024);
  for (uint32_t& x : values) x = static_cast<uint32_t>(random.bits());
  std::vector<int> offsets(32);
  std::array<const std::byte*, 32> rows;
  for (size_t lane = 0; lane < 32; ++lane) {
    offsets[lane] = static_cast<int>(random.between(0, 255)) * 16;
    rows[lane] = reinterpret_cast<const std::byte*>(values.data()) + offsets[lane];
  }
  DeviceArray<uint32_t> device_values(values);
  DeviceArray<int> device_offsets(offsets);
  DeviceArray<uint32_t> device_registers(32 * 8);
  launch(ldmatrix_kernel, 32, 4096, device_values.get(), device_offsets.get(),
         device_registers.get());
  const auto plain = emulator::ldmatrix_warp(rows, false);
  const auto transposed = emulator::ldmatrix_warp(rows, true);
  const auto results = device_registers.values();
  bool plain_equal = true;
  bool transposed_equal = true;
  for (size_t lane = 0; lane < 32; ++lane) {
    for (size_t i = 0; i < 4; ++i) {
      plain_equal &= results[lane * 8 + i] == plain[lane][i];
      transposed_equal &= results[lane * 8 + 4 + i] == transposed[lane][i];
    }
  }
  report("ldmatrix", plain_equal);
  report("ldmatrix.trans", transposed_equal);
}

__global__ void to_tf32_kernel(const float* x, uint32_t* y) {
  const int i = device::thread_index();
  y[i] = device::to_tf32(x[i]);
}

void check_to_tf32() {
  Random random(3);
  std::vector<float> x(256);
  for (float& value : x) {
    uint32_t bits = static_cast<uint32_t>(random.bits());
    if (random.chance(0.3)) bits = (bits & ~0x1fffu) | 0x1000u;  // a tie
    if ((bits & 0x7f800000u) == 0x7f800000u) bits = 0x3f800fffu;
    value = std::bit_cast<float>(bits);
  }
  DeviceArray<float> device_x(x);
  DeviceArray<uint32_t> device_y(x.size());
  launch(to_tf32_kernel, static_cast<int>(x.size()), 0, device_x.get(), device_y.get());
  const auto y = device_y.values();
  bool equal = true;
  for (size_t i = 0; i < x.size(); ++i) {
    equal &= (y[i] & ~0x1fffu) == ((std::bit_cast<uint32_t>(x[i]) + 0x1000u) & ~0x1fffu);
  }
  report("to_tf32", equal);
}

// One warpgroup: stages `values` in shared memory and multiplies the operands at the two offsets,
// 16 elements of depth further each step.
constexpr int kWgmmaBytes = 64 * 1024;
constexpr int kWgmmaRowsOffset = 32 * 1024;  // the weights are before
constexpr int kWgmmaSteps = 4;

struct WgmmaReport {
  uint32_t base;
  uint64_t a[kWgmmaSteps];
  uint64_t b[kWgmmaSteps];
};

template <typename Element, int kColumns>
__global__ void __launch_bounds__(128)
    wgmma_kernel(const uint32_t* values, float* accumulators, bool accumulate, WgmmaReport* seen) {
  std::byte* shared = device::shared_memory();
  const int thread = device::thread_index();
  for (int i = thread; i < kWgmmaBytes / 4; i += 128) {
    reinterpret_cast<uint32_t*>(shared)[i] = values[i];
  }
  float d[kColumns / 2];
#pragma unroll
  for (int i = 0; i < kColumns / 2; ++i) d[i] = accumulators[thread * (kColumns / 2) + i];
  device::fence_proxy_async();
  device::block_sync();
  const auto a = device::k_major_descriptor(shared + kWgmmaRowsOffset);
  const auto b = device::mn_major_descriptor(shared, 8192);
  device::wgmma_fence();
#pragma unroll
  for (int step = 0; step < kWgmmaSteps; ++step) {
    device::wgmma<Element, kColumns>(d, a.plus(32 * step), b.plus(2048 * step),
                                     accumulate || step > 0);
  }
  device::wgmma_commit();
  device::wgmma_finish(d);
#pragma unroll
  for (int i = 0; i < kColumns / 2; ++i) accumulators[thread * (kColumns / 2) + i] = d[i];
  if (thread == 0) {
    seen->base = device::shared_address(shared);
    for (int step = 0; step < kWgmmaSteps; ++step) {
      seen->a[step] = a.plus(32 * step).bits;
      seen->b[step] = b.plus(2048 * step).bits;
    }
  }
}

template <typename Element, int kColumns>
void check_wgmma(MmaType type, const char* name) {
  for (const bool accumulate : {false, true}) {
    Random random(4);
    std::vector<uint32_t> values(kWgmmaBytes / 4);
    for (uint32_t& x : values) x = small_numbers(type, random);
    std::vector<float> accumulators(128 * kColumns / 2);
    for (float& x : accumulators) x = static_cast<float>(random.between(-100, 100));
    std::array<float*, 128> threads;
    for (size_t i = 0; i < 128; ++i) threads[i] = &accumulators[i * kColumns / 2];

    DeviceArray<uint32_t> device_values(values);
    DeviceArray<float> device_accumulators(accumulators);
    DeviceArray<WgmmaReport> device_seen(1);
    launch(wgmma_kernel<Element, kColumns>, 128, kWgmmaBytes, device_values.get(),
           device_accumulators.get(), accumulate, device_seen.get());

    const WgmmaReport seen = device_seen.values()[0];
    std::vector<std::byte> shared(seen.base + kWgmmaBytes);
    std::memcpy(shared.data() + seen.base, values.data(), kWgmmaBytes);
    std::vector<float> d(64 * kColumns);
    if (accumulate) emulator::wgmma_gather(kColumns, threads, d.data());
    for (int step = 0; step < kWgmmaSteps; ++step) {
      emulator::wgmma_multiply({type, kColumns, seen.a[step], seen.b[step], false, true}, shared,
                               d.data());
    }
    emulator::wgmma_scatter(kColumns, d.data(), threads);
    report(std::string("wgmma ") + name + (accumulate ? " d += a b" : " d = a b"),
           device_accumulators.values() == accumulators);
  }
}

// Encodes maps as the engines need them.
class TensorMapEncoder {
 public:
  TensorMapEncoder() {
    cudaDriverEntryPointQueryResult status;
    void* function = nullptr;
    require(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000,
                                             cudaEnableDefault, &status),
            "cudaGetDriverEntryPointByVersion");
    if (status != cudaDriverEntryPointSuccess) require(cudaErrorUnknown, "cuTensorMapEncodeTiled");
    encode_ = reinterpret_cast<decltype(encode_)>(function);
  }

  // Sizes in elements, innermost first; the tensor is contiguous.
  template <typename Element>
  device::TensorMap operator()(const Element* data, std::array<uint64_t, 3> size,
                               const cuda::TensorBox& box) const {
    constexpr CUtensorMapDataType kType = std::is_same_v<Element, BFloat16>
                                              ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16
                                              : CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
    const cuuint64_t strides[2] = {size[0] * sizeof(Element), size[0] * size[1] * sizeof(Element)};
    const cuuint32_t element_strides[3] = {1, 1, 1};
    CUtensorMap map;
    const CUresult result =
        encode_(&map, kType, 3, const_cast<Element*>(data), size.data(), strides, box.size,
                element_strides, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    if (result != CUDA_SUCCESS) {
      std::printf("FAILED cuTensorMapEncodeTiled: %d\n", static_cast<int>(result));
      std::exit(1);
    }
    return device::TensorMap::from(map);
  }

 private:
  decltype(&cuTensorMapEncodeTiled) encode_ = nullptr;
};

struct BoxAt {
  int x;
  int y;
  int z;
};

constexpr int kTmaBoxBytes = 8192;

// Loads the boxes one after the other through the same place and barrier.
__global__ void tma_kernel(const device::TensorMap* map, const BoxAt* boxes, int count,
                           std::byte* contents) {
  std::byte* shared = device::shared_memory();
  auto* barrier = reinterpret_cast<device::Mbarrier*>(shared + kTmaBoxBytes);
  const int thread = device::thread_index();
  if (thread == 0) {
    device::tma_prefetch(map);
    device::mbarrier_init(barrier, 1);
    device::fence_mbarrier_init();
  }
  device::block_sync();
  for (int i = 0; i < count; ++i) {
    if (thread == 0) {
      device::mbarrier_arrive_expect(barrier, kTmaBoxBytes);
      device::tma_load(shared, map, barrier, boxes[i].x, boxes[i].y, boxes[i].z);
    }
    device::mbarrier_wait(barrier, static_cast<uint32_t>(i) % 2);
    for (int byte = thread; byte < kTmaBoxBytes; byte += 128) {
      contents[i * kTmaBoxBytes + byte] = shared[byte];
    }
    device::fence_proxy_async();
    device::block_sync();
  }
}

void check_tma(const TensorMapEncoder& encode) {
  constexpr int kWidth = 136;
  constexpr int kDepth = 72;
  constexpr int kExperts = 3;
  constexpr cuda::TensorBox kBox{64, 64, 1};
  Random random(5);
  std::vector<BFloat16> tensor(kWidth * kDepth * kExperts);
  for (BFloat16& x : tensor) x.bits = static_cast<uint16_t>(random.bits() | 1);
  const std::vector<BoxAt> boxes = {{0, 0, 0},   {64, 0, 1},   {128, 64, 2}, {128, 0, 0},
                                    {8, 8, 1},   {192, 64, 2}, {0, 64, 0},   {-16, -3, 1},
                                    {136, 0, 0}, {0, 0, 2},    {0, 72, 0}};
  DeviceArray<BFloat16> device_tensor(tensor);
  DeviceArray<device::TensorMap> map(std::vector<device::TensorMap>{
      encode(device_tensor.get(), {kWidth, kDepth, kExperts}, kBox)});
  DeviceArray<BoxAt> device_boxes(boxes);
  DeviceArray<std::byte> device_contents(boxes.size() * kTmaBoxBytes);
  launch(tma_kernel, 128, kTmaBoxBytes + 8, static_cast<const device::TensorMap*>(map.get()),
         static_cast<const BoxAt*>(device_boxes.get()), static_cast<int>(boxes.size()),
         device_contents.get());
  const auto contents = device_contents.values();
  bool equal = true;
  for (size_t i = 0; i < boxes.size(); ++i) {
    for (int line = 0; line < 64; ++line) {
      for (int j = 0; j < 64; ++j) {
        const int x = boxes[i].x + j;
        const int y = boxes[i].y + line;
        const bool inside = x >= 0 && x < kWidth && y >= 0 && y < kDepth;
        const uint16_t want =
            inside ? tensor[size_t((boxes[i].z * kDepth + y) * kWidth + x)].bits : uint16_t{0};
        uint16_t got;
        std::memcpy(&got,
                    &contents[i * kTmaBoxBytes +
                              size_t(line * 128 + ((j / 8) ^ (line % 8)) * 16 + j % 8 * 2)],
                    2);
        equal &= got == want;
      }
    }
  }
  report("tma_load with swizzle and zeros outside", equal);
}

// Whether a fresh barrier lets waiters for parity 1 pass; those for parity 0; those for parity 0
// after the first of two arrivals, and after the second.
//
// Each answer is stored before the next arrival, which releases the store and so waits for it. A
// test may wait for the end of a phase, and nothing else would keep the thread from arriving
// meanwhile: the answer would be that after the arrival.
__global__ void mbarrier_kernel(uint32_t* seen) {
  using device::Scope;
  auto* barrier = reinterpret_cast<device::Mbarrier*>(device::shared_memory());
  device::mbarrier_init(barrier, 2);
  device::fence_mbarrier_init();
  device::block_sync();
  device::store_relaxed<Scope::kGpu>(&seen[0], uint32_t{device::mbarrier_test(barrier, 1)});
  device::store_relaxed<Scope::kGpu>(&seen[1], uint32_t{device::mbarrier_test(barrier, 0)});
  device::mbarrier_arrive(barrier);
  device::store_relaxed<Scope::kGpu>(&seen[2], uint32_t{device::mbarrier_test(barrier, 0)});
  device::mbarrier_arrive_expect(barrier, 0);
  device::mbarrier_wait(barrier, 0);
  device::store_relaxed<Scope::kGpu>(&seen[3], uint32_t{device::mbarrier_test(barrier, 0)});
}

void check_mbarrier() {
  DeviceArray<uint32_t> seen(4);
  launch(mbarrier_kernel, 1, 8, seen.get());
  const std::vector<uint32_t> got = seen.values();
  std::string detail;
  for (const uint32_t answer : got) detail += std::to_string(answer);
  report("mbarrier", got == std::vector<uint32_t>{1, 0, 0, 1}, detail);
}

// Thread i copies i % 17 bytes.
__global__ void async_copy_kernel(const std::byte* values, std::byte* contents) {
  std::byte* shared = device::shared_memory();
  auto* barrier = reinterpret_cast<device::Mbarrier*>(shared + 128 * 16);
  const int thread = device::thread_index();
  for (int i = 0; i < 16; ++i) shared[thread * 16 + i] = std::byte{0xff};
  if (thread == 0) {
    device::mbarrier_init(barrier, 128);
    device::fence_mbarrier_init();
  }
  device::block_sync();
  device::async_copy_16(shared + thread * 16, values + thread * 16, thread % 17);
  device::async_copy_arrive(barrier);
  device::mbarrier_wait(barrier, 0);
  const int other = 127 - thread;
  for (int i = 0; i < 16; ++i) contents[other * 16 + i] = shared[other * 16 + i];
}

void check_async_copy() {
  std::vector<std::byte> values(128 * 16);
  for (size_t i = 0; i < values.size(); ++i) values[i] = static_cast<std::byte>(1 + i % 251);
  DeviceArray<std::byte> device_values(values);
  DeviceArray<std::byte> device_contents(values.size());
  launch(async_copy_kernel, 128, 128 * 16 + 8, static_cast<const std::byte*>(device_values.get()),
         device_contents.get());
  for (size_t i = 0; i < values.size(); ++i) {
    if (i % 16 >= i / 16 % 17) values[i] = std::byte{0};
  }
  report("async_copy_16 and async_copy_arrive", device_contents.values() == values);
}

template <typename Engine>
__global__ void __launch_bounds__(Engine::kThreads, 1)
    engine_kernel(const cuda::Product* products, int count, float* results) {
  testing::run_products<Engine>(products, count, results);
}

// The largest error of all edge products on operands of several sizes, relative to what is allowed
// at their depth.
template <typename Engine>
double engine_error(const TensorMapEncoder& encode, double (*allowed)(int depth)) {
  using Element = typename Engine::Element;
  constexpr int kPiece = 16 / sizeof(Element);
  constexpr bool kUsesMaps = Engine::kProducerWarps == 1;
  double largest = 0;
  Random random(6);
  for (const auto& [depth, width] :
       std::vector<std::pair<int, int>>{{512, 512},
                                        {25 * kPiece, 41 * kPiece},
                                        {kPiece, kPiece},
                                        {1024 + kPiece, 64},
                                        {4096, kPiece}}) {  // the last shows errors of one sign
    const testing::Operands<Element> operands(random, 3 * Engine::kBlockRows, 3, depth, width);
    DeviceArray<Element> rows(operands.row_values);
    DeviceArray<Element> even(operands.even_values);
    DeviceArray<Element> odd(operands.odd_values);
    DeviceArray<device::TensorMap> maps(3);
    if constexpr (kUsesMaps) {
      const std::array<uint64_t, 3> rows_size = {uint64_t(depth), uint64_t(operands.rows), 1};
      const std::array<uint64_t, 3> weights_size = {uint64_t(width), uint64_t(depth),
                                                    uint64_t(operands.experts)};
      const device::TensorMap encoded[3] = {encode(rows.get(), rows_size, Engine::kRowsBox),
                                            encode(even.get(), weights_size, Engine::kWeightsBox),
                                            encode(odd.get(), weights_size, Engine::kWeightsBox)};
      require(cudaMemcpy(maps.get(), encoded, sizeof(encoded), cudaMemcpyHostToDevice), "maps");
    }
    std::vector<cuda::Product> products = testing::edge_products<Engine>(operands);
    for (cuda::Product& product : products) {
      product.rows = {rows.get(), maps.get()};
      product.even = {even.get(), maps.get() + 1};
      product.odd = product.gated ? cuda::Operand{odd.get(), maps.get() + 2} : product.even;
    }
    DeviceArray<cuda::Product> device_products(products);
    constexpr size_t kResults = size_t(Engine::kBlockRows) * Engine::kColumns;
    DeviceArray<float> device_results(products.size() * kResults);
    launch(engine_kernel<Engine>, Engine::kThreads, sizeof(typename Engine::Shared),
           static_cast<const cuda::Product*>(device_products.get()),
           static_cast<int>(products.size()), device_results.get());
    const auto results = device_results.values();
    for (size_t i = 0; i < products.size(); ++i) {
      const double error =
          testing::largest_error<Engine>(operands, products[i], &results[i * kResults]);
      largest = std::max(largest, error / allowed(depth));
    }
  }
  return largest;
}

template <typename Engine>
void check_engine(const TensorMapEncoder& encode, const std::string& name) {
  const double error =
      engine_error<Engine>(encode, testing::allowed_error<typename Engine::Element>);
  report(name, error <= 1, "error / allowed " + std::to_string(error));
}

int run() {
  cudaDeviceProp properties;
  require(cudaGetDeviceProperties(&properties, 0), "cudaGetDeviceProperties");
  std::printf("%s, compute capability %d.%d\n", properties.name, properties.major,
              properties.minor);

  check_mma<BFloat16>(MmaType::kBFloat16, "bf16");
  check_mma<Float16>(MmaType::kFloat16, "f16");
  check_mma<float>(MmaType::kTf32, "tf32");
  check_that_mma_cuts();
  check_warp();
  check_elements();
  check_ldmatrix();
  check_to_tf32();
  check_mbarrier();
  check_async_copy();
  const TensorMapEncoder encode;
  check_tma(encode);
  check_wgmma<BFloat16, 128>(MmaType::kBFloat16, "m64n128k16 bf16");
  check_wgmma<Float16, 128>(MmaType::kFloat16, "m64n128k16 f16");
  check_wgmma<BFloat16, 256>(MmaType::kBFloat16, "m64n256k16 bf16");
  check_wgmma<Float16, 256>(MmaType::kFloat16, "m64n256k16 f16");

  using cuda::FloatProduct;
  check_engine<cuda::Sm90Engine<BFloat16, 128>>(encode, "Sm90Engine bf16 128 rows");
  check_engine<cuda::Sm90Engine<BFloat16, 64>>(encode, "Sm90Engine bf16 64 rows");
  check_engine<cuda::Sm90Engine<Float16, 128>>(encode, "Sm90Engine f16 128 rows");
  check_engine<cuda::Sm90Engine<Float16, 64>>(encode, "Sm90Engine f16 64 rows");
  check_engine<cuda::Sm80Engine<BFloat16, 128>>(encode, "Sm80Engine bf16 128 rows");
  check_engine<cuda::Sm80Engine<BFloat16, 64>>(encode, "Sm80Engine bf16 64 rows");
  check_engine<cuda::Sm80Engine<Float16, 128>>(encode, "Sm80Engine f16 128 rows");
  check_engine<cuda::Sm80Engine<Float16, 64>>(encode, "Sm80Engine f16 64 rows");
  check_engine<cuda::Sm80Engine<float, 128>>(encode, "Sm80Engine float 128 rows, 3 tf32 products");
  check_engine<cuda::Sm80Engine<float, 64>>(encode, "Sm80Engine float 64 rows, 3 tf32 products");
  // One product of tf32 is not that exact, which shows that the bound above is one.
  using Tf32Engine = cuda::Sm80Engine<float, 128, FloatProduct::kTf32>;
  const double tf32 = engine_error<Tf32Engine>(encode, testing::allowed_tf32_error);
  const double as_float = engine_error<Tf32Engine>(encode, testing::allowed_error<float>);
  report("Sm80Engine float 128 rows, tf32", tf32 <= 1 && as_float > 1,
         "error / allowed " + std::to_string(tf32));
  return failures == 0 ? 0 : 1;
}

}  // namespace
}  // namespace flashmoe

int main() {
  try {
    return flashmoe::run();
  } catch (const std::exception& error) {
    std::printf("FAILED %s\n", error.what());
    return 1;
  }
}
