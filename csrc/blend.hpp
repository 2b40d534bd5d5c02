// The order in which tasks take their turns: earliest deadline first.
//
// Turn k of a task with rate w/W must fall in the slots [floor(k W/w), ceil((k+1) W/w)). A
// sequence in which every turn does has |count(n) - rate n| < 1 at every prefix n; with rates that
// sum to 1, always taking the released turn with the earliest deadline finds one (Baruah, Cohen,
// Plaxton and Varvel, "Proportionate progress", Algorithmica 1996). All arithmetic is on integers.
#pragma once

#include <cstdint>
#include <queue>
#include <stdexcept>
#include <utility>
#include <vector>

namespace megaphase {

class EarliestDeadlineFirst {
public:
    static constexpr uint64_t kLargestTotal = uint64_t{1} << 62;

    // A task's rate is its weight's part of the sum; with a weight of 0 it never has a turn.
    explicit EarliestDeadlineFirst(const std::vector<uint64_t>& weights)
        : counts_(weights.size(), 0), turns_(weights.size()) {
        uint64_t total = 0;
        for (const uint64_t weight : weights) {
            if (weight > kLargestTotal - total) throw std::invalid_argument("weights exceed 2^62");
            total += weight;
        }
        if (total == 0) throw std::invalid_argument("no task has a weight");
        for (size_t task = 0; task < weights.size(); ++task) {
            const uint64_t weight = weights[task];
            if (weight == 0) continue;
            turns_[task] = {weight, total / weight, total % weight, 0, 0};
            ready_.push(deadline(task));
        }
    }

    uint64_t position() const { return slot_; }
    const std::vector<int64_t>& counts() const { return counts_; }

    // The task of the next slot.
    uint32_t next() {
        while (!waiting_.empty() && waiting_.top().first <= slot_) {
            ready_.push(deadline(waiting_.top().second));
            waiting_.pop();
        }
        const uint32_t task = ready_.top().second;
        ready_.pop();
        turns_[task].advance();
        waiting_.push({turns_[task].start, task});
        ++counts_[task];
        ++slot_;
        return task;
    }

private:
    // (slot, task): ties go to the lower task number.
    using Event = std::pair<uint64_t, uint32_t>;
    using EarliestFirst = std::priority_queue<Event, std::vector<Event>, std::greater<Event>>;

    // Turn k starts at k W/w = start + fraction/w, kept exactly as k grows by one.
    struct Turn {
        uint64_t weight, period, period_fraction, start, fraction;

        void advance() {
            start += period;
            fraction += period_fraction;
            if (fraction >= weight) {
                fraction -= weight;
                ++start;
            }
        }
    };

    Event deadline(uint32_t task) const {
        Turn after = turns_[task];
        after.advance();
        return {after.start + (after.fraction > 0 ? 1 : 0), task};
    }

    uint64_t slot_ = 0;
    std::vector<int64_t> counts_;
    std::vector<Turn> turns_;
    EarliestFirst ready_;    // released turns by deadline
    EarliestFirst waiting_;  // turns to come by release
};

}  // namespace megaphase
