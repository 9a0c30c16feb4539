"""Let code in tables break where a reader expects it: after a dot, a bracket, or a part of a name.

Otherwise a long name makes its table wider than the page, or is broken between any two letters. The style sheet allows
the breaks in tables only.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from sphinx.writers.html5 import HTML5Translator

if TYPE_CHECKING:
    from docutils import nodes
    from sphinx.application import Sphinx

_PLACE = re.compile(
    r"""(?<=[\w)\]][.=:/])(?=\w)      # pool.report, workers=2, path/name
    | (?<=[^\W_]_)(?=[^\W_])         # shared_memory, but not __main__
    | (?<=[a-z])(?=[A-Z])            # WorkerDiedError
    | (?<=[(\[])(?=[\w&"'][^)\]]{2}) # map(function
    | (?<=\w)(?=\(\)|\(\.\.\.\))       # cancel(), Pool(...)
    """,
    re.VERBOSE,
)


class Translator(HTML5Translator):
    """Adds places where the browser may break a line."""

    def visit_Text(self, node: nodes.Text) -> None:  # noqa: N802 - the name that docutils calls
        start = len(self.body)
        super().visit_Text(node)
        if self.protect_literal_text:
            self.body[start:] = [
                _PLACE.sub('</span><wbr><span class="pre">', part) if part.startswith("<span") else part
                for part in self.body[start:]
            ]


def setup(app: Sphinx) -> dict[str, Any]:
    app.set_translator("html", Translator)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
