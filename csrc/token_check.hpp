// Verifies that the tokens that are read are those that were written, and are in the vocabulary.
//
// A block of the file is compared with its checksum when this process first reads from it; one bit
// per block stores that it was found valid.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <exception>
#include <memory>
#include <new>
#include <stdexcept>
#include <type_traits>

#include "checksums.hpp"

namespace megaphase {

// The tokens [first, last) of the file are not those that were written, or one of them is outside
// the vocabulary.
struct WrongTokens : std::exception {
    int64_t first, last;

    WrongTokens(int64_t first, int64_t last) : first(first), last(last) {}
    const char* what() const noexcept override { return "a part of the token file is wrong"; }
};

// One bit per block, which several threads may set. Memory is only used where bits are set.
class Marks {
public:
    explicit Marks(int64_t blocks)
        : words_(static_cast<uint64_t*>(std::calloc(blocks / kBits + 1, sizeof(uint64_t)))) {
        if (!words_) throw std::bad_alloc();
    }

    bool has(int64_t block) const {
        return __atomic_load_n(&words_.get()[block / kBits], __ATOMIC_RELAXED) >> (block % kBits) & 1;
    }
    void set(int64_t block) {
        __atomic_fetch_or(&words_.get()[block / kBits], uint64_t{1} << (block % kBits),
                          __ATOMIC_RELAXED);
    }

private:
    static constexpr int64_t kBits = 64;
    struct Free {
        void operator()(uint64_t* words) const { std::free(words); }
    };
    std::unique_ptr<uint64_t, Free> words_;
};

template <typename Token>
bool all_below(const Token* tokens, int64_t count, int64_t vocab_size) {
    using Unsigned = std::make_unsigned_t<Token>;  // turns negative numbers into large ones
    Unsigned largest = 0;
    for (int64_t i = 0; i < count; ++i) largest = std::max(largest, static_cast<Unsigned>(tokens[i]));
    return static_cast<int64_t>(largest) < vocab_size;
}

// Verifies the tokens of a .bin, in blocks of kBlockBytes bytes.
template <typename Token>
class TokenCheck {
public:
    // sums: the checksum of every block; null to check only the vocabulary.
    TokenCheck(const Token* tokens, int64_t count, const uint32_t* sums, int64_t vocab_size)
        : tokens_(tokens), count_(count), sums_(sums), vocab_size_(vocab_size),
          valid_(count / kTokens + 1) {}

    // Verify the tokens [begin, end) of the file, which are about to be read.
    void check(int64_t begin, int64_t end) const {
        for (int64_t block = begin / kTokens; block * kTokens < end; ++block)
            if (!valid_.has(block)) check_block(block);
    }

private:
    static constexpr int64_t kTokens = kBlockBytes / int64_t{sizeof(Token)};

    [[gnu::noinline]] void check_block(int64_t block) const {
        const int64_t begin = block * kTokens, count = std::min(kTokens, count_ - begin);
        const Token* tokens = tokens_ + begin;
        const bool is_valid =
            !sums_ || checksum(tokens, count * int64_t{sizeof(Token)}) == sums_[block];
        if (!is_valid || !all_below(tokens, count, vocab_size_))
            throw WrongTokens(begin, begin + count);
        valid_.set(block);
    }

    const Token* tokens_;
    int64_t count_;
    const uint32_t* sums_;  // [blocks]
    int64_t vocab_size_;
    mutable Marks valid_;
};

}  // namespace megaphase
