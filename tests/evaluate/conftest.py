from __future__ import annotations

from pathlib import Path

import pytest

from meditron_train.evaluate.language_model import LanguageModel, load_language_model
from tests.evaluate.models import write_tiny_model


@pytest.fixture(scope="session")
def hf_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("evaluate") / "model")


@pytest.fixture(scope="session")
def model(hf_directory: Path) -> LanguageModel:
    return load_language_model(hf_directory)
