// Python bindings of the plan builder: functions on arrays that release the GIL while they run.

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <cstdint>
#include <limits>
#include <memory>
#include <vector>

#include "arrays.hpp"
#include "blend.hpp"
#include "piecewise_blend.hpp"
#include "stream_bindings.hpp"

using namespace megaphase;

namespace {

void require_blend(const py::array& tasks, const py::array& counts) {
    require(tasks.ndim() == 1 && counts.ndim() == 2, "tasks is [samples], counts [blocks, tasks]");
}

// Blend the slots [position, position + tasks.size()); counts[b] receives the number of turns that
// every task had before slot b * block of the phase, for the blocks that start in this range.
template <typename Task, typename Blend>
void fill_blend(Blend& blend, Array<Task>& tasks, Array<int64_t>& counts, int64_t block) {
    const auto number_of_tasks = static_cast<int64_t>(blend.counts().size());
    require_blend(tasks, counts);
    require(number_of_tasks - 1 <= int64_t{std::numeric_limits<Task>::max()},
            "the type of tasks cannot number them");
    require(block > 0 && block < FreeSlots::kNone, "a block has 1 to 2^32 - 2 slots");
    require(blend.position() % block == 0, "a range starts at a block's start");
    require(counts.shape(1) == number_of_tasks, "counts has a column for every task");
    require(counts.shape(0) == (tasks.size() + block - 1) / block, "counts has a row for every block");
    Task* task = tasks.mutable_data();
    int64_t* row = counts.mutable_data();
    const int64_t samples = tasks.size();
    py::gil_scoped_release released;
    for (int64_t i = 0; i < samples; i += block, row += number_of_tasks) {
        std::copy(blend.counts().begin(), blend.counts().end(), row);
        blend.fill(task + i, static_cast<uint32_t>(std::min(block, samples - i)));
    }
}

// The ordinal, within its task and phase, of each sample in [first, first + ordinals.size()).
template <typename Task>
void phase_ordinals(const Array<Task>& tasks, const Array<int64_t>& counts, int64_t block,
                    int64_t first, Array<int64_t>& ordinals) {
    const int64_t wanted = ordinals.size();
    require_blend(tasks, counts);
    require(block > 0 && first >= 0 && wanted <= tasks.size() - first, "samples outside the phase");
    if (wanted == 0) return;
    const Task* task = tasks.data();
    int64_t* ordinal = ordinals.mutable_data();
    const int64_t row = first / block;
    require(row < counts.shape(0), "counts has no row for these samples");
    std::vector<int64_t> seen(counts.data(row, 0), counts.data(row, 0) + counts.shape(1));
    py::gil_scoped_release released;
    for (int64_t i = row * block; i < first + wanted; ++i) {
        require(task[i] < seen.size(), "a task has no column in counts");
        const int64_t turn = seen[task[i]]++;
        if (i >= first) ordinal[i - first] = turn;
    }
}

template <typename Blend>
void bind_blend(py::class_<Blend>& blend) {
    blend.def_property_readonly("position", &Blend::position)
        .def_property_readonly("counts", &Blend::counts)
        .def("fill", &fill_blend<uint16_t, Blend>, py::arg("tasks").noconvert(),
             py::arg("counts").noconvert(), py::arg("block"))
        .def("fill", &fill_blend<uint32_t, Blend>, py::arg("tasks").noconvert(),
             py::arg("counts").noconvert(), py::arg("block"));
}

// bounds is [pieces + 1], weights [tasks, pieces]; see RatePieces.
std::shared_ptr<const RatePieces> make_pieces(const Array<uint64_t>& bounds,
                                              const Array<uint64_t>& weights) {
    require(bounds.ndim() == 1 && weights.ndim() == 2 && weights.shape(1) + 1 == bounds.shape(0),
            "bounds is [pieces + 1], weights [tasks, pieces]");
    return std::make_shared<RatePieces>(
        std::vector<uint64_t>(bounds.data(), bounds.data() + bounds.size()),
        std::vector<uint64_t>(weights.data(), weights.data() + weights.size()));
}

template <typename Task>
void bind_phase_ordinals(py::module_& module) {
    module.def("phase_ordinals", &phase_ordinals<Task>, py::arg("tasks").noconvert(),
               py::arg("counts").noconvert(), py::arg("block"), py::arg("first"),
               py::arg("ordinals").noconvert());
}

}  // namespace

PYBIND11_MODULE(_builder, module) {
    module.doc() = "The plan builder's inner loops; see megaphase.plan.index for their meaning.";
    module.attr("LARGEST_TOTAL_WEIGHT") = kLargestTotalWeight;
    bind_streams(module);
    bind_phase_ordinals<uint16_t>(module);
    bind_phase_ordinals<uint32_t>(module);

    auto by_deadline = py::class_<DeadlineBlend>(module, "DeadlineBlend")
                           .def(py::init(&deadline_blend), py::arg("weights"));
    bind_blend(by_deadline);
    auto at_random =
        py::class_<RandomBlend>(module, "RandomBlend")
            .def(py::init<const std::vector<uint64_t>&, uint64_t>(), py::arg("weights"),
                 py::arg("key"));
    bind_blend(at_random);
    auto piecewise =
        py::class_<PiecewiseDeadlineBlend>(module, "PiecewiseDeadlineBlend")
            .def(py::init([](const Array<uint64_t>& bounds, const Array<uint64_t>& weights) {
                     return PiecewiseDeadlineBlend(make_pieces(bounds, weights));
                 }),
                 py::arg("bounds").noconvert(), py::arg("weights").noconvert());
    bind_blend(piecewise);
    auto piecewise_at_random =
        py::class_<PiecewiseRandomBlend>(module, "PiecewiseRandomBlend")
            .def(py::init([](const Array<uint64_t>& bounds, const Array<uint64_t>& weights,
                             uint64_t key) {
                     return PiecewiseRandomBlend(make_pieces(bounds, weights), key);
                 }),
                 py::arg("bounds").noconvert(), py::arg("weights").noconvert(), py::arg("key"));
    bind_blend(piecewise_at_random);
}
