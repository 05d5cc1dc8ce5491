// JSON from a file that is not trusted: every access checks, and a refusal names the value by its path.
#pragma once

#include <cstdint>
#include <limits>
#include <nlohmann/json.hpp>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace hetcomp {

// One value of a document with the path that leads to it, for messages. The document and `where` must outlive
// it.
class CheckedJson {
 public:
  CheckedJson(const nlohmann::json& json, std::string path, const std::string& where)
      : json_(json), path_(std::move(path)), where_(where) {}

  // Throws HETCOMP_BAD_ARTIFACT: "WHERE is damaged: PATH must be EXPECTED; ...".
  [[noreturn]] void refuse(const std::string& expected) const;

  // A member, which must be there.
  CheckedJson operator[](const std::string& key) const;
  // Whether a member is there and not null.
  bool has(const std::string& key) const;

  std::string text() const;
  std::uint64_t number(std::uint64_t low, std::uint64_t high) const;
  std::int64_t integer(std::int64_t low, std::int64_t high) const;
  std::int32_t count(std::int32_t low, std::int32_t high = std::numeric_limits<std::int32_t>::max()) const;
  double real() const;
  bool truth() const;
  // Lower-case hexadecimal of a given length, and the value of 16 digits.
  std::string hex(std::size_t digits) const;
  std::uint64_t hash_value() const;
  // A path that is relative and has no "..".
  std::string inner_path() const;
  std::vector<CheckedJson> elements() const;
  std::vector<std::pair<std::string, CheckedJson>> members() const;

 private:
  const nlohmann::json& json_;
  std::string path_;
  const std::string& where_;
};

bool stays_inside(const std::string& file);

// Throws HETCOMP_BAD_ARTIFACT.
nlohmann::json parse_json(std::string_view text, const std::string& where);

// The value of "schema", [major, minor]: another major version than `read` is refused with advice. make:
// how such a file comes to be.
void check_schema(const CheckedJson& root, int read, const std::string& where,
                  const std::string& make = "compile the model");

}  // namespace hetcomp
