"""Does the README tell the truth? Its options exist, its commands build what they say,
its Python runs as it stands, each edit of 'Break it' turns its test red, what it says to
type first trains, the recipes compute the same as what they replace, and the tests follow
a file that grows section by section. Run from anywhere: python .ci/check_readme.py"""
import ast
import json
import os
import re
import shlex
import subprocess
import sys
import tempfile
from copy import deepcopy
from dataclasses import asdict
from importlib.util import find_spec
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

def run_python(code, folder):
    """Run code as a script in a folder; -> what it printed, or None if it failed.
    With lab.main() it takes options: few steps."""
    (folder / "block.py").write_text(code, encoding="utf-8")
    command = [sys.executable, "block.py"]
    if "lab.main()" in code:
        command += "--max_steps 4 --block_size 16 --sample_chars 9".split()
    if "LlamaForCausalLM" in code:
        command += "--norm rmsnorm --no-qk_norm".split()
    done = subprocess.run(command, cwd=folder, capture_output=True,
                          text=True, env={**os.environ, "PYTHONPATH": str(HOME)})
    if done.returncode:
        print(done.stdout[-500:], done.stderr[-1500:])
    return done.stdout if done.returncode == 0 else None

def a_folder_after_a_run():
    """A folder with texts and the checkpoint of a short run."""
    folder = Path(tempfile.mkdtemp())
    (folder / "input.txt").write_text(LAB)
    (folder / "my_text.txt").write_text(EASY_TEXT)
    options = "--max_steps 4 --n_layers 2 --block_size 64 --sample_chars 9 --device cpu"
    subprocess.run([sys.executable, HOME / "mini_transformer.py", *options.split()],
                   cwd=folder, check=True, capture_output=True)
    return folder

# ==== Every option that is named exists, and every command builds a model
fields = {"prompt", *vars(lab.TransformerConfig()), *vars(lab.TrainConfig())}
for option in sorted(set(re.findall(r"--([a-z][\w-]+)", README))):
    name = option.removeprefix("no-")
    foreign = option in {"device", "help", "index-url", "standalone", "nproc_per_node",
                         "nnodes", "rdzv_backend", "rdzv_endpoint"}
    foreign = foreign or f"--{option}=" in README     # nanoGPT's: --x=
    check(name in fields or foreign, f"--{option} is no option")

def build(config=None, **settings):
    """In the place of train: everything is made, nothing is trained."""
    again = lab.TransformerConfig(**json.loads(json.dumps(asdict(config))))
    model = lab.MiniTransformer(again)
    built.append(lab.make_optimizer(model, lab.TrainConfig(**settings)))

train, folder, built = lab.train, a_folder_after_a_run(), []
os.chdir(folder)
Path("my_text.pt").write_bytes(Path("checkpoint.pt").read_bytes())
lab.train = build
commands = [line.split("#")[0] for block in blocks("bash") for line in block.splitlines()
            if line.startswith("python mini_transformer.py")]
base = re.search(r"^OMP_NUM_THREADS=1 (python mini_transformer.py .*)$", README, re.M)
rows = re.findall(r"^\| `(--\S[^`]*)`", README, re.M)   # a row of a table: base and options
check(base and len(rows) >= 20, "the tables of 'What we found' are not found")
commands += [f"{base[1]} {row}" for row in rows if base]
for line in commands:
    before = len(built)
    try:
        lab.main(shlex.split(line)[2:])
        check("--prompt" in line or len(built) == before + 1, f"{line}: built nothing")
    except (Exception, SystemExit) as error:
        check(False, f"{line}: {error!r}")
lab.train = train
torch.set_num_threads(1)
once, twice = (lab.train(lab.TransformerConfig(block_size=16), max_steps=3)[0].state_dict()
               for _ in range(2))
check(all(torch.equal(once[name], twice[name]) for name in once),
      "two runs with one seed are not equal to the last bit")

# ==== Every block of Python runs as it stands
for block in blocks("python"):
    if block.startswith(("# first", "# ddp")):        # parts of a script: see below
        continue
    if "from transformers" in block and not find_spec("transformers"):
        print("llama.py was not run: transformers is not here")
        continue
    said = run_python(block, a_folder_after_a_run())
    check(said and said.strip(), f"this block fails, or prints nothing:\n{block}")
    if "LlamaForCausalLM" in block:
        far = re.search(r"logits differ by (\S+)", said or "")
        check(far and float(far[1]) < 1e-4, f"Llama's logits are others: {said}")

# ==== The recipes do what they say: the same logits, optimizer and text as without them
def names_of(recipe, until):
    """What a recipe defines before the line that begins with until."""
    [code] = [block for block in blocks("python") if recipe in block]
    names = {}
    exec(code[: code.index("\n" + until)], names)
    return names

cache, sample, drawn_from = names_of("class Cache", "saved ="), lab.sample, []

def remember(logits, *how):
    drawn_from.append(logits)
    return sample(logits, *how)

lab.sample = remember
for positions in lab.POSITIONS:
    for kv_heads in 0, 2, 1:
        torch.manual_seed(0)
        model = lab.MiniTransformer(lab.TransformerConfig(
            positions=positions, n_kv_heads=kv_heads, block_size=16)).eval()
        for p in model.parameters():
            torch.nn.init.normal_(p, std=0.1)         # loud enough to tell
        copy, idx, start, fine = deepcopy(model), torch.randint(65, (2, 3)), 0, []
        for new in cache["stream"](copy, idx, 60, 0):  # past the window, several times
            if idx.size(1) - start > 16:
                start = idx.size(1) - 8               # it starts again with the last half
            wanted = model(idx[:, start:])[0][:, -1]
            fine.append(torch.allclose(drawn_from[-1], wanted, atol=1e-4, rtol=1e-4))
            idx = torch.cat([idx, new], dim=1)
        check(len(fine) == 60 and all(fine),
              f"the cache changes logits: {positions}, {kv_heads}")
lab.sample = sample

muon = names_of("class Muon", "lab.make_optimizer")
torch.manual_seed(0)
model = lab.MiniTransformer(lab.TransformerConfig(n_layers=2, block_size=32))
copy, run = deepcopy(model), lab.TrainConfig(learning_rate=0.02, weight_decay=0.1)
ours = muon["make_optimizer"](model, run)
theirs = torch.optim.Muon([p for p in copy.blocks.parameters() if p.dim() == 2], lr=0.02,
                          weight_decay=0.1, momentum=0.95)
for _ in range(5):
    ids = torch.randint(65, (4, 33))
    for net, optimizer in (model, ours), (copy, theirs):
        for p in net.parameters():
            p.grad = None
        net(ids[:, :-1], ids[:, 1:])[1].backward()
        for group in optimizer.param_groups:
            group["lr"] = 0.02
        optimizer.step()
    for p, q in zip(model.parameters(), copy.parameters()):
        if not any(p is inner for inner in ours.param_groups[2]["params"]):
            q.data.copy_(p.data)                      # theirs knows only those
far = max(((p - q).norm() / q.norm()).item()
          for p, q in zip(model.parameters(), copy.parameters()))
check(0 < far < 0.03, f"Muon differs from torch.optim.Muon by {far}")  # bfloat16 there

pairs = names_of("class BytePairs", "lab.CharDataset")["BytePairs"](LAB, 16)
check(len(pairs.data) < 0.6 * len(LAB), "byte pairs do not shorten the text")
for text in LAB, "aaaaaaa", "h\u00e9 \u4e2d\U0001f600\n\0", "":
    check(pairs.decode(pairs.encode(text)) == text, f"byte pairs change {text[:20]!r}")
check(pairs.encode(LAB) == pairs.data.tolist(), "byte pairs: encode differs from data")

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
imports = lines[lines.index("import math") : lines.index("import torch.nn.functional as F") + 1]
[loop] = [block for block in blocks("python") if block.startswith("# first")]
code = "\n".join([*imports, *typed[:-1]])
stated, n = int(words[2]), len(imports) + len(typed[:-1]) + len(loop.splitlines())
check(n == stated and f"{n} lines" in words[1], f"what to type first has {n} lines, not {stated}")
said = run_python(code + "\n" + loop, a_folder_after_a_run())
losses = [float(x) for x in re.findall(r"\d\.\d+", said or "")]
check(losses and losses[-1] < 0.5 * losses[0], f"what to type first does not train: {losses}")

# ==== The same loop in two processes takes the same steps as in one
[ddp] = [block for block in blocks("python") if block.startswith("# ddp")]
before, after, instead = re.split(r"^ *# (?:after|in the place of) .*\n", ddp, flags=re.M)
old = "".join(line for line in loop.splitlines(True) if re.match(" +(x, y|logits, loss) =", line))
model_line = re.search(r"^model = .*\n", loop, re.M)[0]
script = loop.replace(old, instead).replace(model_line, model_line + after)
check(old in loop and len(script) > len(loop), "the lines for several processes find no place")
script = f"{code}\ntorch.set_default_dtype(torch.float64)\n{before}{script.replace('101', '21')}"
script += "\nx, y = dataset[torch.arange(9)]\n"
script += "print('LOSS', model(x, y)[1].item(), flush=True)\n"
folder, ends = a_folder_after_a_run(), []
(folder / "my_loop.py").write_text(script, encoding="utf-8")
for n in 1, 2:
    said = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={n}",
         "my_loop.py"], cwd=folder, capture_output=True, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"})
    found = [float(x) for x in re.findall(r"LOSS ([\d.]+)", said.stdout)]
    check(len(found) == n, f"{n} processes: {said.stderr[-1000:]}")
    ends += found
check(len(ends) == 3 and max(ends) - min(ends) < 1e-9, f"one process and two end at {ends}")

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
