"""Tables of the page. They scroll sideways by themselves, so that the page never does."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape


@dataclass(frozen=True)
class Markup:
    """Text that is HTML already."""

    html: str


Cell = str | Markup


def table(caption: str, heads: Sequence[str], rows: Sequence[Sequence[Cell]], numbers: Sequence[int] = ()) -> str:
    """`numbers` are the columns that are set to the right. The first column names its row."""

    def cell(column: int, value: Cell) -> str:
        kind = ' class="number"' if column in numbers else _fit(value)
        tag, scope = ("th", ' scope="row"') if column == 0 else ("td", "")
        return f"<{tag}{scope}{kind}>{_html(value)}</{tag}>"

    head = "".join(
        f'<th scope="col"{" class=number" if column in numbers else ""}>{escape(text)}</th>'
        for column, text in enumerate(heads)
    )
    body = "".join(f"<tr>{''.join(cell(column, value) for column, value in enumerate(row))}</tr>" for row in rows)
    named = escape(caption)
    return (
        f'<p class="caption">{named}</p><div class="scroll" role="region" aria-label="{named}" tabindex="0"><table>'
        f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def pairs(rows: Sequence[tuple[str, Cell]]) -> str:
    """Names and what they are."""
    body = "".join(f'<tr><th scope="row">{escape(name)}</th><td>{_html(value)}</td></tr>' for name, value in rows)
    return f'<table class="facts"><tbody>{body}</tbody></table>'


def tiles(figures: Sequence[tuple[str, str, str]]) -> str:
    """Large figures beside each other: what each is called, its value, and its unit or what else is to be said."""

    def tile(name: str, value: str, unit: str) -> str:
        said = f'<dd class="unit">{escape(unit)}</dd>' if unit else ""
        return f'<div><dt>{escape(name)}</dt><dd class="figure">{escape(value)}</dd>{said}</div>'

    return f'<dl class="tiles">{"".join(tile(*figure) for figure in figures)}</dl>'


def _fit(value: Cell) -> str:
    """Words of a few letters stay on a line; long ones get room to wrap in."""
    if isinstance(value, Markup) or len(value) <= 26:
        return ' class="short"'
    return ' class="long"'


def _html(value: Cell) -> str:
    return value.html if isinstance(value, Markup) else escape(value)
