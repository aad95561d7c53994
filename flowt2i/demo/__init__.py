"""The web page `flowt2i demo`: pictures from a prompt, forming step by step; and a small HTTP API. It knows of a model only what `Pipeline` shows.

limits.py    what a visitor may ask for, checked on the server
library.py   the models on offer
drawing.py   drawing in a thread, with previews
board.py     pictures and progress as HTML
page.py      the page (with page.css and page.js)
api.py       the HTTP API
mailboxes.py what waits for browsers, bounded
guard.py     closed routes, small requests, passwords
server.py    serving it all
"""

from flowt2i.demo.library import Library, found
from flowt2i.demo.server import parse_auth, serve

__all__ = ["Library", "found", "parse_auth", "serve"]
