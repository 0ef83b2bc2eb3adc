"""The demo page as a Hugging Face Space: what `hf-dalle demo` opens, for everybody.

The page itself lives in `hf_dalle/gradio_app.py`; the README beside says how a Space is filled.
"""

import os
import sys
from pathlib import Path

from hf_dalle.cli import main


# Visitors come through proxies of the Space's own network, whose word on a visitor's address is taken.
PROXIES = "127.0.0.1,10.0.0.0/8,172.16.0.0/12,192.168.0.0/16"


if __name__ == "__main__":
    os.environ.setdefault("FORWARDED_ALLOW_IPS", PROXIES)
    checkpoint = os.environ.get("HF_DALLE_CHECKPOINT", str(Path(__file__).parent / "checkpoint"))
    sys.exit(main(["demo", checkpoint, "--host", "0.0.0.0"]))
