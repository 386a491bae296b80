"""A page out of a template of the package: any text is shown as text, a name that is not there is an error."""

import unicodedata
from collections.abc import Callable

from jinja2 import Environment, PackageLoader, StrictUndefined

SHOWN = 300  # characters of a text


def render(template: str, filters: dict[str, Callable], **values: object) -> str:
    environment = Environment(
        loader=PackageLoader("flipkd_dist"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(filters, shown=shown)
    environment.globals.update(zip=zip)
    return environment.get_template(template).render(values)


def shown(text: str, limit: int = SHOWN) -> str:
    """The text's beginning; characters that are not for a page are replaced."""
    text = text if len(text) <= limit else text[:limit].rstrip() + " …"
    return "".join(
        "\N{REPLACEMENT CHARACTER}" if unicodedata.category(x) in ("Cc", "Cs") and x not in "\n\t" else x for x in text
    )
