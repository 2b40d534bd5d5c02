// Parts of documents: what an epoch, or what is left of it, has of each document.
#pragma once

#include <algorithm>
#include <cstdint>
#include <stdexcept>
#include <utility>
#include <vector>

#include "document_walk.hpp"
#include "documents.hpp"
#include "keyed_permutation.hpp"

namespace megaphase {

// The tokens [first, first + targets) of a document, as targets. Token first - 1 is the input from
// which the first of them is predicted; a part with first = 0 begins where its document begins.
struct Part {
    int64_t document, first, targets;
};

// Walks through the documents of an epoch in their order and writes the parts that lie in some
// ranges of the epoch's tokens.
template <typename Length>
class PartWalk {
public:
    // `ranges` are [first, last) tokens of the epoch, ascending, without overlap.
    PartWalk(const Documents<Length>& documents, const KeyedPermutation& order,
             std::vector<std::pair<int64_t, int64_t>> ranges)
        : documents_(documents, order), ranges_(std::move(ranges)) {
        int64_t end = 0;
        for (const auto& [first, last] : ranges_) {
            if (first < end || last < first)
                throw std::invalid_argument("ranges are ascending and do not overlap");
            end = last;
        }
    }

    // Write at most `count` parts and visit at most about `documents` documents, so that a call ends
    // soon; returns the number of parts, which may be 0 before the end.
    int64_t fill(Part* parts, int64_t count, int64_t documents) {
        if (!documents_.ready()) {
            documents_.prepare(documents);
            return 0;
        }
        const int64_t last_slot = std::min(documents_.left(), documents) + documents_.slot();
        int64_t part = 0;
        while (part < count && range_ < ranges_.size()) {
            const auto& [first, last] = ranges_[range_];
            if (last <= done_) {
                ++range_;
            } else if (needs_next_document()) {
                if (documents_.slot() >= last_slot) break;
                begin_ += length_;
                done_ = begin_;
                length_ = documents_.next();
            } else {
                const int64_t from = std::max(first, done_);
                done_ = std::min(last, begin_ + length_);
                parts[part++] = {documents_.document(), from - begin_, done_ - from};
            }
        }
        return part;
    }

    bool at_end() const {
        return range_ == ranges_.size() || (documents_.at_end() && needs_next_document());
    }

private:
    bool needs_next_document() const {
        const int64_t end = begin_ + length_;
        return ranges_[range_].first >= end || done_ == end;
    }

    DocumentWalk<Length> documents_;
    std::vector<std::pair<int64_t, int64_t>> ranges_;
    size_t range_ = 0;
    int64_t begin_ = 0;   // the current document's first token in the epoch
    int64_t length_ = 0;  // of the current document
    int64_t done_ = 0;    // tokens of the epoch before this one are written, or in no range
};

}  // namespace megaphase
