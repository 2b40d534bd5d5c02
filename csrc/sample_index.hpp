// Where every sample of a task's epoch begins, and in which order samples come.
//
// In an epoch the training documents, in the order of a keyed permutation, form one sequence of
// tokens. Sample p holds its tokens [p seq_len, (p + 1) seq_len], so neighbours share one token and
// every token but the first is a target exactly once. The index stores for each p the slot (position
// in the document order) and the offset in that document; the order itself is computed.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>
#include <stdexcept>
#include <vector>

#include "documents.hpp"
#include "keyed_permutation.hpp"

namespace megaphase {

// Where a sample begins, as it lies in the index.
template <typename Unit>
struct Start {
    Unit slot, offset;
};

// Walks once through an epoch in token order; `fill` writes the starts of the next samples.
//
// Documents are looked up in random order, and what that costs is misses of caches and of address
// translation. So which side a document is on is noted first, in one sequential pass, in a bit a
// document, which leaves one random access to memory a document, asked for well ahead.
template <typename Length>
class EpochWalk {
public:
    EpochWalk(const Documents<Length>& documents, const KeyedPermutation& order, int64_t seq_len)
        : documents_(documents), order_(order), seq_len_(seq_len) {}

    // Writes at most `samples` starts, looking at about `documents` documents at most, so that a
    // call ends soon; returns how many it wrote, which may be none before the end.
    template <typename Unit>
    int64_t fill(Start<Unit>* starts, int64_t samples, int64_t documents) {
        if (noted_ < documents_.count) {
            note_sides(documents);
            return 0;
        }
        const int64_t last_slot = std::min(documents_.count - slot_, documents) + slot_;
        int64_t sample = 0;
        while (sample < samples) {
            if (until_next_ >= length_) {
                if (slot_ >= last_slot) break;
                enter_next_document();
                continue;
            }
            constexpr uint64_t kLargest = std::numeric_limits<Unit>::max();
            if (static_cast<uint64_t>(std::max(slot_ - 1, until_next_)) > kLargest)
                throw std::overflow_error("more than 2^32 documents, or tokens in a document");
            starts[sample++] = {static_cast<Unit>(slot_ - 1), static_cast<Unit>(until_next_)};
            until_next_ += seq_len_;
        }
        return sample;
    }

    bool at_end() const {
        return noted_ == documents_.count && slot_ == documents_.count && until_next_ >= length_;
    }

private:
    static constexpr int64_t kAhead = 64;
    static constexpr int64_t kBits = 64;

    void note_sides(int64_t documents) {
        if (on_side_.empty()) on_side_.resize((documents_.count + kBits - 1) / kBits);
        const int64_t last = std::min(documents_.count - noted_, documents) + noted_;
        for (; noted_ < last; ++noted_)
            on_side_[noted_ / kBits] |= uint64_t{documents_.on_side(noted_)} << (noted_ % kBits);
    }

    void enter_next_document() {
        until_next_ -= length_;
        if (slot_ % kAhead == 0) look_ahead();
        const int64_t document = ahead_[slot_ % kAhead];
        const bool here = on_side_[document / kBits] >> (document % kBits) & 1;
        length_ = here ? load(documents_.lengths, document) : 0;
        ++slot_;
    }

    void look_ahead() {
        const int64_t count = std::min(kAhead, documents_.count - slot_);
        for (int64_t i = 0; i < count; ++i) {
            ahead_[i] = static_cast<int64_t>(order_(slot_ + i));
            __builtin_prefetch(&on_side_[ahead_[i] / kBits]);
            __builtin_prefetch(documents_.lengths + ahead_[i]);
        }
    }

    Documents<Length> documents_;
    KeyedPermutation order_;
    int64_t seq_len_;
    std::vector<uint64_t> on_side_;  // a bit a document
    int64_t noted_ = 0;              // documents whose side is noted
    int64_t slot_ = 0;               // of the next document
    int64_t length_ = 0;             // of the current document
    int64_t until_next_ = 0;  // tokens from the current document's start to the next sample's start
    int64_t ahead_[kAhead] = {};  // the documents of the slots from the last multiple of kAhead on
};

// Call visit(document, offset, tokens) for each piece of at most `wanted` tokens from (slot, offset);
// returns the number of tokens found, fewer than `wanted` only at the end of the epoch.
template <typename Length, typename Visit>
int64_t for_each_piece(const Documents<Length>& documents, const KeyedPermutation& order,
                       int64_t slot, int64_t offset, int64_t wanted, Visit visit) {
    int64_t found = 0;
    for (; slot < documents.count && found < wanted; ++slot, offset = 0) {
        const int64_t document = order(slot);
        const int64_t taken = std::min(documents.length(document) - offset, wanted - found);
        if (taken <= 0) continue;
        visit(document, offset, taken);
        found += taken;
    }
    return found;
}

// The samples of an epoch are permuted within windows. Maps ordinals of a stream to numbers in
// token order: epoch * samples_per_epoch + position in the epoch.
class SampleShuffle {
public:
    SampleShuffle(int64_t samples_per_epoch, int64_t window, uint64_t key)
        : samples_per_epoch_(samples_per_epoch), window_(window), key_(key), order_(0, 0) {}

    int64_t operator()(int64_t ordinal) {
        const int64_t epoch = ordinal / samples_per_epoch_;
        const int64_t window = ordinal % samples_per_epoch_ / window_;
        const int64_t start = epoch * samples_per_epoch_ + window * window_;
        if (start != start_) {
            start_ = start;
            const int64_t size = std::min(window_, samples_per_epoch_ - window * window_);
            order_ = KeyedPermutation(size, member_key(member_key(key_, epoch), window));
        }
        return start + static_cast<int64_t>(order_(ordinal - start));
    }

private:
    int64_t samples_per_epoch_, window_;
    uint64_t key_;
    int64_t start_ = -1;  // of the window that order_ permutes
    KeyedPermutation order_;
};

}  // namespace megaphase
