#include "checked_json.h"

#include <algorithm>
#include <charconv>
#include <filesystem>

#include "status.h"

namespace hetcomp {

void CheckedJson::refuse(const std::string& expected) const {
  std::string path = path_.empty() ? "it" : path_;
  std::ranges::replace(path, '\0', '?');  // a NUL would end the message
  throw Error(HETCOMP_BAD_ARTIFACT, where_ + " is damaged: " + path + " must be " + expected +
                                        "; compile the model again or copy the artifact anew.");
}

CheckedJson CheckedJson::operator[](const std::string& key) const {
  if (!json_.is_object()) refuse("an object");
  const auto found = json_.find(key);
  const std::string path = path_.empty() ? key : path_ + "." + key;
  if (found == json_.end()) {
    static const nlohmann::json kMissing = "missing";
    CheckedJson(kMissing, path, where_).refuse("present");
  }
  return {*found, path, where_};
}

bool CheckedJson::has(const std::string& key) const {
  return json_.is_object() && json_.contains(key) && !json_.at(key).is_null();
}

std::string CheckedJson::text() const {
  if (!json_.is_string()) refuse("a string");
  return json_.get<std::string>();
}

std::uint64_t CheckedJson::number(std::uint64_t low, std::uint64_t high) const {
  const std::string range = "a whole number from " + std::to_string(low) + " to " + std::to_string(high);
  if (!json_.is_number_integer()) refuse(range);
  if (!json_.is_number_unsigned() && json_.get<std::int64_t>() < 0) refuse(range);
  const auto value = json_.get<std::uint64_t>();
  if (value < low || value > high) refuse(range);
  return value;
}

std::int64_t CheckedJson::integer(std::int64_t low, std::int64_t high) const {
  const std::string range = "a whole number from " + std::to_string(low) + " to " + std::to_string(high);
  if (!json_.is_number_integer()) refuse(range);
  if (json_.is_number_unsigned() &&
      json_.get<std::uint64_t>() > static_cast<std::uint64_t>(std::numeric_limits<std::int64_t>::max()))
    refuse(range);
  const auto value = json_.get<std::int64_t>();
  if (value < low || value > high) refuse(range);
  return value;
}

std::int32_t CheckedJson::count(std::int32_t low, std::int32_t high) const {
  return static_cast<std::int32_t>(number(static_cast<std::uint64_t>(low), static_cast<std::uint64_t>(high)));
}

double CheckedJson::real() const {
  if (!json_.is_number()) refuse("a number");
  return json_.get<double>();
}

bool CheckedJson::truth() const {
  if (!json_.is_boolean()) refuse("true or false");
  return json_.get<bool>();
}

std::string CheckedJson::hex(std::size_t digits) const {
  std::string value = text();
  const bool good = value.size() == digits && std::ranges::all_of(value, [](char c) {
                      return (c >= '0' && c <= '9') || (c >= 'a' && c <= 'f');
                    });
  if (!good) refuse(std::to_string(digits) + " hexadecimal digits");
  return value;
}

std::uint64_t CheckedJson::hash_value() const {
  const std::string digits = hex(16);
  std::uint64_t value = 0;
  std::from_chars(digits.data(), digits.data() + digits.size(), value, 16);
  return value;
}

std::string CheckedJson::inner_path() const {
  std::string file = text();
  if (!stays_inside(file)) refuse("a relative path inside the artifact");
  return file;
}

std::vector<CheckedJson> CheckedJson::elements() const {
  if (!json_.is_array()) refuse("a list");
  std::vector<CheckedJson> values;
  values.reserve(json_.size());
  for (std::size_t i = 0; i < json_.size(); ++i)
    values.emplace_back(json_[i], path_ + "[" + std::to_string(i) + "]", where_);
  return values;
}

std::vector<std::pair<std::string, CheckedJson>> CheckedJson::members() const {
  if (!json_.is_object()) refuse("an object");
  std::vector<std::pair<std::string, CheckedJson>> values;
  for (const auto& [key, value] : json_.items())
    values.emplace_back(key, CheckedJson(value, path_ + "." + key, where_));
  return values;
}

bool stays_inside(const std::string& file) {
  if (file.empty() || file.find('\0') != std::string::npos) return false;
  const std::filesystem::path path(file);
  return path.is_relative() && std::ranges::none_of(path, [](const auto& part) { return part == ".."; });
}

nlohmann::json parse_json(std::string_view text, const std::string& where) {
  try {
    return nlohmann::json::parse(text);
  } catch (const nlohmann::json::exception&) {
    throw Error(HETCOMP_BAD_ARTIFACT,
                where + " is not valid JSON: it is damaged or truncated; copy the artifact anew.");
  }
}

void check_schema(const CheckedJson& root, int read, const std::string& where, const std::string& make) {
  const auto schema = root["schema"].elements();
  if (schema.size() != 2) root["schema"].refuse("two numbers, [major, minor]");
  const std::int32_t major = schema[0].count(0);
  const std::int32_t minor = schema[1].count(0);
  if (major == read) return;
  const std::string version = std::to_string(major) + "." + std::to_string(minor);
  if (major > read) {
    throw Error(HETCOMP_NEWER_SCHEMA, where + " has schema " + version + ", this runtime (hetcomp " +
                                          HETCOMP_VERSION + ") reads " + std::to_string(read) +
                                          ".x: update hetcomp or " + make + " with this version.");
  }
  throw Error(HETCOMP_BAD_ARTIFACT,
              where + " has schema " + version + ", which is no longer read: " + make + " again.");
}

}  // namespace hetcomp
