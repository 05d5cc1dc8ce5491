"""Regular expressions of pre-tokenisers: from Oniguruma's Ruby syntax, which HF tokenizers runs, to PCRE2."""

from __future__ import annotations

import functools
import re

from hetcomp.errors import HetcompError

# Code points that Unicode 15.0 to 16.0 added (DerivedAge.txt), as hexadecimal ranges. PCRE2 10.42 (Debian 12)
# knows Unicode 14; where Oniguruma already puts one of these into a property, the range is written out.
# Properties of the older code points are the same in both (compared for all of them with PCRE2 10.42 and
# tokenizers 0.23).
_NEWER_THAN_UNICODE_14 = (
    "897 cf3 ece 1b4e-1b4f 1b7f 1c89-1c8a 2427-2429 2ffc-2fff 31e4-31e5 31ef a7cb-a7cd a7da-a7dc "
    "105c0-105f3 10d40-10d65 10d69-10d85 10d8e-10d8f 10ec2-10ec4 10efc-10eff 1123f-11241 11380-11389 "
    "1138b 1138e 11390-113b5 113b7-113c0 113c2 113c5 113c7-113ca 113cc-113d5 113d7-113d8 113e1-113e2 "
    "116d0-116e3 11b00-11b09 11bc0-11be1 11bf0-11bf9 11f00-11f10 11f12-11f3a 11f3e-11f5a 1342f "
    "13439-13455 13460-143fa 16100-16139 16d40-16d79 18cff 1b132 1b155 1cc00-1ccf9 1cd00-1ceb3 "
    "1d2c0-1d2d3 1df25-1df2a 1e030-1e06d 1e08f 1e4d0-1e4f9 1e5d0-1e5fa 1e5ff 1f6dc 1f774-1f776 "
    "1f77b-1f77f 1f7d9 1f8b2-1f8bb 1f8c0-1f8c1 1fa75-1fa77 1fa87-1fa89 1fa8f 1faad-1faaf 1fabb-1fabf "
    "1fac6 1face-1facf 1fada-1fadc 1fadf 1fae8-1fae9 1faf7-1faf8 1fbcb-1fbef 2b739 2ebf0-2ee5d "
    "31350-323af"
)
_GENERAL_CATEGORIES = frozenset(
    "L Lu Ll Lt Lm Lo M Mn Mc Me N Nd Nl No P Pc Pd Ps Pe Pi Pf Po S Sm Sc Sk So Z Zs Zl Zp".split()
)
_SCRIPTS = frozenset(
    "Han Hiragana Katakana Hangul Latin Cyrillic Greek Arabic Hebrew Thai Devanagari Bengali Tamil Telugu "
    "Lao Khmer Myanmar Tibetan Armenian Georgian Ethiopic Mongolian Bopomofo".split()
)
_LONG_NAMES = {
    "letter": "L", "mark": "M", "number": "N", "punctuation": "P", "symbol": "S", "separator": "Z",
    "uppercaseletter": "Lu", "lowercaseletter": "Ll", "titlecaseletter": "Lt", "modifierletter": "Lm",
    "otherletter": "Lo", "decimalnumber": "Nd",
}  # fmt: skip
# White_Space. PCRE2's \s also takes U+180E, which left White_Space in Unicode 6.3.
_SPACE = r"\x{9}-\x{d}\x{20}\x{85}\x{a0}\x{1680}\x{2000}-\x{200a}\x{2028}\x{2029}\x{202f}\x{205f}\x{3000}"
_NOT_SPACE = (
    r"\x{0}-\x{8}\x{e}-\x{1f}\x{21}-\x{84}\x{86}-\x{9f}\x{a1}-\x{167f}\x{1681}-\x{1fff}\x{200b}-\x{2027}"
    r"\x{202a}-\x{202e}\x{2030}-\x{205e}\x{2060}-\x{2fff}\x{3001}-\x{d7ff}\x{e000}-\x{10ffff}"
)
_SIMPLE_ESCAPES = {
    "n": r"\n", "r": r"\r", "t": r"\t", "f": r"\f", "a": r"\x{7}", "e": r"\x{1b}", "v": r"\x{b}",
}  # fmt: skip
_GROUP_OPENINGS = ("(?:", "(?=", "(?!", "(?<=", "(?<!", "(?>")


def to_pcre2(pattern: str) -> str:
    """The PCRE2 pattern (UTF, UCP, no other options) that matches what ``pattern`` matches in HF tokenizers.

    Raises HetcompError naming the first construct that is not translated.
    """
    return _Translation(pattern).run()


def literal(text: str) -> str:
    """A PCRE2 pattern for exactly this text."""
    return "".join(re.escape(c) if c.isascii() else c for c in text)


def word_class() -> str:
    r"""A PCRE2 class for one word character as Rust's ``\w``, which finds single_word tokens, defines it."""
    members = r"\p{Alphabetic}\p{M}\p{Nd}\p{Pc}"
    # Oniguruma has no Join_Control in its \w, and has all of N.
    return f"[{members}{_newer_members(f'[{members}]')}" + r"\x{200c}\x{200d}]"


def _ranges(spec: str) -> list[int]:
    points: list[int] = []
    for item in spec.split():
        low, _, high = item.partition("-")
        points.extend(range(int(low, 16), int(high or low, 16) + 1))
    return points


@functools.cache
def _newer_members(onig_class: str) -> str:
    """PCRE2 class members for the code points newer than Unicode 14 that ``onig_class`` contains."""
    from tokenizers import Regex, pre_tokenizers

    points = _ranges(_NEWER_THAN_UNICODE_14)
    split = pre_tokenizers.Split(Regex(onig_class), behavior="removed")
    outside = {char for word, _ in split.pre_tokenize_str("".join(map(chr, points))) for char in word}
    members: list[list[int]] = []
    for point in points:
        if chr(point) in outside:
            continue
        if members and members[-1][1] == point - 1:
            members[-1][1] = point
        else:
            members.append([point, point])
    return "".join(f"\\x{{{low:x}}}" if low == high else f"\\x{{{low:x}}}-\\x{{{high:x}}}" for low, high in members)


def _word_members() -> str:
    return r"\p{Alphabetic}\p{M}\p{N}\p{Pc}" + _newer_members(r"\w")


class _Translation:
    def __init__(self, pattern: str) -> None:
        self._pattern = pattern
        self._at = 0

    def run(self) -> str:
        out: list[str] = []
        while self._at < len(self._pattern):
            out.append(self._item())
        return "".join(out)

    def _refuse(self, construct: str) -> HetcompError:
        return HetcompError(
            f"The tokenizer's pattern {self._pattern!r} uses {construct} at offset {self._at}, "
            "which hetcomp does not translate; compile without a tokenizer and run with token ids."
        )

    def _peek(self, count: int = 1) -> str:
        return self._pattern[self._at : self._at + count]

    def _take(self, count: int = 1) -> str:
        taken = self._peek(count)
        self._at += count
        return taken

    def _item(self) -> str:
        char = self._peek()
        if char == "\\":
            return self._escape()
        if char == "[":
            return self._class()
        if char == "(":
            return self._group()
        if char == "{":
            return self._interval()
        if char in "^$":
            self._at += 1
            return f"(?m:{char})"  # Ruby's anchors are per line
        return self._take()

    def _group(self) -> str:
        for opening in _GROUP_OPENINGS:
            if self._pattern.startswith(opening, self._at):
                return self._take(len(opening))
        flags = re.compile(r"\(\?(-?i|m|mi|im)?([:)])").match(self._pattern, self._at)
        if flags:
            self._at = flags.end()
            return f"(?{(flags[1] or '').replace('m', 's')}{flags[2]}"  # Ruby's m is "dot matches newline"
        if self._peek(2) == "(?":
            raise self._refuse(f"the group {self._peek(4)!r}")
        return self._take()

    def _interval(self) -> str:
        match = re.compile(r"\{(\d*)(,?)(\d*)\}").match(self._pattern, self._at)
        if not match or not (match[1] or match[3]):
            self._at += 1
            return r"\{"
        self._at = match.end()
        # Behind an interval Ruby reads + as one more repetition and {n}? as "optional"; PCRE2 does not.
        if self._peek() == "+" or (self._peek() == "?" and not match[2]):
            raise self._refuse(f"{self._peek()!r} behind an interval")
        return f"{{{match[1] or '0'}{match[2]}{match[3]}}}"

    def _escape(self) -> str:
        members, negated = self._escaped_members()
        if members is None:
            letter = self._pattern[self._at - 1]
            if letter in "bB":
                word = f"[{_word_members()}]"
                inside = f"(?:(?<={word})(?={word})|(?<!{word})(?!{word}))"
                return inside if letter == "B" else f"(?:(?<={word})(?!{word})|(?<!{word})(?={word}))"
            return f"\\{letter}"  # \A and \z
        if not negated and _is_single(members):
            return members
        return f"[{'^' if negated else ''}{members}]"

    def _escaped_members(self) -> tuple[str | None, bool]:
        """What stands behind a backslash as members of a class, and whether they are to be negated.

        None if it is an assertion (then ``_at`` is behind its letter).
        """
        self._at += 1
        char = self._take()
        if char in "pP":
            return self._property(negated=char == "P")
        if char in "sS":
            return (_SPACE if char == "s" else _NOT_SPACE), False
        if char in "dD":
            return r"\p{Nd}" + _newer_members(r"\d"), char == "D"
        if char in "wW":
            return _word_members(), char == "W"
        if char in _SIMPLE_ESCAPES:
            return _SIMPLE_ESCAPES[char], False
        if char in "xu":
            digits = "{4}" if char == "u" else "{1,2}"
            code = re.compile(r"\{([0-9A-Fa-f]+)\}|([0-9A-Fa-f]" + digits + ")")
            match = code.match(self._pattern, self._at)
            # A two-digit \x above 7F is a raw byte to Oniguruma.
            if not match or (char == "x" and match[2] and int(match[2], 16) > 0x7F):
                raise self._refuse(f"\\{char}")
            self._at = match.end()
            return f"\\x{{{(match[1] or match[2]).lower()}}}", False
        if char in "bBAz":
            return None, False
        if char.isalnum() or not char:
            self._at -= 1
            raise self._refuse(f"\\{char}")
        return (f"\\{char}" if char.isascii() else char), False

    def _property(self, negated: bool) -> tuple[str, bool]:
        match = re.compile(r"\{(\^?)([A-Za-z_ ]+)\}").match(self._pattern, self._at)
        if not match:
            raise self._refuse("an unusual \\p")
        name = _LONG_NAMES.get(match[2].replace("_", "").replace(" ", "").lower(), match[2])
        if name not in _GENERAL_CATEGORIES and name not in _SCRIPTS:
            raise self._refuse(f"the property \\p{{{match[2]}}}")
        self._at = match.end()
        known = f"\\p{{{name}}}" if name in _GENERAL_CATEGORIES else f"\\p{{sc:{name}}}"
        return known + _newer_members(f"\\p{{{name}}}"), negated != bool(match[1])

    def _class(self) -> str:
        """A bracketed class; ``[a&&b]`` becomes a lookahead for b in front of the class a."""
        self._at += 1
        negated = self._peek() == "^"
        if negated:
            self._at += 1
        parts = [[self._class_part()]]
        while self._peek() != "]":
            if self._peek(2) == "&&":
                self._at += 2
                parts.append([])
            elif not self._peek():
                raise self._refuse("a class without an end")
            else:
                parts[-1].append(self._class_part())
        self._at += 1
        if len(parts) == 1:
            return self._union(parts[0], negated)
        if negated:
            raise self._refuse("a negated class with &&")
        conditions = [self._union(part, negated=False) for part in parts]
        return f"(?:{''.join(f'(?={condition})' for condition in conditions[1:])}{conditions[0]})"

    def _class_part(self) -> tuple[str, bool]:
        """Members and whether they stand negated (``\\P{L}``, ``[^b]``) inside the class."""
        char = self._peek()
        if char == "]":
            raise self._refuse("']' at the start of a class")
        if self._peek(2) == "[:":
            raise self._refuse("a POSIX class")
        if char == "[":
            nested = _Translation(self._pattern)
            nested._at = self._at
            text = nested._class()
            self._at = nested._at
            if text.startswith("(?:"):
                raise self._refuse("&& inside a nested class")
            return (text[2:-1], True) if text.startswith("[^") else (text[1:-1], False)
        if char == "\\":
            if self._peek(2) in ("\\b", "\\B", "\\A", "\\z"):
                raise self._refuse(f"{self._peek(2)} in a class")
            members, negated = self._escaped_members()
            assert members is not None
            return members, negated
        if self._peek(2) == "--":
            raise self._refuse("'--' in a class")
        self._at += 1
        return (f"\\{char}" if char in "[^" else char), False

    def _union(self, parts: list[tuple[str, bool]], negated: bool) -> str:
        plain = "".join(members for members, inverse in parts if not inverse)
        inverted = [members for members, inverse in parts if inverse]
        if not inverted:
            return f"[{'^' if negated else ''}{plain}]"
        if len(inverted) == 1 and not plain:
            return f"[{'' if negated else '^'}{inverted[0]}]"
        # a union with a complement: "one character that is in one of these" / "in none of these"
        choices = ([f"[{plain}]"] if plain else []) + [f"[^{members}]" for members in inverted]
        if negated:
            return "(?:" + "".join(f"(?!{choice})" for choice in choices) + r"[\x{0}-\x{10ffff}])"
        return f"(?:{'|'.join(choices)})"


def _is_single(members: str) -> bool:
    """Whether the members are one character, which may stand outside of a class as it is."""
    return re.fullmatch(r"[^\\]|\\(?:[^pPx]|x\{[0-9a-f]+\})", members) is not None
