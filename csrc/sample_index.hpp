// Where every sample of a task's epoch begins, in which order samples come, and how they are read.
//
// In an epoch the training documents, in the order of a keyed permutation, form one sequence of
// tokens. Sample p holds its tokens [p seq_len, (p + 1) seq_len], so neighbours share one token and
// every token but the first is a target exactly once. The index stores for each p the slot (position
// in the document order) and the offset in that document; the order itself is computed.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <limits>
#include <stdexcept>

#include "keyed_permutation.hpp"

namespace megaphase {

// Which side of the held-out split a stream reads: documents whose hash is below the threshold
// are held out for validation, the others are trained on.
enum class Side { training, held_out };

// Arrays inside an .idx file follow a header of 34 bytes, so they are not aligned.
template <typename T>
T load(const T* base, int64_t i) {
    T value;
    std::memcpy(&value, reinterpret_cast<const char*>(base) + i * sizeof(T), sizeof(T));
    return value;
}

template <typename Length>
struct Documents {
    const Length* lengths;  // [documents], tokens
    const uint64_t* hashes; // [documents]
    int64_t count;
    uint64_t threshold;
    Side side;

    int64_t length(int64_t document) const {
        const bool held_out = hashes[document] < threshold;
        return held_out == (side == Side::held_out) ? load(lengths, document) : 0;
    }

    void prefetch(int64_t document) const {
        __builtin_prefetch(hashes + document);
        __builtin_prefetch(lengths + document);
    }
};

struct Totals {
    int64_t documents = 0;
    int64_t tokens = 0;
};

template <typename Length>
Totals count_side(const Documents<Length>& documents) {
    Totals totals;
    for (int64_t i = 0; i < documents.count; ++i) {
        const int64_t length = documents.length(i);
        totals.documents += length > 0;
        if (__builtin_add_overflow(totals.tokens, length, &totals.tokens))
            throw std::overflow_error("the corpus has more than 2^63 tokens");
    }
    return totals;
}

// Fill slots[p], offsets[p] for the samples p in [0, samples) of one epoch.
template <typename Length, typename Slot>
void index_epoch(const Documents<Length>& documents, const KeyedPermutation& order, int64_t seq_len,
                 int64_t samples, Slot* slots, uint32_t* offsets) {
    constexpr int64_t kAhead = 64;  // documents are looked up in random order: ask for many at once
    int64_t ahead[kAhead];
    int64_t sample = 0;
    int64_t until_next = 0;  // tokens from the current document's start to the next sample's start
    for (int64_t slot = 0; slot < documents.count && sample < samples; ++slot) {
        if (slot % kAhead == 0) {
            const int64_t end = std::min(slot + kAhead, documents.count);
            for (int64_t i = slot; i < end; ++i) {
                ahead[i - slot] = static_cast<int64_t>(order(i));
                documents.prefetch(ahead[i - slot]);
            }
        }
        const int64_t length = documents.length(ahead[slot % kAhead]);
        while (until_next < length && sample < samples) {
            if (until_next > std::numeric_limits<uint32_t>::max())
                throw std::overflow_error("a document has more than 2^32 tokens");
            slots[sample] = static_cast<Slot>(slot);
            offsets[sample] = static_cast<uint32_t>(until_next);
            ++sample;
            until_next += seq_len;
        }
        until_next -= length;
    }
    if (sample < samples) throw std::out_of_range("the epoch has fewer samples than asked for");
}

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
