// Iterates over the documents of an epoch in their order, and yields their lengths.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "documents.hpp"
#include "keyed_permutation.hpp"

namespace megaphase {

// Documents are accessed in random order, and the cost is that of cache and TLB misses. Therefore
// one sequential pass first stores in a bitmap which documents are read; afterwards each document
// needs one random access to memory, which is prefetched well ahead.
template <typename Length>
class DocumentWalk {
public:
    DocumentWalk(const Documents<Length>& documents, const KeyedPermutation& order)
        : documents_(documents), order_(order) {}

    bool choice_noted() const { return noted_ == documents_.count; }

    // Mark which of the next `documents` documents are read; must finish before the walk begins.
    void note_choice(int64_t documents) {
        if (is_read_.empty()) is_read_.resize((documents_.count + kBits - 1) / kBits);
        const int64_t last = std::min(documents_.count - noted_, documents) + noted_;
        for (; noted_ < last; ++noted_)
            is_read_[noted_ / kBits] |= uint64_t{documents_.is_read(noted_)} << (noted_ % kBits);
    }

    // The position of the next document in the epoch's order.
    int64_t slot() const { return slot_; }
    int64_t left() const { return documents_.count - slot_; }
    bool at_end() const { return choice_noted() && slot_ == documents_.count; }

    // The document whose length next() has returned last.
    int64_t document() const { return ahead_[(slot_ - 1) % kAhead]; }

    // Return the length of the next document; 0 if it is not read.
    int64_t next() {
        if (slot_ % kAhead == 0) look_ahead();
        const int64_t document = ahead_[slot_ % kAhead];
        const bool here = is_read_[document / kBits] >> (document % kBits) & 1;
        ++slot_;
        return here ? load(documents_.lengths, document) : 0;
    }

private:
    static constexpr int64_t kAhead = 64;
    static constexpr int64_t kBits = 64;

    // Not inlined, so that next() stays small enough to be inlined into the walks' loops, which are
    // a tenth slower otherwise.
    [[gnu::noinline]] void look_ahead() {
        const int64_t count = std::min(kAhead, documents_.count - slot_);
        for (int64_t i = 0; i < count; ++i) {
            ahead_[i] = static_cast<int64_t>(order_(slot_ + i));
            __builtin_prefetch(&is_read_[ahead_[i] / kBits]);
            __builtin_prefetch(documents_.lengths + ahead_[i]);
        }
    }

    Documents<Length> documents_;
    KeyedPermutation order_;
    std::vector<uint64_t> is_read_;  // one bit per document
    int64_t noted_ = 0;              // documents already marked
    int64_t slot_ = 0;
    int64_t ahead_[kAhead] = {};  // documents of the slots since the last multiple of kAhead
};

}  // namespace megaphase
