"""Configuration of the documentation: ``docs/build`` builds it, without a network."""

from __future__ import annotations

import dataclasses
import enum
import inspect
import os
import pathlib
import pkgutil
import re
import sys
from typing import TYPE_CHECKING, Any

from sphinx.pycode import ModuleAnalyzer
from sphinx.util.inspect import stringify_signature

if TYPE_CHECKING:
    from sphinx.application import Sphinx

DOCS = pathlib.Path(__file__).parent.resolve()
ROOT = DOCS.parent
sys.path[:0] = [str(ROOT), str(DOCS / "_extensions")]

import forkshm  # noqa: E402

project = "forkshm"
author = "The forkshm developers"
project_copyright = "The forkshm developers, BSD-3-Clause"
version = release = forkshm.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx_design",
    "source_pages",
    "code_breaks",
]
# The gallery runs its programs, which takes a minute; FORKSHM_DOCS_GALLERY=0 omits it.
if os.environ.get("FORKSHM_DOCS_GALLERY", "1") != "0":
    extensions.append("sphinx_gallery.gen_gallery")
    sphinx_gallery_conf: dict[str, Any] = {
        "examples_dirs": [str(ROOT / "examples" / "gallery")],
        "gallery_dirs": ["gallery"],
        "filename_pattern": r"\.py$",
        "abort_on_example_error": True,
        "download_all_examples": False,
        "remove_config_comments": True,
        "show_memory": False,
        "write_computation_times": False,
        "show_signature": False,
        # An expression at the end of a block is shown if it has a display of its own, such as a report.
        "capture_repr": ("_repr_html_",),
        "min_reported_time": 0,
        "within_subsection_order": "FileNameSortKey",
    }
else:
    tags.add("no_gallery")  # type: ignore[name-defined]  # noqa: F821 - Sphinx puts it here

suppress_warnings = ["config.cache"]
exclude_patterns = ["_build", "sg_execution_times.rst", "_extensions", "_include", "gallery/*.ipynb"]
if "no_gallery" in tags:  # type: ignore[name-defined]  # noqa: F821
    exclude_patterns.append("gallery")
    suppress_warnings.append("toc.not_readable")
root_doc = "index"
source_suffix = {".md": "markdown", ".rst": "restructuredtext"}
nitpicky = False
keep_warnings = False

# Blocks without a language are commands and output.
highlight_language = "text"
myst_enable_extensions = ["colon_fence", "deflist", "attrs_inline"]
myst_heading_anchors = 4

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_custom_sections = ["Fork and threads"]
napoleon_use_ivar = True
napoleon_use_rtype = False
default_role = "py:obj"
python_use_unqualified_type_names = True
toc_object_entries_show_parents = "hide"
python_maximum_signature_line_length = 88

html_theme = "pydata_sphinx_theme"
html_title = f"forkshm {release}"
html_static_path = ["_static"]
html_css_files = ["forkshm.css"]
html_context = {"default_mode": "auto"}
html_show_sourcelink = False
html_copy_source = False
html_sidebars = {"index": [], "changelog": [], "compatibility": []}
html_theme_options = {
    "show_prev_next": True,
    "navigation_with_keys": False,
    "header_links_before_dropdown": 8,
    "secondary_sidebar_items": ["page-toc"],
    "footer_start": ["copyright"],
    "footer_end": [],
    "show_version_warning_banner": False,
    "back_to_top_button": False,
    "pygments_light_style": "a11y-high-contrast-light",
    "pygments_dark_style": "a11y-high-contrast-dark",
}


# -- the reference -------------------------------------------------------------------------

# Classes whose fields or members Sphinx does not find, because another module publishes them.
_FIELDS = {
    "forkshm.Creation": "forkshm.region._object",
    "forkshm.Mode": "forkshm.region._table",
    "forkshm.region.Advice": "forkshm.backend._interface._memory",
    "forkshm.pool.PoolStatistics": "forkshm.pool._statistics",
    "forkshm.pool.PoolReport": "forkshm.pool.observe._report",
    "forkshm.pool.SlowTask": "forkshm.pool.observe._report",
    "forkshm.pool.WorkerReport": "forkshm.pool.observe._report",
}


def _fields(app: Sphinx, what: str, name: str, obj: Any, options: object, lines: list[str]) -> None:
    if name in _FIELDS:
        docs = ModuleAnalyzer.for_module(_FIELDS[name]).find_attr_docs()
        is_enum = issubclass(obj, enum.Enum)
        for field in obj if is_enum else dataclasses.fields(obj):
            text = " ".join(docs.get((name.rpartition(".")[2], field.name), ()))
            lines.append(f":ivar {field.name}: {text}".rstrip())
            if not is_enum:
                lines.append(f":vartype {field.name}: {field.type}")


def _skip(app: Sphinx, what: str, name: str, member: object, skip: bool, options: object) -> bool | None:
    # What the standard library and NumPy define is described there. Sphinx has an object of its own for fields.
    if type(member).__module__.startswith("sphinx."):
        return None
    function = getattr(member, "fget", None) or getattr(member, "__func__", None) or member
    origin = getattr(function, "__module__", None) or getattr(
        getattr(function, "__objclass__", None), "__module__", None
    )
    is_wrapper = (getattr(member, "__doc__", None) or "").startswith("Call `numpy.ndarray.")
    return True if is_wrapper or (isinstance(origin, str) and not origin.startswith("forkshm")) else None


def _signature(app: Sphinx, what: str, name: str, obj: object, options: object, signature: str, returns: str) -> Any:
    # Readers know these types by other names.
    def shorten(text: str) -> str:
        text = re.sub(r"\b_sync\.", "forkshm.synchronize.", text)
        text = re.sub(r"\b_multiprocess\.(context\.)?|~|\bcollections\.abc\.", "", text)
        text = text.replace("concurrent.futures._base.", "concurrent.futures.")
        # Type variables are known by their last name.
        text = re.sub(r"\bforkshm\.(\w+\.)*_\w+\.(?=\w)", "", text)
        return re.sub(r"\b(_GeneratorContextManager\[[^\]]*\]|_Section\b)", "AbstractContextManager", text)

    bound = pkgutil.resolve_name(name) if name.count(".") == 1 else None
    if inspect.ismethod(bound):
        # Many functions are methods of the default context. Sphinx, which preserves defaults by a signature of its
        # own, leaves out their first parameter.
        vars(bound.__func__).pop("__signature__", None)
        whole = stringify_signature(inspect.signature(bound), unqualified_typehints=True)
        signature, _, returns = whole.partition(" -> ")
        returns = returns or None
    return tuple(None if text is None else shorten(text) for text in (signature, returns))


def _bases(app: Sphinx, name: str, obj: object, options: object, bases: list[Any]) -> None:
    # Some errors derive from classes of several modules that have the same name.
    names = [base.__name__ for base in bases if isinstance(base, type)]
    for place, base in enumerate(bases):
        if isinstance(base, type) and names.count(base.__name__) > 1:
            package = base.__module__.partition(".")[0]
            bases[place] = f"``{base.__name__ if package == 'builtins' else f'{package}.{base.__name__}'}``"


def _resolve(app: Sphinx, env: Any, node: Any, content: Any) -> Any:
    # Docstrings name classes as `WorkerDiedError`: look for them in the modules where they are documented.
    name = node.get("reftarget", "")
    if node.get("refdomain") != "py" or not name:
        return None
    objects = env.domains["py"].objects
    for module in (
        "",
        "synchronize.",
        "errors.",
        "region.",
        "aio.",
        "spmd.",
        "pool.",
        "channel.",
        "decorator.",
        "cluster.",
        "accounting.",
    ):
        prefix = f"forkshm.{module}"
        full = prefix + name.removeprefix("forkshm.")
        if full in objects:
            return env.domains["py"].resolve_xref(
                env, node["refdoc"], app.builder, node.get("reftype", "obj"), full, node, content
            )
    return None


def setup(app: Sphinx) -> None:
    app.connect("autodoc-skip-member", _skip)
    app.connect("autodoc-process-signature", _signature)
    app.connect("autodoc-process-bases", _bases)
    app.connect("autodoc-process-docstring", _fields)
    app.connect("missing-reference", _resolve)
