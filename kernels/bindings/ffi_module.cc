// The extension that ships: the handlers of the CPU engine, for registration with XLA, and the
// sizes that Python needs to know before it can make a call.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>

#include <cstddef>

#include "kernels/core/heap_layout.h"
#include "kernels/core/shape.h"
#include "kernels/core/trace.h"
#include "kernels/cpu/engine.h"
#include "kernels/cpu/ffi_handlers.h"
#include "kernels/cpu/simd/kernels.h"
#include "kernels/cpu/tile_sizes.h"

namespace nb = nanobind;

namespace flashmoe {
namespace {

nb::capsule handler(XLA_FFI_Error* (*function)(XLA_FFI_CallFrame*)) {
  return nb::capsule(reinterpret_cast<void*>(function));
}

core::Shape shape_of(int32_t num_pes, int32_t tokens, int32_t hidden, int32_t num_experts,
                     int32_t experts_per_token, int64_t max_rows) {
  return core::Shape{
      .num_pes = num_pes,
      .tokens = tokens,
      .hidden = hidden,
      .intermediate = 0,
      .num_experts = num_experts,
      .experts_per_token = experts_per_token,
      .capacity = core::kNoCapacity,
      .max_rows = max_rows,
      .block_rows = cpu::block_rows(num_pes, tokens, num_experts, experts_per_token),
      .block_tokens = cpu::kBlockTokens,
      .block_columns = cpu::kBlockColumns,
  };
}

// What np.dtype takes to describe core::TraceRecord.
nb::dict trace_dtype() {
  nb::list names, formats, offsets;
  const auto add = [&](const char* name, const char* format, size_t offset) {
    names.append(name);
    formats.append(format);
    offsets.append(offset);
  };
  using Record = core::TraceRecord;
  add("call", "i8", offsetof(Record, call));
  add("begin", "i8", offsetof(Record, begin));
  add("ready", "i8", offsetof(Record, ready));
  add("end", "i8", offsetof(Record, end));
  add("backward", "i4", offsetof(Record, backward));
  add("group", "i4", offsetof(Record, group));
  add("pe", "i4", offsetof(Record, pe));
  add("worker", "i4", offsetof(Record, worker));
  add("phase", "i4", offsetof(Record, phase));
  add("expert", "i4", offsetof(Record, expert));
  add("row_block", "i4", offsetof(Record, row_block));
  add("rows", "i4", offsetof(Record, rows));
  nb::dict dtype;
  dtype["names"] = names;
  dtype["formats"] = formats;
  dtype["offsets"] = offsets;
  dtype["itemsize"] = sizeof(Record);
  return dtype;
}

}  // namespace

NB_MODULE(_ext, m) {
  m.doc() = "XLA FFI handlers of the CPU engine.";
  m.def(
      "call_site_type",
      [] {
        nb::dict type;
        type["type_id"] = nb::capsule(cpu::call_site_type_id());
        type["type_info"] = nb::capsule(cpu::call_site_type_info());
        return type;
      },
      "The state type of the handlers, for jax.ffi.register_ffi_type.");
  m.def(
      "handlers",
      [] {
        const auto stages = [](XLA_FFI_Error* (*execute)(XLA_FFI_CallFrame*)) {
          nb::dict dict;
          dict["instantiate"] = handler(cpu::instantiate);
          dict["execute"] = handler(execute);
          return dict;
        };
        nb::dict dict;
        dict["flashmoe_forward"] = stages(cpu::forward);
        dict["flashmoe_backward"] = stages(cpu::backward);
        return dict;
      },
      "Targets and their handlers by stage, for jax.ffi.register_ffi_target.");
  m.def(
      "recv_rows",
      [](int32_t num_pes, int32_t tokens, int32_t num_experts, int32_t experts_per_token,
         int64_t max_rows) {
        return shape_of(num_pes, tokens, 0, num_experts, experts_per_token, max_rows).recv_rows();
      },
      nb::arg("num_pes"), nb::arg("tokens"), nb::arg("num_experts"), nb::arg("experts_per_token"),
      nb::arg("max_rows"),
      "Rows of the receive buffer of a PE that accepts max_rows rows, and so of the residuals.");
  m.def(
      "heap_bytes",
      [](int32_t num_pes, int32_t tokens, int32_t hidden, int32_t num_experts,
         int32_t experts_per_token, int64_t max_rows, int32_t element_bytes, bool backward,
         bool resend_rows) {
        return core::HeapLayout(
                   shape_of(num_pes, tokens, hidden, num_experts, experts_per_token, max_rows),
                   core::Traffic{backward, resend_rows, element_bytes})
            .bytes;
      },
      nb::arg("num_pes"), nb::arg("tokens"), nb::arg("hidden"), nb::arg("num_experts"),
      nb::arg("experts_per_token"), nb::arg("max_rows"), nb::arg("element_bytes"),
      nb::arg("backward"), nb::arg("resend_rows"), "Bytes of the symmetric heap of one PE.");
  m.def(
      "settings",
      [] {
        nb::dict dict;
        dict["cores"] = cpu::Engine::instance().cores();
        dict["instruction_set"] = cpu::simd::kernel_set().name;
        nb::list supported;
        for (const auto& set : cpu::simd::supported_kernels()) supported.append(set.name);
        dict["supported_instruction_sets"] = supported;
        return dict;
      },
      "What the engine computes with. Raises ValueError where an environment variable is wrong.");
  m.def("trace_dtype", trace_dtype, "What np.dtype takes to describe a trace record.");
  m.def(
      "start_trace", [](int64_t capacity) { cpu::Engine::instance().start_trace(capacity); },
      nb::arg("capacity"), "Records the tasks of all calls that start from now on.");
  m.def(
      "stop_trace",
      [] {
        const cpu::TraceBuffer::Contents contents = cpu::Engine::instance().stop_trace();
        const nb::bytes records(contents.records.data(),
                                contents.records.size() * sizeof(core::TraceRecord));
        return nb::make_tuple(records, contents.lost);
      },
      "Stops recording: (the records, how many found no room).");
}

}  // namespace flashmoe
