"""What README.md shows is run."""

import os
import re
import subprocess
import sys
from pathlib import Path

README = (Path(__file__).resolve().parents[2] / "README.md").read_text()


def test_the_examples_run_as_they_stand_and_have_fifteen_lines_each():
    examples = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(examples) == 2
    assert all(len([line for line in example.splitlines() if line.strip()]) <= 15 for example in examples)
    done = subprocess.run([sys.executable, "-c", "\n".join(examples)], capture_output=True, text=True, check=False,
                          cwd=Path(__file__).resolve().parents[2],
                          env={**os.environ, "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"})     # compiling takes the time
    assert done.returncode == 0, done.stderr
    # 64 · 20 + 2 · 20 · 20 + 20 · 10 = 2280 weights, a tenth of which are kept
    assert done.stdout.startswith("228 of 2280 weights kept\n")
    for line in re.findall(r"λ₁ = (\S+) is at most ν₁π₁ = (\S+)", done.stdout):
        assert 0 < float(line[0]) <= float(line[1])
    assert done.stdout.count("is at most") == 2
    before, after = map(float, re.findall(r"^loss (\S+)", done.stdout, re.MULTILINE))
    assert after < 0.1 < before
    assert done.stdout.endswith(" with 228 weights\n")


def test_the_commands_are_there():
    assert re.search(r"<!-- test command -->\n```bash\n.*pip install -e '\.\[test\]' && .* -m pytest", README)
    assert re.search(r"```bash\npython3 -m venv .*pip install -e .* && \.venv/bin/pkjax analyze\n```", README)
