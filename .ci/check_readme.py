"""Does the README tell the truth? Its links lead somewhere, its options exist, its commands
build what they say, its tables count parameters right, each edit of 'Break it' turns its
test red, and the tests follow a file that grows section by section. Recipes have checks of
their own. Run from anywhere: python .ci/check_readme.py"""
import ast
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")         # so small, more are slower
import torch  # noqa: E402

HOME = Path(__file__).resolve().parent.parent
README = (HOME / "README.md").read_text(encoding="utf-8")
LAB = (HOME / "mini_transformer.py").read_text(encoding="utf-8")
sys.path.insert(0, str(HOME))
import mini_transformer as lab  # noqa: E402

passed, failed = 0, []

def check(fine, what):
    global passed
    passed += bool(fine)
    if not fine:
        failed.append(what)
        print("FAILED:", what, flush=True)

def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.M | re.S)

def pytest_on(folder, module, *arguments):
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments],
        cwd=folder, env={**os.environ, "MODULE": module}, capture_output=True, text=True)

# ==== What is visible: short paragraphs, few figures, no line that scrolls
visible, folded, fence = [], 0, False
for line in README.splitlines():
    folded += line.count("<details")
    fence ^= line.startswith("```") and not folded
    if not folded:
        visible.append((line, fence or line.startswith("```")))
    folded -= line.count("</details>")
check(len(visible) <= 260, f"{len(visible)} lines outside folds")
prose = [line for line, code in visible if not code and not line.startswith("|")]
for line in prose:
    check(len(line.split()) <= 90, f"{len(line.split())} words in: {line[:60]}")
for line, code in visible:
    check(not code or len(line) <= 110, f"{len(line)} characters in: {line[:60]}")
text = re.sub(r"`[^`]*`|\]\([^)]*\)|\[?\b[A-Z][a-z]+ \d{4}\b|#+ .*", "", "\n".join(prose))
figures = re.findall(r"\d[\d,.]*", text)
check(len(figures) <= 120, f"{len(figures)} figures in visible prose")
check(README.count("<details") == README.count("</details>"), "a fold is not closed")

# ==== Its links, its options
headings = [re.sub(r"[^\w -]", "", line.lstrip("# ").lower()).replace(" ", "-")
            for line in re.sub(r"```.*?```", "", README, flags=re.S).splitlines()
            if line.startswith("#")]
for anchor in re.findall(r"\(#([\w-]+)\)", README):
    check(anchor in headings, f"the link #{anchor} leads nowhere")
scripts = re.findall(r"^```python\n# (\w+\.py)\n", README, re.M)
for name in re.findall(r"\[(\w+\.py)\]\(#recipes\)", README):
    check(name in scripts, f"there is no recipe {name}")

def options_of(script):
    """The options that a script of the README has in addition to the lab's."""
    [code] = [code for code in blocks("python") if code.startswith(f"# {script}\n")] or [""]
    return set(re.findall(r"--(\w+)", code))

fields = {"prompt", "help", *vars(lab.TransformerConfig()), *vars(lab.TrainConfig())}
for name in scripts:
    fields |= options_of(name)
for option in sorted(set(re.findall(r"(?<=[\s`\"])--([a-z][\w-]+)", README))):
    foreign = option in {"index-url", "standalone", "nproc_per_node", "nnodes",
                         "rdzv_backend", "rdzv_endpoint", "collect-only", "find-links",
                         "no-index"} or f"--{option}=" in README
    check(option.removeprefix("no-") in fields or foreign, f"--{option} is no option")

# ==== Every command builds a model, and every row of a table the one that it says
def build(config=None, **settings):
    """In the place of train: everything is made, nothing is trained."""
    run = lab.check(lab.TrainConfig(**settings))
    config = lab.check(lab.TransformerConfig(**json.loads(json.dumps(asdict(config)))))
    model = lab.MiniTransformer(config)
    lab.make_optimizer(model, run)
    built.append(sum(p.numel() for p in model.parameters()))
    return model, None

train, folder, built = lab.train, Path(tempfile.mkdtemp()), []
os.chdir(folder)
Path("input.txt").write_text(LAB, encoding="utf-8")
lab.main("--max_steps 4 --n_layers 2 --block_size 64 --sample_chars 9 --device cpu".split())
for name in set(re.findall(r"--checkpoint_path (\w+\.pt)", README)):
    shutil.copy("checkpoint.pt", name)
lab.train = build
in_text = "\n".join(blocks("bash") + re.findall(r"`(python .*?)`", README))
commands = []                                         # each a list of options
for line in re.findall(r"^python (?!-c|-m|-X)(.*)", in_text.replace("\\\n", " "), re.M):
    script, *options = shlex.split(line, comments=True)
    if script == "compare.py":
        base, *variants = [word for word in options
                           if word.startswith("--") and word != "--seeds"] or [""]
        commands += [shlex.split(f"{base} {variant}") for variant in ["", *variants]]
    elif script == "mini_transformer.py":
        commands.append(options)
rows = re.findall(r"^\| `(--[^`]*)` \| (\d[\d,]+,\d{3} )?", README, re.M)
check(len(commands) >= 30 and len(rows) >= 10, f"{len(commands)} commands, {len(rows)} rows")
lab.ACTIVATIONS["gelu4"] = lambda x: lab.F.gelu(4 * x) / 4    # the edit of lab 5
for options, size in [(options, None) for options in commands] + [
        (shlex.split(options), size) for options, size in rows]:
    before, name = len(built), " ".join(options)
    try:
        lab.main([*options, *(["--sample_chars", "3", "--device", "cpu"] if
                              "--prompt" in options else [])])
        check("--prompt" in options or len(built) == before + 1, f"{name}: built nothing")
        check(not size or built[-1] == int(size.replace(",", "")), f"{name}: {built[-1:]}")
    except (Exception, SystemExit) as error:
        check(False, f"{name}: {error!r}")
lab.train = train
torch.set_num_threads(1)
once, twice = (lab.train(lab.TransformerConfig(block_size=16), max_steps=3, sample_chars=3,
                         device="cpu")[0].state_dict() for _ in range(2))
check(all(torch.equal(once[name], twice[name]) for name in once),
      "two runs with one seed are not equal to the last bit")

# ==== Each edit of 'Break it' is possible, and turns the test red that is named, first
edits = re.findall(r"^\| (\d+) \| [^|]* \| `(.+?)` → `(.+?)` \|$", README, re.M)
answers = {number: test for test, number in
           re.findall(r"^\| `(test_\w+)` \| (\d+) \|", README, re.M)}
check(len(edits) >= 8 and len(answers) == len(edits), f"'Break it': {len(edits)} edits")
for number, find, write in edits:
    folder = Path(tempfile.mkdtemp())
    check(LAB.count(find) == 1, f"{find!r} stands {LAB.count(find)} times in the lab")
    (folder / "broken.py").write_text(LAB.replace(find, write), encoding="utf-8")
    done = pytest_on(folder, "broken", "-x", "--tb=no", HOME / "test_mini_transformer.py")
    red = re.findall(r"^FAILED \S+::(\w+)", done.stdout, re.M)
    check(red == [answers.get(number)], f"edit {number}: the first test that fails is {red}")

# ==== Python that is no recipe runs; attention by hand comes out as it says
for code in blocks("python"):
    if not code.startswith("# "):
        done = subprocess.run([sys.executable, "-c", code], cwd=HOME, capture_output=True,
                              text=True)
        rounded = [f"{float(number):.1f}" for number in re.findall(r"\d+\.\d+", done.stdout)]
        check(rounded and all(number.removesuffix(".0") in README for number in rounded),
              f"{code[:60]} prints {done.stdout}{done.stderr[-300:]}")
not_code = {i for i, line in enumerate(LAB.splitlines(), start=1)
            if not line.strip() or line.strip().startswith("#")}
for node in ast.walk(ast.parse(LAB)):
    if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node):
        not_code |= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
n_code = len(LAB.splitlines()) - len(not_code)
said = f"Of the {len(LAB.splitlines())} lines, {n_code} are code."
check(said in README, f"not in the README: {said}")
for path in re.findall(r'<img src="([^"]+)"', README):
    check((HOME / path).stat().st_size > 0, f"there is no picture {path}")

# ==== Somebody who stops after any section is told what comes next
lines = LAB.splitlines()
banners = [i for i, line in enumerate(lines) if line.startswith("# ==== ")][1:]
tests = (HOME / "test_mini_transformer.py").read_text(encoding="utf-8")
for number, end in enumerate(banners, start=1):
    folder = Path(tempfile.mkdtemp())
    (folder / "my_transformer.py").write_text("\n".join(lines[:end]), encoding="utf-8")
    (folder / "test_mini_transformer.py").write_text(tests, encoding="utf-8")
    done = pytest_on(folder, "my_transformer", "-x")
    until = re.split(rf"^# ==== {number + 1}\.", tests, flags=re.M)[0]
    collected = pytest_on(folder, "my_transformer", "--collect-only").stdout
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
