// Reads samples of a stream into rows of arrays; releases the GIL meanwhile.
#pragma once

#include <algorithm>
#include <cstdint>
#include <optional>
#include <stdexcept>
#include <vector>

#include "arrays.hpp"
#include "packing.hpp"
#include "sample_index.hpp"
#include "stream.hpp"

namespace megaphase {

inline void require_starts(const py::array& starts) {
    require(starts.ndim() == 2 && starts.shape(1) == 2, "starts is [samples, 2]");
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

static_assert(sizeof(Part) == 3 * sizeof(int64_t));

inline void require_parts(const Array<int64_t>& parts) {
    require(parts.ndim() == 2 && parts.shape(1) == 3, "parts is [parts, 3]");
}

// Read samples into the given rows; sample i consists of the next sizes[i] parts.
inline void read_parts(const Stream& stream, const Array<int64_t>& parts,
                       const Array<int64_t>& sizes, const Array<int64_t>& rows,
                       Array<int64_t>& inputs, Array<int64_t>& targets, int64_t filler,
                       int64_t ignored, std::optional<Array<int64_t>> documents) {
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

inline void require_spans(const Array<int64_t>& spans, const Array<int64_t>& starts) {
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

// Read samples of packed spans, with these starts, into rows of inputs and targets.
inline void read_packed(const Stream& stream, const Array<int64_t>& spans,
                        const Array<int64_t>& starts, const Array<int64_t>& rows,
                        Array<int64_t>& inputs, Array<int64_t>& targets, int64_t filler,
                        int64_t ignored, std::optional<Array<int64_t>> documents) {
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

}  // namespace megaphase
