#include "bpe.h"

#include <bit>
#include <queue>
#include <utility>

#include "utf8.h"

namespace hetcomp {

namespace {

constexpr std::uint64_t kEmpty = ~std::uint64_t{0};  // ids are not negative, so no pair looks like this

std::uint64_t key_of(std::int32_t left, std::int32_t right) {
  return (static_cast<std::uint64_t>(static_cast<std::uint32_t>(left)) << 32) |
         static_cast<std::uint32_t>(right);
}

struct Symbol {
  std::int32_t id;
  std::int32_t previous;
  std::int32_t next;
  bool alive;
};

struct Merge {
  std::int32_t rank;
  std::int32_t at;
  std::int32_t id;
};

struct LaterMerge {
  bool operator()(const Merge& a, const Merge& b) const {
    return a.rank != b.rank ? a.rank > b.rank : a.at > b.at;
  }
};

}  // namespace

MergeTable::MergeTable(std::size_t count)
    : slots_(std::bit_ceil(count * 2 + 2), Slot{kEmpty, {0, 0}}), mask_(slots_.size() - 1) {}

std::size_t MergeTable::start(std::uint64_t key) const {
  return static_cast<std::size_t>((key * 0x9E3779B97F4A7C15ull) >> 20) & mask_;
}

void MergeTable::insert(std::int32_t left, std::int32_t right, Merge merge) {
  const std::uint64_t key = key_of(left, right);
  std::size_t at = start(key);
  while (slots_[at].key != kEmpty && slots_[at].key != key) at = (at + 1) & mask_;
  slots_[at] = {key, merge};
}

const MergeTable::Merge* MergeTable::find(std::int32_t left, std::int32_t right) const {
  const std::uint64_t key = key_of(left, right);
  std::size_t at = start(key);
  while (slots_[at].key != kEmpty) {
    if (slots_[at].key == key) return &slots_[at].merge;
    at = (at + 1) & mask_;
  }
  return nullptr;
}

Bpe::Bpe(const BpeRules& rules, std::unordered_map<std::string, std::int32_t> vocabulary, MergeTable merges)
    : rules_(rules), vocabulary_(std::move(vocabulary)), merges_(std::move(merges)) {
  for (int byte = 0; byte < 256; ++byte) {
    const auto id = find(std::string(1, static_cast<char>(byte)));
    single_bytes_[static_cast<std::size_t>(byte)] = id.value_or(-1);
  }
}

std::optional<std::int32_t> Bpe::find(std::string_view token) const {
  const auto found = vocabulary_.find(std::string(token));
  if (found == vocabulary_.end()) return std::nullopt;
  return found->second;
}

std::vector<std::int32_t> Bpe::start_symbols(std::string_view piece) const {
  std::vector<std::int32_t> symbols;
  symbols.reserve(piece.size());
  bool unk_pending = false;
  std::size_t at = 0;
  while (at < piece.size()) {
    const std::size_t length = rules_.byte_level ? 1 : utf8_length(piece.substr(at));
    const std::string_view symbol = piece.substr(at, length);
    at += length;
    const std::int32_t id =
        rules_.byte_level ? single_bytes_[static_cast<unsigned char>(symbol[0])] : find(symbol).value_or(-1);
    if (id >= 0) {
      if (unk_pending) symbols.push_back(*rules_.unk_id);
      unk_pending = false;
      symbols.push_back(id);
      continue;
    }
    if (rules_.byte_tokens) {
      const std::size_t before = symbols.size();
      for (const char byte : symbol) {
        const std::int32_t token = (*rules_.byte_tokens)[static_cast<unsigned char>(byte)];
        if (token >= 0) symbols.push_back(token);
      }
      if (symbols.size() - before == symbol.size()) continue;
      symbols.resize(before);
    }
    if (!rules_.unk_id) continue;  // HF drops what it has no token for
    if (unk_pending && !rules_.fuse_unk) symbols.push_back(*rules_.unk_id);
    unk_pending = true;
  }
  if (unk_pending) symbols.push_back(*rules_.unk_id);
  return symbols;
}

// Lowest rank first, leftmost among equals; a heap over a linked list, so a piece of n bytes costs n log n.
void Bpe::merge(std::vector<std::int32_t>* symbols) const {
  const auto count = static_cast<std::int32_t>(symbols->size());
  std::vector<Symbol> list(symbols->size());
  std::priority_queue<Merge, std::vector<Merge>, LaterMerge> queue;
  const auto offer = [&](std::int32_t at) {
    if (at < 0 || list[static_cast<std::size_t>(at)].next < 0) return;
    const Symbol& left = list[static_cast<std::size_t>(at)];
    const auto* found = merges_.find(left.id, list[static_cast<std::size_t>(left.next)].id);
    if (found) queue.push({found->rank, at, found->id});
  };
  for (std::int32_t i = 0; i < count; ++i) {
    list[static_cast<std::size_t>(i)] = {(*symbols)[static_cast<std::size_t>(i)], i - 1,
                                         i + 1 < count ? i + 1 : -1, true};
  }
  for (std::int32_t i = 0; i < count; ++i) offer(i);
  while (!queue.empty()) {
    const Merge top = queue.top();
    queue.pop();
    Symbol& left = list[static_cast<std::size_t>(top.at)];
    if (!left.alive || left.next < 0) continue;
    Symbol& right = list[static_cast<std::size_t>(left.next)];
    // The pair may have changed since it was queued; HF asks only whether it still merges to the same token.
    const auto* now = merges_.find(left.id, right.id);
    if (!now || now->id != top.id) continue;
    left.id = top.id;
    right.alive = false;
    left.next = right.next;
    if (right.next >= 0) list[static_cast<std::size_t>(right.next)].previous = top.at;
    offer(left.previous);
    offer(top.at);
  }
  symbols->clear();
  for (const Symbol& symbol : list) {
    if (symbol.alive) symbols->push_back(symbol.id);
  }
}

void Bpe::encode(std::string_view piece, std::vector<std::int32_t>* ids) const {
  if (rules_.ignore_merges) {
    if (const auto id = find(piece)) {
      ids->push_back(*id);
      return;
    }
  }
  const bool cacheable = piece.size() <= kCachedBytes;
  std::string key(cacheable ? piece : std::string_view());
  if (cacheable) {
    const std::lock_guard lock(cache_mutex_);
    const auto found = cache_.find(key);
    if (found != cache_.end()) {
      ids->insert(ids->end(), found->second.begin(), found->second.end());
      return;
    }
  }
  std::vector<std::int32_t> symbols = start_symbols(piece);
  merge(&symbols);
  ids->insert(ids->end(), symbols.begin(), symbols.end());
  if (cacheable) {
    const std::lock_guard lock(cache_mutex_);
    if (cache_.size() < kCachedPieces) cache_.emplace(std::move(key), std::move(symbols));
  }
}

}  // namespace hetcomp
