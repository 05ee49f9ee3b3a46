// Puts with signals: used rightly, and the wrong ways that the emulator must catch.
#include <vector>

#include "kernels/device/barrier.h"
#include "kernels/device/identity.h"
#include "kernels/device/memory_order.h"
#include "kernels/device/shmem.h"
#include "kernels/device/warp.h"
#include "tests/emulator/cases.h"

namespace flashmoe::testing {
namespace {

using device::Scope;
using device::SignalOp;
using emulator::GlobalMemory;

constexpr int kPes = 2;
constexpr int kWords = 64;
constexpr int kRounds = 3;

// The symmetric memory of a PE.
struct Heap {
  uint64_t signal, other_signal, ready;
  uint32_t source[kWords], other_source[kWords];
  uint32_t target[kWords], other_target[kWords];
};

// PE i is GPU i, with one CTA of one warp.
struct Pes {
  std::vector<GlobalMemory> heaps;
  GlobalMemory sums{kPes * sizeof(uint32_t), "sums"};
  GlobalMemory private_memory{kWords * sizeof(uint32_t), "private"};

  Pes() {
    for (int pe = 0; pe < kPes; ++pe) {
      heaps.emplace_back(sizeof(Heap), "heap of PE " + std::to_string(pe));
    }
    reset();
  }
  void reset() {
    for (GlobalMemory& heap : heaps) heap.fill(std::byte{0});
    sums.fill(std::byte{0});
    private_memory.fill(std::byte{0});
  }
  Heap& heap(int pe) { return *heaps[static_cast<size_t>(pe)].as<Heap>(); }
  Trial trial() {
    Trial made{.launch = {.blocks = kPes, .threads = 32, .gpu_of_block = {0, 1}},
               .prepare = [this] { reset(); }};
    for (const GlobalMemory& heap : heaps) made.launch.symmetric.push_back(&heap);
    return made;
  }
};

enum class Fault {
  kNone,
  kNoWait,              // the receiver reads without waiting for the signal
  kFetchOnly,           // it looks at the signal, but does not acquire it
  kFetchAndFence,       // it looks at the signal and acquires as one does of threads
  kAcquireLoad,         // the same in one
  kOtherPut,            // it reads what another put, whose signal it does not know, brought
  kSourceChanged,       // the sender changes the source while the put may read it
  kTargetUsed,          // the sender puts again while the receiver may still read
  kNoFence,             // the sender's ordinary stores are not released before the put
  kNotConverged,        // the source is written by lanes that the put's lane has not met
  kPrivateSource,       // the source is not symmetric memory
  kAddressOfPeer,       // the target is named by its address at the peer
  kNoPe,                // there is no such PE
  kTwoKindsOfAddition,  // threads and puts add to one word
  kLanesDiffer          // the lanes of a warp put different things
};

void wait_for(uint64_t* signal, uint64_t value, Fault fault) {
  if (fault == Fault::kNoWait) return;
  if (fault == Fault::kAcquireLoad) {
    while (device::load_acquire<Scope::kSystem>(signal) < value) {
    }
    return;
  }
  while (device::signal_fetch(signal) < value) {
  }
  if (fault == Fault::kFetchAndFence) device::fence<Scope::kSystem>();
  if (fault != Fault::kFetchOnly && fault != Fault::kFetchAndFence) {
    device::signal_reached(signal, value);
  }
}

// PE 0 sends numbers to PE 1 in rounds, PE 1 adds them up and says when it has. Both puts signal
// separately. The receiver waits by one lane, as kernels do.
Kernel ping_pong(Pes& pes, Fault fault) {
  return [&pes, fault] {
    const int me = device::block_index(), lane = device::lane_index();
    Heap& own = pes.heap(me);
    for (uint32_t round = 1; round <= kRounds; ++round) {
      if (me == 0) {
        for (int i = lane; i < kWords; i += 32) {
          own.source[i] = round * 1000 + static_cast<uint32_t>(i);
          own.other_source[i] = round;
        }
        if (fault != Fault::kNotConverged) device::warp_sync();
        if (fault != Fault::kNoFence) device::fence<Scope::kSystem>();
        void* target = own.target;
        if (fault == Fault::kAddressOfPeer) target = pes.heap(1).target;
        const void* source = own.source;
        if (fault == Fault::kPrivateSource) source = pes.private_memory.data();
        device::put_signal(own.other_target, own.other_source, sizeof(own.other_source),
                           &own.other_signal, 1, SignalOp::kAdd, 1);
        const size_t bytes = sizeof(own.source) - (fault == Fault::kLanesDiffer && lane == 5);
        device::put_signal(target, source, bytes, &own.signal, round, SignalOp::kSet,
                           fault == Fault::kNoPe ? kPes : 1);
        if (fault == Fault::kTwoKindsOfAddition && lane == 0) {
          device::add_relaxed<Scope::kSystem>(&pes.heap(1).other_signal, uint64_t{0});
        }
        if (fault == Fault::kSourceChanged) own.source[lane] = 0;
        if (lane == 0 && fault != Fault::kTargetUsed) wait_for(&own.ready, round, Fault::kNone);
        if (fault == Fault::kTargetUsed) device::quiet();
        device::warp_sync();
      } else {
        if (lane == 0) {
          wait_for(&own.signal, round, fault);
          if (fault != Fault::kOtherPut) wait_for(&own.other_signal, round, fault);
        }
        device::warp_sync();
        uint32_t sum = 0;
        for (int i = lane; i < kWords; i += 32) sum += own.target[i] + own.other_target[i];
        for (int distance = 1; distance < 32; distance *= 2) {
          sum += device::shuffle_xor(sum, distance);
        }
        if (lane == 0) pes.sums.as<uint32_t>()[0] += sum;
        device::warp_sync();
        device::fence<Scope::kSystem>();
        device::put_signal(own.target, own.source, sizeof(own.source), &own.ready, 1,
                           SignalOp::kAdd, 0);
      }
    }
  };
}

void rounds(uint64_t seed) {
  Pes pes;
  passes(seed, pes.trial(), ping_pong(pes, Fault::kNone));
  uint32_t want = 0;
  for (uint32_t round = 1; round <= kRounds; ++round) {
    for (uint32_t i = 0; i < kWords; ++i) want += round * 1000 + i + round;
  }
  check(pes.sums.values<uint32_t>()[0] == want, "sum");

  const auto caught = [&](Fault fault, const std::vector<std::string>& parts) {
    is_caught(seed, pes.trial(), parts, ping_pong(pes, fault));
  };
  caught(Fault::kNotConverged, {"race: a put of block 0 warp 0", "of 'heap of PE 0'"});
  caught(Fault::kNoFence, {"race: a put of block 0 warp 0", "of 'heap of PE 0'"});
  caught(Fault::kPrivateSource, {"put misuse", "of 'private' is not in the symmetric memory"});
  caught(Fault::kAddressOfPeer, {"put misuse", "of 'heap of PE 1' is not in the symmetric memory"});
  caught(Fault::kNoPe, {"put misuse", "puts to PE 2, and there is symmetric memory of 2 PEs"});
  caught(Fault::kTwoKindsOfAddition, {"signal misuse", "neither is atomic to the other"});
  caught(Fault::kSourceChanged, {"stage reused early: block 0 warp 0", "which a put"});
  for (const Fault fault : {Fault::kFetchOnly, Fault::kFetchAndFence, Fault::kAcquireLoad}) {
    caught(fault, {"read early: block 1 warp 0", "of 'heap of PE 1'"});
  }
  caught(Fault::kLanesDiffer, {"put misuse: block 0 warp 0 lane 0", "something else"});
  is_caught_sometimes(seed, pes.trial(), {"heap of PE"}, ping_pong(pes, Fault::kNoWait));
  is_caught_sometimes(seed, pes.trial(), {"heap of PE 1"}, ping_pong(pes, Fault::kOtherPut));
  is_caught_sometimes(seed, pes.trial(), {"heap of PE"}, ping_pong(pes, Fault::kTargetUsed));
}

// The bytes of a put are before its signal; what the sender stored elsewhere is so only if a fence
// released it to the system.
void what_a_signal_orders(uint64_t seed) {
  Pes pes;
  const auto kernel = [&pes](Fault fault) {
    return [&pes, fault] {
      Heap& own = pes.heap(device::block_index());
      if (device::block_index() == 0) {
        // Both GPUs address this one, too.
        if (device::lane_index() == 0) pes.sums.as<uint32_t>()[1] = 7;
        if (fault != Fault::kNoFence) device::fence<Scope::kSystem>();
        device::warp_sync();
        device::put_signal(own.target, own.source, sizeof(own.source), &own.signal, 1,
                           SignalOp::kSet, 1);
      } else if (device::lane_index() == 0) {
        wait_for(&own.signal, 1, Fault::kNone);
        pes.sums.as<uint32_t>()[0] = own.target[3] + pes.sums.as<uint32_t>()[1];
      }
    };
  };
  passes(seed, pes.trial(), kernel(Fault::kNone));
  check(pes.sums.values<uint32_t>()[0] == 7, "value");
  is_caught(seed, pes.trial(), {"race: block 1 warp 0 lane 0 reads byte 4 of 'sums'"},
            kernel(Fault::kNoFence));
}

// After quiet the source is free.
void quiet(uint64_t seed) {
  Pes pes;
  const auto kernel = [&pes](bool waits) {
    return [&pes, waits] {
      Heap& own = pes.heap(device::block_index());
      if (device::block_index() != 0) return;
      device::put_signal(own.target, own.source, sizeof(own.source), &own.signal, 1, SignalOp::kSet,
                         1);
      if (device::lane_index() == 0) {
        if (waits) device::quiet();
        own.source[0] = 1;
      }
    };
  };
  passes(seed, pes.trial(), kernel(true));
  check(pes.heap(1).signal == 1 && pes.heap(1).target[0] == 0, "what was put");
  is_caught(seed, pes.trial(), {"stage reused early", "which a put", "may still read"},
            kernel(false));
}

// Bytes come as they were when they were read, whenever that was, and all of them before the
// signal: this kernel, which is right, would see it.
void late_bytes(uint64_t seed) {
  Pes pes;
  const Trial trial = pes.trial();
  uint64_t first = 0, last = 0;
  for (int i = 0; i < 20; ++i) {
    emulator::Launch launch = trial.launch;
    launch.seed = seed * 1000 + static_cast<uint64_t>(i);
    trial.prepare();
    const emulator::Outcome outcome = emulator::launch(launch, ping_pong(pes, Fault::kNone));
    first = i == 0 ? outcome.nanoseconds : std::min(first, outcome.nanoseconds);
    last = std::max(last, outcome.nanoseconds);
  }
  check(last > 2 * first, "puts take the same time with every seed");
}

}  // namespace

std::vector<Case> put_cases() {
  return {
      {"puts: rounds, and what goes wrong", rounds},
      {"puts: what a signal orders", what_a_signal_orders},
      {"puts: quiet", quiet},
      {"puts: late bytes", late_bytes},
  };
}

}  // namespace flashmoe::testing
