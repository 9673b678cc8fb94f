"""`llms.txt` and `llms-full.txt`: a list of the pages, and the text of all of them in one file."""

from docutils import nodes
from sphinx.builders.text import TextBuilder
from sphinx.writers.text import TextTranslator

LEFT_OUT = ("genindex", "sg_execution_times", "gallery/sg_execution_times")


def write_plain_text(app, exception):
    """Write both files next to the pages, in the order of the contents."""
    if exception or app.builder.format != "html":
        return
    builder = TextBuilder(app, app.env)
    builder.secnumbers = {}  # sections are not numbered
    names = [name for name in sort_pages(app.env) if name not in LEFT_OUT]
    links, texts = [], []
    for name in names:
        page = app.env.get_and_resolve_doctree(name, builder, tags=app.tags)
        title = app.env.titles[name].astext()
        link = f"- [{title}]({app.builder.get_target_uri(name)})"
        links.append(": ".join([link, *find_first_paragraph(page)]))
        translator = PlainText(page, builder)
        page.walkabout(translator)
        texts.append(translator.body.strip())
    app.outdir.joinpath("llms.txt").write_text(
        f"# {app.config.project}\n\nThe text of all pages is in [llms-full.txt](llms-full.txt).\n\n"
        + "\n".join(links)
        + "\n",
        encoding="utf-8",
    )
    rule = "\n\n" + "=" * 80 + "\n\n"
    app.outdir.joinpath("llms-full.txt").write_text(rule.join(texts) + "\n", encoding="utf-8")


def find_first_paragraph(page):
    """Return a list of the first paragraph outside notes, or an empty list."""
    for paragraph in page.findall(nodes.paragraph):
        if not isinstance(paragraph.parent, nodes.Admonition):
            return [" ".join(paragraph.astext().split())]
    return []


class PlainText(TextTranslator):
    """Text of a page; of nodes that only HTML has, that of the nodes inside."""

    def unknown_visit(self, node):
        pass

    unknown_departure = unknown_visit


def sort_pages(env):
    """Return the pages as the tables of contents have them, each once."""
    waiting, found = [env.config.root_doc], []
    while waiting:
        name = waiting.pop(0)
        if name not in found and name in env.all_docs:
            found.append(name)
            waiting = env.toctree_includes.get(name, []) + waiting
    return found


def setup(app):
    app.connect("build-finished", write_plain_text)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
