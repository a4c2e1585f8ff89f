"""Generated articles and citations for `corpus_readers`: invented words, the shape and size of real ones."""

from __future__ import annotations

import gzip
import io
import tarfile
from pathlib import Path
from random import Random

_SYLLABLES = (
    "zel vor tam bri que lax nor dex fil gan mor pra ruv sol tev xan a i o e u pril mab tin ol".split()
)


class Writer:
    """Writes invented text; the same for the same seed."""

    def __init__(self, seed: int) -> None:
        self._random = Random(seed)
        self._words = [
            "".join(self._random.choices(_SYLLABLES, k=self._random.randint(1, 4))) for _ in range(4000)
        ]

    def words(self, count: int) -> str:
        return " ".join(self._random.choices(self._words, k=count))

    def sentence(self) -> str:
        return self.words(self._random.randint(8, 28)).capitalize() + "."

    def paragraph(self, references: int) -> str:
        """A paragraph of JATS: about 120 words, citations, formatting, sometimes a formula or a figure."""
        parts = []
        for _ in range(6):
            text = self.sentence()[:-1]
            draw = self._random.random()
            if draw < 0.6:
                number = self._random.randint(1, references)
                text += f' [<xref ref-type="bibr" rid="B{number}">{number}</xref>]'
            if draw < 0.2:
                text += f" (<italic>{self.words(2)}</italic>, 10<sup>{self._random.randint(2, 9)}</sup>)"
            if draw > 0.9:
                text += f' (<xref ref-type="fig" rid="F{self._random.randint(1, 4)}">Fig. 1</xref>)'
            parts.append(text + ".")
        if self._random.random() < 0.1:
            parts.append(
                "<inline-formula><mml:math><mml:msup><mml:mi>x</mml:mi><mml:mn>2</mml:mn></mml:msup>"
                "<mml:mo>=</mml:mo><mml:mi>y</mml:mi></mml:math></inline-formula>"
            )
        return f"<p>{' '.join(parts)}</p>"

    def article(self, number: int, *, sections: int = 6, references: int = 45) -> str:
        """A JATS article of about 80 kB: abstract, sections, 4 figures, 2 tables, bibliography."""
        body = []
        for section in range(sections):
            paragraphs = "".join(self.paragraph(references) for _ in range(3))
            inner = "".join(self.paragraph(references) for _ in range(2))
            body.append(
                f'<sec id="s{section}"><title>{self.words(3)}</title>{paragraphs}'
                f"<sec><title>{self.words(4)}</title>{inner}</sec></sec>"
            )
        for figure in range(1, 5):
            body.append(
                f'<fig id="F{figure}"><label>Fig. {figure}</label><caption><p>{self.sentence()} {self.sentence()}</p>'
                f'</caption><graphic xlink:href="f{figure}"/></fig>'
            )
        for table in range(1, 3):
            rows = "".join(
                "<tr>"
                + "".join(f"<td>{self.words(1)} {self._random.randint(1, 99)}</td>" for _ in range(5))
                + "</tr>"
                for _ in range(12)
            )
            body.append(
                f'<table-wrap id="T{table}"><label>Table {table}</label><caption><p>{self.sentence()}</p></caption>'
                f"<table><tbody>{rows}</tbody></table></table-wrap>"
            )
        listed = "".join(self._reference(n) for n in range(1, references + 1))
        return (
            '<?xml version="1.0" encoding="UTF-8"?>\n<!DOCTYPE article PUBLIC "-//NLM//DTD JATS (Z39.96) Journal '
            'Archiving and Interchange DTD v1.2 20190208//EN" "JATS-archivearticle1.dtd">\n'
            '<article xmlns:mml="http://www.w3.org/1998/Math/MathML" xmlns:xlink="http://www.w3.org/1999/xlink" '
            'article-type="research-article" xml:lang="en"><front><journal-meta><journal-title-group><journal-title>'
            f"{self.words(4)}</journal-title></journal-title-group></journal-meta><article-meta>"
            f'<article-id pub-id-type="pmid">{70_000_000 + number}</article-id>'
            f'<article-id pub-id-type="pmc">{number}</article-id>'
            f"<title-group><article-title>{self.words(12)}</article-title></title-group><contrib-group>"
            + "".join(self._author() for _ in range(6))
            + "</contrib-group><pub-date pub-type='epub'><day>1</day><month>2</month><year>2024</year></pub-date>"
            "<pub-date pub-type='collection'><year>2024</year></pub-date>"
            '<permissions><license xlink:href="https://creativecommons.org/licenses/by/4.0/"/></permissions>'
            f"<abstract>{self.paragraph(references)}</abstract></article-meta></front>"
            f"<body>{''.join(body)}</body><back><ack><p>{self.sentence()}</p></ack><ref-list>{listed}</ref-list></back>"
            "</article>\n"
        )

    def _author(self) -> str:
        return (
            f'<contrib contrib-type="author"><name><surname>{self.words(1)}</surname><given-names>{self.words(1)}'
            "</given-names></name></contrib>"
        )

    def _reference(self, number: int) -> str:
        names = "".join(
            f"<name><surname>{self.words(1)}</surname><given-names>A</given-names></name>" for _ in range(4)
        )
        return (
            f'<ref id="B{number}"><label>{number}</label><element-citation publication-type="journal"><person-group '
            f'person-group-type="author">{names}</person-group><article-title>{self.words(11)}</article-title>'
            f"<source>{self.words(3)}</source><year>2001</year><volume>3</volume><fpage>4</fpage>"
            f'<pub-id pub-id-type="pmid">{number}</pub-id></element-citation></ref>'
        )

    def citation(self, number: int) -> str:
        """A MEDLINE citation of about 8 kB: abstract of 200 words, authors with affiliations, MeSH, references."""
        authors = "".join(
            f'<Author ValidYN="Y"><LastName>{self.words(1)}</LastName><ForeName>{self.words(1)}</ForeName><Initials>A'
            f"</Initials><AffiliationInfo><Affiliation>{self.words(12)}</Affiliation></AffiliationInfo></Author>"
            for _ in range(6)
        )
        headings = "".join(
            f'<MeshHeading><DescriptorName UI="D{n:06d}" MajorTopicYN="N">{self.words(2)}</DescriptorName>'
            f'<QualifierName UI="Q{n:06d}" MajorTopicYN="N">{self.words(1)}</QualifierName></MeshHeading>'
            for n in range(10)
        )
        cited = "".join(
            f"<Reference><Citation>{self.words(12)}</Citation><ArticleIdList><ArticleId IdType='pubmed'>{n}</ArticleId>"
            "</ArticleIdList></Reference>"
            for n in range(20)
        )
        parts = "".join(
            f'<AbstractText Label="{label}" NlmCategory="{label}">{self.sentence()} {self.sentence()} {self.sentence()}'
            "</AbstractText>"
            for label in ("BACKGROUND", "METHODS", "RESULTS", "CONCLUSIONS")
        )
        return (
            f'<PubmedArticle><MedlineCitation Status="MEDLINE" Owner="NLM"><PMID Version="1">{number}</PMID>'
            "<DateCompleted><Year>2020</Year><Month>01</Month><Day>02</Day></DateCompleted>"
            "<DateRevised><Year>2021</Year><Month>01</Month><Day>02</Day></DateRevised>"
            '<Article PubModel="Print"><Journal><ISSN IssnType="Print">0000-0000</ISSN><JournalIssue '
            'CitedMedium="Print"><Volume>1</Volume><Issue>2</Issue><PubDate><Year>2019</Year><Month>Dec</Month>'
            f"</PubDate></JournalIssue><Title>{self.words(4)}</Title><ISOAbbreviation>X</ISOAbbreviation></Journal>"
            f"<ArticleTitle>{self.words(12)}.</ArticleTitle><Pagination><MedlinePgn>1-2</MedlinePgn></Pagination>"
            f'<ELocationID EIdType="doi" ValidYN="Y">10.5555/{number}</ELocationID><Abstract>{parts}</Abstract>'
            f'<AuthorList CompleteYN="Y">{authors}</AuthorList><Language>eng</Language><PublicationTypeList>'
            '<PublicationType UI="D016428">Journal Article</PublicationType></PublicationTypeList></Article>'
            "<MedlineJournalInfo><Country>Nowhere</Country><MedlineTA>X</MedlineTA><NlmUniqueID>1</NlmUniqueID>"
            f"<ISSNLinking>0000-0000</ISSNLinking></MedlineJournalInfo><MeshHeadingList>{headings}</MeshHeadingList>"
            "</MedlineCitation><PubmedData><PublicationStatus>ppublish</PublicationStatus><ArticleIdList>"
            f'<ArticleId IdType="pubmed">{number}</ArticleId><ArticleId IdType="doi">10.5555/{number}</ArticleId>'
            f"</ArticleIdList><ReferenceList>{cited}</ReferenceList></PubmedData></PubmedArticle>\n"
        )


_DISTINCT_CITATIONS, _DISTINCT_ARTICLES = 500, 50  # in a file; larger ones repeat them under other numbers
_NUMBER = 12_345_678


def write_medline(path: Path, num_bytes: int, seed: int = 0) -> int:
    """A compressed file of so many bytes before compression; returns the number of citations."""
    writer, written, number = Writer(seed), 0, 0
    distinct: list[bytes] = []
    with gzip.open(path, "wb", compresslevel=1) as file:
        file.write(
            b'<?xml version="1.0" encoding="utf-8"?>\n<!DOCTYPE PubmedArticleSet SYSTEM "pubmed_260101.dtd">\n'
            b"<PubmedArticleSet>\n"
        )
        while written < num_bytes:
            if len(distinct) < _DISTINCT_CITATIONS:
                distinct.append(writer.citation(_NUMBER).encode())
            data = distinct[number % len(distinct)].replace(b"%d" % _NUMBER, b"%d" % (70_000_000 + number))
            file.write(data)
            written += len(data)
            number += 1
        file.write(b"</PubmedArticleSet>\n")
    return number


def write_bundle(path: Path, num_bytes: int, seed: int = 0) -> int:
    """A tar.gz of articles with so many bytes before compression; returns their number."""
    writer, written, number = Writer(seed), 0, 0
    distinct: list[bytes] = []
    with tarfile.open(path, "w:gz", compresslevel=1) as archive:
        while written < num_bytes:
            if len(distinct) < _DISTINCT_ARTICLES:
                distinct.append(writer.article(number).encode())
            data = distinct[number % len(distinct)]
            info = tarfile.TarInfo(f"PMC000xxxxxx/PMC{number}.xml")
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
            written += len(data)
            number += 1
    return number
