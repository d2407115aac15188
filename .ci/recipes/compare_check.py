"""compare.py on a stand-in for the lab that trains in no time, then once on the lab itself."""
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from statistics import mean, stdev

STAND_IN = '''
import argparse, os, sys, time
p = argparse.ArgumentParser()
for name, kind, default in (("max_steps", int, 4), ("seed", int, 0), ("gain", float, 0.0),
                            ("pause", float, 0.0), ("text_path", str, "input.txt"),
                            ("checkpoint_path", str, "")):
    p.add_argument("--" + name, type=kind, default=default)
p.add_argument("--broken", action="store_true")
p.add_argument("--empty", action="store_true")
o = p.parse_args()
print("1,234 parameters on cpu", flush=True)
if o.broken:
    sys.exit("mini_transformer: this cannot work")
open("count.txt", "a").write("+")
step = 0
try:
    while step < o.max_steps:
        time.sleep(o.pause)
        step += 1
except KeyboardInterrupt:
    pass                                        # as the lab: it evaluates and exits with 0
open("count.txt", "a").write("-")
good = os.environ["OMP_NUM_THREADS"] == "1"
right = o.text_path in ("input.txt", "my t\\u00e9xt \\u4e2d.txt") and good
loss = 1 + 0.01 * (o.seed * 7 % 5) - o.gain * (1 + 0.1 * (o.seed * 3 % 4)) if right else 99
print("step 0 | val 4.2705 | 0 s\\n \\u4e2d sample")
if not o.empty:
    print(f"step {step} | train 2.1557 | val {loss:.4f} | 62 s | the earlier x is now x.old")
print("step no | val 7")
'''

def loss(seed, gain=0.0):
    return 1 + 0.01 * (seed * 7 % 5) - gain * (1 + 0.1 * (seed * 3 % 4))

def check(folder, python):
    here = folder / "a folder for compare"
    shutil.rmtree(here, ignore_errors=True)
    here.mkdir()
    shutil.copy(folder / "compare.py", here)
    (here / "stand_in.py").write_text(STAND_IN, encoding="utf-8")
    environment = {**os.environ, "MODULE": "stand_in", "PYTHONIOENCODING": "utf-8"}

    def compare(*words, **more):
        done = subprocess.run(
            [sys.executable, "compare.py", *words], cwd=here, encoding="utf-8",
            capture_output=True, env={**environment, **more}, timeout=120)
        assert "Traceback" not in done.stderr, done.stderr
        assert max(map(len, done.stdout.splitlines()), default=0) <= 100, done.stdout
        return done

    def rows(output, name):
        """The numbers in the row of a variant. A row without an interval has one fewer."""
        line = [line for line in output.splitlines() if line.endswith(name)][-1]
        return re.findall(r"[-+]?\d[\d.,]*", line.removesuffix(name))

    # Without arguments it says how to call it. What fails is said, and leaves no row.
    usage = compare()
    assert usage.returncode and "compare.py --seeds" in usage.stderr, usage
    for wrong, word in ("--broken", "this cannot work"), ("--nonsense 1", "nonsense"), (
            "--text_path 'open", "quotation"), ("--empty --max_steps x", "max_steps"):
        failed = compare(wrong)
        assert failed.returncode and word in failed.stderr, failed
    assert "stand" in compare("--empty", MODULE="stand_off").stderr
    assert "this cannot work" not in (here / "results.csv").read_text()

    # Pairs: means, differences and intervals, as worked out here.
    said = compare("--max_steps 4", "--gain 0.1", "--gain 0.2 --max_steps 5").stdout
    assert "9 of 9" in said and "stand_in.py" in said.splitlines()[1], said
    count = (here / "count.txt").read_text()
    most = max(count[:i].count("+") - count[:i].count("-") for i in range(len(count) + 1))
    assert count.count("+") == 9 and 1 <= most <= 2, count
    results = here / "results.csv"
    lines = results.read_text(encoding="utf-8").splitlines()
    version = lines[1].partition(",")[0]
    results.unlink()
    # Rows come from other files as well, and then nothing is run. Empty rows do not count.
    for seed in range(1, 14):
        for options, gain in ("--max_steps 4", 0), ("--max_steps 4 --gain 0.1", 0.1):
            lines += ["", f'{version},{options},{seed},"1,234",10.0,4.2,{loss(seed, gain):.4f}']
    (here / "results_ben.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    for n, t in (1, None), (2, 12.706), (3, 4.303), (4, 3.182), (6, 2.571), (13, 2.179):
        seeds = [str(seed) for seed in range(1, n + 1)]
        if n == 3:
            seeds = ["1,2", "3", "3"]           # as some shells pass it, and one twice
        said = compare("--max_steps 4", "--gain 0.1", "--seeds", *seeds).stdout
        numbers = rows(said, "  --gain 0.1")
        minus = [round(loss(s, 0.1), 4) - round(loss(s), 4) for s in range(1, n + 1)]
        wanted = [mean(loss(s, 0.1) for s in range(1, n + 1)), mean(minus)]
        if t:
            wanted.append(t * stdev(minus) / n ** 0.5)
        assert len(numbers) == len(wanted) + 3, said  # then time, parameters, seeds
        for number, value in zip(numbers, wanted):
            assert abs(float(number) - value) <= 1e-4 + 0.006 * abs(value), (n, said)
        assert numbers[-2:] == ["1,234", str(n)], said
    assert (here / "count.txt").read_text() == count, "a run that is known was repeated"

    # Another version of the lab is run anew, other line ends are the same version.
    for changed, more in (STAND_IN + "# more\n", 2), (STAND_IN.replace("\n", "\r\n"), 2):
        (here / "stand_in.py").write_bytes(changed.encode())
        compare("--seeds", "1", "--max_steps 4")
        assert len((here / "count.txt").read_text()) == len(count) + more

    # Names with spaces and accents, on a console that cannot print them all; long rows.
    long = "--text_path 'my t\u00e9xt \u4e2d.txt' --gain 0.1 --max_steps 4 --gain 0.2 --pause 0"
    for encoding in "cp1252", "ascii":          # the second time, all is known
        done = subprocess.run([sys.executable, "compare.py", "5", "--max_steps 3", long, ""],
                              cwd=here, capture_output=True, timeout=120,
                              env={**environment, "PYTHONIOENCODING": encoding})
        out = done.stdout.decode(encoding)
        assert done.returncode == 0 and f"{loss(5, 0.2):.4f}" in out, done
        assert max(map(len, out.splitlines())) <= 120, out  # \\u4e2d takes six columns

    if os.name == "nt":
        return
    # Ctrl-C, as a terminal sends it, to the whole group: no row, and nothing goes on.
    results.unlink(missing_ok=True)
    (here / "count.txt").write_text("")
    for ending in signal.SIGINT, signal.SIGTERM:
        process = subprocess.Popen(
            [sys.executable, "compare.py", "--pause 0.25", "--gain 0.1"], cwd=here, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment,
            start_new_session=True,             # Ctrl-C is off in background jobs
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
        while (here / "count.txt").read_text().count("+") < 2:  # two runs are under way
            time.sleep(0.05)
        os.killpg(process.pid, ending)
        out, error = process.communicate(timeout=60)
        assert process.returncode == 1 and "Traceback" not in error, error
        time.sleep(1.5)                         # a run that lives on would end by now
        assert (here / "count.txt").read_text() == "++", "a run was not ended"
        assert "--pause" not in results.read_text(encoding="utf-8"), "a run cut short counts"
        (here / "count.txt").write_text("")
    said = compare("--pause 0.25", "--gain 0.1", "--seeds", "1").stdout
    assert rows(said, "  --gain 0.1")[0] == f"{loss(1, 0.1):.4f}", said

    # The lab itself.
    options = "--max_steps 2 --block_size 16 --n_layers 1 --sample_chars 5 --device cpu"
    said = python("compare.py", "--seeds", "1", options, "--n_layers 2")
    base, _, _, small, _ = rows(said, "(base)")
    deep, _, _, big, _ = rows(said, "--n_layers 2")
    assert 2 < float(base) < 6 and 2 < float(deep) < 6 and small < big, said
