// The order in which tasks take their turns where their rates change within a phase.
//
// A phase is divided into pieces, in each of which the rates are constant. A slot of a piece gives a
// task weight / (slots of the piece) units, and a turn costs `unit` units; the weights of all tasks
// in a piece sum to its slots times `unit`. So the sum of a task's rates up to the end of any piece
// is a whole number of units, and what is left of it there is carried into the next piece exactly.
#pragma once

#include <memory>

#include "blend.hpp"

namespace megaphase {

class RatePieces {
public:
    // bounds: the slots at which the pieces begin, and the one at which the last piece ends.
    // weights: of every task in every piece, [tasks, pieces].
    RatePieces(std::vector<uint64_t> bounds, std::vector<uint64_t> weights)
        : bounds_(std::move(bounds)), weights_(std::move(weights)) {
        if (bounds_.size() < 2 || bounds_[0] != 0) throw std::invalid_argument("bounds begin with 0");
        if (weights_.empty() || weights_.size() % pieces() != 0)
            throw std::invalid_argument("weights are [tasks, pieces]");
        for (size_t piece = 0; piece < pieces(); ++piece) {
            if (bounds_[piece] >= bounds_[piece + 1]) throw std::invalid_argument("a piece is empty");
            const uint64_t total = total_weight(in_piece(piece));
            if (piece == 0) unit_ = total / slots(0);
            if (unit_ == 0 || total % slots(piece) != 0 || total / slots(piece) != unit_)
                throw std::invalid_argument("the weights of a piece do not sum to its slots");
        }
    }

    size_t pieces() const { return bounds_.size() - 1; }
    size_t tasks() const { return weights_.size() / pieces(); }
    uint64_t unit() const { return unit_; }
    uint64_t begin(size_t piece) const { return bounds_[piece]; }
    uint64_t end(size_t piece) const { return bounds_[piece + 1]; }
    uint64_t slots(size_t piece) const { return end(piece) - begin(piece); }
    uint64_t weight(size_t task, size_t piece) const { return weights_[task * pieces() + piece]; }

    std::vector<uint64_t> in_piece(size_t piece) const {
        std::vector<uint64_t> found(tasks());
        for (size_t task = 0; task < found.size(); ++task) found[task] = weight(task, piece);
        return found;
    }

private:
    std::vector<uint64_t> bounds_, weights_;
    uint64_t unit_ = 0;
};

// The next turn of a task, see DeadlineBlendOf. The sum of the task's rates reaches the turn's end
// at slot + fraction/weight, in a piece of this weight, of which `left` units come after it. The
// last piece has no end, so that turns have deadlines there as at a constant rate.
struct PiecewiseTurn {
    static constexpr uint64_t kNever = ~uint64_t{0};

    const RatePieces* rates;
    uint32_t task, piece;
    uint64_t start, due;  // its release, and its deadline
    uint64_t weight, period, period_fraction;
    uint64_t slot, fraction, left;

    static PiecewiseTurn first(const RatePieces& rates, uint32_t task) {
        PiecewiseTurn turn{&rates, task, 0, 0, 0, 0, 0, 0, 0, 0, 0};
        turn.enter(0, 0);
        turn.advance();
        return turn;
    }

    uint64_t deadline() const { return due; }

    void advance() {
        const uint64_t unit = rates->unit();
        // Where the sum of the rates stays what it is for some pieces, the turn is released after them.
        start = left > 0 ? slot : kNever;
        if (left >= unit) {
            left -= unit;
            slot += period;
            fraction += period_fraction;
            const bool carry = fraction >= weight;
            slot += carry;
            fraction -= carry ? weight : 0;
            due = slot + (fraction > 0);
            return;
        }
        uint64_t needed = unit - left;
        left = 0;
        while (piece + 1 < rates->pieces()) {
            ++piece;
            const uint64_t here = rates->weight(task, piece);
            if (here == 0) continue;
            if (start == kNever) start = rates->begin(piece);
            if (here >= needed || is_last()) {
                enter(piece, needed);
                due = slot + (fraction > 0);
                return;
            }
            needed -= here;
        }
        due = kNever;
    }

private:
    static constexpr uint64_t kUnbounded = uint64_t{1} << 63;  // more than a phase can use up

    bool is_last() const { return piece + 1 == rates->pieces(); }

    // Go to where a piece has given the task `needed` units, at most `unit`.
    void enter(uint32_t number, uint64_t needed) {
        piece = number;
        weight = rates->weight(task, piece);
        slot = rates->begin(piece);
        fraction = left = 0;
        if (weight == 0) return;
        const uint64_t total = rates->slots(piece) * rates->unit();
        period = total / weight;
        period_fraction = total % weight;
        const uint64_t distance = rates->slots(piece) * needed;
        slot += distance / weight;
        fraction = distance % weight;
        left = is_last() ? kUnbounded : weight - needed;
    }
};

class PiecewiseDeadlineBlend : public DeadlineBlendOf<PiecewiseTurn> {
public:
    explicit PiecewiseDeadlineBlend(std::shared_ptr<const RatePieces> rates)
        : DeadlineBlendOf(rates->tasks(), first_turns(*rates)), rates_(std::move(rates)) {}

private:
    static std::vector<PiecewiseTurn> first_turns(const RatePieces& rates) {
        std::vector<PiecewiseTurn> turns;
        for (uint32_t task = 0; task < rates.tasks(); ++task) {
            const PiecewiseTurn turn = PiecewiseTurn::first(rates, task);
            if (turn.start != PiecewiseTurn::kNever) turns.push_back(turn);
        }
        return turns;
    }

    std::shared_ptr<const RatePieces> rates_;
};

class PiecewiseRandomBlend : public RandomBlend {
public:
    PiecewiseRandomBlend(std::shared_ptr<const RatePieces> rates, uint64_t key)
        : RandomBlend(rates->in_piece(0), key), rates_(std::move(rates)) {}

    template <typename Task>
    void fill(Task* tasks, uint32_t slots) {
        while (slots > 0) {
            uint64_t position = static_cast<uint64_t>(this->position());
            if (position == rates_->end(piece_) && piece_ + 1 < rates_->pieces())
                set_weights(rates_->in_piece(++piece_));
            const uint64_t in_piece = rates_->end(piece_) - position;
            const bool ends = position < rates_->end(piece_) && in_piece < slots;
            const uint32_t next = ends ? static_cast<uint32_t>(in_piece) : slots;
            RandomBlend::fill(tasks, next);
            tasks += next;
            slots -= next;
        }
    }

private:
    std::shared_ptr<const RatePieces> rates_;
    size_t piece_ = 0;
};

}  // namespace megaphase
