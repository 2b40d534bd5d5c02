// Where every sample of a task's epoch begins, and the order of the samples.
//
// In an epoch the training documents, in the order of a keyed permutation, form one sequence of
// tokens. Sample p consists of its tokens [p seq_len, (p + 1) seq_len], so neighbours share one
// token and every token but the first is a target exactly once. The index stores for each p the
// slot (position in the document order) and the offset in that document; the order itself is
// computed.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>
#include <stdexcept>

#include "document_walk.hpp"
#include "documents.hpp"
#include "keyed_permutation.hpp"

namespace megaphase {

// The start of a sample, as stored in the index.
template <typename Unit>
struct Start {
    Unit slot, offset;

    static Start at(int64_t slot, int64_t offset) {
        if (static_cast<uint64_t>(std::max(slot, offset)) > std::numeric_limits<Unit>::max())
            throw std::overflow_error("more than 2^32 documents, or tokens in a document");
        return {static_cast<Unit>(slot), static_cast<Unit>(offset)};
    }
};

// Walks once through the samples of an epoch in order; `fill` writes the next starts.
//
// A Cut determines where in the documents samples begin: begins_here() returns whether one begins
// in the rest of the current document, and fill() writes the starts in the rest of the current
// document and in the next ones, until there are enough.
template <typename Length, typename Cut>
class SampleWalk {
public:
    // like: a walk of which the lengths are taken if it is through the same documents.
    SampleWalk(const Documents<Length>& documents, const KeyedPermutation& order, const Cut& cut,
               const SampleWalk* like = nullptr)
        : documents_(documents, order, like ? like->documents_.stored_lengths() : nullptr),
          cut_(cut) {}

    // Write at most `samples` starts and visit at most about `documents` documents, so that a call
    // ends soon; returns the number of starts, which may be 0 before the end.
    template <typename Unit>
    int64_t fill(Start<Unit>* starts, int64_t samples, int64_t documents) {
        if (!documents_.ready()) {
            documents_.prepare(documents);
            return 0;
        }
        int64_t sample = 0;
        do {
            const int64_t most = std::min(documents_.available(), documents);
            int64_t visited = 0;
            sample += cut_.fill(starts + sample, samples - sample, documents_.lengths(), most,
                                documents_.slot(), visited);
            documents_.skip(visited);
            documents -= visited;
        } while (sample < samples && documents > 0 && !documents_.at_end());
        return sample;
    }

    bool at_end() const { return documents_.at_end() && !cut_.begins_here(); }

private:
    DocumentWalk<Length> documents_;
    Cut cut_;
};

// A sample begins every seq_len tokens, wherever documents end.
class EvenCut {
public:
    explicit EvenCut(int64_t seq_len) : seq_len_(seq_len) {}

    bool begins_here() const { return until_next_ < length_; }

    // Write at most `room` starts in the rest of the current document and in the next `count` ones,
    // of which the first is in this slot. Adds the number of those entered to `visited`.
    template <typename Unit>
    int64_t fill(Start<Unit>* starts, int64_t room, const int64_t* lengths, int64_t count,
                 int64_t slot, int64_t& visited) {
        int64_t sample = 0;
        const auto finish_document = [&](int64_t at_slot) {
            for (; begins_here() && sample < room; until_next_ += seq_len_)
                starts[sample++] = Start<Unit>::at(at_slot, until_next_);
            return !begins_here();
        };
        if (!finish_document(slot - 1)) return sample;
        int64_t until_next = until_next_ - length_;  // below seq_len from the next sample on
        Start<Unit>::at(slot + count, std::max(until_next, seq_len_));
        // No branch depends on whether a sample begins in a document, which nothing predicts.
        for (; visited < count && sample < room; ++visited) {
            const int64_t length = lengths[visited];
            starts[sample] = {static_cast<Unit>(slot + visited), static_cast<Unit>(until_next)};
            const bool begins = until_next < length;
            sample += begins;
            until_next += begins ? seq_len_ : 0;
            if (until_next < length) {
                until_next_ = until_next;
                length_ = length;
                if (!finish_document(slot + visited)) {
                    ++visited;
                    return sample;
                }
                until_next = until_next_;
            }
            until_next -= length;
        }
        length_ = 0;
        until_next_ = until_next;
        return sample;
    }

private:
    int64_t seq_len_;
    int64_t length_ = 0;      // of the current document
    int64_t until_next_ = 0;  // tokens from the current document's start to the next sample's start
};

// Call visit(document, offset, tokens) for each piece of at most `wanted` tokens from (slot,
// offset). Returns the number of tokens found, which is less than `wanted` only at the end of the
// epoch.
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

// Move (slot, offset), whose offset may lie beyond its document's end, to the document with this
// token. Behind the epoch's last token, slot is the number of documents.
template <typename Length>
void find_token(const Documents<Length>& documents, const KeyedPermutation& order, int64_t& slot,
                int64_t& offset) {
    for (; slot < documents.count; ++slot) {
        const int64_t length = documents.length(order(slot));
        if (offset < length) return;
        offset -= length;
    }
}

// Permutes the samples of an epoch within windows. Maps a stream's ordinals to sample numbers in
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
    int64_t start_ = -1;  // start of the window that order_ permutes
    KeyedPermutation order_;
};

}  // namespace megaphase
