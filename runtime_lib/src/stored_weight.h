// A weight that an artifact refers to instead of having it: rows of other files, and how they become the
// bytes that the kernels read. What is made of them is what compiling makes, by the same code (quantise/).
#pragma once

#include <cstdint>
#include <functional>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "checked_json.h"
#include "source_files.h"

namespace hetcomp {

// `count` rows, `stride` bytes from one to the next.
struct RowRun {
  std::size_t source;
  std::uint64_t offset;
  std::uint64_t count;
  std::uint64_t stride;  // 0: it is one row, for all of them
};
using RowRuns = std::vector<RowRun>;

// Where the words of a row lie: side by side, or `line` bytes from one to the next, beside those of the next
// row.
struct Words {
  std::uint64_t bytes = 0;
  std::uint64_t line = 0;  // 0: side by side
};

// How numbers or codes are stored: one of both.
struct StoredNumbers {
  std::optional<std::int32_t> number_type;  // hetcomp_number_type
  std::int32_t encoding = 0;                // hetcomp_row_encoding
};

struct StoredWeight {
  StoredNumbers numbers;
  std::int32_t format;  // hetcomp_weight_format
  bool row_major;       // f32 numbers one behind the other: rows of one
  bool gate_up;         // layout panels16_glu
  std::uint64_t rows;   // of a matrix
  std::uint64_t columns;
  Words words;
  std::vector<RowRuns> matrices;

  // Where scales lie apart.
  std::int32_t scale_type = 0;  // hetcomp_scale_type
  std::uint64_t scale_columns = 0;
  Words scale_words;
  std::vector<RowRuns> scales;  // of each matrix

  // A weight of `bytes` bytes in memory. Throws Error if it has another size, or lies beyond the sources.
  static StoredWeight parse(const CheckedJson& node, std::uint64_t bytes,
                            const std::vector<SourceRecord>& sources);

  // The run that has the weight's bytes as they are, if there is one that can be used where it is mapped.
  const RowRun* in_place(std::uint64_t bytes) const;

  std::uint64_t row_bytes() const;
  std::uint64_t scale_row_bytes() const;
};

// Makes a weight's bytes piece by piece, as wholes of panels. Any number of threads may do so at once.
class StoredReader {
 public:
  StoredReader(const StoredWeight& weight, const SourceFiles& files);

  std::size_t pieces() const { return pieces_per_matrix_ * weight_.matrices.size(); }
  // Offset of a piece in the weight; that of the one behind the last is the weight's size without padding.
  std::uint64_t offset(std::size_t piece) const;
  // piece_bytes() of it. Throws Error.
  void read(std::size_t piece, std::uint8_t* out) const;
  std::uint64_t piece_bytes(std::size_t piece) const { return offset(piece + 1) - offset(piece); }
  // Whether one of its files is not the one that was compiled from.
  bool touched() const;
  // The file of its first row, for messages.
  const std::filesystem::path& path() const { return files_[weight_.matrices.front().front().source].path(); }

 private:
  const StoredWeight& weight_;
  const SourceFiles& files_;
  std::uint64_t halves_;
  std::uint64_t unit_rows_;  // rows of a half that are packed in one go: of a panel, or numbers of a line
  std::uint64_t unit_bytes_;
  std::uint64_t units_;  // of a half of a matrix
  std::uint64_t units_per_piece_;
  std::size_t pieces_per_matrix_;
};

// Makes the whole weight on so many threads. what: the weight, for messages; verify: it must have the
// XXH3, which must be so in any case where a file was touched. Throws Error.
void read_stored(const StoredReader& reader, const std::string& what, std::span<std::uint8_t> out,
                 bool verify, std::uint64_t xxh3_64, std::int32_t threads);

// Throws Error(HETCOMP_BAD_ARTIFACT): the weight is not what was compiled.
[[noreturn]] void refuse_changed(const StoredReader& reader, const std::string& what);

}  // namespace hetcomp
