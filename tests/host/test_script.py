"""A script as a user of llama-cpp-python has it: what it prints does not change when a draft is passed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from ds4_mtp_plugin.cli.demo import BASE, DSPARK, HEAD
from tests.host.test_host_abilities import tiny_llama

ROOT = Path(__file__).resolve().parents[2]

SCRIPT = '''
import json, multiprocessing, pickle, sys
DRAFT
from llama_cpp import Llama, LlamaGrammar, LogitsProcessorList, StoppingCriteriaList

def shown(answer):
    """Without what differs from call to call anyway."""
    return {key: value for key, value in answer.items() if key not in ("id", "created")}

def elsewhere(state, queue):
    queue.put(pickle.loads(state)("def main():", max_tokens=30, temperature=0.0)["choices"][0]["text"])

def main():
    base = sys.argv[1]
    llm = Llama(base, n_ctx=1024, logits_all=True, verbose=False, n_threads=1, n_threads_batch=1, **options)
    say = lambda *what: print(json.dumps(what, default=float))

    say("completion", shown(llm("import os\\n", max_tokens=60, temperature=0.0)))
    say("seeded", shown(llm("import os\\n", max_tokens=60, temperature=0.9, seed=11, repeat_penalty=1.1)))
    say("mirostat", shown(llm("class A", max_tokens=40, temperature=0.9, seed=3, mirostat_mode=2)))
    say("stop", shown(llm("def main():", max_tokens=200, temperature=0.0, stop=["\\n\\n", "return"])))
    say("echo", shown(llm("def main():", max_tokens=8, temperature=0.0, echo=True, suffix=None)))
    say("logprobs", shown(llm("def main():", max_tokens=30, temperature=0.0, logprobs=3)))
    say("bias", shown(llm("def main():", max_tokens=30, temperature=0.0, logit_bias={"10": 5.0, "11": -100.0})))
    for chunk in llm("import sys\\n", max_tokens=50, temperature=0.7, seed=4, stream=True):
        say("stream", shown(chunk))
    question = [{"role": "user", "content": "What does `textwrap.dedent` do?"}]
    say("chat", shown(llm.create_chat_completion(question, max_tokens=60, temperature=0.0)))
    for chunk in llm.create_chat_completion(question, max_tokens=40, temperature=0.8, seed=5, stream=True):
        say("chat stream", shown(chunk))
    say("json", shown(llm.create_chat_completion(
        question, max_tokens=60, temperature=0.0, response_format={"type": "json_object"})))
    grammar = LlamaGrammar.from_string('root ::= ("yes" | "no") (" " ("yes" | "no"))*', verbose=False)
    say("grammar", shown(llm("Is it?", max_tokens=25, temperature=1.0, seed=6, grammar=grammar)))
    seen = []
    def processor(ids, scores):
        seen.append(len(ids))
        return scores
    say("processor", shown(llm(
        "def main():", max_tokens=20, temperature=0.0, logits_processor=LogitsProcessorList([processor]),
        stopping_criteria=StoppingCriteriaList([lambda ids, logits: len(ids) > 15]))), seen)
    tokens = llm.tokenize(b"while True:")
    llm.reset()
    llm.eval(tokens)
    by_hand = []
    for _ in range(10):
        by_hand.append(llm.sample(temp=0.0))
        llm.eval(by_hand[-1:])
    say("by hand", by_hand)
    state = llm.save_state()
    say("again", shown(llm("import os\\n", max_tokens=20, temperature=0.0)))
    llm.load_state(state)
    say("state", [token for token, _ in zip(llm.generate(tokens + by_hand + [11], temp=0.0), range(10))])
    second = Llama(sys.argv[3], n_ctx=256, embedding=True, verbose=False, n_threads=1, n_threads_batch=1)
    say("embedding of a second model", second.create_embedding("hello")["data"][0]["embedding"])
    say("beside it", shown(llm("import os\\n", max_tokens=20, temperature=0.0)))
    queue = multiprocessing.get_context("spawn").Queue()
    process = multiprocessing.get_context("spawn").Process(target=elsewhere, args=(pickle.dumps(llm), queue))
    process.start()
    say("another process", queue.get(timeout=120))
    process.join()

if __name__ == "__main__":
    main()
'''

WITH = 'from ds4_mtp_plugin import MtpDraft\noptions = {"draft_model": MtpDraft(sys.argv[2], num_pred_tokens=3)}'
WITHOUT = "import ds4_mtp_plugin\noptions = {}"


@pytest.mark.parametrize("head", [HEAD, DSPARK], ids=["mtp", "dspark"])
def test_it_prints_the_same_with_and_without_a_draft(tmp_path_factory: pytest.TempPathFactory, head: Path) -> None:
    other = tiny_llama(tmp_path_factory.mktemp("other") / "llama.gguf")
    printed = []
    for draft in (WITHOUT, WITH):
        script = tmp_path_factory.mktemp("script") / "script.py"
        script.write_text(SCRIPT.replace("DRAFT", draft))
        done = subprocess.run(
            [sys.executable, str(script), str(BASE), str(head), str(other)],
            capture_output=True,
            text=True,
            timeout=600,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )
        assert done.returncode == 0, done.stderr[-3000:]
        printed.append(done.stdout.splitlines())
    assert len(printed[0]) > 60
    for plain, drafted in zip(*printed):
        assert drafted == plain
    assert len(printed[0]) == len(printed[1])
