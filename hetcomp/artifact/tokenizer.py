"""Compiles a Hugging Face ``tokenizer.json`` into the form that the C++ runtime reads."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hetcomp.artifact.split_patterns import literal, to_pcre2, word_class
from hetcomp.errors import HetcompError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

Json = dict[str, Any]

TOKENIZER_FILE = "tokenizer.hetc.json"
# The pattern that ByteLevel uses when use_regex is set (GPT-2).
_GPT2_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_ADVICE = "compile without a tokenizer and run with token ids"
_UNICODE_FORMS = ("NFC", "NFD", "NFKC", "NFKD")


@dataclass(frozen=True)
class CompiledTokenizer:
    """What :func:`compile_tokenizer` makes of a model's tokenizer."""

    data: bytes
    """Contents of ``tokenizer.hetc.json``: one JSON object in UTF-8."""
    vocab_size: int
    """Largest id + 1, added tokens included."""
    bos_token_id: int | None
    eos_token_id: int | None

    def write(self, folder: Path) -> Path:
        """Writes ``tokenizer.hetc.json`` into ``folder`` and returns its path."""
        path = folder / TOKENIZER_FILE
        path.write_bytes(self.data)
        return path


def compile_tokenizer(folder: Path) -> CompiledTokenizer | None:
    """The tokenizer of the model in ``folder``, or None if it has no ``tokenizer.json``.

    Done are BPE models, byte-level (GPT-2, Qwen, Llama-3, GPT-OSS, DeepSeek, GLM, OLMoE, MiniMax) or of
    SentencePiece style with byte fallback (Llama-2, Mixtral). Raises HetcompError, naming the part, for
    anything else and for files that cannot be read.
    """
    path = folder / "tokenizer.json"
    if not path.is_file():
        return None
    tokenizer, source = _read(path)
    special = _special_token_names(folder)
    model = source["model"]
    _check_model(model)
    pretokenizers, byte_level = _pretokenizers(source.get("pre_tokenizer"))
    added = sorted(tokenizer.get_added_tokens_decoder().items())
    vocabulary: dict[str, int] = model["vocab"]
    count = max([*vocabulary.values(), *(id for id, _ in added)], default=-1) + 1
    # HF decodes a normalized added token as its normalised text, and skips what has a special token's text.
    texts = {id: tokenizer.id_to_token(id) or token.content for id, token in added}
    special_texts = {token.content for _, token in added if token.special}
    pieces, unreachable = _pieces(vocabulary, texts, count, byte_level)
    prefix, suffix = _post_processor(source.get("post_processor"))
    bos, eos = (tokenizer.token_to_id(name) if name else None for name in special)
    compiled = {
        "format": "hetcomp-tokenizer",
        "version": 1,
        "byte_level": byte_level,
        "pieces": pieces,
        "unreachable": unreachable,
        "special": [id for id, text in texts.items() if text in special_texts],
        "merges": _merges(model, vocabulary),
        "ignore_merges": bool(model.get("ignore_merges")),
        "fuse_unk": bool(model.get("fuse_unk")),
        "unk_id": vocabulary.get(model["unk_token"]) if model.get("unk_token") else None,
        "byte_tokens": _byte_tokens(vocabulary) if model.get("byte_fallback") else None,
        "added_tokens": [
            {
                "id": id, "text": token.content, "special": token.special, "normalized": token.normalized,
                "lstrip": token.lstrip, "rstrip": token.rstrip, "single_word": token.single_word,
            }
            for id, token in added
        ],
        "word_class": word_class() if any(token.single_word for _, token in added) else None,
        "normalizers": _normalizers(source.get("normalizer")),
        "pretokenizers": pretokenizers,
        "decoder": _decoder(source.get("decoder"), byte_level),
        "prefix": prefix,
        "suffix": suffix,
        "bos_id": bos,
        "eos_id": eos,
    }  # fmt: skip
    data = json.dumps(compiled, ensure_ascii=False, separators=(",", ":")).encode()
    return CompiledTokenizer(data, count, bos, eos)


def _read(path: Path) -> tuple[Tokenizer, Json]:
    from tokenizers import Tokenizer

    try:
        text = path.read_text(encoding="utf-8")
        source = json.loads(text)
        tokenizer = Tokenizer.from_str(text)
    except Exception as error:  # tokenizers raises bare Exception
        raise HetcompError(f"{path} cannot be read as a tokenizer: {error}; download it again.") from error
    return tokenizer, source


def _refuse(part: str, kind: object) -> HetcompError:
    return HetcompError(f"The tokenizer's {part} {kind!r} is not supported; {_ADVICE}.")


def _special_token_names(folder: Path) -> tuple[str | None, str | None]:
    """The texts of the BOS and EOS tokens as tokenizer_config.json or special_tokens_map.json name them."""
    names: dict[str, str | None] = {}
    for file in ("special_tokens_map.json", "tokenizer_config.json"):
        path = folder / file
        if not path.is_file():
            continue
        try:
            config = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise HetcompError(f"{path} is not JSON: {error}; download it again.") from error
        for key in ("bos_token", "eos_token"):
            if key in config:
                token = config[key]
                names[key] = token.get("content") if isinstance(token, dict) else token
    return names.get("bos_token"), names.get("eos_token")


def _check_model(model: Json) -> None:
    if model.get("type", "BPE") != "BPE" or "merges" not in model:
        raise _refuse("model", model.get("type"))
    for option in ("continuing_subword_prefix", "end_of_word_suffix", "dropout"):
        if model.get(option):
            raise _refuse("BPE option", option)


def _merges(model: Json, vocabulary: dict[str, int]) -> list[int]:
    """Flat triples (left id, right id, merged id) in order of rank."""
    triples: list[int] = []
    for merge in model["merges"]:
        left, right = merge.split(" ") if isinstance(merge, str) else merge
        triples += (vocabulary[left], vocabulary[right], vocabulary[left + right])
    return triples


def _byte_tokens(vocabulary: dict[str, int]) -> list[int | None]:
    return [vocabulary.get(f"<0x{byte:02X}>") for byte in range(256)]


def _byte_characters() -> dict[str, str]:
    """Byte-level BPE's printable stand-in for each byte -> the code point U+00XX of the byte."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    stand_ins = {chr(byte): chr(byte) for byte in printable}
    return stand_ins | {chr(256 + i): chr(byte) for i, byte in enumerate(others)}


def _pieces(
    vocabulary: dict[str, int], added: dict[int, str], count: int, byte_level: bool
) -> tuple[list[str | None], list[int]]:
    """The tokens by id, and the ids that BPE itself can never give.

    Byte-level: each byte of a token is the code point U+00XX. A token with a character that stands for no
    byte is its own UTF-8 text, as HF's decoder has it.
    """
    characters = _byte_characters()
    pieces: list[str | None] = [None] * count
    unreachable = set(added) - set(vocabulary.values())
    for id, text in [*((id, text) for text, id in vocabulary.items()), *added.items()]:
        if not byte_level:
            pieces[id] = text
        elif all(char in characters for char in text):
            pieces[id] = "".join(characters[char] for char in text)
        else:
            pieces[id] = text.encode().decode("latin-1")
            unreachable.add(id)
    return pieces, sorted(unreachable)


def _flat(part: Json | None, members: str) -> list[Json]:
    """The members of nested Sequences in order."""
    if part is None:
        return []
    if part["type"] == "Sequence":
        return [leaf for member in part[members] for leaf in _flat(member, members)]
    return [part]


def _normalizers(normalizer: Json | None) -> list[Json]:
    steps: list[Json] = []
    for step in _flat(normalizer, "normalizers"):
        if step["type"] in _UNICODE_FORMS:
            steps.append({"kind": step["type"].lower()})
        elif step["type"] == "Prepend":
            steps.append({"kind": "prepend", "text": step["prepend"]})
        elif step["type"] == "Replace" and step["pattern"].get("String"):
            steps.append({"kind": "replace", "from": step["pattern"]["String"], "to": step["content"]})
        else:
            raise _refuse("normalizer", step["type"])
    return steps


def _split(regex: str, behavior: str, invert: bool = False) -> Json:
    return {"kind": "split", "regex": regex, "behavior": behavior, "invert": invert}


def _pretokenizers(pretokenizer: Json | None) -> tuple[list[Json], bool]:
    """The steps, and whether the last one turns text into bytes."""
    steps: list[Json] = []
    byte_level = False
    for step in _flat(pretokenizer, "pretokenizers"):
        kind = step["type"]
        if byte_level:
            raise _refuse("pre-tokenizer behind ByteLevel", kind)
        if kind == "ByteLevel":
            byte_level = True
            if step["add_prefix_space"]:
                steps.append({"kind": "prefix_space"})
            if step.get("use_regex", True):
                steps.append(_split(to_pcre2(_GPT2_PATTERN), "isolated"))
        elif kind == "Split":
            pattern = step["pattern"]
            regex = to_pcre2(pattern["Regex"]) if "Regex" in pattern else literal(pattern["String"])
            steps.append(_split(regex, _behavior(step["behavior"]), step["invert"]))
        elif kind == "Digits":
            # Rust's char::is_numeric is the general category N.
            steps.append(_split(to_pcre2(r"\p{N}"), "isolated" if step["individual_digits"] else "contiguous"))
        elif kind == "Punctuation":
            steps.append(_split(to_pcre2(r"[\p{P}!-/:-@\[-`{-~]"), _behavior(step["behavior"])))
        elif kind == "Metaspace":
            steps.append(_metaspace(step))
        else:
            raise _refuse("pre-tokenizer", kind)
    return steps, byte_level


def _behavior(name: str) -> str:
    """``MergedWithNext`` -> ``merged_with_next``."""
    return "".join(f"_{char.lower()}" if char.isupper() else char for char in name).lstrip("_")


def _metaspace(step: Json) -> Json:
    scheme = step.get("prepend_scheme") or ("always" if step.get("add_prefix_space", True) else "never")
    return {
        "kind": "metaspace",
        "replacement": step["replacement"],
        "scheme": scheme,
        "split": step.get("split", True),
    }


def _decoder(decoder: Json | None, byte_level: bool) -> Json:
    replacements: list[list[str]] = []
    compiled: Json = {
        "byte_level": byte_level, "byte_fallback": False, "replacements": replacements,
        "strip": "", "strip_count": 0, "metaspace": "", "drop_first": False,
    }  # fmt: skip
    steps = _flat(decoder, "decoders")
    if byte_level:
        if [step["type"] for step in steps] != ["ByteLevel"]:
            raise _refuse("decoder for byte-level BPE", [step["type"] for step in steps])
        return compiled
    fused = False
    for step in steps:
        kind = step["type"]
        if kind == "Replace" and step["pattern"].get("String") and not compiled["byte_fallback"]:
            replacements.append([step["pattern"]["String"], step["content"]])
        elif kind == "ByteFallback":
            compiled["byte_fallback"] = True
        elif kind == "Fuse":
            fused = True
        elif kind == "Strip" and fused and step["stop"] == 0:
            compiled["strip"], compiled["strip_count"] = step["content"], step["start"]
        elif kind == "Metaspace":
            compiled["metaspace"] = step["replacement"]
            compiled["drop_first"] = _metaspace(step)["scheme"] != "never"
        else:
            raise _refuse("decoder", kind)
    if not steps:
        raise _refuse("decoder", None)
    return compiled


def _post_processor(processor: Json | None) -> tuple[list[int], list[int]]:
    """The ids put before and behind a single text when special tokens are asked for."""
    prefix: list[int] = []
    suffix: list[int] = []
    for step in _flat(processor, "processors"):
        if step["type"] == "ByteLevel":
            continue  # changes offsets only
        if step["type"] in ("RobertaProcessing", "BertProcessing"):
            prefix, suffix = [step["cls"][1], *prefix], [*suffix, step["sep"][1]]
        elif step["type"] == "TemplateProcessing":
            before: list[int] = []
            behind: list[int] = []
            side = before
            for item in step["single"]:
                if "Sequence" in item:
                    side = behind
                else:
                    side.extend(step["special_tokens"][item["SpecialToken"]["id"]]["ids"])
            prefix, suffix = before + prefix, suffix + behind
        else:
            raise _refuse("post-processor", step["type"])
    return prefix, suffix
