// The documents of a corpus that a stream reads, and their lengths.
#pragma once

#include <cstdint>
#include <cstring>
#include <stdexcept>

namespace megaphase {

// Arrays in an .idx file follow a header of 34 bytes, so they are not aligned.
template <typename T>
T load(const T* base, int64_t i) {
    T value;
    std::memcpy(&value, reinterpret_cast<const char*>(base) + i * sizeof(T), sizeof(T));
    return value;
}

struct Totals {
    int64_t documents = 0;  // that have at least one token
    int64_t tokens = 0;
};

// The hashes [first, last]; empty if last < first.
struct HashRange {
    uint64_t first, last;

    bool holds(uint64_t hash) const { return hash >= first && hash <= last; }
};

// The documents whose hash is in the range; held-out documents are those of another range.
template <typename Length>
struct Documents {
    const Length* lengths;   // [count], tokens
    const uint64_t* hashes;  // [count]
    int64_t count;
    HashRange range;

    bool operator==(const Documents& other) const {
        return lengths == other.lengths && hashes == other.hashes && count == other.count &&
               range.first == other.range.first && range.last == other.range.last;
    }

    bool is_read(int64_t document) const { return range.holds(hashes[document]); }

    // Documents that are not read have length 0.
    int64_t length(int64_t document) const {
        return is_read(document) ? load(lengths, document) : 0;
    }

    Totals totals() const {
        Totals totals;
        for (int64_t i = 0; i < count; ++i) {
            const int64_t tokens = length(i);
            totals.documents += tokens > 0;
            if (__builtin_add_overflow(totals.tokens, tokens, &totals.tokens))
                throw std::overflow_error("the corpus has more than 2^63 tokens");
        }
        return totals;
    }
};

}  // namespace megaphase
