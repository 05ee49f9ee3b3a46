// Shows what kernels/core computes as NumPy structured arrays, so that tests can compare it with an
// oracle and tools can print it. The operator does not use this module. Arguments are checked by
// flashmoe_jax/introspect.py, the only caller.
#include <pybind11/native_enum.h>
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <cstdint>
#include <utility>
#include <vector>

#include "kernels/core/epoch.h"
#include "kernels/core/heap_layout.h"
#include "kernels/core/plan.h"
#include "kernels/core/shape.h"
#include "kernels/core/tile_order.h"

namespace py = pybind11;

namespace flashmoe {
namespace {

// Plan's arrays and accessors, evaluated for every expert.
struct ExpertRecord {
  int32_t pe;  // owner
  int32_t kept;
  int32_t first_row;
  int32_t first_block;
  int32_t blocks;
};

// The same for every (source, expert).
struct SourceRecord {
  int32_t start;
  int32_t kept;
  int32_t place;
};

// A row block in use. Others never get a row.
struct RowBlockRecord {
  int32_t pe;
  int32_t block;
  int32_t expert;
  int32_t rows;  // what its `arrived` signal must reach
};

using Counts = py::array_t<int32_t, py::array::c_style | py::array::forcecast>;

template <typename T>
py::array_t<T> to_array(const std::vector<T>& records, std::vector<py::ssize_t> shape) {
  return py::array_t<T>(std::move(shape), records.data());
}

template <typename T>
py::array_t<T> to_array(const std::vector<T>& records) {
  return to_array(records, {static_cast<py::ssize_t>(records.size())});
}

// A plan with the memory that its pointers refer to.
class OwnedPlan {
 public:
  OwnedPlan(const core::Shape& shape, const Counts& counts)
      : counts_(counts.data(), counts.data() + counts.size()),
        start_(counts_.size()),
        kept_(shape.num_experts),
        first_row_(shape.num_experts),
        plan_{shape, counts_.data(), start_.data(), kept_.data(), first_row_.data(), 0} {
    core::build_plan(plan_);
  }
  OwnedPlan(const OwnedPlan&) = delete;
  OwnedPlan& operator=(const OwnedPlan&) = delete;

  int64_t cap() const { return plan_.cap; }

  py::array_t<ExpertRecord> experts() const {
    std::vector<ExpertRecord> records;
    for (int32_t e = 0; e < plan_.shape.num_experts; ++e) {
      records.push_back({plan_.owner(e), plan_.kept[e], plan_.first_row[e], plan_.first_block(e),
                         plan_.blocks(e)});
    }
    return to_array(records);
  }

  py::array_t<SourceRecord> sources() const {
    const core::Shape& shape = plan_.shape;
    std::vector<SourceRecord> records;
    for (int32_t pe = 0; pe < shape.num_pes; ++pe) {
      for (int32_t e = 0; e < shape.num_experts; ++e) {
        records.push_back(
            {plan_.start[pe * shape.num_experts + e], plan_.kept_rows(pe, e), plan_.place(pe, e)});
      }
    }
    return to_array(records, {shape.num_pes, shape.num_experts});
  }

  py::array_t<RowBlockRecord> row_blocks() const {
    std::vector<RowBlockRecord> records;
    for (int32_t e = 0; e < plan_.shape.num_experts; ++e) {
      for (int32_t i = 0; i < plan_.blocks(e); ++i) {
        records.push_back({plan_.owner(e), plan_.first_block(e) + i, e, plan_.rows_in_block(e, i)});
      }
    }
    return to_array(records);
  }

  int64_t num_tiles(int32_t pe, int32_t first_columns, int32_t second_columns,
                    int32_t weight_tiles) const {
    return core::TileOrder{&plan_, pe, first_columns, second_columns, weight_tiles, 1}.size();
  }

  py::array_t<core::Tile> tiles(int32_t pe, int32_t first_columns, int32_t second_columns,
                                int32_t weight_tiles, int32_t lag, int64_t start,
                                int64_t stop) const {
    const core::TileOrder order{&plan_, pe, first_columns, second_columns, weight_tiles, lag};
    py::array_t<core::Tile> tiles(static_cast<py::ssize_t>(stop - start));
    core::Tile* out = tiles.mutable_data();
    for (int64_t ticket = start; ticket < stop; ++ticket) *out++ = order.at(ticket);
    return tiles;
  }

 private:
  std::vector<int32_t> counts_, start_, kept_, first_row_;
  core::Plan plan_;
};

py::array_t<core::HeapLayout> heap_layout(const core::Shape& shape, int32_t element_bytes,
                                          bool backward, bool resend_rows) {
  const core::HeapLayout layout(shape, core::Traffic{backward, resend_rows, element_bytes});
  return py::array_t<core::HeapLayout>(std::vector<py::ssize_t>{}, &layout);
}

py::array_t<core::DispatchStep> dispatch_order(const core::Shape& shape) {
  std::vector<core::DispatchStep> steps;
  for (int32_t me = 0; me < shape.num_pes; ++me) {
    for (int64_t step = 0; step < core::dispatch_steps(shape); ++step) {
      steps.push_back(core::dispatch_step(shape, me, step));
    }
  }
  return to_array(steps, {shape.num_pes, core::dispatch_steps(shape)});
}

void bind_shape(py::module_& m) {
  py::class_<core::Shape>(m, "Shape")
      .def(py::init([](int32_t num_pes, int32_t tokens, int32_t hidden, int32_t intermediate,
                       int32_t num_experts, int32_t experts_per_token, int64_t capacity,
                       int64_t max_rows, int32_t block_rows, int32_t block_tokens,
                       int32_t block_columns) {
             return core::Shape{num_pes,           tokens,   hidden,   intermediate, num_experts,
                                experts_per_token, capacity, max_rows, block_rows,   block_tokens,
                                block_columns};
           }),
           py::kw_only(), py::arg("num_pes"), py::arg("tokens"), py::arg("hidden"),
           py::arg("intermediate"), py::arg("num_experts"), py::arg("experts_per_token"),
           py::arg("capacity"), py::arg("max_rows"), py::arg("block_rows"), py::arg("block_tokens"),
           py::arg("block_columns"))
      .def_property_readonly("slots", &core::Shape::slots)
      .def_property_readonly("recv_rows", &core::Shape::recv_rows)
      .def_property_readonly("row_blocks", &core::Shape::row_blocks)
      .def_property_readonly("token_blocks", &core::Shape::token_blocks)
      .def_property_readonly("intermediate_tiles", &core::Shape::intermediate_tiles)
      .def_property_readonly("hidden_tiles", &core::Shape::hidden_tiles);
  m.attr("NO_CAPACITY") = core::kNoCapacity;
}

void bind_heap_layout(py::module_& m) {
  PYBIND11_NUMPY_DTYPE(core::Section, offset, count, stride);
  PYBIND11_NUMPY_DTYPE(core::HeapLayout, counts, counted, recv, recv_x, origin, weight, arrived,
                       returned, returned_weight, came_back, bytes);
  m.def("heap_layout", &heap_layout, py::arg("shape"), py::kw_only(), py::arg("element_bytes"),
        py::arg("backward"), py::arg("resend_rows"));
  m.attr("SECTION_ALIGNMENT") = core::kSectionAlignment;
}

void bind_plan(py::module_& m) {
  PYBIND11_NUMPY_DTYPE(ExpertRecord, pe, kept, first_row, first_block, blocks);
  PYBIND11_NUMPY_DTYPE(SourceRecord, start, kept, place);
  PYBIND11_NUMPY_DTYPE(RowBlockRecord, pe, block, expert, rows);
  py::native_enum<core::TileKind>(m, "TileKind", "enum.IntEnum")
      .value("FIRST", core::TileKind::kFirst)
      .value("SECOND", core::TileKind::kSecond)
      .value("WEIGHTS", core::TileKind::kWeights)
      .finalize();
  PYBIND11_NUMPY_DTYPE(core::Tile, kind, expert, block, column);
  py::class_<OwnedPlan>(m, "Plan")
      .def(py::init<const core::Shape&, const Counts&>(), py::arg("shape"), py::arg("counts"))
      .def_property_readonly("cap", &OwnedPlan::cap)
      .def_property_readonly("experts", &OwnedPlan::experts)
      .def_property_readonly("sources", &OwnedPlan::sources)
      .def_property_readonly("row_blocks", &OwnedPlan::row_blocks)
      .def("num_tiles", &OwnedPlan::num_tiles, py::arg("pe"), py::kw_only(),
           py::arg("first_columns"), py::arg("second_columns"), py::arg("weight_tiles"))
      .def("tiles", &OwnedPlan::tiles, py::arg("pe"), py::kw_only(), py::arg("first_columns"),
           py::arg("second_columns"), py::arg("weight_tiles"), py::arg("lag"), py::arg("start"),
           py::arg("stop"));

  PYBIND11_NUMPY_DTYPE(core::DispatchStep, pe, expert);
  m.def("dispatch_order", &dispatch_order, py::arg("shape"));
}

void bind_epoch(py::module_& m) {
  py::native_enum<core::Counted>(m, "Counted", "enum.Enum")
      .value("NOT_YET", core::Counted::kNotYet)
      .value("HERE", core::Counted::kHere)
      .value("OTHER_CALL", core::Counted::kOtherCall)
      .finalize();
  m.def("parity", &core::parity, py::arg("epoch"));
  m.def("counted_word", &core::counted_word, py::arg("tag"), py::arg("epoch"));
  m.def("epoch_of", &core::epoch_of, py::arg("word"));
  m.def("tag_of", &core::tag_of, py::arg("word"));
  m.def("judge_counted", &core::judge_counted, py::arg("seen"), py::arg("tag"), py::arg("epoch"));
}

}  // namespace

PYBIND11_MODULE(_introspect, m) {
  m.doc() = "The protocol's core as NumPy structured arrays; see flashmoe_jax/introspect.py.";
  bind_shape(m);
  bind_heap_layout(m);
  bind_plan(m);
  bind_epoch(m);
}

}  // namespace flashmoe
