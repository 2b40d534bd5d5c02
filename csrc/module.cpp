// Python bindings of the plan builder: functions on arrays that release the GIL while they run.

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <limits>
#include <optional>

#include "best_fit.hpp"
#include "blend.hpp"
#include "piecewise_blend.hpp"
#include "sample_index.hpp"
#include "stream.hpp"
#include "token_check.hpp"
#include "translation_stream.hpp"

namespace py = pybind11;
using namespace megaphase;

template <typename T>
using Array = py::array_t<T, py::array::c_style>;

namespace {

void require(bool condition, const char* message) {
    if (!condition) throw std::invalid_argument(message);
}

void require_blend(const py::array& tasks, const py::array& counts) {
    require(tasks.ndim() == 1 && counts.ndim() == 2, "tasks is [samples], counts [blocks, tasks]");
}

void require_starts(const py::array& starts) {
    require(starts.ndim() == 2 && starts.shape(1) == 2, "starts is [samples, 2]");
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

template <typename Token>
std::shared_ptr<const TokenCheck<Token>> make_check(const Array<Token>& tokens,
                                                    const std::optional<Array<uint32_t>>& blocks,
                                                    int64_t vocab_size) {
    const auto count = static_cast<int64_t>(tokens.size());
    const int64_t bytes = count * int64_t{sizeof(Token)};
    require(!blocks || (blocks->ndim() == 1 &&
                        blocks->size() == (bytes + kBlockBytes - 1) / kBlockBytes),
            "blocks has a checksum for every block");
    return std::make_shared<TokenCheck<Token>>(tokens.data(), count,
                                               blocks ? blocks->data() : nullptr, vocab_size);
}

template <typename Length, typename Token>
std::unique_ptr<Stream> make_stream(const Array<Token>& tokens, const Array<int64_t>& byte_offsets,
                                    const Array<Length>& lengths, const Array<uint64_t>& hashes,
                                    uint64_t first_hash, uint64_t last_hash, uint64_t key,
                                    int64_t seq_len, std::optional<int64_t> tag,
                                    const std::optional<Array<uint32_t>>& blocks,
                                    int64_t vocab_size, std::optional<int64_t> bos) {
    require(tokens.ndim() == 1 && byte_offsets.ndim() == 1 && lengths.ndim() == 1 &&
                hashes.ndim() == 1,
            "a corpus's arrays have one dimension");
    require(lengths.size() == hashes.size() && lengths.size() == byte_offsets.size(),
            "byte_offsets, lengths and hashes differ in size");
    require(seq_len > 0, "seq_len is positive");
    const Documents<Length> documents{lengths.data(), hashes.data(),
                                      static_cast<int64_t>(lengths.size()),
                                      {first_hash, last_hash}};
    const TokenFile<Token> file{tokens.data(), static_cast<int64_t>(tokens.size()),
                                byte_offsets.data(),
                                make_check(tokens, blocks, vocab_size)};
    const CorpusStream<Length, Token> stream(documents, file, key, seq_len, bos);
    if (!tag) return std::make_unique<CorpusStream<Length, Token>>(stream);
    require(*tag >= 0 && *tag <= int64_t{std::numeric_limits<Token>::max()}, "the tag is not a token");
    return std::make_unique<TranslationStream<Length, Token>>(stream, static_cast<Token>(*tag));
}

template <typename Unit>
int64_t fill_starts(StreamWalk& walk, Array<Unit>& starts, int64_t documents) {
    require_starts(starts);
    require(documents > 0, "documents is positive");
    auto* start = reinterpret_cast<Start<Unit>*>(starts.mutable_data());
    const int64_t samples = starts.shape(0);
    py::gil_scoped_release released;
    return walk.fill(start, samples, documents);
}

// The arrays into which samples are read, [batch, seq_len] each.
struct Destination {
    int64_t *inputs, *targets, *documents;
    int64_t batch, seq_len;

    Destination(Array<int64_t>& to_inputs, Array<int64_t>& to_targets,
                std::optional<Array<int64_t>>& to_documents)
        : inputs(to_inputs.mutable_data()),
          targets(to_targets.mutable_data()),
          documents(to_documents ? to_documents->mutable_data() : nullptr),
          batch(to_inputs.ndim() == 2 ? to_inputs.shape(0) : 0),
          seq_len(to_inputs.ndim() == 2 ? to_inputs.shape(1) : 0) {
        require(has_shape(to_inputs) && has_shape(to_targets),
                "inputs and targets are [batch, seq_len]");
        require(!to_documents || has_shape(*to_documents), "documents is [batch, seq_len]");
    }

    Row row(int64_t number) const {
        require(number >= 0 && number < batch, "a row is out of range");
        const int64_t at = number * seq_len;
        return {inputs + at, targets + at, documents ? documents + at : nullptr, seq_len, 0};
    }

private:
    bool has_shape(const Array<int64_t>& array) const {
        return array.ndim() == 2 && array.shape(0) == batch && array.shape(1) == seq_len;
    }
};

// Read each sample, given by its number in token order over all epochs, into its row.
template <typename Unit>
void read_samples(const Stream& stream, const Array<Unit>& starts, int64_t samples_per_epoch,
                  const Array<int64_t>& numbers, const Array<int64_t>& rows, Array<int64_t>& inputs,
                  Array<int64_t>& targets, int64_t filler, int64_t ignored,
                  std::optional<Array<int64_t>> documents) {
    require_starts(starts);
    const Destination to(inputs, targets, documents);
    require(to.seq_len == stream.seq_len(), "inputs and targets are [batch, seq_len]");
    require(numbers.size() == rows.size(), "numbers and rows differ in size");
    require(samples_per_epoch > 0, "samples_per_epoch is positive");
    const auto* start = reinterpret_cast<const Start<Unit>*>(starts.data());
    const int64_t indexed = starts.shape(0);
    const int64_t *number = numbers.data(), *row = rows.data(), samples = numbers.size();
    py::gil_scoped_release released;
    // All samples are prepared before the first one is read, so that their pages are read from disk
    // concurrently.
    std::vector<Piece> pieces;
    std::vector<size_t> ends;
    for (int64_t i = 0; i < samples; ++i) {
        require(row[i] >= 0 && row[i] < to.batch, "a row is out of range");
        if (number[i] < 0 || number[i] >= indexed)
            throw std::out_of_range("a sample lies outside the index");
        const Start<Unit>& at = start[number[i]];
        stream.prepare(number[i] / samples_per_epoch, static_cast<int64_t>(at.slot),
                       static_cast<int64_t>(at.offset), pieces);
        ends.push_back(pieces.size());
    }
    const Piece* piece = pieces.data();
    for (int64_t i = 0; i < samples; ++i) {
        const Piece* end = pieces.data() + ends[i];
        stream.read(piece, end, to.row(row[i]), {filler, ignored});
        piece = end;
    }
}

// A part of a sample: the positions [first, last) of an epoch, whose inputs follow those of the
// fragment before if that is of the same row.
struct Fragment {
    int64_t row, epoch, first, last;
};

// Read samples that consist of fragments, those of a row in order and next to each other. The index
// has a start every stream.seq_len() positions; inputs may have any length.
template <typename Unit>
void read_fragments(const Stream& stream, const Array<Unit>& starts, int64_t starts_per_epoch,
                    const Array<int64_t>& fragments, Array<int64_t>& inputs,
                    Array<int64_t>& targets, int64_t filler, int64_t ignored,
                    std::optional<Array<int64_t>> documents) {
    require_starts(starts);
    const Destination to(inputs, targets, documents);
    require(fragments.ndim() == 2 && fragments.shape(1) == 4, "fragments is [fragments, 4]");
    require(starts_per_epoch > 0, "starts_per_epoch is positive");
    const auto* start = reinterpret_cast<const Start<Unit>*>(starts.data());
    const auto* fragment = reinterpret_cast<const Fragment*>(fragments.data());
    const int64_t indexed = starts.shape(0), count = fragments.shape(0), grid = stream.seq_len();
    py::gil_scoped_release released;
    std::vector<Piece> pieces;
    std::vector<size_t> ends;
    for (int64_t i = 0; i < count; ++i) {
        const auto [row, epoch, first, last] = fragment[i];
        require(row >= 0 && row < to.batch, "a row is out of range");
        require(0 <= first && first < last && last - first <= to.seq_len,
                "a fragment has 1 to seq_len positions");
        if (epoch < 0 || epoch > indexed / starts_per_epoch || first / grid >= starts_per_epoch ||
            epoch * starts_per_epoch + first / grid >= indexed)
            throw std::out_of_range("a sample lies outside the index");
        const Start<Unit>& at = start[epoch * starts_per_epoch + first / grid];
        stream.prepare_tokens(epoch, static_cast<int64_t>(at.slot),
                              static_cast<int64_t>(at.offset) + first % grid, last - first + 1,
                              pieces);
        ends.push_back(pieces.size());
    }
    const Piece* piece = pieces.data();
    int64_t filled = 0;
    const Piece* first_piece = piece;  // of the row
    for (int64_t i = 0; i < count; ++i) {
        if (i == 0 || fragment[i].row != fragment[i - 1].row) {
            filled = 0;
            first_piece = piece;
        }
        const int64_t positions = fragment[i].last - fragment[i].first;
        const bool is_last = i + 1 == count || fragment[i + 1].row != fragment[i].row;
        Row row = to.row(fragment[i].row).from(filled, piece - first_piece);
        require(positions <= row.length, "the fragments of a row exceed seq_len");
        if (!is_last) row.length = positions;
        const Piece* end = pieces.data() + ends[i];
        stream.read(piece, end, row, {filler, ignored});
        filled += positions;
        piece = end;
    }
}

using Tuples = std::vector<std::tuple<int64_t, int64_t, int64_t>>;

// (document, offset, tokens) of every piece.
Tuples as_tuples(const std::vector<Piece>& pieces) {
    Tuples found;
    for (const Piece& piece : pieces) found.emplace_back(piece.document, piece.offset, piece.tokens);
    return found;
}

Tuples pieces(const Stream& stream, int64_t epoch, int64_t slot, int64_t offset) {
    require(slot >= 0 && offset >= 0, "slot and offset are not negative");
    std::vector<Piece> prepared;
    stream.prepare(epoch, slot, offset, prepared);
    return as_tuples(prepared);
}

static_assert(sizeof(Part) == 3 * sizeof(int64_t));

void require_parts(const Array<int64_t>& parts) {
    require(parts.ndim() == 2 && parts.shape(1) == 3, "parts is [parts, 3]");
}

int64_t fill_parts(StreamPartWalk& walk, Array<int64_t>& parts, int64_t documents) {
    require_parts(parts);
    require(documents > 0, "documents is positive");
    auto* part = reinterpret_cast<Part*>(parts.mutable_data());
    const int64_t count = parts.shape(0);
    py::gil_scoped_release released;
    return walk.fill(part, count, documents);
}

// Pack parts of documents; return the parts of all samples, and the number of parts of each.
std::pair<Array<int64_t>, Array<int64_t>> pack_parts(const Array<int64_t>& parts, int64_t seq_len,
                                                     bool bos) {
    require_parts(parts);
    require(seq_len > 0 && seq_len < int64_t{1} << 40, "seq_len is positive");
    const auto* part = reinterpret_cast<const Part*>(parts.data());
    const int64_t count = parts.shape(0);
    PackedParts packed;
    {
        py::gil_scoped_release released;
        packed = BestFit(seq_len, bos).pack(part, count);
    }
    const auto found = static_cast<py::ssize_t>(packed.parts.size());
    Array<int64_t> members({found, py::ssize_t{3}});
    std::copy(packed.parts.begin(), packed.parts.end(),
              reinterpret_cast<Part*>(members.mutable_data()));
    return {members, Array<int64_t>(static_cast<py::ssize_t>(packed.sizes.size()),
                                    packed.sizes.data())};
}

// Read samples into the given rows; sample i consists of the next sizes[i] parts.
void read_parts(const Stream& stream, const Array<int64_t>& parts, const Array<int64_t>& sizes,
                const Array<int64_t>& rows, Array<int64_t>& inputs, Array<int64_t>& targets,
                int64_t filler, int64_t ignored, std::optional<Array<int64_t>> documents) {
    require_parts(parts);
    const Destination to(inputs, targets, documents);
    require(sizes.size() == rows.size(), "sizes and rows differ in size");
    const auto* part = reinterpret_cast<const Part*>(parts.data());
    const int64_t count = parts.shape(0), samples = sizes.size();
    const int64_t *size = sizes.data(), *row = rows.data();
    py::gil_scoped_release released;
    int64_t in_all = 0;
    for (int64_t i = 0; i < samples; ++i) {
        require(row[i] >= 0 && row[i] < to.batch, "a row is out of range");
        require(size[i] >= 0 && size[i] <= count - in_all, "sizes exceed the parts");
        in_all += size[i];
    }
    // As in read_samples.
    std::for_each(part, part + in_all, [&](const Part& each) { stream.prepare_part(each); });
    for (int64_t i = 0; i < samples; part += size[i++])
        stream.read_parts(part, part + size[i], to.row(row[i]), {filler, ignored});
}

void require_spans(const Array<int64_t>& spans, const Array<int64_t>& starts) {
    require(spans.ndim() == 2 && spans.shape(1) == 4, "spans is [spans, 4]");
    require(starts.ndim() == 2 && starts.shape(1) == 3, "starts is [samples, 3]");
    const int64_t count = spans.shape(0);
    const auto* start = reinterpret_cast<const SpanStart*>(starts.data());
    for (int64_t i = 0; i < starts.shape(0); ++i)
        require(0 <= start[i].span && start[i].span < count && 0 <= start[i].slot &&
                    0 <= start[i].offset,
                "a start lies outside the spans");
    const auto* span = reinterpret_cast<const Span*>(spans.data());
    for (int64_t i = 0; i < count; ++i)
        require(0 <= span[i].slot && 0 <= span[i].offset && 0 <= span[i].end_offset,
                "slots and offsets are not negative");
}

// Pack spans [spans, 4] of epoch 0's documents; returns [span, slot, offset] of the start of each
// sample, and the number of predictions.
std::pair<Array<int64_t>, int64_t> pack(const Stream& stream, const Array<int64_t>& spans) {
    require_spans(spans, Array<int64_t>(std::vector<py::ssize_t>{0, 3}));
    const auto* span = reinterpret_cast<const Span*>(spans.data());
    const int64_t count = spans.shape(0);
    std::vector<SpanStart> starts;
    int64_t predictions;
    {
        py::gil_scoped_release released;
        predictions = stream.pack(span, count, starts);
    }
    Array<int64_t> found(std::vector<py::ssize_t>{static_cast<py::ssize_t>(starts.size()), 3});
    std::copy(starts.begin(), starts.end(), reinterpret_cast<SpanStart*>(found.mutable_data()));
    return {found, predictions};
}

// Read samples of packed spans, with these starts, into rows of inputs and targets.
void read_packed(const Stream& stream, const Array<int64_t>& spans, const Array<int64_t>& starts,
                 const Array<int64_t>& rows, Array<int64_t>& inputs, Array<int64_t>& targets,
                 int64_t filler, int64_t ignored, std::optional<Array<int64_t>> documents) {
    require_spans(spans, starts);
    const Destination to(inputs, targets, documents);
    require(to.seq_len == stream.seq_len(), "inputs and targets are [batch, seq_len]");
    require(rows.size() == starts.shape(0), "starts and rows differ in size");
    const auto* span = reinterpret_cast<const Span*>(spans.data());
    const auto* start = reinterpret_cast<const SpanStart*>(starts.data());
    const int64_t *row = rows.data(), count = spans.shape(0), samples = rows.size();
    py::gil_scoped_release released;
    std::vector<Piece> pieces;
    std::vector<size_t> ends;
    for (int64_t i = 0; i < samples; ++i) {
        require(row[i] >= 0 && row[i] < to.batch, "a row is out of range");
        stream.prepare_packed(span, count, start[i], pieces);
        ends.push_back(pieces.size());
    }
    const Piece* piece = pieces.data();
    for (int64_t i = 0; i < samples; ++i) {
        const Piece* end = pieces.data() + ends[i];
        stream.read(piece, end, to.row(row[i]), {filler, ignored});
        piece = end;
    }
}

// The pieces of the sample of packed spans that begins at [span, slot, offset].
Tuples packed_pieces(const Stream& stream, const Array<int64_t>& spans,
                     const Array<int64_t>& start) {
    require_spans(spans, start);
    require(start.shape(0) == 1, "start is [1, 3]");
    std::vector<Piece> prepared;
    stream.prepare_packed(reinterpret_cast<const Span*>(spans.data()), spans.shape(0),
                          *reinterpret_cast<const SpanStart*>(start.data()), prepared);
    return as_tuples(prepared);
}

// Convert a stream's ordinals to sample numbers in token order.
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

// The pieces of a fragment of an epoch whose start is given by (slot, offset); see prepare_tokens.
Tuples pieces_of_tokens(const Stream& stream, int64_t epoch, int64_t slot, int64_t offset,
                        int64_t tokens) {
    require(slot >= 0 && offset >= 0, "slot and offset are not negative");
    std::vector<Piece> prepared;
    stream.prepare_tokens(epoch, slot, offset, tokens, prepared);
    return as_tuples(prepared);
}

template <typename Length, typename Token>
void bind_stream(py::class_<Stream>& stream) {
    stream.def(py::init(&make_stream<Length, Token>), py::arg("tokens").noconvert(),
               py::arg("byte_offsets").noconvert(), py::arg("lengths").noconvert(),
               py::arg("hashes").noconvert(), py::arg("first_hash"), py::arg("last_hash"),
               py::arg("key"), py::arg("seq_len"), py::arg("tag") = py::none(),
               py::arg("blocks").noconvert() = py::none(),
               py::arg("vocab_size") = std::numeric_limits<int64_t>::max(),
               py::arg("bos") = py::none(), py::keep_alive<1, 2>(), py::keep_alive<1, 3>(),
               py::keep_alive<1, 4>(), py::keep_alive<1, 5>(), py::keep_alive<1, 11>());
}

template <typename Unit>
void bind_for_starts(py::class_<Stream>& stream, py::class_<StreamWalk>& walk) {
    walk.def("fill", &fill_starts<Unit>, py::arg("starts").noconvert(), py::arg("documents"));
    stream.def("read", &read_samples<Unit>, py::arg("starts").noconvert(),
               py::arg("samples_per_epoch"), py::arg("numbers").noconvert(),
               py::arg("rows").noconvert(), py::arg("inputs").noconvert(),
               py::arg("targets").noconvert(), py::arg("filler"), py::arg("ignored"),
               py::arg("documents").noconvert() = py::none());
    stream.def("read_fragments", &read_fragments<Unit>, py::arg("starts").noconvert(),
               py::arg("starts_per_epoch"), py::arg("fragments").noconvert(),
               py::arg("inputs").noconvert(), py::arg("targets").noconvert(), py::arg("filler"),
               py::arg("ignored"), py::arg("documents").noconvert() = py::none());
}

// Python's WrongTokensError has the first token of the wrong part, and the one after its last.
void bind_wrong_tokens(py::module_& module) {
    static py::object error;
    error = py::exception<WrongTokens>(module, "WrongTokensError", PyExc_ValueError);
    py::register_exception_translator([](std::exception_ptr thrown) {
        try {
            if (thrown) std::rethrow_exception(thrown);
        } catch (const WrongTokens& wrong) {
            const py::tuple range = py::make_tuple(wrong.first, wrong.last);
            PyErr_SetObject(error.ptr(), range.ptr());
        }
    });
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
    module.def("shuffle_samples", &shuffle_samples, py::arg("ordinals").noconvert(),
               py::arg("samples_per_epoch"), py::arg("window"), py::arg("key"));
    module.def("pack_parts", &pack_parts, py::arg("parts").noconvert(), py::arg("seq_len"),
               py::arg("bos"));
    bind_wrong_tokens(module);
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

    auto walk = py::class_<StreamWalk>(module, "StreamWalk")
                    .def_property_readonly("at_end", &StreamWalk::at_end);
    py::class_<StreamPartWalk>(module, "StreamPartWalk")
        .def("fill", &fill_parts, py::arg("parts").noconvert(), py::arg("documents"))
        .def_property_readonly("at_end", &StreamPartWalk::at_end);
    auto stream = py::class_<Stream>(module, "Stream")
                      .def("part_walk", &Stream::part_walk, py::arg("epoch"), py::arg("ranges"),
                           py::keep_alive<0, 1>())
                      .def("read_parts", &read_parts, py::arg("parts").noconvert(),
                           py::arg("sizes").noconvert(), py::arg("rows").noconvert(),
                           py::arg("inputs").noconvert(), py::arg("targets").noconvert(),
                           py::arg("filler"), py::arg("ignored"),
                           py::arg("documents").noconvert() = py::none())
                      .def("walk", &Stream::walk, py::arg("epoch"), py::keep_alive<0, 1>())
                      .def("pieces", &pieces, py::arg("epoch"), py::arg("slot"), py::arg("offset"))
                      .def("pieces_of_tokens", &pieces_of_tokens, py::arg("epoch"),
                           py::arg("slot"), py::arg("offset"), py::arg("tokens"))
                      .def("pack", &pack, py::arg("spans").noconvert())
                      .def("packed_pieces", &packed_pieces, py::arg("spans").noconvert(),
                           py::arg("start").noconvert())
                      .def("read_packed", &read_packed, py::arg("spans").noconvert(),
                           py::arg("starts").noconvert(), py::arg("rows").noconvert(),
                           py::arg("inputs").noconvert(), py::arg("targets").noconvert(),
                           py::arg("filler"), py::arg("ignored"),
                           py::arg("documents").noconvert() = py::none())
                      .def("with_seq_len", &Stream::with_seq_len, py::arg("seq_len"),
                           py::keep_alive<0, 1>())
                      .def("totals", [](const Stream& self) {
                          py::gil_scoped_release released;
                          const Totals totals = self.totals();
                          return std::make_pair(totals.documents, totals.tokens);
                      });
    bind_stream<int32_t, uint16_t>(stream);
    bind_stream<int32_t, int32_t>(stream);
    bind_stream<int64_t, uint16_t>(stream);
    bind_stream<int64_t, int32_t>(stream);
    bind_for_starts<uint32_t>(stream, walk);
    bind_for_starts<uint64_t>(stream, walk);
}
