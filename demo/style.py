"""The looks of the demo: fonts of the visitor's own machine, both colour schemes, and a phone's width."""

from __future__ import annotations

__all__ = ["CSS", "FONTS", "MONOSPACE", "share", "write_address"]

FONTS = ("system-ui", "sans-serif")
MONOSPACE = ("ui-monospace", "monospace")

CSS = """
#pictures .grid-wrap, #compared .grid-wrap, #formed .grid-wrap {
  min-height: 9rem; max-height: none; padding-top: 2.2rem; overflow-y: auto;
}
#pictures .grid-container, #compared .grid-container {
  grid-template-columns: repeat(auto-fill, minmax(8.2rem, 1fr)); padding-top: 0;
}
#formed .grid-container { grid-template-columns: repeat(auto-fill, minmax(5.6rem, 1fr)); padding-top: 0; }
#report { min-height: 1.6rem; font-variant-numeric: tabular-nums; }
.redif-small img { image-rendering: pixelated; }
.redif-chart { max-width: 62rem; overflow-x: auto; }
.redif-chart svg { width: 100%; min-width: 30rem; height: auto; }
.redif-chart table { border: 0 !important; border-collapse: collapse; margin: .8rem 0; width: 100%; }
.redif-chart th, .redif-chart td { text-align: left; padding: .3rem .6rem; border: 0; border-bottom: 1px solid #8884; }
#card table { display: block; overflow-x: auto; border: 0; }
#card img { image-rendering: pixelated; min-width: min(100%, 20rem); }
"""

#: What follows ? of the address, of the values of the page. Runs in the visitor's browser.
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
    """JavaScript that puts what was made into the address bar, without loading anything."""
    return _function(
        _ARGUMENTS, f"const many = {str(many).lower()};{_LINK} history.replaceState(null, '', url); return [];"
    )


def share(many: bool) -> str:
    """JavaScript that copies the link of what is set, and returns it to be shown."""
    return _function(
        _ARGUMENTS,
        f"const many = {str(many).lower()};{_LINK} navigator.clipboard?.writeText(url.href).catch(() => 0); "
        f"return url.href;",
    )
