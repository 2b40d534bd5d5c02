// Python bindings of the streams: walks, packing, and samples read into arrays.

#include "stream_bindings.hpp"

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <cstdint>
#include <exception>
#include <limits>
#include <memory>
#include <optional>
#include <stdexcept>
#include <tuple>
#include <utility>
#include <vector>

#include "arrays.hpp"
#include "best_fit.hpp"
#include "packed_stream.hpp"
#include "sample_index.hpp"
#include "stream.hpp"
#include "stream_reads.hpp"
#include "token_check.hpp"

namespace megaphase {

namespace {

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
                                    int64_t vocab_size, std::optional<int64_t> bos,
                                    const std::optional<Array<uint8_t>>& is_target) {
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
    require(!tag || !is_target, "pairs have a tag, chats have marks");
    if (is_target) {
        require(is_target->ndim() == 1 && is_target->size() == tokens.size(),
                "is_target has a mark for every token");
        return std::make_unique<ChatStream<Length, Token>>(stream, is_target->data());
    }
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
               py::arg("bos") = py::none(), py::arg("is_target").noconvert() = py::none(),
               py::keep_alive<1, 2>(), py::keep_alive<1, 3>(), py::keep_alive<1, 4>(),
               py::keep_alive<1, 5>(), py::keep_alive<1, 11>(), py::keep_alive<1, 14>());
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

}  // namespace

void bind_streams(py::module_& module) {
    module.def("shuffle_samples", &shuffle_samples, py::arg("ordinals").noconvert(),
               py::arg("samples_per_epoch"), py::arg("window"), py::arg("key"));
    module.def("pack_parts", &pack_parts, py::arg("parts").noconvert(), py::arg("seq_len"),
               py::arg("bos"));
    bind_wrong_tokens(module);

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
                      .def("walk", &Stream::walk, py::arg("epoch"), py::arg("like") = nullptr,
                           py::keep_alive<0, 1>())
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

}  // namespace megaphase
