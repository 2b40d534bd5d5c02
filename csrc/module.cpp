// Python bindings of the plan builder: pure functions over arrays, the GIL released while they run.

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "blend.hpp"
#include "keyed_permutation.hpp"
#include "sample_index.hpp"

namespace py = pybind11;
using namespace megaphase;

template <typename T>
using Array = py::array_t<T, py::array::c_style>;

namespace {

void require(bool condition, const char* message) {
    if (!condition) throw std::invalid_argument(message);
}

template <typename Length>
Documents<Length> view(const Array<Length>& lengths, const Array<uint64_t>& hashes,
                       uint64_t threshold, bool held_out) {
    require(lengths.ndim() == 1 && hashes.ndim() == 1, "lengths and hashes have one dimension");
    require(lengths.size() == hashes.size(), "lengths and hashes differ in size");
    return {lengths.data(), hashes.data(), static_cast<int64_t>(lengths.size()), threshold,
            held_out ? Side::held_out : Side::training};
}

// Blend the slots [position, position + tasks.size()); counts[b] are the turns that every task had
// before slot b * block of the phase, for the blocks that start in this range.
template <typename Task>
void fill_blend(EarliestDeadlineFirst& blend, Array<Task>& tasks, Array<int64_t>& counts,
                int64_t block) {
    const int64_t number_of_tasks = static_cast<int64_t>(blend.counts().size());
    require(tasks.ndim() == 1 && counts.ndim() == 2, "tasks is [samples], counts [blocks, tasks]");
    require(block > 0 && blend.position() % block == 0, "a range starts at a block's start");
    require(counts.shape(1) == number_of_tasks, "counts has a column for every task");
    require(counts.shape(0) == (tasks.size() + block - 1) / block, "counts has a row for every block");
    Task* task = tasks.mutable_data();
    int64_t* row = counts.mutable_data();
    const int64_t samples = tasks.size();
    py::gil_scoped_release released;
    for (int64_t i = 0; i < samples; ++i) {
        if (i % block == 0) {
            std::copy(blend.counts().begin(), blend.counts().end(), row);
            row += number_of_tasks;
        }
        task[i] = static_cast<Task>(blend.next());
    }
}

// The ordinal, within its task and phase, of each sample in [first, first + ordinals.size()).
template <typename Task>
void phase_ordinals(const Array<Task>& tasks, const Array<int64_t>& counts, int64_t block,
                    int64_t first, Array<int64_t>& ordinals) {
    const int64_t wanted = ordinals.size();
    require(first >= 0 && wanted <= tasks.size() - first, "samples outside the phase");
    const Task* task = tasks.data();
    int64_t* ordinal = ordinals.mutable_data();
    const int64_t row = first / block;
    require(row < counts.shape(0) || wanted == 0, "counts has no row for these samples");
    if (wanted == 0) return;
    std::vector<int64_t> seen(counts.data(row, 0), counts.data(row, 0) + counts.shape(1));
    py::gil_scoped_release released;
    for (int64_t i = row * block; i < first + wanted; ++i) {
        const int64_t turn = seen[task[i]]++;
        if (i >= first) ordinal[i - first] = turn;
    }
}

template <typename Length, typename Slot>
void fill_epoch(const Array<Length>& lengths, const Array<uint64_t>& hashes, uint64_t threshold,
                bool held_out, uint64_t key, int64_t epoch, int64_t seq_len, Array<Slot>& slots,
                Array<uint32_t>& offsets) {
    const auto documents = view(lengths, hashes, threshold, held_out);
    require(seq_len > 0, "seq_len is positive");
    require(slots.size() == offsets.size(), "slots and offsets differ in size");
    Slot* slot = slots.mutable_data();
    uint32_t* offset = offsets.mutable_data();
    const int64_t samples = slots.size();
    py::gil_scoped_release released;
    const KeyedPermutation order(documents.count, member_key(key, epoch));
    index_epoch(documents, order, seq_len, samples, slot, offset);
}

template <typename Length>
std::pair<int64_t, int64_t> count_documents(const Array<Length>& lengths,
                                            const Array<uint64_t>& hashes, uint64_t threshold,
                                            bool held_out) {
    const auto documents = view(lengths, hashes, threshold, held_out);
    py::gil_scoped_release released;
    const Totals totals = count_side(documents);
    return {totals.documents, totals.tokens};
}

// Read each located sample into its row of inputs and targets, both [batch, seq_len].
template <typename Length, typename Token>
void read_samples(const Array<Token>& tokens, const Array<int64_t>& byte_offsets,
                  const Array<Length>& lengths, const Array<uint64_t>& hashes, uint64_t threshold,
                  bool held_out, uint64_t key, const Array<int64_t>& epochs,
                  const Array<int64_t>& slots, const Array<uint32_t>& offsets,
                  const Array<int64_t>& rows, Array<int64_t>& inputs, Array<int64_t>& targets,
                  int64_t filler, int64_t ignored) {
    const auto documents = view(lengths, hashes, threshold, held_out);
    require(byte_offsets.size() == documents.count, "byte_offsets and lengths differ in size");
    require(inputs.ndim() == 2 && targets.ndim() == 2 && inputs.shape(0) == targets.shape(0) &&
                inputs.shape(1) == targets.shape(1),
            "inputs and targets are [batch, seq_len]");
    const int64_t samples = rows.size();
    require(epochs.size() == samples && slots.size() == samples && offsets.size() == samples,
            "epochs, slots, offsets and rows differ in size");
    const Token* token = tokens.data();
    const int64_t available = tokens.size();
    const int64_t* starts = byte_offsets.data();
    const int64_t *epoch = epochs.data(), *slot = slots.data(), *row = rows.data();
    const uint32_t* offset = offsets.data();
    int64_t *input = inputs.mutable_data(), *target = targets.mutable_data();
    const int64_t batch = inputs.shape(0), seq_len = inputs.shape(1);
    py::gil_scoped_release released;
    std::vector<int64_t> sample(seq_len + 1);
    for (int64_t i = 0; i < samples; ++i) {
        require(row[i] >= 0 && row[i] < batch && slot[i] >= 0, "a row or slot is out of range");
        const KeyedPermutation order(documents.count, member_key(key, epoch[i]));
        auto end = sample.begin();
        const int64_t found = for_each_piece(
            documents, order, slot[i], offset[i], seq_len + 1,
            [&](int64_t document, int64_t from, int64_t taken) {
                const int64_t begin = load(starts, document) / int64_t{sizeof(Token)} + from;
                if (begin < 0 || begin > available - taken)
                    throw std::out_of_range("a document lies outside the token file");
                end = std::copy_n(token + begin, taken, end);
            });
        if (found < 2) throw std::out_of_range("a sample lies outside its epoch");
        std::fill(end, sample.end(), filler);
        std::copy_n(sample.begin(), seq_len, input + row[i] * seq_len);
        std::fill(end, sample.end(), ignored);
        std::copy_n(sample.begin() + 1, seq_len, target + row[i] * seq_len);
    }
}

// A stream's ordinals as numbers in token order.
Array<int64_t> shuffle_samples(const Array<int64_t>& ordinals, int64_t samples_per_epoch,
                               int64_t window, uint64_t key) {
    require(samples_per_epoch > 0 && window > 0, "samples_per_epoch and window are positive");
    SampleShuffle shuffle(samples_per_epoch, window, key);
    Array<int64_t> numbers(ordinals.size());
    const int64_t* ordinal = ordinals.data();
    int64_t* number = numbers.mutable_data();
    for (py::ssize_t i = 0; i < ordinals.size(); ++i) {
        require(ordinal[i] >= 0, "ordinals are not negative");
        number[i] = shuffle(ordinal[i]);
    }
    return numbers;
}

template <typename Length>
void bind_for_length(py::module_& module) {
    module.def("count_documents", &count_documents<Length>, py::arg("lengths").noconvert(),
               py::arg("hashes").noconvert(), py::arg("threshold"), py::arg("held_out"));
}

template <typename Length, typename Slot>
void bind_fill_epoch(py::module_& module) {
    module.def("fill_epoch", &fill_epoch<Length, Slot>, py::arg("lengths").noconvert(),
               py::arg("hashes").noconvert(), py::arg("threshold"), py::arg("held_out"),
               py::arg("key"), py::arg("epoch"), py::arg("seq_len"), py::arg("slots").noconvert(),
               py::arg("offsets").noconvert());
}

template <typename Length, typename Token>
void bind_read_samples(py::module_& module) {
    module.def("read_samples", &read_samples<Length, Token>, py::arg("tokens").noconvert(),
               py::arg("byte_offsets").noconvert(), py::arg("lengths").noconvert(),
               py::arg("hashes").noconvert(), py::arg("threshold"), py::arg("held_out"),
               py::arg("key"), py::arg("epochs").noconvert(), py::arg("slots").noconvert(),
               py::arg("offsets").noconvert(), py::arg("rows").noconvert(),
               py::arg("inputs").noconvert(), py::arg("targets").noconvert(), py::arg("filler"),
               py::arg("ignored"));
}

template <typename Task>
void bind_for_task(py::module_& module) {
    module.def("fill_blend", &fill_blend<Task>, py::arg("blend"), py::arg("tasks").noconvert(),
               py::arg("counts").noconvert(), py::arg("block"));
    module.def("phase_ordinals", &phase_ordinals<Task>, py::arg("tasks").noconvert(),
               py::arg("counts").noconvert(), py::arg("block"), py::arg("first"),
               py::arg("ordinals").noconvert());
}

}  // namespace

PYBIND11_MODULE(_builder, module) {
    module.doc() = "The plan builder's inner loops; see megaphase.plan.index for what they mean.";
    py::class_<EarliestDeadlineFirst>(module, "EarliestDeadlineFirst")
        .def(py::init<const std::vector<uint64_t>&>(), py::arg("weights"))
        .def_property_readonly("position", &EarliestDeadlineFirst::position)
        .def_property_readonly("counts", &EarliestDeadlineFirst::counts);
    module.attr("LARGEST_TOTAL_WEIGHT") = EarliestDeadlineFirst::kLargestTotal;
    module.def("shuffle_samples", &shuffle_samples, py::arg("ordinals").noconvert(),
               py::arg("samples_per_epoch"), py::arg("window"), py::arg("key"));
    bind_for_task<uint16_t>(module);
    bind_for_task<uint32_t>(module);
    bind_for_length<int32_t>(module);
    bind_for_length<int64_t>(module);
    bind_fill_epoch<int32_t, uint32_t>(module);
    bind_fill_epoch<int32_t, uint64_t>(module);
    bind_fill_epoch<int64_t, uint32_t>(module);
    bind_fill_epoch<int64_t, uint64_t>(module);
    bind_read_samples<int32_t, uint16_t>(module);
    bind_read_samples<int32_t, int32_t>(module);
    bind_read_samples<int64_t, uint16_t>(module);
    bind_read_samples<int64_t, int32_t>(module);
}
