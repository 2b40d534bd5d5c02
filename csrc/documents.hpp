// One side (training or held out) of a corpus: which documents it has and how long they are.
#pragma once

#include <cstdint>
#include <cstring>
#include <stdexcept>

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

struct Totals {
    int64_t documents = 0;  // with at least one token
    int64_t tokens = 0;
};

template <typename Length>
struct Documents {
    const Length* lengths;   // [count], tokens
    const uint64_t* hashes;  // [count]
    int64_t count;
    uint64_t threshold;
    Side side;

    bool on_side(int64_t document) const {
        return (hashes[document] < threshold) == (side == Side::held_out);
    }

    // A document of the other side has no tokens here.
    int64_t length(int64_t document) const {
        return on_side(document) ? load(lengths, document) : 0;
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
