#include "stored_weight.h"

#include <xxhash.h>

#include <algorithm>
#include <cstring>
#include <exception>
#include <mutex>
#include <utility>

#include "quantise/panel_size.h"
#include "quantise/parallel.h"
#include "quantise/quantise.h"
#include "quantise/row_encoding.h"
#include "status.h"

namespace hetcomp {
namespace {

namespace q = quantise;

// Rows and columns of a matrix, and bytes of a weight: beyond any model, and products stay in range.
constexpr std::uint64_t kMostRows = 1U << 28;
constexpr std::uint64_t kMostBytes = 1ULL << 46;
constexpr std::uint64_t kMostMatrices = 1U << 20;
// Large enough for the disk, small enough to be hashed while it is in the cache.
constexpr std::uint64_t kPiece = 1U << 20;
// Rows apart by at most so many times their size are read together with what lies between them.
constexpr std::uint64_t kReadBetween = 4;
constexpr std::uint64_t kWord = 4;   // bytes of codes that GPTQ has side by side
constexpr std::uint64_t kLine = 16;  // f32 numbers in 64 bytes

struct Named {
  const char* name;
  std::int32_t value;
};
constexpr Named kNumbers[]{{"F32", HETCOMP_F32}, {"F16", HETCOMP_F16}, {"BF16", HETCOMP_BF16}};
constexpr Named kEncodings[]{{"codes", HETCOMP_ROWS_CODES}, {"nibbles", HETCOMP_ROWS_NIBBLES},
                             {"int8", HETCOMP_ROWS_INT8},   {"Q8_0", HETCOMP_ROWS_Q8_0},
                             {"Q5_0", HETCOMP_ROWS_Q5_0},   {"Q4_0", HETCOMP_ROWS_Q4_0},
                             {"MXFP4", HETCOMP_ROWS_MXFP4}, {"Q4_K", HETCOMP_ROWS_Q4_K},
                             {"Q5_K", HETCOMP_ROWS_Q5_K},   {"Q6_K", HETCOMP_ROWS_Q6_K}};
constexpr Named kFormats[]{
    {"f32", HETCOMP_FORMAT_F32}, {"bf16", HETCOMP_FORMAT_BF16}, {"q8", HETCOMP_FORMAT_Q8},
    {"fp8", HETCOMP_FORMAT_FP8}, {"q4", HETCOMP_FORMAT_Q4},     {"mxfp4", HETCOMP_FORMAT_MXFP4},
    {"q4k", HETCOMP_FORMAT_Q4K}, {"q5k", HETCOMP_FORMAT_Q5K},   {"q6k", HETCOMP_FORMAT_Q6K}};
constexpr Named kScales[]{{"F32", HETCOMP_SCALES_F32},
                          {"F16", HETCOMP_SCALES_F16},
                          {"BF16", HETCOMP_SCALES_BF16},
                          {"E8M0", HETCOMP_SCALES_E8M0}};

template <std::size_t kCount>
std::optional<std::int32_t> named(const Named (&names)[kCount], const std::string& name) {
  for (const Named& one : names)
    if (name == one.name) return one.value;
  return std::nullopt;
}

std::int64_t number_bytes(std::int32_t type) { return type == HETCOMP_F32 ? 4 : 2; }

// `bytes` a word, and how far apart they are if the document says so.
Words parse_words(const CheckedJson& node, const char* key, std::uint64_t bytes, std::uint64_t row_bytes) {
  Words words{bytes, 0};
  if (!node.has(key)) return words;
  words.line = node[key].number(bytes, kMostBytes);
  if (row_bytes % bytes != 0) node[key].refuse("absent: rows are no whole words");
  return words;
}

// Bytes from the first to behind the last of a row's.
std::uint64_t extent(std::uint64_t row_bytes, const Words& words) {
  if (words.line == 0) return row_bytes;
  const std::uint64_t lines = row_bytes / words.bytes - 1;
  return lines > kMostBytes / words.line ? kMostBytes : lines * words.line + words.bytes;
}

RowRuns parse_rows(const CheckedJson& node, std::uint64_t rows, std::uint64_t row_bytes, const Words& words,
                   const std::vector<SourceRecord>& sources) {
  const std::uint64_t whole = extent(row_bytes, words);
  RowRuns found;
  std::uint64_t left = rows;
  for (const CheckedJson& entry : node.elements()) {
    const auto fields = entry.elements();
    if (fields.size() != 4) entry.refuse("[source, offset, count, stride]");
    if (sources.empty()) entry.refuse("absent: there are no sources");
    const auto source = static_cast<std::size_t>(fields[0].number(0, sources.size() - 1));
    const std::uint64_t size = sources[source].bytes;
    const RowRun run{source, fields[1].number(0, size), fields[2].number(1, kMostRows),
                     fields[3].number(0, size)};
    const std::uint64_t room = size - run.offset;
    if (whole > room || (run.stride > 0 && run.count - 1 > (room - whole) / run.stride))
      entry.refuse("inside " + sources[source].path + " (" + std::to_string(size) + " bytes)");
    if (words.line != 0 && run.count > 1 && run.stride != words.bytes)
      fields[3].refuse("the bytes of a word, for rows whose words are apart");
    if (run.count > left) entry.refuse("no more than the rest of " + std::to_string(rows) + " rows");
    left -= run.count;
    found.push_back(run);
  }
  if (left != 0) node.refuse("runs of " + std::to_string(rows) + " rows together");
  return found;
}

std::vector<RowRuns> parse_matrices(const CheckedJson& node, std::uint64_t rows, std::uint64_t row_bytes,
                                    const Words& words, const std::vector<SourceRecord>& sources) {
  std::vector<RowRuns> matrices;
  for (const CheckedJson& matrix : node.elements())
    matrices.push_back(parse_rows(matrix, rows, row_bytes, words, sources));
  if (matrices.empty() || matrices.size() > kMostMatrices) node.refuse("a list of at least one matrix");
  return matrices;
}

void parse_numbers(const CheckedJson& node, StoredWeight& weight) {
  weight.numbers.number_type = named(kNumbers, node["numbers"].text());
  if (weight.numbers.number_type) {
    if (weight.format != HETCOMP_FORMAT_F32 && weight.format != HETCOMP_FORMAT_BF16)
      node["format"].refuse("f32 or bf16, for numbers");
    return;
  }
  const auto encoding = named(kEncodings, node["numbers"].text());
  if (!encoding) node["numbers"].refuse("a type of numbers or an encoding of rows");
  weight.numbers.encoding = *encoding;
  const q::RowEncoding rows = q::row_encoding(*encoding);
  if (rows.scales_apart) {
    const auto type = named(kScales, node["scales"].text());
    if (!type) node["scales"].refuse("F32, F16, BF16 or E8M0");
    weight.scale_type = *type;
    weight.scale_columns = node["scale_columns"].number(1, kMostRows);
  } else if (weight.columns % static_cast<std::uint64_t>(rows.block_columns) != 0) {
    node["columns"].refuse("whole blocks of " + std::to_string(rows.block_columns));
  }
  if (weight.row_major || !q::goes_into(*encoding, weight.scale_type, weight.format))
    node["format"].refuse("one that such rows go into as they are");
}

// A word of all rows at a time, `rows` of them from `offset` on.
void gather_words(const File& file, std::uint64_t offset, std::uint64_t rows, std::uint64_t row_bytes,
                  const Words& words, std::byte* to) {
  std::vector<std::byte> beside(rows * words.bytes);
  for (std::uint64_t word = 0; word < row_bytes / words.bytes; ++word) {
    file.read(offset + word * words.line, beside);
    for (std::uint64_t row = 0; row < rows; ++row)
      std::memcpy(to + row * row_bytes + word * words.bytes, beside.data() + row * words.bytes, words.bytes);
  }
}

// The `count` rows from `first` on, side by side.
void gather(const RowRuns& runs, std::uint64_t row_bytes, const Words& words, std::uint64_t first,
            std::uint64_t count, const SourceFiles& files, std::uint8_t* out) {
  std::vector<std::byte> between;
  for (const RowRun& run : runs) {
    if (count == 0) return;
    if (first >= run.count) {
      first -= run.count;
      continue;
    }
    const std::uint64_t rows = std::min(count, run.count - first);
    const std::uint64_t offset = run.offset + first * run.stride;
    auto* const to = reinterpret_cast<std::byte*>(out);
    const File& file = files[run.source];
    if (words.line != 0) {
      gather_words(file, offset, rows, row_bytes, words, to);
    } else if (run.stride == row_bytes) {
      file.read(offset, {to, rows * row_bytes});
    } else if (run.stride == 0) {
      file.read(offset, {to, row_bytes});
      for (std::uint64_t row = 1; row < rows; ++row) std::memcpy(to + row * row_bytes, to, row_bytes);
    } else if (run.stride <= kReadBetween * row_bytes) {
      between.resize((rows - 1) * run.stride + row_bytes);
      file.read(offset, between);
      for (std::uint64_t row = 0; row < rows; ++row)
        std::memcpy(to + row * row_bytes, between.data() + row * run.stride, row_bytes);
    } else {
      for (std::uint64_t row = 0; row < rows; ++row)
        file.read(offset + row * run.stride, {to + row * row_bytes, row_bytes});
    }
    out += rows * row_bytes;
    count -= rows;
    first = 0;
  }
}

void require_done(std::int32_t status) {
  if (status == HETCOMP_QUANTISE_OLD_CPU)
    throw Error(HETCOMP_MISSING_ISA, "Weights are repacked with AVX2 and FMA, which this CPU lacks.");
  if (status < 0)
    throw Error(HETCOMP_BAD_ARTIFACT, "A weight's rows do not make its panels; report this bug.");
}

std::vector<const std::uint8_t*> addresses(const std::vector<std::uint8_t>& rows, std::uint64_t row_bytes) {
  std::vector<const std::uint8_t*> found;
  for (std::uint64_t at = 0; at < rows.size(); at += row_bytes) found.push_back(rows.data() + at);
  return found;
}

}  // namespace

std::uint64_t StoredWeight::row_bytes() const {
  if (numbers.number_type) return columns * static_cast<std::uint64_t>(number_bytes(*numbers.number_type));
  const q::RowEncoding encoding = q::row_encoding(numbers.encoding);
  const auto block = static_cast<std::uint64_t>(encoding.block_columns);
  return (columns + block - 1) / block * static_cast<std::uint64_t>(encoding.block_bytes);
}

std::uint64_t StoredWeight::scale_row_bytes() const {
  return (columns + scale_columns - 1) / scale_columns *
         static_cast<std::uint64_t>(q::scale_bytes(scale_type));
}

StoredWeight StoredWeight::parse(const CheckedJson& node, std::uint64_t bytes,
                                 const std::vector<SourceRecord>& sources) {
  StoredWeight weight{};
  const auto format = named(kFormats, node["format"].text());
  if (!format) node["format"].refuse("a weight format");
  weight.format = *format;
  const std::string layout = node["layout"].text();
  weight.row_major = layout == "row_major";
  weight.gate_up = layout == "panels16_glu";
  if (!weight.row_major && !weight.gate_up && layout != "panels16")
    node["layout"].refuse("row_major, panels16 or panels16_glu");
  weight.rows = node["rows"].number(1, kMostRows);
  weight.columns = node["columns"].number(1, kMostRows);
  if (weight.gate_up && weight.rows % 2 != 0) node["rows"].refuse("even, for gate and up");
  if (weight.row_major && (weight.columns != 1 || weight.format != HETCOMP_FORMAT_F32))
    node.refuse("rows of one f32 number, in row_major");
  parse_numbers(node, weight);
  weight.words = parse_words(node, "line", kWord, weight.row_bytes());
  weight.matrices = parse_matrices(node["matrices"], weight.rows, weight.row_bytes(), weight.words, sources);
  if (weight.row_major && weight.matrices.size() != 1) node["matrices"].refuse("one, in row_major");
  if (weight.scale_type != HETCOMP_SCALES_NONE) {
    const auto scale = static_cast<std::uint64_t>(q::scale_bytes(weight.scale_type));
    weight.scale_words = parse_words(node, "scale_line", scale, weight.scale_row_bytes());
    weight.scales = parse_matrices(node["scale_matrices"], weight.rows, weight.scale_row_bytes(),
                                   weight.scale_words, sources);
    if (weight.scales.size() != weight.matrices.size())
      node["scale_matrices"].refuse("as many as there are matrices");
  }
  const auto rows = static_cast<std::int64_t>(weight.rows);
  const auto columns = static_cast<std::int64_t>(weight.columns);
  const auto each = static_cast<std::uint64_t>(
      weight.row_major ? q::aligned(4 * rows)
                       : q::matrix_bytes(weight.format, rows, columns, weight.gate_up));
  if (each == 0 || each > kMostBytes || weight.matrices.size() != bytes / each || bytes % each != 0)
    node.refuse("a weight of " + std::to_string(bytes) + " bytes");
  return weight;
}

const RowRun* StoredWeight::in_place(std::uint64_t bytes) const {
  if (!row_major || numbers.number_type != HETCOMP_F32 || matrices.front().size() != 1) return nullptr;
  const RowRun& run = matrices.front().front();
  const bool adjacent = words.line == 0 && run.stride == row_bytes() && bytes == rows * row_bytes();
  return adjacent && run.offset % q::kAlignment == 0 ? &run : nullptr;
}

StoredReader::StoredReader(const StoredWeight& weight, const SourceFiles& files)
    : weight_(weight), files_(files), halves_(weight.gate_up ? 2 : 1) {
  const auto columns = static_cast<std::int64_t>(weight.columns);
  unit_rows_ = weight.row_major ? kLine : static_cast<std::uint64_t>(q::kPanelRows);
  unit_bytes_ = weight.row_major ? kLine * sizeof(float)
                                 : static_cast<std::uint64_t>(q::panel_size(weight.format, columns).panel);
  units_ = (weight.rows / halves_ + unit_rows_ - 1) / unit_rows_;
  units_per_piece_ =
      std::clamp<std::uint64_t>(kPiece / std::max<std::uint64_t>(1, halves_ * unit_bytes_), 1, units_);
  pieces_per_matrix_ = static_cast<std::size_t>((units_ + units_per_piece_ - 1) / units_per_piece_);
}

std::uint64_t StoredReader::offset(std::size_t piece) const {
  const std::uint64_t unit = piece % pieces_per_matrix_ * units_per_piece_;
  return (piece / pieces_per_matrix_ * units_ + unit) * halves_ * unit_bytes_;
}

bool StoredReader::touched() const {
  const auto any = [&](const RowRuns& rows) {
    return std::ranges::any_of(rows, [&](const RowRun& run) { return files_.touched(run.source); });
  };
  return std::ranges::any_of(weight_.matrices, any) || std::ranges::any_of(weight_.scales, any);
}

void StoredReader::read(std::size_t piece, std::uint8_t* out) const {
  const std::size_t matrix = piece / pieces_per_matrix_;
  const std::uint64_t first = piece % pieces_per_matrix_ * units_per_piece_ * unit_rows_;
  const std::uint64_t in_half = weight_.rows / halves_;
  const std::uint64_t rows = std::min(units_per_piece_ * unit_rows_, in_half - first);
  const auto read_rows = [&](const RowRuns& runs, std::uint64_t row_bytes, const Words& words) {
    std::vector<std::uint8_t> buffer(halves_ * rows * row_bytes);
    for (std::uint64_t half = 0; half < halves_; ++half)
      gather(runs, row_bytes, words, half * in_half + first, rows, files_,
             buffer.data() + half * rows * row_bytes);
    return buffer;
  };
  std::vector<std::uint8_t> buffer = read_rows(weight_.matrices[matrix], weight_.row_bytes(), weight_.words);
  const auto out_bytes = static_cast<std::int64_t>(piece_bytes(piece));
  const auto columns = static_cast<std::int64_t>(weight_.columns);
  const auto count = static_cast<std::int64_t>(halves_ * rows);
  if (weight_.row_major) {
    // A panel of f32 whose rows are numbers side by side has them in their order.
    const std::uint64_t lines = (rows + kLine - 1) / kLine;
    buffer.resize(lines * kLine * weight_.row_bytes());
    require_done(q::quantise({buffer.data(), kLine, static_cast<std::int64_t>(lines), 1, kLine, nullptr, out,
                              out_bytes, *weight_.numbers.number_type, weight_.format, 0, 1}));
  } else if (weight_.numbers.number_type) {
    require_done(q::quantise({buffer.data(), count, columns, columns, 1, nullptr, out, out_bytes,
                              *weight_.numbers.number_type, weight_.format, weight_.gate_up, 1}));
  } else {
    const auto code_rows = addresses(buffer, weight_.row_bytes());
    std::vector<std::uint8_t> scales;
    std::vector<const std::uint8_t*> scale_rows;
    if (!weight_.scales.empty()) {
      scales = read_rows(weight_.scales[matrix], weight_.scale_row_bytes(), weight_.scale_words);
      scale_rows = addresses(scales, weight_.scale_row_bytes());
    }
    require_done(
        q::repack({code_rows.data(), scale_rows.empty() ? nullptr : scale_rows.data(), count, columns,
                   static_cast<std::int64_t>(weight_.scale_columns), out, out_bytes, weight_.numbers.encoding,
                   weight_.scale_type, weight_.format, weight_.gate_up, 1}));
  }
}

void read_stored(const StoredReader& reader, const std::string& what, std::span<std::uint8_t> out,
                 bool verify, std::uint64_t xxh3_64, std::int32_t threads) {
  std::exception_ptr failure;
  std::mutex mutex;
  q::in_parallel(reader.pieces(), threads, [&](std::size_t piece) {
    try {
      reader.read(piece, out.data() + reader.offset(piece));
    } catch (...) {
      const std::lock_guard lock(mutex);
      if (!failure) failure = std::current_exception();
    }
  });
  if (failure) std::rethrow_exception(failure);
  if ((verify || reader.touched()) && XXH3_64bits(out.data(), out.size()) != xxh3_64)
    refuse_changed(reader, what);
}

void refuse_changed(const StoredReader& reader, const std::string& what) {
  throw Error(
      HETCOMP_BAD_ARTIFACT,
      what + " in " + reader.path().string() +
          " is not what it was when the model was compiled: the file was changed or is damaged; put the "
          "former one back, or compile the model again.");
}

}  // namespace hetcomp
