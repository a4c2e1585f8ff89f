"""Pieces of JATS, and every rule that changes the text."""

from __future__ import annotations

import pytest
from lxml import etree

from meditron_train.corpus.safe_xml import parse_document
from meditron_train.corpus.text.jats import article_text
from meditron_train.corpus.text.math import mathml_formula, tex_formula
from meditron_train.corpus.text.rules import Removed, TextRules

HEAD = '<!DOCTYPE article SYSTEM "x.dtd"><article xmlns:xlink="x" xmlns:mml="http://www.w3.org/1998/Math/MathML">'


def text_of(body: str, front: str = "", back: str = "", **rules: object) -> str:
    source = (
        f"{HEAD}<front><article-meta>{front}</article-meta></front><body>{body}</body><back>{back}</back>"
    )
    source += "</article>"
    return article_text(parse_document(source.encode()), TextRules.model_validate(rules), Removed())


FIGURE = '<fig id="f"><label>FIG 2</label><caption><p>One two three. Four.</p></caption></fig>'
WRITTEN = "[fig] Figure 2: One two three. Four. [/fig]"
REFERENCE = '<p>See <xref ref-type="fig" rid="f">2b</xref>.</p>'
CITING = '<p>Shown [<xref ref-type="bibr" rid="r">7</xref>].</p>'
BIBLIOGRAPHY = (
    '<ref-list><ref id="r"><element-citation><name><surname>Mel</surname></name>'
    "<article-title>On cough and cold.</article-title></element-citation></ref></ref-list>"
)


@pytest.mark.parametrize(
    ("rules", "text"),
    [
        (
            {},
            "See [fig_ref] Figure 2: One two three [/fig_ref].\n[fig] Figure 2: One two three. Four. [/fig]",
        ),
        (
            {"ref_words": 2},
            "See [fig_ref] Figure 2: One two... [/fig_ref].\n[fig] Figure 2: One two three. Four. [/fig]",
        ),
        ({"figures": False, "figure_refs": "label"}, "See [fig_ref] Figure 2 [/fig_ref]."),
        ({"figures": False, "figure_refs": "drop"}, "See."),
    ],
)
def test_figures(rules, text):
    assert text_of(REFERENCE + FIGURE, **rules) == text


@pytest.mark.parametrize(
    ("rules", "text"),
    [
        ({}, "Shown [bib_ref] On cough and cold, Mel [/bib_ref]."),
        ({"citations": "label"}, "Shown [bib_ref] 7 [/bib_ref]."),
        ({"citations": "drop"}, "Shown."),
        ({"ref_words": 2}, "Shown [bib_ref] On cough..., Mel [/bib_ref]."),
    ],
)
def test_citations(rules, text):
    assert text_of(CITING, back=BIBLIOGRAPHY, **rules) == text


def test_a_reference_to_nothing_is_left_out():
    assert text_of(CITING) == "Shown."
    assert text_of(REFERENCE) == "See [fig_ref] 2b [/fig_ref]."


TABLE = (
    '<table-wrap id="t"><label>Table 1</label><caption><title>Doses</title></caption><table>'
    '<tr><td rowspan="2">a</td><td>b</td></tr><tr><td>c</td></tr><tr><td/><td> </td></tr></table></table-wrap>'
)


@pytest.mark.parametrize(
    ("rules", "text"),
    [
        ({}, "[table] Table 1: Doses.\na | b\n| c [/table]"),
        ({"tables": "caption"}, "[table] Table 1: Doses. [/table]"),
        ({"tables": "drop"}, ""),
    ],
)
def test_tables(rules, text):
    assert text_of(TABLE, **rules) == text


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ("<p>One.</p><p>Two.</p>", "One.\nTwo."),
        ("<list><list-item><p>a</p></list-item><list-item><p>b</p></list-item></list>", "- a\n- b"),
        ("<disp-formula>x</disp-formula>", "[formula] x [/formula]"),
        ("<alternatives><graphic/><table><tr><td>a</td></tr></table></alternatives><!-- no -->", "a"),
        ("<preformat>a | b</preformat><table><tr><td>c</td></tr></table><graphic/>", "a | b\nc"),
    ],
)
def test_tables_that_are_not_only_tables(content, text):
    foot = "<table-wrap-foot><p>Foot.</p></table-wrap-foot>"
    source = f"<table-wrap><label>Table 1</label>{content}{foot}</table-wrap>"
    assert text_of(source) == f"[table] Table 1\n{text}\nFoot. [/table]"
    assert text_of(source, tables="caption") == "[table] Table 1 [/table]"


def test_a_reference_to_several_figures():
    second = FIGURE.replace('id="f"', 'id="g"').replace("FIG 2", "FIG 3").replace("One two three.", "Five.")
    body = '<p>See <xref ref-type="fig" rid="f g">Figures 2 and 3</xref>.</p>' + FIGURE
    first = "[fig_ref] Figure 2: One two three [/fig_ref]"
    assert text_of(body + second).startswith(f"See {first} [fig_ref] Figure 3: Five [/fig_ref].\n")
    assert text_of(body).startswith("See [fig_ref] Figures 2 and 3 [/fig_ref].\n")  # there is no g


def test_other_rules():
    front = "<title-group><article-title>T</article-title></title-group><abstract><p>A.</p></abstract>"
    front += '<trans-abstract xml:lang="de"><p>Z.</p></trans-abstract>'
    body = "<sec><title>One</title><sec><title>Two</title><p>x<sup>2</sup>, 1<sup>st</sup></p></sec></sec>"
    back = "<ack><p>Thanks.</p></ack>"
    assert text_of(body, front, back) == "T\n\n# Abstract\nA.\n\n# One\n\n## Two\nx^2, 1st"
    rules = {
        "title": False,
        "abstract": False,
        "max_header_level": 1,
        "superscripts": "plain",
        "drop_boilerplate": False,
    }
    assert text_of(body, front, back, **rules) == "# One\n\n# Two\nx2, 1st\n\n# Acknowledgments\nThanks."
    assert text_of("", front, other_languages=True) == "T\n\n# Abstract\nA.\n\n# Abstract (de)\nZ."
    assert text_of("<p>a <inline-formula>x</inline-formula></p>", formulas=False) == "a"


def test_characters_of_html_that_the_file_does_not_declare():
    assert text_of("<p>&alpha;-blocker &nosuchthing; x</p>") == "α-blocker x"


@pytest.mark.parametrize(
    ("source", "formula"),
    [
        ("<mi>a</mi><mo>=</mo><msub><mi>b</mi><mn>1</mn></msub>", "a=b_1"),
        ("<mfrac><mn>1</mn><mrow><mi>x</mi><mo>-</mo><mi>y</mi></mrow></mfrac>", "1/(x-y)"),
        ("<msqrt><mi>x</mi><mo>+</mo><mn>1</mn></msqrt>", "sqrt(x+1)"),
        (
            "<munderover><mo>∑</mo><mrow><mi>i</mi><mo>=</mo><mn>1</mn></mrow><mi>n</mi></munderover>",
            "∑_(i=1)^n",
        ),
        ("<mfenced><mi>a</mi><mi>b</mi></mfenced>", "(a, b)"),
        ("<semantics><mrow><mi>a</mi></mrow><annotation>a</annotation></semantics>", "a"),
        ("<mfrac><mn>1</mn></mfrac>", "1"),
    ],
)
def test_mathml(source, formula):
    element = etree.fromstring(f'<math xmlns="http://www.w3.org/1998/Math/MathML">{source}</math>')
    assert mathml_formula(element) == formula


@pytest.mark.parametrize(
    ("source", "formula"),
    [
        (r"\documentclass{x}\begin{document}$$ a\le b $$\end{document}", r"a\le b"),
        (r"\[ a \]", "a"),
        ("$x$", "x"),
        ("x", "x"),
    ],
)
def test_tex(source, formula):
    assert tex_formula(source) == formula


def test_what_rules_remove_is_counted():
    source = (
        "<article><body><sec><title>Results</title><p>See https://example.org/abc for it\u200b.</p></sec>"
        "<sec><title>Funding</title><p>By nobody.</p></sec></body><back><ack><p>Thanks!</p></ack></back></article>"
    )
    removed = Removed()
    assert article_text(parse_document(source.encode()), TextRules(), removed) == "# Results\nSee for it."
    assert removed == {"urls": 23, "normalize": 1, "drop_boilerplate": len("FundingBy nobody.Thanks!")}
    drop = TextRules(drop_boilerplate=False, figures=False, tables="drop", formulas=False, citations="drop")
    figures = "<fig><label>Fig.</label></fig><table-wrap><label>Tab</label></table-wrap>"
    source = f"<article><body><p>So<xref ref-type='bibr'>[12]</xref></p>{figures}</body></article>"
    removed = Removed()
    article_text(parse_document(source.encode()), drop, removed)
    assert removed == {"citations": 4, "figures": 4, "tables": 3}
