// The order in which tasks take their turns: earliest deadline first, or independent draws.
#pragma once

#include <algorithm>
#include <cstdint>
#include <stdexcept>
#include <tuple>
#include <utility>
#include <vector>

#include "free_slots.hpp"
#include "keyed_permutation.hpp"

namespace megaphase {

constexpr uint64_t kLargestTotalWeight = uint64_t{1} << 62;

// The sum of the weights. A task's rate is its fraction of this sum.
inline uint64_t total_weight(const std::vector<uint64_t>& weights) {
    uint64_t total = 0;
    for (const uint64_t weight : weights) {
        if (weight > kLargestTotalWeight - total) throw std::invalid_argument("weights exceed 2^62");
        total += weight;
    }
    if (total == 0) throw std::invalid_argument("no task has a weight");
    return total;
}

// The next turn of a task whose rate w/W is constant. Turn k is released at
// k W/w = start + fraction/w, exactly.
struct ConstantTurn {
    uint64_t weight, period, period_fraction, start, fraction;
    uint32_t task;

    void advance() {
        start += period;
        fraction += period_fraction;
        const bool carry = fraction >= weight;
        start += carry;
        fraction -= carry ? weight : 0;
    }
    uint64_t deadline() const {
        ConstantTurn after = *this;
        after.advance();
        return after.start + (after.fraction > 0);
    }
};

// Earliest deadline first.
//
// Turn k of a task with rate w/W must be in the slots [floor(k W/w), ceil((k+1) W/w)): from its
// release to before its deadline. If every turn is, then |count(n) - rate n| < 1 at every prefix n.
// If the rates sum to 1, always taking the released turn with the earliest deadline finds such a
// sequence (Baruah, Cohen, Plaxton and Varvel, "Proportionate progress", Algorithmica 1996). Ties
// are broken by the lower task number. All arithmetic is on integers.
//
// The same holds for rates that change (Tijdeman, "The chairman assignment problem", Discrete
// Mathematics 1980), with R(n), the sum of a task's rates over n slots, for rate n. Turn k is then
// released in the slot s with R(s) <= k < R(s + 1) and due before the first slot n with
// R(n) >= k + 1. The turns of a task that are released in slot a or later and due by slot b are
// floor(R(b)) - ceil(R(a)) <= R(b) - R(a), or none; those of all tasks together are at most b - a,
// because the rates of a slot sum to 1. So every set of slots has room for the turns that fit
// nowhere else, and earliest deadline first, which is optimal for turns of one slot, meets all
// deadlines. The turns released up to slot s are the sum of ceil(R(s + 1)) >= s + 1, so no slot
// lacks a turn.
//
// Taking the turns in the order of their deadlines, and giving each the earliest slot that is free
// from its release on, yields the same sequence: a turn is only ever kept out of a slot by turns
// with earlier deadlines. So no queue is needed: the turns with deadlines in a block are sorted by
// counting, and the slots that they leave free go to the turns that are released in the block and
// due after it. The cost per slot does not depend on the number of tasks, and the sequence not on
// the blocks.
template <typename Turn>
class DeadlineBlendOf {
public:
    // turns: the first ones of the tasks that have any, in the order of the tasks.
    DeadlineBlendOf(size_t tasks, std::vector<Turn> turns) : counts_(tasks, 0), turns_(std::move(turns)) {}

    int64_t position() const { return static_cast<int64_t>(position_); }
    const std::vector<int64_t>& counts() const { return counts_; }

    // Write the tasks of the next `slots` slots.
    template <typename Task>
    void fill(Task* tasks, uint32_t slots) {
        const uint32_t due = collect(slots);
        free_.reset(slots);
        for (uint32_t i = 0; i < due; ++i) tasks[free_.take(by_deadline_[i].release)] = by_deadline_[i].task;
        uint32_t left = slots - due;
        std::sort(later_.begin(), later_.end());
        for (auto turn = later_.begin(); turn != later_.end() && left > 0; ++turn) {
            const uint32_t slot = free_.take(turn->release);
            if (slot == FreeSlots::kNone) continue;
            Turn& taken = turns_[turn->index];
            tasks[slot] = taken.task;
            ++counts_[taken.task];
            taken.advance();
            --left;
        }
        if (left > 0) throw std::logic_error("a slot has no turn");
        position_ += slots;
    }

private:
    // Releases and deadlines as slots of the block.
    struct Due {
        uint32_t release, deadline, task;
    };
    struct Released {
        uint32_t release, task;
    };
    struct Later {
        uint64_t deadline;
        uint32_t index, release;  // index: in turns_, in the order of the tasks
        bool operator<(const Later& other) const {
            return std::tie(deadline, index) < std::tie(other.deadline, other.index);
        }
    };

    // Sort the turns that are due in the next `slots` slots by deadline, advance their tasks past
    // them, and record the turns that are due later; returns the number of turns due.
    uint32_t collect(uint32_t slots) {
        const uint64_t begin = position_, end = position_ + slots;
        due_.resize(slots);
        first_.assign(slots + 1, 0);
        later_.clear();
        uint32_t due = 0;
        for (uint32_t index = 0; index < turns_.size(); ++index) {
            Turn turn = turns_[index];
            const uint32_t before = due;
            while (turn.start < end) {
                const auto release = static_cast<uint32_t>(std::max(turn.start, begin) - begin);
                const uint64_t deadline = turn.deadline();
                if (deadline > end) {
                    later_.push_back({deadline, index, release});
                    break;
                }
                if (due == slots) throw std::logic_error("more turns are due than there are slots");
                const auto last = static_cast<uint32_t>(deadline - begin - 1);
                due_[due++] = {release, last, turn.task};
                ++first_[last + 1];
                turn.advance();
            }
            counts_[turn.task] += due - before;
            turns_[index] = turn;
        }
        for (uint32_t slot = 0; slot < slots; ++slot) first_[slot + 1] += first_[slot];
        by_deadline_.resize(slots);
        for (uint32_t i = 0; i < due; ++i)
            by_deadline_[first_[due_[i].deadline]++] = {due_[i].release, due_[i].task};
        return due;
    }

    uint64_t position_ = 0;
    std::vector<int64_t> counts_;
    std::vector<Turn> turns_;  // of the tasks that have any
    // Buffers for the current block, reused for the next one:
    FreeSlots free_;
    std::vector<Due> due_;
    std::vector<uint32_t> first_;  // index in by_deadline_ of the next turn due in a slot
    std::vector<Released> by_deadline_;
    std::vector<Later> later_;
};

using DeadlineBlend = DeadlineBlendOf<ConstantTurn>;

inline DeadlineBlend deadline_blend(const std::vector<uint64_t>& weights) {
    const uint64_t total = total_weight(weights);
    std::vector<ConstantTurn> turns;
    for (uint32_t task = 0; task < weights.size(); ++task) {
        const uint64_t weight = weights[task];
        if (weight > 0) turns.push_back({weight, total / weight, total % weight, 0, 0, task});
    }
    return {weights.size(), std::move(turns)};
}

// Independent draws, as in most training loops: task t with probability w/W in every slot. The draw
// of a slot is a function of the key and the slot; alias method (Vose, "A linear algorithm for
// generating random numbers with a given distribution", IEEE TSE 1991), exact to 2^-64.
class AliasTable {
public:
    explicit AliasTable(const std::vector<uint64_t>& weights) : columns_(weights.size()) {
        using Wide = unsigned __int128;
        const uint64_t total = total_weight(weights);
        const Wide tasks = weights.size();
        std::vector<Wide> mass;  // of a column: weight times tasks; `total` fills a column
        std::vector<uint32_t> below, above;
        for (uint32_t task = 0; task < weights.size(); ++task) {
            mass.push_back(weights[task] * tasks);
            (mass[task] < total ? below : above).push_back(task);
            columns_[task] = {~uint64_t{0}, task};
        }
        while (!below.empty()) {
            const uint32_t task = below.back(), other = above.back();
            below.pop_back();
            columns_[task] = {share(mass[task], total), other};
            mass[other] -= total - mass[task];
            if (mass[other] < total) {
                above.pop_back();
                below.push_back(other);
            }
        }
    }

    uint32_t draw(uint64_t word) const {
        const unsigned __int128 point = (unsigned __int128){word} * columns_.size();
        const auto column = static_cast<uint32_t>(point >> 64);
        const Column& drawn = columns_[column];
        return static_cast<uint64_t>(point) < drawn.below ? column : drawn.other;
    }

private:
    struct Column {
        uint64_t below;  // a draw below this chooses the column's own task
        uint32_t other;
    };

    // part / whole in units of 2^-64, for part < whole <= 2^62.
    static uint64_t share(unsigned __int128 part, uint64_t whole) {
        return static_cast<uint64_t>((part << 64) / whole);
    }

    std::vector<Column> columns_;  // by task
};

class RandomBlend {
public:
    RandomBlend(const std::vector<uint64_t>& weights, uint64_t key)
        : key_(key), counts_(weights.size(), 0), table_(weights) {}

    int64_t position() const { return static_cast<int64_t>(position_); }
    const std::vector<int64_t>& counts() const { return counts_; }

    // Write the tasks of the next `slots` slots.
    template <typename Task>
    void fill(Task* tasks, uint32_t slots) {
        for (uint32_t i = 0; i < slots; ++i) {
            const uint32_t task = table_.draw(member_key(key_, position_++));
            tasks[i] = static_cast<Task>(task);
            ++counts_[task];
        }
    }

protected:
    void set_weights(const std::vector<uint64_t>& weights) { table_ = AliasTable(weights); }

private:
    uint64_t key_;
    uint64_t position_ = 0;
    std::vector<int64_t> counts_;
    AliasTable table_;
};

}  // namespace megaphase
