// Python's binary operators and slices on template values.
#pragma once

#include "template_tree.h"
#include "template_value.h"

namespace hetcomp {

// kind: kAdd, kSub, kMul, kDiv, kFloorDiv, kMod or kPow. Throws TemplateError where Python raises; integers
// have 64 bits.
Value arithmetic(NodeKind kind, const Value& left, const Value& right);

// value[start:stop:step] of a string, list or tuple; None stands for "not given". Throws TemplateError for
// others.
Value slice(const Value& value, const Value& start, const Value& stop, const Value& step);

}  // namespace hetcomp
