"""Tokenizers of GGUF files: the ids and texts of those that the files were made from."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import gguf
import pytest
from tokenizers import AddedToken, Tokenizer, pre_tokenizers, processors, trainers
from transformers.models.qwen3_5 import tokenization_qwen3_5
from transformers.tokenization_utils_base import generate_merges

from hetcomp.artifact.chat_template import template_sources
from hetcomp.artifact.tokenizer import compile_tokenizer
from hetcomp.artifact.tokenizer_parity import parity_texts, prove_parity
from hetcomp.errors import HetcompError
from hetcomp.frontend.gguf.model_files import open_model
from hetcomp.frontend.gguf.pre_tokenizers import PRE_TOKENIZERS
from hetcomp.frontend.gguf.tokenizer import write_tokenizer
from tests.unit import test_tokenizer as made


def write(path: Path, tokenizer: Tokenizer, kind: str, pre: str | None = None, **facts: Any) -> Path:
    """As TextModel.get_vocab_base and _set_vocab_sentencepiece of llama.cpp's converter."""
    model = json.loads(tokenizer.to_str())["model"]
    added = tokenizer.get_added_tokens_decoder()
    count = max([*model["vocab"].values(), *added]) + 1
    tokens = [f"[PAD{i}]" for i in range(count)]
    types = [int(gguf.TokenType.UNUSED)] * count
    for token, i in model["vocab"].items():
        tokens[i], types[i] = token, int(gguf.TokenType.NORMAL)
    for i, token in added.items():
        tokens[i] = token.content
        types[i] = int(gguf.TokenType.CONTROL if token.special else gguf.TokenType.USER_DEFINED)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tokenizer_model(kind)
    if pre is not None:
        writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    if kind == "gpt2":
        writer.add_token_merges([m if isinstance(m, str) else " ".join(m) for m in model["merges"]])
    for name, value in facts.items():
        getattr(writer, name)(value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return path


def written(path: Path) -> Path:
    folder = path.parent / "words"
    folder.mkdir()
    write_tokenizer(open_model(path), folder)
    return folder


def assert_same_ids(folder: Path, tokenizer: Tokenizer, add_special: bool = False) -> None:
    got = Tokenizer.from_file(str(folder / "tokenizer.json"))
    added = [token.content for token in tokenizer.get_added_tokens_decoder().values()]
    for text in parity_texts(300, added, random.Random(2)):
        ids = tokenizer.encode(text, add_special_tokens=add_special).ids
        assert got.encode(text, add_special_tokens=add_special).ids == ids, text
        assert got.decode(ids) == tokenizer.decode(ids)


BYTE_LEVEL = {"qwen2": made.qwen2, "llama-bpe": made.llama3, "deepseek-v3": made.deepseek_v3}


def train(tokenizer: Tokenizer, special: tuple[str, ...] = ()) -> Tokenizer:
    alphabet = [] if special else pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=900, special_tokens=list(special), initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(parity_texts(400, [], random.Random(7)), trainer)
    tokenizer.add_tokens([AddedToken("<|im_end|>", special=True, normalized=False)])
    tokenizer.add_tokens([AddedToken("<tool>", special=False, normalized=False)])
    return tokenizer


@pytest.mark.parametrize("pre", BYTE_LEVEL)
def test_byte_level(pre, tmp_path):
    tokenizer = train(BYTE_LEVEL[pre]())
    folder = written(write(tmp_path / "m.gguf", tokenizer, "gpt2", pre))
    assert_same_ids(folder, tokenizer)
    prove_parity(compile_tokenizer(folder), folder, 200)


def test_patterns_are_those_of_other_tests():
    assert PRE_TOKENIZERS["gpt-4o"].patterns == (made.O200K,)
    assert PRE_TOKENIZERS["deepseek-v3"].patterns == (r"\p{N}{1,3}", r"[一-龥぀-ゟ゠-ヿ]+", made.DEEPSEEK_LETTERS)
    assert PRE_TOKENIZERS["glm4"].patterns == (made.LLAMA3,)
    assert PRE_TOKENIZERS["qwen35"].patterns == (tokenization_qwen3_5.PRETOKENIZE_REGEX,)


@pytest.mark.parametrize("prefix", [True, False])
def test_sentencepiece(prefix, tmp_path):
    """Merges come from the tokens' scores, as transformers takes them from SentencePiece's own files."""
    bytes_ = tuple(f"<0x{byte:02X}>" for byte in range(256))
    tokenizer = train(made.sentencepiece(metaspace=False), ("<unk>", "<s>", "</s>", *bytes_))
    source = json.loads(tokenizer.to_str())
    vocabulary = source["model"]["vocab"]
    scores = {token: -float(i) for token, i in vocabulary.items()}
    source["model"]["merges"] = [list(pair) for pair in generate_merges(vocabulary, scores)]
    if not prefix:
        source["normalizer"]["normalizers"].pop(0)
        source["decoder"]["decoders"].pop()
    tokenizer = Tokenizer.from_str(json.dumps(source))
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    count = max(tokenizer.get_added_tokens_decoder()) + 1
    path = write(
        tmp_path / "m.gguf", tokenizer, "llama", add_token_scores=[-float(i) for i in range(count)],
        add_bos_token_id=1, add_eos_token_id=2, add_unk_token_id=0, add_add_space_prefix=prefix,
    )  # fmt: skip
    folder = written(path)
    assert_same_ids(folder, tokenizer, add_special=True)
    compiled = compile_tokenizer(folder)
    assert (compiled.bos_token_id, compiled.eos_token_id) == (1, 2)
    prove_parity(compiled, folder, 200)


def test_special_tokens_and_chat_templates(tmp_path):
    templates = [{"name": "default", "template": "{{ messages }}"}, {"name": "tool_use", "template": "{{ tools }}"}]
    tokenizer = train(made.qwen2())
    path = write(
        tmp_path / "m.gguf", tokenizer, "gpt2", "qwen2", add_bos_token_id=5, add_eos_token_id=7,
        add_add_bos_token=True, add_add_eos_token=True, add_chat_template=templates,
    )  # fmt: skip
    folder = written(path)
    assert template_sources(folder) == {"default": "{{ messages }}", "tool_use": "{{ tools }}"}
    got = Tokenizer.from_file(str(folder / "tokenizer.json"))
    assert got.encode("a").ids == [5, *tokenizer.encode("a").ids, 7]
    assert got.encode("a", add_special_tokens=False).ids == tokenizer.encode("a").ids


@pytest.mark.parametrize(
    ("kind", "pre", "facts", "message"),
    [
        ("t5", None, {}, "of the kind 't5', which is not read; give the model's own with --tokenizer FOLDER"),
        ("gpt2", "kimi-k2", {}, "splits texts as 'kimi-k2', which is not read"),
        ("gpt2", None, {}, "splits texts as 'default'"),
        ("llama", None, {}, "without scores or merges"),
        ("llama", None, {"add_remove_extra_whitespaces": True}, "drops white space"),
        ("gpt2", "qwen2", {"add_token_types": [1, 1]}, "without a type, or the same token twice"),
        ("gpt2", "qwen2", {"add_token_merges": ["ab"]}, "the merge 'ab', which is no pair"),
    ],
)
def test_what_is_not_read_is_named_and_the_chat_template_kept(kind, pre, facts, message, tmp_path, monkeypatch):
    monkeypatch.setattr("gguf.gguf_writer.logger.warning", lambda text: None)
    path = write(tmp_path / "m.gguf", train(made.qwen2()), kind, pre, add_chat_template="{{ messages }}", **facts)
    folder = tmp_path / "words"
    folder.mkdir()
    with pytest.raises(HetcompError, match=message):
        write_tokenizer(open_model(path), folder)
    assert template_sources(folder) == {"default": "{{ messages }}"}
    assert not (folder / "tokenizer.json").exists()
