"""The demo application, `redif demo`: students in a web page made with Gradio. It imports `redif_sdk` only.

`app.py` puts the page together and `studio.py` makes what it shows; `charts.py` draws, `style.py` holds the looks, and
`commands.py` is the command. Gradio is imported by `app.py` alone.
"""
