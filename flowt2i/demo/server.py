"""Serving the page and the API: on this machine only, or, asked for by name, through a public address."""

import atexit
import contextlib
import io
import os
import shutil
import sys
import tempfile
from typing import Any

from flowt2i.demo.guard import HERE, LARGEST_BODY, Guard
from flowt2i.demo.library import Library
from flowt2i.errors import UserError

SHORTEST_PASSWORD = 8


def parse_auth(text: str | None) -> tuple[str, str] | None:
    """`user:password`; UserError where it is not that, or the password is short."""
    if text is None:
        return None
    user, colon, password = text.partition(":")
    if not (user and colon and len(password) >= SHORTEST_PASSWORD):
        raise UserError(f"--auth wants USER:PASSWORD, the password with at least {SHORTEST_PASSWORD} characters")
    return user, password


def serve(library: Library, port: int = 7860, share: bool = False, auth: tuple[str, str] | None = None, public: bool = False, block: bool = True) -> Any:
    """Serve models on this machine until Ctrl-C (or return at once: block=False); returns gradio's Blocks.

    share: also through a gradio.live address; then either auth (user, password) or public=True must say who may come in. UserError where that
    is missing or the port cannot be had.
    """
    if not 1 <= port <= 65535:
        raise UserError(f"--port {port} is out of range: choose 1 to 65535")
    if share and not (auth or public):
        raise UserError("--share makes a public address: add --auth USER:PASSWORD, or --public where anyone who has the link may draw")
    for name in [name for name in os.environ if name.startswith("GRADIO_")]:  # no address, path or share is taken from the environment
        del os.environ[name]
    cache = tempfile.mkdtemp(prefix="flowt2i-demo-")
    atexit.register(shutil.rmtree, cache, ignore_errors=True)
    direct = [*(os.environ.get(name, "") for name in ("no_proxy", "NO_PROXY")), "127.0.0.1,localhost"]  # gradio asks its own server whether it is up
    os.environ["no_proxy"] = os.environ["NO_PROXY"] = ",".join(dict.fromkeys(filter(None, ",".join(direct).split(","))))
    os.environ.update(GRADIO_ANALYTICS_ENABLED="False", GRADIO_TEMP_DIR=cache)  # read when gradio is imported, and later
    try:
        import gradio as gr  # noqa: F401
    except ImportError as error:
        raise UserError("the demo needs gradio: pip install -c constraints.txt -e '.[demo]'") from error
    from fastapi.exceptions import RequestValidationError
    from starlette.middleware import Middleware

    from flowt2i.demo.api import Api, malformed
    from flowt2i.demo.page import CSS, HEAD, THEME, page

    library.load(library.first)  # what is wrong with it is said here, not to the first visitor
    blocks = page(library)
    hosts = None if share else HERE  # who comes through the public address has the password, or may come anyway
    functions = frozenset(number for number, function in blocks.fns.items() if function.fn is not None)
    if share:
        print(f"warning: a public address reaches this machine through gradio.live; {'who has the password' if auth else 'anyone who has it'} can draw",
              file=sys.stderr)  # fmt: skip
    said = io.StringIO()
    try:
        with contextlib.redirect_stdout(said):
            blocks.launch(
                server_name="127.0.0.1", server_port=port, share=share, prevent_thread_lock=True, quiet=True, ssr_mode=False, footer_links=[],
                theme=THEME, css=CSS, head=HEAD, enable_monitoring=False, run_history=False, pwa=False, mcp_server=False, root_path="",
                allowed_paths=[], blocked_paths=["/"], max_file_size=LARGEST_BODY, state_session_capacity=256, inbrowser=False, inline=False,
                app_kwargs={"middleware": [Middleware(Guard, functions=lambda: functions, auth=auth, hosts=hosts)], "routes": Api(library).routes,
                            "exception_handlers": {RequestValidationError: malformed}, "docs_url": None, "redoc_url": None, "openapi_url": None},
            )  # fmt: skip
    except OSError as error:
        raise UserError(f"port {port} cannot be had (another program uses it, or it needs more rights): choose another with --port") from error
    except Exception as error:  # gradio raises bare Exceptions, httpx its own: what they say is all there is to know
        blocks.close(verbose=False)
        raise UserError(f"the page could not be started: {' '.join(str(error).split()) or type(error).__name__}") from error
    if share and not blocks.share_url:
        blocks.close(verbose=False)
        raise UserError("no public address could be had (no network, or gradio.live does not answer): leave --share out to serve this machine only")
    print(f"the page is at {blocks.local_url}{f' and at {blocks.share_url}' if blocks.share_url else ''} (stop with Ctrl-C)", file=sys.stderr)
    if block:
        blocks.block_thread()
    return blocks
