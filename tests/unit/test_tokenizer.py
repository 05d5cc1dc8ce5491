"""The compiled tokenizer gives the ids and texts of HF tokenizers, and refuses what it cannot do."""

from __future__ import annotations

import json
import random
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

from hetcomp.artifact.split_patterns import to_pcre2
from hetcomp.artifact.text_library import NativeTokenizer
from hetcomp.artifact.tokenizer import CompiledTokenizer, compile_tokenizer
from hetcomp.artifact.tokenizer_parity import parity_texts, prove_parity
from hetcomp.errors import HetcompError

ROOT = Path(__file__).parents[2]
DEMO = ROOT / "models_zoo" / "demo-moe"

QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA3 = QWEN2.replace(r"|\p{N}|", r"|\p{N}{1,3}|")
O200K = "|".join(
    [
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n/]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    ]
)
KIMI = (
    r"[\p{Han}]+|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]*[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]+"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
DEEPSEEK_LETTERS = (
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
    r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
DEEPSEEK_LLM = (r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", r"\s+$", r"[一-龥ࠀ-一가-퟿]+")


def split(pattern: str, behavior: str = "isolated", invert: bool = False) -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Split(Regex(pattern), behavior, invert=invert)


def bytes_only() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)


def byte_level(*steps: pre_tokenizers.PreTokenizer, ignore_merges: bool = False) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*steps, bytes_only()]) if steps else bytes_only()
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def gpt2() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    return tokenizer


def qwen2() -> Tokenizer:
    tokenizer = byte_level(split(QWEN2))
    tokenizer.normalizer = normalizers.NFC()
    return tokenizer


def llama3() -> Tokenizer:
    return byte_level(split(LLAMA3), ignore_merges=True)


def deepseek_v3() -> Tokenizer:
    tokenizer = byte_level(split(r"\p{N}{1,3}"), split(r"[一-龥぀-ゟ゠-ヿ]+"), split(DEEPSEEK_LETTERS))
    tokenizer.normalizer = normalizers.Sequence([])
    return tokenizer


def deepseek_llm() -> Tokenizer:
    steps = [split(pattern) for pattern in DEEPSEEK_LLM]
    return byte_level(*steps, pre_tokenizers.Digits(individual_digits=True))


def odd_splits() -> Tokenizer:
    """Every behaviour of Split, inverted patterns, empty matches, word borders and anchors."""
    return byte_level(
        split(r"\b(?=[A-Z])|x*", "merged_with_next"),
        split(r"[aeiou]", "merged_with_previous"),
        split(r"[^\W\d_]+|[[a-f]\d]", "contiguous", invert=True),
        split(r"[\S&&[^,;]]+", "removed", invert=True),
        pre_tokenizers.Punctuation("isolated"),
        pre_tokenizers.Digits(individual_digits=False),
        pre_tokenizers.Split("  ", "merged_with_next"),
        split(r"(?<=\d)\P{L}{,3}$|[\x41-\u0042]+?"),
    )


def sentencepiece(metaspace: bool) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    if metaspace:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="first", split=False)
    else:
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return tokenizer


FAMILIES: dict[str, Callable[[], Tokenizer]] = {
    "gpt2": gpt2,
    "qwen2": qwen2,
    "llama3": llama3,
    "o200k": lambda: byte_level(split(O200K)),
    "kimi": lambda: byte_level(split(KIMI)),
    "deepseek_v3": deepseek_v3,
    "deepseek_llm": deepseek_llm,
    "odd_splits": odd_splits,
    "bare_bytes": byte_level,
    "llama2": lambda: sentencepiece(metaspace=False),
    "mistral_metaspace": lambda: sentencepiece(metaspace=True),
}
ADDED = [
    AddedToken("<|im_end|>", special=True, normalized=False),
    AddedToken("<|im_end|>x", special=True, normalized=False),
    AddedToken("<s>", special=True, normalized=False),
    AddedToken("<tool_call>", special=False, normalized=False),
    AddedToken("<mask>", special=True, normalized=False, lstrip=True),
    AddedToken("</mask>", special=True, normalized=False, rstrip=True),
    AddedToken("café", special=False, normalized=True),
    AddedToken("the", special=False, normalized=False, single_word=True),
    AddedToken("  both  ", special=False, normalized=True, lstrip=True, rstrip=True),
]


def train(tokenizer: Tokenizer, folder: Path) -> Path:
    """Trains on the parity texts, adds tokens of every flag, saves as a model folder has it."""
    fallback = [f"<0x{byte:02X}>" for byte in range(256)] if tokenizer.model.byte_fallback else []
    special = ["<unk>", *fallback] if fallback else []
    trainer = trainers.BpeTrainer(
        vocab_size=1500 + len(special),
        special_tokens=special,
        initial_alphabet=[] if fallback else pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(parity_texts(1500, [], random.Random(7)), trainer)
    tokenizer.add_tokens(ADDED)
    template = {"single": "<s> $A </mask>", "pair": "<s> $A $B"}
    ids = [(name, tokenizer.token_to_id(name)) for name in ("<s>", "</mask>")]
    with_template = processors.TemplateProcessing(**template, special_tokens=ids)
    if tokenizer.post_processor is not None:
        with_template = processors.Sequence([tokenizer.post_processor, with_template])
    tokenizer.post_processor = with_template
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"bos_token": "<s>", "eos_token": {"content": "<|im_end|>"}}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("family", FAMILIES)
def test_family_has_parity(family: str, tmp_path: Path) -> None:
    folder = train(FAMILIES[family](), tmp_path)
    compiled = compile_tokenizer(folder)
    assert compiled is not None
    assert compiled.bos_token_id is not None
    assert compiled.eos_token_id is not None
    assert prove_parity(compiled, folder, n=3000) >= 3000


def test_demo_model_has_parity() -> None:
    compiled = compile_tokenizer(DEMO)
    assert compiled is not None
    assert (compiled.vocab_size, compiled.bos_token_id, compiled.eos_token_id) == (8192, None, 0)
    assert prove_parity(compiled, DEMO, n=4000) >= 4000


def altered(compiled: CompiledTokenizer, **changes: object) -> CompiledTokenizer:
    data = json.dumps(json.loads(compiled.data) | changes).encode()
    return CompiledTokenizer(data, compiled.vocab_size, compiled.bos_token_id, compiled.eos_token_id)


@pytest.mark.parametrize("part", ["merges", "normalizers", "pretokenizers", "added_tokens"])
def test_parity_proof_notices_a_difference(part: str, tmp_path: Path) -> None:
    folder = train(qwen2(), tmp_path)
    compiled = compile_tokenizer(folder)
    assert compiled is not None
    kept = json.loads(compiled.data)[part]
    # The last merge alone is already a difference.
    wrong = altered(compiled, **{part: kept[:-3] if part == "merges" else []})
    with pytest.raises(HetcompError, match="as HF tokenizers does"):
        prove_parity(wrong, folder, n=2000)


def test_long_words_and_repeated_text_are_fast_and_equal(tmp_path: Path) -> None:
    folder = train(qwen2(), tmp_path)
    compiled = compile_tokenizer(folder)
    assert compiled is not None
    reference = Tokenizer.from_file(str(folder / "tokenizer.json"))
    with NativeTokenizer(compiled.data) as native:
        # A quadratic merge loop would take minutes here.
        for text in ("ab" * 100_000, " " * 200_000, "漢" * 50_000, "\n \n" * 50_000, "<|im_end|>" * 20_000):
            assert native.encode(text) == reference.encode(text, add_special_tokens=False).ids


def test_threads_share_one_tokenizer() -> None:
    compiled = compile_tokenizer(DEMO)
    assert compiled is not None
    texts = list(parity_texts(300, [], random.Random(3)))
    with NativeTokenizer(compiled.data) as native:
        expected = [native.encode(text) for text in texts]
        results: list[list[list[int]]] = []
        threads = [threading.Thread(target=lambda: results.append([native.encode(t) for t in texts])) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert results == [expected] * 4


def test_invalid_utf8_is_refused_with_its_place() -> None:
    compiled = compile_tokenizer(DEMO)
    assert compiled is not None
    with NativeTokenizer(compiled.data) as native:
        for bad in (b"ab\xff", b"\xc0\xaf", b"\xed\xa0\x80", b"\xf4\x90\x80\x80", b"\xe6\xbc"):
            with pytest.raises(HetcompError, match=r"not valid UTF-8 at byte \d"):
                native.encode(bad)
        assert native.decode([-1, 8192, 10**9]) == ""


def test_damaged_compiled_tokenizer_is_refused() -> None:
    compiled = compile_tokenizer(DEMO)
    assert compiled is not None
    good = json.loads(compiled.data)
    damaged: list[bytes] = [b"", b"{", b"[]", b"null", b"\xff\xfe", compiled.data[:-100], b"[" * 100_000]
    damaged += [json.dumps({key: value for key, value in good.items() if key != missing}).encode() for missing in good]
    damaged += [
        altered(compiled, **change).data
        for change in (
            {"version": 2},
            {"format": "other"},
            {"pieces": {"a": 1}},
            {"pieces": ["Ā"]},
            {"pieces": [1]},
            {"merges": [0, 1]},
            {"merges": [0, 1, 99_999]},
            {"merges": [-1, 1, 2]},
            {"merges": ["a", 1, 2]},
            {"merges": [2**40, 1, 2]},
            {"prefix": [10**6]},
            {"byte_tokens": [1]},
            {"added_tokens": [{"id": 1}]},
            {"pretokenizers": [{"kind": "split", "regex": "(", "behavior": "isolated", "invert": False}]},
            {"pretokenizers": [{"kind": "other"}]},
            {"normalizers": [{"kind": "other"}]},
            {"normalizers": [{"kind": "replace", "from": "", "to": "x"}]},
            {"decoder": {}},
        )
    ]
    for data in damaged:
        with pytest.raises(HetcompError, match=r"The compiled tokenizer cannot be read: .+\."):
            NativeTokenizer(data)


def save(tokenizer: Tokenizer, folder: Path) -> Path:
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


@pytest.mark.parametrize(
    ("tokenizer", "named"),
    [
        (lambda: Tokenizer(models.WordPiece({"[UNK]": 0}, unk_token="[UNK]")), "WordPiece"),
        (lambda: Tokenizer(models.Unigram([("a", 0.0)], 0)), "Unigram"),
        (lambda: Tokenizer(models.BPE({"a": 0}, [], end_of_word_suffix="</w>")), "end_of_word_suffix"),
    ],
)
def test_unsupported_models_are_named(tokenizer: Callable[[], Tokenizer], named: str, tmp_path: Path) -> None:
    with pytest.raises(HetcompError, match=named):
        compile_tokenizer(save(tokenizer(), tmp_path))


@pytest.mark.parametrize(
    ("part", "value"),
    [
        ("normalizer", normalizers.Lowercase()),
        ("normalizer", normalizers.Sequence([normalizers.NFC(), normalizers.StripAccents()])),
        ("pre_tokenizer", pre_tokenizers.BertPreTokenizer()),
        ("pre_tokenizer", pre_tokenizers.Sequence([bytes_only(), pre_tokenizers.Digits()])),
        ("decoder", decoders.WordPiece()),
    ],
)
def test_unsupported_parts_are_named(part: str, value: object, tmp_path: Path) -> None:
    tokenizer = qwen2()
    setattr(tokenizer, part, value)
    with pytest.raises(HetcompError, match=r"is not supported; compile without a tokenizer"):
        compile_tokenizer(save(tokenizer, tmp_path))


@pytest.mark.parametrize(
    "pattern", [r"(a)\1", r"\p{Emoji}+", r"[[:alpha:]]", r"a{2}+", r"(?<n>a)", r"\R", r"[^a&&b]", "[a"]
)
def test_untranslatable_patterns_are_refused(pattern: str) -> None:
    with pytest.raises(HetcompError, match="which hetcomp does not translate"):
        to_pcre2(pattern)


def test_missing_and_damaged_files(tmp_path: Path) -> None:
    assert compile_tokenizer(tmp_path) is None
    (tmp_path / "tokenizer.json").write_text('{"model": ')
    with pytest.raises(HetcompError, match=r"cannot be read as a tokenizer"):
        compile_tokenizer(tmp_path)
    save(qwen2(), tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(HetcompError, match=r"is not JSON"):
        compile_tokenizer(tmp_path)


def test_written_file_is_what_the_runtime_reads(tmp_path: Path) -> None:
    compiled = compile_tokenizer(DEMO)
    assert compiled is not None
    path = compiled.write(tmp_path)
    assert path.name == "tokenizer.hetc.json"
    with NativeTokenizer(path.read_bytes()) as native:
        assert native.decode(native.encode("Once upon a time")) == "Once upon a time"
