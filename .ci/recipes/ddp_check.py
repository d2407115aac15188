"""Two processes make the steps of one; they resume; Ctrl-C saves; what cannot work is said."""
COMPARE = """
import sys
import torch
one, *others = [torch.load(path, weights_only=True) for path in sys.argv[1:]]
for other in others:
    assert other["reports"].keys() >= {0, 6} and other["step"] == 6
    for step in 0, 6:
        assert abs(one["reports"][step][1] - other["reports"][step][1]) < 1e-5, step
    for name, w in one["weights"].items():
        assert torch.allclose(w, other["weights"][name], rtol=0, atol=2e-5), name
    for p in one["optimizer"]:
        a, b = one["optimizer"][p]["exp_avg"], other["optimizer"][p]["exp_avg"]
        assert torch.allclose(a, b, rtol=0, atol=1e-4 * a.abs().max().item()), p
first, second = one["reports"][6][0], others[0]["reports"][6][0]
assert abs(first - second) < 1e-5, f"mean training loss: {first}, {second}"
"""
SAID = """
import subprocess
import sys
done = subprocess.run([sys.executable, *sys.argv[1:]], capture_output=True, text=True)
print(done.returncode, done.stdout, done.stderr)
"""
CTRL_C = """
import os
import signal
import subprocess
import sys
started = subprocess.Popen([sys.executable, *sys.argv[1:]], stdout=subprocess.PIPE, text=True,
                           stderr=subprocess.DEVNULL, start_new_session=True)
try:
    for line in started.stdout:
        if line.startswith("step 20 "):                # it has just evaluated at step 20
            os.killpg(started.pid, signal.SIGINT)      # as a terminal does: to all of them
            break
    print(started.communicate(timeout=60)[0])
finally:
    if started.poll() is None:
        os.killpg(started.pid, signal.SIGKILL)
"""
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "ddp.py"]

def check(folder, python):
    size = ["--n_layers", "1", "--block_size", "16", "--d_model", "32"]
    rest = ["--warmup_steps", "100", "--sample_chars", "30", "--batch_size", "5"]  # 3 and 2
    python("mini_transformer.py", *size, *rest, "--max_steps", "6", "--checkpoint_path", "1.pt")
    before = set(folder.iterdir())
    printed = python(*TORCHRUN, *size, *rest, "--max_steps", "6", "--checkpoint_path", "2.pt")
    assert printed.count("step 6 ") == 1, f"the first process alone prints: {printed}"
    assert {path.name for path in set(folder.iterdir()) - before} <= {"2.pt", "__pycache__"}
    python(*TORCHRUN, *size, *rest, "--max_steps", "3", "--checkpoint_path", "3.pt")
    resumed = python(*TORCHRUN, *rest, "--resume", "--max_steps", "6",
                     "--checkpoint_path", "3.pt")
    assert "resuming at step 3" in resumed, resumed
    python("-c", COMPARE, "1.pt", "2.pt", "3.pt")
    stopped = python("-c", CTRL_C, *TORCHRUN, *size, "--max_steps", "100000", "--eval_interval",
                     "20", "--sample_chars", "30", "--checkpoint_path", "4.pt")
    assert "4.pt: the model of step" in stopped, f"Ctrl-C must save: {stopped}"
    for command, words in ((["ddp.py"], "torchrun"),
                           ([*TORCHRUN, "--prompt", "x"], "only trains"),
                           ([*TORCHRUN, *size, "--batch_size", "1"], "batch_size")):
        said = python("-c", SAID, *command)
        assert not said.startswith("0") and words in said, said
