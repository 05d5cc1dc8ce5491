// Packed adapters for the model of fake_program.cpp: what `hetcomp adapter pack` would write, small and with
// exact results.
#pragma once

#include <xxhash.h>

#include <cstdint>
#include <cstring>
#include <filesystem>
#include <functional>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "fake_artifact.h"
#include "fake_program.h"

namespace hetcomp::fake {

// Changes the head: head[v] += scale * sum over r of b[v][r] * a[r], all whole numbers.
class FakeAdapter {
 public:
  explicit FakeAdapter(std::int32_t seed, std::int64_t rank = 4) : rank_(rank) {
    const auto number = [&](std::int64_t i) { return static_cast<float>((i * 7 + seed * 13) % 5 - 2); };
    for (std::int64_t i = 0; i < rank * kWidth; ++i) a_.push_back(number(i));
    for (std::int64_t i = 0; i < kVocab * rank; ++i) b_.push_back(number(i + 3));
  }

  // `change`: what is wrong about the header; `spoil`: about the data, after their hash was taken or before.
  void write(const std::filesystem::path& path, const std::function<void(nlohmann::json&)>& change = nullptr,
             const std::function<void(std::string&)>& spoil = nullptr, bool hash_after = true) const {
    std::string data = packed();
    if (spoil && hash_after) spoil(data);
    nlohmann::json header{
        {"schema", {2, 0}},
        {"name", "fake"},
        {"plan", kPlanHash},
        {"sha256", std::string(64, 'a')},
        {"bytes", data.size()},
        {"xxh3_64", hex(XXH3_64bits(data.data(), data.size()))},
        {"weights",
         {{{"weight", 1}, {"name", "head"}, {"rank", rank_}, {"scale", 2.0}, {"a", 0}, {"b", a_bytes()}}}}};
    if (change) change(header);
    if (spoil && !hash_after) spoil(data);
    write_file(path, framed(header.dump()) + data);
  }

  // The header with what stands before it, padded.
  static std::string framed(std::string header) {
    while ((24 + header.size()) % 64 != 0) header += ' ';
    std::string frame("HETLORA\x01", 8);
    for (const std::uint64_t number :
         {std::uint64_t{header.size()}, XXH3_64bits(header.data(), header.size())})
      frame.append(reinterpret_cast<const char*>(&number), sizeof number);
    return frame + header;
  }

  // Logits after the last of `ids`.
  std::vector<float> expected(const FakeArtifact& artifact, const std::vector<std::int32_t>& ids) const {
    std::vector<float> logits = artifact.expected(ids);
    const std::vector<float> x = artifact.sums(ids);
    for (std::int64_t v = 0; v < kVocab; ++v)
      for (std::int64_t r = 0; r < rank_; ++r) {
        float h = 0;
        for (std::int64_t d = 0; d < kWidth; ++d)
          h += a_[static_cast<std::size_t>(r * kWidth + d)] * x[static_cast<std::size_t>(d)];
        logits[static_cast<std::size_t>(v)] += 2 * h * b_[static_cast<std::size_t>(v * rank_ + r)];
      }
    return logits;
  }

  std::size_t a_bytes() const { return static_cast<std::size_t>(rank_) * 16 * sizeof(float); }

 private:
  static std::string hex(std::uint64_t hash) {
    char text[17];
    std::snprintf(text, sizeof text, "%016llx", static_cast<unsigned long long>(hash));
    return text;
  }

  std::string packed() const {
    constexpr std::int64_t kPanels = (kVocab + 15) / 16;
    std::vector<float> numbers(static_cast<std::size_t>(rank_ * 16 + kPanels * rank_ * 16));
    for (std::int64_t r = 0; r < rank_; ++r)
      for (std::int64_t d = 0; d < kWidth; ++d)
        numbers[static_cast<std::size_t>(r * 16 + d)] = a_[static_cast<std::size_t>(r * kWidth + d)];
    for (std::int64_t v = 0; v < kVocab; ++v)
      for (std::int64_t r = 0; r < rank_; ++r)
        numbers[static_cast<std::size_t>(rank_ * 16 + (v / 16 * rank_ + r) * 16 + v % 16)] =
            b_[static_cast<std::size_t>(v * rank_ + r)];
    return {reinterpret_cast<const char*>(numbers.data()), numbers.size() * sizeof(float)};
  }

  std::int64_t rank_;
  std::vector<float> a_;  // [rank][kWidth]
  std::vector<float> b_;  // [kVocab][rank]
};

}  // namespace hetcomp::fake
