"""RunPod's Hub looks for a handler here. The image runs entrypoint.py, and so does this."""

import runpy
from pathlib import Path

if __name__ == "__main__":
    runpy.run_path(str(Path(__file__).resolve().parents[1] / "entrypoint.py"), run_name="__main__")
