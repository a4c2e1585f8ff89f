"""What a corpus is made of: the sections of a file such as configs/corpus/gap-replay.yaml.

Sources stand in the order of their priority: of documents that say the same, the one from the earliest source is kept.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, field_validator, model_validator

from meditron_train.config.data import Phase, check_order
from meditron_train.config.load import load_section
from meditron_train.config.section import Count, Int, Name, Positive, Section
from meditron_train.corpus.text.rules import SPECIAL_TOKENS

Share = Annotated[float, Field(ge=0, le=1)]
Part = Literal["guidelines", "abstracts", "papers", "replay"]
"""The rows of the paper's table 1."""
_LICENSE = re.compile(r"^[A-Za-z0-9][A-Za-z0-9.+-]*( (AND|OR|WITH) [A-Za-z0-9][A-Za-z0-9.+-]*)*$")


def _empty_is_none(value: Any) -> Any:
    return None if value == "" else value


OptionalPath = Annotated[Path | None, BeforeValidator(_empty_is_none)]


class LengthFilter(Section):
    """Documents outside these bounds are dropped."""

    enabled: bool = True
    min_chars: Annotated[int, Field(ge=0)] = 100
    """Characters."""
    max_chars: Count = 2_000_000
    """Characters; a longer text is a mistake, not an article, and would cost its worker gigabytes."""


class LanguageFilter(Section):
    """Documents in another language are dropped (py3langid)."""

    enabled: bool = True
    keep: Annotated[tuple[str, ...], Field(min_length=1)] = ("en",)
    """ISO 639-1 codes."""
    min_probability: Share = 0.5
    """Of the kept language; below it the language counts as unknown, and the document is dropped."""


class RepetitionFilter(Section):
    """Gopher's rules on repeated lines, paragraphs and n-grams (arXiv 2112.11446, table A1). Of a text of more than
    262,144 characters each of as few equal parts as are shorter is judged; one that repeats itself drops the text."""

    enabled: bool = True
    min_words: Annotated[int, Field(ge=0)] = 50
    """Shorter texts pass: Gopher has none, and in a short abstract two words that come twice are a tenth of it."""


class QualityFilter(Section):
    """Gopher's rules on words, symbols and stop words (arXiv 2112.11446, section A1)."""

    enabled: bool = True
    min_words: Annotated[int, Field(ge=0)] = 20
    """Gopher has 50, which would drop short abstracts."""
    max_words: Count = 400_000
    """Gopher has 100,000, which would drop long guidelines."""
    min_stop_words: Annotated[int, Field(ge=0)] = 2
    """Different ones of "the be to of and that have with"; 0 for text that is not English."""


class FiltersSection(Section):
    """Rules that look at one document at a time, in this order."""

    length: LengthFilter = LengthFilter()
    language: LanguageFilter = LanguageFilter()
    repetition: RepetitionFilter = RepetitionFilter()
    quality: QualityFilter = QualityFilter()


class MinHash(Section):
    """Near-duplicates by MinHash: two documents with Jaccard similarity s of their n-grams meet with the probability
    1 - (1 - s^hashes)^buckets."""

    enabled: bool = True
    n_grams: Count = 5
    """Words in a shingle."""
    buckets: Count = 14
    hashes: Count = 8
    """In each bucket."""
    seed: Int = 1


class DedupSection(Section):
    """Which documents count as the same. The one of the earliest source is kept."""

    exact: bool = True
    """Equal after Unicode normalization, without case, punctuation and white space."""
    full_text: bool = True
    """An abstract is dropped where a paper has its PMID, PMCID or DOI."""
    near: MinHash = MinHash()


class Benchmark(Section):
    """Questions that the corpus must not contain: a JSONL file."""

    name: Name
    path: Path
    keys: Annotated[tuple[str, ...], Field(min_length=1)] = ("question",)
    """Fields whose text makes up the item; lists and objects are joined."""
    id_key: str = "id"
    """Field of the item's id; where it is missing, the number of the line."""


class SharedNgram(Section):
    """Rule ngram: document and item share n consecutive words (an item of fewer words: all of them)."""

    enabled: bool = True
    n: Count = 13
    min_words: Count = 8
    """Shorter items are left to no rule, as they would be found everywhere."""


class AlignedNgrams(Section):
    """Rule aligned: n-grams that the document shares cover this share of its words (EPFL, 2026: half, by 8-grams)."""

    enabled: bool = True
    n: Count = 8
    min_share: Annotated[float, Field(gt=0, le=1)] = 0.5


class DecontaminationSection(Section):
    """Documents that contain evaluation questions."""

    benchmarks: tuple[Benchmark, ...] = ()
    ngram: SharedNgram = SharedNgram()
    aligned: AlignedNgrams = AlignedNgrams()
    action: Literal["remove", "flag"] = "remove"
    """flag: the document stays, and only the report names it."""


class SourceSection(Section):
    """One source of documents."""

    name: Name
    part: Part
    """Row of the paper's table 1. Abstracts give way to papers with the same identifier."""
    reader: str
    """Module of meditron_train.corpus.readers that understands the files."""
    path: OptionalPath = None
    """File or directory. Without it the source is declared, but contributes nothing."""
    options: dict[str, Any] = Field(default_factory=dict)
    """Of the reader."""
    select: dict[str, str] = Field(default_factory=dict)
    """Only documents with these metadata values, as {source: who}."""
    license: str
    """SPDX identifier, or the publisher's own code as LicenseRef-NAME, of documents that state none."""
    redistribution: bool
    """Whether the text may be passed on."""
    citation: str
    url: str | None = None
    released: bool | None = None
    """Whether the authors of Meditron released their copy; absent where it does not apply."""
    articles: Count | None = None
    """How many articles the paper counts."""
    validation: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of the documents held out for validation, chosen by a hash of their ids."""
    weight: Positive | None = None
    """How often its tokens are taken in training, where one pass over them is 1 (the default)."""
    token_budget: Count | None = None
    """Tokens to take in training, instead."""
    filters: FiltersSection | None = None
    """Instead of the corpus's own."""

    @field_validator("license")
    @classmethod
    def _check_license(cls, value: str) -> str:
        if not _LICENSE.fullmatch(value):
            raise ValueError(
                "expected an SPDX identifier such as CC-BY-4.0, or LicenseRef-NAME for a publisher's own"
            )
        return value

    @model_validator(mode="after")
    def _check_share(self) -> SourceSection:
        if self.weight is not None and self.token_budget is not None:
            raise ValueError(f"source {self.name!r} has both weight and token_budget; keep one")
        return self


class LicensesSection(Section):
    """What to do with licenses that documents state."""

    known: tuple[str, ...] = ()
    """Accepted besides the usual SPDX identifiers and those of the sources."""
    unknown: Literal["keep", "drop"] = "keep"
    """Documents with any other license are reported; keep or drop them."""


class TokenizeSection(Section):
    """How the finished corpus is tokenized. Without a tokenizer, given or trained, it is not; `data tokenize` may do it
    later."""

    tokenizer: OptionalPath = None
    """Directory with tokenizer.model or tokenizer.json."""
    train_vocab_size: Count | None = None
    """Without a tokenizer: train one with so many pieces on the training documents, OUTPUT/tokenizer."""
    special_tokens: tuple[str, ...] = SPECIAL_TOKENS
    """Tokens that are added; data.yaml hands them to the training as data.special_tokens."""
    fast: bool = True
    """Use gigatoken where it is installed and proves identical on a sample of this corpus."""
    check_every: Count = 1000
    """Every Nth document is tokenized by both, and a difference ends the use of the fast one."""


class SlurmSection(Section):
    """Of --executor slurm: one job array for each stage."""

    partition: str = ""
    time: str = "24:00:00"
    cpus_per_task: Count = 1
    mem_per_cpu_gb: Count = 2
    qos: str = ""
    account: str = ""
    max_parallel: Count | None = None
    """Array tasks that may run at the same time."""
    sbatch_args: dict[str, str] = Field(default_factory=dict)
    """Further options of sbatch, without their dashes."""
    poll_interval_s: Positive = 5.0


class Corpus(Section):
    """A whole corpus file."""

    name: Name
    title: str = ""
    description: str = ""
    version: Annotated[str, Field(pattern=r"^[0-9]+\.[0-9]+\.[0-9]+$")] = "1.0.0"
    """Of the corpus, for its card."""
    url: str | None = None
    """Where the corpus is published, for its card."""
    output: Path
    """Directory that the corpus is written to."""
    seed: Int = 1234
    """Of the split into training and validation."""
    sources: Annotated[tuple[SourceSection, ...], Field(min_length=1)]
    filters: FiltersSection = FiltersSection()
    licenses: LicensesSection = LicensesSection()
    dedup: DedupSection = DedupSection()
    decontamination: DecontaminationSection = DecontaminationSection()
    tokenize: TokenizeSection = TokenizeSection()
    phases: tuple[Phase, ...] = ()
    """Mixtures from certain training steps on, by ascending from_step: data.phases of the training configuration."""
    slurm: SlurmSection = SlurmSection()

    @model_validator(mode="after")
    def _check_names(self) -> Corpus:
        names = [source.name for source in self.sources]
        for what, given in (
            ("sources", names),
            ("benchmarks", [benchmark.name for benchmark in self.decontamination.benchmarks]),
        ):
            twice = sorted({name for name in given if given.count(name) > 1})
            if twice:
                raise ValueError(f"{what} need different names; used twice: {', '.join(twice)}")
        unknown = sorted({name for phase in self.phases for name in phase.weights} - set(names))
        if unknown:
            raise ValueError(f"phases name no source of this corpus: {', '.join(unknown)}")
        check_order(self.phases)
        return self

    def filters_of(self, source: SourceSection) -> FiltersSection:
        return source.filters or self.filters


def load_corpus(path: Path | str) -> Corpus:
    """Read and check a corpus file.

    Raises:
        UserError: lists everything wrong in it.
    """
    return load_section(path, Corpus)
