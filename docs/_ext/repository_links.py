"""Links from a page to files of the checkout that are no pages: the same relative link works on GitHub and on the site.

    a module of the package      -> its highlighted source, which sphinx.ext.viewcode writes
    README.md, CHANGELOG.md, ... -> the page that shows it
    any other file               -> a copy of it in files/; of text with the suffix .txt, so that browsers show it
    a folder                     -> its README.md

SHOWN lists the pages whose text is a file of the checkout. On them a folder without README.md is no link; on other pages a link
to it is a warning, as is a link to nothing.
"""

import os
import pathlib
import re
import shutil
from urllib.parse import unquote

from docutils import nodes
from sphinx import addnodes
from sphinx.application import Sphinx
from sphinx.util import logging
from sphinx.util.osutil import relative_uri

logger = logging.getLogger(__name__)
ROOT = pathlib.Path(__file__).resolve().parents[2]
SHOWN = {"changelog": "CHANGELOG.md", "zoo": "zoo/README.md"}
PAGES = {"docs/gallery/README.md": "gallery/index", "README.md": "index", **{file: page for page, file in SHOWN.items()}}
TEXT = (".csv", ".json", ".md", ".py", ".yml")


def show_file(app: Sphinx, docname: str, source: list[str]) -> None:
    """The text of a page of SHOWN: that of its file, with links as they are seen from the page."""
    if docname in SHOWN:
        file = ROOT / SHOWN[docname]
        folder = os.path.relpath(file.parent, app.srcdir)
        text = file.read_text(encoding="utf-8")
        source[0] = re.sub(r"\]\((?![a-z]+:|#|/)", rf"]({folder}/", text)
        app.env.note_dependency(str(file))


def resolve(app: Sphinx, doctree: nodes.document) -> None:
    """Replace links to files outside the pages in one document."""
    here = pathlib.Path(app.env.doc2path(app.env.docname)).parent
    for node in [*doctree.findall(addnodes.pending_xref), *doctree.findall(addnodes.download_reference)]:
        target, _, anchor = unquote(str(node.get("reftarget", ""))).partition("#")
        anchor = anchor or node.get("reftargetid") or ""
        if isinstance(node, addnodes.pending_xref) and node.get("reftype") not in ("doc", "myst"):
            continue
        base = pathlib.Path(app.srcdir) if node.get("refdomain") == "doc" else here  # a page's name is not relative
        path = find(base, target, app)
        if path is not None and path.is_dir() and (path / "README.md").is_file():
            path /= "README.md"
        if path is None:
            continue
        name = path.relative_to(ROOT).as_posix()
        page = PAGES.get(name)
        if page in app.env.found_docs:
            uri = app.builder.get_relative_uri(app.env.docname, page) + (f"#{anchor}" if anchor else "")
        elif name.startswith("diffagents/") and path.suffix == ".py":
            uri = app.builder.get_relative_uri(
                app.env.docname, "_modules/" + name.removesuffix(".py").removesuffix("/__init__")
            )
        elif path.is_dir():
            if app.env.docname in SHOWN:  # written for a place where folders can be opened
                node.parent.replace(node, node.children)
            else:
                logger.warning("link to the folder %s: name a file in it", name, location=node)
            continue
        else:
            copied = f"files/{name}.txt" if path.suffix in TEXT else f"files/{name}"
            app.env.metadata[app.env.docname].setdefault("copied_files", {})[copied] = name  # type: ignore[attr-defined]
            uri = relative_uri(app.builder.get_target_uri(app.env.docname), copied)
        link = nodes.reference("", "", refuri=uri, internal=True)
        link += node.children
        node.replace_self(link)


def find(here: pathlib.Path, target: str, app: Sphinx) -> pathlib.Path | None:
    """The file or folder of the checkout that a link names; None if it is a page of the site or nothing."""
    if not target or "://" in target:
        return None
    for suffix in ("", ".md"):
        path = (here / (target + suffix)).resolve()  # a target outside docs/ is an absolute path
        if path.exists() and path.is_relative_to(ROOT) and path != ROOT:
            docname = app.env.path2doc(path)
            return None if docname in app.env.found_docs else path
    return None


def copy_files(app: Sphinx, exception: Exception | None) -> None:
    """Copy what pages link to."""
    if exception is not None or app.builder.format != "html":
        return
    out = pathlib.Path(app.outdir)
    for metadata in app.env.metadata.values():
        for copied, name in metadata.get("copied_files", {}).items():
            (out / copied).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, out / copied)


def setup(app: Sphinx) -> dict[str, bool]:
    app.connect("source-read", show_file)
    app.connect("doctree-read", resolve)
    app.connect("build-finished", copy_files)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
