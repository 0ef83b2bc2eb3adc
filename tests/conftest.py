"""What every test stands on: no network, an empty Hugging Face home, one thread a process."""

import os
import tempfile


# Before any test module imports a Hugging Face library: they read these once. Subprocesses of tests inherit them.
home = tempfile.TemporaryDirectory(prefix="hf-dalle-tests-", ignore_cleanup_errors=True)
os.environ["HF_HOME"] = home.name
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ.setdefault("OMP_NUM_THREADS", "1")
