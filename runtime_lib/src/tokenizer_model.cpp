#include "tokenizer_model.h"

#include <array>
#include <limits>
#include <nlohmann/json.hpp>
#include <stdexcept>

namespace hetcomp {

namespace {

using Json = nlohmann::ordered_json;

// Bytes are written as the code points U+0000..U+00FF.
std::string bytes_of(const std::string& text) {
  std::string out;
  std::size_t at = 0;
  while (at < text.size()) {
    const std::size_t length = utf8_length(std::string_view(text).substr(at));
    const char32_t code = length ? utf8_code_point(std::string_view(text).substr(at, length)) : 0x100;
    if (code > 0xFF) throw std::runtime_error("a vocabulary entry holds a character above U+00FF");
    out += static_cast<char>(code);
    at += length;
  }
  return out;
}

void replace_all(std::string* text, const std::string& from, const std::string& to) {
  for (std::size_t at = text->find(from); at != std::string::npos; at = text->find(from, at + to.size())) {
    text->replace(at, from.size(), to);
  }
}

std::int32_t id_of(const Json& value, std::size_t count) {
  if (!value.is_number_integer()) throw std::runtime_error("a token id is not an integer");
  const auto id = value.get<std::int64_t>();
  if (id < 0 || static_cast<std::uint64_t>(id) >= count) {
    throw std::runtime_error("token id " + std::to_string(id) + " is outside the vocabulary of " +
                             std::to_string(count));
  }
  return static_cast<std::int32_t>(id);
}

std::optional<std::int32_t> optional_id(const Json& value, std::size_t count) {
  if (value.is_null()) return std::nullopt;
  return id_of(value, count);
}

std::vector<std::int32_t> ids_of(const Json& array, std::size_t count) {
  std::vector<std::int32_t> ids;
  for (const Json& value : array) ids.push_back(id_of(value, count));
  return ids;
}

NormalizerStep normalizer_of(const Json& step) {
  const auto kind = step.at("kind").get<std::string>();
  if (kind == "nfc") return {NormalizerStep::Kind::kForm, NormalForm::kNfc, {}, {}};
  if (kind == "nfd") return {NormalizerStep::Kind::kForm, NormalForm::kNfd, {}, {}};
  if (kind == "nfkc") return {NormalizerStep::Kind::kForm, NormalForm::kNfkc, {}, {}};
  if (kind == "nfkd") return {NormalizerStep::Kind::kForm, NormalForm::kNfkd, {}, {}};
  if (kind == "prepend") {
    return {NormalizerStep::Kind::kPrepend, NormalForm::kNfc, {}, step.at("text").get<std::string>()};
  }
  if (kind == "replace") {
    auto from = step.at("from").get<std::string>();
    if (from.empty()) throw std::runtime_error("a replace normalizer looks for the empty text");
    return {NormalizerStep::Kind::kReplace, NormalForm::kNfc, std::move(from),
            step.at("to").get<std::string>()};
  }
  throw std::runtime_error("unknown normalizer kind '" + kind + "'");
}

Decoder decoder_of(const Json& json) {
  Decoder decoder;
  decoder.byte_level = json.at("byte_level").get<bool>();
  decoder.byte_fallback = json.at("byte_fallback").get<bool>();
  for (const Json& pair : json.at("replacements")) {
    decoder.replacements.emplace_back(pair.at(0).get<std::string>(), pair.at(1).get<std::string>());
    if (decoder.replacements.back().first.empty())
      throw std::runtime_error("the decoder replaces the empty text");
  }
  decoder.strip = json.at("strip").get<std::string>();
  decoder.strip_count = json.at("strip_count").get<int>();
  decoder.metaspace = json.at("metaspace").get<std::string>();
  decoder.drop_first = json.at("drop_first").get<bool>();
  return decoder;
}

std::optional<unsigned char> byte_token(const std::string& text) {
  static constexpr std::string_view kHex = "0123456789ABCDEF";
  if (text.size() != 6 || !text.starts_with("<0x") || text[5] != '>') return std::nullopt;
  const std::size_t high = kHex.find(text[3]);
  const std::size_t low = kHex.find(text[4]);
  if (high == kHex.npos || low == kHex.npos) return std::nullopt;
  return static_cast<unsigned char>(high << 4 | low);
}

// Reads the vocabulary; fills the pieces and returns what BPE may produce.
std::unordered_map<std::string, std::int32_t> read_vocabulary(const Json& json, bool byte_level,
                                                              TokenizerModel* model) {
  const Json& pieces = json.at("pieces");
  if (!pieces.is_array() || pieces.size() >= std::numeric_limits<std::int32_t>::max()) {
    throw std::runtime_error("\"pieces\" is not a list of tokens");
  }
  model->pieces.resize(pieces.size());
  if (model->decoder.drop_first) model->first_pieces.resize(pieces.size());
  std::vector<bool> unreachable(pieces.size());
  for (const std::int32_t id : ids_of(json.at("unreachable"), pieces.size())) {
    unreachable[static_cast<std::size_t>(id)] = true;
  }
  std::unordered_map<std::string, std::int32_t> vocabulary;
  vocabulary.reserve(pieces.size());
  for (std::size_t id = 0; id < pieces.size(); ++id) {
    if (pieces[id].is_null()) continue;
    const auto& text = pieces[id].get_ref<const std::string&>();
    Piece& piece = model->pieces[id];
    piece.exists = true;
    piece.bytes = byte_level ? bytes_of(text) : text;
    if (!unreachable[id]) vocabulary.emplace(piece.bytes, static_cast<std::int32_t>(id));
    if (model->decoder.byte_fallback) piece.byte = byte_token(piece.bytes);
    for (const auto& [from, to] : model->decoder.replacements) replace_all(&piece.bytes, from, to);
    if (model->decoder.drop_first) {
      model->first_pieces[id] = piece.bytes;
      replace_all(&model->first_pieces[id], model->decoder.metaspace, "");
    }
    if (!model->decoder.metaspace.empty()) replace_all(&piece.bytes, model->decoder.metaspace, " ");
  }
  return vocabulary;
}

MergeTable read_merges(const Json& merges, std::size_t vocabulary) {
  if (!merges.is_array() || merges.size() % 3 != 0)
    throw std::runtime_error("\"merges\" is not a list of triples");
  MergeTable table(merges.size() / 3);
  for (std::size_t i = 0; i < merges.size(); i += 3) {
    table.insert(id_of(merges[i], vocabulary), id_of(merges[i + 1], vocabulary),
                 {static_cast<std::int32_t>(i / 3), id_of(merges[i + 2], vocabulary)});
  }
  return table;
}

void read_added_tokens(const Json& json, TokenizerModel* model) {
  std::vector<AddedToken> raw;
  std::vector<AddedToken> normalized;
  for (const std::int32_t id : ids_of(json.at("special"), model->pieces.size())) {
    model->pieces[static_cast<std::size_t>(id)].special = true;
  }
  for (const Json& entry : json.at("added_tokens")) {
    AddedToken token{id_of(entry.at("id"), model->pieces.size()),
                     entry.at("text").get<std::string>(),
                     entry.at("special").get<bool>(),
                     entry.at("normalized").get<bool>(),
                     entry.at("lstrip").get<bool>(),
                     entry.at("rstrip").get<bool>(),
                     entry.at("single_word").get<bool>()};
    model->added_ids[token.text] = token.id;
    if (token.normalized) {
      token.text = apply_normalizers(model->normalizers, token.text);
      normalized.push_back(std::move(token));
    } else {
      raw.push_back(std::move(token));
    }
  }
  std::optional<std::string> word;
  if (!json.at("word_class").is_null()) word = json.at("word_class").get<std::string>();
  model->raw_added = AddedTokenMatcher(std::move(raw), word);
  model->normalized_added = AddedTokenMatcher(std::move(normalized), word);
}

}  // namespace

std::string apply_normalizers(const std::vector<NormalizerStep>& steps, std::string_view text) {
  std::string out(text);
  for (const NormalizerStep& step : steps) {
    switch (step.kind) {
      case NormalizerStep::Kind::kForm: {
        std::string normal;
        if (!normalize(out, step.form, &normal))
          throw std::runtime_error("out of memory in Unicode normalisation");
        out = std::move(normal);
        break;
      }
      case NormalizerStep::Kind::kPrepend:
        if (!out.empty()) out.insert(0, step.to);
        break;
      case NormalizerStep::Kind::kReplace:
        replace_all(&out, step.from, step.to);
        break;
    }
  }
  return out;
}

std::unique_ptr<TokenizerModel> read_tokenizer_model(std::string_view text) {
  const Json json = Json::parse(text);
  if (!json.is_object() || json.value("format", "") != "hetcomp-tokenizer") {
    throw std::runtime_error("it is not a compiled tokenizer");
  }
  const int version = json.at("version").get<int>();
  if (version != 1) {
    throw std::runtime_error("its version is " + std::to_string(version) +
                             " and this runtime reads version 1");
  }
  auto owner = std::make_unique<TokenizerModel>();
  TokenizerModel& model = *owner;
  BpeRules rules;
  rules.byte_level = json.at("byte_level").get<bool>();
  rules.ignore_merges = json.at("ignore_merges").get<bool>();
  rules.fuse_unk = json.at("fuse_unk").get<bool>();
  model.decoder = decoder_of(json.at("decoder"));
  auto vocabulary = read_vocabulary(json, rules.byte_level, &model);
  const std::size_t count = model.pieces.size();
  rules.unk_id = optional_id(json.at("unk_id"), count);
  if (!json.at("byte_tokens").is_null()) {
    const Json& list = json.at("byte_tokens");
    if (list.size() != 256) throw std::runtime_error("\"byte_tokens\" is not a list of 256 ids");
    rules.byte_tokens.emplace();
    for (std::size_t i = 0; i < 256; ++i) (*rules.byte_tokens)[i] = optional_id(list[i], count).value_or(-1);
  }
  for (const Json& step : json.at("normalizers")) model.normalizers.push_back(normalizer_of(step));
  model.pretokenizer = Pretokenizer(json.at("pretokenizers"));
  read_added_tokens(json, &model);
  model.prefix = ids_of(json.at("prefix"), count);
  model.suffix = ids_of(json.at("suffix"), count);
  model.bos = optional_id(json.at("bos_id"), count);
  model.eos = optional_id(json.at("eos_id"), count);
  model.bpe.emplace(rules, std::move(vocabulary), read_merges(json.at("merges"), count));
  return owner;
}

}  // namespace hetcomp
