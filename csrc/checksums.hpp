// CRC-32C (Castagnoli; RFC 3720, appendix B.4) of the blocks of a corpus's .bin.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <cstring>

namespace megaphase {

// The last block of the .bin may be shorter. A block is small, so that little is verified around a
// sample of a few kilobytes, and at most a page, so that verifying reads nothing more from disk.
constexpr int64_t kBlockBytes = 1024;

namespace crc32c {

constexpr uint32_t kReversedPolynomial = 0x82f63b78;

// Eight tables, with which eight bytes are processed at a time ("slicing by 8").
using Tables = std::array<std::array<uint32_t, 256>, 8>;

constexpr Tables make_tables() {
    Tables tables{};
    for (uint32_t byte = 0; byte < 256; ++byte) {
        uint32_t remainder = byte;
        for (int bit = 0; bit < 8; ++bit)
            remainder = remainder >> 1 ^ (remainder & 1 ? kReversedPolynomial : 0);
        tables[0][byte] = remainder;
    }
    for (size_t table = 1; table < 8; ++table)
        for (size_t byte = 0; byte < 256; ++byte) {
            const uint32_t before = tables[table - 1][byte];
            tables[table][byte] = before >> 8 ^ tables[0][before & 0xff];
        }
    return tables;
}

inline constexpr Tables kTables = make_tables();

inline uint32_t add_byte(uint32_t state, uint8_t byte) {
    return state >> 8 ^ kTables[0][(state ^ byte) & 0xff];
}

// Without special instructions, for little-endian machines (the byte order of the corpus format).
inline uint32_t add_portable(uint32_t state, const uint8_t* bytes, int64_t size) {
    for (; size >= 8; bytes += 8, size -= 8) {
        uint64_t word;
        std::memcpy(&word, bytes, sizeof(word));
        word ^= state;
        state = 0;
        for (size_t i = 0; i < 8; ++i) state ^= kTables[7 - i][word >> 8 * i & 0xff];
    }
    for (; size > 0; ++bytes, --size) state = add_byte(state, *bytes);
    return state;
}

#if defined(__x86_64__)
// With the instruction of SSE 4.2.
__attribute__((target("sse4.2"))) inline uint32_t add_sse42(uint32_t state, const uint8_t* bytes,
                                                            int64_t size) {
    uint64_t wide = state;
    for (; size >= 8; bytes += 8, size -= 8) {
        uint64_t word;
        std::memcpy(&word, bytes, sizeof(word));
        wide = __builtin_ia32_crc32di(wide, word);
    }
    state = static_cast<uint32_t>(wide);
    for (; size > 0; ++bytes, --size) state = add_byte(state, *bytes);
    return state;
}
#endif

inline bool has_instruction() {
#if defined(__x86_64__)
    static const bool has = __builtin_cpu_supports("sse4.2");
    return has;
#else
    return false;
#endif
}

}  // namespace crc32c

// instruction: whether to use the processor's CRC instruction if it has one.
inline uint32_t checksum(const void* bytes, int64_t size, bool instruction = true) {
    const auto* first = static_cast<const uint8_t*>(bytes);
#if defined(__x86_64__)
    if (instruction && crc32c::has_instruction()) return ~crc32c::add_sse42(~0U, first, size);
#endif
    return ~crc32c::add_portable(~0U, first, size);
}

}  // namespace megaphase
