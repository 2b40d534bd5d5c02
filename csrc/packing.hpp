// Samples that consist of whole documents: packed next-fit, in the order of the epoch's documents.
//
// A sample has room for seq_len + 1 tokens. A document that fits into the rest of the open sample
// is added to it; one that does not fit begins the next sample, and the rest stays empty. A
// document longer than a sample begins a new one, is split into pieces that share one token with
// their neighbours, as in sample_index.hpp, and the sample of its last piece stays open. Thus a
// sample can be read given only the position where it begins.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "document_walk.hpp"
#include "documents.hpp"
#include "keyed_permutation.hpp"
#include "sample_index.hpp"

namespace megaphase {

// A sample begins at a document that does not fit into the open sample, and within a document that
// is longer than a sample.
class PackedCut {
public:
    explicit PackedCut(int64_t seq_len) : seq_len_(seq_len) {}

    bool begins_here() const { return next_ != kNone; }

    // See EvenCut.
    template <typename Unit>
    int64_t fill(Start<Unit>* starts, int64_t room, const int64_t* lengths, int64_t count,
                 int64_t slot, int64_t& visited) {
        int64_t sample = 0;
        while (sample < room) {
            if (begins_here()) {
                starts[sample++] = Start<Unit>::at(slot + visited - 1, take());
            } else {
                if (visited == count) break;
                enter(lengths[visited++]);
            }
        }
        return sample;
    }

private:
    void enter(int64_t length) {
        length_ = length;
        if (length_ <= room_)
            room_ -= std::max(length_, int64_t{0});
        else
            next_ = 0;
    }

    int64_t take() {
        const int64_t offset = next_, left = length_ - offset;
        const int64_t taken = std::min(left, seq_len_ + 1);
        room_ = seq_len_ + 1 - taken;
        next_ = left > taken ? offset + seq_len_ : kNone;
        return offset;
    }

    static constexpr int64_t kNone = -1;

    int64_t seq_len_;
    int64_t length_ = 0;    // of the current document
    int64_t next_ = kNone;  // the token of the current document with which the next sample begins
    int64_t room_ = 0;      // tokens for which the open sample has room
};

// Call visit(document, offset, tokens) for each piece of the sample that begins at (slot, offset)
// and has room for `room` tokens.
template <typename Length, typename Visit>
void for_each_packed_piece(const Documents<Length>& documents, const KeyedPermutation& order,
                           int64_t slot, int64_t offset, int64_t room, Visit visit) {
    bool begun = false;
    for (; slot < documents.count && room > 0; ++slot, offset = 0) {
        const int64_t document = order(slot);
        const int64_t left = documents.length(document) - offset;
        if (left <= 0) continue;
        if (begun && left > room) break;
        const int64_t taken = std::min(left, room);
        visit(document, offset, taken);
        room -= taken;
        begun = true;
    }
}

// A part of an epoch's documents in their order: the predictions from that of the token after
// (slot, offset) up to (end_slot, end_offset). The token at a cut belongs to both sides: it is the
// last target before and the first input after it.
struct Span {
    int64_t slot, offset, end_slot, end_offset;
};

// Where a sample begins in a list of spans.
struct SpanStart {
    int64_t span, slot, offset;
};

// Call visit(span, slot, document, offset, tokens) for each piece of a document from `at` on until it
// returns false.
template <typename Length, typename Visit>
void for_each_span_piece(const Documents<Length>& documents, const KeyedPermutation& order,
                         const Span* spans, int64_t count, SpanStart at, Visit visit) {
    for (int64_t i = at.span; i < count; ++i) {
        const Span& span = spans[i];
        int64_t slot = i == at.span ? at.slot : span.slot;
        int64_t offset = i == at.span ? at.offset : span.offset;
        const int64_t last = span.end_offset > 0 ? span.end_slot : span.end_slot - 1;
        for (; slot <= last && slot < documents.count; ++slot, offset = 0) {
            const int64_t document = order(slot);
            const int64_t length = documents.length(document);
            const int64_t end = slot == span.end_slot ? std::min(span.end_offset + 1, length) : length;
            if (end > offset && !visit(i, slot, document, offset, end - offset)) return;
        }
    }
}

// Pack the pieces of spans next-fit into samples of seq_len + 1 tokens. Appends where each begins to
// `starts`; returns the number of predictions.
template <typename Length>
int64_t pack_spans(const Documents<Length>& documents, const KeyedPermutation& order,
                   const Span* spans, int64_t count, int64_t seq_len,
                   std::vector<SpanStart>& starts) {
    int64_t room = 0, predictions = 0;
    if (count == 0) return 0;
    for_each_span_piece(
        documents, order, spans, count, {0, spans[0].slot, spans[0].offset},
        [&](int64_t span, int64_t slot, int64_t, int64_t offset, int64_t tokens) {
            predictions += tokens - 1;
            if (tokens <= room) {
                room -= tokens;
                return true;
            }
            for (;; offset += seq_len, tokens -= seq_len) {
                starts.push_back({span, slot, offset});
                room = std::max(seq_len + 1 - tokens, int64_t{0});
                if (tokens <= seq_len + 1) return true;
            }
        });
    return predictions;
}

// Call visit(document, offset, tokens) for each piece of the sample that begins at `at` and has room
// for `room` tokens.
template <typename Length, typename Visit>
void for_each_packed_span_piece(const Documents<Length>& documents, const KeyedPermutation& order,
                                const Span* spans, int64_t count, SpanStart at, int64_t room,
                                Visit visit) {
    bool begun = false;
    for_each_span_piece(
        documents, order, spans, count, at,
        [&](int64_t, int64_t, int64_t document, int64_t offset, int64_t tokens) {
            if (begun && tokens > room) return false;
            const int64_t taken = std::min(tokens, room);
            visit(document, offset, taken);
            room -= taken;
            begun = true;
            return room > 0;
        });
}

}  // namespace megaphase
