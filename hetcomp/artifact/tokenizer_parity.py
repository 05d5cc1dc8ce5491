"""Proof that a compiled tokenizer gives the same ids and text as HF ``tokenizers``."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

from hetcomp.artifact.text_library import NativeTokenizer
from hetcomp.artifact.tokenizer import CompiledTokenizer
from hetcomp.errors import HetcompError

_SENTENCES = (
    "The quick brown fox jumps over the lazy dog, doesn't it? They'll see what we've done; I'm sure you'd AGREE.",
    "IT'S 2024-03-15T10:22:07.123Z and pi is 3.14159265358979; call +49 (0)30 1234567 or 1,000,000 times.",
    "def f(x: int) -> int:\n\treturn x**2  # squared\n\n\nclass A:\n    '''doc'''\n    def __init__(self): pass\n",
    "#include <vector>\r\nint main() {\r\n  std::vector<int> v{1, 2, 3};\r\n  return v[0] != 1;\r\n}\r\n",
    '{"key": [1, 2.5e-3, null, true], "text": "a\\nb\\u00e9"}',
    "SELECT * FROM t WHERE a>=10 AND b LIKE '%x%'; -- done",
    "Zwölf Boxkämpfer jagen Viktor quer über den großen Sylter Deich.",
    "Les œuvres d'été; ça coûte 12 € à l'hôtel Saint‑Honoré…",
    "Съешь же ещё этих мягких французских булок, да выпей чаю.",
    "我能吞下玻璃而不伤身体。今天是2024年3月15日,天气很好!",
    "いろはにほへと ちりぬるを。カタカナとひらがな、漢字を混ぜた文章です。",
    "키스의 고유조건은 입술끼리 만나야 하고 특별한 기술은 필요치 않다.",
    "נקודות וטעמים בְּרֵאשִׁית ؛ السلام عليكم ورحمة الله ١٢٣٤",
    "ऋषियों को सताने वाले दुष्ट राक्षसों के राजा रावण का सर्वनाश १२३",
    "เป็นมนุษย์สุดประเสริฐเลิศคุณค่า ๑๒๓",
    "👩‍👩‍👧‍👦 👍🏽 🇩🇪 ❤️‍🔥 emoji 🏴󠁧󠁢󠁥󠁮󠁧󠁿 and ¯\\_(ツ)_/¯",
    "https://example.org/a/b?c=d&e=%20f#g user@example.com C:\\Users\\x /usr/lib/x.so.1",
    "e\u0301 a\u030a \u1100\u1161\u11a8 \u212b \u2126 \ufb01 \u0344 \u0958 q\u0307\u0323 x\u0323\u0307",
    "\u200b\u200d\ufeff zero\u00a0width\u2003spaces\u3000and\u2028separators\u0085nel\u180emvs\x0b\x0c\x00\x7f",
    "a  b   c    d\t\te \t f\n\n\ng \n h\r\ri \r\n \r\n j   ",
    "camelCaseAndPascalCase HTTPServer2Go snake_case_name kebab-case ALLCAPS x1y2z3 Ⅷ ½ ² ₃ ① 𝟘𝟙 ٣",
    "K\u212a \u017f'\u017f 'S 'T 'LL 'Re 'vE 'D 'M don\u2019t l\u2019été ''s",
)
_FRAGMENTS = (
    " ", "  ", "   ", "\n", "\n\n", "\r\n", "\t", " \n", "\n ", "'s", "'ll", "'S", "\u2019s", "0", "12",
    "345", "6789", "1234567", "the", " the", "The", "ing", "_", "__", "-", "--", ".", "...", ",", "!",
    "?!", "(", ")", "[", "]", "{", "}", "<", ">", "<|", "|>", "</", "/", "//", "\\", '"', "``", "#", "=",
    "==", "+", "*", "&", "%", "$", "@", "~", "^", "é", "e\u0301", "ß", "漢", "字", "が", "か\u3099", "한",
    "\u1112\u1161\u11ab", "🙂", "👍🏽", "\u200d", "\ufe0f", "\u0301", "\u0323", "\u00a0", "\u3000", "\u2028",
    "\u0085", "\u180e", "\u200b", "\ufeff", "\x00", "\x1b", "\ufffd", "\u0660", "²", "Ⅷ", "ǅ", "ʰ", "ª",
    "K", "\u212a", "\u017f",
)  # fmt: skip


def prove_parity(compiled: CompiledTokenizer, folder: Path, n: int = 2000, library: Path | None = None) -> int:
    """Encodes and decodes at least ``n`` texts with HF ``tokenizers`` and with the C++ runtime.

    Returns the number of texts compared. Raises HetcompError with the first text on which the two differ, and
    if the runtime library (by default that of this installation) is missing.
    """
    from tokenizers import Tokenizer

    reference = Tokenizer.from_file(str(folder / "tokenizer.json"))
    reference.no_truncation()
    reference.no_padding()
    added = [token.content for token in reference.get_added_tokens_decoder().values()]
    compared = 0
    with NativeTokenizer(compiled.data, library) as native:
        byte_level = reference.decoder is not None and "ByteLevel" in type(reference.decoder).__name__
        for text in parity_texts(n, added, random.Random(0)):
            # Special tokens read as text for every fourth, the post-processor for every fourth.
            parse_special, add_special = compared % 4 != 3, compared % 4 == 1
            reference.encode_special_tokens = not parse_special
            expected = reference.encode(text, add_special_tokens=add_special).ids
            got = native.encode(text, parse_special=parse_special, add_special=add_special)
            if got != expected:
                raise _mismatch(folder, "encode", text, expected, got)
            _compare_decoding(reference, native, folder, expected, stream=True)
            compared += 1
        numbers = random.Random(1)
        for _ in range(n // 4):
            # Random ids make byte sequences that are no UTF-8. Streaming shows bytes as soon as they are
            # decided, so it may differ from HF there for byte-fallback tokens.
            ids = [numbers.randrange(compiled.vocab_size) for _ in range(numbers.randint(1, 12))]
            _compare_decoding(reference, native, folder, ids, stream=byte_level)
    return compared


def _compare_decoding(reference: object, native: NativeTokenizer, folder: Path, ids: list[int], stream: bool) -> None:
    for skip in (True, False):
        expected = reference.decode(ids, skip_special_tokens=skip)  # type: ignore[attr-defined]
        for streaming in (False, True) if stream else (False,):
            got = native.decode(ids, skip_special=skip, stream=streaming)
            if got != expected:
                raise _mismatch(folder, "decode", ids, expected, got)


def _mismatch(folder: Path, verb: str, given: object, expected: object, got: object) -> HetcompError:
    return HetcompError(
        f"The compiled tokenizer of {folder} does not {verb} {given!r} as HF tokenizers does (expected "
        f"{expected!r}, got {got!r}); compile without a tokenizer and report this."
    )


def parity_texts(n: int, added_tokens: list[str], numbers: random.Random) -> Iterator[str]:
    """``n`` or a few more texts: fixed sentences, then mixtures of what is known to be hard."""
    yield ""
    yield from _SENTENCES
    for token in added_tokens[:200]:
        yield f"a {token} b{token}c\n{token}{token} ."
    words = sorted({word for sentence in _SENTENCES for word in sentence.split(" ")})
    makers = (
        lambda: "".join(numbers.choice(_FRAGMENTS) for _ in range(numbers.randint(1, 20))),
        lambda: " ".join(numbers.choice(words) for _ in range(numbers.randint(1, 12))),
        lambda: _code_points(numbers, ((0x20, 0x7E),)),
        lambda: _code_points(numbers, ((0x0, 0x24F), (0x300, 0x36F))),
        lambda: _code_points(numbers, ((0x370, 0x1FFF), (0x2000, 0x2BFF))),
        lambda: _code_points(numbers, ((0x3000, 0x9FFF), (0xAC00, 0xD7A3), (0xF900, 0xFFFF))),
        lambda: _code_points(numbers, ((0x1F000, 0x1FAFF), (0x200D, 0x200D), (0xFE0F, 0xFE0F), (0x1F3FB, 0x1F3FF))),
        lambda: _code_points(numbers, ((0x0, 0xD7FF), (0xE000, 0x10FFFF))),
        lambda: _code_points(numbers, ((0x10000, 0x3FFFF), (0xE0000, 0xE01FF))),
        lambda: bytes(numbers.randrange(256) for _ in range(numbers.randint(1, 40))).decode("utf-8", "replace"),
        lambda: _spliced(numbers, words, added_tokens),
        lambda: numbers.choice(_FRAGMENTS) * numbers.randint(1, 60),
    )
    for _ in range(n):
        yield numbers.choice(makers)()


def _code_points(numbers: random.Random, ranges: tuple[tuple[int, int], ...]) -> str:
    return "".join(chr(numbers.randint(*numbers.choice(ranges))) for _ in range(numbers.randint(1, 24)))


def _spliced(numbers: random.Random, words: list[str], added_tokens: list[str]) -> str:
    """Words and fragments with added tokens, and cut-off added tokens, between them."""
    parts: list[str] = []
    for _ in range(numbers.randint(1, 8)):
        parts.append(numbers.choice(words if numbers.random() < 0.5 else _FRAGMENTS))
        if added_tokens and numbers.random() < 0.6:
            token = numbers.choice(added_tokens)
            parts.append(token if numbers.random() < 0.8 else token[: numbers.randint(1, len(token))])
        if numbers.random() < 0.3:
            parts.append(" ")
    return "".join(parts)
