"""Opening models in both formats."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import sentencepiece
import torch

from meditron_train.checkpoint.convert.from_hf import hf_to_sharded
from meditron_train.evaluate.language_model import as_hf_directory, load_language_model
from tests.checkpoint.tiny_llama import write_tiny_llama
from tests.checkpoint.tiny_tokenizer import VOCAB_SIZE, write_tokenizer_model
from tests.refusal import refused


def test_a_hugging_face_directory_is_used_as_it_is(hf_directory):
    with as_hf_directory(hf_directory) as directory:
        assert directory == hf_directory


def test_a_sharded_checkpoint_is_exported_and_gives_the_same_logits(hf_directory, model, tmp_path):
    hf_to_sharded(hf_directory, tmp_path / "sharded")
    with as_hf_directory(tmp_path / "sharded") as directory:
        again = load_language_model(directory)
    assert not directory.exists()  # temporary
    ids = torch.tensor([again.tokenizer.encode("kamori ten zupa")])
    assert ids.tolist() == [model.tokenizer.encode("kamori ten zupa")]
    assert torch.equal(again.logits(ids), model.logits(ids))


@pytest.mark.parametrize(
    ("make", "said"),
    [(lambda path: None, "there is no directory"), (lambda path: path.mkdir(), "config.json")],
)
def test_not_a_model(tmp_path, make, said):
    make(tmp_path / "nothing")
    with refused(str(tmp_path / "nothing"), said), as_hf_directory(tmp_path / "nothing"):
        pass


def test_a_run_directory_gets_a_hint(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    with refused("not a run with a checkpoint"), as_hf_directory(tmp_path):
        pass


def test_no_tokenizer(tmp_path):
    with refused("has no tokenizer", str(tmp_path)):
        load_language_model(write_tiny_llama(tmp_path / "bare"))


def test_a_tokenizer_model_alone_means_what_sentencepiece_makes_of_it(tmp_path):
    """transformers 5 makes other ids of it than Llama-2 was trained with."""
    directory = write_tiny_llama(tmp_path / "model", vocab_size=VOCAB_SIZE)
    write_tokenizer_model(directory)
    theirs = sentencepiece.SentencePieceProcessor(model_file=str(directory / "tokenizer.model"))
    tokenizer = load_language_model(directory).tokenizer
    for text in ("kamori ten  zupa", " two spaces", "漢 ß\n\n12 mg"):
        assert tokenizer.encode(text) == [theirs.bos_id(), *theirs.encode(text)]
    assert sorted(path.name for path in directory.glob("tokenizer*")) == ["tokenizer.model"]


def test_a_tokenizer_that_the_library_cannot_read_is_refused(hf_directory, tmp_path):
    shutil.copytree(hf_directory, tmp_path / "model")
    path = tmp_path / "model" / "tokenizer.json"
    content = json.loads(path.read_text())
    content["added_tokens"].append({**content["added_tokens"][0], "id": 2**40, "content": "<far>"})
    path.write_text(json.dumps(content))
    with refused("transformers cannot read its tokenizer", str(tmp_path / "model")):
        load_language_model(tmp_path / "model")


@pytest.mark.parametrize(
    "text",
    ["[" * 200_000, "9" * 5000]
    + [json.dumps(values) for values in (
        {"eos_token_id": "x"}, {"pad_token_id": "x"}, {"cache_implementation": "x"}, {"watermarking_config": 1}
    )],
)  # fmt: skip
def test_a_generation_config_that_transformers_cannot_read_is_refused(hf_directory, tmp_path, text):
    shutil.copytree(hf_directory, tmp_path / "model")
    (tmp_path / "model" / "generation_config.json").write_text(text)
    with refused("generation_config.json"):
        load_language_model(tmp_path / "model")


def test_a_missing_shard(hf_directory, tmp_path):
    broken = tmp_path / "broken"
    broken.mkdir()
    for file in Path(hf_directory).iterdir():
        if file.suffix != ".safetensors":
            (broken / file.name).write_bytes(file.read_bytes())
    with refused(str(broken)):
        load_language_model(broken)


def test_an_adapter_beside_the_weights_is_refused(hf_directory, tmp_path):
    shutil.copytree(hf_directory, tmp_path / "model")
    (tmp_path / "model" / "adapter_config.json").write_text("{}")
    with refused("adapter_config.json", "merge"):
        load_language_model(tmp_path / "model")
