"""The tokenizer and chat template of a GGUF file, as the files that Hugging Face's libraries read."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hetcomp.errors import HetcompError
from hetcomp.frontend.gguf.header import shown
from hetcomp.frontend.gguf.model_files import ModelFiles
from hetcomp.frontend.gguf.pre_tokenizers import PRE_TOKENIZERS, PreTokenizer

Json = dict[str, Any]

# llama_token_type.
_UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED = 2, 3, 4, 5
_ADVICE = "give the model's own with --tokenizer FOLDER"
_SPACE = "\u2581"  # SentencePiece's


def write_tokenizer(files: ModelFiles, folder: Path) -> None:
    """Writes tokenizer_config.json, with the chat template, and, if the file has a tokenizer, tokenizer.json. Raises
    HetcompError, with the former written, for a tokenizer of another kind than byte-level BPE and SentencePiece's BPE,
    and for a damaged one."""
    (folder / "tokenizer_config.json").write_text(json.dumps(_config(files)), encoding="utf-8")
    if "tokenizer.ggml.model" not in files.facts:
        return
    original = files.get("tokenizer.huggingface.json", str)
    text = original or json.dumps(_tokenizer(files), ensure_ascii=False)
    (folder / "tokenizer.json").write_text(text, encoding="utf-8")


def _config(files: ModelFiles) -> Json:
    templates = {"default": files.get("tokenizer.chat_template", str)}
    if "tokenizer.chat_templates" in files.facts:
        for name in files.texts("tokenizer.chat_templates"):
            templates[name] = files.get(f"tokenizer.chat_template.{name}", str)
    found = [{"name": name, "template": text} for name, text in templates.items() if text is not None]
    config: Json = {"chat_template": found} if templates["default"] is not None else {}
    tokens = files.facts.get("tokenizer.ggml.tokens")
    for name, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
        number = files.get(f"tokenizer.ggml.{key}_token_id", int)
        if number is not None and isinstance(tokens, list) and 0 <= number < len(tokens):
            config[f"{name}_token"] = tokens[number]
    return config


def _tokenizer(files: ModelFiles) -> Json:
    kind = files.need("tokenizer.ggml.model", str)
    if kind not in ("gpt2", "llama"):
        raise HetcompError(f"{files.path} has a tokenizer of the kind {shown(kind)}, which is not read; {_ADVICE}.")
    tokens = files.texts("tokenizer.ggml.tokens")
    types = files.numbers("tokenizer.ggml.token_type") or [1] * len(tokens)
    if len(types) != len(tokens) or len(set(tokens)) != len(tokens):
        raise HetcompError(f"{files.path} has tokens without a type, or the same token twice; {_ADVICE}.")
    # What the converter filled the vocabulary with is in no text.
    vocabulary = {token: i for i, (token, t) in enumerate(zip(tokens, types, strict=True)) if t != _UNUSED}
    added = [
        {
            "id": i, "content": token, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False,
            "special": types[i] != _USER_DEFINED,
        }
        for token, i in vocabulary.items()
        if types[i] in (_CONTROL, _USER_DEFINED) or (types[i] == _UNKNOWN and kind == "llama")
    ]  # fmt: skip
    made = _byte_level(files, vocabulary) if kind == "gpt2" else _sentencepiece(files, vocabulary, tokens)
    return {"version": "1.0", "truncation": None, "padding": None, "added_tokens": added} | made


def _byte_level(files: ModelFiles, vocabulary: dict[str, int]) -> Json:
    name = files.get("tokenizer.ggml.pre", str) or "default"
    pre = PRE_TOKENIZERS.get(name)
    if pre is None:
        raise HetcompError(
            f"{files.path} has a tokenizer that splits texts as {shown(name)}, which is not read (known are "
            f"{', '.join(PRE_TOKENIZERS)}); {_ADVICE}."
        )
    model = _bpe(vocabulary, _merges(files), ignore_merges=pre.ignore_merges)
    return {
        "normalizer": {"type": "NFC"} if pre.nfc else None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": _splits(pre)},
        "post_processor": _post_processor(files, vocabulary, pre.add_bos),
        "decoder": _bytes(True),
        "model": model,
    }


def _splits(pre: PreTokenizer) -> list[Json]:
    splits = [
        {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
        for pattern in pre.patterns
    ]
    return [*splits, _bytes(not splits)]


def _bytes(use_regex: bool) -> Json:
    return {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": use_regex}


def _sentencepiece(files: ModelFiles, vocabulary: dict[str, int], tokens: Sequence[str]) -> Json:
    if files.get("tokenizer.ggml.remove_extra_whitespaces", bool):
        raise HetcompError(f"{files.path} has a tokenizer that drops white space, which is not read; {_ADVICE}.")
    prefix = files.get("tokenizer.ggml.add_space_prefix", bool) is not False
    unknown = files.get("tokenizer.ggml.unknown_token_id", int) or 0
    merges = _merges(files) if "tokenizer.ggml.merges" in files.facts else _merges_of_scores(files, vocabulary)
    to_space = {"type": "Replace", "pattern": {"String": _SPACE}, "content": " "}
    from_space = {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE}
    strip = {"type": "Strip", "content": " ", "start": 1, "stop": 0}
    decoders: list[Json] = [to_space, {"type": "ByteFallback"}, {"type": "Fuse"}, *([strip] if prefix else [])]
    normalizers: list[Json] = [*([{"type": "Prepend", "prepend": _SPACE}] if prefix else []), from_space]
    options = {"unk_token": tokens[unknown] if unknown < len(tokens) else None, "fuse_unk": True, "byte_fallback": True}
    return {
        "normalizer": {"type": "Sequence", "normalizers": normalizers},
        "pre_tokenizer": None,
        "post_processor": _post_processor(files, vocabulary, True),
        "decoder": {"type": "Sequence", "decoders": decoders},
        "model": _bpe(vocabulary, merges, **options),
    }


def _bpe(vocabulary: dict[str, int], merges: list[list[str]], **options: object) -> Json:
    usual = {
        "type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
        "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": False,
    }  # fmt: skip
    return usual | options | {"vocab": vocabulary, "merges": merges}


def _merges(files: ModelFiles) -> list[list[str]]:
    """Pairs; a token may begin with a space, but has none further on."""
    texts = files.texts("tokenizer.ggml.merges")
    at = [text.find(" ", 1) for text in texts]
    if -1 in at:
        raise HetcompError(f"{files.path} has the merge {shown(texts[at.index(-1)])}, which is no pair; {_ADVICE}.")
    return [[text[:i], text[i + 1 :]] for text, i in zip(texts, at, strict=True)]


def _merges_of_scores(files: ModelFiles, vocabulary: dict[str, int]) -> list[list[str]]:
    """The pairs of tokens that make a token, the best scored first, as transformers takes them from SentencePiece."""
    scores = files.numbers("tokenizer.ggml.scores")
    if scores is None or len(scores) <= max(vocabulary.values(), default=0):
        raise HetcompError(f"{files.path} has tokens without scores or merges; {_ADVICE}.")
    found = []
    for token, number in vocabulary.items():
        pairs = [(token[:i], token[i:]) for i in range(1, len(token))]
        known = [(left, right) for left, right in pairs if left in vocabulary and right in vocabulary]
        known.sort(key=lambda pair: (vocabulary[pair[0]], vocabulary[pair[1]]))
        found += [(scores[number], len(left), len(right), left, right) for left, right in known]
    found.sort(key=lambda merge: merge[:3], reverse=True)
    return [[left, right] for *_, left, right in found]


def _post_processor(files: ModelFiles, vocabulary: dict[str, int], add_bos: bool) -> Json | None:
    sides = []
    for name, default in (("bos", add_bos), ("eos", False)):
        wanted = files.get(f"tokenizer.ggml.add_{name}_token", bool)
        number = files.get(f"tokenizer.ggml.{name}_token_id", int)
        text = next((t for t, i in vocabulary.items() if i == number), None)
        sides.append([(text, number)] if text is not None and (default if wanted is None else wanted) else [])
    if not any(sides):
        return None
    before, behind = sides

    def template(name: str, kind: int) -> list[Json]:
        tokens = [[{"SpecialToken": {"id": text, "type_id": kind}} for text, _ in side] for side in (before, behind)]
        return [*tokens[0], {"Sequence": {"id": name, "type_id": kind}}, *tokens[1]]

    return {
        "type": "TemplateProcessing",
        "single": template("A", 0),
        "pair": [*template("A", 0), *template("B", 1)],
        "special_tokens": {text: {"id": text, "ids": [i], "tokens": [text]} for text, i in [*before, *behind]},
    }
