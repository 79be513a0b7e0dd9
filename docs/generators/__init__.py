"""The pages of the reference that are generated from the code when the site is built (``make docs``).

Each module has functions that return Markdown; `pages.PAGES` lists them by their place in the site, and `hooks` gives
them to mkdocs. None of them writes a file, so tests call them as they stand.
"""
