#include "tokenizer.h"

#include <algorithm>
#include <exception>
#include <utility>

#include "tokenizer_model.h"

namespace hetcomp {

namespace {

void encode_text(const TokenizerModel& model, std::string_view normalized, bool at_start, bool parse_special,
                 std::vector<std::int32_t>* ids) {
  for (const Stretch& stretch : model.normalized_added.cut(normalized, parse_special)) {
    if (stretch.id) {
      ids->push_back(*stretch.id);
      continue;
    }
    for (const std::string& piece : model.pretokenizer.split(stretch.text, at_start && stretch.offset == 0)) {
      model.bpe->encode(piece, ids);
    }
  }
}

// HF shows a run of byte tokens as text if the whole run is UTF-8, else as one U+FFFD for each byte.
void append_byte_run(const std::string& run, std::string* out) {
  if (utf8_error(run) == std::string_view::npos) {
    out->append(run);
    return;
  }
  for (std::size_t i = 0; i < run.size(); ++i) out->append("\xEF\xBF\xBD");
}

void strip_start(const Decoder& decoder, std::string* text) {
  for (int i = 0; i < decoder.strip_count && text->starts_with(decoder.strip); ++i) {
    text->erase(0, decoder.strip.size());
  }
}

}  // namespace

Tokenizer::Tokenizer(std::unique_ptr<TokenizerModel> model) : model_(std::move(model)) {}
Tokenizer::~Tokenizer() = default;

std::unique_ptr<Tokenizer> Tokenizer::load(std::string_view json, std::string* error) {
  try {
    return std::unique_ptr<Tokenizer>(new Tokenizer(read_tokenizer_model(json)));
  } catch (const std::exception& problem) {
    *error = std::string("The compiled tokenizer cannot be read: ") + problem.what() + ".";
    return nullptr;
  }
}

std::optional<std::vector<std::int32_t>> Tokenizer::encode(std::string_view utf8, bool parse_special,
                                                           bool add_special, std::string* error) const {
  const std::size_t bad = utf8_error(utf8);
  if (bad != std::string_view::npos) {
    *error = "The text is not valid UTF-8 at byte " + std::to_string(bad) + "; give UTF-8 text.";
    return std::nullopt;
  }
  try {
    std::vector<std::int32_t> ids;
    if (add_special) ids = model_->prefix;
    for (const Stretch& stretch : model_->raw_added.cut(utf8, parse_special)) {
      if (stretch.id) {
        ids.push_back(*stretch.id);
        continue;
      }
      encode_text(*model_, apply_normalizers(model_->normalizers, stretch.text), stretch.offset == 0,
                  parse_special, &ids);
    }
    if (add_special) ids.insert(ids.end(), model_->suffix.begin(), model_->suffix.end());
    return ids;
  } catch (const std::exception& problem) {
    *error = std::string("The text cannot be tokenised: ") + problem.what() + ".";
    return std::nullopt;
  }
}

std::string Tokenizer::decode(std::span<const std::int32_t> ids, bool skip_special) const {
  const Decoder& decoder = model_->decoder;
  std::string out;
  std::string run;
  bool first = true;
  for (const std::int32_t id : ids) {
    if (id < 0 || id >= vocab_size()) continue;
    const Piece& piece = model_->pieces[static_cast<std::size_t>(id)];
    if (!piece.exists || (skip_special && piece.special)) continue;
    if (piece.byte) {
      run += static_cast<char>(*piece.byte);
    } else {
      append_byte_run(run, &out);
      run.clear();
      out += first && decoder.drop_first ? model_->first_pieces[static_cast<std::size_t>(id)] : piece.bytes;
    }
    first = false;
  }
  append_byte_run(run, &out);
  if (decoder.byte_level) out = utf8_lossy(out);
  strip_start(decoder, &out);
  return out;
}

std::string Tokenizer::token_bytes(std::int32_t id, bool skip_special) const {
  if (id < 0 || id >= vocab_size()) return {};
  const Piece& piece = model_->pieces[static_cast<std::size_t>(id)];
  if (!piece.exists || (skip_special && piece.special)) return {};
  if (piece.byte) return std::string(1, static_cast<char>(*piece.byte));
  return piece.bytes;
}

std::optional<std::int32_t> Tokenizer::token_id(std::string_view text) const {
  const auto added = model_->added_ids.find(std::string(text));
  if (added != model_->added_ids.end()) return added->second;
  return model_->bpe->find(text);
}

bool Tokenizer::is_special(std::int32_t id) const {
  return id >= 0 && id < vocab_size() && model_->pieces[static_cast<std::size_t>(id)].special;
}

std::int32_t Tokenizer::vocab_size() const { return static_cast<std::int32_t>(model_->pieces.size()); }
std::optional<std::int32_t> Tokenizer::bos_token_id() const { return model_->bos; }
std::optional<std::int32_t> Tokenizer::eos_token_id() const { return model_->eos; }

StreamDecoder::StreamDecoder(const Tokenizer& tokenizer, bool skip_special)
    : tokenizer_(tokenizer), skip_special_(skip_special) {}

std::string StreamDecoder::feed(std::int32_t id) {
  const TokenizerModel& model = *tokenizer_.model_;
  std::string bytes = tokenizer_.token_bytes(id, skip_special_);
  if (bytes.empty()) return {};
  if (at_start_ && model.decoder.drop_first) bytes = model.first_pieces[static_cast<std::size_t>(id)];
  if (at_start_) strip_start(model.decoder, &bytes);
  at_start_ = false;
  pending_ += bytes;
  // Everything but an unfinished character at the very end can be decided now.
  std::size_t keep = 0;
  for (std::size_t at = 0; at < pending_.size();) {
    std::size_t bad = 0;
    bool truncated = false;
    const std::size_t length = utf8_length(std::string_view(pending_).substr(at), &bad, &truncated);
    if (length == 0 && truncated) {
      keep = pending_.size() - at;
      break;
    }
    at += length != 0 ? length : bad;
  }
  std::string text = utf8_lossy(std::string_view(pending_).substr(0, pending_.size() - keep));
  pending_.erase(0, pending_.size() - keep);
  return text;
}

std::string StreamDecoder::flush() {
  std::string text = utf8_lossy(pending_);
  pending_.clear();
  at_start_ = true;
  return text;
}

}  // namespace hetcomp
