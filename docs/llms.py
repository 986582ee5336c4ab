"""`llms.txt` and `llms-full.txt`: the site for tools that read documentation.

The format is that of https://llmstxt.org. sphinx-llms-txt would copy the sources of the
pages, but those of the reference hold no more than names: the text is in docstrings.
"""

from collections.abc import Iterator

from docutils import nodes
from sphinx import addnodes
from sphinx.application import Sphinx
from sphinx.writers.text import TextTranslator

SUMMARY = (
    "Async SQLAlchemy sessions and transactions, delivered through dependency-injector "
    "containers. For PostgreSQL and SQLite."
)


def sections(app: Sphinx) -> Iterator[tuple[str, list[str]]]:
    """The tables of contents on the first page, in order: caption and pages."""
    for toctree in app.env.get_doctree("index").findall(addnodes.toctree):
        yield toctree["caption"] or "Pages", [name for _, name in toctree["entries"]]


def first_paragraph(app: Sphinx, page: str) -> str:
    paragraph = next(iter(app.env.get_doctree(page).findall(nodes.paragraph)), None)
    return "" if paragraph is None else " ".join(paragraph.astext().split())


def entry(app: Sphinx, page: str) -> str:
    title, address = app.env.titles[page].astext(), app.builder.get_target_uri(page)
    return f"- [{title}]({address}): {first_paragraph(app, page)}"


def as_text(app: Sphinx, page: str) -> str:
    """Markdown as it was written; the reference as it came from the docstrings."""
    if not page.startswith("reference/"):
        return app.env.doc2path(page).read_text(encoding="utf-8")
    translator = TextTranslator(
        app.env.get_and_resolve_doctree(page, app.builder), app.builder
    )
    translator.document.walkabout(translator)
    return translator.body


def write(app: Sphinx, error: Exception | None) -> None:
    if error is not None or app.builder.format != "html":
        return
    head = [f"# {app.config.project}", f"> {SUMMARY}"]
    index, full = [*head], [*head]
    for caption, pages in sections(app):
        index += [f"## {caption}", "\n".join(entry(app, page) for page in pages)]
        full += [as_text(app, page).strip() for page in pages]
    for name, parts in (("llms.txt", index), ("llms-full.txt", full)):
        (app.outdir / name).write_text("\n\n".join(parts) + "\n", encoding="utf-8")


def setup(app: Sphinx) -> dict[str, bool]:
    app.connect("build-finished", write)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
