// A task's stream over the documents of its corpus; one interface for all types of the arrays.
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstdint>
#include <memory>
#include <optional>
#include <stdexcept>
#include <utility>
#include <vector>

#include "document_parts.hpp"
#include "documents.hpp"
#include "packing.hpp"
#include "sample_index.hpp"
#include "token_check.hpp"

namespace megaphase {

// Tokens [offset, offset + tokens) of a document.
struct Piece {
    int64_t document, offset, tokens;
};

// The destination of a sample or a part of it, [length] each. If `documents` is not null, it receives
// the index of every input's document, from `first_document` on, and no token predicts a token of
// another document.
struct Row {
    int64_t *inputs, *targets, *documents;
    int64_t length, first_document;

    // The part from this position on, whose documents count from this one.
    Row from(int64_t position, int64_t document) const {
        return {inputs + position, targets + position, documents ? documents + position : nullptr,
                length - position, document};
    }
};

// The input at empty positions, and the target of positions without a loss.
struct Blanks {
    int64_t filler, ignored;
};

// A walk through an epoch that keeps its position; see SampleWalk.
class StreamWalk {
public:
    virtual ~StreamWalk() = default;
    virtual int64_t fill(Start<uint32_t>* starts, int64_t samples, int64_t documents) = 0;
    virtual int64_t fill(Start<uint64_t>* starts, int64_t samples, int64_t documents) = 0;
    virtual bool at_end() const = 0;
};

// A walk through the parts of documents that lie in some ranges of an epoch; see PartWalk.
class StreamPartWalk {
public:
    virtual ~StreamPartWalk() = default;
    virtual int64_t fill(Part* parts, int64_t count, int64_t documents) = 0;
    virtual bool at_end() const = 0;
};

class Stream {
public:
    virtual ~Stream() = default;
    virtual int64_t seq_len() const = 0;
    // The same documents with samples of another length.
    virtual std::unique_ptr<Stream> with_seq_len(int64_t seq_len) const = 0;
    virtual Totals totals() const = 0;
    // like: an earlier walk of this stream, or null; the new one need not read the lengths again.
    virtual std::unique_ptr<StreamWalk> walk(int64_t epoch, const StreamWalk* like) const = 0;
    // Append the pieces of the sample that begins at (slot, offset) of an epoch to `pieces`, and
    // ask the operating system to read their tokens ahead.
    virtual void prepare(int64_t epoch, int64_t slot, int64_t offset,
                         std::vector<Piece>& pieces) const = 0;
    // Likewise the pieces of `tokens` tokens from the token at `offset` on, counted from the slot's
    // first one; it may be in a later document.
    virtual void prepare_tokens(int64_t epoch, int64_t slot, int64_t offset, int64_t tokens,
                                std::vector<Piece>& pieces) const = 0;
    // Pack spans of epoch 0's documents, see packing.hpp; only translation pairs are packed.
    virtual int64_t pack(const Span*, int64_t, std::vector<SpanStart>&) const {
        throw std::logic_error("texts are not packed");
    }
    // Likewise append the pieces of the sample of packed spans that begins there.
    virtual void prepare_packed(const Span*, int64_t, const SpanStart&, std::vector<Piece>&) const {
        throw std::logic_error("texts are not packed");
    }
    // Write a sample; its tokens are verified if they have not been before. Empty positions get the
    // blanks, and belong to the last document.
    virtual void read(const Piece* first, const Piece* last, const Row& row,
                      const Blanks& blanks) const = 0;
    virtual std::unique_ptr<StreamPartWalk> part_walk(
        int64_t epoch, const std::vector<std::pair<int64_t, int64_t>>& ranges) const = 0;
    // Ask the operating system to read a part's tokens ahead.
    virtual void prepare_part(const Part& part) const = 0;
    // Write a sample that consists of these parts, as `read` does.
    virtual void read_parts(const Part* first, const Part* last, const Row& row,
                            const Blanks& blanks) const = 0;
};

template <typename Length, typename Cut>
class StreamWalkOf final : public StreamWalk {
public:
    StreamWalkOf(const Documents<Length>& documents, const KeyedPermutation& order, const Cut& cut,
                 const StreamWalk* like)
        : walk_(documents, order, cut, inner_of(like)) {}

    int64_t fill(Start<uint32_t>* starts, int64_t samples, int64_t documents) override {
        return walk_.fill(starts, samples, documents);
    }
    int64_t fill(Start<uint64_t>* starts, int64_t samples, int64_t documents) override {
        return walk_.fill(starts, samples, documents);
    }
    bool at_end() const override { return walk_.at_end(); }

private:
    static const SampleWalk<Length, Cut>* inner_of(const StreamWalk* like) {
        const auto* other = dynamic_cast<const StreamWalkOf*>(like);
        return other ? &other->walk_ : nullptr;
    }

    SampleWalk<Length, Cut> walk_;
};

template <typename Token>
struct TokenFile {
    const Token* tokens;
    int64_t count;
    const int64_t* byte_offsets;  // [documents]
    std::shared_ptr<const TokenCheck<Token>> check;

    // Return the tokens of a piece after verifying them.
    const Token* at(const Piece& piece) const {
        const int64_t begin = position(piece);
        if (piece.tokens > 0) check->check(begin, begin + piece.tokens);
        return tokens + begin;
    }

    // Read a mapped file's pages ahead, without waiting, so that many requests are in flight.
    void will_need(const Piece& piece) const {
        static const auto page = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE));
        const auto begin = reinterpret_cast<uintptr_t>(tokens + position(piece));
        const uintptr_t aligned = begin / page * page;
        // Only a hint: without it, the pages are read when they are accessed.
        madvise(reinterpret_cast<void*>(aligned),
                begin - aligned + static_cast<uintptr_t>(piece.tokens) * sizeof(Token),
                MADV_WILLNEED);
    }

    // The number of a piece's first token in the file.
    int64_t position(const Piece& piece) const {
        const int64_t begin =
            load(byte_offsets, piece.document) / int64_t{sizeof(Token)} + piece.offset;
        if (begin < 0 || begin > count - piece.tokens)
            throw std::out_of_range("a document lies outside the token file");
        return begin;
    }
};

// The documents concatenated to one sequence of tokens, which is split into samples.
template <typename Length, typename Token>
class CorpusStream : public Stream {
public:
    // `bos`, if given, is the input from which a document's first token is predicted, instead of the
    // last token of the document before it.
    CorpusStream(const Documents<Length>& documents, const TokenFile<Token>& file, uint64_t key,
                 int64_t seq_len, std::optional<int64_t> bos)
        : documents_(documents), file_(file), key_(key), seq_len_(seq_len), bos_(bos) {}

    int64_t seq_len() const override { return seq_len_; }

    std::unique_ptr<Stream> with_seq_len(int64_t seq_len) const override {
        auto other = std::make_unique<CorpusStream>(*this);
        other->set_seq_len(seq_len);
        return other;
    }

    Totals totals() const override { return documents_.totals(); }

    std::unique_ptr<StreamWalk> walk(int64_t epoch, const StreamWalk* like) const override {
        return std::make_unique<StreamWalkOf<Length, EvenCut>>(documents_, order(epoch),
                                                               EvenCut(seq_len_), like);
    }

    void prepare(int64_t epoch, int64_t slot, int64_t offset,
                 std::vector<Piece>& pieces) const override {
        for_each_piece(documents_, order(epoch), slot, offset, seq_len_ + 1, adder(pieces));
    }

    void prepare_tokens(int64_t epoch, int64_t slot, int64_t offset, int64_t tokens,
                        std::vector<Piece>& pieces) const override {
        const KeyedPermutation permutation = order(epoch);
        find_token(documents_, permutation, slot, offset);
        for_each_piece(documents_, permutation, slot, offset, tokens, adder(pieces));
    }

    void read(const Piece* first, const Piece* last, const Row& row,
              const Blanks& blanks) const override {
        int64_t found = 0;  // token i of the sample is input i and target i - 1
        for (const Piece* piece = first; piece != last; ++piece) {
            const Token* begin = file_.at(*piece);
            const int64_t inputs = std::min(piece->tokens, row.length - found);
            std::copy(begin, begin + inputs, row.inputs + found);
            if (row.documents) std::fill_n(row.documents + found, inputs, row.first_document + (piece - first));
            const bool after_bos = bos_ && piece->offset == 0 && found > 0;
            if (after_bos) {
                row.inputs[found - 1] = *bos_;
                if (row.documents) row.documents[found - 1] = row.first_document + (piece - first);
            }
            // The first token of a sample has no input that precedes it; nor, if documents are
            // separated, has the first token of a document without BOS.
            const int64_t skipped = found == 0 ? 1 : 0;
            const int64_t alone = row.documents && !after_bos ? 1 : 0;
            const int64_t scored = std::max({skipped, alone, unscored(*piece)});
            std::fill(row.targets + (found - 1 + skipped), row.targets + (found - 1 + scored),
                      blanks.ignored);
            std::copy(begin + scored, begin + piece->tokens, row.targets + (found - 1 + scored));
            ignore_unmarked(*piece, scored, row.targets + (found - 1 + scored), blanks.ignored);
            found += piece->tokens;
        }
        if (found == 0) throw std::out_of_range("a sample lies outside its epoch");
        const int64_t inputs = std::min(found, row.length);
        std::fill(row.inputs + inputs, row.inputs + row.length, blanks.filler);
        std::fill(row.targets + found - 1, row.targets + row.length, blanks.ignored);
        if (row.documents)
            std::fill(row.documents + inputs, row.documents + row.length, row.documents[inputs - 1]);
    }

    std::unique_ptr<StreamPartWalk> part_walk(
        int64_t epoch, const std::vector<std::pair<int64_t, int64_t>>& ranges) const override {
        class Walk final : public StreamPartWalk {
        public:
            explicit Walk(PartWalk<Length> walk) : walk_(std::move(walk)) {}
            int64_t fill(Part* parts, int64_t count, int64_t documents) override {
                return walk_.fill(parts, count, documents);
            }
            bool at_end() const override { return walk_.at_end(); }

        private:
            PartWalk<Length> walk_;
        };
        return std::make_unique<Walk>(PartWalk<Length>(documents_, order(epoch), ranges));
    }

    void prepare_part(const Part& part) const override { file_.will_need(piece_of(part)); }

    void read_parts(const Part* first, const Part* last, const Row& row,
                    const Blanks& blanks) const override {
        int64_t at = 0;  // the next position to write
        for (const Part* part = first; part != last; ++part) {
            const Piece piece = piece_of(*part);
            const Token* begin = file_.at(piece);  // input of the first target, if the part has one
            const bool begins = part->first == 0;
            // Without BOS, a document's first token is predicted from the last one of the document
            // before it, and is no target where there is none.
            const bool unpreceded = begins && !bos_ && part == first;
            const int64_t written = part->targets - unpreceded;
            if (written > row.length - at) throw std::out_of_range("a sample is longer than seq_len");
            int64_t* input = row.inputs + at;
            const Token* target = begin + (begins && !unpreceded ? 0 : 1);
            std::copy(target, target + written, row.targets + at);
            if (row.documents) std::fill_n(row.documents + at, written, part - first);
            if (begins && !unpreceded) {
                if (bos_) {
                    *input++ = *bos_;
                } else {
                    const Part& before = part[-1];
                    *input++ = *file_.at({before.document, before.first + before.targets - 1, 1});
                    const bool ended = before.first + before.targets == length_of(before.document);
                    if (row.documents) row.documents[at] = part - 1 - first;
                    if (row.documents || !ended) row.targets[at] = blanks.ignored;
                }
            }
            std::copy(begin, begin + (row.inputs + at + written - input), input);
            at += written;
        }
        std::fill(row.inputs + at, row.inputs + row.length, blanks.filler);
        std::fill(row.targets + at, row.targets + row.length, blanks.ignored);
        if (row.documents)
            std::fill(row.documents + at, row.documents + row.length, at ? row.documents[at - 1] : 0);
    }

protected:
    int64_t length_of(int64_t document) const { return load(documents_.lengths, document); }

    // The tokens of a part, and the one from which its first target is predicted.
    Piece piece_of(const Part& part) const {
        if (part.document < 0 || part.document >= documents_.count || part.first < 0 ||
            part.targets < 1 || part.targets > length_of(part.document) - part.first)
            throw std::out_of_range("a part lies outside its document");
        const int64_t before = part.first > 0 ? 1 : 0;
        return {part.document, part.first - before, part.targets + before};
    }

    // The number of a piece's first tokens without a loss, whatever precedes them.
    virtual int64_t unscored(const Piece&) const { return 0; }

    // Blank those of the targets, a piece's tokens from the `first` on, that have no loss otherwise.
    virtual void ignore_unmarked(const Piece&, int64_t, int64_t*, int64_t) const {}

    void set_seq_len(int64_t seq_len) {
        if (seq_len < 1) throw std::invalid_argument("seq_len is positive");
        seq_len_ = seq_len;
    }

    KeyedPermutation order(int64_t epoch) const {
        return KeyedPermutation(documents_.count, member_key(key_, epoch));
    }

    // Return a visitor that appends pieces and has the operating system read their tokens ahead.
    auto adder(std::vector<Piece>& pieces) const {
        return [&](int64_t document, int64_t offset, int64_t tokens) {
            pieces.push_back({document, offset, tokens});
            file_.will_need(pieces.back());
        };
    }

    Documents<Length> documents_;
    TokenFile<Token> file_;
    uint64_t key_;
    int64_t seq_len_;
    std::optional<int64_t> bos_;
};

}  // namespace megaphase
