"""What runs in the child process of `bounded`: tokenizers are read, completed and compared, each under limits.

A tokenizer's files decide how much memory and time it takes, and may make the Rust library panic; so each is met in a
process of its own, forked from one that has imported what it needs. torch is kept out of it: nothing here needs it, and
importing it takes longer than the rest.
"""

from __future__ import annotations

import json
import os
import resource
import select
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from meditron_train.errors import UserError
from meditron_train.tokenizer.beside import agreement, files_beside_sentencepiece
from meditron_train.tokenizer.compare import encoding_digest
from meditron_train.tokenizer.files import JSON, read_json_object
from meditron_train.tokenizer.probes import PROBE_TEXTS

MAX_ID = 1 << 31
_MAX_ERROR_CHARACTERS = 2000
_MAX_TOKENS_PER_BYTE = 64  # the worst Unicode decomposition makes 33 bytes of 3

_CHATS: tuple[list[dict[str, str]], ...] = (
    [{"role": "user", "content": "What is a fever?"}],
    [
        {"role": "system", "content": "Answer briefly."},
        {"role": "user", "content": "Dose?"},
        {"role": "assistant", "content": "5 mg/kg."},
        {"role": "user", "content": " Why? "},
    ],
)


def serve(idle_s: float) -> None:
    """Answer requests, one JSON object a line on stdin and stdout, until stdin closes or none comes for `idle_s` s.

    A request has task, directory, arguments, max_bytes, max_cpu_s. Each is met by a fork of this process, which has
    transformers imported already; the answer has the fork's exit_code, what it wrote (output: {"value": what the task
    gives}, {"refused": the message of a UserError} or {"error": what else was wrong}) and the end of its stderr.
    """
    answers = os.fdopen(os.dup(1), "w", encoding="ascii")
    os.dup2(2, 1)  # whatever else prints
    sys.modules["torch"] = None  # type: ignore[assignment]
    from transformers.utils import logging

    logging.set_verbosity_error()
    from sentencepiece import sentencepiece_model_pb2  # noqa: F401
    from transformers import AutoTokenizer, PreTrainedTokenizerFast  # noqa: F401

    while select.select([sys.stdin], [], [], idle_s)[0] and (line := sys.stdin.readline()):
        answers.write(json.dumps(_in_a_fork(json.loads(line))) + "\n")
        answers.flush()


def _in_a_fork(request: dict[str, Any]) -> dict[str, Any]:
    output, errors = os.memfd_create("output"), os.memfd_create("errors")
    pid = os.fork()
    if pid == 0:
        os.dup2(errors, 2)
        try:
            _meet(request, output)
        finally:
            os._exit(0)
    exit_code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    texts = [_content(descriptor) for descriptor in (output, errors)]
    return {"exit_code": exit_code, "output": texts[0], "errors": texts[1][-_MAX_ERROR_CHARACTERS:]}


def _meet(request: dict[str, Any], output: int) -> None:
    resource.setrlimit(resource.RLIMIT_CPU, (int(request["max_cpu_s"]) + 1,) * 2)
    resource.setrlimit(resource.RLIMIT_DATA, (request["max_bytes"],) * 2)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    try:
        answer = {"value": _TASKS[request["task"]](Path(request["directory"]), **request["arguments"])}
    except UserError as error:
        answer = {"refused": str(error)[:_MAX_ERROR_CHARACTERS]}
    except BaseException as error:  # the Rust library's panic is not an Exception
        answer = {"error": f"{type(error).__name__}: {error}"[:_MAX_ERROR_CHARACTERS]}
    with os.fdopen(output, "w", encoding="utf-8", errors="surrogatepass") as file:
        json.dump(answer, file)


def _content(descriptor: int) -> str:
    with os.fdopen(descriptor, "rb") as file:
        file.seek(0)
        return file.read().decode("utf-8", "replace")


def _load(directory: Path) -> Any:
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    if not any((directory / name).is_file() for name in ("config.json", "tokenizer_config.json")):
        return PreTrainedTokenizerFast.from_pretrained(directory)  # 4.x cannot tell the class
    return AutoTokenizer.from_pretrained(directory, trust_remote_code=False, local_files_only=True)


def _read(directory: Path) -> dict[str, Any]:
    import transformers

    tokenizer = _load(directory)
    vocabulary = {str(token): number for token, number in tokenizer.get_vocab().items()}
    wrong = [token for token, number in vocabulary.items() if not 0 <= number < MAX_ID]
    if wrong:
        raise ValueError(f"the token {wrong[0]!r} has the id {vocabulary[wrong[0]]}")
    if not vocabulary or not tokenizer.vocab_size:
        raise ValueError("empty vocabulary")
    added = {
        token.content: [
            number,
            token.special,
            token.lstrip,
            token.rstrip,
            token.single_word,
            token.normalized,
        ]
        for number, token in sorted(tokenizer.added_tokens_decoder.items())
    }
    backend: Any = getattr(tokenizer, "_tokenizer", None)
    texts = [*PROBE_TEXTS, *_around_tokens(list(added), _strings(tokenizer.special_tokens_map.values()))]
    ids = {text: _encode(tokenizer, text) for text in texts}
    return {
        "transformers": transformers.__version__,
        "kind": type(tokenizer).__name__,
        "backend": backend.to_str() if hasattr(backend, "to_str") else None,
        "vocabulary": vocabulary,
        "added_tokens": added,
        "named_tokens": _named(tokenizer),
        "settings": {
            key: getattr(tokenizer, key, None)
            for key in ("model_input_names", "padding_side", "truncation_side", "model_max_length")
        },
        "ids": ids,
        "decoded": {
            text: [tokenizer.decode(numbers), tokenizer.decode(numbers, skip_special_tokens=True)]
            for text, numbers in ids.items()
        },
        "templates": _templates(tokenizer),
    }


def _named(tokenizer: Any) -> dict[str, Any]:
    """Every named token; the lists of further special tokens, which 4.x and 5.x name differently, as one."""
    named = {
        key: str(value)
        for key, value in tokenizer.special_tokens_map.items()
        if not isinstance(value, (list, tuple))
    }
    more = {str(token) for token in tokenizer.all_special_tokens} - set(named.values())
    return {**named, "additional_special_tokens": sorted(more)}


def _strings(values: Iterable[Any]) -> list[str]:
    return [
        str(token) for value in values for token in (value if isinstance(value, (list, tuple)) else [value])
    ]


def _around_tokens(added: list[str], named: list[str]) -> list[str]:
    """Texts with special and added tokens inside and around; of hundreds of reserved ones, the first and last."""
    tokens = list(dict.fromkeys([*named, *added[:12], *added[-12:]]))
    texts = [
        text for token in tokens for text in (token, f"dose {token} of", f" x{token}y {token} \n{token}z")
    ]
    return [*texts, *([f"{''.join(tokens)} a {' '.join(tokens)}"] if tokens else [])]


def _encode(tokenizer: Any, text: str) -> list[int]:
    numbers = tokenizer(text)["input_ids"]
    if len(numbers) > _MAX_TOKENS_PER_BYTE * (len(text.encode()) + 4):
        raise ValueError(f"a text of {len(text)} characters becomes {len(numbers)} tokens")
    return [int(number) for number in numbers]


def _templates(tokenizer: Any) -> dict[str, Any]:
    """Name -> [source, the rendered chats] of every chat template."""
    given = tokenizer.chat_template
    named = given if isinstance(given, dict) else {} if given is None else {"default": given}
    return {
        name: [source, *(_render(tokenizer, source, chat) for chat in _CHATS)]
        for name, source in named.items()
    }


def _render(tokenizer: Any, source: str, chat: list[dict[str, str]]) -> str:
    try:
        return str(
            tokenizer.apply_chat_template(
                chat, chat_template=source, tokenize=False, add_generation_prompt=True
            )
        )
    except MemoryError:
        raise
    except Exception as error:  # a template may refuse a chat; by which kind of error is what counts
        return f"error: {type(error).__name__}"


def _differs(directory: Path, backend: str, texts: str) -> bool:
    """Whether tokenizer.json as it stands gives other ids of the texts, a list in JSON, than `backend`."""
    from tokenizers import Tokenizer

    content = json.dumps(read_json_object(directory / JSON))
    if encoding_digest(content) == encoding_digest(backend):
        return False
    plain, used = Tokenizer.from_str(content), Tokenizer.from_str(backend)
    return any(
        plain.encode(text, add_special_tokens=False).ids != used.encode(text, add_special_tokens=False).ids
        for text in json.loads(texts)
    )


_TASKS: dict[str, Callable[..., Any]] = {
    "read": _read,
    "complete": files_beside_sentencepiece,
    "agreement": agreement,
    "differs": _differs,
    "encode": lambda directory, text: _encode(_load(directory), text),
}
