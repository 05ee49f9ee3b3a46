// How messages name threads, memory and what is waited for.
#include <dlfcn.h>

#include <algorithm>
#include <cstdio>
#include <map>

#include "kernels/emulator/machine.h"

namespace flashmoe::emulator {
namespace {

struct SharedName {
  size_t offset, bytes, element_bytes;
  std::string name;
};

std::vector<SharedName>& shared_names() {
  static std::vector<SharedName> names;
  return names;
}

// Where code lies in its file, as addr2line takes it.
std::string code_address(const void* place) {
  Dl_info info;
  if (!place || !dladdr(place, &info)) return "?";
  const size_t offset =
      reinterpret_cast<uintptr_t>(place) - reinterpret_cast<uintptr_t>(info.dli_fbase) - 1;
  char text[32];
  std::snprintf(text, sizeof(text), "0x%zx", offset);
  return text;
}

// "4-11, 13"
std::string ranges(const std::vector<int>& numbers) {
  std::string text;
  for (size_t i = 0; i < numbers.size();) {
    size_t end = i + 1;
    while (end < numbers.size() && numbers[end] == numbers[end - 1] + 1) ++end;
    if (!text.empty()) text += ", ";
    text += std::to_string(numbers[i]);
    if (end - i > 1) text += "-" + std::to_string(numbers[end - 1]);
    i = end;
  }
  return text;
}

}  // namespace

void name_shared_memory(size_t offset, size_t bytes, size_t element_bytes, std::string name) {
  shared_names().push_back({offset, bytes, element_bytes, std::move(name)});
}

void forget_shared_names() { shared_names().clear(); }

std::string Machine::who(const Thread& thread) const {
  return "block " + std::to_string(thread.block) + " warp " +
         std::to_string(thread.index / kWarpSize) + " lane " + std::to_string(lane_of(thread));
}

std::string Machine::who(Id id, uint32_t epoch) const {
  if (id == kCopyInFlight) {
    return "an async_copy_16 of " + who(threads[epoch - shadow.base() - 1]) +
           " that has not arrived";
  }
  if (id < threads.size()) return who(threads[id]);
  if (id >= threads.size() + agents.size()) {
    return "a put of " + who(threads[flights[kMaxId - 1 - id]]) + " that has not signalled";
  }
  const Agent& agent = agents[id - threads.size()];
  if (agent.kind == Agent::Kind::kPut) {
    return "a put that signalled " + where(agent.which);
  }
  if (agent.kind == Agent::Kind::kWgmma) {
    return "a wgmma of block " + std::to_string(agent.block) + " warpgroup " +
           std::to_string(agent.which);
  }
  return "an asynchronous copy that completes phase " + std::to_string(epoch - shadow.base() - 1) +
         " of " + where(agent.which);
}

std::string Machine::where(size_t offset) const {
  if (offset < Memory::kSharedEnd) {
    const size_t in_block = offset % Memory::kSharedStride;
    const std::string block =
        "shared memory of block " + std::to_string(offset / Memory::kSharedStride);
    for (const SharedName& name : shared_names()) {
      if (in_block < name.offset || in_block >= name.offset + name.bytes) continue;
      const size_t element = (in_block - name.offset) / name.element_bytes;
      const size_t rest = (in_block - name.offset) % name.element_bytes;
      return name.name + "[" + std::to_string(element) + "]" +
             (rest ? " + " + std::to_string(rest) : "") + " in " + block;
    }
    return "byte " + std::to_string(in_block) + " of " + block;
  }
  if (offset >= Memory::kEnd) return "an address that is not a kernel's memory";
  const Memory::Piece* piece = memory.before(offset);
  if (!piece) return "an address before all global memory";
  const std::string at =
      "byte " + std::to_string(offset - piece->begin) + " of '" + piece->name + "'";
  if (offset < piece->begin + piece->bytes) return at;
  return at + " (which has " + std::to_string(piece->bytes) + ")";
}

void Machine::report(const Conflict& conflict) {
  const Accessor& a = conflict.accessor;
  const std::string place = " (code " + code_address(current->place) + ")";
  std::string accessor = who(*current);
  if (a.id != current->id && a.id != kCopyInFlight) {
    accessor = who(a.id, a.epoch) + ", issued by " + accessor + ",";
  } else if (a.id == kCopyInFlight) {
    accessor = "an async_copy_16 of " + accessor;
  }
  const std::string does = std::string(a.atomic ? " atomically" : "") +
                           (conflict.write ? " writes " : " reads ") + where(conflict.offset);
  switch (conflict.kind) {
    case Conflict::Kind::kUnwritten:
      fail("uninitialised: " + accessor + does + ", which was never written" + place);
    case Conflict::Kind::kBarrierObject:
      fail("mbarrier misuse: " + accessor + does + ", which is an mbarrier" + place);
    case Conflict::Kind::kProxy:
      fail("proxy: " + accessor + does + " through the async proxy, which " +
           who(conflict.other, conflict.other_epoch) +
           " wrote through the generic one; fence_proxy_async is missing between them" + place);
    case Conflict::Kind::kRace:
      break;
  }
  const bool agent = conflict.other >= threads.size();
  const std::string other = who(conflict.other, conflict.other_epoch);
  if (agent && !conflict.other_write) {
    fail("stage reused early: " + accessor + does + ", which " + other + " may still read" + place);
  }
  if (agent) {
    fail("read early: " + accessor + does + ", which " + other + " writes; it was not waited for" +
         place);
  }
  fail("race: " + accessor + does + ", which " + other +
       (conflict.other_write ? " wrote" : " read") + "; nothing orders them" + place);
}

std::string Machine::waits_for(const Thread& thread) const {
  switch (thread.wait) {
    case Wait::kNothing:
      return "can go on after " + std::string(thread.doing);
    case Wait::kEnded:
      return "have ended";
    case Wait::kNextKernel:
      return "next_kernel, for which all CTAs of the GPU must have ended this one";
    case Wait::kQuiet:
      return "quiet, while " + std::to_string(thread.puts) + " puts have not signalled";
    case Wait::kTime:
      return "sleep or poll in " + std::string(thread.doing) + " (code " +
             code_address(thread.place) + ")";
    case Wait::kWarp:
      return std::string(thread.doing) + ", which needs all 32 lanes";
    case Wait::kWgmma:
      return "wgmma_wait, which needs all 128 threads to commit";
    case Wait::kBarrier: {
      const NamedBarrier& b =
          blocks[static_cast<size_t>(thread.block)].barriers[static_cast<size_t>(thread.barrier)];
      return "barrier " + std::to_string(thread.barrier) + ", to which " +
             std::to_string(b.arrived.size()) + " of " + std::to_string(b.expected) +
             " threads came";
    }
    case Wait::kMbarrier: {
      const Mbarrier& b = *thread.mbarrier;
      return "mbarrier " + where(b.offset) + " parity " + std::to_string(thread.parity) +
             " (phase " + std::to_string(b.phase) + ": " + std::to_string(b.pending) + " of " +
             std::to_string(b.arrivals) + " arrivals and " + std::to_string(b.bytes) +
             " bytes missing)";
    }
  }
  return "";
}

std::string Machine::waiting() const {
  // What is waited for, by whom: warps of a CTA, and the lanes where it is not all of them.
  std::map<std::pair<int, std::string>, std::vector<const Thread*>> groups;
  for (const Thread& thread : threads) {
    if (thread.wait != Wait::kEnded) groups[{thread.block, waits_for(thread)}].push_back(&thread);
  }
  std::string text;
  for (const auto& [what, members] : groups) {
    std::map<int, uint32_t> lanes;
    for (const Thread* thread : members) {
      lanes[thread->index / kWarpSize] |= 1u << lane_of(*thread);
    }
    std::map<uint32_t, std::vector<int>> warps_by_lanes;
    for (const auto& [warp, mask] : lanes) warps_by_lanes[mask].push_back(warp);
    for (const auto& [mask, numbers] : warps_by_lanes) {
      text += "  block " + std::to_string(what.first) +
              (numbers.size() == 1 ? " warp " : " warps ") + ranges(numbers);
      if (mask != ~0u) {
        std::vector<int> which;
        for (int i = 0; i < kWarpSize; ++i) {
          if (mask >> i & 1) which.push_back(i);
        }
        text += (which.size() == 1 ? " lane " : " lanes ") + ranges(which);
      }
      text += ": " + what.second + "\n";
    }
  }
  if (!text.empty()) text.pop_back();
  return text;
}

}  // namespace flashmoe::emulator
