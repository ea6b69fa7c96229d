"""values → a self-contained HTML page: the ground that the reports of runs, sweeps and validations stand on."""

from __future__ import annotations

import base64
import functools
import hashlib
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from medtl_dist.errors import UserError
from medtl_dist.storage import Folder


def render_page(template: str, *styles: str, **values: Any) -> str:
    """The packaged template with its values, everything escaped; ``styles`` come after the common one. A pure function."""
    style = "".join(_packaged(name) for name in ("style.css", *styles))
    # A policy that names the style's hash lets nothing else in: no script, no request, no style in an attribute.
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"
    return _template(template).render(policy=policy, style=Markup(style), **values)


def write_page(target: Path, page: str) -> Path:
    """Write a page, all of it or nothing, and return its path. Raises UserError where the folder can't be written."""
    try:
        Folder.local(target.parent).write(target.name, page.encode("utf-8"))
    except OSError as error:
        raise UserError(
            f"{target} can't be written ({error.strerror}): free space or change the folder's rights"
        ) from None
    return target


@functools.cache
def _template(name: str) -> jinja2.Template:
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.from_string(_packaged("macros.html") + _packaged(name))


def _packaged(name: str) -> str:
    return (resources.files("medtl_dist.report") / name).read_text(encoding="utf-8")
