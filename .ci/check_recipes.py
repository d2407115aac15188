"""Do the recipes of the README work? Its own command writes them into an empty folder beside
the lab; then each file in .ci/recipes/ checks one of them: check(folder, python) asserts
what must be true. Run from anywhere: python .ci/check_recipes.py [name ...]"""
import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")         # so small, more are slower
HOME = Path(__file__).resolve().parent.parent
README = (HOME / "README.md").read_text(encoding="utf-8")
sys.path.insert(0, str(HOME / ".ci" / "recipes"))     # what several checks share
NAMES = re.findall(r"^```python\n# (\w+)\.py\n", README, re.M)

def runner(folder):
    def python(*arguments, **environment):
        """Run Python with these arguments in the folder; -> what it printed."""
        done = subprocess.run([sys.executable, *map(str, arguments)], cwd=folder, text=True,
                              capture_output=True, encoding="utf-8", timeout=900,
                              env={**os.environ, **environment}, stdin=subprocess.DEVNULL)
        assert done.returncode == 0, f"{arguments}: {done.stdout[-800:]} {done.stderr[-1500:]}"
        return done.stdout
    return python

def a_folder():
    """The lab, the README and its recipes, a text, and the checkpoint of a short run."""
    folder = Path(tempfile.mkdtemp())
    for name in "README.md", "mini_transformer.py":
        shutil.copy(HOME / name, folder)
    shutil.copy(HOME / "mini_transformer.py", folder / "input.txt")
    [line] = re.findall(r"^python (-X utf8 -c .*)$", README, re.M)
    python = runner(folder)
    said = python(*shlex.split(line))
    for name in NAMES:
        assert f"{name}.py" in said and (folder / f"{name}.py").exists(), f"{name}: not written"
    (folder / f"{NAMES[0]}.py").write_text("mine")
    python(*shlex.split(line))
    assert (folder / f"{NAMES[0]}.py").read_text() == "mine", "an edited file was overwritten"
    (folder / f"{NAMES[0]}.py").unlink()
    python(*shlex.split(line))
    python("mini_transformer.py", "--max_steps", 4, "--n_layers", 2, "--block_size", 64,
           "--sample_chars", 9, "--device", "cpu")
    return folder

passed, failed, template = 0, [], a_folder()
for name in sys.argv[1:] or NAMES:
    path = HOME / ".ci" / "recipes" / f"{name}_check.py"
    folder = Path(tempfile.mkdtemp()) / "a folder"
    shutil.copytree(template, folder)
    try:
        spec = importlib.util.spec_from_file_location(path.stem, path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        module.check(folder, runner(folder))
        passed += 1
        print(f"{name}: fine", flush=True)
    except Exception:
        failed.append(name)
        print(f"FAILED: {name}", traceback.format_exc()[-2000:], flush=True)
print(f"{passed} passed, {len(failed)} failed")
sys.exit(bool(failed))
