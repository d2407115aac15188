"""outside.py needs transformers, which CI does not install: without it, it must say so."""
import importlib.util
import os
import subprocess
import sys

def check(folder, python):
    if importlib.util.find_spec("transformers"):
        said = python("outside.py")
        assert "3.225281" in said and "3.303725" in said, said
        return
    done = subprocess.run([sys.executable, "outside.py"], cwd=folder, capture_output=True,
                          text=True, env=os.environ)
    assert done.returncode == 1 and "pip install transformers" in done.stderr, done
    print("outside: its numbers were not made anew, for transformers is not installed here")
