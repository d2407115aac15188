"""Does page.html compute what PyTorch computes, and do its controls work? In a real browser.

    python check_page.py FOLDER  # with mini_transformer.py, page.py, checkpoint.pt, input.txt

page.py writes page.html for the trained model and for small random ones. One more script is
appended to it, which headless Chromium runs: it feeds a text to the page's own read(), or uses
the page as a reader would (types, clicks, points), and reports what it sees. Where there is no
Chromium, nothing is checked, and the last line says so.
"""
import importlib
import json
import math
import re
import shutil
import subprocess
import sys
import tempfile
import traceback
from dataclasses import asdict
from pathlib import Path

import torch

LIMIT = 1e-4
FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
         "--disable-background-networking", "--disable-component-update", "--disable-sync"]
REPORT = """document.body.textContent = "RESULT" + JSON.stringify(result) + "END" """
COMPUTE = """<script>{
text = []
for (const id of IDS) read(id)
const result = {logits: text.map(step => step.logits), p: text.map(step => step.p),
  starts: text.map(step => step.start), looks: LOOKED.map(i => text[i].looks)}
REPORT }</script>"""
USE = """<script>(async () => {
const later = ms => new Promise(done => setTimeout(done, ms)), result = {}
const event = (element, name) => element.dispatchEvent(new Event(name, {bubbles: true}))
const state = () => ({
  ids: text.map(step => step.id), text: get("text").textContent, go: get("go").textContent,
  message: get("message").textContent, degrees: get("degrees").textContent,
  about: get("about").textContent,
  here: [...document.querySelectorAll(".here")].map(span => span.textContent),
  unseen: document.querySelectorAll("#text .unseen").length,
  red: [...get("text").children].map(alpha),
  blue: [...get("maps").children].map(map => [...map.querySelectorAll("span")].map(alpha)),
  bars: [...get("next").rows].map(row => [row.cells[0].textContent, row.cells[1].textContent,
    row.querySelector("i").getBoundingClientRect().width])})
function alpha(span) {
  const numbers = getComputedStyle(span).backgroundColor.match(/[\\d.e-]+/g)
  return numbers.length === 4 ? Number(numbers[3]) : 1
}
function type(prompt) {
  get("prompt").value = prompt
  event(get("prompt"), "input")
  return state()
}
function warm(temperature) {
  get("temperature").value = temperature
  event(get("temperature"), "input")
}
async function write(ms) {
  get("go").click()
  await later(ms)
  const busy = state()
  get("go").click()
  await later(100)
  const stopped = state()
  await later(500)
  return {busy, stopped, later: state()}
}
result.prompt = type(PROMPT)
result.unknown = type(PROMPT + "\\u2603\\u{1F980}" + PROMPT[0] + "\\u2603")
type(PROMPT)
warm("0")
result.greedy = await write(1000)
warm("1")
result.long = await write(LONG)
for (const i of [3, text.length - 2]) {
  event(get("text").children[i], "pointerover")
  result["at" + (i === 3 ? "Start" : "End")] = state()
}
get("again").click()
result.again = state()
result.empty = type("")
result.counts = [0.5, 1, 0].map(temperature => {
  const counts = [0, 0, 0], logits = [0.5, 0.2, 0.3].map(Math.log)
  for (let n = 0; n < 20000; n++) counts[sample(logits, temperature)]++
  return counts
})
const number = (element, name) => Number(element.getAttribute(name))
result.labels = [...document.querySelectorAll("#curve text")].map(
  label => [label.textContent, number(label, "x"), number(label, "y")])
result.dots = ["training", "held_out"].map(name => [...document.querySelectorAll(
  `#curve .${name} circle`)].map(dot => [number(dot, "cx"), number(dot, "cy")]))
REPORT })()</script>"""
LOOK = """<script>(() => {
const corner = map => [map.getBoundingClientRect().left, map.getBoundingClientRect().top]
const result = {dark: getComputedStyle(document.body).color}
result.corners = [...get("maps").children].map(corner)
document.body.style.width = "358px"             // of a telephone: 390, less the padding
for (const char of "bcbcbcbcbcbcbcbcbcbc") read(itos.indexOf(char))
show()
result.narrow = [...get("maps").children].map(corner)
result.wide = document.body.scrollWidth - document.body.clientWidth
REPORT })()</script>"""
TINY = dict(vocab_size=11, block_size=16, n_layers=2, n_heads=4, n_kv_heads=0, d_model=24,
            d_ff=40, dropout=0.0, bias=False, positions="rope", attention="fused", causal=True,
            ffn="swiglu", norm="layernorm", qk_norm=True, pre_norm=True, tie_weights=True)
CHARS = "\n <&\"'é/🙂bc"
VARIANTS = [dict(),
            dict(positions="learned", norm="rmsnorm", ffn="relu", n_kv_heads=2),
            dict(positions="sinusoidal", ffn="gelu", bias=True, qk_norm=False),
            dict(positions="none", ffn="gelu_tanh", tie_weights=False, n_kv_heads=1),
            dict(pre_norm=False, norm="rmsnorm", bias=True, n_kv_heads=2),
            dict(pre_norm=False, positions="learned", ffn="gelu", tie_weights=False),
            dict(positions="sinusoidal", norm="rmsnorm", qk_norm=False, ffn="gelu_tanh"),
            dict(positions="none", ffn="relu", bias=True, n_heads=3, n_layers=3, block_size=7),
            dict(n_heads=8, n_kv_heads=4, d_model=32, n_layers=3, dropout=0.3),
            dict(block_size=1, n_heads=1, n_layers=1, attention="explicit"),
            dict(n_layers=0, positions="learned")]

def save(folder, model, itos, reports):
    step = max(reports)
    torch.save(dict(config=asdict(model.config), run=asdict(lab.TrainConfig()), itos=itos,
                    step=step, reports=reports, weights=model.state_dict(), optimizer={}),
               folder / "checkpoint.pt")

def random_model(**changes):
    """A model with large random weights: small ones would hide mistakes."""
    model = lab.MiniTransformer(lab.TransformerConfig(**{**TINY, **changes})).eval()
    with torch.no_grad():
        for name, values in model.state_dict().items():
            if name != "position_emb" or model.config.positions == "learned":
                gain = values.dim() == 1 and name.endswith("weight")
                values.copy_(0.5 * torch.randn_like(values) + gain)
    return model

def make_page(folder):
    return subprocess.run([sys.executable, FOLDER / "page.py", "checkpoint.pt"], cwd=folder,
                          capture_output=True, text=True)

def in_browser(folder, script, *flags):
    """Write page.html from the checkpoint in folder; return what script reports about it."""
    made = make_page(folder)
    assert made.returncode == 0, made.stderr
    with open(folder / "page.html", "a", encoding="utf-8") as file:
        file.write(script.replace("REPORT", REPORT))
    profile = f"--user-data-dir={folder / 'profile'}"
    dom = subprocess.run([BROWSER, *FLAGS, profile, *flags, "--dump-dom",
                          (folder / "page.html").as_uri()], capture_output=True, timeout=600)
    report = re.search(r"RESULT(\{.*\})END", dom.stdout.decode("utf-8"), re.DOTALL)
    assert report, "the page's JavaScript has stopped with an error"
    return json.loads(report[1].replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&"))

@torch.no_grad()
def look(model, ids):
    """Logits at the last of ids, (V,), and how much its heads look at each, (L, H, T)."""
    looks = []
    def attend(q, k, v, is_causal):             # here only the last position is needed
        weights = (q[:, :, -1:] @ k.mT / math.sqrt(q.size(-1))).softmax(dim=-1)
        looks.append(weights[0, :, 0].tolist())
        return lab.explicit_attention(q, k, v, is_causal)
    for block in model.blocks:
        block.attn.attend = attend
    return model(torch.tensor([ids]))[0][0, -1], looks

def windows(n, T):
    """Where the window of each of n characters starts: a full one keeps its newer half."""
    starts = []
    for i in range(n):
        full = i > 0 and i - starts[-1] == T
        starts.append(0 if i == 0 else i - T // 2 if full else starts[-1])
    return starts

def check_numbers(model, itos, ids):
    """Logits, probabilities and attention of the page are PyTorch's."""
    n, T = len(ids), model.config.block_size
    looked = sorted({0, 1, T // 2, T - 1, T, n - 2, n - 1} & set(range(n)))
    with tempfile.TemporaryDirectory() as name:
        save(Path(name), model, itos, {0: (None, 4.2), 4: (3.0, 2.5)})
        page = in_browser(Path(name), COMPUTE.replace("IDS", json.dumps(ids))
                          .replace("LOOKED", json.dumps(looked)))
    starts = windows(n, T)
    assert page["starts"] == starts, "the windows start elsewhere"
    expected = [look(model, ids[start:i + 1]) for i, start in enumerate(starts)]
    logits = torch.stack([row for row, _ in expected])
    off = (torch.tensor(page["logits"]) - logits).abs().max().item()
    p_off = (torch.tensor(page["p"]) - logits.softmax(-1)).abs().max().item()
    looks_off = 0.0
    for i, looks in zip(looked, page["looks"]):
        assert len(looks) == model.config.n_layers
        for block, mine in zip(looks, expected[i][1]):
            difference = torch.tensor(block) - torch.tensor(mine)
            looks_off = max(looks_off, difference.abs().max().item())
    print(f"    logits differ by {off:.1e} at most (they go up to {logits.abs().max():.1f}), "
          f"attention by {looks_off:.1e}")
    assert max(off, p_off, looks_off) < LIMIT

def close(a, b, tolerance=0.006):
    return abs(a - b) < tolerance

def check_pointing(seen, model, itos, i):
    """The text, the bars and the maps, when character i of the page's text is pointed at."""
    ids, config = seen["ids"], model.config
    starts = windows(len(ids), config.block_size)
    logits, looks = look(model, ids[starts[i]:i + 1])
    p = logits.softmax(-1)
    char = itos[ids[i]].replace("\n", "\u21b5\n")
    assert seen["here"] == [char] * (1 + config.n_layers * config.n_heads), "outlined"
    assert seen["unseen"] == starts[i], "pale characters"
    bars = [(itos.index("\n" if label == '"\u21b5"' else label[1:-1]), float(value), width)
            for label, value, width in seen["bars"]]
    assert len(bars) == min(8, len(itos)) and len({bar[0] for bar in bars}) == len(bars)
    assert all(close(p[id], value, 0.001) for id, value, _ in bars), "bars: other numbers"
    assert all(close(p[bar[0]], best, 0.001) for bar, best in zip(bars, p.topk(8)[0])), "order"
    wide = bars[0][2] / p[bars[0][0]].item()    # so wide would a bar be for p = 1
    assert 100 < wide < 700, "bars are too short or too long"
    assert all(close(width, p[id] * wide, 1.5) for id, _, width in bars), "bar widths"
    heads = [row for block in looks for row in block]
    assert len(seen["blue"]) == len(heads)
    for blue, row in zip(seen["blue"], heads):
        end = min(len(ids), starts[i] + config.block_size)
        row = row + [0] * (end - starts[i] - len(row))
        assert len(blue) == len(row), "maps show another part of the text"
        assert all(close(a, math.sqrt(b)) for a, b in zip(blue, row)), "maps: other weights"
    surprise = [0.0]
    for j in range(1, len(ids)):
        before = look(model, ids[starts[j - 1]:j])[0].log_softmax(-1)
        surprise.append(-before[ids[j]].item())
    assert all(close(a, min(1, s / 7)) for a, s in zip(seen["red"], surprise)), "red"
    here, mean = re.findall(r"\d+\.\d+", seen["about"])
    assert close(float(here), surprise[i], 0.01), "the surprise in words"
    assert close(float(mean), sum(surprise) / (len(ids) - 1), 0.01), "the mean in words"

def check_controls(saved, model, dataset):
    """Type, click, stop, point: what does a reader see?"""
    prompt = (FOLDER / "input.txt").read_text(encoding="utf-8-sig")[:20]
    itos, T = dataset.itos, model.config.block_size
    with tempfile.TemporaryDirectory() as name:
        shutil.copy(FOLDER / "checkpoint.pt", name)
        script = USE.replace("PROMPT", json.dumps(prompt)).replace("LONG", str(40 * T + 500))
        seen = in_browser(Path(name), script, f"--virtual-time-budget={60 * T + 9000}")
    def shown(state):
        return state["text"].replace("\u21b5\n", "\n")
    for state in seen["prompt"], seen["again"]:
        assert shown(state) == dataset.decode(state["ids"]) == prompt, "the prompt"
        assert state["message"] == "" and state["go"] == "Continue"
    assert shown(seen["unknown"]) == prompt + prompt[0], "unknown characters are left out"
    message = seen["unknown"]["message"]
    assert message.count("\u2603") == message.count("\U0001F980") == 1, "and said, once"
    assert shown(seen["empty"]) == itos[0], "an empty prompt"
    for run, more in (seen["greedy"], 10), (seen["long"], T):
        busy, stopped, later = run["busy"], run["stopped"], run["later"]
        assert [busy["go"], stopped["go"], later["go"]] == ["Stop", "Continue", "Continue"]
        assert stopped["ids"] == later["ids"], "Stop does not stop"
        assert len(busy["ids"]) <= len(stopped["ids"]) <= len(busy["ids"]) + 2
        assert len(stopped["ids"]) > len(prompt) + more, "it writes too little"
        assert shown(stopped) == dataset.decode(stopped["ids"])
        assert shown(stopped).startswith(prompt)
    assert seen["long"]["stopped"]["ids"][:len(seen["greedy"]["later"]["ids"])] == \
        seen["greedy"]["later"]["ids"], "Continue goes on where it was"
    assert seen["greedy"]["later"]["degrees"] == "0" and seen["long"]["later"]["degrees"] == "1"
    ids = seen["greedy"]["later"]["ids"]
    starts = windows(len(ids), T)
    for i in range(len(prompt), len(ids)):      # temperature 0 takes the likeliest
        logits, _ = look(model, ids[starts[i - 1]:i])
        assert logits.max() - logits[ids[i]] < 1e-3, "temperature 0"
    ids = seen["long"]["later"]["ids"]
    likeliest = [look(model, ids[max(0, i - T // 2):i])[0].argmax().item() == ids[i]
                 for i in range(len(seen["greedy"]["later"]["ids"]), len(ids))]
    assert not all(likeliest), "temperature 1 takes always the likeliest"
    for counts, expected in zip(seen["counts"], [[25, 4, 9], [5, 2, 3], [1, 0, 0]]):
        for count, share in zip(counts, expected):
            assert close(count / 20000, share / sum(expected), 0.015), seen["counts"]
    check_pointing(seen["atStart"], model, itos, 3)
    check_pointing(seen["atEnd"], model, itos, len(seen["atEnd"]["ids"]) - 2)
    check_curve(seen, saved["reports"])
    print(f"    it wrote: {shown(seen['long']['later'])[:150]!r}")

def check_curve(seen, reports):
    """The dots of the curve stand where the labels of the axes say."""
    words = [label for label, _, _ in seen["labels"] if not re.fullmatch(r"[\d.]+", label)]
    assert any("loss" in word for word in words) and any("step" in word for word in words)
    numbers = [(float(label), x, y) for label, x, y in seen["labels"] if label not in words]
    bottom, left = max(y for _, _, y in numbers), min(x for _, x, _ in numbers)
    steps = sorted((value, x) for value, x, y in numbers if y == bottom)
    losses = sorted((value, y) for value, x, y in numbers if x == left)
    assert steps[0][1] < steps[-1][1] and losses[0][1] > losses[-1][1], "upside down"
    def place(value, ticks):
        (a, at_a), (b, at_b) = ticks[0], ticks[-1]
        return at_a + (value - a) / (b - a) * (at_b - at_a)
    before, expected = 0, ([], [])
    for step, (train, val) in reports.items():
        if train is not None:
            expected[0].append(((before + step) / 2, train))
        expected[1].append((step, val))
        before = step
    for dots, points in zip(seen["dots"], expected):
        assert len(dots) == len(points) > 0, "dots are missing"
        for (cx, cy), (step, loss) in zip(dots, points):
            assert close(cx, place(step, steps), 1) and close(cy, place(loss, losses), 6)

def check_looks():
    """Heads stand in rows, a block a row, wide and narrow; dark where the screen is."""
    for flags, color in ((), "rgb(0, 0, 0)"), (["--blink-settings=preferredColorScheme=0"],
                                              "rgb(255, 255, 255)"):
        with tempfile.TemporaryDirectory() as name:
            model = random_model(n_heads=8, d_model=32, n_layers=3)
            save(Path(name), model, list(CHARS), {0: (None, 4.2), 4: (3.0, 2.5)})
            seen = in_browser(Path(name), LOOK, "--window-size=1012,900", *flags)
        for corners in seen["corners"], seen["narrow"]:
            rows = [corners[8 * l:8 * l + 8] for l in range(3)]
            assert all(len({round(top) for _, top in row}) == 1 for row in rows), "rows"
            assert rows[0][0][1] < rows[1][0][1] < rows[2][0][1], "blocks, from top to bottom"
            for column in zip(*rows):
                assert len({round(left) for left, _ in column}) == 1, "columns"
        assert seen["wide"] == 0, "wider than a telephone"
        assert seen["dark"] == color, seen["dark"]

def check_refusals():
    """What the page cannot run ends in one sentence."""
    for changes in dict(causal=False), dict(ffn="mine"), dict(attention="mine"):
        with tempfile.TemporaryDirectory() as name:
            model = random_model(causal=changes.get("causal", True))
            model.config = type(model.config)(**{**asdict(model.config), **changes})
            save(Path(name), model, list(CHARS), {0: (None, 4.2), 4: (3.0, 2.5)})
            made = make_page(Path(name))
            assert made.returncode != 0 and not (Path(name) / "page.html").exists()
            assert len(made.stderr.strip().splitlines()) == 1, made.stderr
    with tempfile.TemporaryDirectory() as name:
        made = make_page(Path(name))            # there is no checkpoint.pt
        assert made.returncode != 0 and len(made.stderr.strip().splitlines()) == 1, made.stderr

def main():
    torch.manual_seed(0)
    saved, model, dataset = lab.load(FOLDER / "checkpoint.pt")
    ids = dataset.encode((FOLDER / "input.txt").read_text(encoding="utf-8-sig")[:200])
    checks = [("the trained model", lambda: check_numbers(model, dataset.itos, ids))]
    for changes in VARIANTS:
        checks.append((f"a random model, {changes}", lambda changes=changes: check_numbers(
            random_model(**changes), list(CHARS), torch.randint(11, (40,)).tolist())))
    checks += [("the controls", lambda: check_controls(saved, model, dataset)),
               ("light, dark, wide, narrow", check_looks),
               ("what the page cannot run", check_refusals)]
    failed = 0
    for name, check in checks:
        print(name, flush=True)
        try:
            check()
        except Exception:
            traceback.print_exc(file=sys.stdout)
            failed += 1
    print(f"{len(checks) - failed} passed, {failed} failed")
    sys.exit(failed > 0)

if __name__ == "__main__":
    found = [shutil.which(name) for name in ("chromium", "chromium-browser", "google-chrome")]
    BROWSER = next((path for path in found if path), None)
    if BROWSER is None:
        print("the page was not checked: no Chromium here")
        sys.exit(0)
    FOLDER = Path(sys.argv[1]).resolve()
    sys.path.insert(0, str(FOLDER))
    lab = importlib.import_module("mini_transformer")
    main()
