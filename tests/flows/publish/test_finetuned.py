"""The card of a model that was finetuned on conversations, whole or by adapters that are merged into their base."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from meditron_train.checkpoint.convert.adapters import merge_adapter
from meditron_train.files import sha256_file
from meditron_train.flows.publish.facts import collect_facts
from meditron_train.flows.publish.origin import find_origin
from meditron_train.flows.publish.publish import Wishes, publish
from tests.distributed import run_ranks
from tests.flows.publish.test_publish import read_card
from tests.train.conftest import corpus, hf_dir  # noqa: F401
from tests.train.test_chat import chat_data  # noqa: F401
from tests.train.test_loop import run_rank

SIZES = {"steps": 2, "seq_len": 64, "global_batch_size": 2, "precision": "fp32", "device": "cpu"}


def train(root: Path, base: Path, data: dict[str, Any], **sections: Any) -> Path:
    """Two steps on one rank; the run's directory."""
    config = {
        "model": {"from": str(base), "license": "mit"},
        "data": {"tokenizer": str(base), **data},
        "train": SIZES,
        "logging": {"run_dir": str(root / "run"), "tensorboard": False},
        **sections,
    }
    (root / "config.yaml").write_text(yaml.safe_dump(config))
    assert run_ranks(run_rank, 1, root / "config.yaml", ()) == [0]
    return root / "run"


@pytest.mark.long
def test_a_supervised_finetuning(tmp_path: Path, hf_dir: Path, chat_data: Path) -> None:  # noqa: F811
    chat = {"template": "chatml", "prompt_loss_weight": 0.25}
    run_dir = train(
        tmp_path, hf_dir, {"train": [{"path": str(chat_data)}], "packing": "best_fit", "chat": chat}
    )
    publish(run_dir, tmp_path / "out", Wishes(base_model="lab/base"))
    _, text = read_card(tmp_path / "out")
    assert (
        "lab/base after supervised finetuning on 256 tokens" in text and "continued pretraining" not in text
    )
    assert "| chat template | chatml |" in text
    assert "| loss on answers | weight 1; on other tokens of conversations 0.25 |" in text
    metrics = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert f"| tokens in the loss | {sum(line['num_loss_tokens'] for line in metrics):,} |" in text


@pytest.mark.long
@pytest.mark.parametrize("source", ["adapter", "checkpoints/step_00000002"])
def test_a_merged_adapter_has_the_record_of_its_run(
    tmp_path: Path,
    hf_dir: Path,  # noqa: F811
    corpus: Path,  # noqa: F811
    source: str,
) -> None:
    lora = {"rank": 2, "alpha": 8.0, "targets": ["q_proj", "v_proj"]}
    run_dir = train(tmp_path, hf_dir, {"train": [{"path": str(corpus / "one")}]}, lora=lora)
    merge_adapter(hf_dir, run_dir / source, tmp_path / "merged")
    checkpoint = run_dir / "checkpoints" / "step_00000002"
    origin = find_origin(tmp_path / "merged")
    assert (origin.training, origin.run_dir, origin.reference) == (checkpoint, run_dir, tmp_path / "merged")
    publish(tmp_path / "merged", tmp_path / "out", Wishes("mit", base_model="lab/base"))
    _, text = read_card(tmp_path / "out")
    assert "lab/base after continued pretraining with LoRA on 256 tokens" in text
    assert "| LoRA | rank 2, alpha 8, dropout 0 |" in text and "| adapted matrices | q_proj, v_proj |" in text
    assert "| steps | 2 of 2 |" in text and sha256_file(checkpoint / "manifest.json") in text
    assert str(tmp_path) not in text + (tmp_path / "out" / "manifest.json").read_text()
    # Another training in the same place is not its record.
    (checkpoint / "manifest.json").write_text("{}")
    origin = find_origin(tmp_path / "merged")
    assert (origin.training, origin.run_dir) == (None, None) and collect_facts(origin, None) is None
