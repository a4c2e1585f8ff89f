"""Tokenizer directories of every shape that people have."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from meditron_train.tokenizer.complete import missing_files
from tests.checkpoint.tiny_tokenizer import VOCAB_SIZE, generated_texts, write_tokenizer_model

LLAMA = {
    "tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>",
    "add_bos_token": True, "add_eos_token": False, "clean_up_tokenization_spaces": False,
}  # fmt: skip


def write(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, ensure_ascii=False, indent=1))


def token(content: str, **flags: bool) -> dict[str, Any]:
    usual = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    return {"content": content, **usual, **flags}


def llama(directory: Path, **settings: Any) -> None:
    """tokenizer.model and tokenizer_config.json."""
    write_tokenizer_model(directory)
    write(directory / "tokenizer_config.json", {**LLAMA, **settings})


def byte_level(directory: Path, **settings: Any) -> None:
    """tokenizer.json alone, as Llama 3's."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

    directory.mkdir(exist_ok=True)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=350, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(generated_texts(300), trainer)
    specials = ["<|begin|>", "<|end|>", "<|pad|>"]
    tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in specials])
    tokenizer.save(str(directory / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<|begin|>", "eos_token": "<|end|>"}
    write(directory / "tokenizer_config.json", {**config, **settings})


def write_tokenizer_of(model_type: str, directory: Path) -> None:
    """A tokenizer of the kind that a family has: transformers 5.x makes a Qwen2Tokenizer of all that a qwen2 brings."""
    if model_type == "qwen2":
        byte_level(directory)
    else:
        write_tokenizer_model(directory)


def _alone(directory: Path) -> None:
    write_tokenizer_model(directory)


def _official_llama(directory: Path) -> None:
    llama(directory, legacy=False, model_max_length=4096)
    (directory / "tokenizer_config.json").rename(directory / "kept")
    write(directory / "tokenizer.json", missing_files(directory)["tokenizer.json"])
    (directory / "kept").rename(directory / "tokenizer_config.json")
    (directory / "tokenizer.model.v3").write_bytes(b"another program's")


def _added(directory: Path) -> None:
    decoder = {str(n): token(text) for n, text in enumerate(("<unk>", "<s>", "</s>"))}
    decoder[str(VOCAB_SIZE)] = token("<|im_start|>", special=False, rstrip=True)
    decoder[str(VOCAB_SIZE + 1)] = token("<|im_end|>", lstrip=True)
    llama(directory, legacy=True, added_tokens_decoder=decoder)


def _qwen(directory: Path) -> None:
    byte_level(directory)
    model = json.loads((directory / "tokenizer.json").read_text())["model"]
    (directory / "tokenizer.json").unlink()
    write(directory / "vocab.json", model["vocab"])
    merges = "\n".join(" ".join(pair) for pair in model["merges"])
    (directory / "merges.txt").write_text(f"#version: 0.2\n{merges}\n")
    size = len(model["vocab"])
    config = {
        "tokenizer_class": "Qwen2Tokenizer", "eos_token": "<|end|>", "bos_token": None, "unk_token": None,
        "added_tokens_decoder": {str(size): token("<|end|>")}, "chat_template": "{{ messages[0].content }}",
    }  # fmt: skip
    write(directory / "tokenizer_config.json", config)


def _templates(directory: Path) -> None:
    byte_level(directory, cls_token="<|end|>", mask_token="<|pad|>", model_input_names=["input_ids"])
    (directory / "chat_template.jinja").write_text(
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    )
    (directory / "additional_chat_templates").mkdir()
    (directory / "additional_chat_templates" / "tool_use.jinja").write_text("TOOLS {{ messages[0].content }}")


def _tiktoken(directory: Path) -> None:
    byte_level(directory)
    lines = (f"{base64.b64encode(bytes([number])).decode()} {number}\n" for number in range(256))
    (directory / "tokenizer.model").write_text("".join(lines))


def _wordpiece(directory: Path) -> None:
    directory.mkdir(exist_ok=True)
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "dose", "of", "##s", "a", "x", "##y"]
    (directory / "vocab.txt").write_text("\n".join(pieces) + "\n")
    write(directory / "tokenizer_config.json", {"tokenizer_class": "BertTokenizer", "do_lower_case": True})


def _saved_by_5x(directory: Path) -> None:
    llama(directory, legacy=False)
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(directory)
    tokenizer.add_tokens(["<|im_start|>", "HbA1c"])
    tokenizer.save_pretrained(directory)


SHAPES: dict[str, Callable[[Path], None]] = {
    "tokenizer.model alone": _alone,
    "Llama 2": _official_llama,
    "legacy": lambda directory: llama(directory, legacy=True),
    "not legacy": lambda directory: llama(directory, legacy=False),
    "no prefix space": lambda directory: llama(directory, legacy=False, add_prefix_space=False),
    "EOS added": lambda directory: llama(directory, add_bos_token=False, add_eos_token=True),
    "added tokens": _added,
    "byte level": byte_level,
    "vocab.json and merges.txt": _qwen,
    "templates and named tokens": _templates,
    "tiktoken beside": _tiktoken,
    "WordPiece": _wordpiece,
    "saved with added tokens": _saved_by_5x,
}
