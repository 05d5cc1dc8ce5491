"""A byte-level BPE tokenizer of any vocabulary size, trained on the zoo's evaluation texts.

For synthetic checkpoints: text goes in and out of them as with a real model, only the words are random.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from hetcomp.models_zoo import evaluation_texts

# Qwen's split pattern: words with a leading space, single digits, runs of punctuation, runs of blanks.
_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
_END_OF_TEXT, _START_OF_TEXT, _TURN_START, _TURN_END = (
    "<|endoftext|>",
    "<|startoftext|>",
    "<|im_start|>",
    "<|im_end|>",
)
_CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MIN_VOCAB = 256 + 4  # every byte and the four special tokens


def write_tokenizer(folder: Path, vocab_size: int, bos_id: int | None, eos_id: int | None, context: int) -> None:
    """Writes tokenizer.json and tokenizer_config.json with exactly the ids 0 .. vocab_size-1.

    ``<|endoftext|>`` gets ``eos_id`` and ``<|startoftext|>`` gets ``bos_id`` (where they are given and
    differ). Ids that training does not fill are named ``<|unused_N|>``; no merge leads to them. Raises
    ValueError below :data:`MIN_VOCAB` ids.
    """
    if vocab_size < MIN_VOCAB:
        raise ValueError(f"a byte-level vocabulary needs {MIN_VOCAB} ids, not {vocab_size}")
    tokenizer = _train(vocab_size - 4)
    document: dict[str, Any] = json.loads(tokenizer.to_str())
    special = _special_ids(vocab_size, bos_id, eos_id)
    document["model"]["vocab"] = _number(document["model"]["vocab"], special, vocab_size)
    document["added_tokens"] = [
        {
            "id": id_,
            "content": content,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": True,
        }
        for content, id_ in sorted(special.items(), key=lambda item: item[1])
    ]
    (folder / "tokenizer.json").write_text(json.dumps(document, ensure_ascii=False))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": _START_OF_TEXT if _START_OF_TEXT in special else _END_OF_TEXT,
        "eos_token": _END_OF_TEXT,
        "model_max_length": context,
        "add_bos_token": False,
        "chat_template": _CHAT_TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=1) + "\n")


def _train(vocab_size: int) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(byte_fallback=False))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train([str(path) for path in evaluation_texts()], trainer)
    return tokenizer


def _special_ids(vocab_size: int, bos_id: int | None, eos_id: int | None) -> dict[str, int]:
    special: dict[str, int] = {}
    if eos_id is not None and 0 <= eos_id < vocab_size:
        special[_END_OF_TEXT] = eos_id
    if bos_id is not None and 0 <= bos_id < vocab_size and bos_id not in special.values():
        special[_START_OF_TEXT] = bos_id
    free = (i for i in range(vocab_size) if i not in special.values())
    for content in (_END_OF_TEXT, _TURN_START, _TURN_END):
        if content not in special:
            special[content] = next(free)
    return special


def _number(trained: dict[str, int], special: dict[str, int], vocab_size: int) -> dict[str, int]:
    """Gives the trained tokens, in their order, the ids that the special ones leave free."""
    taken = set(special.values())
    free = [i for i in range(vocab_size) if i not in taken]
    in_order = sorted(trained, key=lambda token: trained[token])
    vocab = dict(zip(in_order, free, strict=False))
    vocab.update({f"<|unused_{i}|>": i for i in free[len(in_order) :]})
    vocab.update(special)
    return dict(sorted(vocab.items(), key=lambda item: item[1]))
