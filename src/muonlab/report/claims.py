"""The claims ledger as a page and as a table for the terminal."""

import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from rich import box
from rich.table import Table
from rich.text import Text

from muonlab.errors import InputError
from muonlab.files import replacing
from muonlab.studies.claims import Judged
from muonlab.studies.ledger import Claim, Ledger, studies_of
from muonlab.studies.study import FULL
from muonlab.studies.verdicts import FAILS, HOLDS, LEVEL, NOT_DISTINGUISHABLE, VERDICTS

STYLES = {HOLDS: "bold green", FAILS: "bold red", NOT_DISTINGUISHABLE: "bold yellow"}

INTRODUCTION = f"""Every claim of the five documents that this project starts from, one row each, and what runs say to it. Rows are data in `{{ledger}}`: a claim, the study and the statistic that would decide it. This page is written by

    {{command}}

Nobody writes a verdict by hand: it is computed from the summaries of study folders, or from the source's own numbers (*arithmetic*: that a number follows from a table says nothing about the table). An edit of this page is lost.

**How a verdict is made.** A claim says where an effect lies: below zero ("better"), at most 0.93 times ("7 % lower"), within a band around zero ("no difference"). Runs of both sides are paired by seed, and Student's 95 % interval of the effect decides. The claim *holds* if the whole interval lies where the claim says, it *does not hold* if the whole interval lies elsewhere, and otherwise the runs are *not distinguishable*. A claim of equality must name its band; it holds after two one-sided tests, each at 2.5 %. A claim that one cell is best holds if it beats every other cell. Where the claim speaks of a best setting, the setting is chosen on the first seed and judged on the others. One seed has no error bar: *not yet decidable*. *Cannot be decided* comes with its reason.

**Many claims, one study.** Claims that are tested with one study folder are a family: their p-values are adjusted by Holm's method, and a verdict stands only if the adjusted p-value is at most {LEVEL:g}. The table shows the plain interval and the adjusted p-value.

**Scale.** Runs of a scaled-down study say something about that scale. Such verdicts are labelled with it; for a claim about a larger model they are a hint, not an answer.

**Seconds and memory** are those of the machine that made the runs, without compilation and evaluation; runs that shared a busy machine have noisy seconds.

"""


def write_page(ledger: Ledger, judged: Sequence[Judged], path: str | Path, command: str = "muonlab claims") -> Path:
    """The page, replaced as a whole or not at all."""
    path = Path(path)
    if not path.parent.is_dir():
        raise InputError(f"cannot write {path}: there is no folder {path.parent}")
    with replacing(path) as temporary:
        temporary.write_text(page(ledger, judged, command), encoding="utf-8")
    return path


def page(ledger: Ledger, judged: Sequence[Judged], command: str = "muonlab claims") -> str:
    """The ledger with its verdicts as Markdown."""
    parts = ["# Claims\n\n", INTRODUCTION.format(ledger=ledger.path.name, command=command.replace("\n", " "))]
    parts += ["## Verdicts\n\n", _table(["seed", *VERDICTS, "all"], list(_counts(ledger, judged)))]
    for seed, title in ledger.seeds.items():
        rows = [row for row in judged if row.claim.seed == seed]
        if not rows:
            continue
        parts.append(f"## Seed {_escape(seed)}: {_escape(title)}\n\n")
        cells = [[row.claim.id, _claim(row), _verdict(row), _effect(row), _evidence(row), _note(row)] for row in rows]
        parts.append(_table(["", "claim", "verdict", "effect", "evidence", "note"], cells))
    parts.append("## Evidence\n\n")
    used = {summary.folder: summary for row in judged for summary in row.summaries}
    if not used:
        parts.append("No study folder was given: what needs runs is not yet run.\n")
    for summary in used.values():
        what = " ".join(part for part in (summary.name, summary.version) if part)
        how = f", made by `{summary.command.replace('`', chr(39))}`" if summary.command else ""
        parts.append(f"- {_escape(what)}, {_escape(summary.scale)} scale, seeds {_numbers(summary.seeds)}{how}\n")
    return "".join(parts)


def claims_table(judged: Sequence[Judged]) -> Table:
    """The verdicts for the terminal."""
    table = Table(box=box.SIMPLE, title=f"{len(judged)} claims", title_justify="left")
    for column in ("", "claim", "verdict", "effect", "evidence"):
        table.add_column(column, overflow="fold")
    for row in judged:
        verdict = Text(row.verdict + _label(row), style=STYLES.get(row.verdict, ""))
        plain = [Text(row.claim.id), Text(row.claim.claim), verdict, Text(row.finding.effect), Text(_source(row))]
        table.add_row(*plain)
    return table


def _counts(ledger: Ledger, judged: Sequence[Judged]) -> list[list[str]]:
    lines = []
    for seed in ledger.seeds:
        count = Counter(row.verdict for row in judged if row.claim.seed == seed)
        lines.append([_escape(seed), *(str(count[verdict]) for verdict in VERDICTS), str(count.total())])
    total = Counter(row.verdict for row in judged)
    return [*lines, ["all", *(str(total[verdict]) for verdict in VERDICTS), str(total.total())]]


def _claim(row: Judged) -> str:
    return f"{_escape(row.claim.claim)} ({_escape(row.claim.where)})"


def _label(row: Judged) -> str:
    if row.claim.statistic.kind == "arithmetic":
        return " (arithmetic)"
    return f" ({row.scale} scale)" if row.scale not in (None, FULL) else ""


def _verdict(row: Judged) -> str:
    return f"**{row.verdict}** {_escape(_label(row))}".rstrip()


def _effect(row: Judged) -> str:
    text = _escape(row.finding.effect)
    if row.adjusted_p is not None:
        p = "p < 0.001" if row.adjusted_p < 0.001 else f"p = {row.adjusted_p:.3f}"
        text += f"; {p}" + (f" (Holm over {row.family})" if row.family > 1 else "")
    return text.removeprefix("; ")


def _evidence(row: Judged) -> str:
    return _escape(_source(row))


def _source(row: Judged) -> str:
    """What decided a claim, or what would."""
    claim: Claim = row.claim
    if not claim.needs_runs:
        return "the source's numbers" if claim.statistic.kind == "arithmetic" else "none"
    if not row.summaries:
        size = "" if claim.evidence == "micro" else ", on a GPU"
        version = f" --version {claim.version}" if claim.version else ""
        return f"would be: {' and '.join(f'muonlab study {name}{version}' for name in studies_of(claim))}{size}"
    names = ", ".join(" ".join(part for part in (s.name, s.version) if part) for s in row.summaries)
    return f"{names}; {row.summaries[0].scale} scale; {row.finding.seeds} seeds judged"


def _note(row: Judged) -> str:
    parts = [row.finding.reason, row.claim.known]
    if row.scale not in (None, FULL) and row.claim.evidence == "gpu":
        parts.insert(0, "the claim is about a larger scale")
    return _escape(". ".join(part[0].upper() + part[1:].rstrip(".") for part in parts if part))


def _numbers(seeds: Sequence[int]) -> str:
    return ", ".join(map(str, seeds)) or "none"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines) + "\n"


def _escape(text: str) -> str:
    """Text that Markdown shows as it is: nothing in it is markup, a cell border, HTML or a link."""
    text = " ".join(text.split()).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\`*_\[\]|~$])", r"\\\1", text)
