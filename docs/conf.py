"""The site: `sphinx-build -E -W --keep-going -n -b html docs docs/_build/html`.

It needs no network. A dead link, a page outside of the table of contents, and a public
name that the reference lacks fail the build.
"""

import builtins
import inspect
import re
import sys
import tomllib
from importlib import import_module
from pathlib import Path
from typing import Any

from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment
from sphinx.util import logging

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent / "src"), str(HERE)]

project = "sessionwire"
version = release = tomllib.loads(
    (HERE.parent / "pyproject.toml").read_text(encoding="utf-8")
)["project"]["version"]
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "llms"]
exclude_patterns = ["_build"]

myst_heading_anchors = 4  # links to headings, as GitHub has them
myst_enable_extensions = ["colon_fence"]

html_theme = "furo"
html_title = f"sessionwire {version}"
html_copy_source = False

default_role = "code"  # docstrings have code in single backticks
add_module_names = False
toc_object_entries_show_parents = "hide"
python_use_unqualified_type_names = True
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
autodoc_class_signature = "mixed"
napoleon_numpy_docstring = False

# Names that other packages document: their inventories would have to be downloaded
nitpick_ignore_regex = [
    (
        "py:.*",
        r"(sqlalchemy|dependency_injector|pydantic|pydantic_settings|fastapi|opentelemetry|starlette"
        r"|pytest)\..*",
    ),
    (
        "py:.*",
        r"(asyncio|collections|contextlib|datetime|enum|logging|os|pathlib|types|typing)\..*",
    ),
    ("py:.*", rf"({'|'.join(vars(builtins))})"),
    ("py:.*", r"sessionwire\.(\w+\.)+([A-Z]|SessionT)"),  # type variables
    # Private names in annotations
    ("py:.*", r"sessionwire\.decorators\..*"),
    ("py:.*", r"sessionwire\.(\w+\.)*_.*"),
]

PUBLIC_MODULES = [
    "sessionwire",
    "sessionwire.alembic",
    "sessionwire.asgi",
    "sessionwire.fastapi",
    "sessionwire.opentelemetry",
    "sessionwire.testing",
]


def public_names() -> set[str]:
    """All of `__all__`; of a module without that, what it defines itself."""
    names: set[str] = set()
    for name in PUBLIC_MODULES:
        module = import_module(name)
        own = [
            each
            for each, thing in vars(module).items()
            if getattr(thing, "__module__", "") == name
            and (inspect.isclass(thing) or inspect.isfunction(thing))
        ]
        public = getattr(
            module, "__all__", [each for each in own if not each.startswith("_")]
        )
        names |= {f"{name}.{each}" for each in public}
    return names


def check_that_public_names_are_documented(_app: Sphinx, env: BuildEnvironment) -> None:
    documented: dict[str, Any] = env.domains.python_domain.objects
    for name in sorted(public_names() - documented.keys()):
        logging.getLogger(__name__).warning(
            "%s is public, and no page of the reference documents it", name
        )


def mark_code_blocks(
    _app: Sphinx,
    _what: str,
    _name: str,
    _thing: object,
    _options: object,
    lines: list[str],
) -> None:
    """Docstrings have code as editors show it, in Markdown's fences."""
    is_code = False
    for number, line in enumerate(lines):
        fence = re.match(r"( *)```(\w*)$", line)
        if fence:
            is_code = not is_code
            language = fence[2] or "text"
            lines[number] = f"{fence[1]}.. code-block:: {language}\n" if is_code else ""
        elif is_code and line:
            lines[number] = f"    {line}"
    lines[:] = "\n".join(lines).split("\n")


def setup(app: Sphinx) -> None:
    # Ahead of napoleon, which has the priority 500
    app.connect("autodoc-process-docstring", mark_code_blocks, priority=400)
    app.connect("env-check-consistency", check_that_public_names_are_documented)
