"""recipes.py and the line that begins with it, on a small README."""
import shutil

# The line as the README has it. Nothing in it means anything to bash, PowerShell or cmd.
LINE = (r"""python -X utf8 -c "exec(open('README.md').read()"""
        r""".split('\n# recipes.py')[1].split('\n' + 3*chr(96))[0])" """).strip()
FENCE = 3 * "`"
ONE = '# one.py\n"""A recipe, with an accent: \u00e9."""\nprint("one")\n'
TWO = "# two.py\nx = 1\n\nprint('two')\n"

def check(folder, python):
    assert LINE.count('"') == 2 and not set(LINE) & set("$`%!^&|<>"), LINE
    code = LINE.split('"')[1]
    readme = folder / "README.md"
    if readme.exists():                         # the real one has this very line
        assert LINE in readme.read_text(encoding="utf-8").splitlines(), "not the README's line"
    here = folder / "a folder for recipes"
    shutil.rmtree(here, ignore_errors=True)
    here.mkdir()
    itself = (folder / "recipes.py").read_text(encoding="utf-8")
    blocks = [("bash", LINE + "\n"), ("python", "import torch\n# three.py\n"), ("python", ONE),
              ("python", itself), ("python", TWO), ("", "# recipes.py\n"),
              ("python", "# four\n")]
    text = "# \u00c9\u4e2d\nWrite the recipes, `# recipes.py` first:\n\n" + "\n".join(
        f"<details>\n\n{FENCE}{name}\n{block}{FENCE}\n</details>\n" for name, block in blocks)

    def run(*words):
        return python("-X", "utf8", "-c", f"import os, sys; os.chdir({str(here)!r}); {words[0]}")

    wanted = {"one.py": ONE, "recipes.py": itself, "two.py": TWO}
    for ends in "\n", "\r\n":
        (here / "README.md").write_bytes(text.replace("\n", ends).encode())
        for name in wanted:
            (here / name).unlink(missing_ok=True)
        said = run(code).splitlines()
        files = {path.name: path.read_text(encoding="utf-8") for path in here.glob("*.py")}
        assert files == wanted, files.keys()
        assert [line.split(":")[0] for line in said] == list(wanted), said
    (here / "one.py").write_text(ONE + "# my own line\n", encoding="utf-8")
    (here / "two.py").unlink()
    again = "import runpy; runpy.run_path('recipes.py')"
    for command in code, again:
        words = {line.split(":")[0]: line.split(":")[1] for line in run(command).splitlines()}
        assert len(set(words.values())) == 2 + (command == code), words
        assert "ALONE" in words["one.py"] and "here" in words["recipes.py"], words
        assert (here / "one.py").read_text(encoding="utf-8").endswith("# my own line\n")
        assert (here / "two.py").read_text(encoding="utf-8") == TWO
    (here / "README.md").unlink()
    said = python("-c", f"import os; os.chdir({str(here)!r})\ntry:\n    {again}\n"
                        "except SystemExit as error: print(error)")
    assert "README.md" in said, said
