"""The sample corpus from its declaration to a card that a browser shows."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

pytest.importorskip("datatrove")

from meditron_train.cli.main import app
from meditron_train.corpus.json_files import read_json
from tests import browser
from tests.long import mostly_long

ROOT = Path(__file__).parents[3]
_WHY_NOT = browser.why_not()
needs_browser = pytest.mark.skipif(_WHY_NOT is not None, reason=str(_WHY_NOT))


@pytest.fixture(scope="module")
def sample(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The finished corpus of configs/corpus/sample.yaml, with its card."""
    output = tmp_path_factory.mktemp("sample") / "sample"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CORPUS_OUTPUT", str(output))
        patch.delenv("TOKENIZER", raising=False)
        patch.chdir(ROOT)
        for words in (("build", "configs/corpus/sample.yaml", "--workers", "1"), ("card", str(output))):
            result = CliRunner().invoke(app, ["corpus", *words])
            assert result.exit_code == 0, result.output + str(result.exception)
    return output


def test_every_reader_gives_documents_and_tokens(sample: Path) -> None:
    manifest = read_json(sample / "manifest.json")
    tokens = {s["name"]: sum(c.get("tokens", 0) for c in s["splits"].values()) for s in manifest["sources"]}
    assert all(tokens.values()) and len(tokens) == 8, tokens
    readers = {path.stem for path in (ROOT / "meditron_train/corpus/readers").glob("[a-z]*.py")}
    declared = (sample / "corpus.yaml").read_text()
    assert all(f"reader: {reader}\n" in declared for reader in readers)


def test_the_funnel_of_the_sample(sample: Path) -> None:
    """By counting the records of the fixtures and reading what is wrong with them."""
    sources = {source["name"]: source for source in read_json(sample / "manifest.json")["sources"]}
    # The lines of the file that is also cdc's, without cdc's document.
    assert (sources["who"]["read"]["records"], sources["cdc"]["read"]["records"]) == (3, 1)
    assert sources["who"]["not_selected"] == {"source: nobody": 1}
    assert sources["bundles"]["left_out"] == {"retracted": 1}
    assert sources["pmc"]["left_out"] == {
        **dict.fromkeys(("broken_xml", "empty", "ocr_only", "retracted", "superseded"), 1)
    }
    assert sources["pages"]["dropped"] == {"contaminated": 1}
    assert sources["web"]["read"]["records"] == 7


@needs_browser
@pytest.mark.parametrize("dark", mostly_long([False, True], False), ids=["light", "dark"])
def test_a_browser_shows_the_card(sample: Path, dark: bool) -> None:
    page = (sample / "card" / "card.html").as_uri()
    with browser.browser() as running, browser.opened(running, page, dark=dark) as opened:
        assert (opened.errors, opened.requests) == ([], [page])
        assert opened.contrast_problems() == []
        shown = opened.page.inner_text("body")
        for text in ("A sample corpus", "records of the files", "Thresholds", "Provenance"):
            assert text in shown, text
        boxes = [bar.bounding_box() for bar in opened.page.query_selector_all("svg rect.kept")]
        # From 34 records to 11 documents, as wide as that.
        assert boxes[-1]["width"] / boxes[0]["width"] == pytest.approx(11 / 34, rel=0.02)
        wide = opened.page.evaluate("document.documentElement.scrollWidth - window.innerWidth")
        assert wide <= 0, "the page is wider than the window"
