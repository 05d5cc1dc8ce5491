#include "template_arithmetic.h"

#include <algorithm>
#include <cmath>

#include "template_text.h"

namespace hetcomp {

namespace {

// A repeated text or list beyond this is refused: the template has lost its way.
constexpr std::int64_t kLongestRepeat = 1 << 20;

[[noreturn]] void refuse(const char* sign, const Value& left, const Value& right) {
  for (const Value* side : {&left, &right}) {
    if (const auto* missing = side->as<Undefined>()) throw TemplateError(missing->what);
  }
  throw TemplateError(std::string("'") + sign + "' does not work between " + type_name(left) + " and " +
                      type_name(right));
}

[[noreturn]] void overflow() { throw TemplateError("an integer needs more than 64 bits"); }

std::int64_t floor_div(std::int64_t a, std::int64_t b) {
  if (b == -1) {
    std::int64_t out = 0;
    if (__builtin_sub_overflow(std::int64_t{0}, a, &out)) overflow();
    return out;
  }
  const std::int64_t quotient = a / b;
  return a % b != 0 && (a < 0) != (b < 0) ? quotient - 1 : quotient;
}

std::int64_t floor_mod(std::int64_t a, std::int64_t b) {
  if (b == -1) return 0;
  const std::int64_t remainder = a % b;
  return remainder != 0 && (remainder < 0) != (b < 0) ? remainder + b : remainder;
}

Value power(const Value& left, const Value& right) {
  if (!left.is_integer() || !right.is_integer() || right.integer() < 0) {
    return Value(std::pow(left.number(), right.number()));
  }
  std::int64_t out = 1;
  for (std::int64_t i = 0; i < right.integer(); ++i) {
    if (__builtin_mul_overflow(out, left.integer(), &out)) overflow();
    if (out == 0 || (out == 1 && left.integer() == 1)) break;
    if (left.integer() == -1) return Value(std::int64_t{right.integer() % 2 == 0 ? 1 : -1});
  }
  return Value(out);
}

Value divided(NodeKind kind, const Value& left, const Value& right) {
  if (right.number() == 0) throw TemplateError("division by zero");
  if (kind == NodeKind::kDiv) return Value(left.number() / right.number());
  if (left.is_integer() && right.is_integer()) {
    return Value(kind == NodeKind::kMod ? floor_mod(left.integer(), right.integer())
                                        : floor_div(left.integer(), right.integer()));
  }
  const double quotient = std::floor(left.number() / right.number());
  if (kind == NodeKind::kFloorDiv) return Value(quotient);
  const double remainder = std::fmod(left.number(), right.number());
  return Value(remainder != 0 && (remainder < 0) != (right.number() < 0) ? remainder + right.number()
                                                                         : remainder);
}

Value numbers(NodeKind kind, const Value& left, const Value& right) {
  const bool whole = left.is_integer() && right.is_integer();
  std::int64_t out = 0;
  switch (kind) {
    case NodeKind::kAdd:
      if (!whole) return Value(left.number() + right.number());
      if (__builtin_add_overflow(left.integer(), right.integer(), &out)) overflow();
      return Value(out);
    case NodeKind::kSub:
      if (!whole) return Value(left.number() - right.number());
      if (__builtin_sub_overflow(left.integer(), right.integer(), &out)) overflow();
      return Value(out);
    case NodeKind::kMul:
      if (!whole) return Value(left.number() * right.number());
      if (__builtin_mul_overflow(left.integer(), right.integer(), &out)) overflow();
      return Value(out);
    case NodeKind::kPow:
      return power(left, right);
    default:
      return divided(kind, left, right);
  }
}

Value repeated(const Value& value, std::int64_t times) {
  times = std::max<std::int64_t>(times, 0);
  const std::int64_t size = value.text() ? static_cast<std::int64_t>(value.text()->size()) : length(value);
  if (size > 0 && times > kLongestRepeat / size) throw TemplateError("a repeated value is too long");
  std::string text;
  std::vector<Value> items;
  for (std::int64_t i = 0; i < times && size > 0; ++i) {
    if (value.text()) {
      text += *value.text();
    } else {
      const auto& more = value.sequence()->items;
      items.insert(items.end(), more.begin(), more.end());
    }
  }
  return value.text() ? Value(std::move(text))
                      : Value::make_sequence(std::move(items), value.sequence()->kind);
}

bool is_indexed(const Value& value) {
  return value.text() || (value.sequence() && value.sequence()->kind < Sequence::Kind::kView);
}

const char* sign_of(NodeKind kind) {
  switch (kind) {
    case NodeKind::kAdd:
      return "+";
    case NodeKind::kSub:
      return "-";
    case NodeKind::kMul:
      return "*";
    case NodeKind::kDiv:
      return "/";
    case NodeKind::kFloorDiv:
      return "//";
    case NodeKind::kMod:
      return "%";
    default:
      return "**";
  }
}

}  // namespace

Value arithmetic(NodeKind kind, const Value& left, const Value& right) {
  if (left.is_number() && right.is_number()) return numbers(kind, left, right);
  if (kind == NodeKind::kAdd && left.text() && right.text()) return Value(*left.text() + *right.text());
  if (kind == NodeKind::kAdd && is_indexed(left) && is_indexed(right) && left.sequence() &&
      right.sequence() && left.sequence()->kind == right.sequence()->kind) {
    std::vector<Value> items = left.sequence()->items;
    items.insert(items.end(), right.sequence()->items.begin(), right.sequence()->items.end());
    return Value::make_sequence(std::move(items), left.sequence()->kind);
  }
  if (kind == NodeKind::kMul && is_indexed(left) && right.is_integer())
    return repeated(left, right.integer());
  if (kind == NodeKind::kMul && left.is_integer() && is_indexed(right))
    return repeated(right, left.integer());
  refuse(sign_of(kind), left, right);
}

Value slice(const Value& value, const Value& start, const Value& stop, const Value& step) {
  if (const auto* missing = value.as<Undefined>()) throw TemplateError(missing->what);
  if (!is_indexed(value)) throw TemplateError(type_name(value) + " has no slices");
  const auto given = [](const Value& bound, std::int64_t otherwise) {
    if (bound.is_none()) return otherwise;
    if (!bound.is_integer()) throw TemplateError("a slice index is " + type_name(bound));
    return bound.integer();
  };
  const std::int64_t stride = given(step, 1);
  if (stride == 0) throw TemplateError("slice step cannot be zero");
  const std::int64_t count = length(value);
  const auto bound = [&](const Value& index, std::int64_t otherwise) {
    if (index.is_none()) return otherwise;
    const std::int64_t at = given(index, 0);
    const std::int64_t low = stride > 0 ? 0 : -1;
    return std::clamp(at < 0 ? std::max(at, -count - 1) + count : at, low, stride > 0 ? count : count - 1);
  };
  const std::int64_t from = bound(start, stride > 0 ? 0 : count - 1);
  const std::int64_t to = bound(stop, stride > 0 ? count : -1);
  const std::vector<Value> items = iterate(value);
  std::string text;
  std::vector<Value> picked;
  for (std::int64_t i = from; stride > 0 ? i < to : i > to;) {
    const Value& item = items[static_cast<std::size_t>(i)];
    if (value.text()) {
      text += *item.text();
    } else {
      picked.push_back(item);
    }
    if (__builtin_add_overflow(i, stride, &i)) break;
  }
  return value.text() ? Value(std::move(text))
                      : Value::make_sequence(std::move(picked), value.sequence()->kind);
}

}  // namespace hetcomp
