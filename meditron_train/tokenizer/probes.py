"""Texts on which tokenizers are compared: of every kind that makes them differ."""

from __future__ import annotations

PROBE_TEXTS = (
    "The dose is 5 mg/kg twice daily.", " leading space", "  two leading", "trailing  ", "a  b   c", "", " ", "   ",
    "line one\nline two\n\n\tindented", "\n", "naïve café – “quoted” … ½ µg α-blocker β₂ ≥ 40 °C", "漢字かな عربي",
    "emoji 🧬🩺 and \U0001f9ec", "x=1;y=[2,3]{z}", "CamelCase_snake-case/path\\back", "http://example.org/?q=a&b=c#d",
    "1234567890 3.14159 1,000,000", "\u00a0non-breaking\u200bzero width", "ﬁ ligature ① ⅷ Å", "▁ literal lower block",
    "I'm you've WE'LL don't", "\r\n\r\n  a\n \n", "e\u0301 decomposed",
    "a" * 64 + "!", "1" * 64 + "!", " " * 64 + "!", "\n" * 64 + "!", "aB1 " * 16 + "!",
)  # fmt: skip
