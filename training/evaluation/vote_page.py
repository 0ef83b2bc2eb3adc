"""The page that people vote on, and what its door lets in: the door itself is `hf_dalle.web_door`'s.

Pictures are part of the page, encoded anew, so that no file is served and neither a name nor an address tells whose
they are. Who is asked what is decided in `ballots.py`.
"""

import base64
import contextlib
import html
import io
import logging
import time
from collections.abc import Callable
from typing import Any

import fastapi
import gradio as gr
import uvicorn
from PIL import Image

from evaluation.ballots import Ballots
from hf_dalle.web_door import OWN_FONTS, PLAIN_PAGE, Door


logger = logging.getLogger(__name__)

MAX_SIDE = 768  # of a picture on the page, in pixels
MAX_BODY_BYTES = 16_384
YEAR = 365 * 24 * 3600  # seconds that a voter's cookie is kept
CHOICES = {
    "realism": [("Left", "left"), ("Right", "right")],
    "match": [("Left", "left"), ("Right", "right"), ("Neither matches", "neither")],
}
QUESTIONS = {"realism": "Which picture is more realistic?", "match": "Which picture matches the caption better?"}
KEYS = {"realism": "12", "match": "345"}
WELCOME = """\
<h1>Compare two pictures</h1>
<p>Below are a caption and two pictures for it. Please answer two questions about each pair; nothing is right or wrong.
Only your answers are kept, and how long they took, under a random number that this browser remembers in a cookie, so
that you are not asked twice; no name, no address. Close the page whenever you like: what you have answered counts.</p>
<p class="keys">Keys: <kbd>1</kbd> <kbd>2</kbd> for the first question, <kbd>3</kbd> <kbd>4</kbd> <kbd>5</kbd> for the
second, <kbd>Enter</kbd> to go on.</p>"""
# Answers are hidden by what is shown above them, at one stroke with it.
NO_ANSWERS = "<style>#answers { display: none; }</style>"
THANKS = f"""\
{NO_ANSWERS}<h2 id="caption" tabindex="-1">Thank you!</h2>
<p>There is nothing more for you to answer now. Your answers are kept; you can close this page.</p>"""
NO_COOKIE = f"""\
{NO_ANSWERS}<p>Please let this page keep a cookie, and load it again: without it you would be asked twice.</p>"""
CSS = """
.gradio-container { max-width: 1000px !important; margin: auto; }
#ballot .pair { display: flex; gap: 16px; justify-content: center; }
#ballot figure { margin: 0; flex: 1 1 0; max-width: min(420px, 40vh); }
#ballot img { width: 100%; aspect-ratio: 1; object-fit: contain; background: #fff; border: 1px solid #9ca3af; }
#ballot figcaption { text-align: center; }
#ballot h2 { text-align: center; font-size: 1.4rem; outline: none; overflow-wrap: anywhere; }
#progress { text-align: center; }
@media (pointer: coarse) { .keys { display: none; } }
kbd { border: 1px solid #9ca3af; border-radius: 4px; padding: 0 0.35em; }
"""
# Keys choose an answer of a question, as a click does; Enter presses the button where the focus is on nothing that
# Enter would press anyway.
HEAD = """
<script>
addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.altKey || event.metaKey || event.repeat) return;
  const place = "12345".indexOf(event.key);
  if (event.key.length === 1 && place >= 0) {
    document.querySelectorAll("#realism input, #match input")[place]?.click();
  } else if (event.key === "Enter" && event.target.tagName !== "BUTTON" && event.target.tagName !== "A") {
    document.querySelector("#save")?.click();
  }
});
</script>
"""
# What is answered is what is shown: the ballot's token comes from the page itself.
READ_BALLOT = """(ballot, ...answers) => [document.getElementById("caption")?.dataset.ballot ?? "", ...answers]"""
FOCUS = """() => { setTimeout(() => document.getElementById("caption")?.focus(), 50); }"""


def build_page(ballots: Ballots, pictures: Callable[[str, str], Image.Image]) -> gr.Blocks:
    """
    The page.

    Args:
        ballots ([`Ballots`]): gives captions and takes answers.
        pictures (`Callable`): the picture of a model for a row.
    """

    def show(voter: str, said: str) -> tuple:
        """The next ballot: caption and pictures, no answers yet, progress."""
        ballot = ballots.ask(voter)
        progress = draw_progress(*ballots.progress(voter), said)
        if ballot is None:
            return THANKS, None, None, progress
        caption = ballots.study.captions[ballot.row]
        left, right = pictures(ballot.row, ballot.left), pictures(ballot.row, ballot.right)
        return draw_ballot(caption, ballot.token, left, right), None, None, progress

    def begin(request: gr.Request) -> tuple:
        voter = find_voter(ballots, request)
        return (NO_COOKIE, None, None, "") if voter is None else show(voter, "")

    def save(ballot: Any, realism: Any, match: Any, request: gr.Request) -> tuple:
        voter = find_voter(ballots, request)
        if voter is None:
            return NO_COOKIE, None, None, ""
        done, total = ballots.progress(voter)
        stay = [gr.skip()] * 3
        if realism is None or match is None:
            return (*stay, draw_progress(done, total, "Please answer both questions."))
        try:
            is_new = ballots.answer(voter, ballot, realism=realism, match=match)
        except ValueError as error:  # of another study or voter: nothing that a visitor could put right
            logger.warning("an answer was refused: %s", error)
            return show(voter, "That answer could not be taken. Here is your next pair.")
        except OSError as error:
            logger.error("a vote could not be written: %s", error)
            return (*stay, draw_progress(done, total, "Not saved: the server has a problem. Please try again."))
        return show(voter, "Saved." if is_new else "You had answered that already.")

    with gr.Blocks(title="Compare two pictures", analytics_enabled=False) as page:
        gr.HTML(WELCOME)
        ballot = gr.HTML(NO_ANSWERS, elem_id="ballot")
        token = gr.Textbox(visible=False)
        with gr.Column(elem_id="answers"):
            with gr.Row():
                answers = [
                    gr.Radio(CHOICES[name], label=f"{words} ({', '.join(KEYS[name])})", elem_id=name)
                    for name, words in QUESTIONS.items()
                ]
            button = gr.Button("Save and go on", variant="primary", elem_id="save")
        progress = gr.HTML(elem_id="progress")
        shown = [ballot, *answers, progress]
        private = {"queue": False, "api_visibility": "private", "show_progress": "hidden"}
        page.load(begin, None, shown, **private)
        button.click(save, [token, *answers], shown, js=READ_BALLOT, **private).then(None, js=FOCUS)
    return page


def find_voter(ballots: Ballots, request: gr.Request) -> str | None:
    """The voter's token in the request's cookie; `None` where it is not there or none of ours."""
    token = request.cookies.get(name_cookie(ballots))
    return token if ballots.is_voter(token) else None


def name_cookie(ballots: Ballots) -> str:
    """Of its own for each study, since cookies are shared by all ports of a host."""
    return f"voter-{ballots.name}"


def draw_ballot(caption: str, token: str, left: Image.Image, right: Image.Image) -> str:
    """The caption with two pictures below it, of one size whatever theirs are, as HTML; it carries the token."""
    side = min(MAX_SIDE, max(*left.size, *right.size))
    figures = [
        f'<figure><img src="{encode_picture(picture, side)}" alt="{words}"><figcaption>{words}</figcaption></figure>'
        for words, picture in (("Left", left), ("Right", right))
    ]
    title = f'<h2 id="caption" tabindex="-1" data-ballot="{html.escape(token)}">{html.escape(caption)}</h2>'
    return f'{title}<div class="pair">{"".join(figures)}</div>'


def encode_picture(picture: Image.Image, side: int) -> str:
    """The picture in a white square of `side` pixels, as a PNG without metadata, in a `data:` address."""
    picture = picture.convert("RGB")
    scale = side / max(picture.size)
    size = tuple(max(1, round(length * scale)) for length in picture.size)
    if size != picture.size:
        picture = picture.resize(size, Image.Resampling.LANCZOS)
    square = Image.new("RGB", (side, side), "white")
    square.paste(picture, ((side - size[0]) // 2, (side - size[1]) // 2))
    buffer = io.BytesIO()
    square.save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def draw_progress(done: int, total: int, said: str) -> str:
    """What was said of the last answer, and how many are done."""
    return (
        f'<p id="said" role="status" aria-live="polite">{html.escape(said)}</p>'
        f'<p><progress aria-label="answered" value="{done}" max="{total}"></progress> {done} of {total} answered</p>'
    )


class VoterDoor(Door):
    """
    The door before the page of votes, at which each new visitor gets the cookie of a voter.

    Args:
        app: the ASGI application behind it.
        ballots ([`Ballots`]): admits voters.
        max_per_minute (`int`): answers and visits from one address; more are refused for a while.
        clock (`Callable`, *optional*): gives seconds.
    """

    LET_IN = {
        "GET": r"/|/theme\.css|/favicon\.ico|/manifest\.json|/(assets|static)(/[\w-][\w.-]*)+|"
        r"/gradio_api/app_id",  # asked for by a page whose server went away: it loads again when there is an answer
        "POST": r"/gradio_api/run/predict",
    }

    def __init__(self, app: Any, ballots: Ballots, max_per_minute: int, clock: Callable[[], float] = time.monotonic):
        super().__init__(app, self.LET_IN, self.LET_IN["POST"], max_per_minute, MAX_BODY_BYTES, clock)
        self.ballots = ballots

    async def __call__(self, scope: dict, receive: Any, send: Any) -> None:
        if scope["type"] == "http" and scope["path"] == "/":
            send = self.add_cookie(scope, send)
        await super().__call__(scope, receive, send)

    def judge(self, scope: dict, address: str) -> int | None:
        refusal = super().judge(scope, address)
        if refusal is None and scope["path"] == "/" and self.is_too_often(address):
            return 429
        return refusal

    def add_cookie(self, scope: dict, send: Any) -> Any:
        """`send`, with a voter's cookie in the answer where the visitor brings none of ours."""
        request, name = fastapi.Request(scope), name_cookie(self.ballots)
        if self.ballots.is_voter(request.cookies.get(name)):
            return send
        answer = fastapi.Response()
        is_secure = scope.get("scheme") == "https"
        answer.set_cookie(name, self.ballots.admit(), YEAR, secure=is_secure, httponly=True, samesite="lax")

        async def send_with_cookie(message: dict) -> None:
            if message["type"] == "http.response.start":
                cookies = [header for header in answer.raw_headers if header[0] == b"set-cookie"]
                message = {**message, "headers": [*message.get("headers", []), *cookies]}
            await send(message)

        return send_with_cookie


def make_app(ballots: Ballots, pictures: Callable[[str, str], Image.Image], max_per_minute: int) -> VoterDoor:
    """The page behind its door, as an ASGI application."""
    app = gr.mount_gradio_app(
        fastapi.FastAPI(openapi_url=None),
        build_page(ballots, pictures),
        path="/",
        show_error=False,
        theme=gr.themes.Default(**OWN_FONTS),
        css=CSS,
        head=HEAD,
        **PLAIN_PAGE,
    )
    return VoterDoor(app, ballots, max_per_minute)


class Server(uvicorn.Server):
    """Says where it is once it listens."""

    async def startup(self, sockets: list | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            address, port = self.servers[0].sockets[0].getsockname()[:2]
            print(f"Open on http://{f'[{address}]' if ':' in address else address}:{port}", flush=True)


def run_server(app: VoterDoor, host: str, port: int) -> None:
    """Serves the page until it is interrupted. There is no log of visits, which would hold addresses."""
    config = uvicorn.Config(
        app,
        host=host,
        port=port,
        access_log=False,
        log_level="warning",
        limit_concurrency=1000,
        timeout_graceful_shutdown=3,
    )
    with contextlib.suppress(KeyboardInterrupt):
        Server(config).run()
