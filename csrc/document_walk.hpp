// Iterates over the documents of an epoch in their order, and yields their lengths.
#pragma once

#include <sys/mman.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>

#include "documents.hpp"
#include "keyed_permutation.hpp"

namespace megaphase {

// The lengths of a corpus's documents in 16 bits each, 0 for those that are not read. The few that
// are too long for that have kLong. In huge pages where the system has some: what random access to
// a file's pages costs is mostly the translation of addresses.
template <typename Length>
class ShortLengths {
public:
    explicit ShortLengths(const Documents<Length>& documents)
        : documents_(documents), lengths_(allocate(documents.count)) {}

    const Documents<Length>& documents() const { return documents_; }
    bool complete() const { return stored_ == documents_.count; }

    // Store the lengths of the next documents; must finish before they are used.
    void store(int64_t documents) {
        const int64_t last = std::min(documents_.count - stored_, documents) + stored_;
        for (; stored_ < last; ++stored_) {
            const Length length = load(documents_.lengths, stored_);
            const auto stored = length < Length{kLong} ? static_cast<uint16_t>(length) : kLong;
            lengths_[stored_] = documents_.is_read(stored_) ? stored : uint16_t{0};
        }
    }

    void prefetch(uint64_t document) const { __builtin_prefetch(&lengths_[document], 0, 1); }

    // Write the lengths of `count` documents.
    void gather(const uint64_t* documents, int64_t count, int64_t* lengths) const {
        bool any_long = false;
        for (int64_t i = 0; i < count; ++i) {
            lengths[i] = lengths_[documents[i]];
            any_long |= lengths[i] == kLong;
        }
        if (!any_long) return;
        for (int64_t i = 0; i < count; ++i)
            if (lengths[i] == kLong) lengths[i] = load(documents_.lengths, documents[i]);
    }

private:
    static constexpr uint16_t kLong = ~uint16_t{0};

    struct Free {
        void operator()(void* memory) const { std::free(memory); }
    };
    using Memory = std::unique_ptr<uint16_t[], Free>;

    static Memory allocate(int64_t count) {
        constexpr size_t kHugePage = size_t{1} << 21;
        const size_t bytes = count * sizeof(uint16_t);
        const bool is_large = bytes >= kHugePage;
        const size_t whole = is_large ? (bytes + kHugePage - 1) / kHugePage * kHugePage : bytes + 1;
        void* memory = is_large ? std::aligned_alloc(kHugePage, whole) : std::malloc(whole);
        if (!memory) throw std::bad_alloc();
#ifdef MADV_HUGEPAGE
        if (is_large) madvise(memory, whole, MADV_HUGEPAGE);
#endif
        return Memory(static_cast<uint16_t*>(memory));
    }

    Documents<Length> documents_;
    Memory lengths_;
    int64_t stored_ = 0;
};

// Documents are accessed in random order, and the cost is that of cache and TLB misses. Therefore
// one sequential pass first stores all lengths compactly; afterwards each document needs one random
// access to memory, which is prefetched a block of documents ahead.
template <typename Length>
class DocumentWalk {
public:
    using Lengths = ShortLengths<Length>;

    // lengths: of these documents, if another walk has them already.
    DocumentWalk(const Documents<Length>& documents, const KeyedPermutation& order,
                 std::shared_ptr<Lengths> lengths = nullptr)
        : count_(documents.count),
          order_(order),
          short_(lengths && lengths->complete() && lengths->documents() == documents
                     ? std::move(lengths)
                     : std::make_shared<Lengths>(documents)) {}

    const std::shared_ptr<Lengths>& stored_lengths() const { return short_; }

    bool ready() const { return ordered_ > 0 || count_ == 0; }

    // Store the lengths of the next documents; must be called until the walk is ready.
    void prepare(int64_t documents) {
        short_->store(documents);
        if (!short_->complete()) return;
        order_block();
        load_block();
    }

    // The position of the next document in the epoch's order.
    int64_t slot() const { return slot_; }
    int64_t left() const { return count_ - slot_; }
    bool at_end() const { return ready() && slot_ == count_; }

    // The document whose length next() has returned last.
    int64_t document() const { return static_cast<int64_t>(document_); }

    // The lengths of the next documents, 0 for those that are not read, and how many there are.
    const int64_t* lengths() const { return lengths_ + (slot_ - block_); }
    int64_t available() const { return std::min(kBlock - (slot_ - block_), left()); }

    // Go past the next documents, at most as many as are available.
    void skip(int64_t documents) {
        slot_ += documents;
        if (slot_ == block_ + kBlock) load_block();
    }

    // Return the length of the next document; 0 if it is not read.
    int64_t next() {
        const int64_t length = *lengths();
        document_ = here_[slot_ - block_];
        skip(1);
        return length;
    }

private:
    static constexpr int64_t kBlock = 256;
    static_assert(kBlock <= KeyedPermutation::kMost);

    // Find the documents of the block after this one and have their lengths fetched.
    void order_block() {
        const int64_t count = std::min(kBlock, count_ - ordered_);
        if (count <= 0) return;
        order_.images(ordered_, count, next_);
        for (int64_t i = 0; i < count; ++i) short_->prefetch(next_[i]);
        ordered_ += count;
    }

    // Proceed to the block that begins at slot_.
    [[gnu::noinline]] void load_block() {
        block_ = slot_;
        const int64_t count = std::min(kBlock, left());
        std::copy(next_, next_ + count, here_);
        order_block();
        short_->gather(here_, count, lengths_);
    }

    int64_t count_;
    KeyedPermutation order_;
    std::shared_ptr<Lengths> short_;
    int64_t ordered_ = 0;  // slots whose documents are known
    int64_t slot_ = 0;
    int64_t block_ = 0;      // the first slot of the block that contains slot_
    uint64_t document_ = 0;  // see document()
    uint64_t here_[kBlock] = {}, next_[kBlock] = {};  // documents of this block and of the next
    int64_t lengths_[kBlock] = {};                    // of this block
};

}  // namespace megaphase
