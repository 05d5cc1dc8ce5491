"""ONNX files are compiled where transformers is not installed; what needs it says so."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import hetcomp
from hetcomp import frontend
from hetcomp.export_onnx import export_onnx
from hetcomp.ir.serialise import to_json
from hetcomp.models_zoo import find
from tests.reference import onnx_genai_models, tiny_models

# As if it were not there: importing it raises ModuleNotFoundError.
_BLOCKED = "import sys; sys.modules['transformers'] = None\n"


def python(script: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", _BLOCKED + script, *map(str, arguments)], capture_output=True, text=True, timeout=300
    )


def command(*arguments: object) -> subprocess.CompletedProcess[str]:
    return python("from hetcomp.cli.start import main; main()", *arguments)


def genai(folder: Path) -> Path:
    """As genai's builder writes them, beside a tokenizer."""
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(find("demo-moe") / name, folder / name)
    return onnx_genai_models.write(folder / "m.onnx", tiny_models.build("qwen3_moe"), bits=4, zeros=True)


def exported(folder: Path) -> Path:
    tiny_models.build("qwen3_moe").save_pretrained(folder / "hf")
    return export_onnx(folder / "hf", folder / "m.onnx")


@pytest.mark.slow
def test_an_onnx_file_is_compiled_with_its_tokenizer(tmp_path):
    out = tmp_path / "m.hetc"
    done = command("compile", genai(tmp_path), "--formats", "f32", "--context", 64, "-o", out)
    assert done.returncode == 0, done.stderr
    assert hetcomp.load(out)([5, 6, 7]).shape == (3, tiny_models.VOCAB)
    assert (out / "tokenizer.hetc.json").is_file()


def test_an_exported_graph_gives_the_same_plan(tmp_path):
    script = """if True:
        from hetcomp.frontend import load
        from hetcomp.ir.serialise import to_json
        print(to_json(load(sys.argv[1], context_length=64, max_batch=1, max_tokens=32, max_logit_rows=8).plan))"""
    path = exported(tmp_path)
    done = python(script, path)
    assert done.returncode == 0, done.stderr
    here = frontend.load(path, context_length=64, max_batch=1, max_tokens=32, max_logit_rows=8)
    assert done.stdout.rstrip() == to_json(here.plan).rstrip()


def test_a_chat_template_is_left_out_with_a_sentence():
    """Since what it renders is compared with what transformers renders."""
    script = """if True:
        from pathlib import Path
        from hetcomp.build_artifact import _words
        from hetcomp.progress import QuietProgress
        print(_words(Path(sys.argv[1]), QuietProgress())[1])"""
    done = python(script, find("demo-moe"))
    assert done.stdout == "None\n", done.stderr
    assert "what transformers renders, which is not installed" in done.stderr


def test_a_folder_needs_transformers_and_the_refusal_says_so():
    done = command("plan", find("demo-moe"), "--hw", "preset:9950x-64gb")
    assert done.returncode == 1
    assert "transformers, which is not installed" in done.stderr and "Traceback" not in done.stderr
