"""A model's scores beside published ones, and a paired test between two models of ours."""

from __future__ import annotations

import csv
import html
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from meditron_train.errors import UserError
from meditron_train.evaluate.harness.statistics import PairedTest, paired_test
from meditron_train.files import read_json_object
from meditron_train.tasks.catalogue import BENCHMARKS

PUBLISHED_FILE = Path(__file__).parents[2] / "tasks" / "published.yaml"
_MAX_RESULT_BYTES = 1 << 30  # it has every answer
_SCORE_KEYS = (
    *("benchmark", "title", "protocol", "file_sha256", "num_items", "accuracy", "interval", "spread"),
    *("num_unparsed", "num_ties", "accuracy_of_parsed", "chance"),
)
_SOURCE = "Chen et al. 2023, arXiv 2311.16079"


@dataclass(frozen=True)
class Table:
    """Rows of (model, protocol, source, a cell for each column); cells are text, empty where there is no number."""

    columns: list[str]
    rows: list[tuple[str, str, str, list[str]]]
    warnings: list[str]

    def markdown(self) -> str:
        header = ["model", "protocol", *self.columns, "source"]
        lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
        lines += [
            "| " + " | ".join([model, protocol, *cells, source]) + " |"
            for model, protocol, source, cells in self.rows
        ]
        return "\n".join([*lines, "", *(f"- {warning}" for warning in self.warnings)]).rstrip() + "\n"

    def html(self) -> str:
        def cells(values: Sequence[str], tag: str) -> str:
            return "<tr>" + "".join(f"<{tag}>{html.escape(value)}</{tag}>" for value in values) + "</tr>"

        body = [
            cells([model, protocol, *values, source], "td") for model, protocol, source, values in self.rows
        ]
        notes = "".join(f"<li>{html.escape(warning)}</li>" for warning in self.warnings)
        header = cells(["model", "protocol", *self.columns, "source"], "th")
        return (
            '<!doctype html><html lang="en"><meta charset="utf-8"><title>Scores</title>'
            "<style>body{font-family:sans-serif}td,th{padding:.2em .6em;text-align:left}"
            "tr:nth-child(even){background:#8881}</style>"
            f"<table><thead>{header}</thead><tbody>{''.join(body)}</tbody></table><ul>{notes}</ul></html>\n"
        )

    def csv(self) -> str:
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(["model", "protocol", *self.columns, "source"])
        writer.writerows([model, protocol, *cells, source] for model, protocol, source, cells in self.rows)
        return text.getvalue()


def read_result(path: Path) -> dict[str, Any]:
    """What `evaluate --output` wrote.

    Raises:
        UserError: the file is not that, or of a benchmark that is unknown here.
    """
    try:
        result = read_json_object(path, _MAX_RESULT_BYTES)
        if not {"model", "protocol", "scores", "answers"} <= result.keys():
            raise ValueError("it lacks scores")
        for score in result["scores"]:
            if missing := [key for key in _SCORE_KEYS if key not in score]:
                raise ValueError(f"a score lacks {missing[0]!r}")
            if score["benchmark"] not in BENCHMARKS:
                raise ValueError(
                    f"its benchmark {score['benchmark']!r} is unknown; known are {', '.join(BENCHMARKS)}"
                )
            describe_protocol(score["protocol"])
        describe_protocol(result["protocol"])
    except KeyError as error:
        raise UserError(
            f"{path} is not a result of `evaluate --output`: its protocol lacks {error}"
        ) from None
    except (UserError, ValueError, TypeError) as error:
        raise UserError(f"{path} is not a result of `evaluate --output`: {error}") from None
    return result


def compare(results: Sequence[dict[str, Any]]) -> Table:
    """The table of evaluation results (as `evaluate --output` writes them) and the published models.

    Ours come first, with 95 % intervals and numbers of questions. Says where protocols or questions differ: accuracies
    are comparable within one protocol only.
    """
    published = yaml.safe_load(PUBLISHED_FILE.read_text(encoding="utf-8"))
    columns = list(published["columns"])
    columns += [
        score["benchmark"]
        for result in results
        for score in result["scores"]
        if (BENCHMARKS[score["benchmark"]].column or score["benchmark"]) not in columns
    ]
    columns = list(dict.fromkeys(columns))
    rows = [_own_row(result, columns) for result in results]
    for table in published["tables"]:
        for model, values in table["rows"].items():
            known = dict(zip(published["columns"], values, strict=True))
            cells = ["" if known.get(column) is None else f"{known[column]:.1f}" for column in columns]
            rows.append((model, table["protocol"], f"{_SOURCE}, {table['name']}", cells))
    return Table(columns, rows, _warnings(results))


def _own_row(result: dict[str, Any], columns: Sequence[str]) -> tuple[str, str, str, list[str]]:
    cells = dict.fromkeys(columns, "")
    for score in result["scores"]:
        if score["accuracy"] is None:
            continue
        low, high = score["interval"]
        column = BENCHMARKS[score["benchmark"]].column or score["benchmark"]
        cells[column] = (
            f"{100 * score['accuracy']:.1f} [{100 * low:.1f}, {100 * high:.1f}] n={score['num_items']}"
        )
    return result["model"], _conditions(result), "this evaluation", list(cells.values())


def describe_protocol(protocol: dict[str, Any]) -> str:
    """What changes numbers: "cot, 3 shots, seeds 1, 2, 3, up to 512 tokens, chat" """
    parts = [protocol["mode"], f"{protocol['shots']} shots"]
    seeds = protocol["seeds"]
    if len(seeds) > 1 or protocol["shots"] or protocol["mode"] == "sc-cot":
        parts.append(f"seed{'s' if len(seeds) > 1 else ''} {', '.join(map(str, seeds))}")
    if protocol["mode"] == "sc-cot":
        parts.append(f"{protocol['branches']} branches at T={protocol['temperature']:g}")
    if protocol["mode"] != "likelihood" and "max_new_tokens" in protocol:
        parts.append(f"up to {protocol['max_new_tokens']} tokens")
    if protocol.get("chat"):
        parts.append("chat")
    return ", ".join(parts)


def _conditions(result: dict[str, Any]) -> str:
    """The protocol, and who computed in which precision."""
    parts = (describe_protocol(result["protocol"]), result.get("runner"), result.get("dtype"))
    return ", ".join(part for part in parts if part)


def _warnings(results: Sequence[dict[str, Any]]) -> list[str]:
    warnings = [
        "Published accuracies come from other prompts and other ways to read answers; compare within one protocol only."
    ]
    for result in results:
        for score in result["scores"]:
            if score["num_unparsed"]:
                answers = score["num_items"] * len(score["protocol"]["seeds"])
                warnings.append(
                    f"{result['model']}, {score['benchmark']}: {score['num_unparsed']} of {answers} answers could not "
                    f"be parsed and count as wrong (without them: {100 * score['accuracy_of_parsed']:.1f})"
                    if score["accuracy_of_parsed"] is not None
                    else f"{result['model']}, {score['benchmark']}: no answer could be parsed"
                )
            if score.get("num_cut"):  # not in results of earlier versions
                answers = score["num_items"] * len(score["protocol"]["seeds"])
                warnings.append(
                    f"{result['model']}, {score['benchmark']}: {score['num_cut']} of {answers} prompts are longer than "
                    "what the model reads, and lost their beginning"
                )
        if result.get("limit") is not None:
            warnings.append(
                f"{result['model']}: only the first {result['limit']} questions of each benchmark were asked"
            )
    protocols = {_conditions(result) for result in results}
    if len(protocols) > 1:
        warnings.append(f"the protocols of these evaluations differ: {'; '.join(sorted(protocols))}")
    return warnings + _different_questions(results)


def _different_questions(results: Sequence[dict[str, Any]]) -> list[str]:
    """A warning for each benchmark that these results do not have the same questions of."""
    asked: dict[str, list[tuple[str, int, str]]] = {}
    for result in results:
        for score in result["scores"]:
            file = str(score["file_sha256"])[:12]
            asked.setdefault(score["benchmark"], []).append((result["model"], score["num_items"], file))
    return [
        f"{name}: the questions of these evaluations differ: "
        + "; ".join(f"{model}: {number} of the file {file}…" for model, number, file in found)
        for name, found in asked.items()
        if len({(number, file) for _, number, file in found}) > 1
    ]


def compare_pair(first: dict[str, Any], second: dict[str, Any]) -> dict[str, PairedTest | None]:
    """The paired test for every benchmark that both results have a score of, with the first seed's answers.

    None where they were asked different questions: of another file, or with other right answers.
    """
    results = (first, second)
    scores = [
        {score["benchmark"]: score for score in result["scores"] if score["accuracy"] is not None}
        for result in results
    ]
    tests: dict[str, PairedTest | None] = {}
    for name in sorted(scores[0].keys() & scores[1].keys()):
        pairs = [_first_seed(result["answers"][name]) for result in results]
        asked = [[(answer["id"], answer["answer"]) for answer in answers] for answers in pairs]
        if scores[0][name]["file_sha256"] != scores[1][name]["file_sha256"] or asked[0] != asked[1]:
            tests[name] = None
            continue
        correct = [[answer["chosen"] == answer["answer"] for answer in answers] for answers in pairs]
        tests[name] = paired_test(*correct)
    return tests


def _first_seed(answers: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    return [answer for answer in answers if answer["seed"] == answers[0]["seed"]]
