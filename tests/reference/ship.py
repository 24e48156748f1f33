"""From a training run to the files that ship: two GGUFs, their loss plot, and the model card.

    python -m tests.reference.ship --run DIR                 # everything, acceptance measured at the end
    python -m tests.reference.ship --dspark DIR              # a DSpark head of the shipped model, and its acceptance
    python -m tests.reference.ship --acceptance              # only measure what is shipped again, and rewrite the card

The card is generated whole from ``card.json``, which carries what a run and a measurement found, so that neither a
figure nor a sentence about it is ever typed by hand.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import platform
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.fixtures.ds4_gguf import Ds4Config, Vocab, write_gguf
from tests.fixtures.dspark_gguf import write_file

ROOT = Path(__file__).resolve().parents[2]
MODELS = ROOT / "ds4_mtp_plugin" / "models"
NAMES = {"trunk": "ds4-mini-q8_0.gguf", "mtp": "ds4-mini-mtp-q8_0.gguf"}
DSPARK = "ds4-mini-dspark-q8_0.gguf"
TEXTS = ROOT / "tests" / "fixtures" / "mini_texts.json"
GENERAL = {
    "basename": "ds4-mini",
    "author": "The ds4-mtp-plugin authors",
    "license": "mit",
    "license.name": "MIT; trained on text under PSF-2.0",
    "organization": "ds4-mtp-plugin",
}
TEMPERATURES = (0.0, 0.7, 1.0)
DEPTH = 3

#: Questions like those of the training chats, and beginnings of code: what a demo would ask.
QUESTIONS = (
    "What does `textwrap.dedent` do?",
    "What is `collections.OrderedDict`?",
    "Show the source of `posixpath.join`.",
    "What does the module `calendar` define?",
    "Explain `str.split`.",
    "Describe the module `json` in one sentence.",
    "What does the Python manual say about `for`?",
    "Write the function `chunks`: Yield successive chunks of a list.",
)
BEGINNINGS = (
    "def main():\n    ",
    "class TestCase:\n    def __init__(self",
    '# Lib/example.py\n\n"""',
    "import os\nimport sys\n\n",
)


def config_of(values: dict[str, Any]) -> Ds4Config:
    """A configuration that went through JSON."""
    return Ds4Config(**{**values, "compress_ratios": tuple(values["compress_ratios"])})


def load(checkpoint: Path) -> tuple[Any, dict[str, Any]]:
    """The model of a checkpoint, ready for use, and the checkpoint."""
    import torch

    from tests.reference.model import Ds4

    state = torch.load(checkpoint, weights_only=True)
    model = Ds4(config_of(json.loads(state["config"])))
    model.load_state_dict(state["model"])
    return model.eval(), state


def export(model: Any, tokenizer_path: Path, folder: Path, quant: str = "Q8_0") -> dict[str, Path]:
    """Write the trunk and the MTP file of a model into ``folder``."""
    from tests.reference import tokenizer
    from tests.reference.export import mtp_tensors, trunk_tensors

    vocab = tokenizer.gguf_vocab(tokenizer.load(tokenizer_path))
    folder.mkdir(parents=True, exist_ok=True)
    paths = {part: folder / name for part, name in NAMES.items()}
    write_gguf(
        paths["trunk"],
        model.cfg,
        trunk_tensors(model),
        part="trunk",
        vocab=vocab,
        quant=quant,
        name="ds4-mini",
        general={**GENERAL, "description": "A very small DeepSeek-V4 that has read the Python standard library."},
    )
    write_gguf(
        paths["mtp"],
        model.cfg,
        mtp_tensors(model),
        part="mtp",
        vocab=vocab,
        quant=quant,
        name="ds4-mini MTP",
        general={**GENERAL, "description": "The MTP head of ds4-mini, for speculative decoding."},
    )
    return paths


def vocab_of(path: Path) -> Vocab:
    """The vocabulary that a file has."""
    from gguf import GGUFReader, TokenType

    fields = GGUFReader(path).fields

    def value(key: str) -> Any:
        return fields[f"tokenizer.{key}"].contents()

    return Vocab(
        tokens=value("ggml.tokens"),
        types=[TokenType(kind) for kind in value("ggml.token_type")],
        merges=value("ggml.merges"),
        chat_template=value("chat_template"),
    )


def export_dspark(run: Path, folder: Path) -> dict[str, Any]:
    """Write a DSpark head of the model in `folder`; what the card says of it."""
    import torch

    from tests.reference import dspark, train_dspark

    model = train_dspark.shipped()
    head = dspark.Dspark(dspark.stage_config(model.cfg, n_expert=train_dspark.N_EXPERT), train_dspark.LAYERS)
    state = torch.load(run / "head.pt", weights_only=True)
    head.load_state_dict(state["head"])
    path = write_file(
        folder / DSPARK,
        head.cfg,
        dspark.tensors(head),
        layers=head.layers,
        mask=train_dspark.mask_id(),
        vocab=vocab_of(folder / NAMES["trunk"]),
        quant=lambda name: "Q8_0",
        name="ds4-mini DSpark",
        general={**GENERAL, "description": "A DSpark head of ds4-mini, for speculative decoding."},
        n_block=head.n_block,
    )
    settings = json.loads(state["arguments"])
    return {
        "parameters": sum(p.numel() for p in head.parameters()),
        "size": path.stat().st_size,
        "stages": head.n_layer,
        "block": head.n_block,
        "layers": list(head.layers),
        "experts": head.cfg.n_expert,
        "score": json.loads((run / "score.json").read_text()),
        **{name: settings[name] for name in ("minutes", "lr", "processes", "seed")},
    }


def parameters(model: Any) -> dict[str, int]:
    """Counts: all parameters, those of the MTP block, and those that one token uses in the trunk."""
    cfg = model.cfg
    block = f"blk.{len(cfg.compress_ratios)}."
    total = mtp = active = 0
    for name, p in model.named_parameters():
        total += p.numel()
        if name.startswith(block) or name.startswith("mtp_"):
            mtp += p.numel()
        elif name == "token_embd.weight":
            active += cfg.n_embd
        elif "_exps." in name:
            active += p.numel() * cfg.n_expert_used // cfg.n_expert
        else:
            active += p.numel()
    return {"total": total, "mtp": mtp, "active": active}


# --- acceptance ------------------------------------------------------------------------------------------------------


class _Tokens:
    """A logits processor that changes nothing and keeps the tokens it is shown: all but the last of a text."""

    def __init__(self) -> None:
        self.prompt, self.text = [], []  # type: list[int], list[int]

    def __call__(self, ids: Any, scores: Any) -> Any:
        self.prompt = self.prompt or ids.tolist()
        self.text = ids[len(self.prompt) :].tolist()
        return scores


def _texts(llm: Any, temperature: float, max_tokens: int) -> Iterator[tuple[str, _Tokens]]:
    from llama_cpp import LogitsProcessorList

    for seed, question in enumerate(QUESTIONS):
        message, seen = [{"role": "user", "content": question}], _Tokens()
        sampling = {"temperature": temperature, "seed": seed, "logits_processor": LogitsProcessorList([seen])}
        answer = llm.create_chat_completion(message, max_tokens=max_tokens, **sampling)
        yield answer["choices"][0]["message"]["content"], seen
    for seed, beginning in enumerate(BEGINNINGS):
        seen = _Tokens()
        sampling = {"temperature": temperature, "seed": seed, "logits_processor": LogitsProcessorList([seen])}
        answer = llm.create_completion(beginning, max_tokens=max_tokens, **sampling)
        yield beginning + answer["choices"][0]["text"], seen


def measure_acceptance(
    folder: Path, head: str = NAMES["mtp"], depth: int = DEPTH, max_tokens: int = 200
) -> tuple[dict[str, Any], dict[str, list[_Tokens]]]:
    """Acceptance per draft position and temperature, on the engine, with the host's own sampler; and the texts.

    Position j's rate is the share of drafts at depth j that were accepted, with all before them. The texts are the
    same whatever the head. They depend on the CPU, whose kernels decide near ties: one token, and all behind it is
    another text. So a comparison with these rates is made over these texts.
    """
    from ds4_mtp_plugin import MtpDraft  # first: it makes the host load our engine

    from llama_cpp import Llama  # isort: skip

    found: dict[str, Any] = {"max_tokens": max_tokens, "prompts": len(QUESTIONS) + len(BEGINNINGS), "rows": []}
    options: dict[str, Any] = {"num_pred_tokens": depth}
    tokens: dict[str, list[_Tokens]] = {}
    for temperature in TEMPERATURES:
        # A new pair each time: statistics count from when the draft was attached.
        draft = MtpDraft(folder / head, **options)
        # One thread: what is counted here does not depend on it, and it tolerates other work on the machine.
        threads = {"n_threads": 1, "n_threads_batch": 1}
        llm = Llama(str(folder / NAMES["trunk"]), n_ctx=2048, draft_model=draft, verbose=False, **threads)
        texts = list(_texts(llm, temperature, max_tokens))
        tokens[f"{temperature:g}"] = [seen for _, seen in texts]
        stats = draft.stats
        found["rows"].append(
            {
                "temperature": temperature,
                "rates": [round(rate, 3) for rate in stats.rate_per_position],
                "per_iter": round(stats.per_iter, 2),
                "iters": stats.iters,
            }
        )
        if temperature == 0.0:
            found["samples"] = [[QUESTIONS[i], texts[i][0]] for i in (0, 2, 4)]
        llm.close()
    return found, tokens


def write_texts(tokens: dict[str, list[_Tokens]]) -> None:
    """Keep the texts that acceptance was measured over, a line per text, for the tests to replay."""
    rows = {
        temperature: ",\n".join(json.dumps({"prompt": each.prompt, "text": each.text}) for each in texts)
        for temperature, texts in tokens.items()
    }
    TEXTS.write_text("{" + ",\n".join(f'"{temperature}": [\n{lines}\n]' for temperature, lines in rows.items()) + "}\n")


# --- card ------------------------------------------------------------------------------------------------------------


def _acceptance_section(found: dict[str, Any], depth: int = DEPTH) -> str:
    head = " | ".join(f"position {j + 1}" for j in range(depth))
    lines = [
        f"| temperature | {head} | accepted per verify (depth {depth}) |",
        "|---" * (depth + 2) + "|",
    ]
    for row in found["rows"]:
        rates = " | ".join(f"{rate:.2f}" for rate in row["rates"])
        lines.append(f"| {row['temperature']:g} | {rates} | {row['per_iter']:.2f} |")
    return "\n".join(lines)


def _dspark_section(found: dict[str, Any]) -> str:
    agreement = " / ".join(f"{value:.2f}" for value in found["score"]["agreement"])
    measured = ""
    if acceptance := found.get("acceptance"):
        measured = f"""
As above, at depth {found["block"]}:

{_acceptance_section(acceptance, found["block"])}
"""
    size = f"{found['parameters'] / 1e6:.1f} million parameters"
    layers = ", ".join(map(str, found["layers"]))
    score, minutes = found["score"], float(found["minutes"])
    trained = f"{score['steps']:,} steps, {score['tokens'] / 1e6:.1f} million tokens"
    return f"""
## The DSpark head
{found["stages"]} stages with {found["experts"]} experts each, {size}, which read the inputs of layers {layers} (the
last is behind the trunk) and draft a block of {found["block"]} tokens in one decode. Trained on the finished trunk:

    python -m tests.reference.train_dspark --out DIR --minutes {minutes:g}
    python -m tests.reference.ship --dspark DIR

on {found["processes"]} CPU cores, with other work beside it: {trained}. On held-out text its best token
is the trunk's, where all before it were, in {agreement} of the cases, by position.
{measured}"""


def card(facts: dict[str, Any]) -> str:
    """The model card, from ``card.json``."""
    cfg, score, count = facts["config"], facts["score"], facts["parameters"]
    acceptance = ""
    if found := facts.get("acceptance"):
        samples = "\n\n".join(
            f"> **{question}**\n\n````text\n{text.strip()}\n````" for question, text in found["samples"]
        )
        acceptance = f"""
## Acceptance
Drafts of the MTP head that the host's sampler chose itself, at depth {DEPTH}, over {found["prompts"]} prompts of up to
{found["max_tokens"]} new tokens each. A position's rate is the share of its drafts that were accepted,
with all before them.

{_acceptance_section(found)}

`python -m tests.reference.ship --acceptance` measures this again and rewrites this file.

## What it says
Greedy (temperature 0), cut at {found["max_tokens"]} tokens:

{samples}
"""
    dspark, dspark_row = "", ""
    if of_dspark := facts.get("dspark"):
        dspark = _dspark_section(of_dspark)
        dspark_row = f"\n| `{DSPARK}` | a DSpark head of it, for `MtpDraft` too | {of_dspark['size'] / 1e6:.1f} MB |"
    ratios = ", ".join(map(str, cfg["compress_ratios"]))
    mtp_agreement = " / ".join(f"{value:.2f}" for value in score["agreement"])
    mtp_losses = " / ".join(f"{value:.2f}" for value in score["mtp_loss"])
    minutes = float(facts["minutes"])
    trained = f"{score['steps']:,} steps, {score['tokens'] / 1e6:.1f} million tokens ({score['epochs']:.1f} epochs)"
    return f"""# ds4-mini
A very small DeepSeek-V4, trained from nothing for tests and demonstrations: real language, real routing, and an MTP
head that was trained, not made up. It has read the Python standard library and nothing else. Ask it what is in there,
and do not believe the answer.

| file | what | size |
|---|---|---|
| `{NAMES["trunk"]}` | the model | {facts["sizes"]["trunk"] / 1e6:.1f} MB |
| `{NAMES["mtp"]}` | its MTP head, for `MtpDraft` | {facts["sizes"]["mtp"] / 1e6:.1f} MB |{dspark_row}

## Architecture
GGUF architecture `deepseek4`, every part of the large model in small:

- {len(cfg["compress_ratios"])} layers with compress ratios {ratios} (0: sliding window only; 4: compressed keys chosen
  by the lightning indexer; 128: compressed keys), window {cfg["n_swa"]};
- width {cfg["n_embd"]} in {cfg["hc_mult"]} hyper-connection streams, {cfg["hc_sinkhorn_iters"]} Sinkhorn iterations;
- {cfg["n_head"]} heads of {cfg["head_dim"]}, one shared key;
- {cfg["n_expert"]} experts of {cfg["n_ff_exp"]}, of which {cfg["n_expert_used"]} and a shared one are used;
  {cfg["n_hash_layers"]} layer routes by token id, the others by bias;
- one MTP block.

{count["total"] / 1e6:.1f} million parameters, {count["mtp"] / 1e6:.1f} million of them in the MTP block; a token uses
{count["active"] / 1e6:.1f} million of the trunk's. Trained at lengths 512 and 1024; the GGUF allows
{cfg["n_ctx_train"]}. Matrices are Q8_0.

Tokenizer: byte-level BPE of {cfg["n_vocab"]} tokens with DeepSeek's special tokens and pre-tokenizer (`deepseek-v3`),
learned from the same text. Chat format: DeepSeek-V4's, non-thinking, without tools.

## Data and licence
The standard library of CPython {facts["python"]}: its `Lib` folder without tests, the language reference in
`pydoc_data`, and the docstrings of built-in types, as files and as questions and answers made of them
(`tests/reference/data.py`): {facts["train_tokens"] / 1e6:.1f} million tokens. 2 % of the files are held out.
Copyright © 2001-2023 Python Software Foundation; All Rights Reserved; licensed under
[PSF-2.0](https://docs.python.org/3/license.html), reproduced in `LICENSE-PYTHON.txt`, since the model may repeat
what it read. The weights themselves are under the project's licence, MIT.

## Training
    python -m tests.reference.train --out DIR --minutes {minutes:g}
    python -m tests.reference.ship --run DIR

on {facts["processes"]} CPU cores, with other work beside it: {trained}. Trunk and MTP
block are trained together as in DeepSeek-V3 (MTP weight .3, then .1), with Muon for the matrices and AdamW for the
rest, a learning rate of {float(facts["lr"]):g} that falls linearly to zero from 35 % of the time on, and experts
balanced by bias; what differs from DeepSeek's recipe, and why, is in `tests/reference/train.py`.

| on held-out text | |
|---|---|
| trunk, nats per token | {score["loss"]:.3f} |
| trunk, bits per byte | {score["bits_per_byte"]:.3f} |
| MTP block at draft positions 1 / 2 / 3, nats per token | {mtp_losses} |
| MTP's best token is the trunk's, positions 1 / 2 / 3 | {mtp_agreement} |

![loss](loss.png)
{acceptance}{dspark}"""


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--run", type=Path, help="the directory that training wrote")
    parser.add_argument("--to", type=Path, default=MODELS, help="where the files go")
    parser.add_argument("--dspark", type=Path, help="the directory that the training of a DSpark head wrote")
    parser.add_argument("--acceptance", action="store_true", help="only measure the files that are there again")
    parser.add_argument("--no-acceptance", action="store_true", help="leave the measurement for later")
    args = parser.parse_args(arguments)
    if sum((args.run is not None, args.dspark is not None, args.acceptance)) != 1:
        parser.error("give one of --run, --dspark and --acceptance")
    json_path = args.to / "card.json"
    if args.run:
        from tests.reference import data, tokenizer

        model, state = load(args.run / "checkpoint.pt")
        paths = export(model, args.run / "tokenizer.json", args.to)
        settings = json.loads(state["arguments"])
        documents, _ = data.documents(int(settings["seed"]))
        encoded = tokenizer.load(args.run / "tokenizer.json").encode_batch([d.text for d in documents])
        facts = {
            "config": dataclasses.asdict(model.cfg),
            "parameters": parameters(model),
            "score": json.loads((args.run / "score.json").read_text()),
            "sizes": {part: path.stat().st_size for part, path in paths.items()},
            "train_tokens": sum(len(item.ids) + 2 for item in encoded),
            "python": platform.python_version(),
            **{name: settings[name] for name in ("minutes", "lr", "processes", "seed")},
        }
        shutil.copy(args.run / "loss.png", args.to / "loss.png")
        licence = data.library() / "LICENSE.txt"
        if licence.exists():
            shutil.copy(licence, args.to / "LICENSE-PYTHON.txt")
    else:
        facts = json.loads(json_path.read_text())
    if args.dspark:
        facts["dspark"] = export_dspark(args.dspark, args.to)
    if not args.no_acceptance:
        facts["acceptance"], tokens = measure_acceptance(args.to)
        if (found := facts.get("dspark")) is not None:
            found["acceptance"], _ = measure_acceptance(args.to, DSPARK, found["block"])
        write_texts(tokens)
    json_path.write_text(json.dumps(facts, indent=1) + "\n")
    (args.to / "README.md").write_text(card(facts))


if __name__ == "__main__":
    main()
