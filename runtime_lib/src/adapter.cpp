#include "adapter.h"

#include <xxhash.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <nlohmann/json.hpp>
#include <span>

#include "checked_json.h"
#include "file.h"
#include "status.h"

namespace hetcomp {
namespace {

constexpr char kMagic[8] = {'H', 'E', 'T', 'L', 'O', 'R', 'A', 1};
constexpr int kSchemaMajor = 2;
// A weight takes some 150 bytes of it.
constexpr std::uint64_t kLargestHeader = 64U << 20;
constexpr std::uint64_t kLargestData = std::uint64_t{1} << 40;
constexpr std::int64_t kPanelRows = 16;

struct Preamble {
  char magic[8];
  std::uint64_t header_bytes;
  std::uint64_t header_xxh3;
};

std::uint64_t padded(std::uint64_t bytes) {
  return (bytes + Manifest::kAlignment - 1) / Manifest::kAlignment * Manifest::kAlignment;
}

[[noreturn]] void refuse(const File& file, const std::string& what) {
  throw Error(HETCOMP_BAD_ARTIFACT, file.path().string() + " " + what);
}

std::string read_header(const File& file) {
  Preamble preamble{};
  if (file.size() < sizeof preamble) refuse(file, "is no adapter that hetcomp packed: it is too short.");
  file.read(0, std::as_writable_bytes(std::span(&preamble, 1)));
  if (std::memcmp(preamble.magic, kMagic, sizeof kMagic) != 0)
    refuse(file, "is no adapter that hetcomp packed: make one with hetcomp adapter pack.");
  if (preamble.header_bytes > std::min(kLargestHeader, file.size() - sizeof preamble))
    refuse(file, "is truncated or damaged: its header does not fit; pack the adapter again.");
  std::string header(preamble.header_bytes, '\0');
  file.read(sizeof preamble, std::as_writable_bytes(std::span(header)));
  if (XXH3_64bits(header.data(), header.size()) != preamble.header_xxh3)
    refuse(file, "is damaged: its header does not have its hash; pack the adapter again.");
  return header;
}

template <class Bits>
bool finite(const std::uint8_t* numbers, std::uint64_t bytes, Bits exponent) {
  bool all = true;
  for (std::uint64_t i = 0; i < bytes; i += sizeof(Bits)) {
    Bits bits;
    std::memcpy(&bits, numbers + i, sizeof bits);
    all &= (bits & exponent) != exponent;
  }
  return all;
}

// Of f32 numbers, or of bf16 ones.
bool finite_floats(const std::uint8_t* numbers, std::uint64_t bytes, std::int32_t number_bytes) {
  return number_bytes == 4 ? finite(numbers, bytes, 0x7f800000U)
                           : finite(numbers, bytes, std::uint16_t{0x7f80});
}

std::int64_t up(std::int64_t n, std::int64_t step) { return (n + step - 1) / step * step; }

// a or b of a weight's pairs: so many blocks of adjacent numbers. Numbers of one byte have scales of
// `scale_bytes` behind each block. The product of the sizes cannot overflow: the program's are those of a
// weight in memory, a GPU's (gpu/adapter_record.cpp) and the rank are bounded.
struct PairPart {
  std::int64_t blocks, numbers, scales;
  std::int32_t number_bytes, scale_bytes;

  std::uint64_t number_part() const { return product(numbers, number_bytes); }
  std::uint64_t scale_part() const { return number_bytes == 1 ? product(scales, scale_bytes) : 0; }
  std::uint64_t bytes() const { return static_cast<std::uint64_t>(blocks) * (number_part() + scale_part()); }
  bool all_finite(const std::uint8_t* data) const {
    if (number_bytes > 1) return finite_floats(data, bytes(), number_bytes);
    bool all = true;
    for (std::int64_t i = 0; i < blocks; ++i, data += number_part() + scale_part())
      all &= finite_floats(data + number_part(), scale_part(), scale_bytes);
    return all;
  }

 private:
  static std::uint64_t product(std::int64_t n, std::int32_t each) {
    return static_cast<std::uint64_t>(n) * static_cast<std::uint64_t>(each);
  }
};

const std::uint8_t* part(const CheckedJson& offset, const Memory& data, const PairPart& what) {
  const std::uint64_t at = offset.number(0, data.size()), bytes = what.bytes();
  if (at % Manifest::kAlignment != 0 || bytes > data.size() - at)
    offset.refuse("a multiple of 64, with " + std::to_string(bytes) + " bytes of the data behind it");
  const std::uint8_t* const found = data.data() + at;
  if (!what.all_finite(found)) offset.refuse("where finite numbers are; there are NaN or infinite ones");
  return found;
}

// Of a weight of that shape; the caller says of which.
GpuPair read_pair(const CheckedJson& entry, const Memory& data, const hetcomp_adaptable& shape,
                  std::int64_t largest_rank) {
  hetcomp_pair pair{};
  pair.rank = entry["rank"].integer(HETCOMP_RANK_STEP, largest_rank);
  if (pair.rank % HETCOMP_RANK_STEP != 0) entry["rank"].refuse("a multiple of 4");
  pair.scale = static_cast<float>(entry["scale"].real());
  if (!std::isfinite(pair.scale)) entry["scale"].refuse("a finite number");
  const std::int64_t panels =
      shape.matrices * shape.halves * (up(shape.out / shape.halves, kPanelRows) / kPanelRows);
  const PairPart a{shape.matrices, pair.rank * up(shape.in, HETCOMP_PAIR_COLUMNS), pair.rank,
                   shape.number_bytes, 4};
  const PairPart b{panels, pair.rank * kPanelRows, kPanelRows, shape.number_bytes, 2};
  pair.a = part(entry["a"], data, a);
  pair.b = part(entry["b"], data, b);
  return {0, pair, a.bytes(), b.bytes()};
}

}  // namespace

Adapter::Adapter(const std::filesystem::path& path, const Manifest& manifest, const hetcomp_program& program,
                 std::span<const GpuAdaptable> gpus) {
  const File file(path);
  const std::string where = path.string();
  const std::string text = read_header(file);
  const nlohmann::json json = parse_json(text, where);
  const CheckedJson header(json, "", where);
  check_schema(header, kSchemaMajor, where, "pack the adapter");
  name_ = header["name"].text();
  sha256_ = header["sha256"].hex(64);
  if (header["plan"].hex(64) != program.plan_hash)
    refuse(file, "was packed for another compiled model than " + manifest.model.name +
                     " as it is here: pack the adapter for this one (hetcomp adapter pack).");
  const std::uint64_t begin = padded(sizeof(Preamble) + text.size());
  const std::uint64_t bytes = header["bytes"].number(1, kLargestData);
  if (begin > file.size() || bytes != file.size() - begin)
    refuse(file, "has " + std::to_string(file.size()) + " bytes, its header says " +
                     std::to_string(begin + bytes) + ": truncated or damaged; pack the adapter again.");
  if (bytes > available_memory())
    throw Error(HETCOMP_OUT_OF_MEMORY, "The adapter " + where + " takes " + in_words(bytes) + ", but " +
                                           in_words(available_memory()) + " of memory are available.");
  data_ = Memory(bytes, "the adapter " + where);
  file.read(begin, std::as_writable_bytes(std::span(data_.data(), bytes)));
  if (XXH3_64bits(data_.data(), bytes) != header["xxh3_64"].hash_value())
    refuse(file, "is damaged: its data do not have their hash; pack the adapter again.");
  read_pairs(header, manifest, program);
  read_gpu_pairs(header, gpus);
  if (weights() == 0) header["weights"].refuse("a list of at least one weight");
}

std::size_t Adapter::weights() const {
  std::size_t n = pairs_.size();
  for (const std::vector<GpuPair>& pairs : on_gpus_) n += pairs.size();
  return n;
}

bool Adapter::changes_gpus() const {
  return std::ranges::any_of(on_gpus_, [](const auto& pairs) { return !pairs.empty(); });
}

void Adapter::read_gpu_pairs(const CheckedJson& header, std::span<const GpuAdaptable> gpus) {
  on_gpus_.resize(gpus.size());
  if (!header.has("gpus")) return;
  const std::vector<CheckedJson> entries = header["gpus"].elements();
  if (entries.size() != gpus.size())
    header["gpus"].refuse("a list of " + std::to_string(gpus.size()) + ", the GPUs with room for adapters");
  for (std::size_t i = 0; i < gpus.size(); ++i) {
    if (entries[i]["device"].text() != gpus[i].device) entries[i]["device"].refuse(gpus[i].device);
    for (const CheckedJson& entry : entries[i]["weights"].elements()) {
      const std::size_t first = on_gpus_[i].empty() ? 0 : on_gpus_[i].back().weight + 1;
      const std::uint64_t index = entry["weight"].number(first, gpus[i].weights.size() - 1);
      const GpuAdaptable::Weight& weight = gpus[i].weights[index];
      if (entry["name"].text() != weight.name)
        entry["name"].refuse(weight.name + ", which is weight " + std::to_string(index));
      GpuPair found = read_pair(entry, data_, weight.shape, up(gpus[i].rank, HETCOMP_RANK_STEP));
      found.weight = index;
      rank_ = std::max(rank_, found.pair.rank);
      on_gpus_[i].push_back(found);
    }
  }
}

void Adapter::read_pairs(const CheckedJson& header, const Manifest& manifest,
                         const hetcomp_program& program) {
  const std::vector<CheckedJson> weights = header["weights"].elements();
  table_.assign(static_cast<std::size_t>(program.n_weights), nullptr);
  pairs_.reserve(weights.size());  // the table points into it
  for (const CheckedJson& entry : weights) {
    const auto index = entry["weight"].number(0, static_cast<std::uint64_t>(program.n_weights) - 1);
    const hetcomp_adaptable shape =
        program.adaptable == nullptr ? hetcomp_adaptable{} : program.adaptable[index];
    if (shape.matrices == 0) entry["weight"].refuse("a weight that adapters can change");
    if (table_[index] != nullptr) entry["weight"].refuse("named once");
    if (entry["name"].text() != manifest.weights[index].name)
      entry["name"].refuse(manifest.weights[index].name + ", which is weight " + std::to_string(index));
    const GpuPair found = read_pair(entry, data_, shape, kLargestRank);
    rank_ = std::max(rank_, found.pair.rank);
    table_[index] = &pairs_.emplace_back(found.pair);
  }
}

}  // namespace hetcomp
