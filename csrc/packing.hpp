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

private:
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

}  // namespace megaphase
