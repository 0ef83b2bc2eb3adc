"""What setup.py promises: the run-time requirements are enough for the package and its command."""

import subprocess
import sys


EXTRAS = ["datasets", "hypothesis", "matplotlib", "pandas", "peft", "pyarrow", "pytest", "resvg_py", "tensorboard"]


def test_package_and_command_import_without_the_extras():
    block = "".join(f"sys.modules[{name!r}] = None; " for name in EXTRAS)
    check = "import hf_dalle, hf_dalle.cli; hf_dalle.DALLEPipeline; assert callable(hf_dalle.cli.main)"
    subprocess.run([sys.executable, "-c", f"import sys; {block}{check}"], check=True)
