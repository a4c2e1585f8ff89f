"""What each license demands, and what is refused."""

from __future__ import annotations

from pathlib import Path

from meditron_train.flows.publish.licenses import find_license
from tests.refusal import refused


def test_the_shipped_apache_license_is_the_projects_own() -> None:
    root = Path(__file__).parents[3]
    shipped = root / "meditron_train/flows/publish/apache-2.0.txt"
    assert shipped.read_bytes() == (root / "LICENSE").read_bytes()


def test_texts_come_from_the_base_the_user_or_the_license_itself(tmp_path: Path) -> None:
    (tmp_path / "LICENSE.txt").write_text("agreement")
    files, to_do = find_license("llama2", None, tmp_path, "med")
    assert (files.text, to_do) == (tmp_path / "LICENSE.txt", [])
    own = tmp_path / "own.txt"
    own.write_text("given")
    assert find_license("llama2", own, tmp_path, "med")[0].text == own
    files, to_do = find_license("llama2", None, None, "med")
    assert files.text is None and "--license-file FILE (https://ai.meta.com/llama/license/)" in to_do[0]
    files, to_do = find_license("apache-2.0", None, None, "med")
    assert files.text is not None and "Apache License" in files.text.read_text() and not to_do
    files, _ = find_license("our-hospital-license", own, None, "med")
    assert not files.is_known and files.license.hub_id == "other"
    files.write(tmp_path, "med", "a base")
    assert (tmp_path / "LICENSE").read_text() == "given" and "our-hospital-license" in (
        tmp_path / "NOTICE"
    ).read_text()


def test_what_is_refused(tmp_path: Path) -> None:
    with refused("is not stated"):
        find_license(None, None, tmp_path, "med")
    with refused("'lama2' demands is not known", "did you mean llama2?", "--license-file"):
        find_license("lama2", None, tmp_path, "med")
    with refused("--license-file", "is not a file"):
        find_license("llama2", tmp_path / "absent", None, "med")
    with refused("to begin with 'Llama'; this one is med"):
        find_license("llama3.1", None, None, "med")
    with refused("to begin with 'Llama 3'"):
        find_license("llama3", None, None, "Llama-med")
    assert find_license("llama3", None, None, "Llama-3-med")[0].license.sentence == "Built with Meta Llama 3"
