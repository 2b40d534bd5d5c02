// Streams of whole documents packed into samples, with loss on a part of each: translation pairs and
// chats.
#pragma once

#include <algorithm>
#include <cstdint>
#include <memory>
#include <utility>
#include <vector>

#include "packing.hpp"
#include "stream.hpp"

namespace megaphase {

template <typename Length, typename Token>
class PackedStream : public CorpusStream<Length, Token> {
public:
    explicit PackedStream(CorpusStream<Length, Token> base)
        : CorpusStream<Length, Token>(std::move(base)) {}

    std::unique_ptr<StreamWalk> walk(int64_t epoch, const StreamWalk* like) const override {
        return std::make_unique<StreamWalkOf<Length, PackedCut>>(
            this->documents_, this->order(epoch), PackedCut(this->seq_len_), like);
    }

    void prepare(int64_t epoch, int64_t slot, int64_t offset,
                 std::vector<Piece>& pieces) const override {
        for_each_packed_piece(this->documents_, this->order(epoch), slot, offset,
                              this->seq_len_ + 1, this->adder(pieces));
    }

    int64_t pack(const Span* spans, int64_t count, std::vector<SpanStart>& starts) const override {
        return pack_spans(this->documents_, this->order(0), spans, count, this->seq_len_, starts);
    }

    void prepare_packed(const Span* spans, int64_t count, const SpanStart& at,
                        std::vector<Piece>& pieces) const override {
        for_each_packed_span_piece(this->documents_, this->order(0), spans, count, at,
                                   this->seq_len_ + 1, this->adder(pieces));
    }
};

// A document is a source, the tag, a target and EOD; no source holds the tag.
template <typename Length, typename Token>
class TranslationStream final : public PackedStream<Length, Token> {
public:
    TranslationStream(CorpusStream<Length, Token> base, Token tag)
        : PackedStream<Length, Token>(std::move(base)), tag_(tag) {}

    std::unique_ptr<Stream> with_seq_len(int64_t seq_len) const override {
        auto other = std::make_unique<TranslationStream>(*this);
        other->set_seq_len(seq_len);
        return other;
    }

private:
    // The tokens up to the tag; if the document is split, the tag may be in an earlier piece.
    int64_t unscored(const Piece& piece) const override {
        const int64_t end = piece.offset + piece.tokens;
        const Token* document = this->file_.at({piece.document, 0, end});
        const int64_t tag = std::find(document, document + end, tag_) - document;
        // The first token of a later part is the last target of the part before.
        const int64_t least = piece.offset > 0 ? 1 : 0;
        return std::clamp(tag + 1 - piece.offset, least, piece.tokens);
    }

    Token tag_;
};

// A document is a chat and EOD; `is_target`, a byte for every token of the .bin, marks those that have
// a loss.
template <typename Length, typename Token>
class ChatStream final : public PackedStream<Length, Token> {
public:
    ChatStream(CorpusStream<Length, Token> base, const uint8_t* is_target)
        : PackedStream<Length, Token>(std::move(base)), is_target_(is_target) {}

    std::unique_ptr<Stream> with_seq_len(int64_t seq_len) const override {
        auto other = std::make_unique<ChatStream>(*this);
        other->set_seq_len(seq_len);
        return other;
    }

private:
    // As of pairs, the first token of a later part is the last target of the part before.
    int64_t unscored(const Piece& piece) const override { return piece.offset > 0 ? 1 : 0; }

    void ignore_unmarked(const Piece& piece, int64_t first, int64_t* targets,
                         int64_t ignored) const override {
        const uint8_t* marks = is_target_ + this->file_.position(piece);
        for (int64_t i = first; i < piece.tokens; ++i)
            if (!marks[i]) targets[i - first] = ignored;
    }

    const uint8_t* is_target_;
};

}  // namespace megaphase
