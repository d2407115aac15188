"""Does the README tell the truth? Its options exist, its commands build what they say,
its Python runs as it stands, each edit of 'Break it' turns its test red, what it says to
type first trains, and the tests follow a file that grows section by section. Run from
anywhere: python .ci/check_readme.py"""
import ast
import importlib.util
import os
import re
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

HOME = Path(__file__).resolve().parent.parent
README = (HOME / "README.md").read_text(encoding="utf-8")
LAB = (HOME / "mini_transformer.py").read_text(encoding="utf-8")
TEXT = "the cat sat on the mat and the dog sat on the log.\n" * 40
sys.path.insert(0, str(HOME))
import mini_transformer as lab  # noqa: E402

passed, failed = 0, []

def check(fine, what):
    global passed
    passed += bool(fine)
    if not fine:
        failed.append(what)
        print("FAILED:", what)

def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.M | re.S)

def run_python(code, folder):
    """Run code as a script in a folder; -> what it printed, or None if it failed.
    With lab.main() it takes options: few steps. With process groups: two processes."""
    (folder / "block.py").write_text(code, encoding="utf-8")
    command = [sys.executable, "block.py"]
    if "lab.main()" in code:
        command += "--max_steps 4 --block_size 16 --sample_chars 9".split()
    if "init_process_group" in code:
        command[1:1] = "-m torch.distributed.run --nproc_per_node 2".split()
    done = subprocess.run(command, cwd=folder, capture_output=True,
                          text=True, env={**os.environ, "PYTHONPATH": str(HOME)})
    if done.returncode:
        print(done.stdout[-500:], done.stderr[-1500:])
    return done.stdout if done.returncode == 0 else None

def a_folder_after_a_run():
    """A folder with texts and the checkpoint of a short run."""
    folder = Path(tempfile.mkdtemp())
    for name in "input.txt", "my_text.txt":
        (folder / name).write_text(TEXT)
    options = "--max_steps 4 --n_layers 2 --block_size 64 --sample_chars 9 --device cpu"
    subprocess.run([sys.executable, HOME / "mini_transformer.py", *options.split()],
                   cwd=folder, check=True, capture_output=True)
    return folder

# ==== Every option that is named exists, and every command builds a model
fields = {*vars(lab.TransformerConfig()), *vars(lab.TrainConfig())}
for option in sorted(set(re.findall(r"--([a-z][\w-]+)", README))):
    name = option.removeprefix("no-")
    foreign = option in {"device", "help"} or f"--{option}=" in README  # nanoGPT's: --x=
    check(name in fields or foreign, f"--{option} is no option")

def build(config=None, **settings):
    """In the place of train: everything is made, nothing is trained."""
    model = lab.MiniTransformer(config)
    built.append(lab.make_optimizer(model, lab.TrainConfig(**settings)))

train, folder, built = lab.train, a_folder_after_a_run(), []
os.chdir(folder)
Path("my_text.pt").write_bytes(Path("checkpoint.pt").read_bytes())
lab.train = build
lab.POSITIONS["sinusoidal"] = lab.learned             # a recipe's: here it is only built
commands = [line.split("#")[0] for block in blocks("bash") for line in block.splitlines()
            if line.startswith("python mini_transformer.py")]
base = re.search("^## What we found.*?^OMP_NUM_THREADS=1 (python mini_transformer.py .*?)$", README, re.M | re.S)
rows = re.findall(r"^\| `(--\S[^`]*)`", README, re.M)   # a row of a table: base and options
check(base and len(rows) >= 20, "the tables of 'What we found' are not found")
commands += [f"{base[1]} {row}" for row in rows if base]
for line in commands:
    before = len(built)
    try:
        lab.main(shlex.split(line.replace("ROMEO:", "the").replace("Once", "the"))[2:])
        check("--prompt" in line or len(built) == before + 1, f"{line}: built nothing")
    except (Exception, SystemExit) as error:
        check(False, f"{line}: {error!r}")
lab.train = train

# ==== Every block of Python runs as it stands
for block in blocks("python"):
    if block.startswith("# first"):                   # parts of one script: see below
        continue
    if "from transformers" in block and importlib.util.find_spec("transformers") is None:
        print("not run, for transformers is not installed: hf.py")
        continue
    said = run_python(block, a_folder_after_a_run())
    check(said and said.strip(), f"this block fails, or prints nothing:\n{block}")

# ==== Each edit of 'Break it' is possible, and turns its test red
rows = re.findall(r"^\|.*\| `(.+)` \| `(.+)` \| `(test_\w+)` \|$", README, re.M)
check(len(rows) >= 8, "the table 'Break it' is not found")
for find, write, test in rows:
    folder = Path(tempfile.mkdtemp())
    check(LAB.count(find) == 1, f"{find!r} stands {LAB.count(find)} times in the lab")
    (folder / "broken.py").write_text(LAB.replace(find, write), encoding="utf-8")
    tests = HOME / "test_mini_transformer.py"
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider",
         f"{tests}::{test}"], cwd=folder, env={**os.environ, "MODULE": "broken"},
        capture_output=True, text=True)
    check(done.returncode == 1 and "1 failed" in done.stdout, f"{test} does not see {write!r}")

# ==== What to type first is as long as it says, and trains
words = re.search(r"<!-- first -->(.*?)<!-- (\d+) lines -->", README, re.S)
names = set(re.findall(r"`(\w+)`", words[1]))
chosen = {node for node in ast.parse(LAB).body
          if getattr(node, "name", None) in names or isinstance(node, ast.Assign)
          and node.targets[0].id in names}
lines, typed = LAB.splitlines(), []
for node in sorted(chosen, key=lambda node: node.lineno):
    first = min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", []))])
    typed += [*lines[first - 1 : node.end_lineno], ""]
check(len(chosen) == len(names), f"not all of {names} are in the lab")
code = "\n".join(typed[:-1])
imports, loop = [block for block in blocks("python") if block.startswith("# first")]
stated, n = int(words[2]), len(typed[:-1]) + len(imports.splitlines()) + len(loop.splitlines())
check(n == stated and f"{n} lines" in words[1], f"what to type first has {n} lines, not {stated}")
said = run_python("\n".join([imports, code, loop]), a_folder_after_a_run())
losses = [float(x) for x in re.findall(r"\d\.\d+", said or "")]
check(losses and losses[-1] < 0.5 * losses[0], f"what to type first does not train: {losses}")

# ==== Somebody who stops after any section is told what comes next
banners = [i for i, line in enumerate(lines) if line.startswith("# ==== ")][1:]
tests = (HOME / "test_mini_transformer.py").read_text(encoding="utf-8")
for number, end in enumerate(banners, start=1):
    folder = Path(tempfile.mkdtemp())
    (folder / "my_transformer.py").write_text("\n".join(lines[:end]), encoding="utf-8")
    (folder / "test_mini_transformer.py").write_text(tests, encoding="utf-8")
    done = subprocess.run([sys.executable, "-m", "pytest", "-x", "-q"], cwd=folder, text=True,
                          capture_output=True, env={**os.environ, "MODULE": "my_transformer"})
    until = re.split(rf"^# ==== {number + 1}\.", tests, flags=re.M)[0]
    collected = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "--collect-only"], cwd=folder, text=True,
        capture_output=True, env={**os.environ, "MODULE": "my_transformer"}).stdout
    expected = sum(line.split("::")[1].split("[")[0] in re.findall(r"def (test_\w+)", until)
                   for line in collected.splitlines() if "::" in line)
    n = int((re.search(r"(\d+) passed", done.stdout) or [0, 0])[1])
    named = re.search(r"next: (\w+) is not written yet", done.stdout)
    rest = "\n".join(lines[end:])
    check(n == expected, f"after section {number}: {n} of {expected} tests pass")
    check(named and re.search(rf"^(def|class)? ?{named[1]}\b", rest, re.M),
          f"after section {number}: what comes next is not named")

print(f"{passed} passed, {len(failed)} failed")
sys.exit(bool(failed))
