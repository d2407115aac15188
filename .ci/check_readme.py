"""Does the README tell the truth? Its options exist, its commands build what they say,
its scripts run as they stand, each edit of 'Break it' turns its test red, byte pairs lose
nothing, and the tests follow a file that grows section by section. Run from anywhere: python .ci/check_readme.py"""
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
EASY_TEXT = "the cat sat on the mat and the dog sat on the log.\n" * 40
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

def python(folder, *arguments):
    """Run Python with these arguments in a folder; -> what it printed, or None."""
    done = subprocess.run([sys.executable, *arguments], cwd=folder, capture_output=True,
                          text=True, encoding="utf-8")
    if done.returncode:
        print(done.stdout[-500:], done.stderr[-1500:])
    return done.stdout if done.returncode == 0 else None

def a_folder_after_a_run():
    """A folder with the lab, the README, a text, and the checkpoint of a short run."""
    folder = Path(tempfile.mkdtemp())
    for name in "README.md", "mini_transformer.py":
        shutil.copy(HOME / name, folder)
    (folder / "input.txt").write_text(LAB)
    (folder / "my_text.txt").write_text(EASY_TEXT)
    options = "--max_steps 4 --n_layers 2 --block_size 64 --sample_chars 9 --device cpu"
    assert python(folder, "mini_transformer.py", *options.split())
    return folder

# ==== Its length, its links, its options
lines, folded, outside = README.splitlines(), False, 0
for line in lines:
    folded = folded or line.startswith("<details>")
    outside += not folded
    folded = folded and "</details>" not in line
check(len(lines) <= 700 and outside <= 350, f"{len(lines)} lines, {outside} outside folds")

headings = [re.sub(r"[^\w -]", "", line.lstrip("# ").lower()).replace(" ", "-")
            for line in re.sub(r"```.*?```", "", README, flags=re.S).splitlines()
            if line.startswith("#")]
for anchor in re.findall(r"\(#([\w-]+)\)", README):
    check(anchor in headings, f"the link #{anchor} leads nowhere")

fields = {"prompt", *vars(lab.TransformerConfig()), *vars(lab.TrainConfig())}
for option in sorted(set(re.findall(r"--([a-z][\w-]+)", README))):
    foreign = option in {"help", "index-url"} or f"--{option}=" in README  # nanoGPT's: --x=
    check(option.removeprefix("no-") in fields or foreign, f"--{option} is no option")

# ==== Every command builds a model, and every row of a table the one that it says
def build(config=None, **settings):
    """In the place of train: everything is made, nothing is trained."""
    again = lab.TransformerConfig(**json.loads(json.dumps(asdict(config))))
    model = lab.MiniTransformer(again)
    lab.make_optimizer(model, lab.TrainConfig(**settings))
    built.append(sum(p.numel() for p in model.parameters()))

train, folder, built = lab.train, a_folder_after_a_run(), []
os.chdir(folder)
for name in set(re.findall(r"--checkpoint_path (\w+\.pt)", README)):
    shutil.copy("checkpoint.pt", name)
lab.train = build
in_text = "\n".join(blocks("bash") + re.findall(r"`(python .*?)`", README))
commands = []                                         # each a list of options
for line in re.findall(r"^python (?!-c|-m).*", in_text, re.M):
    script, *options = shlex.split(line)[1:]
    if script == "compare.py":
        base, *variants = options
        commands += [(base + " " + variant).split() for variant in ["", *variants]]
    elif script not in {"maps.py", "context.py", "weights.py", "train.py"}:
        commands.append(options)
rows = re.findall(r"^\| `(--[^`]*)` \| (\d[\d,]+,\d{3} )?", README, re.M)
check(len(commands) >= 20 and len(rows) >= 10, f"{len(commands)} commands, {len(rows)} rows")
for options, size in [(options, None) for options in commands] + [
        (options.split(), size) for options, size in rows]:
    before, name = len(built), " ".join(options)
    try:
        lab.main(options)
        check("--prompt" in options or len(built) == before + 1, f"{name}: built nothing")
        check(not size or built[-1] == int(size.replace(",", "")), f"{name}: {built[-1:]}")
    except (Exception, SystemExit) as error:
        check(False, f"{name}: {error!r}")
lab.train = train
torch.set_num_threads(1)
once, twice = (lab.train(lab.TransformerConfig(block_size=16), max_steps=3)[0].state_dict()
               for _ in range(2))
check(all(torch.equal(once[name], twice[name]) for name in once),
      "two runs with one seed are not equal to the last bit")

# ==== The README's own line writes its scripts, and every script runs as it stands
[writer] = [line for line in in_text.splitlines() if line.startswith("python -c")]
folder = a_folder_after_a_run()
python(folder, *shlex.split(writer)[1:])
scripts = sorted(path.name for path in folder.glob("*.py"))
scripts.remove("mini_transformer.py")
check(len(scripts) == len(blocks("python")) >= 10, f"the line writes {scripts}")
few_steps = "--max_steps 4 --block_size 16 --sample_chars 9 --checkpoint_path few.pt".split()
for name in scripts:
    trains = "lab.main()" in (folder / name).read_text()
    if name in {"compare.py", "load.py"}:             # see below; nothing to see
        continue
    said = python(folder, name, *few_steps * trains)
    check(said and said.strip(), f"{name} fails, or prints nothing")

compare = ["compare.py", "--max_steps 4 --block_size 16 --eval_interval 2", "--n_layers 2",
           "--no-tie_weights"]
first = python(folder, *compare)
results = (folder / "results.csv").read_text()
(folder / "mini_transformer.py").unlink()             # all is known: nothing is run again
check(first and first.count("--n_layers 2") == 1 and first.count("+-") + first.count("±") >= 3
      and len(results.splitlines()) == 9, f"compare.py prints {first}, keeps {results}")
check(python(folder, *compare) == first, "compare.py does not go on where it stopped")
sys.path.insert(0, str(folder))                       # for load.py

# ==== Byte pairs, back and forth, are the text
def names_of(recipe, until):
    """What a recipe defines before the line that begins with until."""
    [code] = [block for block in blocks("python") if recipe in block]
    names = {}
    exec(code[: code.index("\n" + until)], names)
    return names

pairs = names_of("class BytePairs", "lab.CharDataset")["BytePairs"](LAB, 16)
check(len(pairs.data) < 0.6 * len(LAB), "byte pairs do not shorten the text")
for text in LAB, "aaaaaaa", "h\u00e9 \u4e2d\U0001f600\n\0", "":
    check(pairs.decode(pairs.encode(text)) == text, f"byte pairs change {text[:20]!r}")
check(pairs.encode(LAB) == pairs.data.tolist(), "byte pairs: encode differs from data")

# ==== Each edit of 'Break it' is possible, and turns its test red
rows = re.findall(r"^- .*?`(.+?)` → `(.+?)`.*?`(test_\w+)`$", README, re.M)
check(len(rows) >= 8, "the edits of 'Break it' are not found")
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

# ==== Somebody who stops after any section is told what comes next
lines = LAB.splitlines()
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
