"""Run llama.cpp's ``convert_hf_to_gguf.py`` on several checkpoints, in one process, which imports PyTorch once.

``python tests/reference/convert_all.py SCRIPT JOBS``: JOBS is a JSON list of [folder, file, pre-tokenizer, option ...].
The script knows a tokenizer by a hash of what it makes of a text, and takes no other; the tiny ones are none that it
knows, so here it is told. It keeps what options say: a family's job with --mtp comes behind its others.
"""

import json
import runpy
import sys
from pathlib import Path

script, jobs = sys.argv[1:]
sys.path.insert(0, str(Path(script).parent))

import transformers  # noqa: E402
from conversion.base import TextModel  # noqa: E402

# It asks for this of DeepSeek-V3.2's tokenizer, whose setting transformers 5 drops where there is a tokenizer.json.
transformers.PreTrainedTokenizerFast.add_bos_token = True
for folder, out, pre, *options in json.loads(jobs):
    TextModel.get_vocab_base_pre = lambda *_, pre=pre: pre
    sys.argv = [script, folder, "--outfile", out, "--outtype", "f32", *options]
    runpy.run_path(script, run_name="__main__")
