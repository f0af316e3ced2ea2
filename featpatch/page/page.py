"""HTML files made of sections with tables, charts and texts, from jinja2 templates and itables tables."""

import re
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape

from featpatch.files import path_to_write, writing

Block = Markup
"""A piece of HTML whose user text is escaped."""

TEMPLATES = Environment(
    loader=PackageLoader("featpatch.page"), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
)


LONG = 40
"""The number of characters from which the text of a table's cell is wrapped."""


@dataclass(frozen=True)
class Section:
    """A section of a page.

    Attributes:
        name: the name of its anchor.
        title: the heading; a section without one has no link at the top of the page either.
        text: an introduction in a sentence or two, as plain text.
        blocks: the pieces of HTML below the text.
    """

    name: str
    title: str
    text: str
    blocks: Sequence[Block]


def page(title: str, subtitle: str, sections: Sequence[Section]) -> str:
    """Return a page as the content of an HTML file."""
    from itables.javascript import generate_init_offline_itables_html
    from itables.options import dt_bundle

    scripts = generate_init_offline_itables_html(dt_bundle)
    tables = Markup(re.sub("<noscript>.*</noscript>", "", scripts, flags=re.DOTALL))  # the page has its own words there
    values = {"title": title, "subtitle": subtitle, "sections": sections}
    return TEMPLATES.get_template("page.html").render(datatables=tables, **values)


class Page(Path if TYPE_CHECKING else type(Path())):  # type: ignore[misc]  # only the class for this platform has subclasses
    """The path of an HTML page, which a notebook shows as the page itself."""

    def _repr_html_(self) -> str:
        return block("inline.html", content=self.read_text(encoding="utf-8"), path=str(self))


def write(path: str | Path, content: str) -> Page:
    """Write a page completely or not at all, and create its folder if it is missing.

    Raises:
        FeatpatchError: the path has another ending than `.html`, is a folder or can't be written to.
    """
    with writing(path_to_write(path, ".html", ".htm")) as file:
        file.write_text(content, encoding="utf-8")
    return Page(path)


def block(template: str, **values: Any) -> Block:
    """Return the HTML of a template in the folder `templates`, filled with values."""
    return Markup(TEMPLATES.get_template(template).render(**values))


class Plotted:
    """A result that notebooks show as its figure where they can draw plotly figures, and otherwise as its table."""

    @abstractmethod
    def _figure(self) -> Any:
        """Return a `plotly.graph_objects.Figure`."""

    @abstractmethod
    def _frame(self) -> pd.DataFrame:
        """Return a table."""

    def _repr_mimebundle_(self, **_: Any) -> Any:
        return self._figure()._repr_mimebundle_()

    def _repr_html_(self) -> str:
        first = repr(self).partition("\n")[0]
        return f"<p>{escape(first)}</p>{self._frame().to_html(index=False, max_rows=20, float_format='{:.3g}'.format)}"


def table(frame: pd.DataFrame, *, rows: int = 15, order: int | None = None, first: Sequence[str] = ()) -> Block:
    """Return the HTML of a table that can be sorted and searched; HTML in its cells is escaped.

    Args:
        frame: the table.
        rows: the number of rows per page of the table.
        order: the index of the column by which the table is sorted initially, largest value first.
        first: the columns that a narrow screen shows; by default all.
    """
    from itables import to_html_datatable

    wide = [number for number, name in enumerate(frame.columns) if first and name not in first]
    long = [number for number, name in enumerate(frame) if (frame[name].astype(str).str.len() > LONG).any()]
    classes = [{"targets": targets, "className": name} for targets, name in ((wide, "wide"), (long, "long")) if targets]
    return Markup(
        to_html_datatable(
            frame,
            connected=False,
            showIndex=False,
            allow_html=False,
            format_floats_in_python=False,
            maxBytes=0,
            maxRows=0,
            maxColumns=0,
            pageLength=rows,
            lengthMenu=[rows, 50, 200],
            order=[] if order is None else [[order, "desc"]],
            columnDefs=classes,
            autoWidth=False,
            style="width:100%",
            classes="display compact",
        )
    )
