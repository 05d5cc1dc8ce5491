// Byte-pair encoding of one pre-tokenised piece.
#pragma once

#include <array>
#include <cstdint>
#include <mutex>
#include <optional>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

namespace hetcomp {

// (left id, right id) -> rank and merged id. Open addressing: looked up several times for every byte of a
// prompt.
class MergeTable {
 public:
  struct Merge {
    std::int32_t rank;
    std::int32_t id;
  };
  MergeTable() : MergeTable(0) {}
  explicit MergeTable(std::size_t count);
  // A pair that comes twice keeps the later rank, as in HF.
  void insert(std::int32_t left, std::int32_t right, Merge merge);
  const Merge* find(std::int32_t left, std::int32_t right) const;

 private:
  struct Slot {
    std::uint64_t key;
    Merge merge;
  };
  std::size_t start(std::uint64_t key) const;
  std::vector<Slot> slots_;
  std::size_t mask_;
};

struct BpeRules {
  // Start symbols are bytes (byte-level BPE) or characters (SentencePiece style).
  bool byte_level = true;
  bool ignore_merges = false;  // a piece that is a token is that token, whatever the merges say
  bool fuse_unk = false;
  std::optional<std::int32_t> unk_id;
  // Ids of <0x00>..<0xFF> if a character without a token falls back to its bytes; -1: no such token.
  std::optional<std::array<std::int32_t, 256>> byte_tokens;
};

// encode is const and thread safe; the cache of pieces is guarded by a mutex.
class Bpe {
 public:
  Bpe(const BpeRules& rules, std::unordered_map<std::string, std::int32_t> vocabulary, MergeTable merges);

  void encode(std::string_view piece, std::vector<std::int32_t>* ids) const;
  std::optional<std::int32_t> find(std::string_view token) const;

 private:
  std::vector<std::int32_t> start_symbols(std::string_view piece) const;
  void merge(std::vector<std::int32_t>* symbols) const;

  BpeRules rules_;
  std::unordered_map<std::string, std::int32_t> vocabulary_;
  std::array<std::int32_t, 256> single_bytes_;
  MergeTable merges_;

  // Bounded, so that hostile text cannot grow it: 2^16 pieces of at most 64 bytes are under 16 MB.
  static constexpr std::size_t kCachedPieces = 65536;
  static constexpr std::size_t kCachedBytes = 64;
  mutable std::mutex cache_mutex_;
  mutable std::unordered_map<std::string, std::vector<std::int32_t>> cache_;
};

}  // namespace hetcomp
