"""What every test stands on: no network, an empty Hugging Face home, one thread a process, no deadline of its own."""

import os
import tempfile

from hypothesis import settings


# Before any test module imports a Hugging Face library: they read these once. Subprocesses of tests inherit them.
home = tempfile.TemporaryDirectory(prefix="hf-dalle-tests-", ignore_cleanup_errors=True)
os.environ["HF_HOME"] = home.name
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ.setdefault("OMP_NUM_THREADS", "1")

# By itself Hypothesis fails an example that takes 0.2 s, which on a busy machine any may.
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")
