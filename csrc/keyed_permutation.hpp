// A permutation of [0, size) that is computed, not stored: position -> image in O(1).
//
// Hash-style mixing restricted to the smallest power of two that contains `size`, repeated until
// the image is inside (cycle walking; Kensler, "Correlated Multi-Jittered Sampling", Pixar 2013,
// section 3). Each mixing step (xor with a key, multiplication by an odd number, xor with the own
// high bits) is a bijection of k-bit words, so their composition is one, and cycle walking
// restricts it to [0, size).
#pragma once

#include <cstdint>

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

private:
    static constexpr int kRounds = 4;

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
