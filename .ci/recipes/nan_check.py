"""nan.py: planted troubles are found where they are; without one, nothing changes."""
import re

OPTIONS = ("--max_steps 3 --n_layers 2 --block_size 16 --d_model 32 --d_ff 32 --batch_size 4 "
           "--sample_chars 1 --ffn relu --device cpu --checkpoint_path nan.pt").split()

MANY = """
import os, runpy, sys
for module, words in {jobs!r}:
    os.environ["MODULE"], sys.argv = module, ["nan.py", *words]
    try:
        runpy.run_path("nan.py")
        print("ended well", end="\\n====")
    except SystemExit as error:
        print("ended with", error, end="\\n====")
"""

def check(folder, python):
    source = (folder / "mini_transformer.py").read_text(encoding="utf-8")
    relu = "dict(relu=F.relu" if "dict(relu=F.relu" in source else "Menu(relu=F.relu"
    troubles = {
        "hides": ("triu(diagonal=1)", "triu(diagonal=0)"),
        "log": (relu, relu.replace("F.relu", "lambda x: F.relu(x).log()")),
        "root": (relu, relu.replace("F.relu", "lambda x: (x * (x > 0)).sqrt()")),
        "huge": ("self.down_proj(self.act", "1e39 * self.down_proj(self.act"),
        "long": ("return logits, F.cross", "return logits, 1e25 * F.cross")}
    for name, (old, new) in troubles.items():
        assert source.count(old) == 1, old
        (folder / f"{name}.py").write_text(source.replace(old, new), encoding="utf-8")
    fast = ["--learning_rate", "1e6", "--no-qk_norm", "--warmup_steps", "0"]
    jobs = [(name, OPTIONS) for name in troubles] + [("mini_transformer", OPTIONS + fast)]
    *ends, fast = python("-c", MANY.format(jobs=jobs)).split("\n====")[:-1]
    said = dict(zip(troubles, ends))

    def found(text, step, place, cause):
        report = text.split("ended with")[1]
        first, causes = report.split("likeliest first:\n")
        assert f"step {step}:" in first and place in first.splitlines()[1], report
        assert cause in causes.splitlines()[0], report
        assert "nan" not in re.findall(r"number (?:was|before it,) (\S+)", first), report

    found(said["hides"], 1, "forward, output of blocks.0.attn.attend", "mask")
    found(said["log"], 1, "forward, output of blocks.0.ffn.activation", "logarithm of 0")
    found(said["root"], 1, "backward, gradient that leaves blocks.1.ffn.activation", "root")
    found(said["huge"], 1, "forward, output of blocks.0.ffn", "")
    assert "forward, output of blocks.0.ffn.down_proj" in said["huge"], said["huge"]
    found(said["long"], 1, "backward, length of the gradient", "grown too far")
    found(fast, 2, "forward", "grown too far")
    assert "ended with" in fast and float(re.search(r"before it, (\S+),", fast)[1]) > 1e12, fast

    watched, plain = python("nan.py", *OPTIONS), python("mini_transformer.py", *OPTIONS)
    val = r"step 3 .* val (\S+)"
    assert re.search(val, watched)[1] == re.search(val, plain)[1], "watching changes training"
    assert "every number of 3 steps was finite" in watched, watched
