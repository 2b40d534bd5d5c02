// A permutation of [0, size) that is computed, not stored: position -> image in O(1).
//
// Hash-style mixing restricted to the smallest power of two that contains `size`, repeated until
// the image is inside (cycle walking; Kensler, "Correlated Multi-Jittered Sampling", Pixar 2013,
// section 3). Each mixing step (xor with a key, multiplication by an odd number, xor with the own
// high bits) is a bijection of k-bit words, so their composition is one, and cycle walking
// restricts it to [0, size).
#pragma once

#include <cstdint>

// Loops marked so are compiled for several instruction sets, of which the processor's best is
// chosen when the library is loaded. The sanitizers' runtime is not ready so early.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && !defined(__SANITIZE_ADDRESS__)
#define MEGAPHASE_VECTORIZED __attribute__((target_clones("default", "avx2", "avx512f")))
#else
#define MEGAPHASE_VECTORIZED
#endif

namespace megaphase {

// SplitMix64 (Steele, Lea and Flood 2014): turns a counter into independent-looking words.
inline uint64_t split_mix(uint64_t& state) {
    uint64_t z = (state += 0x9E3779B97F4A7C15ull);
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9ull;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBull;
    return z ^ (z >> 31);
}

// The key of one member of a family of permutations; different members have different keys.
inline uint64_t member_key(uint64_t family, uint64_t member) {
    uint64_t state = family;
    state = split_mix(state) ^ member;
    return split_mix(state);
}

class KeyedPermutation {
public:
    KeyedPermutation(uint64_t size, uint64_t key) : size_(size) {
        int bits = 1;
        while (bits < 64 && (uint64_t{1} << bits) < size) ++bits;
        mask_ = bits == 64 ? ~uint64_t{0} : (uint64_t{1} << bits) - 1;
        shift_ = bits > 1 ? bits / 2 : 1;
        for (int round = 0; round < kRounds; ++round) {
            keys_[round] = split_mix(key) & mask_;
            multipliers_[round] = split_mix(key) | 1;
        }
        rotation_ = size > 0 ? split_mix(key) % size : 0;
    }

    uint64_t size() const { return size_; }

    // position must be in [0, size).
    uint64_t operator()(uint64_t position) const {
        uint64_t image = position;
        do image = mix(image);
        while (image >= size_);
        // Xor-shift maps 0 to 0, which is visible for tiny sizes; a keyed rotation prevents that.
        image += rotation_;
        return image >= size_ || image < rotation_ ? image - size_ : image;
    }

    static constexpr int64_t kMost = 256;

    // Write the images of the positions [first, first + count), at most kMost of them, all below
    // size(): several times as quick as one by one.
    void images(uint64_t first, int64_t count, uint64_t* images) const {
        if (mask_ > ~uint32_t{0}) {
            for (int64_t i = 0; i < count; ++i) images[i] = (*this)(first + i);
            return;
        }
        // Arithmetic modulo 2^32 yields the low bits of that modulo 2^64.
        uint32_t words[kMost], outside[kMost];
        const Rounds rounds = narrow();
        for (int64_t i = 0; i < count; ++i) words[i] = static_cast<uint32_t>(first + i);
        mix_all(rounds, words, count);
        int64_t left = 0;
        for (int64_t i = 0; i < count; ++i) {
            outside[left] = static_cast<uint32_t>(i);
            left += words[i] >= size_;
        }
        while (left > 0) {
            uint32_t again[kMost];
            for (int64_t i = 0; i < left; ++i) again[i] = words[outside[i]];
            mix_all(rounds, again, left);
            int64_t still = 0;
            for (int64_t i = 0; i < left; ++i) {
                const uint32_t at = outside[i];
                words[at] = again[i];
                outside[still] = at;
                still += again[i] >= size_;
            }
            left = still;
        }
        for (int64_t i = 0; i < count; ++i) {
            const uint64_t image = words[i] + rotation_;
            images[i] = image >= size_ ? image - size_ : image;
        }
    }

private:
    static constexpr int kRounds = 4;

    struct Rounds {
        uint32_t keys[kRounds], multipliers[kRounds], mask;
        int shift;
    };

    Rounds narrow() const {
        Rounds rounds{{}, {}, static_cast<uint32_t>(mask_), shift_};
        for (int round = 0; round < kRounds; ++round) {
            rounds.keys[round] = static_cast<uint32_t>(keys_[round]);
            rounds.multipliers[round] = static_cast<uint32_t>(multipliers_[round]);
        }
        return rounds;
    }

    MEGAPHASE_VECTORIZED
    static void mix_all(const Rounds& rounds, uint32_t* words, int64_t count) {
        const Rounds r = rounds;
        for (int64_t i = 0; i < count; ++i) {
            uint32_t word = words[i];
            for (int round = 0; round < kRounds; ++round) {
                word = ((word ^ r.keys[round]) * r.multipliers[round]) & r.mask;
                word ^= word >> r.shift;
            }
            words[i] = word;
        }
    }

    uint64_t mix(uint64_t word) const {
        for (int round = 0; round < kRounds; ++round) {
            word = ((word ^ keys_[round]) * multipliers_[round]) & mask_;
            word ^= word >> shift_;
        }
        return word;
    }

    uint64_t size_;
    uint64_t mask_;
    uint64_t rotation_;
    uint64_t keys_[kRounds];
    uint64_t multipliers_[kRounds];
    int shift_;
};

}  // namespace megaphase
