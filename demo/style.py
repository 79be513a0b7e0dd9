"""CSS and JavaScript of the demo: system fonts, light and dark colours, narrow screens."""

from __future__ import annotations

__all__ = ["CSS", "FONTS", "MONOSPACE", "share", "write_address"]

FONTS = ("system-ui", "sans-serif")
MONOSPACE = ("ui-monospace", "monospace")

CSS = """
#images .grid-wrap, #compared .grid-wrap, #formed .grid-wrap {
  min-height: 9rem; max-height: none; padding-top: 2.2rem; overflow-y: auto;
}
#images .grid-container, #compared .grid-container {
  grid-template-columns: repeat(auto-fill, minmax(8.2rem, 1fr)); padding-top: 0;
}
#formed .grid-container { grid-template-columns: repeat(auto-fill, minmax(5.6rem, 1fr)); padding-top: 0; }
#report { min-height: 1.6rem; font-variant-numeric: tabular-nums; }
.redif-small img { image-rendering: pixelated; }
#card table { display: block; overflow-x: auto; border: 0; }
#card img { image-rendering: pixelated; min-width: min(100%, 20rem); }
"""

#: JavaScript: the page's address with the current settings as its query.
_LINK = """
  const parts = new URLSearchParams();
  if (many) { parts.set("student", student); }
  if (prompt !== null && prompt !== undefined && prompt !== "") { parts.set("prompt", prompt); }
  parts.set("steps", steps); parts.set("seed", seed); parts.set("n", number);
  const url = new URL(location.href); url.search = parts.toString(); url.hash = "";
"""


def _function(arguments: str, body: str) -> str:
    return f"({arguments}) => {{{body}}}"


_ARGUMENTS = "student, prompt, steps, seed, number"


def write_address(many: bool) -> str:
    """JavaScript that writes the settings into the address bar without loading the page."""
    return _function(
        _ARGUMENTS, f"const many = {str(many).lower()};{_LINK} history.replaceState(null, '', url); return [];"
    )


def share(many: bool) -> str:
    """JavaScript that copies the link to the current settings, and returns it."""
    return _function(
        _ARGUMENTS,
        f"const many = {str(many).lower()};{_LINK} navigator.clipboard?.writeText(url.href).catch(() => 0); "
        f"return url.href;",
    )
