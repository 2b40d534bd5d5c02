// Parts of documents packed into samples by best fit: the longest first, each into the sample that
// has the least room left of those that have enough (Ding et al. 2024, arXiv 2404.10830).
//
// A sample has room for seq_len targets. Where documents have no BOS, a sample that begins at a
// document's start has room for one more, because the document's first token is no target there. A
// part that is longer than a sample is cut: its first pieces fill samples of their own, and the rest
// is packed.
#pragma once

#include <algorithm>
#include <cstdint>
#include <stdexcept>
#include <vector>

#include "document_parts.hpp"

namespace megaphase {

// A set of numbers below `size` as a tree: a bit of a level says whether a word of the level below
// has one. Finds the smallest number that is not below another in the height of the tree.
class NumberSet {
public:
    static constexpr int64_t kNone = -1;

    explicit NumberSet(int64_t size) {
        do {
            size = (size + kBits - 1) / kBits;
            levels_.emplace_back(size, 0);
        } while (size > 1);
    }

    void insert(int64_t number) {
        for (auto& level : levels_) {
            uint64_t& word = level[number / kBits];
            const bool was_empty = word == 0;
            word |= bit(number);
            if (!was_empty) return;
            number /= kBits;
        }
    }

    void erase(int64_t number) {
        for (auto& level : levels_) {
            uint64_t& word = level[number / kBits];
            word &= ~bit(number);
            if (word != 0) return;
            number /= kBits;
        }
    }

    // Return the smallest number that is at least `from`, or kNone.
    int64_t first_from(int64_t from) const {
        for (size_t up = 0; up < levels_.size(); ++up) {
            if (from / kBits >= static_cast<int64_t>(levels_[up].size())) return kNone;
            const uint64_t word = levels_[up][from / kBits] & (~uint64_t{0} << (from % kBits));
            if (word == 0) {
                from = from / kBits + 1;
                continue;
            }
            int64_t found = from / kBits * kBits + __builtin_ctzll(word);
            while (up-- > 0) found = found * kBits + __builtin_ctzll(levels_[up][found]);
            return found;
        }
        return kNone;
    }

private:
    static constexpr int64_t kBits = 64;

    static uint64_t bit(int64_t number) { return uint64_t{1} << (number % kBits); }

    std::vector<std::vector<uint64_t>> levels_;
};

// Samples one after the other: sample i has the next sizes[i] of the parts.
struct PackedParts {
    std::vector<Part> parts;
    std::vector<int64_t> sizes;
};

class BestFit {
public:
    BestFit(int64_t seq_len, bool bos)
        : seq_len_(seq_len), bos_(bos), spaces_(seq_len + 2), top_(seq_len + 2, kNone) {}

    // Pack `count` parts. Samples are in the order of the parts that are the first to be placed in
    // them, and the pieces of a part that fill samples of their own are before its rest. Of equally
    // long parts the earlier one is placed first, and of samples with the same room left the part is
    // added to that which has had it for the shortest time. In a sample parts that begin a document
    // are first; otherwise parts keep their order.
    PackedParts pack(const Part* parts, int64_t count) {
        if (count > int64_t{kNone} - 1) throw std::invalid_argument("too many parts");
        rests_.assign(parts, parts + count);
        for (Part& rest : rests_) rest = rest_of(rest);
        samples_of_.assign(count, 0);
        opened_by_.assign(count, kNone);
        next_.clear();
        for (const uint32_t part : longest_first()) place(part);
        return in_order(parts);
    }

private:
    static constexpr uint32_t kNone = ~uint32_t{0};

    int64_t room_for(const Part& part) const { return seq_len_ + (part.first == 0 && !bos_); }

    // The part without its pieces that fill samples.
    Part rest_of(Part part) const {
        if (part.first < 0 || part.targets < 1) throw std::invalid_argument("a part has no targets");
        if (const int64_t room = room_for(part); part.targets > room) {
            part.first += room;
            part.targets -= room;
            const int64_t full = (part.targets - 1) / seq_len_ * seq_len_;
            part.first += full;
            part.targets -= full;
        }
        return part;
    }

    // Counting sort by length, which keeps the order of equals.
    std::vector<uint32_t> longest_first() const {
        std::vector<uint32_t> ends(seq_len_ + 3, 0), order(rests_.size());
        for (const Part& rest : rests_) ++ends[seq_len_ + 1 - rest.targets + 1];
        for (size_t i = 1; i < ends.size(); ++i) ends[i] += ends[i - 1];
        for (uint32_t i = 0; i < rests_.size(); ++i)
            order[ends[seq_len_ + 1 - rests_[i].targets]++] = i;
        return order;
    }

    // Add a part to the sample with the least sufficient room, or to a new one.
    void place(uint32_t number) {
        const Part& part = rests_[number];
        int64_t space = spaces_.first_from(part.targets);
        uint32_t sample;
        if (space == NumberSet::kNone) {
            sample = static_cast<uint32_t>(next_.size());
            next_.push_back(kNone);
            opened_by_[number] = sample;
            space = room_for(part);
        } else {
            sample = top_[space];
            top_[space] = next_[sample];
            if (top_[space] == kNone) spaces_.erase(space);
        }
        samples_of_[number] = sample;
        const int64_t left = space - part.targets;
        if (left > 0) {
            if (top_[left] == kNone) spaces_.insert(left);
            next_[sample] = top_[left];
            top_[left] = sample;
        }
    }

    PackedParts in_order(const Part* parts) const {
        const size_t samples = next_.size();
        std::vector<uint32_t> ends(samples + 1, 0), grouped(rests_.size());
        for (const uint32_t sample : samples_of_) ++ends[sample + 1];
        for (size_t i = 1; i <= samples; ++i) ends[i] += ends[i - 1];
        std::vector<uint32_t> next(ends);
        for (const bool begins : {true, false})
            for (uint32_t i = 0; i < rests_.size(); ++i)
                if ((rests_[i].first == 0) == begins) grouped[next[samples_of_[i]]++] = i;
        PackedParts packed;
        packed.parts.reserve(rests_.size());
        packed.sizes.reserve(samples);
        for (uint32_t i = 0; i < rests_.size(); ++i) {
            for (Part part = parts[i]; part.first < rests_[i].first;) {
                const int64_t room = room_for(part);
                packed.parts.push_back({part.document, part.first, room});
                packed.sizes.push_back(1);
                part.first += room;
            }
            const uint32_t sample = opened_by_[i];
            if (sample == kNone) continue;
            packed.sizes.push_back(ends[sample + 1] - ends[sample]);
            for (uint32_t j = ends[sample]; j < ends[sample + 1]; ++j)
                packed.parts.push_back(rests_[grouped[j]]);
        }
        return packed;
    }

    int64_t seq_len_;
    bool bos_;
    NumberSet spaces_;            // room that is left in one or more samples
    std::vector<uint32_t> top_;   // for each room: the sample that has had it for the shortest time
    std::vector<uint32_t> next_;  // for each sample: the next one with the same room
    std::vector<Part> rests_;
    std::vector<uint32_t> samples_of_;  // the sample of each part
    std::vector<uint32_t> opened_by_;   // the sample that each part is the first in, or kNone
};

}  // namespace megaphase
