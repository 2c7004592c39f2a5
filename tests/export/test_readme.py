"""The README's script: a user with the exported folder, torch and transformers gets the answer that jaxmem gives."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

import jaxmem
from jaxmem.assets import TINY_PVM
from jaxmem.data.boards import BoardDataset

pytest.importorskip("torch")
README = Path(__file__).parents[2] / "README.md"
QUESTION = "Read and add C F A"


def test_the_readme_script_answers_as_jaxmem_does(tmp_path: Path) -> None:
    (script,) = re.findall(
        r"```python\n(from PIL import Image\nfrom transformers.*?)```", README.read_text(), re.DOTALL
    )
    assert len(script.strip().splitlines()) <= 16
    Image.fromarray(BoardDataset("test", 3)[0].image).save(tmp_path / "board.png")
    model = jaxmem.load(dtype="float32", memory=TINY_PVM)
    model.export(tmp_path / "pvm-hf", proven=False)
    code = script.replace("Which digit is in the top left corner?", QUESTION)
    (tmp_path / "use.py").write_text("import sys\nsys.modules['jax'] = sys.modules['jaxmem'] = None\n" + code)
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(tmp_path / "cache")}
    done = subprocess.run([sys.executable, "use.py"], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    content = [{"type": "image", "image": str(tmp_path / "board.png")}, {"type": "text", "text": QUESTION}]
    (ours,) = model.generate([{"role": "user", "content": content}], max_new_tokens=20)
    assert done.stdout.strip() == ours.text.strip() and re.match(r"C\d=\d F\d=\d A\d=\d #\d", ours.text)
