// The state of a launch, which the hooks act on. Its parts are in the files that act on them.
#pragma once

#include <array>
#include <cstdint>
#include <exception>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

#include "kernels/emulator/emulator.h"
#include "kernels/emulator/fiber.h"
#include "kernels/emulator/memory.h"
#include "kernels/emulator/shadow.h"
#include "kernels/emulator/vector_clock.h"

namespace flashmoe::emulator {

inline constexpr int kWarpSize = 32;
inline constexpr int kWarpgroupSize = 128;

// SplitMix64.
class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed) {}
  uint64_t bits() {
    uint64_t z = (state_ += 0x9e3779b97f4a7c15u);
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
  }
  // In [0, end).
  uint64_t below(uint64_t end) { return static_cast<uint64_t>((bits() >> 32) * end >> 32); }
  bool one_in(uint64_t n) { return below(n) == 0; }

 private:
  uint64_t state_;
};

// What a blocked thread waits for.
enum class Wait : uint8_t {
  kNothing,
  kBarrier,
  kWarp,
  kMbarrier,
  kTime,
  kWgmma,
  kNextKernel,
  kQuiet,
  kEnded
};

// An async_copy_16 of which not all is done.
struct PendingCopy {
  size_t shared, global;  // offsets in Memory
  uint32_t bytes;
  bool landed;
};

struct Mbarrier;
struct Warpgroup;

struct Thread {
  Context context;
  Id id;
  int block;
  int index;  // in the CTA
  Wait wait = Wait::kNothing;
  int barrier = 0;               // kBarrier: which
  Mbarrier* mbarrier = nullptr;  // kMbarrier: which
  uint32_t parity = 0;
  uint64_t wake_ticket = 0;  // of the event that may wake it
  const char* doing = "begins";
  const void* place = nullptr;  // where it was called from
  uint32_t unproductive = 0;    // hooks in a row that only looked
  uint32_t result = 0;          // of an exchange within the warp
  struct {
    void* d;
    const void *a, *b;
  } registers{};  // that an operation of the warp reads and writes

  uint32_t epoch = 0;
  View view;
  // What relaxed loads have seen, for the next fence, and what the last fence released; by scope.
  View observed[2], released[2];

  std::vector<PendingCopy> copies;  // since the last async_copy_arrive
  uint64_t last_arrival = 0;        // when the last async_copy_arrive arrives
  int puts = 0;                     // that have not signalled
  View put;                         // what those that have make known
};

// A put_signal that has not signalled.
struct Put {
  size_t source, target, bytes, signal;  // offsets in Memory
  uint64_t value;
  bool add;
  Id thread;
  Id flight;        // who accesses source and target meanwhile, and
  uint32_t number;  // when
  View released;    // by the thread
};

enum class WarpOperation : uint8_t { kNone, kSync, kShuffle, kBallot, kMatch, kMma, kLdmatrix };

struct Warp {
  int index;  // in the launch
  int block;
  uint32_t ready = 0;  // lanes
  uint32_t ended = 0;
  int ready_position = -1;  // in Machine::ready_warps
  uint64_t priority = 0;
  bool starved = false;
  uint32_t epochs = 0;  // drawn by its lanes

  WarpOperation operation = WarpOperation::kNone;
  uint32_t arrived = 0;
  uint32_t variant = 0;  // what all lanes must give alike
  std::array<uint32_t, kWarpSize> values;
  std::array<uint32_t, kWarpSize> sources;
};

struct NamedBarrier {
  int expected = 0;
  std::vector<Thread*> arrived;
};

struct Mbarrier {
  size_t offset;  // of Memory
  int block;
  Id agent;           // the copies that complete on it
  uint32_t arrivals;  // per phase
  uint32_t pending;
  int64_t bytes = 0;  // expected and not yet there
  uint32_t phase = 0;
  uint32_t arriving = 0;  // arrivals of async_copy_arrive that are on their way
  Id initialiser;
  uint32_t initialised_epoch;
  bool fenced = false;  // its initialisation is visible to the async proxy
  View arrived;         // of all phases so far
  View done;            // of those that ended
  std::vector<Thread*> waiters;
};

struct Agent {
  enum class Kind { kCopies, kWgmma, kPut } kind;
  int block;
  size_t which;  // offset of the mbarrier or the signal, or index of the warpgroup
};

struct Gpu {
  int blocks = 0;
  int threads = 0;               // that have not ended
  std::vector<Thread*> waiting;  // in next_kernel
};

struct Block {
  int gpu;
  int index;  // in its grid
  std::array<NamedBarrier, 16> barriers;
  std::unordered_map<size_t, std::unique_ptr<Mbarrier>> mbarriers;  // by offset
};

// Releases to an atomic location, by the GPU of who released.
struct AtomicLocation {
  struct Releases {
    View scopes[2];  // by Scope: those of that scope
  };
  std::vector<Releases> gpus;
  View put;           // what the puts make known whose signal it was; no ordinary acquire sees it
  uint32_t puts = 0;  // how many they are
  Id network = 0;     // who did what these puts did
  // Since somebody last stored to it. Additions of both kinds are not atomic to each other.
  bool added_by_threads = false, added_by_network = false;
};

struct Event {
  uint64_t time, order;
  std::function<void()> act;  // null: wake `thread` if its ticket is still `ticket`
  Thread* thread;
  uint64_t ticket;
  bool operator<(const Event& other) const {  // for a queue with the earliest on top
    return time != other.time ? time > other.time : order > other.order;
  }
};

// How the seed lets threads run and asynchronous operations end.
struct Policy {
  enum class Order { kUniform, kInOrder, kPriority, kStarve } order;
  uint64_t switch_one_in;  // hooks
  uint64_t demote_one_in;  // choices, of who has priority
  int lanes;               // 0 ascending, 1 descending, 2 any
  uint64_t longest_delay;  // of asynchronous operations, in nanoseconds; 0: a different one each
  uint64_t starve_budget;  // virtual nanoseconds
};

class Machine {
 public:
  Machine(const Launch& launch, const std::function<void()>& body);
  ~Machine();
  Outcome run();

  // scheduler.cc
  void begin_hook(const char* name, const void* place);  // may let others run
  void block(Wait wait);                                 // until make_ready
  void make_ready(Thread& thread);
  void sleep_until(uint64_t time);
  void progress() { stalled_ = 0; }
  void looked();  // the thread only looked at something; it may sleep if it does so all the time
  uint64_t lengthened(uint64_t nanoseconds) const;
  void at(uint64_t time, std::function<void()> act);
  uint64_t delay();  // of something asynchronous

  // ordering.cc: what threads know
  View snapshot(Thread& thread);  // including its own accesses so far, which end an epoch
  void next_epoch(Thread& thread);
  void acquire(Thread& thread, const View& view);
  void add(View& view, const View& other);
  bool knows(const Thread& thread, Id id, uint32_t epoch) const;
  void sync_warp(Warp& warp);
  Id new_agent(Agent agent);

  // access.cc
  Accessor accessor(const Thread& thread, bool atomic = false) const;
  // Checks the bounds, and says whether the memory is constant.
  bool check_bounds(size_t offset, size_t bytes, bool write, bool shared_only, bool global_only);
  void plain(uintptr_t address, size_t bytes, bool write, const void* place);

  // mbarriers.cc
  Mbarrier& find_mbarrier(const void* address);
  void arrive(Mbarrier& barrier);
  void complete_bytes(Mbarrier& barrier, int64_t bytes);
  void try_complete(Mbarrier& barrier);

  // copies.cc
  void land(PendingCopy& copy);

  // next_kernel.cc
  void end_kernel(Thread& thread);  // what it must have waited for by then
  void begin_next_kernel(Gpu& gpu);

  // puts.cc
  Id new_flight(Id thread);
  void deliver(Put& put);

  // report.cc
  [[noreturn]] void fail(const std::string& message);
  [[noreturn]] void report(const Conflict& conflict);
  std::string who(Id id, uint32_t epoch = 0) const;
  std::string who(const Thread& thread) const;
  std::string where(size_t offset) const;
  std::string waiting() const;
  std::string waits_for(const Thread& thread) const;

  Thread& thread(Id id) { return threads[id]; }
  Warp& warp_of(const Thread& thread) { return warps[thread.id / kWarpSize]; }
  Block& block_of(const Thread& thread) { return blocks[static_cast<size_t>(thread.block)]; }
  static int lane_of(const Thread& thread) { return thread.index % kWarpSize; }

  const Launch& launch;
  const std::function<void()>& body;
  Memory& memory;
  Random random;
  Policy policy;
  std::vector<Thread> threads;
  std::vector<Warp> warps;
  std::vector<Block> blocks;
  std::vector<Gpu> gpus;
  std::vector<std::unique_ptr<Mbarrier>> retired;  // of earlier kernels
  std::vector<Agent> agents;
  // Whose put has which identity of those just below kMaxId, or kNoThread.
  static constexpr Id kNoThread = kMaxId;
  std::vector<Id> flights;
  uint32_t puts = 0;                                   // so far
  std::vector<std::unique_ptr<Warpgroup>> warpgroups;  // made when used
  std::unordered_map<size_t, AtomicLocation> locations;
  Clocks clocks;
  Shadow shadow;
  Thread* current = nullptr;
  uint64_t now = 0;
  uint64_t steps = 0;

 private:
  static void enter();           // a fiber begins
  void switch_to(Thread* next);  // null: to run()
  Thread* pick();
  Thread* pick_lane(Warp& warp);
  Warp* pick_warp();
  void choose_policy();
  uint64_t stalled_rounds() const;  // how often all of those who wait have looked in vain
  bool fire_due();
  void add_event(Event event);
  void advance_to_next_event();
  [[noreturn]] void deadlock();
  [[noreturn]] void leave();

  Context outside_;
  std::vector<int> ready_warps_;
  std::vector<Event> events_;  // a heap with the earliest in front
  uint64_t event_order_ = 0, tickets_ = 0;
  uint64_t schedule_ = 0;
  uint64_t stalled_ = 0;         // sleeps since anything changed
  uint64_t plain_accesses_ = 0;  // since the last hook
  uint64_t run_length_ = 0;      // hooks since another warp was chosen
  int live_ = 0;
  Warp* warp_ = nullptr;
  std::optional<std::string> failure_;
  std::exception_ptr exception_;
};

extern Machine* machine;  // the launch that runs, or null

// The hook that is called by a thread of the launch; `hook` is its name in messages.
inline Thread& begin_hook(const char* hook, const void* place) {
  machine->begin_hook(hook, place);
  return *machine->current;
}

}  // namespace flashmoe::emulator
