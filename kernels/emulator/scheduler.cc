// Who runs next, and when asynchronous operations take effect.
#include <algorithm>
#include <bit>
#include <stdexcept>
#include <utility>

#include "kernels/emulator/machine.h"
#include "kernels/emulator/wgmma.h"

namespace flashmoe::emulator {

Machine* machine = nullptr;

namespace {

// What epochs and the like of this launch are greater than (shadow.h).
uint32_t next_base = 0;
constexpr uint32_t kLastBase = 1u << 31;

Stacks& stacks() {
  static Stacks instance;
  return instance;
}

void report_conflict(const Conflict& conflict);

constexpr uint64_t kLongestDelay = 20'000;

}  // namespace

void Machine::choose_policy() {
  static constexpr uint64_t kSwitch[] = {1, 2, 4, 16, 64, 512};
  static constexpr uint64_t kDemote[] = {4, 32, 256, 2048};
  static constexpr uint64_t kDelays[] = {0, 0, 30, 1'000, kLongestDelay};
  policy.order = static_cast<Policy::Order>(random.below(5) % 4);  // more often uniform
  policy.switch_one_in = kSwitch[random.below(std::size(kSwitch))];
  policy.demote_one_in = kDemote[random.below(std::size(kDemote))];
  policy.lanes = static_cast<int>(random.below(3));
  policy.longest_delay = kDelays[random.below(std::size(kDelays))];
  policy.starve_budget = 0;
  for (Warp& warp : warps) warp.priority = random.bits() >> 1;
  if (policy.order != Policy::Order::kStarve) return;
  policy.starve_budget = uint64_t{1} << (10 + random.below(8));
  const uint64_t warps_of_block = warps.size() / blocks.size();
  const uint64_t kind = random.below(3);
  const uint64_t victim = random.below(kind == 0 ? blocks.size() : warps_of_block);
  const uint64_t one = random.below(warps.size());
  for (size_t i = 0; i < warps.size(); ++i) {
    // A CTA, or a warp of every CTA (a role), or one warp.
    warps[i].starved = kind == 0   ? i / warps_of_block == victim
                       : kind == 1 ? i % warps_of_block == victim
                                   : i == one;
  }
}

Machine::Machine(const Launch& launch_, const std::function<void()>& body_)
    : launch(launch_),
      body(body_),
      memory(Memory::instance()),
      random(launch_.seed * 0x9e3779b97f4a7c15u + 0x1234567),
      threads(static_cast<size_t>(launch_.blocks) * static_cast<size_t>(launch_.threads)),
      warps(threads.size() / kWarpSize),
      blocks(static_cast<size_t>(launch_.blocks)),
      gpus(launch_.gpu_of_block.empty()
               ? 1
               : 1 + static_cast<size_t>(*std::max_element(launch_.gpu_of_block.begin(),
                                                           launch_.gpu_of_block.end()))),
      clocks(static_cast<int>(threads.size())),
      shadow(clocks, next_base, report_conflict),
      live_(static_cast<int>(threads.size())) {
  for (int block = 0; block < launch.blocks; ++block) {
    memory.reset_shared(block, launch.shared_bytes);
  }
  warpgroups.resize(threads.size() / kWarpgroupSize);
  for (size_t i = 0; i < blocks.size(); ++i) {
    blocks[i].gpu = launch.gpu_of_block.empty() ? 0 : launch.gpu_of_block[i];
    Gpu& gpu = gpus[static_cast<size_t>(blocks[i].gpu)];
    blocks[i].index = launch.grid_per_gpu ? gpu.blocks : static_cast<int>(i);
    gpu.threads += launch.threads;
    ++gpu.blocks;
  }
  for (size_t i = 0; i < warps.size(); ++i) {
    warps[i].index = static_cast<int>(i);
    warps[i].block = static_cast<int>(i * kWarpSize) / launch.threads;
    warps[i].epochs = shadow.base() + 1;
  }
  for (size_t i = 0; i < threads.size(); ++i) {
    Thread& t = threads[i];
    t.id = static_cast<Id>(i);
    t.block = static_cast<int>(i) / launch.threads;
    t.index = static_cast<int>(i) % launch.threads;
    t.epoch = shadow.base() + 1;
    stacks().prepare(t.context, i, &Machine::enter);
    make_ready(t);
  }
  choose_policy();
}

Machine::~Machine() {
  uint32_t highest = shadow.highest() + static_cast<uint32_t>(threads.size());
  for (const Warp& warp : warps) highest = std::max(highest, warp.epochs);
  for (const Block& block : blocks) {
    for (const auto& [offset, barrier] : block.mbarriers) {
      highest = std::max(highest, shadow.base() + 2 + barrier->phase);
    }
  }
  highest = std::max(highest, shadow.base() + 2 + puts);
  for (const auto& barrier : retired) {
    highest = std::max(highest, shadow.base() + 2 + barrier->phase);
  }
  for (const auto& group : warpgroups) {
    if (group) {
      highest = std::max(highest, shadow.base() + 2 + static_cast<uint32_t>(group->commits.size()));
    }
  }
  next_base = highest;
}

Outcome Machine::run() {
  Thread* first = pick();
  current = first;
  switch_context(outside_, first->context);
  if (exception_) std::rethrow_exception(exception_);
  if (failure_) throw Failure(*failure_);
  return {steps, now, schedule_};
}

void Machine::leave() {
  Context unused;
  switch_context(unused, outside_);
  __builtin_unreachable();
}

void Machine::enter() {
  Machine& m = *machine;
  Thread& thread = *m.current;
  try {
    m.body();
  } catch (...) {
    m.exception_ = std::current_exception();
  }
  if (m.exception_) m.leave();
  thread.doing = "ended";
  m.end_kernel(thread);
  m.warp_of(thread).ended |= 1u << lane_of(thread);
  --m.gpus[static_cast<size_t>(m.block_of(thread).gpu)].threads;
  m.progress();
  if (--m.live_ == 0) m.leave();
  m.block(Wait::kEnded);
  __builtin_unreachable();
}

void Machine::switch_to(Thread* next) {
  Thread* before = current;
  schedule_ = (schedule_ ^ next->id) * 0x100000001b3u + now;
  if (next == before) return;
  current = next;
  switch_context(before->context, next->context);
}

void Machine::begin_hook(const char* name, const void* place) {
  Thread& thread = *current;
  thread.doing = name;
  thread.place = place;
  plain_accesses_ = 0;
  ++now;
  if (++steps > launch.max_steps) {
    fail("the launch needs more than " + std::to_string(launch.max_steps) + " steps\n" + waiting());
  }
  ++run_length_;
  if (fire_due() || random.one_in(policy.switch_one_in)) {
    warp_ = nullptr;
    switch_to(pick());
  }
}

void Machine::block(Wait wait) {
  Thread& thread = *current;
  Warp& warp = warp_of(thread);
  thread.wait = wait;
  warp.ready &= ~(1u << lane_of(thread));
  if (warp.ready == 0) {
    const int last = ready_warps_.back();
    ready_warps_[static_cast<size_t>(warp.ready_position)] = last;
    warps[static_cast<size_t>(last)].ready_position = warp.ready_position;
    ready_warps_.pop_back();
    warp.ready_position = -1;
  }
  switch_to(pick());
}

void Machine::make_ready(Thread& thread) {
  Warp& warp = warp_of(thread);
  thread.wait = Wait::kNothing;
  thread.wake_ticket = 0;
  warp.ready |= 1u << lane_of(thread);
  if (warp.ready_position < 0) {
    warp.ready_position = static_cast<int>(ready_warps_.size());
    ready_warps_.push_back(warp.index);
  }
}

Thread* Machine::pick_lane(Warp& warp) {
  int lane = std::countr_zero(warp.ready);
  if (policy.lanes == 1) {
    lane = 31 - std::countl_zero(warp.ready);
  } else if (policy.lanes == 2) {
    const int turn = static_cast<int>(random.below(kWarpSize));
    lane = (std::countr_zero(std::rotr(warp.ready, turn)) + turn) % kWarpSize;
  }
  return &threads[static_cast<size_t>(warp.index * kWarpSize + lane)];
}

Warp* Machine::pick_warp() {
  const auto at = [this](size_t i) { return &warps[static_cast<size_t>(ready_warps_[i])]; };
  switch (policy.order) {
    case Policy::Order::kUniform:
      return at(random.below(ready_warps_.size()));
    case Policy::Order::kInOrder: {
      // The one that follows, as the hardware's round robin does.
      const int last = current ? warp_of(*current).index : 0;
      const int count = static_cast<int>(warps.size());
      const auto ahead = [&](int warp) { return warp > last ? warp - last : warp - last + count; };
      return &warps[static_cast<size_t>(
          *std::min_element(ready_warps_.begin(), ready_warps_.end(),
                            [&](int a, int b) { return ahead(a) < ahead(b); }))];
    }
    case Policy::Order::kPriority: {
      // The first of them may have run for long because it polls: now and then it becomes the last.
      if (current && (run_length_ > 2048 || random.one_in(policy.demote_one_in))) {
        warp_of(*current).priority = random.bits() >> 33;
        run_length_ = 0;
      }
      Warp* best = at(0);
      for (size_t i = 1; i < ready_warps_.size(); ++i) {
        if (at(i)->priority > best->priority) best = at(i);
      }
      return best;
    }
    case Policy::Order::kStarve: {
      const size_t start = random.below(ready_warps_.size());
      for (size_t i = 0; i < ready_warps_.size(); ++i) {
        Warp* warp = at((start + i) % ready_warps_.size());
        if (!warp->starved) return warp;
      }
      if (policy.starve_budget > 0 && !events_.empty()) return nullptr;
      return at(start);
    }
  }
  __builtin_unreachable();
}

Thread* Machine::pick() {
  for (;;) {
    fire_due();
    if (ready_warps_.empty()) {
      if (events_.empty()) deadlock();
      advance_to_next_event();
      continue;
    }
    // Mostly the lanes of a warp run until each blocks.
    if (!warp_ || warp_->ready == 0 || random.one_in(64)) {
      Warp* next = pick_warp();
      if (!next) {
        const uint64_t before = now;
        advance_to_next_event();
        policy.starve_budget -= std::min(policy.starve_budget, now - before + 1);
        stalled_ = 0;
        continue;
      }
      if (next != warp_ && policy.order != Policy::Order::kPriority) run_length_ = 0;
      warp_ = next;
    }
    return pick_lane(*warp_);
  }
}

void Machine::at(uint64_t time, std::function<void()> act) {
  add_event({time, ++event_order_, std::move(act), nullptr, 0});
}

void Machine::add_event(Event event) {
  events_.push_back(std::move(event));
  std::push_heap(events_.begin(), events_.end());
}

uint64_t Machine::delay() {
  uint64_t longest = policy.longest_delay;
  if (longest == 0) longest = uint64_t{1} << random.below(15);
  // All late, or anything between.
  return random.one_in(2) ? longest : random.below(longest + 1);
}

bool Machine::fire_due() {
  bool fired = false;
  while (!events_.empty() && events_.front().time <= now) {
    std::pop_heap(events_.begin(), events_.end());
    const Event event = std::move(events_.back());
    events_.pop_back();
    if (event.act) {
      event.act();
      progress();
    } else if (event.thread->wake_ticket == event.ticket) {
      make_ready(*event.thread);
    } else {
      continue;
    }
    fired = true;
  }
  return fired;
}

void Machine::advance_to_next_event() {
  now = std::max(now, events_.front().time);
  if (now > launch.max_nanoseconds) {
    fail("nobody got on for long: the virtual time limit of " +
         std::to_string(launch.max_nanoseconds) + " ns is over\n" + waiting());
  }
}

uint64_t Machine::stalled_rounds() const { return stalled_ / (4 * events_.size() + 64); }

uint64_t Machine::lengthened(uint64_t nanoseconds) const {
  // While nothing changes, time goes on faster and faster.
  return nanoseconds << std::min<uint64_t>(stalled_rounds(), 20);
}

void Machine::sleep_until(uint64_t time) {
  Thread& thread = *current;
  ++stalled_;
  thread.wake_ticket = ++tickets_;
  add_event({time, ++event_order_, nullptr, &thread, thread.wake_ticket});
  block(Wait::kTime);
}

void Machine::looked() {
  if (++current->unproductive % 16 != 0 && stalled_rounds() == 0) return;
  sleep_until(now + lengthened(64 + random.below(64)));
}

void Machine::deadlock() { fail("deadlock: nobody can go on\n" + waiting()); }

void Machine::fail(const std::string& message) {
  failure_ = message + " [seed " + std::to_string(launch.seed) + "]";
  leave();
}

Outcome launch(const Launch& launch, const std::function<void()>& body) {
  if (machine) throw std::logic_error("launch() within a launch");
  const size_t threads = static_cast<size_t>(launch.blocks) * static_cast<size_t>(launch.threads);
  if (launch.blocks < 1 || launch.threads < 1 || launch.threads % kWarpSize != 0 ||
      launch.threads > 1024 || threads > Stacks::kMaxStacks ||
      static_cast<size_t>(launch.blocks) > Memory::kMaxBlocks ||
      launch.shared_bytes > Memory::kSharedStride ||
      (!launch.gpu_of_block.empty() &&
       launch.gpu_of_block.size() != static_cast<size_t>(launch.blocks))) {
    throw std::invalid_argument("launch of " + std::to_string(launch.blocks) + " CTAs of " +
                                std::to_string(launch.threads) + " threads and " +
                                std::to_string(launch.shared_bytes) +
                                " bytes of shared memory: not possible");
  }
  if (next_base > kLastBase) {
    Memory::instance().forget_accesses();
    next_base = 0;
  }
  Machine instance(launch, body);
  machine = &instance;
  struct Reset {
    ~Reset() { machine = nullptr; }
  } reset;
  return instance.run();
}

namespace {

void report_conflict(const Conflict& conflict) { machine->report(conflict); }

}  // namespace
}  // namespace flashmoe::emulator
