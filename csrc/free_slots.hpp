// The free slots of a block of a blend: a bitmap with one summary bit for every 64 slots.
#pragma once

#include <cstdint>
#include <vector>

namespace megaphase {

class FreeSlots {
public:
    static constexpr uint32_t kNone = ~uint32_t{0};

    // Mark all slots in [0, slots) as free.
    void reset(uint32_t slots) {
        set_first(words_, slots);
        set_first(summary_, static_cast<uint32_t>(words_.size()));
    }

    // Take the earliest free slot at or after `from`, which must be in the block; return kNone if
    // there is none.
    uint32_t take(uint32_t from) {
        uint32_t word = from / kBits;
        uint64_t bits = words_[word] & at_or_above(from % kBits);
        if (bits == 0) {
            word = first_word(word + 1);
            if (word == kNone) return kNone;
            bits = words_[word];
        }
        const uint64_t lowest = bits & (~bits + 1);
        words_[word] ^= lowest;
        if (words_[word] == 0) summary_[word / kBits] ^= uint64_t{1} << (word % kBits);
        return word * kBits + lowest_bit(lowest);
    }

private:
    static constexpr uint32_t kBits = 64;

    static uint64_t at_or_above(uint32_t bit) { return ~uint64_t{0} << bit; }
    static uint32_t lowest_bit(uint64_t word) { return static_cast<uint32_t>(__builtin_ctzll(word)); }

    static void set_first(std::vector<uint64_t>& words, uint32_t bits) {
        words.assign((bits + kBits - 1) / kBits, ~uint64_t{0});
        if (bits % kBits != 0) words.back() = (uint64_t{1} << (bits % kBits)) - 1;
    }

    // Return the first word at or after `word` that has a free slot.
    uint32_t first_word(uint32_t word) const {
        uint32_t group = word / kBits;
        if (group >= summary_.size()) return kNone;
        uint64_t words = summary_[group] & at_or_above(word % kBits);
        while (words == 0) {
            if (++group == summary_.size()) return kNone;
            words = summary_[group];
        }
        return group * kBits + lowest_bit(words);
    }

    std::vector<uint64_t> words_;    // one bit per slot
    std::vector<uint64_t> summary_;  // one bit per word: whether it has a free slot
};

}  // namespace megaphase
