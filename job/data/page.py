"""The report of the data as one page of HTML that needs no network and runs no script."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from typing import Any

from job.guard.escape import for_terminal

_BARS = 24
_STYLE = """
:root { --back: #fff; --text: #1b1f24; --faint: #59636e; --line: #d1d9e0; --panel: #f6f8fa; --learned: #dafbe1;
  --learned-text: #0a3d1d; --bar: #0969da; --warn: #9a6700; }
@media (prefers-color-scheme: dark) { :root { --back: #0d1117; --text: #e6edf3; --faint: #9198a1; --line: #3d444d;
  --panel: #151b23; --learned: #12341f; --learned-text: #aff5b4; --bar: #4493f8; --warn: #d29922; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 60rem; padding: 1.5rem 1rem 4rem; background: var(--back); color: var(--text);
  font: 16px/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.6rem; margin: 0 0 .2rem; } h2 { font-size: 1.25rem; margin: 2.2rem 0 .6rem; }
h3 { font-size: 1rem; margin: 1.4rem 0 .4rem; } p { margin: .4rem 0; } .faint { color: var(--faint); }
.wide { overflow-x: auto; } table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: .3rem .7rem .3rem 0; border-bottom: 1px solid var(--line); vertical-align: top; }
td.number, th.number { text-align: right; } .warn { color: var(--warn); }
figure { margin: .5rem 0; } svg { display: block; width: 100%; height: auto; }
.axis { display: flex; justify-content: space-between; color: var(--faint); font-size: .875rem; }
figcaption { color: var(--faint); font-size: .875rem; }
.sample { background: var(--panel); border: 1px solid var(--line); border-radius: 6px; padding: .7rem; margin: .6rem 0;
  white-space: pre-wrap; font: .875rem/1.7 ui-monospace, monospace; max-height: 26rem; overflow-y: auto; }
.sample span { border-right: 1px dotted var(--line); } .sample .on { background: var(--learned); color: var(--learned-text); }
.key { padding: 0 .3rem; border-radius: 3px; background: var(--learned); color: var(--learned-text); }
"""


def page(report: Mapping[str, Any], names: Sequence[str], title: str) -> str:
    """The page. All text of the dataset is escaped."""
    body = "".join(_split(report, name) for name in names)
    overlap = report.get("overlap")
    warning = f'<p class="warn">{overlap:,} evaluation rows are also training rows.</p>' if overlap else ""
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">"
        f"<title>Data: {_safe(title)}</title><style>{_STYLE}</style></head><body>"
        f'<h1>Data report</h1><p class="faint">{_safe(title)}. Chat template: {_safe(report["chat_template"])}. '
        f"Rows of at most {report['max_length']:,} tokens{', packed' if report['packed'] else ''}.</p>{warning}{body}</body></html>\n"
    )


def _split(report: Mapping[str, Any], name: str) -> str:
    part = report[name]
    return (
        f"<h2>{'Training' if name == 'train' else 'Evaluation'} data</h2>"
        + _figures(part)
        + _histogram(part["original_lengths"], report["max_length"])
        + _notes(part)
        + _reasons(part["reasons"])
        + _samples(part["samples"])
    )


def _figures(part: Mapping[str, Any]) -> str:
    tokens = max(1, part["tokens"])
    rows: list[tuple[str, str]] = [
        ("row format", str(part["format"])),
        ("what is learned", str(part["trained_on"])),
        ("rows read", f"{part['rows_read']:,}"),
        ("rows used", f"{part['rows']:,}"),
        ("tokens", f"{part['tokens']:,}"),
        ("learned tokens", f"{part['learned_tokens']:,} ({part['learned_tokens'] / tokens:.1%})"),
        ("longest row", f"{part['longest_row']:,} tokens"),
    ]
    if "packed_rows" in part:
        share = part["tokens"] / max(1, part["packed_rows"] * part["packed_length"])
        rows.append(("packed into", f"{part['packed_rows']:,} rows, {share:.1%} full"))
    counted = (
        ("truncated_rows", "rows cut"),
        ("split_rows", "rows split"),
        ("rows_dropped_for_length", "rows dropped for their length"),
        ("unlearnable_rows", "rows whose prompt left no room for an answer"),
        ("malformed_rows", "rows that could not be used"),
        ("rows_not_wanted", "rows left out by the format"),
        ("duplicates", "rows that are copies of others"),
    )
    rows += [(label, f"{part[key]:,}") for key, label in counted if part[key]]
    rows += [
        (f"{what} tokens per row", ", ".join(f"{number} in {count:,} rows" for number, count in part[key].items()))
        for key, what in (("bos_per_row", "begin-of-sequence"), ("eos_per_row", "end-of-sequence"))
        if part[key]
    ]
    return _table(("", ""), rows)


def _histogram(lengths: Mapping[str, int], longest: int) -> str:
    """How many rows have how many tokens before anything is cut. The last bar has all that are much too long."""
    counts = {max(1, int(length)): count for length, count in lengths.items()}
    most_tokens = min(max(counts), 3 * longest)
    width = max(1, -(-most_tokens // _BARS))
    bars = [0] * (-(-most_tokens // width))
    for length, count in counts.items():
        bars[min((length - 1) // width, len(bars) - 1)] += count
    highest, step = max(bars), 600 / len(bars)
    shapes = "".join(
        f'<rect x="{index * step + 1:.1f}" y="{130 - 120 * count / highest:.1f}" width="{step - 2:.1f}" '
        f'height="{120 * count / highest:.1f}" fill="var(--bar)"><title>{index * width + 1:,} to {(index + 1) * width:,} tokens: {count:,} rows</title></rect>'
        for index, count in enumerate(bars)
        if count
    )
    limit = longest / width * step
    line = (
        f'<line x1="{limit:.1f}" y1="0" x2="{limit:.1f}" y2="130" stroke="var(--warn)" stroke-dasharray="4 3"/>'
        if limit < 600
        else ""
    )
    return (
        '<h3>Row lengths</h3><figure><svg viewBox="0 0 600 132" role="img" aria-label="Histogram of row lengths">'
        f'{shapes}{line}<line x1="0" y1="130.5" x2="600" y2="130.5" stroke="var(--line)"/></svg>'
        f'<div class="axis"><span>1</span><span>{len(bars) * width:,} tokens{" or more" if max(counts) > most_tokens else ""}</span></div>'
        f"<figcaption>Before anything is cut. The highest bar has {highest:,} rows. Rows may have {longest:,} tokens"
        f"{' (dashed line)' if line else ''}.</figcaption></figure>"
    )


def _notes(part: Mapping[str, Any]) -> str:
    items = "".join(f"<li>{_safe(text)} ({count:,} times)</li>" for text, count in part["told"].items())
    return f"<h3>How the rows were read</h3><ul>{items}</ul>" if items else ""


def _reasons(reasons: Sequence[Mapping[str, Any]]) -> str:
    if not reasons:
        return ""
    rows = "".join(
        f'<tr><td>{_safe(reason["reason"])}</td><td class="number">{reason["rows"]:,}</td><td>'
        + "<br>".join(f"{_safe(row['place'])}: <code>{_safe(row['preview'])}</code>" for row in reason["first"])
        + "</td></tr>"
        for reason in reasons
    )
    return (
        '<h3>Rows that could not be used</h3><div class="wide"><table><tr><th>reason</th><th class="number">rows</th>'
        f"<th>the first</th></tr>{rows}</table></div>"
    )


def _samples(samples: Sequence[Sequence[Sequence[Any]]]) -> str:
    shown = "".join(
        f'<h3>Row {number}</h3><div class="sample" tabindex="0">'
        + "".join(
            f'<span{" class=on" if learned else ""} title="{token}">{_safe(text)}</span>'
            for text, token, learned in tokens
        )
        + "</div>"
        for number, tokens in enumerate(samples, 1)
    )
    return f'<h2>Some rows, token by token</h2><p>What is learned is <span class="key">marked</span>.</p>{shown}'


def _table(head: tuple[str, str], rows: Sequence[tuple[str, str]]) -> str:
    cells = "".join(f"<tr><td>{_safe(name)}</td><td>{_safe(value)}</td></tr>" for name, value in rows)
    return f'<div class="wide"><table>{cells}</table></div>'


def _safe(text: Any) -> str:
    return html.escape(for_terminal(str(text)))
